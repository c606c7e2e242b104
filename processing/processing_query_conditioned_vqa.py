"""Processor of QueryConditionedVQA: images and questions -> tensors, and logits -> answers with their scores.

Unusual here: images and questions are prepared apart, because many questions may be about one image; `image_index`
says which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class QueryConditionedVQAProcessor(ProcessorMixin):
    """Joins an image processor, such as `QAViTImageProcessor` or ViT's, and any tokenizer."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask", "image_index"]

    def __call__(self, images=None, text=None, image_index=None, return_tensors=None, **images_kwargs) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: anything that the image processor takes, one or many.
            text: a question, or a list of them. Longer than the tokenizer's `model_max_length`, its end is cut off.
            image_index: for each question the number of its image; without it, question i is about image i, or all
                are about the only image.
            return_tensors: "pt" or "np"; default: lists.
            images_kwargs: passed to the image processor.

        Returns:
            BatchFeature with `pixel_values` (images, channels, height, width) for images, `input_ids` and
            `attention_mask` (questions, words), padded to the longest, for questions, and `image_index` (questions,)
            where it was given.

        Raises:
            ValueError: nothing was given, a question is empty or no text, or the numbers of images and questions do not
                agree.
        """
        if images is None and text is None:
            raise ValueError("give images, text (questions), or both")
        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images=images, return_tensors=return_tensors, **images_kwargs)
        if text is not None:
            questions = [text] if isinstance(text, str) else list(text)
            for index, question in enumerate(questions):
                if not isinstance(question, str) or not question.strip():
                    raise ValueError(f"question {index} is {question!r}: ask something, such as 'what colour is it?'")
            data |= self._check_index(data.get("pixel_values"), image_index, len(questions))
            encoded = self.tokenizer(questions, padding=True, truncation=True, return_tensors=return_tensors)
            data |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _check_index(pixel_values: Any, image_index: Sequence[int] | None, questions: int) -> dict[str, Any]:
        images = None if pixel_values is None else len(pixel_values)
        if image_index is None:
            if images not in (None, 1, questions):
                raise ValueError(f"{images} images, but {questions} questions: say which by image_index")
            return {}
        index = [int(number) for number in image_index]
        if len(index) != questions or (images is not None and not all(0 <= number < images for number in index)):
            raise ValueError(f"image_index must name one of the {images} images for each of {questions} questions")
        return {"image_index": index}

    def post_process(
        self, logits: torch.Tensor, id2label: Mapping[int, str], top_k: int = 1, multi_label: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Turn logits `(questions, num_labels)` into answers.

        Args:
            id2label: the model's `config.id2label`.
            top_k: answers a question, from the best; never more than there are.
            multi_label: scores are probabilities of each answer by itself (models trained by binary cross-entropy),
                else of one among all.

        Returns:
            For each question a list of `{"answer", "score"}` with the score in [0, 1].
        """
        logits = logits.detach().float().cpu()
        scores = logits.sigmoid() if multi_label else logits.softmax(-1)
        top = scores.topk(min(top_k, scores.shape[-1]))
        return [
            [{"answer": id2label[index], "score": score} for index, score in zip(indices, values, strict=True)]
            for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


__all__ = ["QueryConditionedVQAProcessor"]
