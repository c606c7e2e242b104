"""The card of a model: `regard card FOLDER`, or `write_card` from Python.

It is made of what lies beside the weights: the figures of evaluation.json, which `regard evaluate --output` writes, and
what `regard train` leaves there. In a card that is there already only its figures are renewed.
"""

import argparse
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from regard import __version__
from regard.cli import complain, quiet_transformers
from regard.hub import CheckpointError, find_verb
from regard.info import describe
from regard.train_settings import SETTINGS_NAME
from regard_cli import EXIT_FAILED, EXIT_OK

TRAINER_STATE_NAME = "trainer_state.json"  # as in transformers.trainer, whose import takes seconds
CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
TEMPLATE = Path(__file__).with_name("card_template.md")

_FIGURES = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)


class Task(NamedTuple):
    """What a card says of all models of a verb.

    Args:
        pipeline_tag: the Hub's name of the task.
        job: what the model does.
        example: Python code that uses it, with `{name}` for its folder.
        metrics: by name in evaluation.json the Hub's name, a title and a format.
    """

    pipeline_tag: str
    job: str
    example: str
    metrics: dict[str, tuple[str, str, str]]


TASKS = {  # by verb
    "read": Task(
        "image-to-text",
        "Reads the characters of an image in one pass, and says how many there are.",
        'read = pipeline("text-recognition", model="{name}")\nprint(read("image.png")["text"])',
        {
            "character_accuracy": ("accuracy", "character accuracy", "{:.1%}"),
            "cer": ("cer", "character error rate", "{:.1%}"),
            "exact_match": ("exact_match", "exact match", "{:.1%}"),
            "count_mae": ("mae", "error of the number of characters", "{:.2f}"),
        },
    ),
    "classify": Task(
        "image-classification",
        "Says what an image shows.",
        'classify = pipeline("image-classification", model="{name}")\nprint(classify("image.png")[0])',
        {
            "top1": ("accuracy", "top-1 accuracy", "{:.1%}"),
            "top5": ("top_5_accuracy", "top-5 accuracy", "{:.1%}"),
        },
    ),
    "ask": Task(
        "visual-question-answering",
        "Answers a question about an image, and shows where it looked.",
        'ask = pipeline("visual-question-answering", model="{name}")\n'
        'print(ask(image="image.png", question="what is it?"))',
        {
            "accuracy": ("accuracy", "accuracy", "{:.2%}"),
            "pointing_accuracy": ("pointing_accuracy", "pointing accuracy", "{:.2%}"),
        },
    ),
    "count": Task(
        "object-detection",
        "Counts what you name in an image, one by one, and points at each.",
        'count = pipeline("object-counting", model="{name}")\n'
        'print(count(image="image.png", category="cats")["count"])',
        {
            "mae": ("mae", "mean absolute error", "{:.2f}"),
            "exact_match": ("exact_match", "exact match", "{:.1%}"),
            "false_stop_rate": ("false_stop_rate", "false stops a step", "{:.2%}"),
            "location_error_share": ("location_error", "points off by, of the side", "{:.2%}"),
        },
    ),
}


def run(options: argparse.Namespace) -> int:
    """Run `regard card` and return its exit code."""
    quiet_transformers()
    try:
        print(write_card(options.folder, options.license))
    except (CheckpointError, OSError, ValueError) as error:
        complain(error)
        return EXIT_FAILED
    return EXIT_OK


