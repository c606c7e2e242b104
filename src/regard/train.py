"""Train a model: `regard train CONFIG.yaml`, `python -m regard.train ...`, `accelerate launch -m regard.train ...`.

Settings are the fields of three dataclasses: the model's, the data's and the trainer's. They come from a YAML or JSON
file, from flags, or from both, where flags win. A name that no field has is refused.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME

from regard.card import write_card
from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
from regard.configuration.configuration_qavit import QAViTConfig
from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.data.image_classification import load_labelled_images
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.data.scenes import ANSWERS, SceneDataset
from regard.data.text_images import load_text_images
from regard.data.visual_questions import answer_vocabulary, load_visual_questions
from regard.metrics.visual_question_answering.visual_question_answering import normalize_answer
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.modeling.modeling_qavit import QAViTForImageClassification
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.processes import end_process_group
from regard.processing.image_processing_image_text_slot import ImageTextSlotImageProcessor
from regard.processing.image_processing_qavit import QAViTImageProcessor
from regard.processing.processing_image_text_slot import ImageTextSlotProcessor
from regard.processing.processing_query_conditioned_vqa import QueryConditionedVQAProcessor
from regard.processing.tokenization_byte import build_byte_tokenizer
from regard.processing.tokenization_question import train_question_tokenizer
from regard.train_counting import CountDataArguments, CountModelArguments, build_sequential_attention_counting
from regard.train_settings import (
    SETTINGS_NAME,
    ModelArguments,
    OverridingModelArguments,
    SettingsError,
    SettingsParser,
    read_settings,
)
from regard.trainers.base import RegardTrainer
from regard.trainers.checkpoints import fault, find_newest
from regard.trainers.trainer_image_text_slot import SlotTrainer, SlotTrainingArguments
from regard.trainers.trainer_qavit import QAViTTrainer, QAViTTrainingArguments
from regard.trainers.trainer_query_conditioned_vqa import VQATrainer, VQATrainingArguments
from regard.trainers.trainer_sequential_attention_counting import CountTrainingArguments
from regard_cli import EXIT_FAILED, EXIT_OK

END_NAME = "training_end.json"  # in the folder of a training that has ended
_NOT_OF_CARDS = ("output_dir", "resume_from_checkpoint", "hub_token")  # settings that say nothing of the model


@dataclass
class SlotModelArguments(OverridingModelArguments):
    """Which ImageTextSlot is trained."""

    config_class = ImageTextSlotConfig


@dataclass
class QAViTModelArguments(OverridingModelArguments):
    """Which QAViT is trained."""

    config_class = QAViTConfig

    model: str = field(default="qavit", metadata={"help": "which model to train"})
    preset: str = field(default="tiny", metadata={"help": "architecture of a new model"})


@dataclass
class VQAModelArguments(OverridingModelArguments):
    """Which QueryConditionedVQA is trained."""

    config_class = QueryConditionedVQAConfig

    model: str = field(default="query_conditioned_vqa", metadata={"help": "which model to train"})
    preset: str = field(default="small", metadata={"help": "architecture of a new model"})
    text_encoder: str | None = field(
        default=None,
        metadata={"help": "folder or Hub repository of a published text encoder, with its tokenizer"},
    )
    vision_encoder: str | None = field(
        default=None,
        metadata={"help": "folder or Hub repository of a published vision encoder, with its image processor"},
    )


@dataclass
class ImageTextSlotDataArguments:
    """What ImageTextSlot learns to read: generated images, or your own."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "folder of images with metadata.jsonl or .csv (file_name, text), or Hub data set with columns "
            "pixel_values and text; default: generated images"
        },
    )
    train_split: str = field(default="train", metadata={"help": "split of `dataset` to learn from"})
    eval_split: str = field(default="validation", metadata={"help": "split of `dataset` to evaluate on"})
    tiers: list[str] = field(
        default_factory=lambda: ["line=1", "block=1", "dense=1", "noisy=1"],
        metadata={"help": "tiers of generated images, with their weights"},
    )
    eval_tiers: list[str] = field(
        default_factory=lambda: list(TIERS), metadata={"help": "tiers of generated images to evaluate on"}
    )
    train_images: int = field(default=1_000_000, metadata={"help": "generated images to learn from"})
    eval_images: int = field(default=400, metadata={"help": "images to evaluate on, at most (of each tier)"})
    generator_seed: int = field(default=0, metadata={"help": "seed of the generated images"})
    length_curriculum: list[str] = field(
        default_factory=list,
        metadata={
            "help": "longest text by generated image, as INDEX=CHARACTERS, e.g. 0=32 50000=128; default: no limit"
        },
    )


