"""Answering questions: what ten questions cost beside one, what keeping fewer patches saves and loses, the speed of a
ViLT of the same size, the prior of the questions alone, and whether the maps mean something.

    python benchmarks/ask.py cost MODEL [--dataset scenes]
    python benchmarks/ask.py prior [--dataset easy-vqa]
    python benchmarks/ask.py maps MODEL [--described OTHER_MODEL] [--dataset scenes]

`cost`: one thread, batch 1, processor time, all in one run and in turns, the median of the rounds. Its accuracies,
by which `keep_patches` would be chosen, are of the validation split. `prior`: the most frequent training answer to
the very same question, to its type, and over all questions, on the test split (of scenes 20,000 and 5,000
questions). `maps`: pointing accuracy, chance, deletion and insertion on the test split, on questions with boxes, for
each model and for random maps.

Prints Markdown and writes benchmarks/results/ask_WHAT_DATASET.json and docs/ask_WHAT_DATASET.png.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classify import ROOT, plotted
from transformers import ViltConfig, ViltForQuestionAnswering
from transformers.utils import logging as transformers_logging

from regard.data.scenes import SceneDataset
from regard.data.visual_questions import load_visual_questions
from regard.evaluate import processor_name
from regard.evaluate_questions import Asker, choose_questions
from regard.metrics.attention_maps.attention_maps import pointing_accuracy, pointing_chance
from regard.metrics.attention_maps.deletion_insertion import deletion_insertion
from regard.metrics.visual_question_answering.visual_question_answering import normalize_answer, score_answers
from regard.trainers.trainer_query_conditioned_vqa import boxes_in_shares, distinct_images

RESULTS = Path(__file__).with_name("results")
_TOLD = ("question", "question_type", "answers")


def in_turns(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median processor milliseconds of each task; after one round that warms up, all take turns."""
    spent: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if turn:
                spent[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(times), 2) for name, times in spent.items()}


def vilt_like(asker: Asker, words: int) -> ViltForQuestionAnswering:
    """A ViLT with the image size, patches, answers and, as nearly as its layers allow, parameters of a model."""
    config: Any = asker.model.config
    wanted = sum(parameter.numel() for parameter in asker.model.parameters())
    width = 160
    shape = {
        "vocab_size": config.text_config.vocab_size, "max_position_embeddings": max(words, 64), "hidden_size": width,
        "num_attention_heads": 4, "intermediate_size": 4 * width, "image_size": config.image_size,
        "patch_size": config.image_size // asker.grid[0], "num_labels": config.num_labels,
    }  # fmt: skip
    with torch.device("meta"):
        sizes = {
            layers: sum(
                p.numel() for p in ViltForQuestionAnswering(ViltConfig(**shape, num_hidden_layers=layers)).parameters()
            )
            for layers in range(1, 25)
        }
    layers = min(sizes, key=lambda number: abs(sizes[number] - wanted))
    return ViltForQuestionAnswering(ViltConfig(**shape, num_hidden_layers=layers)).eval()


