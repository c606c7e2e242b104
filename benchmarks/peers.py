"""Tesseract and rapidocr as readers of 128x128 images, in the settings that read the validation split best.

    python benchmarks/peers.py [--images 20] [--only rapidocr]    # tries the settings of `TRIED` again

Chosen on 20 images of each tier of the validation split, seed 0. CER / character accuracy / CPU-ms an image, on one
thread of a machine that was at other work:

| setting | line | block | dense | noisy |
|---|---|---|---|---|
| tesseract | 0.020 / 0.977 / 18 | 0.024 / 0.831 / 50 | 0.235 / 0.211 / 125 | 0.403 / 0.566 / 23 |
| tesseract, x1 | 0.070 / 0.733 / 9 | 0.103 / 0.536 / 25 | 0.869 / 0.010 / 26 | 0.489 / 0.462 / 11 |
| tesseract, x2 | 0.017 / 0.980 / 14 | 0.025 / 0.831 / 41 | 0.242 / 0.219 / 97 | 0.388 / 0.523 / 16 |
| tesseract, x4 | 0.027 / 0.927 / 21 | 0.029 / 0.759 / 56 | 0.251 / 0.178 / 145 | 0.409 / 0.489 / 31 |
| tesseract, psm 6 | as above | as above | as above | 4.305 / 0.585 / 59 |
| tesseract, psm 4 | 0.023 / 0.907 / 17 | 0.027 / 0.785 / 50 | 0.296 / 0.164 / 124 | as above |
| tesseract, psm 3 | 0.023 / 0.907 / 17 | 0.027 / 0.785 / 51 | 0.294 / 0.165 / 126 | 0.412 / 0.569 / 24 |
| tesseract, psm 7 | 0.020 / 0.977 / 17 | 0.987 / 0.000 / 17 | 0.997 / 0.000 / 20 | 0.837 / 0.138 / 20 |
| tesseract, not inverted | 0.020 / 0.977 / 20 | 0.025 / 0.831 / 67 | 0.236 / 0.217 / 184 | 0.412 / 0.563 / 26 |
| rapidocr 128 | 0.017 / 0.980 / 47 | 0.009 / 0.914 / 138 | 0.450 / 0.234 / 236 | 0.080 / 0.920 / 41 |
| rapidocr 128, padded | 0.013 / 0.983 / 46 | 0.008 / 0.914 / 147 | 0.450 / 0.234 / 235 | 0.083 / 0.917 / 57 |
| rapidocr 160 | 0.020 / 0.943 / 56 | 0.011 / 0.941 / 147 | 0.121 / 0.396 / 404 | 0.065 / 0.932 / 50 |
| rapidocr 192 | 0.017 / 0.980 / 64 | 0.008 / 0.909 / 161 | 0.078 / 0.426 / 458 | 0.074 / 0.926 / 63 |
| rapidocr 192, text_score 0 | 0.017 / 0.980 / 67 | 0.008 / 0.909 / 165 | 0.078 / 0.426 / 474 | 0.074 / 0.926 / 63 |
| rapidocr 256 | 0.020 / 0.943 / 91 | 0.013 / 0.807 / 187 | 0.080 / 0.410 / 507 | 0.058 / 0.929 / 90 |
| rapidocr 384 | 0.027 / 0.937 / 172 | 0.018 / 0.876 / 285 | 0.074 / 0.439 / 591 | 0.071 / 0.929 / 165 |
| rapidocr 736 (its default) | 0.027 / 0.940 / 543 | 0.011 / 0.902 / 654 | 0.089 / 0.382 / 985 | 0.071 / 0.923 / 542 |
| rapidocr 256, x2 | 0.017 / 0.980 / 91 | 0.013 / 0.897 / 185 | 0.096 / 0.332 / 498 | 0.092 / 0.905 / 89 |
| rapidocr 384, x3 | 0.020 / 0.943 / 168 | 0.021 / 0.727 / 274 | 0.111 / 0.263 / 597 | 0.108 / 0.889 / 165 |

Tesseract's own are x3, inverted, psm 6, for noisy psm 4; `padded` is rapidocr's default of lines 320 pixels wide. Of
tesseract x3 was taken: on 40 images of each tier it read dense and noisy better than x2 (0.180 to 0.185, 0.334 to
0.366), line worse (0.032 to 0.026). Its other thresholding methods, a stated resolution, a border, bicubic enlargement,
no dictionary, a blur before and dropping unsure words did not help, or helped one tier and harmed others. Of rapidocr
`128` is the fastest and `192` the best over all tiers. A border and a wider unclip_ratio helped one tier and harmed
others. In its own order of lines `256` read dense at 0.331 (15 images) where `in_reading_order` gave 0.067.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from regard.cli import complain, progress_bar
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.metrics.text_recognition.text_recognition import score_texts


class PeerMissing(RuntimeError):
    """A peer that is not installed. The message names it and the command that installs it."""


class Peer(Protocol):
    """A reader of whole images, one after the other."""

    def read(self, images: Sequence[Image.Image], tier: str) -> list[str]:
        """The text of each grey image of a tier; lines separated by a newline, in reading order."""
        ...

    def start_up_seconds(self) -> float:
        """CPU seconds that a call of `read` costs beyond its images, measured anew."""
        ...

    def versions(self) -> dict[str, str]:
        """Version by package or program."""
        ...


def cpu_seconds() -> float:
    """Seconds that this process and the processes it has waited for spent on processors so far, in all threads."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def is_light_on_dark(image: Image.Image) -> bool:
    """Whether a grey image's text is lighter than its ground: its pixels scatter further above the median than below.

    Agrees with the true greys on all of 240 validation images.
    """
    pixels = np.asarray(image, dtype=np.float64)
    return bool(((pixels - np.median(pixels)) ** 3).sum() > 0)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """The image `factor` times as wide and high."""
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)


