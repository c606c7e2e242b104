"""The task "visual-question-answering": images and questions in, answers with their scores out."""

from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from regard.pipelines.processor_pipeline import ProcessorPipeline, image_of
from regard.processing.image_io import open_image, to_pil


class VisualQuestionAnsweringPipeline(ProcessorPipeline):
    """Answers questions about images with a QueryConditionedVQA; many questions about one image cost one encoding of
    it.

    ```python
    import regard
    from transformers import pipeline

    ask = pipeline("visual-question-answering", model=folder)
    ask(image="photo.png", question="what colour is it?")
    ask(image="photo.png", question=["what colour is it?", "is it round?"], top_k=3)
    ask([{"image": "photo.png", "question": "is it round?"}, {"image": "other.png", "question": "is it red?"}])
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "encode_image", None)):
            raise ValueError(
                f"{type(self.model).__name__} answers no questions; use a model such as QueryConditionedVQAModel"
            )

    def _sanitize_parameters(self, top_k: int | None = None):
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, but is {top_k}")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def __call__(self, image: Any = None, question: str | list[str] | None = None, **kwargs: Any) -> Any:
        """Ask about one image or many.

        Args:
            image: with `question`, one image: a path, an `http(s)://` or `data:` address, the bytes of a file, a PIL
                image, an array or tensor (height, width[, channels]). Without, a dict with an image in `image` or
                `pixel_values` and a question, or a list of them, in `question`; or many such dicts: a list, a data
                set, a generator or another iterable.
            question: one, or a list of them.
            top_k: answers a question, from the best; default 1, and never more than there are.
            batch_size: images a forward pass, with all their questions; default 1.
            num_workers: processes that prepare images; default 0, in this one.

        Returns:
            For one question a list of `{"answer", "score"}` with the score in [0, 1], the probability of the answer
            among all, or, of models trained on several answers a question, by itself; for a list of questions a list of
            those. For a list of dicts a list of these; for other iterables an iterator, which goes on as it is asked.

        Raises:
            ValueError: an image or a question is missing, a question is empty, or `top_k` is below 1.
            regard.processing.image_io.ImageReadError: an image cannot be read; the message names the file.
        """
        if image is None:
            raise ValueError("no image: give image= and question=, or dicts that hold both")
        if question is not None:
            if isinstance(image, (dict, list, tuple)):
                raise ValueError("question= is about one image; of several, give a list of dicts of image and question")
            image = {"image": image, "question": question}
        return super().__call__(image, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, torch.Tensor]:
        if not isinstance(input_, dict) or input_.get("question") is None:
            raise ValueError("no question: give image= and question=, or dicts that hold both")
        image, question = image_of(input_), input_["question"]
        if isinstance(question, (list, tuple)) and not question:
            raise ValueError("the list of questions is empty: ask something, such as 'what colour is it?'")
        image = to_pil(image) if isinstance(image, (np.ndarray, torch.Tensor)) else open_image(image)
        encoded = self.processor(images=image.convert("RGB"), text=question, return_tensors="pt")
        words = encoded["attention_mask"].bool()
        # The base class joins tensors of one dimension end to end, whatever the lengths and numbers of questions.
        return {
            "pixel_values": encoded["pixel_values"].to(self.dtype),
            "input_ids": encoded["input_ids"][words],
            "words": words.sum(1),
            "questions": torch.tensor([len(words)]),
            "alone": torch.tensor([isinstance(question, str)]),
        }

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        questions = model_inputs["questions"]
        by_question = list(model_inputs["input_ids"].split(model_inputs["words"].tolist()))
        logits = self.model(
            pixel_values=model_inputs["pixel_values"],
            input_ids=pad_sequence(by_question, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id),
            attention_mask=pad_sequence([torch.ones_like(ids) for ids in by_question], batch_first=True),
            image_index=torch.arange(len(questions), device=questions.device).repeat_interleave(questions),
        ).logits
        return {"logits": list(logits.split(questions.tolist())), "alone": model_inputs["alone"]}

    def postprocess(self, model_outputs: dict[str, Any], top_k: int = 1) -> list[Any]:
        config: Any = self.model.config
        answers = self.processor.post_process(
            model_outputs["logits"][0],
            config.id2label,
            top_k=top_k,
            multi_label=config.problem_type == "multi_label_classification",
        )
        return answers[0] if model_outputs["alone"] else answers


__all__ = ["VisualQuestionAnsweringPipeline"]
