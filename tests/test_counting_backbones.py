"""SequentialAttentionCounting on published Qwen2-VL and Qwen2.5-VL, small ones laid out like those on the Hub: loading,
quantizing, adapters beside what is new, their checkpoints, and the settings of `regard train` for all that."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BitsAndBytesConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.processing.processing_sequential_attention_counting import SequentialAttentionCountingProcessor
from regard.train import SettingsError, main, parse_settings
from regard.train_counting import CountModelArguments, make_model, settle_quantized
from regard.trainers.base import own_name
from regard.trainers.trainer_sequential_attention_counting import CountTrainingArguments

# peft asks an old name of transformers'.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPECIAL_TOKENS = (
    "<|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
BITS = [
    None,
    *(
        pytest.param(
            bits,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (dev and quantization)"
            ),
        )
        for bits in (4, 8)
    ),
]


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with 256 bytes, a few merges and the special tokens behind them."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    trained.train_from_iterator(["Point to each of the squares"], trainer)
    model = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=SPECIAL_TOKENS)


def make_published(folder: Path, kind: str) -> Path:
    """A small random backbone in the layout of its kind on the Hub."""
    tokenizer = make_tokenizer()
    tokens: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    text: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "qwen2_vl":
            config = Qwen2VLConfig(
                text_config=text, vision_config={**vision, "embed_dim": 64}, tie_word_embeddings=True, **tokens
            )
            model: Any = Qwen2VLForConditionalGeneration(config)
        else:
            vision |= {"intermediate_size": 128, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
            model = Qwen2_5_VLForConditionalGeneration(config)
        for parameter in model.parameters():  # random norms and biases too, so that none can be taken for a fresh one
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a small Qwen2-VL and a small Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("published")
    return {kind: make_published(folder / kind, kind) for kind in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of squares with their points."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, number in (("train", 8), ("validation", 2)):
        (folder / split).mkdir()
        rows = []
        for index in range(number):
            image = Image.new("RGB", (112, 84), "white")
            points = [[20 + 30 * place, 20 + 10 * index % 40] for place in range(index % 4)]
            for x, y in points:
                ImageDraw.Draw(image).rectangle((x - 4, y - 4, x + 4, y + 4), fill="red")
            image.save(folder / split / f"{index}.png")
            rows.append(json.dumps({"file_name": f"{index}.png", "category": "squares", "points": points}))
        (folder / split / "points.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def quantization(bits: int | None) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it quantizes as `regard train` does."""
    if bits is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": "float32"}


def flags(published: Path, scenes: Path, folder: Path, bits: int | None = None, **settings) -> list[str]:
    settings = {
        "model": "sequential_attention_counting", "preset": "micro", "vlm": published, "dataset": scenes,
        "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": 2, "use_cpu": True,
        "lora_rank": 4, "mode": "alternating", "warmup_steps": 0, "learning_rate": 5e-3,
        "backbone_learning_rate": 1e-3, "activation_checkpointing": True, "save_steps": 2, "eval_steps": 2,
        "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 5, "load_best_model_at_end": False,
    } | ({} if bits is None else {f"load_in_{bits}bit": True}) | settings  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def make_trainer(arguments: list[str]) -> Any:
    recipe, *settings = parse_settings(arguments)
    torch.manual_seed(0)
    return recipe.build(*settings)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def inputs(published: dict[str, Path]) -> Any:
    """Two categories in one image."""
    processor = make_processor(published["qwen2_vl"])
    image = Image.new("RGB", (112, 84), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 30, 30), fill="red")
    return processor(images=image, text=["squares", "red squares"], return_tensors="pt")


def make_processor(folder: Path) -> SequentialAttentionCountingProcessor:
    return SequentialAttentionCountingProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder)
    )


def micro(folder: Path) -> SequentialAttentionCountingConfig:
    return SequentialAttentionCountingConfig.from_preset("micro", step_token_ids=make_processor(folder).step_token_ids)