class Tesseract:
    """Tesseract by its program, which reads a list of files in one process, on one thread.

    Args:
        factor: enlargement of the images.
        modes: page segmentation mode by tier.
        invert: turn light-on-dark images over, which spares tesseract from reading each line both ways.

    Raises:
        PeerMissing: there is no tesseract, or not its English.
    """

    def __init__(self, factor: int = 3, modes: Mapping[str, int] | None = None, invert: bool = True):
        self.factor, self.invert = factor, invert
        self.modes = modes or {"noisy": 4}
        program = shutil.which("tesseract")
        languages = _run(program, "--list-langs").stdout.split() if program else []
        if program is None or "eng" not in languages:
            raise PeerMissing(
                "tesseract is not installed; on Debian: sudo apt-get install --no-install-recommends tesseract-ocr "
                "tesseract-ocr-eng"
            )
        self.program = program

    def read(self, images: Sequence[Image.Image], tier: str) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{index}.pgm") for index in range(len(images))]
            for image, path in zip(images, paths, strict=True):
                if self.invert and is_light_on_dark(image):
                    image = ImageOps.invert(image)
                enlarge(image, self.factor).save(path)
            names = Path(folder, "list.txt")
            names.write_text("\n".join(paths) + "\n", encoding="utf-8")
            invert = f"tessedit_do_invert={int(not self.invert)}"
            done = _run(self.program, str(names), "stdout", "--psm", str(self.modes.get(tier, 6)), "-c", invert)
        pages = done.stdout.split("\f")
        if done.returncode or len(pages) != len(images):
            raise RuntimeError(f"tesseract gave {len(pages)} texts for {len(images)} images: {done.stderr[-2000:]}")
        return ["\n".join(line.strip() for line in page.splitlines() if line.strip()) for page in pages]

    def start_up_seconds(self) -> float:
        start = cpu_seconds()
        _run(self.program, os.devnull, "stdout")  # loads the language, then finds no image
        return cpu_seconds() - start

    def versions(self) -> dict[str, str]:
        return {"tesseract": _run(self.program, "--version").stdout.split()[1]}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)


class RapidOcr:
    """PP-OCR by rapidocr on onnxruntime, one thread, with the models of its package.

    Lines are put in order by `in_reading_order`: rapidocr's own order takes lines less than ten pixels apart for one.

    Args:
        limit_side_len: the image is enlarged to this side for the detector; lines are cut from the image as it is.
        factor: enlargement of the image before that.
        params: further settings of rapidocr.

    Raises:
        PeerMissing: rapidocr or onnxruntime is not installed.
    """

    def __init__(self, limit_side_len: int = 128, factor: int = 1, params: Mapping[str, Any] | None = None):
        try:
            import cv2  # pyright: ignore[reportMissingImports]
            from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise PeerMissing(
                f"rapidocr is not installed ({error}); pip install --constraint constraints.txt --editable '.[bench]'"
            ) from error
        cv2.setNumThreads(1)
        self.factor = factor
        self.engine = RapidOCR(
            params={
                "Global.use_cls": False,  # nothing stands upside down
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # a little faster
                "Det.limit_side_len": limit_side_len,
                "Rec.rec_img_shape": [3, 48, 48],  # short lines are not padded to 320 pixels: faster, and no worse
                **(params or {}),
            }
        )

    def read(self, images: Sequence[Image.Image], tier: str) -> list[str]:
        texts = []
        for image in images:
            found: Any = self.engine(np.asarray(image if self.factor == 1 else enlarge(image, self.factor)))
            texts.append(in_reading_order(found.boxes, found.txts) if found.txts else "")
        return texts

    def start_up_seconds(self) -> float:
        return 0.0

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("rapidocr", "onnxruntime")}


