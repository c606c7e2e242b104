"""The metric of visual question answering: known values, and the same through `evaluate.load` without a network."""

import json
from pathlib import Path

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.metrics.visual_question_answering import visual_question_answering
from regard.metrics.visual_question_answering.visual_question_answering import (
    CONTRACTIONS,
    VisualQuestionAnswering,
    normalize_answer,
    score_answers,
    soft_scores,
)

TEN = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["unknown"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("the two dogs.", "2 dogs"),
        ("\tan  apple\n", "apple"),
        ("None", "0"),
        ("ten", "10"),
        ("twenty one", "twenty 1"),
        ("A", ""),
        ("", ""),
        # periods
        ("2.5", "2.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("no.5", "no.5"),
        # commas
        ("1,000", "1000"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("1,000 black/white", "1000 blackwhite"),
        # other marks
        ("black/white", "black white"),
        ("black /white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("(what?!)", "what"),
        ("10:30", "10:30"),
        ("$5 & up", "$5 & up"),
        # contractions
        ("dont", "don't"),
        ("it's", "it's"),
        ("the girl's", "girl's"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("im", "im"),
        # beyond ASCII
        ("Café", "café"),
        ("Überraschung!", "überraschung"),
        ("兩隻狗。", "兩隻狗。"),
    ],
)
def test_normalized_answers(text, expected):
    assert normalize_answer(text) == expected


def test_contractions_lack_one_apostrophe():
    assert not set(CONTRACTIONS) & set(CONTRACTIONS.values())
    assert all(len(whole) == len(partial) + 1 for partial, whole in CONTRACTIONS.items())


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_normalized_answers_have_single_spaces_and_no_marks(text):
    answer = normalize_answer(text)
    assert answer == " ".join(answer.split())
    assert not visual_question_answering.PUNCTUATION.intersection(answer)


def test_known_accuracies():
    def accuracy(prediction):
        return score_answers([prediction], [TEN])["accuracy"]

    assert [accuracy(answer) for answer in ("yes", "no", "maybe", "unknown", "else")] == pytest.approx(
        [1, 0.9, 0.6, 0.3, 0]
    )
    assert accuracy("The YES!") == 1
    assert score_answers(["cat"], [["cat"] * 3])["accuracy"] == pytest.approx(2 / 3)
    assert score_answers(["cat"], [["cat"] * 4])["accuracy"] == 1


def test_fewer_than_three_annotators_give_all_or_nothing():
    assert score_answers(["two"], [["2"]])["accuracy"] == 1
    assert score_answers(["two"], [["3"]])["accuracy"] == 0
    assert score_answers(["cat"], [["dog", "a cat"]])["accuracy"] == 1
    assert score_answers([""], [["cat"]])["accuracy"] == 0
    assert score_answers(["猫"], [["猫"]])["accuracy"] == 1


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=12), st.sampled_from("bcd"))
@settings(max_examples=60, deadline=None)
def test_against_leaving_out_one_annotator_at_a_time(answers, prediction):
    scores = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        scores.append(min(1, others.count(prediction) / 3))
    assert score_answers([prediction], [answers])["accuracy"] == pytest.approx(sum(scores) / len(scores))


def test_each_type_of_question():
    result = score_answers(["yes", "no", "red"], [TEN, TEN, ["blue"]], ["yes/no", "yes/no", "colour"])
    assert result == {
        "accuracy": pytest.approx(1.9 / 3),
        "questions": 3,
        "by_type": {
            "yes/no": {"questions": 2, "accuracy": pytest.approx(0.95)},
            "colour": {"questions": 1, "accuracy": 0},
        },
    }
    assert score_answers(["yes"], [TEN])["by_type"] == {}


def test_soft_scores():
    assert soft_scores(TEN) == {"yes": 1, "no": 1, "maybe": pytest.approx(2 / 3), "unknown": pytest.approx(1 / 3)}
    assert soft_scores(["Two", "the 2", "three"]) == {"2": pytest.approx(2 / 3), "3": pytest.approx(1 / 3)}
    assert soft_scores(["A dog"]) == {"dog": 1}
    assert soft_scores(["dog", "cat"]) == {"dog": 1, "cat": 1}


def test_loads_by_path(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    predictions, references, types = ["no", "Deux", "", "猫"], [TEN, ["deux"], ["x"], ["猫"]], list("abac")
    expected = score_answers(predictions, references, types)
    metric = evaluate.load(str(Path(visual_question_answering.__file__).parent))
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add(prediction=predictions[3], reference=references[3])
    assert metric.compute(question_types=types) == expected
    assert json.loads(json.dumps(expected)) == expected
    result = VisualQuestionAnswering().compute(predictions=predictions, references=references, question_types=types)
    assert result == expected


def test_errors():
    with pytest.raises(ValueError, match="no answers to score"):
        score_answers([], [])
    with pytest.raises(ValueError, match="one prediction a reference: 1 and 2"):
        score_answers(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="one question type a reference: 2 and 1"):
        score_answers(["a"], [["a"]], ["x", "y"])
    for function in (soft_scores, lambda answers: score_answers(["yes"], [answers])):
        with pytest.raises(ValueError, match="not as the string 'yes'"):
            function("yes")
        with pytest.raises(ValueError, match="no reference answers"):
            function([])