@dataclass
class QAViTDataArguments:
    """The labelled images that QAViT learns from."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "fashion-mnist, cifar-10:PATH, cifar-100:PATH, a folder with a subfolder of images for each class, "
            "or a Hub data set with columns image and label"
        },
    )
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    eval_split: str = field(default="validation", metadata={"help": "split that chooses the best checkpoint"})
    validation_size: int = field(
        default=5000, metadata={"help": "images held out of train, where there is no validation split"}
    )
    split_seed: int = field(default=0, metadata={"help": "seed that chooses the images held out"})
    train_images: int | None = field(default=None, metadata={"help": "learn from so many images only"})
    eval_images: int | None = field(default=None, metadata={"help": "evaluate on so many images only"})


@dataclass
class VQADataArguments:
    """The questions that QueryConditionedVQA learns to answer."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "easy-vqa, vqa-v2:FOLDER, clevr:FOLDER, scenes (generated), or a folder or Hub data set with "
            "columns image, question and answers"
        },
    )
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    eval_split: str = field(default="validation", metadata={"help": "split that chooses the best checkpoint"})
    validation_size: int = field(
        default=500, metadata={"help": "images held out of train, where there is no validation split"}
    )
    split_seed: int = field(default=0, metadata={"help": "seed that chooses the images held out"})
    train_questions: int | None = field(
        default=None, metadata={"help": "learn from so many questions only; default: all, a million of generated ones"}
    )
    eval_questions: int = field(default=5000, metadata={"help": "questions to evaluate on, at most"})
    num_answers: int | None = field(
        default=None, metadata={"help": "answers that a new model knows: so many, the most frequent; default: all"}
    )
    generator_seed: int = field(default=0, metadata={"help": "seed of generated scenes"})


def build_image_text_slot(
    model_args: SlotModelArguments, data_args: ImageTextSlotDataArguments, training_args: SlotTrainingArguments
) -> RegardTrainer:
    """Model, data sets and trainer of ImageTextSlot."""
    overrides = cast(dict[str, Any], model_args.config_overrides)
    if (source := model_args.find_start()) is None:
        model = ImageTextSlotModel(ImageTextSlotConfig.from_preset(model_args.preset, **overrides))
        image_processor = ImageTextSlotImageProcessor(size=model.config.image_size)
        processor = ImageTextSlotProcessor(image_processor, build_byte_tokenizer(model.config.num_slots))
    else:
        ImageTextSlotConfig.from_pretrained(source, **overrides).validate()
        try:
            model = ImageTextSlotModel.from_pretrained(source, dtype="float32", use_safetensors=True, **overrides)
        except RuntimeError as error:  # of other shapes
            raise SettingsError(
                f"config_overrides: the weights of {model_args.init_from} do not fit {overrides}"
            ) from error
        processor = ImageTextSlotProcessor.from_pretrained(source)
        if side := overrides.get("image_size"):
            processor.image_processor = ImageTextSlotImageProcessor.from_pretrained(source, size=side)
    model.set_attn_implementation({"": model_args.attn_implementation})  # the encoder has no attention to choose
    if data_args.dataset is not None:
        training_args.train_sampling_strategy = "random"
        train = load_text_images(data_args.dataset, data_args.train_split)
        evaluation = cast(Dataset, load_text_images(data_args.dataset, data_args.eval_split))
        evaluation = evaluation.select(range(min(data_args.eval_images, len(evaluation))))
    else:
        tiers = {name: float(weight) for name, weight in _pairs("tiers", data_args.tiers)}
        train = RenderedTextDataset(
            "train",
            tiers,
            size=data_args.train_images,
            seed=data_args.generator_seed,
            max_characters=[
                (int(start), int(limit)) for start, limit in _pairs("length_curriculum", data_args.length_curriculum)
            ],
            group_size=training_args.per_device_train_batch_size,
        )
        evaluation = {
            tier: RenderedTextDataset("validation", tier, size=data_args.eval_images, seed=data_args.generator_seed)
            for tier in data_args.eval_tiers
        }
    return SlotTrainer(model, training_args, processor, train_dataset=train, eval_dataset=evaluation)


