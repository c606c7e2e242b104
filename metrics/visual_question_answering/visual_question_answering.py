"""Metric of visual question answering. `evaluate.load` takes the path of this file's folder, and needs no network.

The file stands alone (no import from regard), because `evaluate.load` copies it.
"""

import re
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate

PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = ("a", "an", "the")
NUMBERS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}

# The evaluation of VQA v2 completes these only: "im", "ive", "lets" and "shes" stay as they are.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
}

_DESCRIPTION = """How well questions about images were answered: the accuracy of VQA v2, which asks how many of the
annotators gave the answer, over all questions and for each type of question."""

_CITATION = """@inproceedings{goyal2017making,
    title={Making the {V} in {VQA} matter: Elevating the role of image understanding in visual question answering},
    author={Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
    booktitle={CVPR},
    year={2017}
}"""

_INPUTS = """
Args:
    predictions (list[str]): the answer given to each question.
    references (list[list[str]]): the annotators' answers to each question: ten in VQA v2, one elsewhere.
    question_types (list[str], optional): the type of each question.

Returns:
    accuracy: mean over the questions of min(n / 3, 1), where n annotators gave the predicted answer, itself a mean
        over the subsets that leave one annotator out. With fewer than three annotators: share of the questions whose
        prediction one of them gave. Answers are compared after VQA v2's normalisation.
    questions: number of questions.
    by_type: for each type, its number of `questions` and their `accuracy`. Empty without `question_types`.
"""


def normalize_answer(text: str) -> str:
    """An answer as the evaluation of VQA v2 compares it.

    It is in lower case, with one space between words; number words to ten (and "none") are digits; articles are gone,
    so that "a" becomes the empty answer; contractions have their apostrophes. A period stays before a digit only. Of
    the other punctuation, apostrophes and colons stay. Each other mark becomes a space ("black/white"), or nothing
    where the text has it beside a space ("yes, no") or has a comma between two digits ("1,000").

    The rules are described at https://visualqa.org/evaluation.html; where that is silent, this follows
    https://github.com/GT-Vision-Lab/VQA (vqaEval.py).
    """
    text = " ".join(text.split())
    thousands = re.search(r"\d,\d", text) is not None
    marks = PUNCTUATION.intersection(text)
    dropped = {mark for mark in marks if thousands or f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(mark): "" if mark in dropped else " " for mark in marks})
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Training targets of a question: each normalised answer, in the order given, and min(n / 3, 1), where n of the
    annotators gave it; 1 with fewer than three annotators.

    Unlike `score_answers` it takes no mean over subsets of the annotators.

    Raises:
        ValueError: there are no answers, or `answers` is one string.
    """
    _check_answers(answers)
    counts = Counter(map(normalize_answer, answers))
    return {answer: min(n / 3, 1.0) if len(answers) >= 3 else 1.0 for answer, n in counts.items()}


def score_answers(
    predictions: Sequence[str], references: Sequence[Sequence[str]], question_types: Sequence[str] | None = None
) -> dict:
    """Score answers as the metric does: `{"accuracy", "questions", "by_type": {type: {"questions", "accuracy"}}}`.

    A question's accuracy is the mean of min(n / 3, 1) over the subsets that leave one annotator out, where n annotators
    of the subset gave the predicted answer. Of ten annotators, 1, 2, 3 and 4 who agree give 0.3, 0.6, 0.9 and 1. Three
    annotators thus give at most 2/3. With fewer than three, an answer that one of them gave counts as 1.

    Predictions and references are always normalised. VQA v2's own code leaves the annotators' answers as they are where
    all agree, and else normalises their punctuation only, as those published have been cleaned.

    Args:
        predictions: the answer given to each question.
        references: the annotators' answers to each question.
        question_types: the type of each question. Default: `by_type` is empty.

    Raises:
        ValueError: nothing to score, a question without reference answers or with one string in place of a list, or
            predictions, references and question types differ in number.
    """
    if len(predictions) != len(references):
        raise ValueError(f"give one prediction a reference: {len(predictions)} and {len(references)}")
    if question_types is not None and len(question_types) != len(references):
        raise ValueError(f"give one question type a reference: {len(question_types)} and {len(references)}")
    if not references:
        raise ValueError("there are no answers to score")
    scores = [_accuracy(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]
    by_type: dict[str, list[float]] = {}
    if question_types is not None:
        for name, score in zip(question_types, scores, strict=True):
            by_type.setdefault(name, []).append(score)
    return {
        "accuracy": sum(scores) / len(scores),
        "questions": len(scores),
        "by_type": {
            name: {"questions": len(inside), "accuracy": sum(inside) / len(inside)} for name, inside in by_type.items()
        },
    }


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one question's answer."""
    _check_answers(answers)
    total, predicted = len(answers), normalize_answer(prediction)
    n = sum(normalize_answer(answer) == predicted for answer in answers)
    if total < 3:
        return float(n > 0)
    # Of the subsets, n leave out one that agrees.
    return (n * min(max(n - 1, 0) / 3, 1) + (total - n) * min(n / 3, 1)) / total


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise ValueError(f"give a question's answers as a list of strings, not as the string {answers!r}")
    if not answers:
        raise ValueError("a question has no reference answers: leave it out")


class VisualQuestionAnswering(evaluate.Metric):
    """`evaluate.Metric` of answered questions; see its `inputs_description`, or `score_answers`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, question_types: Sequence[str] | None = None):
        return score_answers(predictions, references, question_types)


__all__ = ["VisualQuestionAnswering", "normalize_answer", "score_answers", "soft_scores"]
