"""Calibrate the counter of an ImageTextSlot model on the validation split, and save the model with it.

    python benchmarks/calibrate_counter.py runs/image-text-slot-5m [--images 300] [--save FOLDER]

Two things, on fonts that the model was not trained on. One number, added to the bias of the counter's last layer: the
one with which most characters are read right. Then the seven of the second look (`ImageTextSlotModel.read`): where the
counter is in doubt, both numbers are read, and logistic regression learns from the texts which reading to keep. Prints
character accuracy and exact match of each step, the last one on other validation images than it learned from; saves the
model in half precision.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein

from regard.cli import complain, progress_bar, quiet_transformers
from regard.configuration.configuration_image_text_slot import SECOND_LOOK
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.hub import CheckpointError, load
from regard.metrics.text_recognition.text_recognition import score_texts
from regard.modeling.image_text_slot_second_look import Look, second_look_features

SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
BATCH_SIZE = 10


def batches(processor, tier: str, images: int, seed: int, advance) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Pixels and texts of validation images."""
    data = RenderedTextDataset("validation", tier, size=images, seed=seed)
    for start in range(0, images, BATCH_SIZE):
        rows = [data[index] for index in range(start, min(start + BATCH_SIZE, images))]
        inputs = processor(images=[row["pixel_values"] for row in rows], return_tensors="pt")
        yield inputs["pixel_values"], [row["text"] for row in rows]
        advance(len(rows))


@torch.inference_mode()
def measure(model, processor, data) -> dict[str, float]:
    """Character accuracy, exact match, ... of `read`."""
    predictions, references = [], []
    for pixel_values, texts in data:
        results = processor.post_process(model.read(pixel_values), [(128, 128)] * len(texts))
        predictions += [result["text"] for result in results]
        references += texts
    return score_texts(predictions, references, [len(text) for text in predictions])


def looks(model, data) -> Iterator[tuple[Look, Look, list[str]]]:
    """First and second looks at images that are read together, and their texts; where there is doubt."""
    for pixel_values, texts in data:
        for index, part in model.parts(pixel_values):
            first, second = model.looks(pixel_values[index], model.config.num_slots, twice=True, part=part)
            if second is not None:
                yield first, second, [texts[image] for image in index.tolist()]


@torch.inference_mode()
def doubts(model, processor, data) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(doubts, 6)` of numbers that are in doubt, and whether the other number reads better, `(doubts,)`;
    those that make no difference are left out."""
    features, labels = [], []
    newline = processor.tokenizer("\n")["input_ids"][1]
    for first, second, texts in looks(model, data):
        of_groups = second_look_features(first, second)
        tokens = [look.tokens.tolist() for look in (first, second)]
        ends = [look.numbers.long().cumsum(1).tolist() for look in (first, second)]
        for row, text in enumerate(texts):
            true = processor.tokenizer(text)["input_ids"][1:-1]

            def error(read: list[int], true=true) -> int:
                read = [token for token in read if token != model.config.pad_token_id]  # stands for nothing
                return Levenshtein.distance(read[:-1] if read[-1:] == [newline] else read, true)

            read, changed = (tokens[look][row][1 : ends[look][row][-1] + 1] for look in (0, 1))
            for group in (first.numbers != second.numbers)[row].nonzero().squeeze(1).tolist():
                (start, stop), part = (
                    (ends[look][row][group - 1] if group else 0, ends[look][row][group]) for look in (0, 1)
                )
                better = error(read) - error(read[:start] + changed[slice(*part)] + read[stop:])
                if better:
                    features.append(of_groups[row, group])
                    labels.append(float(better > 0))
    return torch.stack(features) if features else torch.zeros(0, 6), torch.tensor(labels)


def fit(features: torch.Tensor, labels: torch.Tensor) -> dict[str, float] | None:
    """Weights and bias of a logistic regression, by their names; None where there is nothing to learn from."""
    if not 0 < labels.sum() < len(labels):
        return None
    features, labels = features.clone(), labels.clone()  # out of inference mode
    weights = torch.zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + 1e-3 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return {name: round(weight, 3) for name, weight in zip(SECOND_LOOK, weights.tolist(), strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, bundled name or Hub repository")
    parser.add_argument("--tiers", default="line,block,noisy", help="comma-separated (default: %(default)s)")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="of each tier (default: %(default)s)")
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
    counter, bias = model.config.counter_config, model.counter.presence.bias.detach().clone()

    def each_tier(use, seed: int) -> list:
        return [use(model, processor, batches(processor, tier, options.images, seed, bar.update)) for tier in tiers]

    print(f"| | {' | '.join(f'{tier}: accuracy | exact' for tier in tiers)} |")
    print("|---|" + "---:|" * (2 * len(tiers)))

    def report(name: str, scores: list[dict[str, float]]) -> None:
        cells = (f"{score['character_accuracy']:.1%} | {score['exact_match']:.1%}" for score in scores)
        bar.write(f"| {name} | {' | '.join(cells)} |", file=sys.stdout)

    accuracies = []
    with progress_bar((len(SHIFTS) + 3) * len(tiers) * options.images) as bar:
        counter.second_look = None
        for shift in SHIFTS:
            model.counter.presence.bias.data = bias + shift
            scores = each_tier(measure, options.seed)
            accuracies.append(sum(score["character_accuracy"] for score in scores))
            report(f"{shift} added to the bias", scores)
        best = SHIFTS[accuracies.index(max(accuracies))]
        model.counter.presence.bias.data = bias + best
        features, labels = (torch.cat(parts) for parts in zip(*each_tier(doubts, options.seed), strict=True))
        weights = fit(features, labels)
        report(f"{best}, other images", each_tier(measure, options.seed + 1))
        counter.second_look = weights
        report(f"{best}, other images, second look", each_tier(measure, options.seed + 1))
    print(f"\nMost characters right: {best}. Second look: {weights}, from {len(labels)} doubts that make a difference,")
    print(f"in {int(labels.sum())} of which the other number is right.")
    if options.save:
        model.config.training_slots = None
        model.half().save_pretrained(options.save)
        processor.save_pretrained(options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
