"""How ImageTextSlot's counter turns frames into lines, whole numbers and reading order."""

from typing import Any

import pytest
import torch

from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
from regard.modeling.image_text_slot_counter import GAP, LEAST_BREAK, CellCounter
from regard.modeling.image_text_slot_encoder import normalize_contrast
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel


def counter(frames_per_cell: int = 2) -> Any:
    config = ImageTextSlotConfig.from_preset("tiny", counter_config={"frames_per_cell": frames_per_cell})
    torch.manual_seed(0)
    return CellCounter(config, config.encoder_config.hidden_sizes[config.encoder_config.memory_stage])


def page(rows: int, frames: int, *characters: tuple[int, int, float]) -> torch.Tensor:
    """Numbers `(1, rows, frames)` of characters given as row, frame, number."""
    numbers = torch.zeros(1, rows, frames)
    for row, frame, number in characters:
        numbers[0, row, frame] = number
    return numbers


def naive_whole_numbers(profile: list[float], frames: int) -> list[float]:
    """The numbers of each frame, made whole from gap to gap and from line to line, one by one."""
    lines = [place // frames for place in range(0, len(profile), frames) if sum(profile[place : place + frames]) > 0.5]
    result, line, group = [], [], []  # line: its groups
    for place, number in enumerate(profile):
        before, after = profile[place - 1], profile[(place + 1) % len(profile)]
        group.append(number)
        if (number < GAP and number <= before and number <= after) or place % frames == frames - 1:
            line.append(group)
            group = []
        if place % frames == frames - 1:
            signs = [number for number, group in enumerate(line) if sum(group) >= LEAST_BREAK]
            for number, group in enumerate(line):
                whole, total = round(sum(group)), sum(group)
                if place // frames in lines[:-1] and number == signs[-1]:
                    whole = max(whole, 1)
                result += [value * whole / total if total else 0.0 for value in group]
            line, group = [], []
    return result


def test_numbers_become_whole_from_gap_to_gap():
    profile = [0.0, 0.9, 0.02, 0.55, 0.4, 0.0, 0.98, 0.6, 0.3, 0.0, 0.1, 0.2] + [0.0, 0.3, 0.9, 0.0, 0.7, 0.7] * 2
    expected = naive_whole_numbers(profile, 12)
    places, stretch, numbers, soft = counter()._whole_numbers(torch.tensor([profile]), 12)
    torch.testing.assert_close(stretch * torch.tensor([profile]), torch.tensor([expected]))
    assert numbers.sum().item() == pytest.approx(sum(expected)) == round(sum(expected))
    assert soft.sum().item() == pytest.approx(sum(profile))
    naive = [sum(expected[:i]) + expected[i] / 2 for i in range(len(profile))]
    torch.testing.assert_close(places, torch.tensor([naive]))


def test_a_line_that_another_follows_ends_with_a_newline_however_faint():
    text = [(0, 1, 1.0), (0, 4, 1.0), (0, 7, 0.1), (2, 1, 1.0), (2, 4, 1.0), (2, 7, 0.1)]
    coordinates, held, count, *_ = counter().gaze(page(3, 16, *text), torch.zeros(1, 24))
    assert count.item() == 2 + 2 + 1 + 2  # the last line's faint sign is none
    assert held[0, [3, 19]].tolist() == pytest.approx([1.0, 0.0])
    assert coordinates[0, [0, 2, 3, 16, 18]].tolist() == pytest.approx([1, 2, 3, 4, 5])
    faint = LEAST_BREAK * 0.9
    gaze = counter().gaze(page(3, 16, (0, 1, 1.0), (0, 7, faint), (2, 1, 1.0)), torch.zeros(1, 24))
    assert gaze.count.item() == 2 + 2


def test_small_errors_do_not_add_up():
    """Thirty characters of which each is seen by nine tenths are thirty, not twenty-seven."""
    numbers = page(1, 64, *[(0, 2 * place + 1, 0.9) for place in range(30)])
    coordinates, held, count, *_ = counter().gaze(numbers, torch.zeros(1, 32))
    assert count.item() == 32
    torch.testing.assert_close(held[0, :30], torch.ones(30))
    torch.testing.assert_close(coordinates[0, :30], torch.arange(1, 31).float())


def test_a_character_between_two_frames_or_two_rows_counts_once():
    for second in ((0, 3), (1, 2)):  # the frame to the right, the frame below
        numbers = page(2, 8, (0, 2, 0.5), (*second, 0.5), (0, 6, 1.0))
        offset = torch.tensor([[0.5] * 4 + [-0.5] * 4])  # the line runs between the two rows
        coordinates, _, count, *_ = counter().gaze(numbers, offset)
        assert count.item() == 2 + 2
        assert coordinates[0, 3].item() == pytest.approx(2.0)


def test_a_cell_of_two_characters_lies_between_them():
    coordinates, held, *_ = counter().gaze(page(1, 8, (0, 0, 1.0), (0, 2, 1.0), (0, 3, 1.0)), torch.zeros(1, 4))
    assert held[0].tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0])
    assert coordinates[0, :2].tolist() == pytest.approx([1.0, 2.5])


