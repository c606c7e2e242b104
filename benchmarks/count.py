"""Counting what is named beside classical counters, in pictures other than emoji, and what an object costs. Errors by
number of objects are measured by `regard evaluate MODEL --dataset emoji`.

    python benchmarks/count.py peers [MODEL] [--images 200]
    python benchmarks/count.py photographs MODEL [--stamps FOLDER]
    python benchmarks/count.py cost MODEL

`peers`: thresholding and labelling, peaks of the distance to the ground, and template matching with the crop of
one object, each at its best settings on validation scenes; without MODEL they alone. `photographs`: coins, nuclei and
Tux Paint's stamps, as far as they are installed, and a picture of each with its points. `cost`: one thread, processor
time from image to points, in turns, the median of the rounds.

Prints Markdown and writes benchmarks/results/count_{peers,photographs,cost}.json.
"""

import argparse
import importlib.util
import itertools
import json
import math
import random
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ask import in_turns
from classify import ROOT
from peers import PeerMissing
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from transformers import pipeline

from regard.cli import complain, progress_bar, quiet_transformers
from regard.data.emoji_scenes import IMAGE_SIZE, EmojiSceneDataset, categories
from regard.evaluate import circumstances
from regard.hub import resolve
from regard.metrics.object_counting.object_counting import score_counts

RESULTS = Path(__file__).with_name("results")
STAMPS = Path("/usr/share/tuxpaint/stamps")  # of the Debian package tuxpaint-stamps-default
MAX_DISTANCE = 0.05  # of a point from its object, as share of the image's side
TEXTURED = ("noise", "clouds", "pattern")
PHOTOGRAPHED = {
    "apples": "food/fruit/apple_red.png",
    "bees": "animals/insects/bee.png",
    "carrots": "food/vegetables/carrot.png",
    "elephants": "animals/mammals/elephant.png",
    "horses": "animals/mammals/equines/horse.png",
    "lemons": "food/fruit/lemon.png",
    "mushrooms": "food/vegetables/mushroom.png",
    "oranges": "food/fruit/orange.png",
    "owls": "animals/birds/owl.png",
    "penguins": "animals/birds/penguin.png",
    "tigers": "animals/mammals/cats/tiger.png",
    "tomatoes": "food/vegetables/tomato.png",
}

Point = Sequence[float]
Count = Callable[[Image.Image, str], Sequence[Point]]


class Ours:
    """A checkpoint: from an image and a category to a point `[x, y]` for each object, in pixels of the image.

    Args:
        model: a folder, the name of a bundled checkpoint, or a Hub repository.
    """

    def __init__(self, model: str):
        task: Any = "object-counting"
        self.pipeline: Any = pipeline(task, model=resolve(model), device="cpu")

    def __call__(self, image: Image.Image, category: str) -> list[Point]:
        return [(point["x"], point["y"]) for point in self.pipeline(image=image, category=category)["points"]]

    def number_each(self, image: Image.Image, categories: Sequence[str]) -> list[int]:
        """How many there are of each of several categories, for which the image is encoded once."""
        return [found["count"] for found in self.pipeline(image=image, category=list(categories))]

    def mark(self, marking: str) -> None:
        """Remember what has been counted in "memory", or draw it on the "image"."""
        self.pipeline.model.config.marking = marking


class Question(NamedTuple):
    """What to count in an image, a point at each object of it, and their boxes, where they are known."""

    image: Image.Image
    category: str
    points: list[list[float]]
    boxes: Sequence[Sequence[float]] = ()


def question(row: Mapping[str, Any]) -> Question:
    return Question(row["pixel_values"], row["category"], row["points"], row["boxes"])


def score(answers: Sequence[Sequence[Point]], questions: Sequence[Question]) -> dict[str, Any]:
    """Scores of the metric, and the error of always guessing the middle count, `guess_mae`."""
    references = [asked.points for asked in questions]
    sizes = [asked.image.size for asked in questions]
    scores = score_counts([list(points) for points in answers], references, sizes, max_distance=MAX_DISTANCE)
    del scores["by_range"]
    counts = [len(points) for points in references]
    return scores | {"guess_mae": float(np.abs(np.array(counts) - statistics.median_low(counts)).mean())}


class Peer(NamedTuple):
    """A counter that is told what an object looks like, not what it is called.

    Args:
        see: from image and boxes to what the points are chosen from.
        point: from that and a setting to the points, `(objects, 2)`.
        settings: of which the best is chosen on validation scenes.
    """

    see: Callable[[Image.Image, Sequence[Sequence[float]]], Any]
    point: Callable[..., np.ndarray]
    settings: Sequence[tuple[float, ...]]


