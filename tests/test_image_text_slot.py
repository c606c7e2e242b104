"""ImageTextSlot's own promises: gaze, lazily computed slots, targets, losses."""

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from regard.configuration.configuration_image_text_slot import PRESETS, SECOND_LOOK, ImageTextSlotConfig
from regard.modeling.image_text_slot_counter import CellCounts
from regard.modeling.image_text_slot_second_look import (
    MOST_DOUBTS,
    Look,
    _sureness,
    false_sightings,
    second_look_features,
    second_thoughts,
    seen_tokens,
    splice,
)
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel, MemoryGrid


def tiny(**changes) -> Any:
    torch.manual_seed(0)
    return ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny", **changes)).eval()


def uncropped(**changes) -> Any:
    """A model that reads whole images, as `forward` does."""
    return tiny(encoder_config={**PRESETS["tiny"]["encoder_config"], "crop_margin": None}, **changes)


def test_gaze_leads_each_slot_to_its_cell():
    model = tiny()
    coordinates = torch.tensor([[1.0, 2.0, 3.5, 0.5]])  # the third cell holds two characters, the fourth none
    occupancy = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    bias, distance = model._gaze(coordinates, occupancy, torch.tensor([[6.0]]), torch.arange(8))
    assert bias[0].argmax(-1).tolist() == [4, 0, 1, 2, 2, 5, 5, 5]  # memory: four cells, start, end
    first, second = distance[0, 3], distance[0, 4]  # in one cell: the slot is told which of the two it is
    torch.testing.assert_close(first[:3], -second[:3], rtol=0, atol=0.05)
    assert first[1] == pytest.approx(math.sin(-0.5 * math.pi), abs=0.05)


def in_doubt(*weights: float) -> Any:
    """A model whose counter is in doubt here and there, with the weights of a second look or none."""
    second_look = dict(zip(SECOND_LOOK, weights, strict=True)) if weights else None
    counter = {**PRESETS["tiny"]["counter_config"], "second_look": second_look}
    model = uncropped(counter_config=counter)
    model.counter.presence.bias.data.fill_(-9.0)
    model.counter.presence.weight.data.mul_(3)
    return model