def build_qavit(
    model_args: QAViTModelArguments, data_args: QAViTDataArguments, training_args: QAViTTrainingArguments
) -> RegardTrainer:
    """Model, data sets and trainer of QAViT."""
    if data_args.dataset is None:
        raise SettingsError("dataset: name what to learn from, e.g. `dataset: fashion-mnist`")
    train, evaluation = (
        load_labelled_images(data_args.dataset, split, data_args.validation_size, data_args.split_seed)
        for split in (data_args.train_split, data_args.eval_split)
    )
    names = train.features["label"].names
    if evaluation.features["label"].names != names:
        raise SettingsError(
            f"{data_args.dataset}: {data_args.eval_split} has other classes than {data_args.train_split}"
        )
    overrides = cast(dict[str, Any], model_args.config_overrides)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if (source := model_args.find_start()) is None:
        config = QAViTConfig.from_preset(model_args.preset, **overrides, **labels)
        model = QAViTForImageClassification(config)
        mean, std = channel_statistics(train)
        processor = QAViTImageProcessor(size=config.image_size, image_mean=mean, image_std=std)
    else:
        model = QAViTForImageClassification.from_pretrained(
            source, dtype="float32", use_safetensors=True, ignore_mismatched_sizes=True, **overrides, **labels
        )
        processor = QAViTImageProcessor.from_pretrained(source, size=model.config.image_size)
    model.set_attn_implementation(model_args.attn_implementation)
    train, evaluation = (
        data if limit is None else data.shuffle(seed=data_args.split_seed).select(range(min(limit, len(data))))
        for data, limit in ((train, data_args.train_images), (evaluation, data_args.eval_images))
    )
    return QAViTTrainer(model, training_args, processor, train_dataset=train, eval_dataset=evaluation)


def build_query_conditioned_vqa(
    model_args: VQAModelArguments, data_args: VQADataArguments, training_args: VQATrainingArguments
) -> RegardTrainer:
    """Model, data sets and trainer of QueryConditionedVQA."""
    if data_args.dataset is None:
        raise SettingsError("dataset: name what to learn from, e.g. `dataset: easy-vqa`")
    overrides = cast(dict[str, Any], model_args.config_overrides)
    source = model_args.find_start()
    train: Any
    evaluation: Any
    if data_args.dataset == "scenes":
        sizes = data_args.train_questions or 1_000_000, data_args.eval_questions
        train, evaluation = (
            SceneDataset(split, size, data_args.generator_seed)
            for split, size in zip((data_args.train_split, data_args.eval_split), sizes, strict=True)
        )
        answers, samples = list(ANSWERS), [train[row]["question"] for row in range(min(3000, len(train)))]
    else:
        train, evaluation = (
            load_visual_questions(data_args.dataset, split, data_args.validation_size, data_args.split_seed)
            for split in (data_args.train_split, data_args.eval_split)
        )
        train = train.select(range(min(data_args.train_questions or len(train), len(train))))
        evaluation = evaluation.select(range(min(data_args.eval_questions, len(evaluation))))
        answers, samples = [], train["question"]
        if source is None:
            answers = answer_vocabulary(train, data_args.num_answers, normalize=normalize_answer)
    if source is None:
        labels = {"id2label": dict(enumerate(answers)), "label2id": {name: index for index, name in enumerate(answers)}}
        config = QueryConditionedVQAConfig.from_preset(model_args.preset, **overrides, **labels)
        model = QueryConditionedVQAModel.from_encoders(config, model_args.text_encoder, model_args.vision_encoder)
        text, vision = model.config.text_config, model_args.vision_encoder
        processor = QueryConditionedVQAProcessor(
            QAViTImageProcessor(size=config.image_size)
            if vision is None
            else AutoImageProcessor.from_pretrained(vision),
            train_question_tokenizer(samples, text.vocab_size, text.max_position_embeddings)
            if model_args.text_encoder is None
            else AutoTokenizer.from_pretrained(model_args.text_encoder),
        )
    else:
        model = QueryConditionedVQAModel.from_pretrained(source, dtype="float32", use_safetensors=True, **overrides)
        processor = QueryConditionedVQAProcessor.from_pretrained(source)
    attention = model_args.attn_implementation
    encoders = {"text_config": model.text_model, "vision_config": model.vision_model}
    model.set_attn_implementation(
        {"": attention}
        | {name: attention for name, encoder in encoders.items() if attention == "eager" or encoder._supports_sdpa}
    )  # a ResNet has no attention, and would refuse
    return VQATrainer(model, training_args, processor, train_dataset=train, eval_dataset=evaluation)