def load_peers() -> dict[str, Peer]:
    """The counters, on OpenCV and scikit-image.

    Raises:
        PeerMissing: one of them is not installed.
    """
    try:
        import cv2  # pyright: ignore[reportMissingImports]
        from skimage.feature import peak_local_max  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PeerMissing(f"{error}; pip install --constraint constraints.txt --editable '.[bench]'") from error
    cv2.setNumThreads(1)

    def difference(image, boxes):
        """From the ground, whose colour is the median, in Lab."""
        pixels = cv2.cvtColor(np.asarray(image, dtype=np.float32) / 255, cv2.COLOR_RGB2LAB)
        return np.linalg.norm(pixels - np.median(pixels, axis=(0, 1)), axis=2)

    def components(seen, threshold, smallest):
        parts, _, stats, centres = cv2.connectedComponentsWithStats((seen > threshold).astype(np.uint8))
        return centres[[part for part in range(1, parts) if stats[part, cv2.CC_STAT_AREA] >= smallest]]

    def peaks(seen, threshold, apart):
        depth = cv2.distanceTransform((seen > threshold).astype(np.uint8), cv2.DIST_L2, 5)
        return peak_local_max(depth, min_distance=apart, threshold_abs=apart / 2, exclude_border=False)[:, ::-1]

    def match(image, boxes):
        """The best match of any scale at each place, and the exemplar's size: it has the median area."""
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
        x0, y0, x1, y1 = map(int, boxes[areas.index(statistics.median_low(areas))])
        pixels = np.asarray(image)
        exemplar = pixels[y0:y1, x0:x1]
        best = np.full(pixels.shape[:2], -1, np.float32)
        for scale in (0.65, 0.8, 1, 1.25, 1.5):
            small = cv2.resize(exemplar, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            height, width = small.shape[:2]
            found = cv2.matchTemplate(pixels, small, cv2.TM_CCOEFF_NORMED)
            inside = best[height // 2 : height // 2 + found.shape[0], width // 2 : width // 2 + found.shape[1]]
            np.maximum(inside, np.where(np.isfinite(found) & (found < 1.01), found, -1), out=inside)
        return best, min(y1 - y0, x1 - x0)

    def suppress(seen, threshold, share):
        response, side = seen
        apart = max(1, round(share * side))
        return peak_local_max(response, min_distance=apart, threshold_abs=threshold, exclude_border=False)[:, ::-1]

    thresholds = (3, 6, 10, 15, 20, 30, 40)
    return {
        "threshold, labels": Peer(
            difference, components, [*itertools.product(thresholds, (1, 10, 25, 50, 100))]
        ),
        "threshold, peaks": Peer(difference, peaks, [*itertools.product(thresholds, (2, 3, 4, 6, 8))]),
        "template": Peer(match, suppress, [*itertools.product(np.linspace(0.2, 0.8, 13).tolist(), (0.4, 0.6, 0.8))]),
    }  # fmt: skip


def choose(peer: Peer, questions: Sequence[Question]) -> tuple[float, ...]:
    """The setting with the least error of the count."""
    errors: dict[tuple[float, ...], int] = defaultdict(int)
    for asked in questions:
        seen = peer.see(asked.image, asked.boxes)
        for setting in peer.settings:
            errors[setting] += abs(len(peer.point(seen, *setting)) - len(asked.points))
    return min(peer.settings, key=errors.__getitem__)


def peers(count: Count | None, images: int, chosen_on: int, seed: int) -> dict[str, Any]:
    """Scores and processor milliseconds an image, scenes -> counter, and the peers' settings."""
    others = load_peers()
    results: dict[str, Any] = {}
    kinds = itertools.product((("plain", ("plain",)), ("textured", TEXTURED)), (("alone", 0), ("among others", 30)))
    with progress_bar(4 * (len(others) * (images + chosen_on) + images * bool(count))) as bar:
        for (ground, grounds), (company, distractors) in kinds:
            validation, test = (
                [
                    question(data[index])
                    for data in [
                        EmojiSceneDataset(
                            split, number, seed, min_objects=1, max_distractors=distractors, categories="train",
                            grounds=grounds,
                        )
                    ]
                    for index in range(number)
                ]
                for split, number in (("validation", chosen_on), ("test", images))
            )  # fmt: skip
            systems: dict[str, Callable[[Question], Any]] = {}
            settings = {}
            if count:
                systems["ours"] = lambda asked: count(asked.image, asked.category)
            for name, peer in others.items():
                settings[name] = choose(peer, validation)
                bar.update(chosen_on)
                systems[name] = lambda asked, peer=peer, setting=settings[name]: peer.point(
                    peer.see(asked.image, asked.boxes), *setting
                )
            figures = results[f"{ground}, {company}"] = {}
            for name, system in systems.items():
                answers, spent = [], []
                for asked in test:
                    start = time.process_time()
                    answers.append(system(asked))
                    spent.append(1000 * (time.process_time() - start))
                    bar.update()
                figures[name] = score(answers, test) | {"ms": round(statistics.median(spent), 2)}
                if name in settings:
                    figures[name]["setting"] = settings[name]
    return results


class Picture(NamedTuple):
    """An image whose objects have been counted."""

    source: str
    category: str
    image: Image.Image
    count: int


def pictures_of(stamps: Path, seed: int) -> Iterator[Picture]:
    """Photographs and compositions, as far as what they are made of is installed."""
    if folder := images_of("skimage", "data"):
        with Image.open(folder / "coins.png") as coins:
            yield Picture("coins", "coins", coins.convert("RGB"), 24)
    else:
        complain("going on without coins: pip install --constraint constraints.txt --editable '.[bench]'")
    if folder := images_of("stardist", "data/images"):
        yield from nuclei(folder)
    else:
        complain("going on without nuclei: pip install --no-deps stardist")
    if stamps.is_dir():
        rng = random.Random(seed)
        for category, name in PHOTOGRAPHED.items():
            with Image.open(stamps / name) as stamp:
                number = rng.randint(2, 20)
                yield Picture("stamps", category, compose(stamp.convert("RGBA"), number, rng), number)
    else:
        complain(f"going on without stamps, {stamps}: apt-get install --no-install-recommends tuxpaint-stamps-default")


def images_of(package: str, folder: str) -> Path | None:
    """A folder of a package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / folder if spec and spec.origin else None


def nuclei(folder: Path) -> Iterator[Picture]:
    """stardist's image of nuclei and its quarters, with the nuclei whose centre is inside."""
    with Image.open(folder / "img2d.tif") as image, Image.open(folder / "mask2d.tif") as mask:
        seen, labels = (np.asarray(part) for part in (image, mask))
    picture = Image.fromarray(np.uint8(np.clip(seen, 0, 255))).convert("RGB")
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, np.unique(labels[labels > 0])))[:, ::-1]
    width, height = picture.width // 2, picture.height // 2
    corners = [(x, y, x + width, y + height) for y in (0, height) for x in (0, width)]
    for box in ((0, 0, *picture.size), *corners):
        inside = ((centres >= box[:2]) & (centres < box[2:])).all(1)
        yield Picture("nuclei", "nuclei", picture.crop(box), int(inside.sum()))


