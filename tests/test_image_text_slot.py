"""ImageTextSlot's own promises: reading order, gaze, lazily computed slots, losses."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from regard.configuration.configuration_image_text_slot import PRESETS, ImageTextSlotConfig
from regard.modeling.modeling_image_text_slot import CellCounter, CellCounts, ImageTextSlotModel, normalize_contrast


def tiny(**changes) -> Any:
    torch.manual_seed(0)
    return ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny", **changes)).eval()


def naive_coordinates(occupancy, line_offset, rows, columns, tolerance) -> torch.Tensor:
    """For each cell, count the characters of all cells before it, one by one."""
    result = torch.zeros_like(occupancy)
    for sample in range(len(occupancy)):
        for i in range(rows * columns):
            before = 0.5
            for j in range(rows * columns):
                line_i, line_j = (k // columns + float(line_offset[sample, k]) for k in (i, j))
                if abs(line_i - line_j) <= tolerance:
                    share = 1.0 if j % columns < i % columns else 0.5 if j % columns == i % columns else 0.0
                else:
                    share = 1.0 if line_j < line_i else 0.0
                before += share * float(occupancy[sample, j])
            result[sample, i] = before
    return result


def test_coordinates_equal_a_naive_count():
    config = ImageTextSlotConfig.from_preset("tiny")
    counter = CellCounter(config, 8)
    generator = torch.Generator().manual_seed(0)
    occupancy = torch.rand(2, 24, generator=generator) * 2
    line_offset = torch.rand(2, 24, generator=generator) - 0.5
    expected = naive_coordinates(occupancy, line_offset, 4, 6, config.counter_config.line_tolerance)
    torch.testing.assert_close(counter._in_reading_order(occupancy, line_offset, 4, 6), expected)


def test_a_tilted_line_is_read_in_order():
    """Eight characters on a line that falls by two rows, and one below: raster order would mix them up."""
    counter = CellCounter(ImageTextSlotConfig.from_preset("tiny"), 8)
    rows, columns = 6, 8
    occupancy, line_offset = torch.zeros(1, rows * columns), torch.zeros(1, rows * columns)
    expected = []
    for column in range(columns):
        height = 1.5 + 2.0 * (column - 3.5) / columns  # of the tilted line here; 1.5 at the middle
        row = int(height)
        occupancy[0, row * columns + column] = 1
        line_offset[0, row * columns + column] = 1.5 - (row + 0.5) + 0.5 - 0.5
        expected.append((row * columns + column, column + 1.0))
    occupancy[0, 4 * columns] = 1
    expected.append((4 * columns, 9.0))
    coordinates = counter._in_reading_order(occupancy, line_offset, rows, columns)[0]
    for cell, coordinate in expected:
        assert float(coordinates[cell]) == pytest.approx(coordinate)


def test_a_character_between_two_cells_keeps_its_place():
    """A character of which each of two cells holds a half, side by side or one above the other, counts as one."""
    counter = CellCounter(ImageTextSlotConfig.from_preset("tiny"), 8)
    for second in (1, 4):  # the cell to the right, the cell below
        occupancy, line_offset = torch.zeros(1, 16), torch.zeros(1, 16)
        occupancy[0, 0], occupancy[0, second], occupancy[0, 3] = 0.5, 0.5, 1
        line_offset[0, 4:8] = -1  # the second row's cells belong to the first row's line
        coordinates = counter._in_reading_order(occupancy, line_offset, 4, 4)[0]
        assert float(coordinates[0]) == pytest.approx(0.75 if second == 1 else 1.0)
        assert float(coordinates[3]) == pytest.approx(2.0)


def naive_whole_numbers(numbers: list[float]) -> list[float]:
    """Groups of cells, each ended by a cell that is nearly sure, hold whole numbers."""
    result, group = [], []
    for number in [*numbers, None]:
        if number is not None:
            group.append(number)
        if number is None or (abs(number - round(number)) < 0.15 and number > 0.5):
            total = sum(group)
            result += [value * round(total) / total if total else 0.0 for value in group]
            group = []
    return result


def test_numbers_become_whole_in_groups():
    counter = CellCounter(ImageTextSlotConfig.from_preset("tiny"), 8)
    numbers = [0.02, 0.97, 0.55, 0.4, 1.05, 0.0, 0.3, 0.1, 1.9, 0.2, 0.6]
    occupancy = torch.tensor([numbers])
    soft = counter._in_reading_order(occupancy, torch.zeros(1, 11), 1, 11)
    coordinates, settled, count = counter._whole_numbers(occupancy, soft)
    expected = naive_whole_numbers(numbers)
    torch.testing.assert_close(settled, torch.tensor([expected]))
    assert count.item() == round(sum(expected)) + 2 == 8
    places = [sum(expected[:i]) + expected[i] / 2 + 0.5 for i in range(11)]
    torch.testing.assert_close(coordinates, torch.tensor([places]))


def test_whole_numbers_do_not_depend_on_the_order_of_cells():
    """The cells of the second line come first; the numbers are those of each line."""
    counter = CellCounter(ImageTextSlotConfig.from_preset("tiny"), 8)
    occupancy = torch.tensor([[1.04, 0.6, 0.5, 0.98]])
    coordinates, settled, count = counter.gaze(occupancy, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), 2, 2)
    assert count.item() == 2 + 3
    assert coordinates[0, 2:].max() < coordinates[0, :2].min()
    assert settled.sum().item() == pytest.approx(3.0)


def test_gaze_leads_each_slot_to_its_cell():
    model = tiny()
    coordinates = torch.tensor([[1.0, 2.0, 3.5, 0.5]])  # the third cell holds two characters, the fourth none
    occupancy = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    bias, distance = model._gaze(coordinates, occupancy, torch.tensor([[6.0]]), torch.arange(8))
    assert bias[0].argmax(-1).tolist() == [4, 0, 1, 2, 2, 5, 5, 5]  # memory: four cells, start, end
    first, second = distance[0, 3], distance[0, 4]  # in one cell: the slot is told which of the two it is
    torch.testing.assert_close(first[:3], -second[:3], rtol=0, atol=0.05)
    assert first[1] == pytest.approx(math.sin(-0.5 * math.pi), abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["tiny", "as_described"])
def test_needed_slots_equal_all_slots(preset):
    """`read` computes few slots; the same cut out of all of them must be equal."""
    torch.manual_seed(0)
    model: Any = ImageTextSlotModel(ImageTextSlotConfig.from_preset(preset)).eval()
    if preset == "tiny":
        model.counter.proj.bias[0] = 7.0  # nearly all cells are empty
    pixel_values = torch.randn(3, 1, 128, 128)
    whole = model(pixel_values)
    assert whole.logits.shape == (3, model.config.num_slots, model.config.vocab_size)
    reading = model.read(pixel_values)
    for index, (tokens, scores) in enumerate(zip(reading.sequences, reading.scores, strict=True)):
        assert 2 <= len(tokens) < model.config.num_slots
        probabilities = whole.logits[index, : len(tokens)].softmax(-1)
        assert torch.equal(tokens, probabilities.argmax(-1))
        torch.testing.assert_close(scores, probabilities.amax(-1))
    assert (reading.count_pred - whole.count_pred).abs().max() < 5


@torch.no_grad()
def test_slots_past_the_text_change_nothing():
    model = tiny()
    radius, steps = model.config.slot_config.mixing_radius, model.config.slot_config.num_decoder_steps
    memory, *grid = model.encode(torch.randn(2, 1, 64, 64))
    occupancy = torch.rand(2, memory.shape[1])
    gaze = (occupancy.cumsum(1) + 0.5, occupancy, occupancy.sum(1, keepdim=True) + 2)
    few, _ = model._decode(memory, grid, 10 + radius * steps, gaze)
    many, _ = model._decode(memory, grid, 64, gaze)
    torch.testing.assert_close(few[:, :10], many[:, :10])


@torch.no_grad()
def test_max_slots_limits_the_reading_only():
    model = tiny()
    pixel_values = torch.randn(2, 1, 128, 128)
    whole, cut = model.generate(pixel_values), model.generate(pixel_values, max_slots=4)
    for long, short in zip(whole, cut, strict=True):
        assert torch.equal(long[:4], short)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(pixel_values, num_beams=4)


@torch.no_grad()
def test_boxes_of_a_reading_lie_in_the_image():
    model = tiny()
    reading = model.read(torch.randn(2, 1, 128, 128))
    for tokens, boxes in zip(reading.sequences, reading.boxes, strict=True):
        real = tokens > 2
        assert boxes.shape == (len(tokens), 4)
        assert boxes[~real & (tokens != 0)].isnan().all()
        inside = boxes[real]
        assert ((inside >= 0) & (inside <= 1)).all()
        assert (inside[:, :2] < inside[:, 2:]).all()


@torch.no_grad()
def test_other_image_sizes():
    model = tiny()
    assert model(torch.randn(1, 1, 192, 256)).logits.shape == (1, 64, 512)
    with pytest.raises(ValueError, match="divisible by 16 and 8"):
        model(torch.randn(1, 1, 100, 128))
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\)"):
        model(torch.randn(1, 3, 128, 128))


def test_contrast_is_normalised_for_either_polarity():
    paper = torch.full((1, 1, 32, 32), 0.8)
    paper[..., 8:12, 8:24] = 0.3
    dark_on_light, light_on_dark = normalize_contrast(paper), normalize_contrast(1 - paper)
    torch.testing.assert_close(dark_on_light, light_on_dark)
    assert dark_on_light[..., 9, 9].item() > 0 > dark_on_light[..., 0, 0].item()
    assert normalize_contrast(torch.full((1, 1, 32, 32), 0.7)).abs().max() < 1e-3
    torch.manual_seed(0)
    model = tiny()
    with torch.no_grad():
        torch.testing.assert_close(model(paper).logits, model(1 - paper).logits, rtol=1e-4, atol=1e-4)


def test_loss_count_is_normalised_by_length_or_not():
    model = tiny()
    labels = torch.full((1, 20), 5)
    inputs = {"pixel_values": torch.randn(1, 1, 64, 64), "labels": labels}
    outputs = model(**inputs)
    error = (outputs.count_pred - 20).abs().item()
    assert outputs.loss_count.item() == pytest.approx(error / 20**0.5 - 0.5, rel=1e-4)
    model.config.counter_config.normalize_loss = False
    assert model(**inputs).loss_count.item() == pytest.approx(error - 0.5, rel=1e-4)


def test_slot_loss_ignores_padding_but_for_the_first():
    model = tiny(label_smoothing=0.0, pad_slots=2, pad_loss_weight=0.5)
    logits = torch.randn(1, 6, 512)
    labels = torch.tensor([[1, 7, 2, -100, -100, -100]])
    each = nn.functional.cross_entropy(logits[0], labels[0].clamp(min=0), reduction="none")
    expected = (each[:3].sum() + 0.5 * each[3:5].sum()) / 4
    assert model._slot_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    model.config.pad_slots = 0
    assert model._slot_loss(logits, labels).item() == pytest.approx(each[:3].mean().item(), rel=1e-5)


def positions(*cells: tuple[float, float]) -> torch.Tensor:
    """Start, characters at (x, y) on level lines, end."""
    return torch.tensor([[[-1.0] * 3, *[[x, y, y] for x, y in cells], [-1.0] * 3]])


def test_targets_of_the_cells():
    model = tiny()
    labels = torch.tensor([[1, 10, 11, 12, 2]])
    targets = model._cell_targets(positions((0.1, 0.1), (0.12, 0.1), (0.9, 0.6)), labels, [4, 4])
    assert targets["counts"].tolist() == [[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]]
    assert targets["coordinates"][0, 0] == 1.5
    assert targets["coordinates"][0, 11] == 3
    assert targets["characters"][0, 11] == 12
    assert targets["characters"][0, 0] == -100  # two characters in one cell
    assert targets["lines"][0, 11].item() == pytest.approx(0.6 * 4 - 2.5)
    assert targets["cell"].tolist() == [[-1, 0, 0, 11, -1]]


def test_positions_are_optional_and_masked():
    """A sample without positions changes nothing for the others, and alone has no position losses."""
    model = tiny()
    pixel_values = torch.randn(2, 1, 64, 64)
    labels = torch.tensor([[1, 10, 11, 12, 2], [1, 9, 8, 2, -100]])
    known = positions((0.1, 0.1), (0.12, 0.1), (0.9, 0.6))
    both = torch.cat((known, torch.full((1, 5, 3), -1.0)))
    mixed = model(pixel_values, labels=labels, character_positions=both)
    alone = model(pixel_values[:1], labels=labels[:1], character_positions=known)
    for name in ("loss_cells", "loss_lines", "loss_characters"):
        torch.testing.assert_close(mixed[name], alone[name])
    without = model(pixel_values, labels=labels)
    assert without.loss_cells is None
    assert torch.isfinite(without.loss)


def test_teacher_forcing_tells_the_true_places_or_the_predicted_ones():
    model = tiny().train()
    labels = torch.tensor([[1, 10, 11, 2]])
    targets = model._cell_targets(positions((0.1, 0.1), (0.9, 0.1)), labels, [4, 4])
    mask = torch.ones(1, 4)
    occupancy = targets["counts"] * 0.9

    def teach(predicted):
        cells = CellCounts(torch.zeros(1, 16, 4), torch.zeros(1, 16), predicted)
        return model._teach(targets, mask, cells, [4, 4])

    model.config.teacher_forcing = 1.0
    coordinates, counts, count = teach(occupancy)
    assert torch.equal(coordinates, targets["coordinates"])
    assert count.item() == 4
    model.config.teacher_forcing = 0.0
    coordinates, counts, count = teach(occupancy)
    torch.testing.assert_close(counts, targets["counts"])
    assert count.item() == 4
    shifted = occupancy.roll(1, dims=1)
    _, counts, _ = teach(occupancy * 0.5 + shifted * 0.5)
    assert not torch.equal(counts, targets["counts"])
    far = torch.ones(1, 16)  # a prediction that is far off would teach slots to guess
    coordinates, counts, count = teach(far)
    assert torch.equal(counts, targets["counts"])
    assert count.item() == 4


def test_look_loss_is_the_attention_on_the_characters_cell():
    labels = torch.tensor([[1, 10, 11, 2]])
    inputs = {
        "pixel_values": torch.randn(1, 1, 64, 64),
        "labels": labels,
        "character_positions": positions((0.1, 0.1), (0.9, 0.6)),
    }
    searching = {**PRESETS["tiny"]["slot_config"], "position_sharpness": 0}
    without = tiny(slot_config=searching)(**inputs)
    assert without.loss_look is None
    outputs = tiny(slot_config=searching, look_loss_weight=0.5)(**inputs, output_attentions=True)
    last = outputs.attentions[-1].mean(1)[0]
    rows, columns = 8, 16
    cells = [int(0.1 * rows) * columns + int(0.1 * columns), int(0.6 * rows) * columns + int(0.9 * columns)]
    expected = -(last[1, cells[0]].log() + last[2, cells[1]].log()) / 2
    assert outputs.loss_look.item() == pytest.approx(expected.item(), rel=1e-4)
    assert outputs.loss.item() == pytest.approx(without.loss.item() + 0.5 * outputs.loss_look.item(), rel=1e-4)


def test_attentions_and_hidden_states_on_request():
    model = tiny()
    model.set_attn_implementation("eager")
    outputs = model(torch.randn(1, 1, 64, 64), output_attentions=True, output_hidden_states=True)
    steps = model.config.slot_config.num_decoder_steps
    assert [tuple(a.shape) for a in outputs.attentions] == [(1, 4, 64, 8 * 16 + 2)] * steps
    assert len(outputs.hidden_states) >= steps


def test_drop_path_drops_in_training_only():
    config = ImageTextSlotConfig.from_preset("tiny")
    config.encoder_config.drop_path_rate = 0.9
    model = ImageTextSlotModel(config)
    pixel_values = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values).logits, model(pixel_values).logits)
        assert not torch.equal(model.train()(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "divisible by the encoder's stride"),
        ({"counter_config": {"source": "pooled"}}, "position_sharpness"),
        ({"encoder_config": {"depths": (1,)}}, "same number of stages"),
        ({"encoder_config": {"memory_stage": 7}}, "memory_stage=7"),
        ({"encoder_config": {"num_attention_heads": 7}}, "num_attention_heads=7"),
        ({"slot_config": {"hidden_size": 30}}, "hidden_size=30"),
        ({"slot_config": {"num_decoder_steps": 0}}, "num_decoder_steps=0"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        ImageTextSlotConfig(**changes)


def test_unknown_preset_and_too_many_labels():
    with pytest.raises(ValueError, match="choose one of 5m, as_described, tiny"):
        ImageTextSlotConfig.from_preset("5b")
    with pytest.raises(ValueError, match="65 columns"):
        tiny()(torch.randn(1, 1, 64, 64), labels=torch.ones(1, 65, dtype=torch.long))


def test_default_preset_has_its_size():
    with torch.device("meta"):
        model = ImageTextSlotModel(ImageTextSlotConfig())
    assert 4.5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 5.0e6
