"""How `regard train` trains SequentialAttentionCounting: its settings, and what makes a trainer of them.

A published backbone may stay frozen, in half precision or quantized, under adapters (LoRA; Hu et al., 2022), beside
which all that is new learns as ever.
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import find_adapter_config_file

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.data.counting import load_counting
from regard.data.emoji_scenes import EmojiSceneDataset
from regard.hub import resolve
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.processing.processing_sequential_attention_counting import (
    STEP_TOKENS,
    VISION_TOKENS,
    SequentialAttentionCountingProcessor,
)
from regard.processing.tokenization_byte import build_byte_tokenizer
from regard.train_settings import OverridingModelArguments, SettingsError
from regard.trainers.base import RegardTrainer
from regard.trainers.trainer_sequential_attention_counting import AlternatingCountTrainer, CountTrainingArguments

PROMPT = "Point to each of the {category}: "  # to a backbone that has learned to read


@dataclass
class CountModelArguments(OverridingModelArguments):
    """Which SequentialAttentionCounting is trained."""

    config_class = SequentialAttentionCountingConfig

    model: str = field(default="sequential_attention_counting", metadata={"help": "which model to train"})
    preset: str = field(default="tiny", metadata={"help": "architecture of a new model"})
    vlm: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub repository of a published Qwen2-VL or Qwen2.5-VL, with its image processor and "
            "tokenizer; the preset says the rest"
        },
    )
    prompt: str | None = field(
        default=None,
        metadata={"help": f"what stands before the image; default: {{category}}, with `vlm`: {PROMPT.strip()}"},
    )
    lora_rank: int = field(
        default=0, metadata={"help": "rank of adapters (LoRA) in the backbone, whose weights then stay as they are"}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "what adapters add is scaled by lora_alpha / lora_rank; default: by 2"}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["language_model.*_proj"],
        metadata={
            "help": "names of the backbone's layers with adapters, as regular expressions; the vision encoder's are "
            r"visual.*\.(qkv|proj|fc1|fc2)"
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "quantize the backbone to 4 bits (bitsandbytes, NF4)"})
    load_in_8bit: bool = field(default=False, metadata={"help": "quantize the backbone to 8 bits (bitsandbytes)"})

    def __post_init__(self):
        super().__post_init__()
        if self.vlm is not None and self.init_from is not None:
            raise SettingsError("vlm, init_from: start from a published backbone, or from a trained model, not both")
        if self.lora_rank < 0:
            raise SettingsError(f"lora_rank: must be 0 (no adapters) or more, not {self.lora_rank}")
        if self.lora_rank and self.vlm is None and self.init_from is None:
            raise SettingsError("lora_rank: adapters need a backbone that has learned; give vlm or init_from")
        if self.load_in_4bit and self.load_in_8bit:
            raise SettingsError("load_in_4bit, load_in_8bit: choose one")
        if self.load_in_4bit or self.load_in_8bit:
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            if not self.lora_rank:
                raise SettingsError(f"{name}: quantized weights cannot learn; give them adapters, e.g. lora_rank: 16")


@dataclass
class CountDataArguments:
    """What SequentialAttentionCounting learns to count: generated scenes, or your own."""

    dataset: str = field(
        default="emoji",
        metadata={
            "help": "emoji (generated scenes), fsc-147:FOLDER, a folder with points.jsonl, or a folder or Hub data set "
            "with columns image, category and points"
        },
    )
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    eval_split: str = field(default="validation", metadata={"help": "split that chooses the best checkpoint"})
    eval_categories: str | None = field(
        default="train",
        metadata={
            "help": "split whose categories the generated scenes of `eval_split` hold; null: its own, unseen ones"
        },
    )
    validation_size: int = field(
        default=500, metadata={"help": "images held out of train, where there is no validation split"}
    )
    split_seed: int = field(default=0, metadata={"help": "seed that chooses the images held out"})
    train_images: int | None = field(
        default=None, metadata={"help": "learn from so many images only; default: all, a million of generated ones"}
    )
    eval_images: int = field(default=400, metadata={"help": "images to evaluate on, at most"})
    generator_seed: int = field(default=0, metadata={"help": "seed of the generated scenes"})
    min_objects: int = field(default=0, metadata={"help": "leave out images with fewer objects"})
    max_objects: int = field(default=50, metadata={"help": "leave out images with more objects"})


# Absent categories, and a quarter of the images each for few, some and many objects.
_COUNT_RANGES = ((0, 0), (1, 4), (5, 20), (20, 50))


def build_sequential_attention_counting(
    model_args: CountModelArguments, data_args: CountDataArguments, training_args: CountTrainingArguments
) -> RegardTrainer:
    """Model, data sets and trainer of SequentialAttentionCounting."""
    limits: Any = {"min_objects": data_args.min_objects, "max_objects": data_args.max_objects}
    train: Any
    evaluation: Any
    if data_args.dataset == "emoji":
        seed = data_args.generator_seed
        train = EmojiSceneDataset(
            data_args.train_split, data_args.train_images or 1_000_000, seed, count_ranges=_COUNT_RANGES, **limits
        )
        evaluation = EmojiSceneDataset(
            data_args.eval_split,
            data_args.eval_images,
            seed,
            count_ranges=_COUNT_RANGES,
            categories=data_args.eval_categories,
            **limits,
        )
    else:
        train, evaluation = (
            load_counting(data_args.dataset, split, data_args.validation_size, data_args.split_seed, **limits)
            for split in (data_args.train_split, data_args.eval_split)
        )
        train = train.select(range(min(data_args.train_images or len(train), len(train))))
        evaluation = evaluation.select(range(min(data_args.eval_images, len(evaluation))))
    model, processor = make_model(model_args, training_args)
    return AlternatingCountTrainer(model, training_args, processor, train_dataset=train, eval_dataset=evaluation)


def make_model(
    model_args: CountModelArguments, training_args: CountTrainingArguments
) -> tuple[SequentialAttentionCountingModel | PeftModel, SequentialAttentionCountingProcessor]:
    """The model to train, with adapters where they are asked for, and its processor.

    Raises:
        SettingsError: `init_from` holds adapters only, or bitsandbytes is missing.
        ValueError: `vlm` is another kind of model.
    """
    overrides = cast(dict[str, Any], model_args.config_overrides)
    # Weights that stay as they are need no more than the precision they are computed with.
    options: dict[str, Any] = {"dtype": "bfloat16" if model_args.lora_rank and training_args.bf16 else "float32"}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SettingsError('load_in_4bit, load_in_8bit: pip install "regard[quantization]" first')
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model_args.load_in_4bit,
            load_in_8bit=model_args.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": training_args.device}
    if (source := model_args.find_start()) is not None:
        if find_adapter_config_file(source) is not None:
            raise SettingsError(f"init_from: {source} holds adapters; resume their training, or merge them first")
        model = SequentialAttentionCountingModel.from_pretrained(source, use_safetensors=True, **options, **overrides)
        processor = SequentialAttentionCountingProcessor.from_pretrained(source)
    elif model_args.vlm is not None:
        source = resolve(model_args.vlm)
        processor = SequentialAttentionCountingProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(source), AutoTokenizer.from_pretrained(source), prompt=PROMPT
        )
        config = SequentialAttentionCountingConfig.from_preset(
            model_args.preset, **overrides | {"step_token_ids": processor.step_token_ids}
        )
        model = SequentialAttentionCountingModel.from_vlm_pretrained(source, config, **options)
    else:
        model = SequentialAttentionCountingModel(
            SequentialAttentionCountingConfig.from_preset(model_args.preset, **overrides)
        )
        vision = cast(Any, model.config.vlm_config).vision_config
        processor = SequentialAttentionCountingProcessor(
            Qwen2VLImageProcessorPil(
                patch_size=vision.patch_size, size={"shortest_edge": 192 * 192, "longest_edge": 224 * 224}
            ),
            build_byte_tokenizer(reserved=[*VISION_TOKENS, *STEP_TOKENS]),
        )
    if model_args.prompt is not None:
        processor.prompt = model_args.prompt
    model.set_attn_implementation(model_args.attn_implementation)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        settle_quantized(model)
    if model_args.lora_rank:
        model = add_adapters(model, model_args.lora_rank, model_args.lora_alpha, tuple(model_args.lora_target_modules))
    return model, processor


def settle_quantized(model: nn.Module) -> None:
    """Let a quantized model train and evaluate in turn on a CPU, and quietly."""
    for module in model.modules():
        # With AVX512-BF16 an evaluation repacks the weights, and no gradient passes through them any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # 8 bits tell of a cast at every call


def add_adapters(
    model: SequentialAttentionCountingModel, rank: int, alpha: float | None, targets: tuple[str, ...]
) -> PeftModel:
    """Adapters in the backbone, which is frozen; everything new beside it learns, and is saved with them.

    Args:
        rank: of the adapters.
        alpha: what they add is scaled by `alpha / rank`; None is twice the rank.
        targets: regular expressions of the names of the backbone's layers that get one.
    """
    new = []
    for name, child in model.named_children():
        if name not in model.backbone_modules:
            lists = isinstance(child, nn.ModuleList)  # which peft does not take as one
            new += [f"{name}.{number}" for number in range(len(child))] if lists else [name]
    backbone = "|".join(model.backbone_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, 2 * rank if alpha is None else alpha),
        target_modules=rf"(?:{backbone})\.(?:{'|'.join(targets)})",
        modules_to_save=new,
    )
    return cast(PeftModel, get_peft_model(cast(Any, model), config))


__all__ = [
    "CountDataArguments",
    "CountModelArguments",
    "add_adapters",
    "build_sequential_attention_counting",
    "make_model",
]
