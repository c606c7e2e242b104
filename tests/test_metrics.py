"""The metric of text recognition: known values, and the same through `evaluate.load` without a network."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.metrics.text_recognition import text_recognition
from regard.metrics.text_recognition.text_recognition import TextRecognition, score_texts


def compute(**inputs):
    return TextRecognition().compute(**inputs) or {}


def test_known_values():
    scores = score_texts(["abcd", "abXde", "bcd", ""], ["abcd", "abcde", "abcd", "xy"])
    # by index 4 + 4 + 0 + 0 of 4 + 5 + 4 + 2; edits 0 + 1 + 1 + 2; lengths differ by 0, 0, 1, 2
    assert scores == {
        "character_accuracy": pytest.approx(8 / 15),
        "cer": pytest.approx(4 / 15),
        "exact_match": pytest.approx(1 / 4),
        "count_mae": pytest.approx(3 / 4),
        "images": 4,
    }


def test_longer_predictions_cost_edits_but_no_position():
    scores = score_texts(["abcdef"], ["abc"])
    assert scores["character_accuracy"] == 1
    assert scores["cer"] == 1
    assert scores["exact_match"] == 0
    assert scores["count_mae"] == 3


def test_counts_are_in_bytes():
    assert score_texts(["é"], ["é"])["count_mae"] == 0
    assert score_texts(["e"], ["é"])["count_mae"] == 1
    assert score_texts(["é", "abc"], ["é", "abc"], counts=[2.5, 1])["count_mae"] == pytest.approx(1.25)


def test_empty_references():
    assert score_texts([""], [""]) == {
        "character_accuracy": 1.0, "cer": 0.0, "exact_match": 1.0, "count_mae": 0.0, "images": 1,
    }  # fmt: skip
    scores = score_texts(["abc", ""], ["", ""])
    assert (scores["character_accuracy"], scores["cer"]) == (0.5, 3)


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_bounds_and_a_naive_edit_distance(pairs):
    predictions, references = zip(*pairs, strict=True)
    scores = score_texts(predictions, references)
    assert 0 <= scores["character_accuracy"] <= 1
    edits = sum(naive_distance(*pair) for pair in pairs)
    assert scores["cer"] == pytest.approx(edits / max(1, sum(map(len, references))))
    perfect = score_texts(references, references)
    assert (perfect["character_accuracy"], perfect["cer"], perfect["exact_match"]) == (1, 0, 1)


def test_bins():
    lengths = [0, 1, 24, 25, 64, 65, 128, 129, 256, 257, 512, 513, 2000]
    references = ["x" * length for length in lengths]
    result = compute(predictions=references, references=references)
    assert {name: scores["images"] for name, scores in result["by_length"].items()} == {
        "1-24": 2, "25-64": 2, "65-128": 2, "129-256": 2, "257-512": 2, "513+": 2,
    }  # fmt: skip
    assert result["images"] == 13

    result = compute(predictions=["a", "b" * 30], references=["a", "c" * 30], counts=[1, 20.0])
    assert list(result["by_length"]) == ["1-24", "25-64"]
    assert result["by_length"]["1-24"] == score_texts(["a"], ["a"], [1])
    assert result["by_length"]["25-64"] == score_texts(["b" * 30], ["c" * 30], [20])
    assert result["count_mae"] == 5
    json.dumps(result)


def test_counts_may_be_an_array():
    result = compute(predictions=["ab"], references=["ab"], counts=np.array([2.5], dtype=np.float32))
    assert result["count_mae"] == 0.5
    json.dumps(result)


def test_loads_by_path(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    folder = Path(text_recognition.__file__).parent
    metric = evaluate.load(str(folder))
    metric.add_batch(predictions=["abc", "x"], references=["abd", "x"])
    metric.add(prediction="\n", reference="\n")
    expected = score_texts(["abc", "x", "\n"], ["abd", "x", "\n"])
    result = metric.compute() or {}
    by_length = result.pop("by_length")
    assert result == expected == by_length["1-24"]


def test_errors():
    with pytest.raises(ValueError, match="no texts"):
        score_texts([], [])
    with pytest.raises(ValueError, match="1 predictions, 1 counts, 2 references"):
        score_texts(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="2 predictions, 3 counts, 2 references"):
        score_texts(["a", "b"], ["a", "b"], [1, 2, 3])


def naive_distance(a, b):
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (left != right)))
    return row[-1]
