"""What every model of regard keeps, whatever its job. A new model adds its `Case` to `CASES`."""

import ast
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLImageProcessorPil,
)

import regard
from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
from regard.configuration.configuration_qavit import QAViTConfig
from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.modeling.modeling_qavit import QAViTForImageClassification
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.modeling.picture_patches import patches_of
from regard.processing.processing_sequential_attention_counting import STEP_TOKENS, VISION_TOKENS
from regard.processing.tokenization_question import train_question_tokenizer

ROOT = Path(regard.__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of tiny size and what it is fed.

    Args:
        name: shown by pytest.
        config: makes the configuration.
        model_class: what `auto_class` gives.
        inputs: seed -> a training batch of four samples, with targets.
        targets: the names among the inputs that only training needs.
        processor: makes the processor.
        use: model, processor, PIL image -> the processor's post-processed result.
        parameters: preset -> exact number of parameters.
        learning_rate: with which one batch is learned by heart, within 150 steps.
        learned: outputs of the training batch -> whether they are right.
        auto_class: loads the model from a folder.
        no_graph: why the model is neither compiled in one graph nor exported.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    model_class: type[PreTrainedModel]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    targets: tuple[str, ...]
    processor: Callable[[], Any]
    use: Callable[[PreTrainedModel, Any, Image.Image], Any]
    parameters: dict[str, int]
    learning_rate: float
    learned: Callable[[Any, dict[str, torch.Tensor]], bool]
    auto_class: Any = AutoModel
    no_graph: str = ""

    def model(self, **config_changes) -> PreTrainedModel:
        torch.manual_seed(0)
        config = self.config()
        for name, value in config_changes.items():
            setattr(config, name, value)
        return self.model_class(config).eval()

    def eval_inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.inputs(seed).items() if name not in self.targets}


def image_text_slot_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Two lines of squares, one a character, whose brightness names it; of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.zeros(4, 1, 64, 64)
    labels = torch.full((4, 14), -100)
    positions = torch.full((4, 14, 3), -1.0)
    for sample, length in enumerate((12, 5, 9, 1)):
        tokens = torch.randint(4, 8, (length,), generator=generator)
        labels[sample, : length + 2] = torch.tensor([1, *tokens, 2])
        for index, token in enumerate(tokens.tolist()):
            row, column = divmod(index, 7)
            top, left = 4 + 24 * row, 4 + 8 * column
            pixel_values[sample, 0, top : top + 6, left : left + 4] = token - 3.0
            positions[sample, index + 1] = torch.tensor([left + 2.0, top + 3.0, top + 3.0]) / 64
    return {
        "pixel_values": pixel_values,
        "labels": labels,
        "attention_mask": (labels >= 0).long(),
        "character_positions": positions,
    }


def read_image(model: PreTrainedModel, processor: Any, image: Image.Image) -> list[dict[str, Any]]:
    inputs = processor(images=image, return_tensors="pt")
    return processor.post_process(model.read(inputs["pixel_values"]), [(image.height, image.width)])


def qavit_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Noise of four classes: a grid of 5x5 patches, so that windows and dilated groups are padded, and keys pooled."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(4, 3, 20, 20, generator=generator), "labels": torch.tensor([0, 1, 2, 3])}


def classify_image(model: PreTrainedModel, processor: Any, image: Image.Image) -> list[float]:
    with torch.no_grad():
        return model(**processor(images=image, return_tensors="pt")).logits[0].tolist()


def vqa_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Questions of different lengths, each with its image, its answer and where to look."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, 20, 20, generator=generator),
        "input_ids": torch.randint(4, 80, (4, 6), generator=generator),
        "attention_mask": (torch.arange(6) < torch.tensor([[6], [2], [4], [1]])).long(),
        "labels": torch.tensor([0, 1, 2, 3]),
        "relevance_targets": torch.nn.functional.one_hot(torch.tensor([3, 24, 0, 12]), 25).float(),
    }


def ask_image(model: PreTrainedModel, processor: Any, image: Image.Image) -> list[list[dict[str, Any]]]:
    inputs = processor(images=image, text=["what is it?", "is it red?"], return_tensors="pt")
    with torch.no_grad():
        return processor.post_process(model(**inputs).logits, {index: str(index) for index in range(4)}, top_k=2)


