"""Choose from what probability of "no more" on SequentialAttentionCounting stops, on the validation split, and save the
model with it.

    python benchmarks/calibrate_done.py runs/sequential-attention-counting-tiny [--images 200] [--save FOLDER]

Training ends an image's trajectory once and goes on many times, so the right threshold need not be one half. Prints,
for each threshold, the share of exact counts and the mean error by kind of scene, trained categories only; saves the
model with the threshold that has most exact counts, every kind weighing the same.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.cli import complain, progress_bar, quiet_transformers
from regard.evaluate_counting import CountScorer, generate_scenes
from regard.hub import CheckpointError, resolve
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def count_errors(counter: CountScorer, data: Any, advance: Callable[[int], Any]) -> np.ndarray:
    """Predicted less true number, `(thresholds, counts)`. Up to where it stops, a count is the same whatever the
    threshold, so that all follow from the highest."""
    errors = []
    for start in range(0, len(data), counter.batch_size):
        rows = [data[row] for row in range(start, min(start + counter.batch_size, len(data)))]
        questions = [counter.collate.questions(row) for row in rows]
        asked = [
            {"image": row["pixel_values"], "category": [name for name, _ in pairs]}
            for row, pairs in zip(rows, questions, strict=True)
        ]
        counts = counter.count(asked, batch_size=len(asked), done_threshold=THRESHOLDS[-1], tile=False)
        for pairs, results in zip(questions, counts, strict=True):
            for (_, points), result in zip(pairs, results, strict=True):
                done = np.array([1 - point["score"] for point in result["points"]] + [1.0])
                errors.append([int((done >= threshold).argmax()) - len(points) for threshold in THRESHOLDS])
        advance(len(rows))
    return np.array(errors).T


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, bundled name or Hub repository")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its own)")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="save model and processor there, the backbone in float16"
    )
    options = parser.parse_args(arguments)
    quiet_transformers()
    try:
        counter = CountScorer(options.model, "cpu", options.threads, options.batch_size)
    except (CheckpointError, ValueError) as error:
        complain(error)
        return 1
    scenes = generate_scenes("validation", options.images, options.seed)
    scenes = {kind: data for kind, data in scenes.items() if not kind.startswith("held-out")}
    with progress_bar(len(scenes) * options.images) as bar:
        errors = {kind: count_errors(counter, data, bar.update) for kind, data in scenes.items()}
    print(f"| threshold | {' | '.join(f'{kind}: exact | MAE' for kind in errors)} |")
    print("|---:|" + "---:|" * (2 * len(errors)))
    exact = np.array([(error == 0).mean(1) for error in errors.values()])
    for index, threshold in enumerate(THRESHOLDS):
        cells = [
            f"{share[index]:.1%} | {np.abs(error[index]).mean():.2f}"
            for share, error in zip(exact, errors.values(), strict=True)
        ]
        print(f"| {threshold} | {' | '.join(cells)} |")
    best = THRESHOLDS[int(exact.mean(0).argmax())]
    print(f"\nMost exact counts: {best}")
    if options.save:
        half = SequentialAttentionCountingModel.from_pretrained(resolve(options.model), dtype=torch.float16)
        half.config.done_threshold = best
        half.save_pretrained(options.save)
        counter.count.processor.save_pretrained(options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
