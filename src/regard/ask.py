"""`regard ask`: images and questions to answers. Its arguments stand in `regard_cli`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from regard.cli import Worker, complain, run_on_images
from regard.processing.image_io import IMAGE_SUFFIXES
from regard.visualize_question import visualize
from regard_cli import EXIT_FAILED

_DRAWN = 3  # answers in a picture, at least


def run(options: argparse.Namespace) -> int:
    """Run `regard ask` and return its exit code."""
    for question in options.questions:  # as in `regard ask *.png "what is it?"`
        if Path(question).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(question):
            complain(f"{question}: an image where a question should be; put several images into a folder, and name it")
            return EXIT_FAILED
    return run_on_images(
        options,
        lambda: Answerer(
            options.model, options.device, options.threads, options.batch_size, options.questions, options.top_k
        ),
    )


class Answerer(Worker):
    """A model that answers questions; see `Worker`.

    Args:
        questions: what to ask of each image.
        top_k: the number of answers to each question, from the most probable.
    """

    verb = "ask"
    columns = ("question", "rank", "answer", "score")

    def __init__(
        self,
        model: str | None,
        device: str | None,
        threads: int | None,
        batch_size: int,
        questions: Sequence[str],
        top_k: int = 1,
    ):
        super().__init__(model, device, threads, batch_size)
        self.questions, self.top_k = list(questions), top_k
        self.words = self.processor(text=self.questions, return_tensors="pt").to(self.model.device)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An image as pixel values (1, channels, height, width)."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def run_batch(self, batch: list[torch.Tensor]) -> list[dict[str, Any]]:
        """For each image `{"questions": [{"question", "answers": [{"answer", "score"}]}]}`."""
        number, device, config = len(self.questions), self.model.device, self.model.config
        logits = self.model(
            pixel_values=torch.cat(batch).to(device),
            image_index=torch.arange(len(batch), device=device).repeat_interleave(number),
            **{name: rows.repeat(len(batch), 1) for name, rows in self.words.items()},
        ).logits
        answers = self.processor.post_process(
            logits, config.id2label, self.top_k, multi_label=config.problem_type == "multi_label_classification"
        )
        return [
            {
                "questions": [
                    {"question": question, "answers": answers[image * number + index]}
                    for index, question in enumerate(self.questions)
                ]
            }
            for image in range(len(batch))
        ]

    def as_text(self, result: dict[str, Any]) -> str:
        asked = result["questions"]
        width = max(len(answer["answer"]) for entry in asked for answer in entry["answers"])
        indent = "  " if len(asked) > 1 else ""
        lines = []
        for entry in asked:
            if indent:
                lines.append(" ".join(entry["question"].split()))
            lines += [
                f"{indent}{answer['answer']:<{width}}  {100 * answer['score']:4.1f} %" for answer in entry["answers"]
            ]
        return "\n".join(lines)

    def as_json(self, result: dict[str, Any]) -> dict[str, Any]:
        return {
            "questions": [
                {**entry, "answers": [{**answer, "score": round(answer["score"], 4)} for answer in entry["answers"]]}
                for entry in result["questions"]
            ]
        }

    def as_rows(self, result: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [
            (entry["question"], rank, answer["answer"], f"{answer['score']:.4f}")
            for entry in result["questions"]
            for rank, answer in enumerate(entry["answers"], start=1)
        ]

    def draw(self, image: Image.Image, result: dict[str, Any]) -> Image.Image:
        """The image, its answers, and where the model looked for each."""
        model: Any = self.model
        processor: Any = self.processor
        return visualize(model, processor, image, self.questions, max(self.top_k, _DRAWN))