def relaid(folder: Path, layout: str, to: Path) -> Path:
    """A copy of a published backbone whose weights are named otherwise."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= weights.keys()
    if layout == "alone":  # without the language model head
        shutil.rmtree(to)
        AutoModel.from_pretrained(folder).save_pretrained(to)
    elif layout == "since 4.52":
        renamed = {}
        for name, value in weights.items():
            if name.startswith("visual."):
                name = f"model.{name}"
            renamed[name.replace("model.", "model.language_model.", 1) if "visual." not in name else name] = value
        save_file(renamed, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("layout", ["before 4.52", "since 4.52", "alone"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_published_weights_are_taken_and_what_is_new_starts_as_ever(published, tmp_path, kind, layout):
    folder = relaid(published[kind], layout, tmp_path / "relaid")
    config = micro(published[kind])
    model = SequentialAttentionCountingModel.from_vlm_pretrained(folder, config)
    backbone = AutoModel.from_pretrained(published[kind])
    assert model.vlm.state_dict().keys() == backbone.state_dict().keys()
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], value), name

    settings: dict[str, Any] = config.to_dict() | {"vlm_config": model.config.vlm_config}
    fresh = SequentialAttentionCountingModel(SequentialAttentionCountingConfig(**settings))
    new = {name: value for name, value in model.named_parameters() if not name.startswith("vlm.")}
    for name, value in new.items():
        expected = fresh.get_parameter(name)
        if expected.unique().numel() == 1:  # norms, biases, gates
            assert torch.equal(value, expected), name
        elif expected.numel() > 100:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.3), name

    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_an_image_is_counted(published, inputs, kind):
    model = SequentialAttentionCountingModel.from_vlm_pretrained(published[kind], micro(published[kind])).eval()
    counts = model.count(**inputs, max_objects=3)
    assert len(counts) == 2
    assert all(count.complete or count.count == 3 for count in counts)
    text = inputs["input_ids"][1].tolist()  # the longer row
    assert text[-3:] == list(model.config.step_token_ids)
    assert text.count(model.config.vlm_config.image_token_id) == 3 * 4  # 28 pixels each
    half = SequentialAttentionCountingModel.from_vlm_pretrained(
        published[kind], micro(published[kind]), dtype="bfloat16"
    )
    assert half.vlm.dtype == torch.bfloat16
    assert {value.dtype for name, value in half.named_parameters() if not name.startswith("vlm.")} == {torch.float32}
    assert half(**inputs).done_logits.isfinite().all()


def test_what_is_no_backbone_is_refused(published, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert is a bert; give a Qwen2-VL or Qwen2\.5-VL"):
        SequentialAttentionCountingModel.from_vlm_pretrained(tmp_path / "bert")
    folder = relaid(published["qwen2_vl"], "", tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1.mlp" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"part lacks 3 weights of the backbone, vlm\.language_model\.layers\.1\.mlp"):
        SequentialAttentionCountingModel.from_vlm_pretrained(folder, micro(folder))


@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_the_backbone_alone_is_quantized(published, inputs, kind, bits):
    config = micro(published[kind])
    model = SequentialAttentionCountingModel.from_vlm_pretrained(published[kind], config, **quantization(bits))
    settle_quantized(model)
    linear = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = "Linear4bit" if bits == 4 else "Linear8bitLt"
    assert {kind for name, kind in linear.items() if name.startswith("vlm.")} == {quantized}
    assert {kind for name, kind in linear.items() if not name.startswith("vlm.")} == {"Linear"}
    full = SequentialAttentionCountingModel.from_vlm_pretrained(published[kind], config)
    new = {name: value for name, value in model.state_dict().items() if not name.startswith("vlm.")}
    full.load_state_dict(new, strict=False)
    scenes = []
    for counter in (model, full):
        images = counter.encode_image(inputs["pixel_values"], inputs["image_grid_thw"])
        scenes.append(counter.encode_category(images, inputs["input_ids"], inputs["attention_mask"]))
    apart = (scenes[0].steps - scenes[1].steps).norm() / scenes[1].steps.norm()
    assert 0 < apart < (0.3 if bits == 4 else 0.05)
    assert len(model.count(**inputs, max_objects=2)) == 2


@pytest.fixture(scope="module", params=BITS, ids=["full", "4 bits", "8 bits"])
def trained(request, published, scenes, tmp_path_factory) -> tuple[int | None, Any, dict[str, torch.Tensor]]:
    """Bits, the trainer after an epoch of four steps, evaluated after two, and saved, and the weights before."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(flags(published["qwen2_vl"], scenes, folder / "run", request.param))
    before = snapshot(trainer.model)
    trainer.train()
    trainer.save_model()
    return request.param, trainer, before