@torch.no_grad()
def test_a_second_look_changes_the_numbers_that_it_is_weighed_to_change():
    pixel_values = torch.randn(3, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    model = in_doubt()
    first = model.read(pixel_values)
    look, other = model.looks(pixel_values, 64, twice=True)
    assert other is not None
    change = second_thoughts(look.doubts)
    assert change.abs().sum(1).min() > 0
    assert torch.equal(other.numbers, (look.numbers + change).clamp(min=0))
    never, always = (in_doubt(0, 0, 0, 0, 0, 0, bias).read(pixel_values) for bias in (-1, 1))
    for a, b in zip(first.sequences, never.sequences, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(always.count_pred, other.count)
    assert not torch.equal(other.count, look.count)
    spliced = splice(look, other, look.numbers != other.numbers)
    for a, b in zip(always.sequences, spliced.tokens, strict=True):
        assert torch.equal(a, b[: len(a)])
    weighing = in_doubt(1.0, 1.0, -1.0, 2.0, -2.0, 0.5, 2.0)
    whole = weighing.read(pixel_values).sequences
    for index, sequence in enumerate(whole):
        assert torch.equal(weighing.read(pixel_values[index : index + 1]).sequences[0], sequence)
    for limit in (2, 5, 9):
        for a, b in zip(weighing.read(pixel_values, max_slots=limit).sequences, whole, strict=True):
            assert torch.equal(a[: limit - 1], b[: limit - 1])


def test_a_second_look_needs_all_its_weights():
    counter = {**PRESETS["tiny"]["counter_config"], "second_look": {"bias": 1.0, "size": 2.0}}
    with pytest.raises(StrictDataclassClassValidationError, match="second_look has weights of bias, size, but needs"):
        uncropped(counter_config=counter)


def test_what_is_looked_at_again():
    doubts = torch.tensor([[0.2, 0.3, -0.3, 0.0, -0.8]])
    assert second_thoughts(doubts).tolist() == [[0, 1, -1, 0, 0]]
    few, many = (torch.full((1, number), 0.4) for number in (MOST_DOUBTS, MOST_DOUBTS + 1))
    assert second_thoughts(few).all()
    assert not second_thoughts(many).any()  # too small to read


def look_of(numbers: list[float], tokens: list[int], doubts: list[float] | None = None) -> Look:
    """A look at one image; what each slot read tells its box and score too."""
    read = torch.tensor([tokens])
    return Look(
        count=torch.tensor([[sum(numbers) + 2]]),
        numbers=torch.tensor([numbers]),
        doubts=torch.tensor([doubts or [0.0] * len(numbers)]),
        tokens=read,
        scores=read / 100,
        boxes=(read / 100)[..., None].expand(-1, -1, 4),
        voids=read / 1000,
    )


def test_what_a_second_look_goes_by():
    first = look_of([1.0, 2.0, 0.0, 1.0], [1, 9, 9, 8, 8, 2], [-0.25] * 4)
    total, repeats, void = _sureness(first)
    surety = first.scores.log()[0]
    torch.testing.assert_close(total[0], torch.stack((surety[1], surety[2] + surety[3], surety[0] * 0, surety[4])))
    assert repeats[0].tolist() == [1, 2, 0, 1]  # 9 twice over the first gap, 8 over the next
    torch.testing.assert_close(void, torch.tensor([[0.009, 0.009, 0.0, 0.008]]))
    second = look_of([1.0, 1.0, 1.0, 1.0], [1, 9, 9, 7, 8, 2])
    features = second_look_features(first, second)[0]
    assert features[:, 0].tolist() == pytest.approx([math.log(0.25 / 0.75)] * 4)
    torch.testing.assert_close(features[:, 1], _sureness(second)[0][0] - total[0])
    assert features[:, 2].tolist() == [0, -1, 0, -1]
    torch.testing.assert_close(features[:, 3], torch.tensor([0.009, 0.009, 0.001, 0.008]).logit())
    torch.testing.assert_close(features[:, 4], torch.tensor([0.009, 0.009, 0.007, 0.008]).logit())
    assert features[:, 5].tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ((False, False, False), [1, 11, 12, 13, 14, 15, 2]),
        ((True, True, True), [1, 21, 22, 24, 2]),
        ((True, False, False), [1, 21, 13, 14, 15, 2]),  # one character less in front
        ((False, True, False), [1, 11, 12, 22, 15, 2]),  # one less in the middle
        ((False, False, True), [1, 11, 12, 13, 14, 24, 2]),  # of as many characters other ones
    ],
)
def test_readings_are_spliced_by_groups(chosen: tuple[bool, ...], expected: list[int]):
    first = look_of([2.0, 2.0, 1.0, 0.0], [1, 11, 12, 13, 14, 15, 2, 0, 0, 0])
    second = look_of([1.0, 1.0, 1.0, 0.0], [1, 21, 22, 24, 2, 0, 0])
    look = splice(first, second, torch.tensor([[*chosen, False]]))
    assert look.count.item() == len(expected)
    assert look.tokens[0, : len(expected)].tolist() == expected
    assert look.tokens.shape[1] >= len(expected) + 2  # an end read a little later is seen
    torch.testing.assert_close(look.scores, look.tokens / 100)
    torch.testing.assert_close(look.boxes[..., 3], look.scores)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["tiny", "as_described"])
def test_needed_slots_equal_all_slots(preset):
    """`read` computes few slots; the same cut out of all of them must be equal."""
    torch.manual_seed(0)
    model: Any = ImageTextSlotModel(ImageTextSlotConfig.from_preset(preset)).eval()
    model.config.encoder_config.crop_margin = None
    if preset == "tiny":
        model.counter.presence.bias.fill_(-4.0)  # nearly all cells are empty
    pixel_values = torch.randn(3, 1, 128, 128)
    whole = model(pixel_values)
    assert whole.logits.shape == (3, model.config.num_slots, model.config.vocab_size)
    reading = model.read(pixel_values)
    for index, (tokens, scores) in enumerate(zip(reading.sequences, reading.scores, strict=True)):
        assert 2 <= len(tokens) < model.config.num_slots
        probabilities = whole.logits[index, : len(tokens)].softmax(-1)
        assert torch.equal(tokens, probabilities.argmax(-1))
        torch.testing.assert_close(scores, probabilities.amax(-1))
    if preset == "as_described":
        torch.testing.assert_close(reading.count_pred, whole.count_pred)
    else:  # made whole
        assert torch.equal(reading.count_pred, reading.count_pred.round())