def in_reading_order(boxes: Sequence[np.ndarray], texts: Sequence[str]) -> str:
    """Texts from top to bottom, those beside each other on one line.

    Args:
        boxes: corners (4, 2) of each text in pixels.
        texts: as many.
    """
    parts = sorted(zip(boxes, texts, strict=True), key=lambda part: part[0][:, 1].mean())
    lines: list[list[tuple[np.ndarray, str]]] = []
    for box, text in parts:
        if lines:
            first = lines[-1][0][0]
            lower = box[:, 1].mean() - first[:, 1].mean()
            if lower < min(np.ptp(box[:, 1]), np.ptp(first[:, 1])) / 2:
                lines[-1].append((box, text))
                continue
        lines.append([(box, text)])
    return "\n".join(" ".join(text for _, text in sorted(line, key=lambda part: part[0][:, 0].min())) for line in lines)


PEERS: dict[str, Callable[[], Peer]] = {
    "tesseract": Tesseract,
    "rapidocr 128": RapidOcr,
    "rapidocr 192": lambda: RapidOcr(192),
}
TRIED: dict[str, Callable[[], Peer]] = {
    "tesseract": Tesseract,
    "tesseract, x1": lambda: Tesseract(factor=1),
    "tesseract, x2": lambda: Tesseract(factor=2),
    "tesseract, x4": lambda: Tesseract(factor=4),
    "tesseract, psm 6": lambda: Tesseract(modes=dict.fromkeys(TIERS, 6)),
    "tesseract, psm 4": lambda: Tesseract(modes=dict.fromkeys(TIERS, 4)),
    "tesseract, psm 3": lambda: Tesseract(modes=dict.fromkeys(TIERS, 3)),
    "tesseract, psm 7": lambda: Tesseract(modes=dict.fromkeys(TIERS, 7)),
    "tesseract, not inverted": lambda: Tesseract(invert=False),
    "rapidocr 128": RapidOcr,
    "rapidocr 128, padded": lambda: RapidOcr(params={"Rec.rec_img_shape": [3, 48, 320]}),
    "rapidocr 160": lambda: RapidOcr(160),
    "rapidocr 192": lambda: RapidOcr(192),
    "rapidocr 256": lambda: RapidOcr(256),
    "rapidocr 384": lambda: RapidOcr(384),
    "rapidocr 736": lambda: RapidOcr(736),
    "rapidocr 256, x2": lambda: RapidOcr(256, factor=2),
    "rapidocr 384, x3": lambda: RapidOcr(384, factor=3),
    "rapidocr 192, text_score 0": lambda: RapidOcr(192, params={"Global.text_score": 0.0}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the peers' settings on the validation split.")
    parser.add_argument("--images", type=int, default=20, help="of each tier (default: 20)")
    parser.add_argument("--only", default="", help="settings whose names begin so")
    options = parser.parse_args()
    tried = {name: make for name, make in TRIED.items() if name.startswith(options.only)}
    with progress_bar(len(tried) * len(TIERS), unit="setting") as bar:
        data = {tier: RenderedTextDataset("validation", tier, size=options.images) for tier in TIERS}
        samples = {tier: [dataset[index] for index in range(options.images)] for tier, dataset in data.items()}
        print("| setting | " + " | ".join(TIERS) + " |\n|---|" + "---|" * len(TIERS), flush=True)
        for name, make in tried.items():
            try:
                peer = make()
            except PeerMissing as error:
                complain(error)
                bar.update(len(TIERS))
                continue
            cells = []
            for tier, rows in samples.items():
                start = cpu_seconds()
                texts = peer.read([row["pixel_values"] for row in rows], tier)
                milliseconds = 1000 * (cpu_seconds() - start) / len(rows)
                scores = score_texts(texts, [row["text"] for row in rows])
                cells.append(f"{scores['cer']:.3f} / {scores['character_accuracy']:.3f} / {milliseconds:.0f}")
                bar.update()
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