def reload(published: dict[str, Path], folder: str, bits: int | None, by_peft: bool) -> Any:
    """The trained model by either way there is."""
    if by_peft:
        config = SequentialAttentionCountingConfig.from_pretrained(folder)
        base = SequentialAttentionCountingModel.from_vlm_pretrained(published["qwen2_vl"], config, **quantization(bits))
        model: Any = PeftModel.from_pretrained(base, folder)
    else:
        model = SequentialAttentionCountingModel.from_pretrained(folder, **quantization(bits))
    settle_quantized(model)
    return model.eval()


def test_adapters_and_what_is_new_learn_and_nothing_else(trained):
    _, trainer, before = trained
    after = snapshot(trainer.model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in map(own_name, moved)} == {
        name for name, _ in trainer.model.get_base_model().named_children()
    }
    inside = {name for name in map(own_name, moved) if name.startswith("vlm.")}
    assert {name.split(".")[1] for name in inside} == {"language_model"}
    assert len(inside) == 2 * 2 * 7  # A and B of each projection of both layers
    assert all(".lora_" in name for name in inside)
    assert len(trainer.state.log_history) > 4
    assert all(torch.isfinite(value).all() for value in after.values())


def test_learning_rates_and_decay_by_the_models_own_names(trained):
    _, trainer, _ = trained
    groups = {id(p): group for group in trainer.parameter_groups(trainer.model) for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            group, own = groups.pop(id(parameter)), own_name(name)
            assert group["lr"] == pytest.approx(1e-3 if own.startswith("vlm.") else 5e-3), name
            learned = own == "step_tokens.weight" or own.endswith("none_token")
            assert group["weight_decay"] == (0.05 if parameter.dim() > 1 and not learned else 0), name
    assert not groups


def test_the_checkpoint_is_small_and_gives_the_same_again(trained, published, inputs):
    bits, trainer, _ = trained
    folder = Path(trainer.args.output_dir)
    assert not list(folder.rglob("model*.safetensors"))
    learned = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size < 4 * learned + 30_000
    assert size < (published["qwen2_vl"] / "model.safetensors").stat().st_size / 5
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**inputs)
        for by_peft in (False, True):
            outputs = reload(published, str(folder), bits, by_peft)(**inputs)
            for name in ("pointer_logits", "done_logits", "count_estimate", "cell_points"):
                torch.testing.assert_close(outputs[name], expected[name], msg=name)
    half = SequentialAttentionCountingModel.from_pretrained(folder, dtype="bfloat16")
    wrapped = dict(trainer.model.get_base_model().named_parameters())
    for name, value in half.named_parameters():
        if "modules_to_save" in name:
            assert torch.equal(value, wrapped[name]), name
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.prompt == "Point to each of the {category}: "
    assert processor.step_token_ids == list(trainer.model.get_base_model().config.step_token_ids)


def test_a_resumed_training_ends_alike(trained, published, scenes, tmp_path):
    bits, trainer, _ = trained
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-2")
    again = make_trainer(flags(published["qwen2_vl"], scenes, tmp_path / "again", bits))
    again.train(resume_from_checkpoint=checkpoint)
    for name, value in snapshot(again.model).items():
        if "original_module" not in name:  # what the copies that learn began as
            torch.testing.assert_close(value, trainer.model.get_parameter(name), msg=name)


