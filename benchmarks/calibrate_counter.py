"""Choose how readily ImageTextSlot's counter sees a character, on the validation split, and save the model with it.

    python benchmarks/calibrate_counter.py runs/image-text-slot-5m [--images 200] [--save FOLDER]

On fonts that it was not trained on, the counter is too cautious: it misses more characters than it invents. One number,
added to the bias of its last layer, mends that. Prints, for each number, the share of texts whose length is right and
the mean error of the length; saves the model in half precision with the number that gets most lengths right.
"""

import argparse
import sys
from pathlib import Path

import torch

from regard.cli import complain, progress_bar, quiet_transformers
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.hub import CheckpointError, load

SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
BATCH_SIZE = 10


@torch.inference_mode()
def length_errors(model, processor, tier: str, images: int, seed: int, advance) -> torch.Tensor:
    """Predicted less true number of characters, `(shifts, images)`."""
    data = RenderedTextDataset("validation", tier, size=images, seed=seed)
    errors = []
    for start in range(0, images, BATCH_SIZE):
        rows = [data[index] for index in range(start, min(start + BATCH_SIZE, images))]
        inputs = processor(images=[row["pixel_values"] for row in rows], return_tensors="pt")
        memory, *grid = model.encode(inputs["pixel_values"])
        counts = model.counter(memory, *grid)
        true = torch.tensor([[len(row["text"].encode()) + 2] for row in rows])
        predicted = [model.counter.gaze((counts.logits + shift).sigmoid(), counts.line_offset)[2] for shift in SHIFTS]
        errors.append(torch.stack([number - true for number in predicted]).squeeze(-1))
        advance(len(rows))
    return torch.cat(errors, dim=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, bundled name or Hub repository")
    parser.add_argument("--tiers", default="line,block,noisy", help="comma-separated (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="of each tier (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save model and processor there, in float16")
    options = parser.parse_args()
    tiers = options.tiers.split(",")
    if unknown := [tier for tier in tiers if tier not in TIERS]:
        parser.error(f"--tiers: there is no {', '.join(unknown)}; there are {', '.join(TIERS)}")
    quiet_transformers()
    try:
        model, processor = load(options.model, "read", "cpu")
    except CheckpointError as error:
        complain(error)
        return 1
    if model.config.model_type != "image_text_slot" or model.config.counter_config.source != "cells":
        complain(f"{options.model}: has no counter of cells; name an ImageTextSlot model other than as_described")
        return 1
    with progress_bar(len(tiers) * options.images) as bar:
        errors = {
            tier: length_errors(model, processor, tier, options.images, options.seed, bar.update) for tier in tiers
        }
    print(f"| Added | {' | '.join(f'{tier}: right | error' for tier in tiers)} |")
    print("|---:|" + "---:|" * (2 * len(tiers)))
    right = torch.stack([(error == 0).float().mean(1) for error in errors.values()])  # (tiers, shifts)
    for index, shift in enumerate(SHIFTS):
        cells = [
            f"{float(share[index]):.1%} | {float(error[index].abs().mean()):.2f}"
            for share, error in zip(right, errors.values(), strict=True)
        ]
        print(f"| {shift} | {' | '.join(cells)} |")
    best = SHIFTS[int(right.mean(0).argmax())]
    print(f"\nMost lengths right: {best}")
    if options.save:
        with torch.no_grad():
            model.counter.presence.bias.add_(best)
        model.config.training_slots = None
        model.half().save_pretrained(options.save)
        processor.save_pretrained(options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