@torch.inference_mode()
def cost(asker: Asker, rows: list[Mapping[str, Any]], rounds: int) -> dict[str, Any]:
    """Times of one and ten questions, ours and ViLT's, and accuracy and time by `keep_patches`."""
    ten = next(
        group for group in by_image(rows).values() if len(group) >= 10
    )[:10]  # fmt: skip
    inputs = asker.collate(ten)
    pixel_values, questions = inputs["pixel_values"], {n: inputs[n] for n in ("input_ids", "attention_mask")}
    first = {name: value[:1] for name, value in questions.items()}
    vilt = vilt_like(asker, questions["input_ids"].shape[1])
    many = pixel_values.expand(10, -1, -1, -1)
    mask = torch.ones(many.shape[0], *many.shape[2:], dtype=torch.long)
    tasks = {
        "one question": lambda: asker.model(pixel_values=pixel_values, **first),
        "ten questions": lambda: asker.model(pixel_values=pixel_values, **questions),
        "ViLT, one question": lambda: vilt(pixel_values=pixel_values, pixel_mask=mask[:1], **first),
        "ViLT, ten questions": lambda: vilt(pixel_values=many, pixel_mask=mask, **questions),
    }
    times = in_turns(tasks, rounds)
    patches = asker.grid[0] * asker.grid[1]
    kept = sorted({patches} | {max(1, round(patches * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)})
    curve = []
    for number in kept:
        asker.model.config.keep_patches = None if number == patches else number
        spent = in_turns({"ten": tasks["ten questions"]}, rounds)["ten"]
        curve.append({"keep_patches": number, "ms_ten_questions": spent, "accuracy": accuracy(asker, rows)})
    asker.model.config.keep_patches = None
    parameters = {
        "ours": sum(p.numel() for p in asker.model.parameters()), "ViLT": sum(p.numel() for p in vilt.parameters()),
    }  # fmt: skip
    return {"milliseconds": times, "parameters": parameters, "keep_patches": curve}


def by_image(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["image_id"]].append(row)
    return groups


def batches(asker: Asker, rows: list[Mapping[str, Any]]):
    for start in range(0, len(rows), asker.batch_size):
        part = rows[start : start + asker.batch_size]
        yield part, asker.collate(part)


def answer(asker: Asker, inputs: Mapping[str, torch.Tensor]) -> Any:
    names = ("pixel_values", "input_ids", "attention_mask", "image_index")
    return asker.model(**{name: inputs[name] for name in names})


def accuracy(asker: Asker, rows: list[Mapping[str, Any]]) -> float:
    given = []
    for _, inputs in batches(asker, rows):
        given += [asker.answers[best] for best in answer(asker, inputs).logits.argmax(-1).tolist()]
    return score_answers(given, [row["answers"] for row in rows])["accuracy"]


def prior(dataset: str, generated: tuple[int, int] = (20_000, 5_000)) -> dict[str, float]:
    """Test accuracy of the most frequent training answer: to the same question, to its type, and over all."""
    train, test = (told(dataset, split, size) for split, size in zip(("train", "test"), generated, strict=True))
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for question, kind, answers in train:
        for given in map(normalize_answer, answers):
            for known in (None, ("type", kind), ("question", question)):
                counts[known][given] += 1
    best = {known: counter.most_common(1)[0][0] for known, counter in counts.items()}
    references = [answers for *_, answers in test]
    by_type = [best.get(("type", kind), best[None]) for _, kind, _ in test]
    by_question = [best.get(("question", question), other) for (question, *_), other in zip(test, by_type, strict=True)]
    return {
        "majority": score_answers([best[None]] * len(references), references)["accuracy"],
        "question's type": score_answers(by_type, references)["accuracy"],
        "question only": score_answers(by_question, references)["accuracy"],
    }


def told(dataset: str, split: str, generated: int) -> list[tuple[str, str, list[str]]]:
    """Question, type and answers of all rows of a split, or of so many generated ones."""
    if dataset == "scenes":
        scenes = SceneDataset(split, generated)
        rows = ([scenes[row][name] for name in _TOLD] for row in range(generated))
    else:
        data = load_visual_questions(dataset, split)
        rows = zip(*(data[name] for name in _TOLD), strict=True)
    return [(question, kind, list(answers)) for question, kind, answers in rows]


@torch.inference_mode()
def maps(asker: Asker, rows: list[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Pointing, and deletion and insertion of the last layer's relevance and of random maps."""
    curves: dict[str, list[torch.Tensor]] = defaultdict(list)
    relevance, boxes = [], []
    generator = torch.Generator().manual_seed(seed)
    for part, inputs in batches(asker, rows):
        outputs = answer(asker, inputs)
        seen = outputs.relevance[:, -1].unflatten(1, asker.grid)
        chosen = outputs.logits.argmax(-1, keepdim=True)
        images = inputs["pixel_values"][inputs["image_index"]]
        words = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def score(changed, words=words, chosen=chosen):
            return asker.model(pixel_values=changed, **words).logits.softmax(-1).gather(1, chosen).squeeze(1)

        for name, grid in (("own", seen), ("random", torch.rand(seen.shape, generator=generator))):
            result = deletion_insertion(score, images, grid)
            for kind in ("deletion", "insertion"):
                curves[f"{name} {kind}"].append(result[kind])
        relevance.append(seen.numpy())
        boxes += boxes_in_shares(part, *distinct_images(part))
    joined = {name: torch.cat(rows).mean(0) for name, rows in curves.items()}
    return {
        "questions": len(rows),
        "pointing_accuracy": pointing_accuracy(np.concatenate(relevance), boxes),
        "pointing_chance": pointing_chance(asker.grid, boxes),
        "curves": {name: [round(float(value), 4) for value in curve] for name, curve in joined.items()},
        "areas": {name: round(float(torch.trapezoid(curve) / (len(curve) - 1)), 4) for name, curve in joined.items()},
    }


def file_stem(options: argparse.Namespace) -> str:
    return f"ask_{options.what}_{re.sub(r'[^a-z0-9]+', '-', Path(options.dataset).name.lower())}"


def chosen_rows(options: argparse.Namespace, split: str, with_boxes: bool = False) -> list[Mapping[str, Any]]:
    """The first questions of a split; where asked for, of those with boxes."""
    choice = Namespace(model="", tiers=None, dataset=options.dataset, images=None, seed=options.seed)
    (data,) = choose_questions(choice, split).values()
    rows: list[Mapping[str, Any]] = []
    for index in range(len(data)):
        row = data[index]
        if row["boxes"] or not with_boxes:
            rows.append(row)
        if len(rows) == options.questions:
            break
    return rows


def run_cost(options: argparse.Namespace) -> dict[str, Any]:
    asker = Asker(options.model, "cpu", 1, 250)
    result = cost(asker, chosen_rows(options, "validation"), options.rounds)
    times = result["milliseconds"]
    print("| | ms, one thread |\n|---|--:|")
    for name, spent in times.items():
        print(f"| {name} | {spent} |")
    print(f"\nten questions cost {times['ten questions'] / times['one question']:.2f} of one;")
    print(f"one costs {times['one question'] / times['ViLT, one question']:.2f} of ViLT's,", end=" ")
    print(f"ten cost {times['ten questions'] / times['ViLT, ten questions']:.2f}; parameters {result['parameters']}\n")
    print("| patches kept | ms, ten questions | validation accuracy |\n|--:|--:|--:|")
    for row in result["keep_patches"]:
        print(f"| {row['keep_patches']} | {row['ms_ten_questions']} | {100 * row['accuracy']:.1f} % |")
    with plotted(options.plots / f"{file_stem(options)}.png") as axes:
        if axes is not None:
            spent, right = zip(
                *((r["ms_ten_questions"], 100 * r["accuracy"]) for r in result["keep_patches"]), strict=True
            )
            axes.plot(spent, right, marker="o", label="keep_patches, ten questions")
            for row in result["keep_patches"]:
                axes.annotate(str(row["keep_patches"]), (row["ms_ten_questions"], 100 * row["accuracy"]), fontsize=8)
            axes.set(xlabel="milliseconds, ten questions of one image, one thread", ylabel="validation accuracy, %")
    return result


def run_prior(options: argparse.Namespace) -> dict[str, Any]:
    result = prior(options.dataset)
    print("| known | test accuracy |\n|---|--:|")
    for name, right in result.items():
        print(f"| {name} | {100 * right:.1f} % |")
    return result


def run_maps(options: argparse.Namespace) -> dict[str, Any]:
    rows = chosen_rows(options, "test", with_boxes=True)
    models = {"ours": options.model} | ({"as described": options.described} if options.described else {})
    result = {name: maps(Asker(model, "cpu", 2, 50), rows, options.seed) for name, model in models.items()}
    print(
        "| model | points at it | by chance | deletion, own / random | insertion, own / random |\n|---|--:|--:|--:|--:|"
    )
    for name, row in result.items():
        areas = [
            " / ".join(f"{row['areas'][f'{whose} {kind}']:.3f}" for whose in ("own", "random"))
            for kind in ("deletion", "insertion")
        ]
        cells = (name, *(f"{100 * row[part]:.1f} %" for part in ("pointing_accuracy", "pointing_chance")), *areas)
        print(f"| {' | '.join(cells)} |")
    with plotted(options.plots / f"{file_stem(options)}.png") as axes:
        if axes is not None:
            for (name, row), color in zip(result.items(), ("C0", "C1"), strict=False):
                for kind, style in (("deletion", "-"), ("insertion", "--")):
                    for whose, width in (("own", 2.0), ("random", 0.8)):
                        curve = row["curves"][f"{whose} {kind}"]
                        axes.plot(
                            np.linspace(0, 100, len(curve)), curve, style, color=color, linewidth=width,
                            label=f"{name}, {kind}, {'its map' if whose == 'own' else 'random map'}",
                        )  # fmt: skip
            axes.set(xlabel="cells deleted or inserted, %", ylabel="probability of its answer")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "prior", "maps"))
    parser.add_argument("model", nargs="?", default="query-conditioned-vqa-scenes", help="(default: %(default)s)")
    parser.add_argument("--described", help="maps: a checkpoint of the preset as_described, trained on the same")
    parser.add_argument("--dataset", help="(default: scenes; prior: easy-vqa)")
    parser.add_argument("--questions", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="cost: timed rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs", help="folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON (default: benchmarks/results/ask_WHAT_DATASET.json)")
    options = parser.parse_args(arguments)
    options.dataset = options.dataset or ("easy-vqa" if options.what == "prior" else "scenes")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = {"cost": run_cost, "prior": run_prior, "maps": run_maps}[options.what](options)
    report = {
        "command": shlex.join(["python", "benchmarks/ask.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": processor_name(),
        "results": result,
    }
    output = options.output or RESULTS / f"{file_stem(options)}.json"
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
