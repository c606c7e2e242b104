"""Processor of ImageTextSlot: images, texts and character boxes -> tensors, and a model's reading -> text with places.

Unusual here: `character_positions` tells the model where each token stands in its square and where its text line
crosses the middle of it, which orders tilted lines; `post_process` merges bytes into characters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from regard.processing.tokenization_byte import BYTE_OFFSET

IGNORE_INDEX = -100


class ImageTextSlotProcessor(ProcessorMixin):
    """Joins `ImageTextSlotImageProcessor` and the byte tokenizer of `build_byte_tokenizer`."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "labels", "attention_mask", "character_positions"]

    def __call__(self, images=None, text=None, boxes=None, max_length=None, return_tensors=None, **images_kwargs):
        """Prepare a batch.

        Args:
            images: anything that `ImageTextSlotImageProcessor` takes, one or many.
            text: a string, or one for each image; lines are separated by "\\n".
            boxes: for each text, one `[x0, y0, x1, y1]` a character, in pixels of the image before resizing, or None
                where unknown. Needs `images` and `text`.
            max_length: pad and cut labels to this many tokens; default: pad to the longest of the batch. Never more
                than the tokenizer's `model_max_length` (1,024). A cut text still ends in `<|im_end|>`.
            return_tensors: "pt" or "np"; default: numpy arrays.
            images_kwargs: passed to the image processor.

        Returns:
            BatchFeature with `pixel_values` (batch, 1, 128, 128) for images, and for texts
            `labels` (batch, tokens) int64, -100 behind the end, `attention_mask` (batch, tokens) int64, and
            `character_positions` (batch, tokens, 3) float32: x and y of the character's centre, and y at which the line
            through its text line crosses the horizontal middle, all in [0, 1] of the square the model sees; -1 for
            start, end and padding, and for texts without boxes.

        Raises:
            ValueError: nothing was given, the numbers of images, texts and boxes differ, or UTF-8 cannot hold a text.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        if boxes is not None and (images is None or text is None):
            raise ValueError("boxes need both images, for their size, and text")
        data, sides = {}, None
        if images is not None:
            images = self.image_processor.to_grey_images(images, images_kwargs.pop("input_data_format", None))
            data |= self.image_processor(images, **images_kwargs)
            sides = [max(image.size) for image in images]
        if text is not None:
            data |= self._encode_texts(text, boxes, sides, max_length)
        return BatchFeature(data, tensor_type=return_tensors)

    def _encode_texts(self, text, boxes, sides, max_length) -> dict[str, np.ndarray]:
        if isinstance(text, str):
            text, boxes = [text], None if boxes is None else [boxes]
        for name, values in (("images", sides), ("boxes", boxes)):
            if values is not None and len(values) != len(text):
                raise ValueError(f"{len(text)} texts, but {len(values)} {name}: give one of each for every image")
        limit = min(max_length or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        if limit < 2:
            raise ValueError(f"max_length must leave room for the start and end tokens, but is {limit}")
        contents = [_encode(sample, index)[: limit - 2] for index, sample in enumerate(text)]
        length = limit if max_length else 2 + max((len(content) for content in contents), default=0)

        labels = np.full((len(text), length), IGNORE_INDEX, dtype=np.int64)
        positions = np.full((len(text), length, 3), -1, dtype=np.float32)
        for row, content in enumerate(contents):
            end = 1 + len(content)
            labels[row, 0], labels[row, end] = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            labels[row, 1:end] = content
            if boxes is not None and boxes[row] is not None:
                positions[row, 1:end] = _token_positions(text[row], boxes[row], sides[row], row)[: len(content)]
        attention_mask = (labels != IGNORE_INDEX).astype(np.int64)
        return {"labels": labels, "attention_mask": attention_mask, "character_positions": positions}

    def post_process(self, reading, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Turn a model's reading into text with a confidence and a place for each character.

        Args:
            reading: `ImageTextSlotReading` of `ImageTextSlotModel.read`.
            image_sizes: (height, width) in pixels of each image as it was given.

        Returns:
            One dict an image: `text`; `score` in [0, 1], the geometric mean of the characters' scores (of an empty
            text: the end token's); `characters`, a list of `{"character", "score", "box"}`, in order, whose characters
            joined are `text`. A character's score is the product of its bytes' scores, its box `[x0, y0, x1, y1]` the
            union of the regions its bytes were read from, in pixels of the given image. Bytes that are no UTF-8 read as
            U+FFFD; tokens that stand for no byte are left out, and so is a newline after the last line.
        """
        if len(image_sizes) != len(reading.sequences):
            raise ValueError(
                f"{len(reading.sequences)} readings, but {len(image_sizes)} image sizes: give one for each"
            )
        return [
            _read_characters(*(np.asarray(part.detach().float().cpu()) for part in parts), tuple(size))
            for *parts, size in zip(reading.sequences, reading.scores, reading.boxes, image_sizes, strict=True)
        ]


