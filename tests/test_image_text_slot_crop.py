"""The part of an image that ImageTextSlot reads: where the ink is."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from regard.configuration.configuration_image_text_slot import PRESETS, ImageTextSlotConfig
from regard.modeling.image_text_slot_crop import common_size, cut, find_ink, group_by_size, uncut, within
from regard.modeling.image_text_slot_encoder import normalize_contrast
from regard.modeling.layers import sinusoidal_positions_2d
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel, MemoryGrid

STRIDE = (16, 8)


def paper(*inks: tuple[int, int, int, int], noise: float = 0.0) -> torch.Tensor:
    """White images `(batch, 1, 128, 128)` with a striped rectangle (left, top, right, bottom) of black ink each."""
    images = torch.ones(len(inks), 1, 128, 128)
    for image, (left, top, right, bottom) in zip(images, inks, strict=True):
        image[0, top:bottom, left:right:3] = 0
    generator = torch.Generator().manual_seed(0)
    return images + noise * torch.randn(images.shape, generator=generator)


def tiny(**encoder) -> Any:
    torch.manual_seed(0)
    encoder = {**PRESETS["tiny"]["encoder_config"], **encoder}
    model = ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny", encoder_config=encoder)).eval()
    model.counter.presence.bias.data.fill_(-2.0)  # most cells are empty
    return model


@pytest.mark.parametrize("noise", [0, 0.1])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_part_with_ink_is_found(noise, inverted):
    images = paper((42, 34, 60, 38), (0, 0, 128, 128), (110, 110, 128, 128), noise=noise)
    parts = find_ink(normalize_contrast(1 - images if inverted else images), STRIDE, margin=8)
    # out to squares of 4 pixels, and 8 of margin on all sides, then out to the cells' edges, then to an even width
    assert parts.tolist() == [[4, 1, 10, 3], [0, 0, 16, 8], [12, 6, 16, 8]]
    wide = find_ink(normalize_contrast(1 - images if inverted else images), STRIDE, margin=24)
    assert wide.tolist() == [[2, 0, 12, 4], [0, 0, 16, 8], [10, 5, 16, 8]]


def test_faint_ink_beside_much_ink_is_found():
    """Where ink covers half of an image, the differences that it makes must not be taken for noise."""
    image = paper((0, 0, 0, 0))
    grey = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    image[..., :96, :96] = grey.kron(torch.ones(4, 4))
    image[..., 112:116, 104:108] = 0.6
    assert find_ink(normalize_contrast(image), STRIDE, margin=0).tolist() == [[0, 0, 14, 8]]


def test_an_image_without_ink_is_kept_whole():
    images = normalize_contrast(torch.cat((torch.ones(1, 1, 64, 96), torch.zeros(1, 1, 64, 96))))
    assert find_ink(images, STRIDE, margin=8).tolist() == [[0, 0, 12, 4]] * 2


def test_parts_are_grouped_by_their_size():
    parts = torch.tensor([[0, 0, 4, 2], [1, 1, 5, 3], [0, 0, 4, 3], [2, 0, 6, 2]])
    assert sorted(index.tolist() for index in group_by_size(parts)) == [[0, 1, 3], [2]]


def test_parts_are_cut_out_and_boxes_put_back():
    images = torch.arange(2 * 128 * 128.0).view(2, 1, 128, 128)
    part = torch.tensor([[0.25, 0.125, 0.5, 0.5], [0.75, 0, 1, 0.375]])
    pieces = cut(images, part)
    assert torch.equal(pieces[0], images[0, :, 16:64, 32:64])
    assert torch.equal(pieces[1], images[1, :, 0:48, 96:128])
    boxes = uncut(torch.tensor([[[0.0, 0.0, 1.0, 1.0]], [[0.5, 0.5, 1.0, 1.0]]]), part)
    assert boxes[:, 0].tolist() == [part[0].tolist(), [0.875, 0.1875, 1, 0.375]]


def test_parts_grow_to_one_size_within_the_image():
    parts = torch.tensor([[0, 0, 4, 2], [12, 6, 16, 8], [5, 1, 13, 2], [4, 3, 8, 6]])
    torch.manual_seed(0)
    drawn = [common_size(parts, 16, 8) for _ in range(50)]
    for grown in drawn:
        assert (grown[:, 2:] - grown[:, :2]).tolist() == [[8, 3]] * 4
        assert (grown[:, :2] <= parts[:, :2]).all()
        assert (grown[:, 2:] >= parts[:, 2:]).all()
        assert grown.min() >= 0
        assert (grown[:, 2:] <= torch.tensor([16, 8])).all()
    corners = [{tuple(grown[image, :2].tolist()) for grown in drawn} for image in range(4)]
    assert [len(places) for places in corners] == [1, 1, 2, 5]  # in the image's corners there is no choice


def test_what_is_taught_of_a_part_is_cut_from_what_is_taught_of_the_image():
    model = tiny()
    labels = torch.tensor([[1, 10, 11, 12, 2]])
    places = [[0.3, 0.4, 0.42], [0.45, 0.4, 0.42], [0.7, 0.6, 0.62]]
    positions = torch.tensor([[[-1.0] * 3, *places, [-1.0] * 3]])
    part = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    whole = model._cell_targets(positions, labels, MemoryGrid(8, 16))
    cropped = model._cell_targets(positions, labels, MemoryGrid(4, 8, part))
    for name in ("counts", "coordinates", "lines", "characters"):
        expected = whole[name].view(1, 8, 16)[:, 2:6, 4:12].flatten(1)
        torch.testing.assert_close(cropped[name], expected, msg=name)
    frames = whole["frames"].shape[2] // 16
    assert torch.equal(cropped["frames"], whole["frames"][:, 2:6, 4 * frames : 12 * frames])
    assert cropped["cell"].tolist() == [[-1, 8 + 0, 8 + 3, 16 + 7, -1]]
    assert within(torch.tensor([[[0.25, 0.75, 0.5]]]), part).tolist() == [[[0, 1, 0.5]]]


def test_positions_of_a_part_are_those_of_the_image():
    whole = sinusoidal_positions_2d(8, 16, 32, torch.device("cpu")).unflatten(0, (8, 16))
    part = torch.tensor([[4 / 16, 1 / 8, 12 / 16, 3 / 8], [0, 6 / 8, 8 / 16, 1]])
    cropped = sinusoidal_positions_2d(2, 8, 32, torch.device("cpu"), part)
    torch.testing.assert_close(cropped[0], whole[1:3, 4:12].flatten(0, 1))
    torch.testing.assert_close(cropped[1], whole[6:8, 0:8].flatten(0, 1))


@torch.no_grad()
def test_the_part_read_costs_less_and_lies_where_it_is():
    model = tiny()
    sizes = []
    hook = model.encoder.entries[0].register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    images = paper((42, 34, 60, 38), (0, 0, 128, 128), (74, 66, 92, 70), (96, 100, 120, 125))
    reading = model.read(images)
    hook.remove()
    assert sorted(sizes) == [(1, 1, 48, 48), (1, 1, 128, 128), (2, 1, 32, 48)]  # two are of one size
    for index, part in ((0, [0.25, 0.125, 0.625, 0.375]), (2, [0.5, 0.375, 0.875, 0.625])):
        boxes = reading.boxes[index][1:-1]
        assert len(boxes)
        assert (boxes >= torch.tensor(part[:2] * 2) - 1e-6).all()
        assert (boxes <= torch.tensor(part[2:] * 2) + 1e-6).all()
    for index in range(len(images)):
        alone = model.read(images[index : index + 1])
        assert torch.equal(alone.sequences[0], reading.sequences[index])
        torch.testing.assert_close(alone.boxes[0], reading.boxes[index], equal_nan=True)
        assert torch.equal(alone.count_pred[0], reading.count_pred[index])


@torch.no_grad()
def test_without_a_margin_whole_images_are_read():
    whole, cropped = tiny(crop_margin=None), tiny(crop_margin=8)
    full, small = paper((0, 0, 128, 128)), paper((42, 34, 60, 38))
    assert torch.equal(whole.read(full).sequences[0], cropped.read(full).sequences[0])
    sizes = []
    whole.encoder.entries[0].register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    expected = whole.read(small)
    assert sizes == [(1, 1, 128, 128)]
    reading = cropped.read(small, crop=False)
    assert torch.equal(reading.sequences[0], expected.sequences[0])
    assert torch.equal(reading.scores[0], expected.scores[0])
    assert len(cropped.read(small).sequences[0]) != len(expected.sequences[0])


@torch.no_grad()
def test_images_of_a_wrong_shape_are_refused():
    for shape in ((1, 128, 128), (1, 3, 128, 128), (1, 1, 100, 128)):
        with pytest.raises(ValueError, match=r"batch, 1, height, width|divisible"):
            tiny().read(torch.randn(shape))


def test_a_margin_is_no_less_than_0():
    with pytest.raises(StrictDataclassClassValidationError, match="crop_margin=-1 must be 0 or more"):
        tiny(crop_margin=-1)
