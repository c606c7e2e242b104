"""What all tests share: no network, a Hugging Face cache of their own, few threads, and a tiny checkpoint."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# ruff: noqa: E402
# Before anything imports huggingface_hub or torch, which read these once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="regard-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import Qwen2VLImageProcessorPil

from regard import (
    ImageTextSlotConfig,
    ImageTextSlotImageProcessor,
    ImageTextSlotModel,
    ImageTextSlotProcessor,
    QAViTConfig,
    QAViTForImageClassification,
    QAViTImageProcessor,
    QueryConditionedVQAConfig,
    QueryConditionedVQAModel,
    QueryConditionedVQAProcessor,
    SequentialAttentionCountingConfig,
    SequentialAttentionCountingModel,
    SequentialAttentionCountingProcessor,
    build_byte_tokenizer,
)
from regard.processing.processing_sequential_attention_counting import STEP_TOKENS, VISION_TOKENS
from regard.processing.tokenization_question import train_question_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained ImageTextSlot and its processor."""
    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny")).save_pretrained(folder)
    ImageTextSlotProcessor(ImageTextSlotImageProcessor(), build_byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained QAViT of six classes and its processor."""
    folder = tmp_path_factory.mktemp("tiny-classifier")
    config = QAViTConfig.from_preset("micro", id2label=dict(enumerate(("Bag", "Coat", "Hat", "Ring", "Shoe", "Tie"))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QAViTForImageClassification(config).save_pretrained(folder)
    QAViTImageProcessor(size=config.image_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained QueryConditionedVQA of six answers and its processor."""
    folder = tmp_path_factory.mktemp("tiny-vqa")
    answers = ("yes", "no", "red", "blue", "two", "a very long answer")
    config = QueryConditionedVQAConfig.from_preset("micro", id2label=dict(enumerate(answers)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QueryConditionedVQAModel(config).save_pretrained(folder)
    questions = ["what colour is it?", "is it red?", "how many are there?"]
    tokenizer = train_question_tokenizer(questions, vocab_size=80, model_max_length=32)
    QueryConditionedVQAProcessor(QAViTImageProcessor(size=config.image_size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained SequentialAttentionCounting, which counts five at once, and its processor."""
    folder = tmp_path_factory.mktemp("tiny-counter")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = SequentialAttentionCountingModel(SequentialAttentionCountingConfig.from_preset("micro"))
    torch.nn.init.constant_(model.look.no_more.bias, -2.0)  # or it would say of most images that there is none
    model.save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    SequentialAttentionCountingProcessor(
        Qwen2VLImageProcessorPil(patch_size=8, size=size),
        build_byte_tokenizer(reserved=[*VISION_TOKENS, *STEP_TOKENS]),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_image():
    """A function that draws text, with Pillow's built-in font, on a grey image, and saves it where told."""

    def make(path: Path, text: str = "Regard", size: tuple[int, int] = (96, 64)) -> Path:
        image = Image.new("L", size, 240)
        ImageDraw.Draw(image).text((8, 8), text, fill=20, font=ImageFont.load_default(16))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path

    return make


@pytest.fixture
def folder(tmp_path: Path, make_image) -> Path:
    """Three images in two folders, two of them of one name."""
    for name in ("a/one.png", "a/two.png", "b/one.png"):
        make_image(tmp_path / "images" / name, name)
    return tmp_path / "images"