def test_a_tilted_line_is_read_in_order():
    """Eight characters on a line that falls by two rows, and one on a line below: raster order would mix them up."""
    rows, columns = 6, 8
    numbers, offset = torch.zeros(1, rows, 2 * columns), torch.zeros(1, rows * columns)
    expected = {}
    for column in range(columns):
        row = int(1.5 + 2.0 * (column - 3.5) / columns)
        numbers[0, row, 2 * column] = 1.0
        offset[0, row * columns + column] = 1.5 - (row + 0.5)
        expected[row * columns + column] = column + 1.0
    numbers[0, 4, 0] = 1.0
    expected[4 * columns] = 9.0
    coordinates, _, count, *_ = counter().gaze(numbers, offset)
    assert count.item() == 9 + 2
    for cell, coordinate in expected.items():
        assert coordinates[0, cell].item() == pytest.approx(coordinate)


def test_lines_close_together_are_kept_apart():
    """Two lines seven pixels apart in rows of eight: both of their middles lie in the second row or next to it."""
    numbers = page(3, 16, *[(1, frame, 1.0) for frame in (1, 5, 9)], *[(2, frame, 1.0) for frame in (1, 5, 9)])
    offset = torch.zeros(1, 24)
    offset[0, 8:16], offset[0, 16:] = -0.25, -0.375
    coordinates, _, count, *_ = counter().gaze(numbers, offset)
    assert count.item() == 8
    assert coordinates[0, [8, 10, 12, 16, 18, 20]].tolist() == pytest.approx([1, 2, 3, 4, 5, 6])


def test_an_empty_image_has_no_characters():
    coordinates, held, count, *_ = counter().gaze(torch.full((1, 4, 8), 1e-3), torch.zeros(1, 16))
    assert count.item() == 2
    assert held.sum() == 0
    assert torch.isfinite(coordinates).all()


@pytest.mark.parametrize("frames_per_cell", [1, 2])
def test_frames_sum_up_to_cells(frames_per_cell):
    memory = torch.randn(2, 12, 32)
    module = counter(frames_per_cell)
    counts = module(memory, 3, 4)
    assert counts.logits.shape == (2, 3, 4 * frames_per_cell)
    assert counts.line_offset.shape == (2, 12)
    numbers = counts.logits.sigmoid()
    cells = module.by_cell(numbers)
    assert cells.shape == (2, 12)
    naive = sum(numbers[:, 1, frames_per_cell * 2 + frame] for frame in range(frames_per_cell))
    torch.testing.assert_close(cells[:, 6], naive)


def test_contrast_is_normalised_for_either_polarity():
    paper = torch.full((1, 1, 32, 32), 0.8)
    paper[..., 8:12, 8:24] = 0.3
    dark_on_light, light_on_dark = normalize_contrast(paper), normalize_contrast(1 - paper)
    torch.testing.assert_close(dark_on_light, light_on_dark)
    assert dark_on_light[..., 9, 9].item() > 0 > dark_on_light[..., 0, 0].item()
    assert normalize_contrast(torch.full((1, 1, 32, 32), 0.7)).abs().max() < 1e-3
    torch.manual_seed(0)
    model: Any = ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(paper).logits, model(1 - paper).logits, rtol=1e-4, atol=1e-4)