@torch.no_grad()
def test_slots_past_the_text_change_nothing():
    model = tiny()
    radius, steps = model.config.slot_config.mixing_radius, model.config.slot_config.num_decoder_steps
    memory, grid = model.encode(torch.randn(2, 1, 64, 64))
    occupancy = torch.rand(2, memory.shape[1])
    gaze = (occupancy.cumsum(1) + 0.5, occupancy, occupancy.sum(1, keepdim=True) + 2)
    states = model._memory_states(memory, grid)
    few, _ = model._decode(states, torch.arange(10 + radius * steps)[None], gaze)
    many, _ = model._decode(states, torch.arange(64)[None], gaze)
    torch.testing.assert_close(few[:, :10], many[:, :10])
    part, _ = model._decode(states, torch.arange(20, 50)[None], gaze)  # a window: it misses those beyond its edges
    edge = radius * steps
    torch.testing.assert_close(part[:, edge:-edge], many[:, 20 + edge : 50 - edge])


@torch.no_grad()
def test_slots_that_find_no_character_are_left_out():
    model = uncropped()
    model.counter.presence.bias.fill_(-3.0)
    pixel_values = torch.randn(2, 1, 128, 128)
    before = model.read(pixel_values)
    token = before.sequences[0][1].item()
    assert token > 2
    weight, bias = model.classifier.weight, model.classifier.bias
    weight[[model.config.pad_token_id, token]] = weight[[token, model.config.pad_token_id]]
    bias[[model.config.pad_token_id, token]] = bias[[token, model.config.pad_token_id]]
    after = model.read(pixel_values)
    for index, tokens in enumerate(before.sequences):
        there = tokens != token
        assert torch.equal(after.sequences[index], tokens[there])
        torch.testing.assert_close(after.boxes[index], before.boxes[index][there], equal_nan=True)
        assert after.count_pred[index] == before.count_pred[index] - (~there).sum()


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

    def loss(logits: torch.Tensor, window: range) -> float:
        total, number = model._slot_loss(logits, labels, window)
        return (total / number).item()

    assert loss(logits, range(6)) == pytest.approx(expected.item(), rel=1e-5)
    model.config.pad_slots = 0
    assert loss(logits, range(6)) == pytest.approx(each[:3].mean().item(), rel=1e-5)
    model.config.pad_slots = 2
    part = (each[2] + 0.5 * each[3:5].sum()) / 2
    assert loss(logits[:, 2:5], range(2, 5)) == pytest.approx(part.item(), rel=1e-5)


def test_training_may_compute_some_slots_only():
    model = tiny(training_slots=3)
    inputs = {"pixel_values": torch.randn(1, 1, 64, 64), "labels": torch.tensor([[1, 7, 8, 9, 10, 11, 2]])}
    assert model(**inputs).logits.shape == (1, 7, 512)
    assert model.train()(**inputs).logits.shape == (1, 3, 512)
    starts = {model._window(inputs["labels"]).start for _ in range(100)}
    assert starts == set(range(5))
    padded = nn.functional.pad(inputs["labels"], (0, 9), value=-100)
    assert {model._window(padded).start for _ in range(100)} == set(range(5))
    model.config.training_slots = 7
    assert model._window(inputs["labels"]) == range(7)


def positions(*cells: tuple[float, float]) -> torch.Tensor:
    """Start, characters at (x, y) on level lines, end."""
    return torch.tensor([[[-1.0] * 3, *[[x, y, y] for x, y in cells], [-1.0] * 3]])


