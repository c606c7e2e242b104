"""Metric of text recognition. `evaluate.load` takes the path of this file's folder, and needs no network.

The file stands alone (no import from regard), because `evaluate.load` copies it.
"""

from collections.abc import Sequence

import datasets
import evaluate
from rapidfuzz.distance import Levenshtein

LENGTH_BINS = ((1, 24), (25, 64), (65, 128), (129, 256), (257, 512), (513, None))

_DESCRIPTION = """How well texts were read from images: character accuracy by position, character error rate, exact
match, and the error of the predicted number of tokens, over all texts and by length of the reference."""

_INPUTS = """
Args:
    predictions (list[str]): texts as read.
    references (list[str]): texts as they are.
    counts (list[float], optional): predicted numbers of tokens of each text without the start and end tokens, that is
        of UTF-8 bytes. Default: the number of bytes of each prediction.

Returns:
    character_accuracy: share of the references' characters that the prediction has at the same index.
    cer: edit distance in characters, summed, over the number of the references' characters.
    exact_match: share of texts without an error.
    count_mae: mean distance of `counts` from the references' numbers of UTF-8 bytes.
    images: number of texts.
    by_length: the same for the references of 1-24, 25-64, 65-128, 129-256, 257-512 and 513+ characters, where there are
        any. Empty references count in the totals only.
"""


def score_texts(
    predictions: Sequence[str], references: Sequence[str], counts: Sequence[float] | None = None
) -> dict[str, float | int]:
    """Score texts as the metric does, without the split by length.

    Where all references are empty, `character_accuracy` is that of whole texts and `cer` the number of characters read.

    Raises:
        ValueError: nothing to score, or predictions, references and counts differ in number.
    """
    if counts is None:
        counts = [len(prediction.encode()) for prediction in predictions]
    if not len(predictions) == len(references) == len(counts):
        raise ValueError(
            f"give one prediction and count a reference: {len(predictions)} predictions, {len(counts)} counts, "
            f"{len(references)} references"
        )
    if not references:
        raise ValueError("there are no texts to score")
    pairs = list(zip(predictions, references, strict=True))
    characters = sum(len(reference) for reference in references)
    correct = sum(a == b for prediction, reference in pairs for a, b in zip(prediction, reference, strict=False))
    edits = sum(Levenshtein.distance(prediction, reference) for prediction, reference in pairs)
    exact_match = sum(prediction == reference for prediction, reference in pairs) / len(pairs)
    distances = (abs(float(count) - len(text.encode())) for count, text in zip(counts, references, strict=True))
    return {
        "character_accuracy": correct / characters if characters else exact_match,
        "cer": edits / max(characters, 1),
        "exact_match": exact_match,
        "count_mae": sum(distances) / len(pairs),
        "images": len(pairs),
    }


class TextRecognition(evaluate.Metric):
    """`evaluate.Metric` of read texts; see its `inputs_description`, or `score_texts`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, counts=None):
        by_length = {}
        for low, high in LENGTH_BINS:
            inside = [
                i for i, text in enumerate(references) if low <= len(text) and (high is None or len(text) <= high)
            ]
            if inside:
                by_length[f"{low}-{high}" if high else f"{low}+"] = score_texts(
                    [predictions[i] for i in inside],
                    [references[i] for i in inside],
                    None if counts is None else [counts[i] for i in inside],
                )
        return {**score_texts(predictions, references, counts), "by_length": by_length}


__all__ = ["TextRecognition", "score_texts"]
