"""Measure a model that answers questions: how often it is right, how much it owes to the image, and where it looked."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from regard.data.scenes import SceneDataset
from regard.data.visual_questions import load_visual_questions
from regard.hub import load
from regard.metrics.attention_maps.attention_maps import energy_in_boxes, pointing_accuracy, pointing_chance
from regard.metrics.visual_question_answering.visual_question_answering import score_answers
from regard.train_settings import held_out_by
from regard.trainers.trainer_query_conditioned_vqa import VQACollator, boxes_in_shares, distinct_images, grid_of

QUESTIONS = 10_000  # of generated scenes
COLUMNS = {
    "questions": ("questions", "{:.0f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "shuffled_accuracy": ("other image", "{:.2%}"),
    "blind_accuracy": ("no image", "{:.2%}"),
    "pointing_accuracy": ("points at it", "{:.2%}"),
    "pointing_chance": ("by chance", "{:.2%}"),
    "energy_in_boxes": ("looks at it", "{:.2%}"),
}


def choose_questions(options: argparse.Namespace, split: str) -> dict[str, Any]:
    """The data set that the options name, with questions about images.

    Raises:
        ValueError: the options name none.
    """
    if options.tiers or not options.dataset:
        raise ValueError(
            f"{options.model} answers questions: name some by --dataset (easy-vqa, scenes, vqa-v2:FOLDER, "
            "clevr:FOLDER, or a folder or Hub data set with columns image, question and answers); --tiers are texts"
        )
    if options.dataset == "scenes":
        return {"scenes": SceneDataset(split, options.images or QUESTIONS, options.seed)}
    data = load_visual_questions(options.dataset, split, **held_out_by(options.model, options.seed))
    if options.images is not None:
        data = data.select(range(min(options.images, len(data))))
    return {Path(options.dataset).name: data}


class Asker:
    """A model that answers questions, and its processor; arguments as `regard.hub.load` has them."""

    def __init__(self, model: str | None, device: str | None, threads: int | None, batch_size: int):
        if threads is not None:
            torch.set_num_threads(threads)
        network: Any
        processor: Any
        network, processor = load(model, "ask", device)
        self.model = network
        config: Any = self.model.config
        self.answers: list[str] = [config.id2label[index] for index in range(len(config.id2label))]
        label2id = {name: index for index, name in enumerate(self.answers)}
        self.grid = grid_of(self.model, processor)
        self.collate = VQACollator(processor, label2id, self.grid)
        self.batch_size = batch_size


@torch.inference_mode()
def score_asker(asker: Asker, data: Any, advance: Callable[[int], Any] = lambda questions: None) -> dict[str, Any]:
    """Answer every question of `data`.

    Args:
        asker: the model.
        data: rows as `load_visual_questions` has them.
        advance: called with the number of questions after each batch.

    Returns:
        `questions`; `accuracy`; `shuffled_accuracy`, of the same questions about another image of their batch;
        `blind_accuracy`, about a grey one; where there are boxes `pointing_accuracy`, `pointing_chance` and
        `energy_in_boxes` of the last layer's relevance over `pointed_questions`, else NaN; all these `by_type` too; and
        `ms_per_question`, the time of the network.
    """
    grey = asker.collate.processor.image_processor(images=Image.new("RGB", (8, 8), "gray"), return_tensors="pt")
    nothing = asker.model.encode_image(grey["pixel_values"].to(asker.model.device))
    answers: dict[str, list[str]] = {"accuracy": [], "shuffled_accuracy": [], "blind_accuracy": []}
    references, types, boxes, maps, seconds = [], [], [], [], 0.0
    for start in range(0, len(data), asker.batch_size):
        rows = [data[row] for row in range(start, min(start + asker.batch_size, len(data)))]
        inputs = {name: value.to(asker.model.device) for name, value in asker.collate(rows).items()}
        questions = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        index = inputs["image_index"]
        begin = time.perf_counter()
        seen = asker.model(pixel_values=inputs["pixel_values"], image_index=index, **questions)
        logits = seen.logits.float().cpu()
        seconds += time.perf_counter() - begin
        features = seen.image_features
        another = asker.model(image_features=features.roll(1, 0), image_index=index, **questions).logits
        none = asker.model(image_features=nothing, **questions).logits
        for name, given in zip(answers, (logits, another, none), strict=True):
            answers[name] += [asker.answers[best] for best in given.argmax(-1).tolist()]
        references += [row["answers"] for row in rows]
        types += [row.get("question_type") or "" for row in rows]
        maps.append(seen.relevance[:, -1].float().cpu().numpy().reshape(-1, *asker.grid))
        boxes += boxes_in_shares(rows, *distinct_images(rows))
        advance(len(rows))
    relevance = np.concatenate(maps)

    def part(chosen: Sequence[int]) -> dict[str, Any]:
        pointed = [row for row in chosen if boxes[row]]
        where = [boxes[row] for row in pointed]
        names = ("pointing_accuracy", "pointing_chance", "energy_in_boxes")
        pointing: dict[str, float] = dict.fromkeys(names, float("nan"))
        if pointed:
            pointing = {
                "pointing_accuracy": pointing_accuracy(relevance[pointed], where),
                "pointing_chance": pointing_chance(asker.grid, where),
                "energy_in_boxes": energy_in_boxes(relevance[pointed], where),
            }
        right = {
            name: score_answers([given[row] for row in chosen], [references[row] for row in chosen])["accuracy"]
            for name, given in answers.items()
        }
        return {"questions": len(chosen), **right, **pointing, "pointed_questions": len(pointed)}

    by_type: dict[str, list[int]] = {}
    for row, kind in enumerate(types):
        by_type.setdefault(kind, []).append(row)
    return {
        **part(range(len(references))),
        "by_type": {kind or "other": part(chosen) for kind, chosen in sorted(by_type.items())},
        "ms_per_question": 1000 * seconds / len(references),
    }
