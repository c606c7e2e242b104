"""Pictures that show how a question about an image was answered: the answers, where each layer looked, and for which
words."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.relevance_maps import gradient_relevance, patch_grid, roll_up
from regard.panels import (
    LINE,
    LISTS,
    MARGIN,
    PANEL,
    draw_bars,
    draw_panel,
    draw_scale,
    fit_panel,
    heat,
    heat_colour,
    shorten,
    stack,
)
from regard.processing.image_io import open_image
from regard.processing.processing_query_conditioned_vqa import QueryConditionedVQAProcessor
from regard.visualize import INK, PAPER, confidence_colour, load_font

_COLUMNS = 5  # panels side by side, at most
_LAYER, _CHIP = 64, 22  # width of a layer's name, height of a word


def visualize(
    model: QueryConditionedVQAModel,
    processor: QueryConditionedVQAProcessor,
    image: str | Path | bytes | Image.Image,
    question: str | Sequence[str],
    top_k: int = 3,
) -> Image.Image:
    """Ask about an image and draw the answers and where the model looked; see `draw_answer`.

    Args:
        model: in evaluation mode.
        image: a path, an address, the bytes of a file or a PIL image.
        question: one, or several, which are drawn one below the other.
        top_k: answers a question, from the best.

    Returns:
        An RGB picture.

    Raises:
        ValueError: a question is empty, or the model is in training mode.
        regard.processing.image_io.ImageReadError: the image cannot be read; the message names the file.
    """
    image = open_image(image)
    results = explain(model, processor, image, [question] if isinstance(question, str) else question, top_k)
    return stack([draw_answer(image, result) for result in results])


@torch.no_grad()
def explain(
    model: QueryConditionedVQAModel,
    processor: QueryConditionedVQAProcessor,
    image: Image.Image,
    questions: Sequence[str],
    top_k: int = 3,
) -> list[dict[str, Any]]:
    """Answer questions about one image, with what `draw_answer` takes.

    Returns:
        For each question `question`, `answers` (`{"answer", "score"}`, from the best), `relevance` (layers, rows,
        columns), `rolled_up` (rows, columns), the relevance of all layers, and `gradient` (rows, columns), the same
        weighed by gradients, each a numpy array that sums to 1 over the patches; `words`, as they were asked, with the
        tokenizer's marks of start and end, and `word_attention` (layers, words).

    Raises:
        ValueError: a question is empty, or the model is in training mode.
    """
    inputs = processor(images=image.convert("RGB"), text=list(questions), return_tensors="pt").to(model.device)
    outputs = model(**inputs)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    gradients = gradient_relevance(model, image_features=outputs.image_features, **asked)
    grid = patch_grid(outputs.relevance.shape[2], *inputs["pixel_values"].shape[2:])
    maps = {"relevance": outputs.relevance, "rolled_up": roll_up(outputs.relevance), "gradient": roll_up(gradients)}
    maps = {name: values.float().unflatten(-1, grid).cpu().numpy() for name, values in maps.items()}
    config: Any = model.config
    answers = processor.post_process(
        outputs.logits, config.id2label, top_k, multi_label=config.problem_type == "multi_label_classification"
    )
    attention, real = outputs.word_attention.float().cpu().numpy(), inputs["attention_mask"].bool().cpu().numpy()
    results = []
    for index, question in enumerate(questions):
        words, by_word = join_words(processor.tokenizer, question, attention[index][:, real[index]])
        results.append(
            {
                "question": question,
                "answers": answers[index],
                **{name: values[index] for name, values in maps.items()},
                "words": words,
                "word_attention": by_word,
            }
        )
    return results


def join_words(tokenizer: Any, question: str, attention: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The words of a question, as they were asked, and attention to its tokens `(layers, tokens)` as that to its words
    `(layers, words)`, summed over the pieces of each. Marks such as `[CLS]` are words of their own."""
    encoded = tokenizer(question, truncation=True, return_offsets_mapping=True)
    numbers, offsets, tokens = encoded.word_ids(), encoded["offset_mapping"], encoded.tokens()
    words, shares = [], []
    for _, places in groupby(range(len(tokens)), lambda at: -1 - at if numbers[at] is None else numbers[at]):
        places = list(places)
        words.append(question[offsets[places[0]][0] : offsets[places[-1]][1]].strip() or tokens[places[0]])
        shares.append(attention[:, places].sum(1))
    return words, np.stack(shares, axis=1)


