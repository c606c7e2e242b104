"""SequentialAttentionCounting: counts what it is told, one object after the other, and points at each.

A Qwen2-VL reads what is to be counted, then looks at the image, so that its image features know the category; a stem
sees cells finer than its patches. What is unusual: the image is encoded once, and each step points: one softmax over
the cells and "no more". A cell that was pointed at, and cells that point to what has been counted, are taken out, as
the memory grows. The memory is an object that goes in and comes out, like a cache, so that rows are independent.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging
from transformers.utils.generic import can_return_tuple

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.counting_layers import (
    NUM_STEP_TOKENS,
    CellHeads,
    CountedAttention,
    EvidenceLayer,
    FineStem,
    Gated,
    StepLayers,
)
from regard.modeling.counting_loop import CountingMixin
from regard.modeling.counting_losses import (
    VISITED,
    count_loss,
    done_and_where_losses,
    location_losses,
    nearest_cell,
    offsets_between,
)
from regard.modeling.counting_outputs import (
    CountingImages,
    CountingMemory,
    CountingScene,
    SequentialAttentionCountingOutput,
)
from regard.modeling.losses import WeightedLosses
from regard.modeling.picture_patches import draw_marks, pictures_of

# What published backbones call their parts, before and since transformers 4.52, with and without a language model head.
_PUBLISHED_NAMES = {
    r"^(?:model\.)?visual\.": "vlm.visual.",
    r"^(?:model\.)?language_model\.": "vlm.language_model.",
    r"^model\.(?!visual\.|language_model\.)": "vlm.language_model.",
}


def cell_centres(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """x and y of a grid's cells, row by row, `(rows * columns, 2)`, in cells."""
    x, y = torch.arange(columns, device=device) + 0.5, torch.arange(rows, device=device) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


class SequentialAttentionCountingPreTrainedModel(WeightedLosses, PreTrainedModel):
    config: SequentialAttentionCountingConfig
    base_model_prefix = "counter"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means of their own
    _no_split_modules = ["EvidenceLayer", "Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"]
    _supports_sdpa = True
    # What is new beside the backbone: never quantized, and in full precision beside one in half.
    _keep_in_fp32_modules = ["stem", "evidence", "heads", "step_tokens", "token_proj", "step_proj", "look"]
    _keep_in_fp32_modules_strict = _keep_in_fp32_modules
    no_weight_decay = ("none_token", "step_tokens.weight", "gate")  # read by regard's trainers
    backbone_modules = ("vlm",)  # likewise

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.LayerNorm):  # ChannelNorm too, which the parent does not know by its name
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for name in ("weight_ih_l0", "weight_hh_l0"):
                init.trunc_normal_(module.get_parameter(name), std=std or module.hidden_size**-0.5)
        elif isinstance(module, Gated):
            init.constant_(module.gate, float(module.initial_gate))
        if isinstance(module, CountedAttention):
            init.trunc_normal_(module.none_token, std=0.02)
        elif isinstance(module, CellHeads):
            init.constant_(module.score.bias, -4.0)  # few cells hold an object
            init.constant_(module.density.bias, -6.0)
            init.zeros_(module.reach.bias)
            init.constant_(module.suppression, 8.0)
        elif isinstance(module, SequentialAttentionCountingModel):
            init.normal_(module.step_tokens.weight, std=0.02)