def channel_statistics(data: Dataset, images: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue, in [0, 1], over the pixels of some images."""
    chosen = data.shuffle(seed=0).select(range(min(images, len(data))))["pixel_values"]
    moments = np.zeros((2, 3))
    for image in chosen:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        moments += pixels.mean((0, 1)), (pixels**2).mean((0, 1))
    mean, square = moments / len(chosen)
    return mean.round(4).tolist(), np.sqrt(square - mean**2).clip(min=1e-3).round(4).tolist()


def _pairs(setting: str, items: Sequence[str]) -> list[tuple[str, str]]:
    """Settings `NAME=VALUE` as pairs."""
    pairs = [item.partition("=") for item in items]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise SettingsError(f"{setting}: write NAME=VALUE, not {name + equals + value!r}")
    return [(name, value) for name, _, value in pairs]


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: its arguments' classes, and what makes a trainer of their instances."""

    model_arguments: type[Any]
    data_arguments: type[Any]
    training_arguments: type[TrainingArguments]
    build: Callable[[Any, Any, Any], RegardTrainer]


# Another model adds its line here.
RECIPES = {
    "image_text_slot": Recipe(
        SlotModelArguments, ImageTextSlotDataArguments, SlotTrainingArguments, build_image_text_slot
    ),
    "qavit": Recipe(QAViTModelArguments, QAViTDataArguments, QAViTTrainingArguments, build_qavit),
    "query_conditioned_vqa": Recipe(
        VQAModelArguments, VQADataArguments, VQATrainingArguments, build_query_conditioned_vqa
    ),
    "sequential_attention_counting": Recipe(
        CountModelArguments, CountDataArguments, CountTrainingArguments, build_sequential_attention_counting
    ),
}


def parse_settings(arguments: Sequence[str]) -> tuple[Recipe, Any, Any, Any]:
    """Read settings from an optional file, named first, and from flags.

    Returns:
        The recipe of the model, and its three filled dataclasses: model, data and training arguments.

    Raises:
        SettingsError: the file cannot be read, or a name or a value is wrong.
    """
    recipe, parser, flags = _parser_and_flags(arguments)
    *filled, unknown = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise SettingsError(parser.explain_unknown(unknown[0]))
    model_args, data_args, training_args = filled
    return recipe, model_args, data_args, training_args


def given_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that are not the defaults, by name, as a file of them would have them.

    Args:
        arguments: as for `parse_settings`, which accepts them.
    """
    _, parser, flags = _parser_and_flags(arguments)
    filled = vars(parser.parse_args(flags))
    chosen = {name: value for name, value in filled.items() if value != parser.get_default(name)}
    return {"model": filled["model"], **chosen}


def _parser_and_flags(arguments: Sequence[str]) -> tuple[Recipe, SettingsParser, list[str]]:
    """The parser of a model's settings, and a file's settings and flags as flags."""
    arguments = list(arguments)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    settings = read_settings(path) if path is not None else {}

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--model", default=settings.get("model", ModelArguments.model))
    model = chooser.parse_known_args(arguments)[0].model
    if model not in RECIPES:
        raise SettingsError(f"model: there is no {model!r}; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[model]

    parser = SettingsParser(
        cast(Any, [recipe.model_arguments, recipe.data_arguments, recipe.training_arguments]),
        prog="regard train",
        usage="%(prog)s [CONFIG.yaml] [--SETTING VALUE ...]",
        description=f"Train {model}. Settings of a file are overridden by flags.",
        allow_abbrev=False,
    )
    return recipe, parser, parser.flags_of(settings, path) + arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        recipe, model_args, data_args, training_args = parse_settings(arguments)
        check_outputs(training_args)
        checkpoint = find_checkpoint(training_args)
        finished = checkpoint if checkpoint is not None and is_finished(checkpoint, training_args) else None
        if finished is not None and is_saved(finished, training_args):
            print(f"regard train: {finished} has all steps; nothing is left to train")
            return EXIT_OK
        set_seed(training_args.seed)  # the trainer does so again, but after the new model has drawn its weights
        trainer = recipe.build(model_args, data_args, training_args)
    except (ValueError, OSError, StrictDataclassError) as error:  # settings, names, data: each message names the mend
        print(f"regard train: {error}", file=sys.stderr)
        return EXIT_FAILED
    except SafetensorError as error:
        start = model_args.init_from or "the pretrained backbone"
        print(f"regard train: {start}: damaged weights ({error}); copy or download them again", file=sys.stderr)
        return EXIT_FAILED
    folder, is_first = Path(str(training_args.output_dir)), trainer.is_world_process_zero()
    if is_first:
        settings = {name: value for name, value in given_settings(arguments).items() if name not in _NOT_OF_CARDS}
        _write_json(folder / SETTINGS_NAME, settings)
    if finished is not None:
        trainer.restore(finished)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model()  # and pushes it, where it is asked to
    if is_first:
        write_card(folder)
        _write_json(folder / END_NAME, {"global_step": trainer.state.global_step})  # last: the rest is there
    with suppress(RuntimeError):  # a process that goes may cut off those still in a barrier: let it be this one
        trainer.accelerator.wait_for_everyone()
    end_process_group()
    return EXIT_OK


def check_outputs(training_args: TrainingArguments) -> None:
    """Make the output folder.

    Raises:
        SettingsError: that is not possible, or TensorBoard is asked for and not installed.
    """
    folder = Path(str(training_args.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingsError(f"output_dir: {folder} cannot be written ({error.strerror}); choose another") from error
    if "tensorboard" in (training_args.report_to or ()) and not is_tensorboard_available():
        raise SettingsError("report_to: `pip install tensorboard` first, or set report_to: none")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: none, a named one, or for `resume_from_checkpoint: true` the newest, if any.

    A checkpoint that a kill has left half-written is skipped with a warning.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        newest, skipped = find_newest(str(training_args.output_dir))
        if training_args.process_index == 0:
            for folder, reason in skipped.items():
                print(f"regard train: {folder} is half-written and skipped: {reason}", file=sys.stderr)
        return newest
    if not os.path.isdir(wanted):
        raise SettingsError(f"resume_from_checkpoint: {wanted} is no folder; give a checkpoint, or true for the newest")
    if reason := fault(wanted):
        raise SettingsError(
            f"resume_from_checkpoint: {wanted} is half-written: {reason}; give another, or true for the newest"
        )
    return str(wanted)


def is_finished(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Whether a checkpoint has taken all steps; the Trainer would take one more."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if training_args.max_steps > 0:
        return training_args.max_steps <= state.global_step
    return 0 < state.max_steps <= state.global_step and training_args.num_train_epochs <= state.num_train_epochs


def is_saved(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Whether the model at the end of the training was saved, too; a kill may have come between."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    try:
        end = json.loads(Path(str(training_args.output_dir), END_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # cut short, it is no JSON
        return False
    return end == {"global_step": state.global_step}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> int:
    """Run `regard train`."""
    return main(options.settings)


if __name__ == "__main__":
    sys.exit(main())
