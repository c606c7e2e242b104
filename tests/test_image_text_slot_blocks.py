"""ImageTextSlot reads long texts block by block, and what is looked at again window by window: nothing else is read."""

from typing import Any

import pytest
import torch

from regard.configuration.configuration_image_text_slot import PRESETS, ImageTextSlotConfig
from regard.modeling import modeling_image_text_slot
from regard.modeling.image_text_slot_blocks import near_cells, number_of_blocks, with_neighbours
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel

SLOTS = 1024


def verbose(bias: float = -2.0, **changes) -> Any:
    """A model that finds some hundred characters in any image; fewer with another bias."""
    torch.manual_seed(0)
    config = ImageTextSlotConfig.from_preset("tiny", num_slots=SLOTS, **changes)
    model = ImageTextSlotModel(config).eval()
    model.counter.presence.bias.data.fill_(bias)
    return model


def pixels(images: int) -> torch.Tensor:
    return torch.randn(images, 1, 128, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("slots", "radius", "limit", "blocks"),
    [(63, 8, 1024, 1), (64, 8, 1024, 2), (416, 8, 1024, 13), (1024, 8, 1024, 32), (99, 48, 1024, 2), (65, 2, 65, 1)],
)
def test_blocks_are_large_enough_and_do_not_exceed_the_slots(slots, radius, limit, blocks):
    assert number_of_blocks(slots, radius, limit) == blocks


def test_each_window_is_given_the_cells_near_its_slots():
    coordinates = torch.tensor([[0.5, 9.0, 10.0, 17.9, 40.0, 26.5]]).expand(2, -1)
    held = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 18.0]]).expand(2, -1)  # the last holds 18 tokens, from 18 to 35
    near = near_cells(coordinates, held, torch.tensor([10, 36]), 4, sharpness=4.0)
    assert sorted(near[0].tolist()) == [1, 2]  # slots 10 to 13, and 4 further none is seen
    assert sorted(near[1].tolist()) == [4, 5]  # slots 36 to 39
    assert near_cells(coordinates, held, torch.tensor([10, 36]), 4, sharpness=1.0).shape[1] == 4  # 8 further


def test_blocks_see_the_slots_beside_them_in_their_own_text():
    slots = torch.arange(12.0).view(6, 2, 1)  # two texts of three blocks of two slots
    seen = with_neighbours(slots, 3, 1, beyond=-1)
    assert seen[..., 0].tolist() == [
        [-1, 0, 1, 2],
        [1, 2, 3, 4],
        [3, 4, 5, -1],
        [-1, 6, 7, 8],
        [7, 8, 9, 10],
        [9, 10, 11, -1],
    ]
    assert with_neighbours(slots, 1, 1) is slots


@torch.no_grad()
@pytest.mark.parametrize("bias", [-2.0, -4.0])
@pytest.mark.parametrize("radius", [0, 2, 9])
def test_needed_slots_read_what_all_slots_together_read(radius, bias):
    model = verbose(bias, slot_config={**PRESETS["tiny"]["slot_config"], "mixing_radius": radius})
    whole = model(pixels(3)).logits.softmax(-1)
    look, _ = model.looks(pixels(3), SLOTS, twice=False)
    for index, count in enumerate(look.count.flatten().int().tolist()):
        assert 64 < count < SLOTS if bias == -2 else 2 < count < 40  # in blocks, or together
        probabilities = whole[index, :count]
        assert torch.equal(look.tokens[index, :count], probabilities.argmax(-1))
        torch.testing.assert_close(look.scores[index, :count], probabilities.amax(-1))


@torch.no_grad()
@pytest.mark.parametrize("crop_margin", [6, None])
def test_blocks_see_the_same_places(monkeypatch, crop_margin):
    model = verbose()
    model.config.encoder_config.crop_margin = crop_margin
    images = pixels(2)
    images[0, :, :, 64:] = 0  # the second half of the first image is left out, so the images are not read together
    blocks = model.read(images)
    monkeypatch.setattr(modeling_image_text_slot, "number_of_blocks", lambda *_: 1)
    whole = model.read(images)
    for ours, theirs in zip(blocks.boxes, whole.boxes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("doubts", [3, 100])
def test_a_second_look_at_windows_sees_what_one_at_everything_sees(monkeypatch, doubts):
    def change(expected: torch.Tensor) -> torch.Tensor:
        doubtful = expected.abs() > 0.1
        return expected.sign() * (doubtful & (doubtful.cumsum(1) % 5 == 0) & (doubtful.cumsum(1) <= 5 * doubts))

    model = verbose()
    monkeypatch.setattr(modeling_image_text_slot, "second_thoughts", change)
    windows, see = [], model._see
    monkeypatch.setattr(model, "_see", lambda *inputs, **options: windows.append(inputs[1]) or see(*inputs, **options))
    first, second = model.looks(pixels(2), SLOTS, twice=True)
    changed = first.numbers != second.numbers
    memory, grid = model.encode(pixels(2))
    cells = model._count(memory, grid)[1]
    gaze = model.counter.gaze(cells.logits.sigmoid(), cells.line_offset, change(first.doubts))
    assert torch.equal(second.count, gaze.count)
    assert len(windows) == 2  # first look and second
    if doubts == 3:
        assert len(windows[1]) == changed.sum() == 6
        assert windows[1].numel() < second.tokens.numel()
    else:  # so many windows that it is less to look at everything
        assert windows[1].numel() >= gaze.count.sum()
    everything = model._look(model._memory_states(memory, grid), grid, gaze.count, gaze, SLOTS)
    ends = second.numbers.cumsum(1).long()
    seen = (second.tokens, second.scores, second.boxes, second.voids)
    for image, group in changed.nonzero().tolist():
        last = ends[image, group]
        part = slice(last - int(second.numbers[image, group]), last + 2)  # and a character on either side
        for ours, theirs in zip(seen, everything, strict=True):
            torch.testing.assert_close(ours[image, part], theirs[image, part], rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("lines", [16, 4])
def test_where_a_block_sees_most_cells_there_are_no_blocks(monkeypatch, lines):
    model = verbose()
    memory, grid = model.encode(pixels(2))
    numbers = torch.zeros(2, grid.rows, 2 * grid.columns)  # 16 rows of 64 frames
    numbers[:, :lines, :: lines // 4 + 1] = 0.9  # the paper below the last line counts to it
    gaze = model.counter.gaze(numbers, torch.zeros(2, grid.rows * grid.columns))
    assert gaze.count.min() > 64
    seen, see = [], model._see
    monkeypatch.setattr(model, "_see", lambda *inputs, **options: seen.append(inputs[1]) or see(*inputs, **options))
    states = model._memory_states(memory, grid)
    look = model._look(states, grid, gaze.count, gaze, SLOTS)
    assert (len(seen[0]) > 1) == (lines == 16)
    monkeypatch.setattr(modeling_image_text_slot, "number_of_blocks", lambda *_: 1)
    for ours, theirs in zip(look, model._look(states, grid, gaze.count, gaze, SLOTS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