def _encode(text: str, index: int) -> np.ndarray:
    """Token ids of a text, without start and end: equal to the tokenizer's, without its per-call cost."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text {index} holds {text[error.start]!r}, which UTF-8 cannot hold; remove it") from error
    return np.frombuffer(data, dtype=np.uint8).astype(np.int64) + BYTE_OFFSET


def _token_positions(text: str, boxes, side: int, index: int) -> np.ndarray:
    """Positions (bytes, 3) of a text's tokens: x centre, y centre, line centre, as shares of `side`, in [0, 1].

    The lines of one image are parallel: their common slope is the least-squares slope over all centres, each taken
    from its own line's mean; 0 where no line has two centres of different x.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / side
    if len(boxes) != len(text):
        raise ValueError(f"text {index} has {len(text)} characters, but {len(boxes)} boxes: give one for each")
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    if len(codes) == 0:
        return np.empty((0, 3), dtype=np.float32)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    newline = codes == ord("\n")
    line = np.cumsum(newline) - newline  # the newline belongs to the line it ends
    count = np.bincount(line)
    mean_x, mean_y = np.bincount(line, x) / count, np.bincount(line, y) / count
    from_mean = x - mean_x[line]
    spread = from_mean @ from_mean
    slope = from_mean @ (y - mean_y[line]) / spread if spread > 1e-9 else 0.0
    line_centre = mean_y + slope * (0.5 - mean_x)
    positions = np.stack([x, y, line_centre[line]], axis=1).clip(0, 1)
    bytes_each = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return positions.repeat(bytes_each, axis=0).astype(np.float32)


def _read_characters(ids: np.ndarray, scores: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """One row of `post_process`: ids and scores (tokens,), boxes (tokens, 4) in shares of the square."""
    is_byte = (ids >= BYTE_OFFSET) & (ids < BYTE_OFFSET + 256)
    data = (ids[is_byte] - BYTE_OFFSET).astype(np.uint8).tobytes()
    byte_scores = scores[is_byte].astype(np.float64)
    height, width = size
    boxes = (boxes[is_byte] * max(height, width)).clip(0, [width, height, width, height])
    names, lengths = zip(*_split_characters(data), strict=True) if data else ((), ())
    starts = np.cumsum([0, *lengths])[:-1]  # the first byte of each character
    if len(starts):
        corners = np.minimum.reduceat(boxes[:, :2], starts), np.maximum.reduceat(boxes[:, 2:], starts)
        boxes, byte_scores = np.concatenate(corners, axis=1), np.multiply.reduceat(byte_scores, starts)
    characters = [
        {"character": character, "score": score, "box": box}
        for character, score, box in zip(names, byte_scores.tolist(), boxes.tolist(), strict=True)
    ]
    if characters and characters[-1]["character"] == "\n":
        characters.pop()
    each = [character["score"] for character in characters] or scores[-1:].tolist()
    score = float(np.exp(np.mean(np.log(np.maximum(each, 1e-30))))) if each else 0.0
    return {"text": "".join(item["character"] for item in characters), "score": score, "characters": characters}


def _split_characters(data: bytes) -> list[tuple[str, int]]:
    """Each character with its number of bytes, as `data.decode("utf-8", "replace")` has them."""
    characters = []
    while data:
        try:
            valid, broken = data.decode("utf-8"), 0
        except UnicodeDecodeError as error:
            valid, broken = data[: error.start].decode("utf-8"), error.end - error.start
        sizes = [(character, len(character.encode("utf-8"))) for character in valid]
        characters += sizes + [("\ufffd", broken)] * (broken > 0)
        data = data[sum(size for _, size in sizes) + broken :]
    return characters


__all__ = ["ImageTextSlotProcessor"]