def compose(stamp: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """Stamps side by side, in cells of a grid, on a plain light ground."""
    columns = max(2, math.ceil(math.sqrt(number)))
    cell = IMAGE_SIZE // columns
    red, green, blue = (rng.randint(150, 240) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (red, green, blue))
    for place in rng.sample(range(columns**2), number):
        side = min(48, int(cell * rng.uniform(0.6, 0.95)))
        small = ImageOps.contain(stamp, (side, side))
        left = place % columns * cell + rng.randint(0, cell - small.width)
        top = place // columns * cell + rng.randint(0, cell - small.height)
        image.paste(small, (left, top), small)
    return image


def photographs(count: Count, pictures: Sequence[Picture], folder: Path) -> list[dict[str, Any]]:
    """The true count and ours of each; `folder` gets a picture of each with its points."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, picture in enumerate(pictures, 1):
        points = count(picture.image, picture.category)
        name = f"{number:02}-{picture.category}-{picture.count}-counted-{len(points)}.png"
        draw_points(picture.image, points).save(folder / name)
        rows.append({**picture._asdict(), "counted": len(points), "picture": name})
        del rows[-1]["image"]
    return rows


def draw_points(image: Image.Image, points: Sequence[Point]) -> Image.Image:
    """The image, enlarged where it is small, with a numbered ring at each point."""
    factor = max(1, round(512 / max(image.size)))
    drawn = image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(drawn)
    for number, (x, y) in enumerate(points, 1):
        centre = (factor * x, factor * y)
        draw.circle(centre, 9, fill="white", outline="red", width=2)
        draw.text(centre, str(number), "black", anchor="mm")
    return drawn


def cost(ours: Any, rounds: int, seed: int) -> dict[str, Any]:
    """Processor milliseconds of counting 4 and 40 objects, 20 by either marking, and 4 with four absent categories,
    and how many were counted."""

    def scene(objects: int) -> Question:
        data = EmojiSceneDataset(
            "test", 1, seed, min_objects=objects, max_objects=objects, max_distractors=0, categories="train"
        )
        return question(data[0])

    scenes = {objects: scene(objects) for objects in (4, 20, 40)}
    counted = {}

    def task(objects: int, marking: str):
        def run():
            ours.mark(marking)
            counted[name] = len(ours(scenes[objects].image, scenes[objects].category))

        name = f"{objects} objects, marked in {marking}"
        return name, run

    def many():
        ours.mark("memory")
        counted[several] = sum(ours.number_each(scenes[4].image, [scenes[4].category, *absent]))

    several = "4 objects and 4 absent categories, marked in memory"
    absent = [category.noun for category in categories("train") if category.noun not in scenes[4].category][:4]
    wanted = ((4, "memory"), (40, "memory"), (20, "memory"), (20, "image"))
    times = in_turns(dict(task(*which) for which in wanted) | {several: many}, rounds)
    ours.mark("memory")
    return {name: {"ms": spent, "counted": counted[name]} for name, spent in times.items()}


def run_peers(options: argparse.Namespace) -> dict[str, Any]:
    count = Ours(options.model) if options.model else None
    results = peers(count, options.images or 200, options.validation_images, options.seed)
    print("| scenes | counter | MAE | RMSE | right | points, F1 | CPU-ms |\n|---|---|" + "--:|" * 5)
    for scenes, figures in results.items():
        for name, row in figures.items():
            shares = (f"{row[key]:.1%}" for key in ("exact_match", "f1"))
            print(f"| {scenes} | {name} | {row['mae']:.2f} | {row['rmse']:.2f} | {' | '.join(shares)} | {row['ms']} |")
        print(f"| {scenes} | always the middle count | {row['guess_mae']:.2f} | – | – | – | – |")
    return results


def run_photographs(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = photographs(Ours(options.model), list(pictures_of(options.stamps, options.seed)), options.pictures)
    print("| picture | of | there are | counted |\n|---|---|--:|--:|")
    for row in rows:
        print(f"| {row['source']} | {row['category']} | {row['count']} | {row['counted']} |")
    print(
        f"\n{sum(row['count'] == row['counted'] for row in rows)} of {len(rows)} right; pictures in {options.pictures}"
    )
    return rows


def run_cost(options: argparse.Namespace) -> dict[str, Any]:
    results = cost(Ours(options.model), options.rounds, options.seed)
    print("| | CPU-ms | counted |\n|---|--:|--:|")
    for name, row in results.items():
        print(f"| {name} | {row['ms']} | {row['counted']} |")
    return results


def package_versions(*names: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    runs = {"peers": run_peers, "photographs": run_photographs, "cost": run_cost}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=runs)
    parser.add_argument("model", nargs="?", help="a folder, bundled name or Hub repository; only peers can do without")
    parser.add_argument("--images", type=int, help="peers: scenes of each kind (default: 200)")
    parser.add_argument(
        "--validation-images",
        type=int,
        default=40,
        help="peers: scenes of each kind for settings (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="cost: timed rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="photographs: folder (default: %(default)s)")
    parser.add_argument(
        "--pictures",
        type=Path,
        default=ROOT / "demo/count",
        help="photographs: folder to draw in (default: demo/count)",
    )
    parser.add_argument("--output", type=Path, help="JSON (default: benchmarks/results/count_WHAT.json)")
    options = parser.parse_args(arguments)
    if not options.model and options.what != "peers":
        parser.error(f"{options.what}: name a MODEL")
    quiet_transformers()
    torch.set_num_threads(1)
    try:
        results = runs[options.what](options)
    except (PeerMissing, ValueError, FileNotFoundError) as error:
        complain(error)
        return 1
    report = {
        **circumstances(argparse.Namespace(seed=options.seed, device="cpu"), "test"),
        "command": shlex.join(["python", "benchmarks/count.py", *(arguments or sys.argv[1:])]),
        "max_distance": MAX_DISTANCE,
        "results": results,
    }
    report["versions"] |= package_versions("opencv-python-headless", "scikit-image")
    output = options.output or RESULTS / f"count_{options.what}.json"
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