def test_adapters_merge_into_a_whole_model(trained, published, inputs, tmp_path):
    bits, trainer, _ = trained
    if bits is not None:
        pytest.skip("merged in full precision, whatever they were trained beside")
    model = reload(published, trainer.args.output_dir, None, by_peft=True)
    expected = model(**inputs)
    model.merge_and_unload().save_pretrained(tmp_path)
    whole = AutoModel.from_pretrained(tmp_path)
    assert not [name for name, _ in whole.named_modules() if "lora" in name or "modules_to_save" in name]
    torch.testing.assert_close(whole(**inputs).done_logits, expected.done_logits)
    torch.testing.assert_close(whole(**inputs).count_estimate, expected.count_estimate)


def test_by_the_command_line_around_qwen2_5(published, scenes, tmp_path, capsys):
    settings = {"max_steps": 2, "lora_target_modules": "visual.*qkv", "prompt": "Count {category}"}
    assert main(flags(published["qwen2_5_vl"], scenes, tmp_path / "run", **settings)) == 0
    names = load_file(tmp_path / "run/adapter_model.safetensors").keys()
    assert {name.split(".lora_")[0] for name in names if "lora_" in name} == {
        f"base_model.model.vlm.visual.blocks.{layer}.attn.qkv" for layer in (0, 1)
    }
    model = AutoModel.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    image = Image.new("RGB", (60, 60), "white")
    assert len(model.count(**processor(images=image, text="squares", return_tensors="pt"))) == 1
    assert processor.tokenizer.decode(processor(images=image, text="dots")["input_ids"][0]).startswith("Count dots<")
    assert main(["--init_from", str(tmp_path / "run"), *without_vlm(published, scenes, tmp_path)]) == 2
    assert "holds adapters; resume their training, or merge them first" in capsys.readouterr().err


def without_vlm(published, scenes, tmp_path) -> list[str]:
    arguments = flags(published["qwen2_vl"], scenes, tmp_path / "other")
    place = arguments.index("--vlm")
    return arguments[:place] + arguments[place + 2 :]


def test_without_adapters_everything_learns(published, scenes, tmp_path):
    trainer = make_trainer(flags(published["qwen2_vl"], scenes, tmp_path, lora_rank=0))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert list(trainer.model.config.step_token_ids) == trainer.processing_class.step_token_ids
    trainer.save_model()
    saved = SequentialAttentionCountingModel.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: quantized weights cannot learn; .*lora_rank: 16"),
        ({"load_in_8bit": True}, "load_in_8bit: quantized weights cannot learn"),
        ({"vlm": "x", "lora_rank": 4, "load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"vlm": "x", "init_from": "y"}, "vlm, init_from: .*not both"),
        ({"lora_rank": 4}, "lora_rank: adapters need a backbone that has learned"),
        ({"vlm": "x", "lora_rank": -1}, "lora_rank: must be 0"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        CountModelArguments(**settings)


def test_missing_bitsandbytes_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = CountModelArguments(vlm="x", lora_rank=4, load_in_4bit=True)
    with pytest.raises(SettingsError, match=r"load_in_4bit, .*pip install .regard\[quantization\]"):
        make_model(settings, CountTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_a_trained_model_of_our_own_takes_adapters_too(published, scenes, tmp_path, inputs):
    base = SequentialAttentionCountingModel.from_vlm_pretrained(published["qwen2_vl"], micro(published["qwen2_vl"]))
    base.save_pretrained(tmp_path / "base")
    make_processor(published["qwen2_vl"]).save_pretrained(tmp_path / "base")
    arguments = [*without_vlm(published, scenes, tmp_path), "--init_from", str(tmp_path / "base"), "--max_steps", "2"]
    trainer = make_trainer(arguments)
    trainer.train()
    trainer.save_model()
    again = SequentialAttentionCountingModel.from_pretrained(tmp_path / "other").eval()
    torch.testing.assert_close(again(**inputs).done_logits, trainer.model.eval()(**inputs).done_logits)
