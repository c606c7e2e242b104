"""Tokenizer, image processor and processor of ImageTextSlot, by themselves and through the Auto classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from regard import ImageTextSlotConfig, ImageTextSlotImageProcessor, ImageTextSlotProcessor, build_byte_tokenizer
from regard.processing.image_io import open_image
from regard.visualize import draw_reading

MEAN, STD = 0.1533, 0.3034
TOKENIZER = build_byte_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return ImageTextSlotProcessor(ImageTextSlotImageProcessor(), build_byte_tokenizer())


def grey_levels(pixel_values):
    """Undo the normalisation: `(batch, 1, side, side)` floats to 0..255."""
    return np.rint((np.asarray(pixel_values) * STD + MEAN) * 255)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class TestTokenizer:
    def test_entries(self):
        assert len(TOKENIZER) == TOKENIZER.vocab_size == 512
        assert TOKENIZER.convert_ids_to_tokens([0, 1, 2, 3]) == ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
        assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
        assert TOKENIZER.convert_ids_to_tokens(260) == "<|reserved_260|>"

    def test_known_ids(self):
        assert TOKENIZER("Aé\n").input_ids == [1, 4 + 0x41, 4 + 0xC3, 4 + 0xA9, 4 + 0x0A, 2]
        assert TOKENIZER("").input_ids == [1, 2]

    @given(st.text())
    @settings(max_examples=200, deadline=None)
    def test_any_text_survives(self, text):
        ids = TOKENIZER(text).input_ids
        assert ids == [1, *(4 + byte for byte in text.encode()), 2]
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text

    @pytest.mark.parametrize("text", ["<|im_end|>", " a <|pad|><|im_start|> b ", "<|reserved_300|>", "  \t\n "])
    def test_special_tokens_in_a_text_are_bytes(self, text):
        ids = TOKENIZER(text).input_ids
        assert min(ids[1:-1]) >= 4
        assert max(ids) < 260
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text

    def test_loads_without_a_class(self, tmp_path):
        TOKENIZER.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "naïve <|im_end|> 漢字 🙂\n"
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
        assert loaded.model_max_length == 1024


class TestImageProcessor:
    image_processor = ImageTextSlotImageProcessor()

    def test_normalisation(self):
        black_white = np.zeros((128, 128), dtype=np.uint8)
        black_white[:, 64:] = 255
        pixel_values = self.image_processor(Image.fromarray(black_white), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 1, 128, 128)
        assert pixel_values.dtype == torch.float32
        torch.testing.assert_close(pixel_values[0, 0, :, 0], torch.full((128,), -MEAN / STD))
        torch.testing.assert_close(pixel_values[0, 0, :, -1], torch.full((128,), (1 - MEAN) / STD))
        plain = self.image_processor(Image.fromarray(black_white), do_normalize=False)["pixel_values"]
        np.testing.assert_array_equal(plain[0, 0], black_white / np.float32(255))

    def test_grey_squares_are_not_resampled(self):
        pixels = noise(128, 128)
        np.testing.assert_array_equal(
            grey_levels(self.image_processor(Image.fromarray(pixels))["pixel_values"])[0, 0], pixels
        )

    @pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (1, 5000), (129, 127), (300, 200), (7, 5)])
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_any_size(self, size, mode):
        pixel_values = self.image_processor(Image.new(mode, size, "white"))["pixel_values"]
        assert pixel_values.shape == (1, 1, 128, 128)
        assert (grey_levels(pixel_values) == 255).all()

    def test_aspect_and_padding(self):
        pixels = np.full((100, 200), 40, dtype=np.uint8)
        pixels[20:80, 40:160] = 230
        square = grey_levels(self.image_processor(Image.fromarray(pixels))["pixel_values"])[0, 0]
        assert (square[64:] == 40).all(), "padded below, with the colour of the border"
        assert (square[16:48, 30:98] == 230).all()
        tall = grey_levels(self.image_processor(Image.fromarray(pixels.T.copy()))["pixel_values"])[0, 0]
        assert (tall[:, 64:] == 40).all(), "padded at the right"

    def test_small_pictures_grow_and_large_ones_are_averaged(self):
        stripes = np.tile(np.array([[0, 255]], dtype=np.uint8), (1024, 512))
        levels = grey_levels(self.image_processor(Image.fromarray(stripes))["pixel_values"])[0, 0]
        assert abs(levels[8:-8, 8:-8] - 127.5).max() < 4, "antialiased"
        quarters = np.array([[0, 255], [255, 0]], dtype=np.uint8)
        grown = grey_levels(self.image_processor(Image.fromarray(quarters))["pixel_values"])[0, 0]
        assert grown[0, 0] == grown[-1, -1] == 0
        assert grown[0, -1] == grown[-1, 0] == 255

    def test_every_kind_of_input_agrees(self, tmp_path):
        rgb = noise(60, 90, 3)
        Image.fromarray(rgb).save(tmp_path / "image.png")
        expected = self.image_processor(Image.fromarray(rgb))["pixel_values"]
        kinds = {
            "array, channels last": rgb,
            "array, channels first": rgb.transpose(2, 0, 1),
            "tensor": torch.from_numpy(rgb).permute(2, 0, 1),
            "floats in [0, 1]": torch.from_numpy(rgb).permute(2, 0, 1) / 255,
            "path": str(tmp_path / "image.png"),
            "pathlib's path": tmp_path / "image.png",
            "bytes": (tmp_path / "image.png").read_bytes(),
            "list": [Image.fromarray(rgb)],
            "nested list": [[Image.fromarray(rgb)]],
            "batch": rgb[None],
        }
        for kind, image in kinds.items():
            np.testing.assert_array_equal(self.image_processor(image)["pixel_values"], expected, err_msg=kind)
        grey = noise(60, 90)
        expected = self.image_processor(Image.fromarray(grey))["pixel_values"]
        for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
            np.testing.assert_array_equal(self.image_processor(image)["pixel_values"], expected)

    def test_a_photograph_is_turned_upright_however_it_is_given(self, tmp_path):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.fromarray(noise(60, 90)).save(tmp_path / "turned.png", exif=exif)
        expected = self.image_processor(tmp_path / "turned.png")["pixel_values"]
        with Image.open(tmp_path / "turned.png") as image:
            np.testing.assert_array_equal(self.image_processor(image)["pixel_values"], expected)
            reading = {"text": "", "score": 1.0, "characters": []}
            page = draw_reading(image, reading)
        assert page.size == draw_reading(open_image(tmp_path / "turned.png"), reading).size

    def test_channels_settled_by_name(self):
        pixels = noise(3, 40, 3)
        first = self.image_processor(pixels, input_data_format="channels_first")["pixel_values"]
        last = self.image_processor(pixels, input_data_format="channels_last")["pixel_values"]
        assert not np.array_equal(first, last)
        np.testing.assert_array_equal(last, self.image_processor(Image.fromarray(pixels))["pixel_values"])

    def test_transparency_is_white(self):
        clear = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
        assert (grey_levels(self.image_processor(clear)["pixel_values"]) == 255).all()

    def test_batch_of_different_sizes(self):
        images = [Image.fromarray(noise(128, 128)), Image.fromarray(noise(30, 300, 3)), noise(500, 20)]
        together = self.image_processor(images, return_tensors="np")["pixel_values"]
        assert together.shape == (3, 1, 128, 128)
        for image, row in zip(images, together, strict=True):
            np.testing.assert_array_equal(self.image_processor(image)["pixel_values"][0], row)

    def test_other_squares(self):
        processor = ImageTextSlotImageProcessor(size=64)
        assert processor(Image.new("L", (10, 20)))["pixel_values"].shape == (1, 1, 64, 64)
        assert self.image_processor(Image.new("L", (10, 20)), size=256)["pixel_values"].shape == (1, 1, 256, 256)

    def test_errors(self):
        image = Image.new("L", (10, 10))
        with pytest.raises(ValueError, match="must be a square"):
            self.image_processor(image, size={"height": 32, "width": 64})
        with pytest.raises(TypeError, match="do_center_crop"):
            self.image_processor(image, do_center_crop=True)
        with pytest.raises(ValueError, match="no pixels"):
            self.image_processor(Image.new("L", (0, 5)))
        with pytest.raises(ValueError, match="no images"):
            self.image_processor([])
        with pytest.raises(TypeError, match="not int"):
            self.image_processor(7)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="2 or 3 dimensions"):
            self.image_processor(np.zeros(5, dtype=np.uint8))

    def test_save_and_load(self, tmp_path):
        ImageTextSlotImageProcessor(size=96, image_mean=[0.5], image_std=0.25).save_pretrained(tmp_path)
        loaded = AutoImageProcessor.from_pretrained(tmp_path)
        assert type(loaded) is ImageTextSlotImageProcessor
        assert loaded.size.height == 96
        white = loaded(Image.new("L", (8, 8), 255))["pixel_values"]
        assert white.shape == (1, 1, 96, 96)
        np.testing.assert_allclose(white, (1 - 0.5) / 0.25, rtol=1e-5)


def rotated_page(rng, degrees, lines=5, side=128.0):
    """Characters on parallel lines of a tilted page: their boxes, and the true line centre of each."""
    text, boxes, truth = [], [], []
    angle = np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    for line in range(lines):
        x, y = rng.uniform(5, 20), 20 + line * 20 + rng.uniform(-2, 2)
        for index in range(rng.integers(3, 12)):
            width = rng.uniform(3, 9)
            centre = np.array([x + width / 2, y]) - side / 2
            x += width
            cx = centre @ [cosine, -sine] + side / 2
            cy = centre @ [sine, cosine] + side / 2
            boxes.append([cx - width / 2, cy - 6, cx + width / 2, cy + 6])
            truth.append(cy + np.tan(angle) * (side / 2 - cx))
            text.append(chr(ord("a") + index))
        text[-1] = "\n"
    return "".join(text), boxes, np.array(truth)


class TestProcessor:
    def test_images_only(self, processor):
        batch = processor(images=Image.new("L", (5, 5)), return_tensors="pt")
        assert set(batch) == {"pixel_values"}

    def test_labels(self, processor):
        batch = processor(images=[Image.new("L", (9, 9))] * 2, text=["Aé", ""], return_tensors="pt")
        assert batch["labels"].tolist() == [[1, 69, 199, 173, 2], [1, 2, -100, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
        assert batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
        assert (batch["character_positions"] == -1).all()
        assert batch["character_positions"].shape == (2, 5, 3)

    @given(st.lists(st.text(), min_size=1, max_size=4))
    @settings(max_examples=50, deadline=None)
    def test_labels_are_the_tokenizers(self, processor, texts):
        labels = processor(text=texts)["labels"]
        for text, row in zip(texts, labels, strict=True):
            assert row[row != -100].tolist() == processor.tokenizer(text, truncation=True).input_ids

    def test_lengths(self, processor):
        assert processor(text=["abc"], max_length=10)["labels"].tolist() == [[1, 101, 102, 103, 2, *[-100] * 5]]
        assert processor(text=["abc"], max_length=4)["labels"].tolist() == [[1, 101, 102, 2]]
        long = processor(text=["x" * 3000, "y"], boxes=None)["labels"]
        assert long.shape == (2, 1024)
        assert (long[0, 0], long[0, -1]) == (1, 2)
        assert processor(text=["x" * 3000], max_length=5000)["labels"].shape == (1, 1024)

    def test_positions_of_a_small_layout(self, processor):
        # 64x32 pixels: the square is 64 pixels wide, the lower half is padding
        boxes = [[0, 0, 8, 8], [8, 0, 24, 8], [24, 0, 28, 8], [0, 16, 16, 32]]
        batch = processor(images=Image.new("L", (64, 32)), text="aé\nb", boxes=boxes)
        a, e, newline, b = (
            [4 / 64, 4 / 64, 4 / 64],
            [16 / 64, 4 / 64, 4 / 64],
            [26 / 64, 4 / 64, 4 / 64],
            [8 / 64, 24 / 64, 24 / 64],
        )
        none = [-1, -1, -1]
        np.testing.assert_allclose(batch["character_positions"][0], [none, a, e, e, newline, b, none], atol=1e-6)

    @pytest.mark.parametrize("degrees", [-12, -5, 0, 3, 9])
    def test_line_centres_of_a_tilted_page(self, processor, degrees):
        text, boxes, truth = rotated_page(np.random.default_rng(abs(degrees)), degrees)
        image = Image.new("L", (128, 128))
        positions = processor(images=image, text=text, boxes=boxes)["character_positions"][0, 1:-1]
        expected = np.asarray(boxes, dtype=np.float64)
        np.testing.assert_allclose(positions[:, 0], (expected[:, 0] + expected[:, 2]) / 256, atol=1e-5)
        np.testing.assert_allclose(positions[:, 1], (expected[:, 1] + expected[:, 3]) / 256, atol=1e-5)
        np.testing.assert_allclose(positions[:, 2], truth.clip(0, 128) / 128, atol=1e-5)
        ends = [index + 1 for index, character in enumerate(text) if character == "\n"]
        assert all(len(set(line.round(5))) == 1 for line in np.split(positions[:, 2], ends) if len(line))

    def test_a_column_of_characters_has_no_slope(self, processor):
        boxes = [[10 + i, 10 * i, 18 + i, 10 * i + 8] for i in range(6)]
        positions = processor(images=Image.new("L", (128, 128)), text="\n" * 6, boxes=boxes)["character_positions"]
        np.testing.assert_allclose(positions[0, 1:-1, 2], positions[0, 1:-1, 1])

    def test_positions_do_not_depend_on_the_image_scale(self, processor):
        text, boxes, _ = rotated_page(np.random.default_rng(1), 4)
        small = processor(images=Image.new("L", (128, 100)), text=text, boxes=boxes)
        large = processor(images=Image.new("RGB", (640, 500)), text=text, boxes=np.array(boxes) * 5)
        np.testing.assert_allclose(small["character_positions"], large["character_positions"], atol=1e-6)

    def test_boxes_may_be_missing_and_labels_cut(self, processor):
        images = [Image.new("L", (128, 128))] * 2
        boxes = [None, [[i, 0, i + 1, 8] for i in range(50)]]
        batch = processor(images=images, text=["x" * 50, "é" * 50], boxes=boxes, max_length=20)
        assert (batch["character_positions"][0] == -1).all()
        assert (batch["character_positions"][1, 1:-1] >= 0).all()
        assert (batch["character_positions"][1, [0, -1]] == -1).all()

    def test_errors(self, processor):
        image = Image.new("L", (9, 9))
        with pytest.raises(ValueError, match="images, text, or both"):
            processor()
        with pytest.raises(ValueError, match="boxes need both"):
            processor(text="a", boxes=[[0, 0, 1, 1]])
        with pytest.raises(ValueError, match="2 texts, but 1 images"):
            processor(images=image, text=["a", "b"])
        with pytest.raises(ValueError, match="text 0 has 2 characters, but 1 boxes"):
            processor(images=image, text="ab", boxes=[[0, 0, 1, 1]])
        with pytest.raises(ValueError, match=r"text 1 holds .*udc80"):
            processor(text=["fine", "\udc80"])
        with pytest.raises(ValueError, match="max_length must leave room"):
            processor(text="a", max_length=1)

    def test_save_and_load(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        ImageTextSlotConfig.from_preset("tiny").save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is ImageTextSlotProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ImageTextSlotImageProcessor
        assert AutoTokenizer.from_pretrained(tmp_path)("é").input_ids == [1, 199, 173, 2]
        image, text, boxes = Image.fromarray(noise(40, 70)), "é", [[0, 0, 9, 9]]
        expected = processor(images=image, text=text, boxes=boxes, return_tensors="pt")
        actual = loaded(images=image, text=text, boxes=boxes, return_tensors="pt")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value)


def reading_of(data: bytes, scores=None, end=True):
    """A reading as the model gives it, whose byte i was seen at x = i / 100."""
    ids = [1, *(4 + byte for byte in data), *[2] * end]
    boxes = torch.full((len(ids), 4), torch.nan)
    for i in range(len(data)):
        boxes[i + 1] = torch.tensor([i / 100, 0.1, i / 100 + 0.02, 0.2])
    scores = torch.tensor([0.9, *(scores or [0.5] * len(data)), *[0.75] * end])
    return [torch.tensor(ids)], [scores], [boxes]


def read(processor, *rows, sizes):
    sequences, scores, boxes = ([part for parts in column for part in parts] for column in zip(*rows, strict=True))
    return processor.post_process(SimpleNamespace(sequences=sequences, scores=scores, boxes=boxes), sizes)


class TestPostProcess:
    def test_characters_scores_and_boxes(self, processor):
        row = reading_of("aé".encode(), [0.5, 0.8, 0.9])
        (result,) = read(processor, row, sizes=[(100, 200)])
        assert result["text"] == "aé"
        first, second = result["characters"]
        assert [first["character"], second["character"]] == ["a", "é"]
        assert first["score"] == pytest.approx(0.5)
        assert second["score"] == pytest.approx(0.72)
        assert result["score"] == pytest.approx((0.5 * 0.72) ** 0.5)
        assert first["box"] == pytest.approx([0, 20, 4, 40])
        assert second["box"] == pytest.approx([2, 20, 8, 40]), "the union of its bytes' regions, in pixels"

    @pytest.mark.parametrize(
        "data",
        [
            b"ok",
            b"\xc3",
            b"a\xff\xfeb",
            b"\xe2\x82",
            b"\xe2\x82a\xf0\x9f\x99\x82\xf0\x9f",
            "漢字\n🙂".encode(),
            b"\xed\xa0\x80",
            b"",
        ],
    )
    def test_text_is_what_the_bytes_decode_to(self, processor, data):
        (result,) = read(processor, reading_of(data), sizes=[(64, 64)])
        assert result["text"] == data.decode("utf-8", "replace")
        assert result["text"] == "".join(item["character"] for item in result["characters"])
        assert result["text"] == processor.tokenizer.decode(reading_of(data)[0][0], skip_special_tokens=True)

    def test_no_newline_ends_a_text(self, processor):
        (result,) = read(processor, reading_of(b"a\nb\n"), sizes=[(64, 64)])
        assert result["text"] == "a\nb"
        assert [item["character"] for item in result["characters"]] == ["a", "\n", "b"]

    def test_tokens_without_a_byte_are_left_out(self, processor):
        sequences, scores, boxes = reading_of(b"abc")
        sequences[0][2] = 0
        sequences[0][3] = 511
        (result,) = read(processor, (sequences, scores, boxes), sizes=[(10, 10)])
        assert result["text"] == "a"

    def test_empty_text_has_the_end_tokens_score(self, processor):
        (result,) = read(processor, reading_of(b""), sizes=[(10, 10)])
        assert result == {"text": "", "score": 0.75, "characters": []}

    def test_boxes_stay_inside_the_image(self, processor):
        sequences, scores, boxes = reading_of(b"a")
        boxes[0][1] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        (result,) = read(processor, (sequences, scores, boxes), sizes=[(30, 120)])
        assert result["characters"][0]["box"] == [0, 0, 120, 30]

    def test_rows_and_half_precision(self, processor):
        rows = [reading_of(b"one"), reading_of(b"", [], end=True), reading_of(b"three")]
        rows = [(ids, [score.bfloat16() for score in scores], boxes) for ids, scores, boxes in rows]
        results = read(processor, *rows, sizes=[(10, 10), (20, 20), (30, 30)])
        assert [result["text"] for result in results] == ["one", "", "three"]
        with pytest.raises(ValueError, match="3 readings, but 1 image sizes"):
            read(processor, *rows, sizes=[(10, 10)])

    def test_positions_and_boxes_are_inverse(self, processor):
        """A character's centre in the square, scaled back, is its centre in the image."""
        image, boxes = Image.new("L", (400, 90)), [[40, 10, 80, 60]]
        centre = processor(images=image, text="a", boxes=boxes)["character_positions"][0, 1, :2]
        sequences, scores, regions = reading_of(b"a")
        regions[0][1] = torch.from_numpy(np.concatenate([centre, centre]))
        (result,) = read(processor, (sequences, scores, regions), sizes=[(90, 400)])
        assert result["characters"][0]["box"] == pytest.approx([60, 35, 60, 35], abs=1e-3)