def draw_answer(image: Image.Image, result: Mapping[str, Any]) -> Image.Image:
    """Draw a question, its answers, the image, and on it where each layer looked, where all did, and where of that it
    spoke for the answer; below, the words by which each layer chose. All colours tell shares of the even one.

    Args:
        image: the image that was asked about, of any mode and size.
        result: of one question, from `explain`.

    Returns:
        An RGB picture.
    """
    shown, even = fit_panel(image), result["rolled_up"].size
    panels = [("Image", shown)]
    panels += [
        (f"Layer {number}", heat(shown, even * grid)) for number, grid in enumerate(result["relevance"], start=1)
    ]
    panels.append(("All layers", heat(shown, even * result["rolled_up"])))
    panels.append(("All layers, for the answer", heat(shown, even * result["gradient"])))

    columns = min(len(panels), _COLUMNS)
    width = MARGIN + columns * (PANEL + MARGIN)
    chips = [shorten(word, PANEL) for word in result["words"]]
    places, lines = _flow([load_font(14).getlength(chip) + 12 for chip in chips], width - 2 * MARGIN - _LAYER)
    head = 2 * LINE + max((len(result["answers"]) + 1) * (LINE + 2), 3 * LINE) + MARGIN
    step = shown.height + LINE + MARGIN
    words_top = MARGIN + head + -(-len(panels) // columns) * step
    block = lines * (_CHIP + 4) + 8  # a layer's words
    page = Image.new("RGB", (width, words_top + LINE + 4 + len(result["word_attention"]) * block + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)

    question = shorten(result["question"], width - 2 * MARGIN, 18)
    draw.text((MARGIN, MARGIN + LINE // 2), question, font=load_font(18), fill=INK, anchor="lm")
    answers = [(entry["answer"], entry["score"], confidence_colour(entry["score"])) for entry in result["answers"]]
    draw_bars(draw, (MARGIN, MARGIN + 2 * LINE), "Answers", answers, width=2 * PANEL + MARGIN)
    draw_scale(draw, (width - MARGIN - LISTS, MARGIN + 2 * LINE), "Share of a place, or of a word")
    for index, (title, panel) in enumerate(panels):
        row, column = divmod(index, columns)
        draw_panel(page, (MARGIN + column * (PANEL + MARGIN), MARGIN + head + row * step), title, panel)
    draw.text((MARGIN, words_top + LINE // 2), "Words that each layer chose", font=load_font(14), fill=INK, anchor="lm")
    for layer, shares in enumerate(result["word_attention"]):
        top = words_top + LINE + 4 + layer * block
        draw.text((MARGIN, top + _CHIP // 2), f"Layer {layer + 1}", font=load_font(13), fill=INK, anchor="lm")
        colours = heat_colour(len(chips) * shares).astype(int)
        for chip, colour, (x, line, length) in zip(chips, colours, places, strict=True):
            left, upper = MARGIN + _LAYER + x, top + line * (_CHIP + 4)
            draw.rounded_rectangle((left, upper, left + length, upper + _CHIP), 4, fill=tuple(colour.tolist()))
            ink = PAPER if colour @ (0.299, 0.587, 0.114) < 140 else INK
            middle = left + length / 2, upper + _CHIP // 2
            draw.text(middle, chip, font=load_font(14), fill=ink, anchor="mm")
    return page


def _flow(lengths: Sequence[float], width: float) -> tuple[list[tuple[float, int, float]], int]:
    """Where things of these lengths stand, one after the other in lines of a width: (x, line, length) of each; and the
    number of lines."""
    places, x, line = [], 0.0, 0
    for length in lengths:
        if x and x + length > width:
            x, line = 0.0, line + 1
        places.append((x, line, length))
        x += length + 4
    return places, line + 1


__all__ = ["draw_answer", "explain", "join_words", "visualize"]
