"""Augmentation of labelled images: each part does what it says, and nothing when it is off."""

import pytest
import torch

from regard.data.augmentation import _COLOUR_OPS, augment_images, mix, rand_augment, random_erasing


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(16, 3, 12, 20)


def test_everything_off_changes_nothing(images):
    assert augment_images(images) is images
    targets = torch.eye(16)
    assert mix(images, targets, 0.0, 0.0) == (images, targets)
    assert random_erasing(images, 0.0).equal(images)


def test_flip_mirrors_about_half(images):
    flipped = augment_images(images, flip=True)
    mirrored = torch.isclose(flipped, images.flip(3), atol=1e-5).all((1, 2, 3))
    same = torch.isclose(flipped, images, atol=1e-5).all((1, 2, 3))
    assert (mirrored | same).all()
    assert 2 < mirrored.sum() < 14


def test_shift_moves_by_whole_pixels_and_repeats_the_edge(images):
    shifted = augment_images(images, shift=0.1)  # 1 row, 2 columns
    padded = torch.nn.functional.pad(images, (2, 2, 1, 1), mode="replicate")
    places = [(down, right) for down in range(3) for right in range(5)]
    candidates = torch.stack([padded[:, :, y : y + 12, x : x + 20] for y, x in places])
    found = torch.isclose(candidates, shifted, atol=1e-5).all(dim=(2, 3, 4))  # (places, images)
    assert found.any(0).all()
    assert len({int(index) for index in found.float().argmax(0)}) > 3


def test_a_crop_is_a_part_enlarged():
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    torch.manual_seed(0)
    cropped = augment_images(ramp, min_area=0.25)
    span = cropped[:, 0, 16, -1] - cropped[:, 0, 16, 0]  # share of the width that is left
    assert span.min() < 0.65
    assert span.max() > 0.9
    assert (span > 0.4).all()
    assert (cropped.diff(dim=3) >= -1e-6).all()


def test_chance_is_torchs(images):
    def run():
        torch.manual_seed(1)
        return augment_images(images, flip=True, shift=0.1, min_area=0.5, num_ops=2, magnitude=1.0)

    first = run()
    assert first.equal(run())
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    assert not first.equal(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_moves_and_recolours(channels):
    torch.manual_seed(0)
    images = torch.rand(256, channels, 8, 8)
    changed, matrices = rand_augment(images, 1, 1.0)
    moved = (matrices != torch.eye(3)).any((1, 2)).float().mean().item()
    recoloured = (changed != images).any(3).any(2).any(1).float().mean().item()
    assert moved == pytest.approx(5 / 14, abs=0.1)
    assert recoloured == pytest.approx((8 if channels == 3 else 7) / 14, abs=0.15)  # colour leaves grey as it is
    still, matrices = rand_augment(images, 0, 1.0)
    assert still.equal(images)
    assert (matrices == torch.eye(3)).all()


@pytest.mark.parametrize("index", range(len(_COLOUR_OPS)))
def test_colour_operations_by_strength(index, images):
    change = _COLOUR_OPS[index]
    none = change(images, torch.zeros(16, 1, 1, 1))
    assert none.shape == images.shape
    if index > 1:  # all but autocontrast and equalize have a strength
        assert torch.allclose(none, images, atol=1 / 255)
        assert not torch.allclose(change(images, torch.ones(16, 1, 1, 1)), images, atol=0.05)
    flat = torch.full((2, 3, 4, 4), 0.5)
    assert torch.isfinite(change(flat, torch.ones(2, 1, 1, 1))).all()


def test_equalize_spreads_and_autocontrast_stretches():
    images = 0.4 + 0.2 * torch.rand(2, 3, 32, 32)
    zero = torch.zeros(2, 1, 1, 1)
    stretched = _COLOUR_OPS[0](images, zero)
    assert stretched.amin() == 0
    assert stretched.amax() == pytest.approx(1)
    spread = _COLOUR_OPS[1](images, zero)
    assert spread.mean().item() == pytest.approx(0.5, abs=0.03)
    assert spread.std().item() == pytest.approx(0.29, abs=0.02)


def test_erasing_fills_one_rectangle_with_noise():
    torch.manual_seed(0)
    erased = random_erasing(torch.full((400, 2, 20, 20), 9.0), 0.5)
    gone = erased[:, 0] != 9
    assert gone.any((1, 2)).float().mean().item() == pytest.approx(0.5, abs=0.08)
    for mask in gone[gone.any((1, 2))]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
        assert 0.01 < mask.float().mean() < 0.36
        assert rows.nonzero().diff(dim=0).eq(1).all()
        assert columns.nonzero().diff(dim=0).eq(1).all()


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_the_images_are(mixup, cutmix):
    torch.manual_seed(0)
    shares = torch.arange(8.0)
    kinds = set()
    for _ in range(20):
        images = shares[:, None, None, None].expand(8, 3, 10, 10)
        mixed, targets = mix(images, torch.eye(8), mixup, cutmix)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ shares, atol=1e-4)
        kinds.add("mixup" if (mixed.std((1, 2, 3)) < 1e-5).all() else "cutmix")
    assert kinds == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
