"""Draws the images of this folder and their `metadata.jsonl`: `python samples/make_samples.py`.

Four are of the test split of `regard.data.rendered_text`, four are drawn here in the manner of photographs and screens,
in fonts of the test split. `clothes/` holds an image of each class of Fashion-MNIST's test set, `shapes/` and `scenes/`
images to ask about, and `counting/` scenes to count in; `make_samples.py counting` draws these alone.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from regard.data.counting import POINTS_FILE
from regard.data.emoji_scenes import EmojiSceneDataset
from regard.data.fashion_mnist import load_fashion_mnist
from regard.data.rendered_text import FONTS_TABLE, RenderedTextDataset, _find_fonts, _fonts_dirs
from regard.data.scenes import SceneDataset

FOLDER = Path(__file__).parent
GENERATED = {"line": ("line", 28), "block": ("block", 21), "noisy": ("noisy", 28), "light_on_dark": ("block", 22)}


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    paths = {
        Path(path).name: path for family in _find_fonts("test", _fonts_dirs(None), str(FONTS_TABLE)) for path in family
    }
    return ImageFont.truetype(paths[name], size, layout_engine=ImageFont.Layout.BASIC)


def photographed(image: Image.Image, seed: int, angle: float, noise: float, shade: float) -> Image.Image:
    """Tilted, out of focus, lit from one side, with sensor noise."""
    image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=image.getpixel((2, 2)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    pixels *= np.linspace(1, 1 - shade, pixels.shape[1], dtype=np.float32)[None, :, None]
    pixels += noise * np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sign() -> tuple[Image.Image, str]:
    image = Image.new("RGB", (360, 240), (96, 118, 104))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((34, 40, 326, 200), 14, (238, 236, 226), (60, 60, 60), 4)
    draw.text((180, 88), "NO ENTRY", (150, 24, 28), font("Roboto-Bold.ttf", 52), "mm")
    draw.text((180, 150), "Staff only", (40, 40, 40), font("Roboto-Regular.ttf", 44), "mm")
    return photographed(image, 1, 2.0, 5, 0.25), "NO ENTRY\nStaff only"


def receipt() -> tuple[Image.Image, str]:
    text = "2 Coffee 5.80\n1 Cake 3.25\n1 Juice 2.90\nTOTAL 11.95"
    image = Image.new("RGB", (360, 250), (226, 222, 210))
    ImageDraw.Draw(image).multiline_text(
        (22, 24), text, (58, 56, 60), font("LiberationMono-Regular.ttf", 40), spacing=10
    )
    return photographed(image, 2, -1.0, 6, 0.15), text


def label() -> tuple[Image.Image, str]:
    text = "FRAGILE\nHandle with care\nLot 4027-B"
    image = Image.new("RGB", (300, 220), (201, 168, 120))
    draw = ImageDraw.Draw(image)
    draw.text((150, 52), "FRAGILE", (52, 34, 22), font("RobotoSlab-Bold.otf", 48), "mm")
    draw.text((150, 116), "Handle with care", (52, 34, 22), font("Caladea-Regular.ttf", 36), "mm")
    draw.text((150, 172), "Lot 4027-B", (52, 34, 22), font("Caladea-Bold.ttf", 36), "mm")
    return photographed(image, 3, 1.0, 8, 0.2), text


def screen() -> tuple[Image.Image, str]:
    image = Image.new("RGB", (400, 120), (32, 34, 40))
    draw = ImageDraw.Draw(image)
    draw.text((18, 18), "Settings > Display", (235, 235, 238), font("Carlito-Regular.ttf", 42))
    draw.text((18, 68), "Brightness: 75 %", (150, 190, 240), font("Carlito-Regular.ttf", 40))
    return image, "Settings > Display\nBrightness: 75 %"


def clothes() -> None:
    """The first test image of each class, named by the class."""
    data = load_fashion_mnist("test")
    labels = list(data["label"])
    (FOLDER / "clothes").mkdir(exist_ok=True)
    for label, name in enumerate(data.features["label"].names):
        file_name = f"{name.lower().replace(' ', '-').replace('/', '-')}.png"
        data[labels.index(label)]["pixel_values"].save(FOLDER / "clothes" / file_name, optimize=True)


def shapes() -> None:
    """One shape on a pale ground, as in easy-VQA."""
    (FOLDER / "shapes").mkdir(exist_ok=True)
    for name, ground, color, corners in (
        ("triangle", (242, 236, 250), "blue", [(22, 40), (34, 16), (46, 40)]),
        ("circle", (238, 250, 240), "red", [(8, 30), (30, 52)]),
        ("rectangle", (250, 246, 236), "teal", [(30, 8), (54, 24)]),
    ):
        image = Image.new("RGB", (64, 64), ground)
        draw = ImageDraw.Draw(image)
        {"triangle": draw.polygon, "circle": draw.ellipse, "rectangle": draw.rectangle}[name](corners, fill=color)
        image.save(FOLDER / "shapes" / f"{name}.png", optimize=True)


def scenes() -> None:
    """Two generated scenes of the test split."""
    (FOLDER / "scenes").mkdir(exist_ok=True)
    data = SceneDataset("test", 20, seed=2026)
    for number in range(2):
        data[10 * number]["pixel_values"].save(FOLDER / "scenes" / f"{number + 1}.png", optimize=True)


def counting() -> None:
    """New scenes of trained categories, few to many objects, and a second category to ask for in each."""
    (FOLDER / "counting").mkdir(exist_ok=True)
    rows = []
    for number, (low, high) in enumerate(((2, 4), (6, 9), (14, 20), (30, 40)), 1):
        data = EmojiSceneDataset(
            "test", seed=2026, min_objects=low, max_objects=high, count_ranges=((low, high),), max_distractors=12,
            categories="train", grounds=("plain", "gradient", "clouds"),
        )  # fmt: skip
        scene = next(row for row in map(data.__getitem__, range(number, 100)) if row["others"])
        scene["pixel_values"].save(FOLDER / "counting" / f"{number}.png", optimize=True)
        asked = ((scene["category"], scene["points"]), (scene["others_names"][0], scene["others_points"][0]))
        for category, points in asked:
            rows.append({"file_name": f"{number}.png", "category": category, "count": len(points), "points": points})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / "counting" / POINTS_FILE).write_text(lines, "utf-8")


def main() -> None:
    counting()
    clothes()
    shapes()
    scenes()
    rows = []
    for name, (tier, index) in GENERATED.items():
        sample = RenderedTextDataset("test", tier, seed=2026)[index]
        sample["pixel_values"].save(FOLDER / f"{name}.png", optimize=True)
        rows.append({"file_name": f"{name}.png", "text": sample["text"]})
    for draw in (sign, receipt, label, screen):
        image, text = draw()
        file_name = f"{draw.__name__}.{'png' if draw is screen else 'jpg'}"
        image.save(FOLDER / file_name, quality=88, optimize=True)
        rows.append({"file_name": file_name, "text": text})
    (FOLDER / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    counting() if sys.argv[1:] == ["counting"] else main()
