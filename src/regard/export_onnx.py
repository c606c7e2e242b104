"""`regard export --onnx`: a model as ONNX graphs, which onnxruntime runs without PyTorch.

A model that works in one pass is one graph; where several questions share an image, the image has a graph of its own,
and counting is one graph a step, whose memory goes in and comes out. Numbers of images, questions, words, objects and
slots are free. Image sizes are those of the configuration, but the counter's, which are free: all images of a call are
of one size.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from regard.export import ExportError, new_folder
from regard.modeling.attention import eager_attention_forward
from regard.modeling.counting_outputs import CountingMemory, CountingScene
from regard.modeling.image_text_slot_encoder import normalize_contrast
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.modeling.modeling_qavit import QAViTForImageClassification
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel, cell_centres
from regard.modeling.picture_patches import stacked_pictures_of

INTEGERS = ("input_ids", "attention_mask", "image_index", "image_grid_thw", "grid")


@dataclass(frozen=True)
class Graph:
    """What becomes an ONNX file.

    Args:
        name: of the file.
        module: returns a tuple of tensors.
        inputs: the shape of each argument of the module; a size that is free has a name.
        outputs: names of what the module returns.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs to export with; equal sizes of different names would be taken for the same."""
        names = dict.fromkeys(size for shape in self.inputs.values() for size in shape if isinstance(size, str))
        sizes = {name: number for number, name in enumerate(names, start=2)}
        return {
            name: torch.zeros([size if isinstance(size, int) else sizes[size] for size in shape], dtype=_dtype(name))
            for name, shape in self.inputs.items()
        }

    def free(self) -> dict[str, dict[int, str]]:
        """The names of each input's free sizes, by dimension."""
        return {
            name: {dim: size for dim, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in self.inputs.items()
        }


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name in INTEGERS else torch.bool if name == "cell_mask" else torch.float32


def export_onnx(model: PreTrainedModel, folder: str | Path) -> list[Path]:
    """Write a model of regard as ONNX graphs, in float32.

    Sizes in quotes are free. A graph's inputs are what the model's processor makes, but where noted.

    - ImageTextSlot, `read.onnx`: `pixel_values ("batch", 1, image_size, image_size)` -> `tokens` and `scores
      ("batch", "slots")`, `boxes ("batch", "slots", 4)`, `length ("batch",)`, `count_pred ("batch", 1)`. As many slots
      are computed as the longest text of the batch needs. Each row's first `length` of the first three are what
      `ImageTextSlotProcessor.post_process` takes. The graph looks once, at whole
      images: it has no `second_look` and no `crop_margin`.
    - QAViTForImageClassification, `classify.onnx`: `pixel_values ("batch", channels, image_size, image_size)` ->
      `logits ("batch", num_labels)`. The image's size is fixed: windows and their padding are laid out by it.
    - QueryConditionedVQA, `encode_image.onnx`: `pixel_values ("images", channels, image_size, image_size)` ->
      `image_features ("images", patches, hidden_size)`; `answer.onnx`: `image_features`, `input_ids` and
      `attention_mask ("questions", "words")`, `image_index ("questions",)` -> `logits ("questions", num_labels)`,
      `relevance` and `word_attention` as the model has them.
    - SequentialAttentionCounting, `encode_image.onnx`: `pixel_values ("images", "rows", "columns", merged, patch)`, the
      patches of images of one size as `pixel_values.reshape(images, rows, columns, merge_size ** 2, -1)` gives them,
      with rows and columns of `image_grid_thw` divided by `merge_size` -> `tokens ("images", "rows", "columns", ...)`
      and `image_cells ("images", "cell_rows", "cell_columns", hidden_size)`; `encode_category.onnx`: these,
      `image_grid_thw ("images", 3)`, `input_ids` and `attention_mask ("categories", "words")`, padded on the right, and
      `image_index ("categories",)` -> the fields of `CountingScene`; `count_step.onnx`: these but `count_estimate`, and
      the fields of `CountingMemory` (at first zeros, and no object) -> `x`, `y` and `done`, all `("categories",)`, and
      the memory after that object, `next_hidden`, `next_cell`, ... A row ends with the step whose `done` reaches the
      configuration's `done_threshold`.

    Args:
        model: is left as it is.
        folder: must be new or empty.

    Returns:
        The files written. Weights of 2 GB and more lie beside a graph, in a file of their own.

    Raises:
        ExportError: there are no graphs for such a model, packages are missing, or the folder is not empty or cannot be
            written.
    """
    check_exportable(model)
    network: Any = copy.deepcopy(model)
    network.to("cpu", torch.float32).eval()
    for part in network.modules():
        if isinstance(
            part, PreTrainedModel
        ):  # the fused one asks for sizes that are not known before the image is seen
            part.config._attn_implementation = "eager"
    with new_folder(folder) as place, _quiet(), torch.no_grad():
        for graph in GRAPHS[type(model)](network):
            program: Any = torch.onnx.export(
                graph.module.eval(),
                kwargs=graph.example(),
                dynamic_shapes=graph.free(),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamo=True,
                verbose=False,
            )
            program.save(place / f"{graph.name}.onnx")
        return sorted(place.iterdir())


def check_exportable(model: PreTrainedModel):
    """
    Raises:
        ExportError: as `export_onnx` has it, but of the folder.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ExportError(f'ONNX graphs need {" and ".join(missing)}: pip install "regard[onnx]"')
    if type(model) not in GRAPHS:
        raise ExportError(
            f"{type(model).__name__}: has no ONNX graphs; those that have: {', '.join(cls.__name__ for cls in GRAPHS)}"
        )
    if isinstance(model, SequentialAttentionCountingModel):
        vlm: Any = model.config.vlm_config
        if model.config.marking == "image":
            raise ExportError('marking="image": encodes the image anew at each step; has no ONNX graphs')
        if vlm.model_type != "qwen2_vl":
            raise ExportError(f"{vlm.model_type}: as a backbone has no ONNX graphs, only qwen2_vl has")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what PyTorch says of itself while exporting."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # that torchvision is missing
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: .* will not be used", UserWarning)  # twice the same
            yield
    finally:
        logger.setLevel(level)


def _mean_by_row(images: torch.Tensor) -> torch.Tensor:
    """Each image's mean, row by row first: onnxruntime adds up in plain float32, whose errors grow with the number."""
    return images.mean(3, keepdim=True).mean((1, 2), keepdim=True)


class Reader(nn.Module):
    """ImageTextSlot's reading, before rows are cut to their length."""

    def __init__(self, model: ImageTextSlotModel):
        super().__init__()
        self.model = model
        self.normalizes = model.encoder.normalize_contrast
        model.encoder.normalize_contrast = False

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.normalizes:
            pixel_values = normalize_contrast(pixel_values, _mean_by_row)
        return self.model.read_slots(pixel_values, self.model.config.num_slots)


class Classifier(nn.Module):
    """QAViT's logits."""

    def __init__(self, model: QAViTForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model(pixel_values).logits,)


class ImageEncoder(nn.Module):
    """QueryConditionedVQA's image, before any question."""

    def __init__(self, model: QueryConditionedVQAModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode_image(pixel_values),)


class Answerer(nn.Module):
    """QueryConditionedVQA's answers about encoded images."""

    def __init__(self, model: QueryConditionedVQAModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        image_features: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs = self.model(
            image_features=image_features, input_ids=input_ids, attention_mask=attention_mask, image_index=image_index
        )
        return outputs.logits, outputs.relevance, outputs.word_attention


def _attend_by_image(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    images: int,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention within each of several images of one size, `(1, heads, images * patches, head_dim)`."""
    parts = (part[0].unflatten(1, (images, -1)).transpose(0, 1) for part in (query, key, value))
    output, _ = eager_attention_forward(module, *parts, attention_mask, scaling)
    return output.flatten(0, 1)[None], None  # (1, images * patches, heads, head_dim)


AttentionInterface.register("by_image", _attend_by_image)


class CountingImageEncoder(nn.Module):
    """SequentialAttentionCounting's `encode_image`, of images of one size, whose sizes are read off a shape: Qwen2-VL
    reads them on the host."""

    def __init__(self, model: SequentialAttentionCountingModel):
        super().__init__()
        self.model = model
        model.vlm.visual.config._attn_implementation = "by_image"

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images, rows, columns, merged, _ = pixel_values.shape
        cell, merge = self.model.config.cell_size, self.model._vision.spatial_merge_size
        y = torch.arange(rows * merge).reshape(rows, 1, merge, 1)
        x = torch.arange(columns * merge).reshape(columns, 1, merge)
        positions = torch.stack(torch.broadcast_tensors(y, x), dim=-1).expand(images, -1, -1, -1, -1, -1)
        # One stretch for `_attend_by_image` to cut: how many patches it has is read here, and may be a symbol.
        ends: Any = np.array([0, images * rows * columns * merged], dtype=object)
        seen = self.model.vlm.visual(
            pixel_values.flatten(0, 3), None, position_ids=positions.flatten(0, 4), cu_seqlens=ends, images=images
        )
        pictures = stacked_pictures_of(pixel_values.flatten(1, 3), rows, columns, self.model._vision)
        cells = self.model._fine_cells(pictures).unflatten(1, (-(-pictures.shape[2] // cell), -1))
        return seen.pooler_output.unflatten(0, (images, rows, columns)), cells


class CategoryEncoder(nn.Module):
    """SequentialAttentionCounting's `encode_category`, likewise."""

    def __init__(self, model: SequentialAttentionCountingModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: torch.Tensor,
        image_cells: torch.Tensor,
        image_grid_thw: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        model, config = self.model, self.model.config
        vlm: Any = config.vlm_config
        rows, columns = tokens.shape[1:3]
        cell_rows, cell_columns = image_cells.shape[1:3]
        grid = image_grid_thw[image_index, 1:]  # rows and columns of patches
        merged = grid // vlm.vision_config.spatial_merge_size

        is_image = input_ids == vlm.image_token_id
        index = torch.arange(input_ids.shape[1])
        start = is_image.int().argmax(1, keepdim=True)  # the tokens of an image stand side by side
        place = (index - start).clamp(0, rows * columns - 1)
        embeddings = model.vlm.get_input_embeddings()(input_ids.clamp(max=vlm.text_config.vocab_size - 1))
        seen = _take(tokens.flatten(1, 2)[image_index], place)
        embeddings = torch.where(is_image[..., None], seen, embeddings)
        for token, embedding in zip(config.step_token_ids, model.step_tokens.weight, strict=True):
            embeddings = torch.where((input_ids == token)[..., None], embedding, embeddings)
        after = index - merged.prod(1, keepdim=True) + merged.amax(1, keepdim=True)  # an image takes its longer side
        line = torch.where(index < start, index, after)
        y, x = torch.broadcast_tensors(torch.arange(rows)[:, None], torch.arange(columns))
        inside = torch.stack((torch.zeros_like(y), y, x)).flatten(1)[:, place]  # (3, categories, words)
        positions = torch.where(is_image, start + inside, line)
        features = model.vlm.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        asked = (input_ids == config.step_token_ids[0]).int().argmax(1, keepdim=True)
        steps = model.step_proj(_take(features, asked + torch.arange(len(config.step_token_ids))))
        conditioned = model.token_proj(_take(features, start + torch.arange(rows * columns)))

        fine = image_cells[image_index].permute(0, 3, 1, 2)
        coarse = conditioned.transpose(1, 2).unflatten(2, (rows, columns))
        fine = model._condition(fine, coarse, steps.mean(1)).flatten(2).transpose(1, 2)
        pixels = grid * vlm.vision_config.patch_size
        sides = pixels.flip(1) / config.cell_size
        scene = model._read_cells(
            fine,
            torch.ones(fine.shape[:2], dtype=torch.bool),
            cell_centres(cell_rows, cell_columns, fine.device) / sides[:, None],
            (pixels + config.cell_size - 1) // config.cell_size,
            sides,
            steps,
        )
        return tuple(scene[name] for name in SCENE)


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of rows `(batch, items, size)` the items `(batch, taken)`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


class Counter(nn.Module):
    """A step of SequentialAttentionCounting, and its memory when that object has been counted."""

    def __init__(self, model: SequentialAttentionCountingModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        cells: torch.Tensor,
        cell_mask: torch.Tensor,
        places: torch.Tensor,
        points: torch.Tensor,
        scores: torch.Tensor,
        keys: torch.Tensor,
        reach: torch.Tensor,
        grid: torch.Tensor,
        sides: torch.Tensor,
        steps: torch.Tensor,
        hidden: torch.Tensor,
        cell: torch.Tensor,
        counted: torch.Tensor,
        counted_points: torch.Tensor,
        suppression: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        scene = CountingScene(cells, cell_mask, places, points, scores, keys, reach, grid, sides, steps)
        memory = CountingMemory(hidden, cell, counted, counted_points, suppression)
        outputs: Any = self.model.step(scene, memory)
        memory = self.model.count_object(scene, memory, outputs.pointer_logits[:, 0].argmax(-1))
        return outputs.x[:, 0], outputs.y[:, 0], outputs.done[:, 0], *memory.to_tuple()


SCENE = tuple(CountingScene.__dataclass_fields__)


def _read_graphs(model: ImageTextSlotModel) -> list[Graph]:
    channels, side = model.config.encoder_config.num_channels, model.config.image_size
    inputs = {"pixel_values": ("batch", channels, side, side)}
    return [Graph("read", Reader(model), inputs, ("tokens", "scores", "boxes", "length", "count_pred"))]


def _classify_graphs(model: QAViTForImageClassification) -> list[Graph]:
    side = model.config.image_size
    inputs = {"pixel_values": ("batch", model.config.num_channels, side, side)}
    return [Graph("classify", Classifier(model), inputs, ("logits",))]


def _answer_graphs(model: QueryConditionedVQAModel) -> list[Graph]:
    vision: Any = model.config.vision_config
    image = ("images", vision.num_channels, model.config.image_size, model.config.image_size)
    patches = model.encode_image(torch.zeros(1, *image[1:])).shape[1]
    questions = {
        "image_features": ("images", patches, model.config.hidden_size),
        "input_ids": ("questions", "words"),
        "attention_mask": ("questions", "words"),
        "image_index": ("questions",),
    }
    return [
        Graph("encode_image", ImageEncoder(model), {"pixel_values": image}, ("image_features",)),
        Graph("answer", Answerer(model), questions, ("logits", "relevance", "word_attention")),
    ]


def _count_graphs(model: SequentialAttentionCountingModel) -> list[Graph]:
    vlm: Any = model.config.vlm_config
    vision, size = vlm.vision_config, model.config.hidden_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    images = {"pixel_values": ("images", "rows", "columns", vision.spatial_merge_size**2, patch)}
    categories = {
        "tokens": ("images", "rows", "columns", vlm.text_config.hidden_size),
        "image_cells": ("images", "cell_rows", "cell_columns", size),
        "image_grid_thw": ("images", 3),
        "input_ids": ("categories", "words"),
        "attention_mask": ("categories", "words"),
        "image_index": ("categories",),
    }
    step = {
        "cells": ("categories", "cells", size),
        "cell_mask": ("categories", "cells"),
        "places": ("categories", "cells", 2),
        "points": ("categories", "cells", 2),
        "scores": ("categories", "cells"),
        "keys": ("categories", "cells", 2 * size),
        "reach": ("categories", "cells"),
        "grid": ("categories", 2),
        "sides": ("categories", 2),
        "steps": ("categories", len(model.config.step_token_ids), size),
        "hidden": ("categories", size),
        "cell": ("categories", size),
        "counted": ("categories", "objects", size),
        "counted_points": ("categories", "objects", 2),
        "suppression": ("categories", "cells"),
    }
    memory = ("hidden", "cell", "counted", "counted_points", "suppression")
    return [
        Graph("encode_image", CountingImageEncoder(model), images, ("tokens", "image_cells")),
        Graph("encode_category", CategoryEncoder(model), categories, SCENE),
        Graph("count_step", Counter(model), step, ("x", "y", "done", *(f"next_{name}" for name in memory))),
    ]


GRAPHS: dict[type, Callable[[Any], list[Graph]]] = {
    ImageTextSlotModel: _read_graphs,
    QAViTForImageClassification: _classify_graphs,
    QueryConditionedVQAModel: _answer_graphs,
    SequentialAttentionCountingModel: _count_graphs,
}

__all__ = ["ExportError", "Graph", "check_exportable", "export_onnx"]