class SequentialAttentionCountingModel(CountingMixin, SequentialAttentionCountingPreTrainedModel):
    """Images and categories to counts, one object after the other, with a point for each."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__(config)
        vlm: Any = config.vlm_config
        self.step_tokens = nn.Embedding(NUM_STEP_TOKENS, vlm.text_config.hidden_size)  # a module, for peft to save
        self.vlm = AutoModel.from_config(vlm)
        self.stem = FineStem(config)
        self.token_proj = nn.Linear(vlm.text_config.hidden_size, config.hidden_size)
        self.step_proj = nn.Linear(vlm.text_config.hidden_size, config.hidden_size)
        self.evidence = nn.ModuleList([EvidenceLayer(config) for _ in range(config.num_evidence_layers)])
        self.heads = CellHeads(config)
        self.look = StepLayers(config)
        self.post_init()

    @classmethod
    def from_vlm_pretrained(
        cls, source: str | Path, config: SequentialAttentionCountingConfig | None = None, **kwargs
    ) -> "SequentialAttentionCountingModel":
        """A new model around a published Qwen2-VL or Qwen2.5-VL.

        Args:
            source: folder or Hub repository.
            config: of the rest; its `vlm_config` gives way to the published one.
            kwargs: of `from_pretrained`, such as `dtype`, and `quantization_config`, which spares what is new.

        Raises:
            ValueError: the source is another kind of model, or lacks weights.
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
        vlm = AutoConfig.from_pretrained(source, **hub)
        if vlm.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"{source} is a {vlm.model_type}; give a Qwen2-VL or Qwen2.5-VL")
        settings: dict[str, Any] = {} if config is None else config.to_dict()
        settings["vlm_config"] = vlm
        return cls._around_published(source, SequentialAttentionCountingConfig(**settings), **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, config=None, **kwargs
    ) -> "SequentialAttentionCountingModel":
        """As every model; a folder of adapters (`regard train --lora_rank`) names where its backbone is published."""
        folder = Path(str(pretrained_model_name_or_path))
        if not ((folder / ADAPTER_CONFIG_NAME).is_file() and (folder / CONFIG_NAME).is_file()):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        base = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
        kwargs["adapter_kwargs"] = (kwargs.get("adapter_kwargs") or {}) | {"_adapter_model_path": str(folder)}
        return cls._around_published(base, config or cls.config_class.from_pretrained(folder), **kwargs)

    @classmethod
    def _around_published(cls, source: str | Path, config: Any, output_loading_info: bool = False, **kwargs) -> Any:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # all that is new would be reported as missing
        try:
            model, info = cast(Any, super()).from_pretrained(
                source, config=config, key_mapping=_PUBLISHED_NAMES, output_loading_info=True, **kwargs
            )
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(name for name in info["missing_keys"] if name.startswith("vlm.")):
            raise ValueError(f"{source} lacks {len(missing)} weights of the backbone, {missing[0]} among them")
        model._weight_conversions = None  # or it would save the published names
        for name, child in model.named_children():
            if name not in cls.backbone_modules:
                child.float()  # what was not loaded has been made in the precision of the rest
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode_image(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> CountingImages:
        """Encode images, whatever is to be counted in them.

        Args:
            pixel_values: flat patches of all images, `(patches, channels * 2 * patch_size ** 2)`, as Qwen2-VL's image
                processor makes them, or `(images, patches, ...)` for images of one size.
            image_grid_thw: 1, rows and columns of the patches of each image, `(images, 3)`.
        """
        pixel_values = pixel_values.flatten(0, -2)
        features = self.vlm.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output
        cells, grids = [], []
        for image in pictures_of(pixel_values, image_grid_thw, self._vision):
            cells.append(image)
            grids.append([-(-side // self.config.cell_size) for side in image.shape[1:]])
        if len({tuple(grid) for grid in grids}) == 1:
            fine = list(self._fine_cells(torch.stack(cells)))
        else:  # zeros beside a small image are not what its edge looks like
            fine = [self._fine_cells(image[None])[0] for image in cells]
        return CountingImages(
            tokens=nn.utils.rnn.pad_sequence(list(features), batch_first=True),
            cells=nn.utils.rnn.pad_sequence(fine, batch_first=True),
            grid=torch.tensor(grids, device=pixel_values.device),
            image_grid_thw=image_grid_thw,
        )

    def _fine_cells(self, images: torch.Tensor) -> torch.Tensor:
        cell = self.config.cell_size
        height, width = images.shape[2:]
        images = nn.functional.pad(images, (0, -width % cell, 0, -height % cell))
        return self.stem(images).flatten(2).transpose(1, 2)

    @staticmethod
    def _index(input_ids: torch.Tensor, images: int) -> torch.Tensor:
        if images not in (1, len(input_ids)):
            raise ValueError(f"{len(input_ids)} rows about {images} images: image_index must say which.")
        return torch.arange(len(input_ids), device=input_ids.device) % images

    @property
    def _vision(self) -> Any:
        return cast(Any, self.config.vlm_config).vision_config

    def encode_category(
        self,
        images: CountingImages,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> CountingScene:
        """Look at encoded images for what is to be counted.

        Args:
            input_ids: category, image and step tokens, `(rows, tokens)`, as the processor lays them out.
            attention_mask: 1 for a token, 0 for padding, `(rows, tokens)`.
            image_index: the image of each row, `(rows,)`; without it row i is about image i, and a single image is that
                of all rows.

        Raises:
            ValueError: the numbers of rows and images do not agree.
        """
        if image_index is None:
            image_index = self._index(input_ids, len(cast(torch.Tensor, images.grid)))
        tokens, cells = cast(torch.Tensor, images.tokens), cast(torch.Tensor, images.cells)
        grid, grid_thw = images["grid"][image_index], images["image_grid_thw"][image_index]
        vlm: Any = self.config.vlm_config
        is_image = input_ids == vlm.image_token_id
        is_step = (input_ids[..., None] == torch.tensor(self.config.step_token_ids, device=input_ids.device)).any(-1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        embeddings = self.vlm.get_input_embeddings()(input_ids.masked_fill(is_step, 0))
        merged = grid_thw.prod(-1) // vlm.vision_config.spatial_merge_size**2
        present = torch.arange(tokens.shape[1], device=tokens.device) < merged[:, None]
        embeddings = embeddings.masked_scatter(
            is_image[..., None], tokens[image_index][present].to(embeddings.dtype)
        ).masked_scatter(is_step[..., None], self.step_tokens.weight.to(embeddings.dtype).repeat(len(input_ids), 1))
        positions, _ = self.vlm.get_rope_index(
            input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid_thw, attention_mask=attention_mask
        )
        features = self.vlm.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        features = features.to(self.step_proj.weight.dtype)  # which stays float32 where the backbone is float16
        steps = self.step_proj(features[is_step].unflatten(0, (-1, NUM_STEP_TOKENS)))  # (rows, 3, hidden_size)
        conditioned = self.token_proj(features[is_image])
        return self._scene(cells[image_index], grid, grid_thw, conditioned.split(merged.tolist()), steps)

    def _scene(
        self,
        cells: torch.Tensor,
        grid: torch.Tensor,
        grid_thw: torch.Tensor,
        conditioned: tuple[torch.Tensor, ...],
        steps: torch.Tensor,
    ) -> CountingScene:
        vlm: Any = self.config.vlm_config
        merge = vlm.vision_config.spatial_merge_size
        category = steps.mean(1)
        number = cells.shape[1]
        seen, places = cells.new_zeros(cells.shape), torch.zeros(*cells.shape[:2], 2, device=cells.device)
        mask = torch.zeros(cells.shape[:2], dtype=torch.bool, device=cells.device)
        sides = grid_thw[:, [2, 1]] * (
            vlm.vision_config.patch_size / self.config.cell_size
        )  # width and height, in cells
        shapes = torch.cat((grid, grid_thw[:, 1:] // merge), dim=1).tolist()
        for shape in sorted({tuple(shape) for shape in shapes}):
            rows, columns, coarse_rows, coarse_columns = shape
            chosen = [index for index, other in enumerate(shapes) if tuple(other) == shape]
            fine = cells[chosen, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))
            coarse = torch.stack([conditioned[index] for index in chosen]).transpose(1, 2)
            coarse = coarse.unflatten(2, (coarse_rows, coarse_columns))
            fine = self._condition(fine, coarse, category[chosen])
            centres = cell_centres(rows, columns, cells.device)
            padding = (0, 0, 0, number - rows * columns)
            flat = nn.functional.pad(fine.flatten(2).transpose(1, 2), padding)
            if len(chosen) == len(shapes):
                seen = flat
            else:
                seen = seen.index_copy(0, torch.tensor(chosen, device=cells.device), flat.to(seen.dtype))
            places[chosen] = nn.functional.pad(centres, padding) / sides[chosen][:, None]
            mask[chosen] = torch.arange(number, device=cells.device) < rows * columns
        return self._read_cells(seen, mask, places, grid, sides, steps)

    def _condition(self, fine: torch.Tensor, coarse: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """What the category makes of cells `(rows, hidden_size, cell rows, cell columns)` and of merged patches that
        have seen it, `(rows, hidden_size, patch rows, patch columns)`."""
        fine = fine + nn.functional.interpolate(coarse, fine.shape[2:], mode="bilinear").to(fine.dtype)
        for layer in self.evidence:
            fine = layer(fine, category)
        return fine

    def _read_cells(
        self,
        seen: torch.Tensor,
        mask: torch.Tensor,
        places: torch.Tensor,
        grid: torch.Tensor,
        sides: torch.Tensor,
        steps: torch.Tensor,
    ) -> CountingScene:
        """The scene of cells that the category has changed, `(rows, cells, hidden_size)`."""
        seen = self.heads.norm(seen)
        offsets = self.heads.offset(seen).float().tanh() * 2.0  # in cells
        points = places + offsets / sides[:, None]
        # Inside the image, with a gradient also for what points outside, or cells at its edges would never come back.
        points = points + (points.clamp(0.0, 1.0) - points).detach()
        density = self.heads.density(seen).squeeze(-1).float().sigmoid()
        return CountingScene(
            cells=seen,
            cell_mask=mask,
            places=places,
            points=points,
            scores=self.heads.score(seen).squeeze(-1).float().masked_fill(~mask, -VISITED),
            keys=self.heads.keys(seen),
            reach=nn.functional.softplus(self.heads.reach(seen).squeeze(-1).float()),
            grid=grid,
            sides=sides,
            steps=steps,
            count_estimate=(density * mask).sum(-1),
        )

    # --- steps ----------------------------------------------------------------------------------------------------

    def reset_memory(self, batch_size: int, num_cells: int = 0) -> CountingMemory:
        """An empty memory for some rows of scenes that have so many cells."""
        size, device = self.config.hidden_size, self.step_tokens.weight.device
        state = torch.zeros(batch_size, size, device=device, dtype=self.step_proj.weight.dtype)
        return CountingMemory(
            hidden=state,
            cell=state,
            counted=state[:, None, :][:, :0],
            points=torch.zeros(batch_size, 0, 2, device=device),
            suppression=torch.zeros(batch_size, num_cells, device=device),
        )

    def _suppress(self, scene: CountingScene, points: torch.Tensor, cell_index: torch.Tensor) -> torch.Tensor:
        """What each object takes from the cells' scores, `(rows, objects, cells)`."""
        visited = torch.zeros(*cell_index.shape, scene["cells"].shape[1], device=points.device)
        visited.scatter_(2, cell_index[..., None], VISITED)
        if self.config.marking == "image":
            return visited
        sides = scene["sides"][:, None]
        x, y = offsets_between(points * sides, scene["points"] * sides)  # (rows, objects, cells)
        distance = (x * x + y * y + 1e-6).sqrt()
        near = ((scene["reach"][:, None] - distance) / 0.15).sigmoid()
        return visited + self.heads.suppression * near

    def _remember(self, scene: CountingScene, points: torch.Tensor, cell_index: torch.Tensor) -> torch.Tensor | None:
        if self.look.counted is None:
            return None
        cells = cast(torch.Tensor, scene.cells)
        return self.look.counted(cells.gather(1, cell_index[..., None].expand(-1, -1, cells.shape[2])), points)

    def _remember_anew(self, scene: CountingScene, memory: CountingMemory) -> CountingMemory:
        """The same memory of objects as they look in another encoding of the image, as in training."""
        points, hidden, cell = memory["points"], memory["hidden"], memory["cell"]
        counted = self._remember(scene, points, nearest_cell(scene, points))
        if self.look.memory is not None:
            _, (hidden, cell) = self.look.memory.lstm(counted)
            hidden, cell = hidden[0], cell[0]
        return CountingMemory(
            hidden=hidden,
            cell=cell,
            counted=memory["counted"] if counted is None else counted,
            points=points,
            suppression=memory["suppression"],
        )

    def step(
        self, scene: CountingScene, memory: CountingMemory, return_attention_maps: bool = False
    ) -> SequentialAttentionCountingOutput:
        """Where the next object is, for each row, and whether there is none: outputs with one step."""
        states, suppression = memory["hidden"][:, None], memory["suppression"][:, None]
        return self._point(scene, states, memory["counted"], None, suppression, return_attention_maps)

    def count_object(self, scene: CountingScene, memory: CountingMemory, cell_index: torch.Tensor) -> CountingMemory:
        """The memory after the objects that these cells point to, `(rows,)`, have been counted too."""
        chosen = cell_index[:, None]
        points = cast(torch.Tensor, scene.points).gather(1, chosen[..., None].expand(-1, -1, 2))
        index = nearest_cell(scene, points)
        suppression = self._suppress(scene, points, index)[:, 0]
        suppression = suppression.scatter(1, chosen, VISITED)  # or a cell that points outside itself would go on
        remembered = self._remember(scene, points, index)
        hidden, cell, counted = memory["hidden"], memory["cell"], memory["counted"]
        if remembered is not None:
            counted = torch.cat((counted, remembered.to(counted.dtype)), dim=1)
        if self.look.memory is not None:
            hidden, cell = self.look.memory.remember(cast(torch.Tensor, remembered)[:, 0], hidden, cell)
        return CountingMemory(
            hidden=hidden,
            cell=cell,
            counted=counted,
            points=torch.cat((memory["points"], points), dim=1),
            suppression=memory["suppression"] + suppression,
        )

    def _point(
        self,
        scene: CountingScene,
        states: torch.Tensor | None,
        counted: torch.Tensor | None,
        counted_mask: torch.Tensor | None,
        suppression: torch.Tensor,
        return_attention_maps: bool = False,
    ) -> SequentialAttentionCountingOutput:
        queries, no_more, glimpses, weights = self.look(scene, states, counted, counted_mask)
        keys = cast(torch.Tensor, scene.keys)
        logits = (queries @ keys.transpose(1, 2)).float() * self.config.hidden_size**-0.5
        logits = logits + cast(torch.Tensor, scene.scores)[:, None] - suppression
        done_logits = no_more.float() - logits.logsumexp(-1)
        points = cast(torch.Tensor, scene.points)
        chosen = points.gather(1, logits.argmax(-1)[..., None].expand(-1, -1, 2))
        if not return_attention_maps:
            glimpses = weights = states = None
        elif weights is not None:
            weights = weights.unflatten(2, (-1, NUM_STEP_TOKENS)).transpose(1, 2)
        return SequentialAttentionCountingOutput(
            pointer_logits=logits,
            done_logits=done_logits,
            x=chosen[..., 0],
            y=chosen[..., 1],
            done=done_logits.sigmoid(),
            count_estimate=scene.count_estimate,
            cell_points=points,
            glimpses=glimpses,
            counted_attention=weights,
            memory_states=states,
        )

    def forward_with_attention(
        self, *args, num_marked: torch.Tensor | None = None, return_attention_maps: bool = True, **kwargs
    ) -> SequentialAttentionCountingOutput:
        """`forward` for the step after `num_marked` `(rows,)` of `points`, with its attention maps."""
        steps = None if num_marked is None else num_marked[:, None]
        return self(*args, steps=steps, return_attention_maps=return_attention_maps, **kwargs)

    # --- training, and single steps -------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        images: CountingImages | None = None,
        points: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
        objects: torch.Tensor | None = None,
        point_objects: torch.Tensor | None = None,
        done_log_odds: torch.Tensor | None = None,
        return_attention_maps: bool = False,
        **kwargs,
    ) -> SequentialAttentionCountingOutput:
        """Any steps of counting at once, each as if the points before it had been counted.

        Args:
            pixel_values, image_grid_thw: images, as `encode_image` takes them.
            input_ids, attention_mask, image_index: rows, as `encode_category` takes them.
            images: what `encode_image` gave, in place of `pixel_values`.
            points: objects counted, in order, in [0, 1], `(rows, points, 2)`, negative for padding.
            steps: how many of the points had been counted, `(rows, steps)`; -1 is padding. Default: all of them.
            objects: the true objects, in [0, 1], `(rows, objects, 2)`, negative for padding. Gives the losses.
            point_objects: which object each point is, `(rows, points)`, -1 for padding. Needed with `objects`.
            done_log_odds: by how much the log-odds of a step that is done, among those given, exceed those in counting,
                `(rows,)`.
            return_attention_maps: give glimpses, attention to the counted, and states of the memory.

        Raises:
            ValueError: an input is missing, or numbers do not agree.
        """
        if input_ids is None or (images is None) == (pixel_values is None):
            raise ValueError("Give input_ids, and either pixel_values with image_grid_thw, or images.")
        if points is None:
            points = torch.zeros(len(input_ids), 0, 2, device=input_ids.device)
        if steps is None:
            steps = (points[..., 0] >= 0).sum(1, keepdim=True)
        if self.config.marking == "image":
            if pixel_values is None or steps.shape[1] != 1:
                raise ValueError('marking="image" takes pixel_values, and one step of each row at a time.')
            marks = points.masked_fill(
                torch.arange(points.shape[1], device=points.device)[:, None] >= steps[:, :, None], -1.0
            )
            if image_index is None:
                image_index = self._index(input_ids, len(cast(torch.Tensor, image_grid_thw)))
            pixel_values, image_grid_thw = draw_marks(
                pixel_values.flatten(0, -2), cast(torch.Tensor, image_grid_thw), self._vision, marks, image_index
            )
            image_index = None
        if images is None:
            images = self.encode_image(cast(torch.Tensor, pixel_values), cast(torch.Tensor, image_grid_thw))
        scene = self.encode_category(images, input_ids, attention_mask, image_index)

        index = nearest_cell(scene, points)
        counted = self._remember(scene, points, index)
        states = None
        if self.look.memory is not None:
            states = self._states(cast(torch.Tensor, counted), steps)
        taken = nn.functional.pad(self._suppress(scene, points, index).cumsum(1), (0, 0, 1, 0))
        before = steps.clamp(min=0)
        suppression = taken.gather(1, before[..., None].expand(-1, -1, taken.shape[2]))
        counted_mask = torch.arange(points.shape[1], device=points.device) < before[..., None]
        outputs = self._point(scene, states, counted, counted_mask, suppression, return_attention_maps)
        if objects is not None:
            if point_objects is None:
                raise ValueError("objects need point_objects, which say which object each point is.")
            losses = self.average(
                done_and_where_losses(
                    scene, outputs, steps, suppression, counted_mask, objects, point_objects, done_log_odds
                )
                | location_losses(scene, objects)
                | count_loss(scene, objects)
            )
            for name, value in losses.items():
                outputs[name] = value
        return outputs

    def loss_weights(self) -> dict[str, float]:
        config = self.config
        return {
            "loss_done": config.done_loss_weight,
            "loss_where": config.where_loss_weight,
            "loss_x": config.location_loss_weight,
            "loss_y": config.location_loss_weight,
            "loss_count": config.count_loss_weight,
        }

    def _states(self, counted: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Working memory at each step, `(rows, steps, hidden_size)`."""
        start = counted.new_zeros(len(counted), 1, counted.shape[2])
        if counted.shape[1]:
            start = torch.cat((start, cast(Any, self.look.memory).lstm(counted)[0].to(counted.dtype)), dim=1)
        return start.gather(1, steps.clamp(min=0)[..., None].expand(-1, -1, start.shape[2]))


__all__ = ["SequentialAttentionCountingModel", "SequentialAttentionCountingPreTrainedModel"]