def counting_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Bright squares on noise: three, one, two and none; asked for by names of different lengths, at every step."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(4, 3, 32, 32, generator=generator) / 10
    objects = torch.full((4, 3, 2), -1.0)
    for row, cells in enumerate(([1, 6, 15], [8], [3, 12], [])):
        for number, cell in enumerate(cells):
            top, left = 8 * (cell // 4), 8 * (cell % 4)
            pictures[row, :, top + 1 : top + 7, left + 2 : left + 6] = 2.0
            objects[row, number] = torch.tensor([left + 4.0, top + 4.0]) / 32
    numbers = (objects[..., 0] >= 0).sum(1, keepdim=True)
    input_ids = torch.zeros(4, 14, dtype=torch.long)
    for row, words in enumerate((5, 2, 3, 4)):
        names = torch.randint(4, 260, (words,), generator=generator)
        input_ids[row, : words + 9] = torch.tensor([*names, 261, *[260] * 4, 262, 263, 264, 265])
    steps = torch.arange(4).expand(4, -1)
    return {
        "pixel_values": patches_of(list(pictures), COUNTING_VISION).unflatten(0, (4, -1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        "input_ids": input_ids,
        "attention_mask": (input_ids > 0).long(),
        "points": objects.clone(),
        "steps": steps.masked_fill(steps > numbers, -1),
        "objects": objects,
        "point_objects": torch.arange(3).expand(4, -1).masked_fill(objects[..., 0] < 0, -1),
    }


COUNTING_VISION: Any = SequentialAttentionCountingConfig.from_preset("micro").vlm_config.vision_config


def learned_to_count(outputs: Any, inputs: dict[str, torch.Tensor]) -> bool:
    numbers = (inputs["objects"][..., 0] >= 0).sum(1, keepdim=True)
    valid, is_done = inputs["steps"] >= 0, inputs["steps"] == numbers
    here = torch.stack((outputs.x, outputs.y), dim=-1)
    near = torch.cdist(here, inputs["objects"]).amin(-1) < 0.125  # half a cell
    return bool(((outputs.done > 0.5) == is_done)[valid].all() and near[valid & ~is_done].all())


def count_image(model: PreTrainedModel, processor: Any, image: Image.Image) -> list[dict[str, Any]]:
    inputs = processor(images=image, text=["cats", "red apples"], return_tensors="pt")
    return processor.post_process(model.count(**inputs), [(image.height, image.width)] * 2)


CASES = [
    Case(
        name="image_text_slot",
        config=lambda: ImageTextSlotConfig.from_preset("tiny", image_size=64, label_smoothing=0.0),
        model_class=ImageTextSlotModel,
        inputs=image_text_slot_inputs,
        targets=("labels", "attention_mask", "character_positions"),
        processor=lambda: regard.ImageTextSlotProcessor(
            regard.ImageTextSlotImageProcessor(), regard.build_byte_tokenizer()
        ),
        use=read_image,
        parameters={"5m": 4_682_530, "as_described": 11_387_249, "tiny": 85_386},
        learning_rate=5e-3,
        learned=lambda outputs, inputs: bool(
            (outputs.logits.argmax(-1) == inputs["labels"])[inputs["labels"] >= 0].all()
            and (outputs.count_pred[:, 0] - inputs["attention_mask"].sum(1)).abs().max() < 0.5
        ),
    ),
    Case(
        name="qavit",
        config=lambda: QAViTConfig.from_preset("micro", num_labels=4),
        model_class=QAViTForImageClassification,
        inputs=qavit_inputs,
        targets=("labels",),
        processor=lambda: regard.QAViTImageProcessor(size=20),
        use=classify_image,
        parameters={
            "tiny": 2_524_498,
            "small": 5_272_394,
            "tiny-32": 2_490_762,
            "as_described": 2_506_930,
            "micro": 30_050,
        },
        learning_rate=3e-3,
        learned=lambda outputs, inputs: bool((outputs.logits.argmax(-1) == inputs["labels"]).all()),
        auto_class=AutoModelForImageClassification,
    ),
    Case(
        name="query_conditioned_vqa",
        config=lambda: QueryConditionedVQAConfig.from_preset("micro", num_labels=4),
        model_class=QueryConditionedVQAModel,
        inputs=vqa_inputs,
        targets=("labels", "relevance_targets"),
        processor=lambda: regard.QueryConditionedVQAProcessor(
            regard.QAViTImageProcessor(size=20), train_question_tokenizer(["what is it?", "is it red?"], vocab_size=60)
        ),
        use=ask_image,
        parameters={"small": 1_959_344, "as_described": 1_462_434, "base": 223_054_888, "micro": 57_694},
        learning_rate=5e-3,
        learned=lambda outputs, inputs: bool(
            (outputs.logits.argmax(-1) == inputs["labels"]).all()
            and (outputs.relevance[:, -1].argmax(-1) == inputs["relevance_targets"].argmax(-1)).all()
        ),
    ),
    Case(
        name="sequential_attention_counting",
        config=lambda: SequentialAttentionCountingConfig.from_preset("micro"),
        model_class=SequentialAttentionCountingModel,
        inputs=counting_inputs,
        targets=("objects", "point_objects"),
        processor=lambda: regard.SequentialAttentionCountingProcessor(
            Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
            regard.build_byte_tokenizer(reserved=[*VISION_TOKENS, *STEP_TOKENS]),
        ),
        use=count_image,
        parameters={"tiny": 3_352_199, "baseline": 2_671_991, "qwen2-vl-2b": 2_214_340_951, "micro": 94_631},
        learning_rate=1e-2,
        learned=learned_to_count,
        no_graph="Qwen2-VL reads the sizes of its images on the host",
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def tensors(outputs: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def assert_equal_outputs(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    first, second = tensors(first), tensors(second)
    assert first
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_saved_and_loaded_by_auto_classes(case, tmp_path):
    model, inputs = case.model(), case.inputs(0)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert type(loaded) is case.model_class
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert_equal_outputs(model(**inputs), loaded.eval()(**inputs), tolerance=0)


@torch.no_grad()
def test_eager_equals_sdpa(case):
    model, inputs = case.model(), case.inputs(0)
    model.set_attn_implementation("eager")
    eager = model(**inputs)
    model.set_attn_implementation("sdpa")
    assert_equal_outputs(eager, model(**inputs))


@torch.no_grad()
def test_a_sample_alone_equals_the_same_in_a_batch(case):
    model, inputs = case.model(), case.eval_inputs()
    whole = tensors(model(**inputs))
    for index in range(4):
        alone = tensors(model(**{name: value[index : index + 1] for name, value in inputs.items()}))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], whole[name][index], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter(case):
    model, inputs = case.model(), case.eval_inputs()
    order = torch.tensor([2, 0, 3, 1])
    whole = tensors(model(**inputs))
    shuffled = tensors(model(**{name: value[order] for name, value in inputs.items()}))
    for name, value in shuffled.items():
        torch.testing.assert_close(value, whole[name][order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_evaluation_changes_nothing(case):
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    first = model(**case.eval_inputs(0))
    model(**case.eval_inputs(1))
    assert_equal_outputs(first, model(**case.eval_inputs(0)), tolerance=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_parameter_gets_a_gradient_and_moves(case):
    model = case.model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grads = gradients(model, case.inputs(0))
    assert [name for name, grad in grads.items() if not grad.abs().sum() > 0] == []
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0).step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_one_batch_is_learned_by_heart(case):
    model, inputs = case.model().train(), case.inputs(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.learning_rate, weight_decay=0)
    for _ in range(150):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert case.learned(model.eval()(**inputs), inputs)


@torch.no_grad()
def test_bfloat16_runs(case):
    model = case.model()
    reference = model(**case.eval_inputs())
    model = model.to(torch.bfloat16)
    half = model(**case.eval_inputs())
    for name, value in tensors(half).items():
        assert torch.isfinite(value).all(), name
        assert value.shape == tensors(reference)[name].shape


def test_gradient_checkpointing_gives_equal_gradients(case):
    model, inputs = case.model().train(), case.inputs(0)
    plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_compiled_in_one_graph(case):
    if case.no_graph:
        pytest.skip(case.no_graph)
    model, inputs = case.model(), case.eval_inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_equal_outputs(model(**inputs), compiled(**inputs))


@torch.no_grad()
def test_exported_with_any_batch_size(case):
    if case.no_graph:
        pytest.skip(case.no_graph)
    model, inputs = case.model(), case.eval_inputs()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
    )
    smaller = {name: value[:3] for name, value in inputs.items()}
    assert_equal_outputs(model(**smaller), program.module()(**smaller))


def test_processor_to_model_to_result(case, tmp_path):
    model = case.model()
    case.processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (48, 100, 3), dtype=np.uint8)
    result = case.use(model, processor, Image.fromarray(noise))
    assert result == case.use(model, case.processor(), Image.fromarray(noise))


def test_parameter_counts(case):
    for preset, number in case.parameters.items():
        with torch.device("meta"):
            model = case.model_class(type(case.config()).from_preset(preset))
        assert sum(parameter.numel() for parameter in model.parameters()) == number, preset


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        yield from configs(getattr(config, name))


def own_fields(config_class: type) -> set[str]:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)} - inherited
    return {name for name in own if not name.startswith("_")}  # private ones are those of transformers' mixins


def test_presets_name_no_unknown_field(case):
    for preset in case.parameters:
        for config in configs(type(case.config()).from_preset(preset)):
            known = {field.name for field in dataclasses.fields(type(config))} | {"model_type", "transformers_version"}
            if not type(config).__module__.startswith("regard."):
                continue  # an encoder's of transformers
            unknown = {name for name in vars(config) if not name.startswith("_")} - known
            assert not unknown, f"{preset}: {type(config).__name__} has no field {sorted(unknown)}"


def test_every_field_of_the_configuration_is_read(case):
    read = set()
    for folder in ("configuration", "modeling", "processing", "trainers", "pipelines"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for config in configs(case.config()):
        if not type(config).__module__.startswith("regard."):
            continue  # an encoder's of transformers
        assert own_fields(type(config)) - read == set(), type(config).__name__