def write_card(folder: str | Path, license: str | None = None) -> Path:
    """Make the card of a model, or renew the figures of the one that is there.

    Of a card that is there, the metadata's `model-index` is renewed, and the text between `<!-- figures -->` and
    `<!-- end of figures -->`; all else stays as its author left it.

    Args:
        folder: with the model.
        license: its name on the Hub, such as "apache-2.0"; None leaves it open.

    Returns:
        The card's path.

    Raises:
        CheckpointError: the folder holds no model of regard.
        ValueError: evaluation.json is damaged, or the metadata of the card that is there.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: holds no model; give a folder with config.json and model.safetensors")
    verb, path = find_verb(folder), folder / CARD_NAME
    report = _read_json(folder / EVALUATION_NAME)
    results = list(evaluation_results(verb, report))
    card = ModelCard.load(path) if path.is_file() else _new_card(folder, verb)
    if license is not None:
        card.data.license = license
    card.data.eval_results = results or None
    card.data.model_name = card.data.model_name or folder.resolve().name  # a model-index needs it
    figures = figures_table(verb, report) if results else "None yet: `regard evaluate` measures.\n"
    card.text = _FIGURES.sub(lambda match: match[1] + "\n" + figures + "\n" + match[2], card.text)
    card.save(path)
    return path


def evaluation_results(verb: str, report: dict[str, Any]) -> Iterator[EvalResult]:
    """The figures of an evaluation.json as the Hub's `model-index` has them.

    Args:
        verb: what the model is for, as `regard.hub.find_verb` says.
        report: what evaluation.json holds; may be empty.
    """
    task = TASKS[verb]
    for data, values in report.get("results", {}).items():
        for name, (metric, title, _) in task.metrics.items():
            if name in values:
                yield EvalResult(
                    task_type=task.pipeline_tag,
                    dataset_type=re.sub(r"\W+", "-", data.lower()),
                    dataset_name=data,
                    dataset_split=report.get("split"),
                    dataset_args={"seed": report.get("seed")},
                    metric_type=metric,
                    metric_name=title,
                    metric_value=values[name],
                )


def figures_table(verb: str, report: dict[str, Any]) -> str:
    """The figures of an evaluation.json as a Markdown table, with the command, the date and the machine."""
    metrics = TASKS[verb].metrics
    rows = [["data", *(title for _, title, _ in metrics.values())]]
    for data, values in report["results"].items():
        rows.append(
            [data, *(form.format(values[name]) if name in values else "" for name, (*_, form) in metrics.items())]
        )
    machine = report["machine"]
    return (
        f"{_markdown(rows)}\n"
        f"`{report['command']}`, {report['date'][:10]}, split {report['split']}, seed {report['seed']}, on "
        f"{machine['device']} ({machine['processor']}); everything in [{EVALUATION_NAME}]({EVALUATION_NAME}).\n"
    )


def _new_card(folder: Path, verb: str) -> ModelCard:
    task, name = TASKS[verb], folder.resolve().name
    state, settings = _read_json(folder / TRAINER_STATE_NAME), _read_json(folder / SETTINGS_NAME)
    data = settings.get("dataset")
    tags = ["regard", json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"].replace("_", "-")]
    ended = ""
    if state:
        written = datetime.fromtimestamp((folder / TRAINER_STATE_NAME).stat().st_mtime, UTC)
        ended = f" ({state['epoch']:.2f} epochs), ended {written:%Y-%m-%d}, seed {settings.get('seed', 42)}"
        if state.get("best_model_checkpoint"):
            ended += f"; best on validation at step {state['best_global_step']}"
    return ModelCard.from_template(
        ModelCardData(library_name="regard", pipeline_tag=task.pipeline_tag, tags=tags, model_name=name),
        template_path=str(TEMPLATE),
        name=name,
        job=task.job,
        parameters=describe(folder)["parameters"],
        version=__version__,
        example=task.example.format(name=name),
        verb=verb,
        data=f"Trained on `{data}`." if data else "Trained on what `regard train` generates by default.",
        settings=yaml.safe_dump(settings, sort_keys=False).strip() if settings else "",
        steps=state.get("global_step"),
        ended=ended,
        validation=_validation_table(state.get("log_history", [])),
    )


def _validation_table(history: list[dict[str, float]], at_most: int = 12) -> str:
    """What was measured during a training, evenly thinned out."""
    entries = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    stride = -(-len(entries) // at_most) or 1
    entries = entries[::-1][::stride][::-1]  # the last one stays
    names = list(
        dict.fromkeys(
            name
            for entry in entries
            for name in entry
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
        )
    )
    if not entries:
        return ""
    rows = [["step", *(name.removeprefix("eval_") for name in names)]]
    rows += [
        [str(entry["step"]), *(f"{entry[name]:.4g}" if name in entry else "" for name in names)] for entry in entries
    ]
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---", *("--:" for _ in rows[0][1:])], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read_json(path: Path) -> dict[str, Any]:
    """A file's content; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); make it again") from error
