"""The metric of image classification: known values, and the same through `evaluate.load` without a network."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from regard.metrics.image_classification import image_classification
from regard.metrics.image_classification.image_classification import ImageClassification, rank_classes, score_classes

# Six classes; the label comes first, second, fifth and last.
LOGITS = [[9, 0, 0, 0, 0, 0], [9, 8, 0, 0, 0, 0], [1, 2, 5, 3, 4, 0], [0, 5, 4, 3, 2, 1]]
LABELS = [0, 1, 0, 0]


def test_known_values():
    assert rank_classes(LOGITS, LABELS).tolist() == [0, 1, 4, 5]
    assert score_classes(LOGITS, LABELS) == {"top1": 0.25, "top5": 0.75}
    assert score_classes(np.array(LOGITS, np.float16), np.array(LABELS)) == score_classes(LOGITS, LABELS)
    assert score_classes(torch.tensor(LOGITS), torch.tensor(LABELS)) == score_classes(LOGITS, LABELS)
    assert score_classes([[0.1, 0.2]], [0]) == {"top1": 0.0, "top5": 1.0}, "fewer than five classes"


def test_equal_and_lost_logits_win_nothing():
    assert rank_classes([[1.0, 1.0, 1.0]] * 3, [0, 1, 2]).tolist() == [0, 1, 2]
    assert rank_classes([[float("nan"), -5.0]], [0]).tolist() == [1]


def test_each_class_by_its_name():
    result = ImageClassification().compute(predictions=LOGITS, references=LABELS, names=list("abcdef")) or {}
    assert result == {**score_classes(LOGITS, LABELS), "images": 4, "by_class": {"a": pytest.approx(1 / 3), "b": 0}}
    json.dumps(result)
    result = ImageClassification().compute(predictions=np.array(LOGITS), references=np.array(LABELS)) or {}
    assert list(result["by_class"]) == ["0", "1"]


def test_loads_by_path(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    metric = evaluate.load(str(Path(image_classification.__file__).parent))
    metric.add_batch(predictions=np.array(LOGITS[:3], np.float32), references=LABELS[:3])
    metric.add(prediction=LOGITS[3], reference=LABELS[3])
    result = metric.compute() or {}
    assert (result["top1"], result["top5"], result["images"]) == (0.25, 0.75, 4)


def test_errors():
    with pytest.raises(ValueError, match="no images"):
        score_classes(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match=r"not \(1, 2\) and \(2,\)"):
        score_classes([[0.0, 1.0]], [0, 1])
    for label in (-1, 2):
        with pytest.raises(ValueError, match="labels must be 0 to 1"):
            score_classes([[0.0, 1.0]], [label])