def test_targets_of_the_cells():
    model = tiny()
    labels = torch.tensor([[1, 10, 11, 12, 2]])
    targets = model._cell_targets(positions((0.1, 0.1), (0.12, 0.1), (0.9, 0.6)), labels, MemoryGrid(4, 4))
    assert targets["frames"].nonzero().tolist() == [[0, 0, 0], [0, 2, 7]]  # two in one frame are one
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
    targets = model._cell_targets(positions((0.2, 0.1), (0.9, 0.1)), labels, MemoryGrid(4, 4))
    mask = torch.ones(1, 4)
    presence = torch.zeros(1, 4, 8)
    presence[0, 0, [1, 7]] = 0.9

    def teach(predicted):
        return model._teach(targets, mask, CellCounts(predicted.logit(1e-6), torch.zeros(1, 16)))

    model.config.teacher_forcing = 1.0
    coordinates, counts, count, _ = teach(presence)
    assert torch.equal(coordinates, targets["coordinates"])
    assert count.item() == 4
    model.config.teacher_forcing = 0.0
    model.config.false_sightings = 0
    coordinates, counts, count, seen = teach(presence)
    assert seen is None
    torch.testing.assert_close(counts, targets["counts"], atol=1e-3, rtol=0)
    assert count.item() == 4
    presence[0, 0, [1, 2]] = 0.45  # on the edge between two cells
    _, counts, *_ = teach(presence)
    assert not torch.allclose(counts, targets["counts"], atol=1e-3)
    coordinates, counts, count, _ = teach(torch.ones(1, 4, 8))  # one that is far off would teach slots to guess
    assert torch.equal(counts, targets["counts"])
    assert count.item() == 4


def test_what_slots_see_that_are_sent_to_characters_that_are_not_there():
    numbers = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0]])
    for groups, expected in (
        ([], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([0], [0, 1, -1, 2, 3, 4, 5, 6, 7]),  # the second of two in one's place
        ([1], [0, 1, -1, 2, 3, 4, 5, 6, 7]),
        ([2], [0, 1, 2, -1, 3, 4, 5, 6, 7]),  # the one in the middle
        ([1, 3], [0, 1, -1, 2, 3, 4, -1, 5, 6]),
        ([4], [0, 1, 2, 3, 4, -1, 5, 6, 7]),
    ):
        change = torch.zeros(1, 5)
        change[0, groups] = 1
        assert seen_tokens(numbers, change, 9).tolist() == [expected]
    labels = torch.tensor([[1, 10, 11, 12, 13, 2]])
    seen = torch.tensor([[0, 1, -1, 2, 3, 4, 5, 6]])
    assert ImageTextSlotModel._labels_seen(labels, seen, 0).tolist() == [[1, 10, 0, 11, 12, 13, 2, -100]]
    assert ImageTextSlotModel._labels_seen(labels, seen, -1).tolist() == [[1, 10, -1, 11, 12, 13, 2, -100]]


def test_false_sightings_are_where_more_was_expected_and_now_and_then_elsewhere():
    torch.manual_seed(0)
    numbers = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(2000, -1)
    doubts = torch.tensor([[0.3, -0.3, 0.3, 0.0]]).expand(2000, -1)
    share = false_sightings(numbers, doubts).mean(0)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.5, 0.0]), atol=0.05, rtol=0)


def test_teacher_forcing_sends_some_slots_to_characters_that_are_not_there():
    torch.manual_seed(0)
    model = tiny().train()
    model.config.teacher_forcing, model.config.false_sightings = 0.0, 1.0
    targets = model._cell_targets(positions((0.2, 0.1), (0.9, 0.1)), torch.tensor([[1, 10, 11, 2]]), MemoryGrid(4, 4))
    presence = torch.zeros(1, 4, 8)
    presence[0, 0, [1, 4, 7]] = torch.tensor([0.9, 0.3, 0.9])
    lines = CellCounts(presence.logit(1e-6), torch.zeros(1, 16))
    seen = set()
    for _ in range(20):
        _, held, count, tokens = model._teach(targets, torch.ones(1, 4), lines)
        if tokens is None:
            continue
        void = (tokens == -1).sum().item()
        assert count.item() == 4 + void == tokens.shape[1]
        assert held.sum().item() == pytest.approx(2 + void, abs=0.01)
        seen.add(tuple(tokens[0].tolist()))
    assert (0, 1, -1, 2, 3) in seen


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
        ({"training_slots": 0}, "training_slots=0"),
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
