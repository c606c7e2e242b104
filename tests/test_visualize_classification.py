"""Where a QAViT looked, on cases with known answers, and the pictures of it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regard import QAViTConfig, QAViTForImageClassification
from regard.modeling.grid_attention import Partition
from regard.visualize_classification import attention_maps, branch_weights, draw_classification

RESULT = {
    "labels": [{"label": "Coat", "score": 0.75}, {"label": "A class with a name that is far too long", "score": 0.25}],
    "branches": {"window": 0.5, "dilated": 0.25, "channel": 0.15, "bank": 0.1},
    "maps": {"window": np.ones((7, 7)), "dilated": np.eye(7), "bank": np.zeros((7, 7))},
}


def maps_of(branch: str, *weights: torch.Tensor, rows: int, columns: int, **config) -> np.ndarray:
    """The map of a model with one block and one branch."""
    outputs: Any = SimpleNamespace(attentions=((weights,),))
    config = QAViTConfig(branches=[branch], **config)
    return attention_maps(outputs, config, rows, columns)[branch]


def one_key(groups: int, cells: int, keys: int, group: int, key: int) -> torch.Tensor:
    """Weights (1, groups, 2 heads, cells, keys): all of a group look at one key, those of the others evenly."""
    weights = torch.full((1, groups, 2, cells, keys), 1 / keys)
    weights[0, group] = 0
    weights[0, group, :, :, key] = 1
    return weights


def test_all_look_at_one_token_of_a_window():
    seen = maps_of("window", one_key(4, 9, 9, group=1, key=5), rows=6, columns=6, window_size=3)
    expected = np.ones((1, 6, 6))
    expected[0, :3, 3:] = 0
    expected[0, 1, 5] = 9  # second window, second row, third column
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_padding_neither_looks_nor_is_seen():
    partition = Partition.windows(4, 5, 3)  # 2 x 2 windows of 2 x 3 tokens; the last column is padding
    real = partition.real(4, 5, torch.device("cpu"))
    assert real is not None
    weights = (real / real.sum(1, keepdim=True)).transpose(1, 2)[None, :, None].repeat(1, 1, 1, 6, 1)
    weights[0, 1, :, 2] = torch.eye(6)[0]  # where a padding token looks does not count
    np.testing.assert_allclose(maps_of("window", weights, rows=4, columns=5, window_size=3), 1, atol=1e-6)


def test_rates_weigh_by_their_heads():
    even, odd = torch.full((1, 1, 2, 16, 16), 1 / 16), one_key(4, 4, 4, group=3, key=1)[:, :, :1]
    seen = maps_of("dilated", even, odd, rows=4, columns=4, dilation_factors=[1, 2])
    expected = np.ones((4, 4))
    expected[1::2, 1::2] = (2 * 1 + 0) / 3
    expected[1, 3] = (2 * 1 + 4) / 3  # the group of odd rows and columns, its second token
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)


def test_pooled_keys_are_spread_over_their_tokens():
    settings = {"rows": 6, "columns": 6, "kv_pool_size": 4, "dilation_factors": [1]}
    seen = maps_of("dilated", one_key(1, 36, 4, group=0, key=2), **settings)
    expected = np.zeros((1, 6, 6))
    expected[0, 3:, :3] = 4
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    for rows, columns in ((5, 7), (9, 5)):  # pooled regions overlap, and windows are padded
        groups = Partition.windows(rows, columns, 5)
        weights = torch.full((1, groups.groups[0] * groups.groups[1], 1, groups.cells[0] * groups.cells[1], 4), 1 / 4)
        seen = maps_of("window", weights, rows=rows, columns=columns, window_size=5, kv_pool_size=4)
        np.testing.assert_allclose(seen, 1, atol=1e-5)


def test_the_bank_shows_what_was_written():
    read, written = torch.rand(1, 2, 24, 3), torch.zeros(1, 2, 3, 24)
    written[..., 7] = 1
    seen = maps_of("bank", read, written, rows=4, columns=6)
    assert seen[0, 1, 1] == pytest.approx(24)
    assert seen.sum() == pytest.approx(24)


@pytest.mark.parametrize("branches", [("window", "dilated", "channel", "bank"), ("bank", "window"), ("channel",)])
def test_maps_of_a_model(branches):
    config = QAViTConfig.from_preset("micro", branches=branches)
    model = QAViTForImageClassification(config).eval()
    pixel_values = torch.randn(2, 3, 20, 28)
    with pytest.raises(ValueError, match="attn_implementation"):
        attention_maps(model(pixel_values), config, 5, 7)
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_attentions=True)
    maps = attention_maps(outputs, config, 5, 7)
    assert list(maps) == [name for name in branches if name != "channel"]
    for grid in maps.values():
        assert grid.shape == (2, 5, 7)
        assert (grid > 0).all()
        assert grid.mean() == pytest.approx(1, abs=0.3)
    weights = branch_weights(outputs, config)
    assert list(weights) == list(branches)
    np.testing.assert_allclose(sum(weights.values()), [1, 1], atol=1e-6)


def test_an_implementation_without_weights_is_named():
    config = QAViTConfig.from_preset("micro", attn_implementation="sdpa")
    outputs = QAViTForImageClassification(config).eval()(torch.randn(1, 3, 20, 20), output_attentions=True)
    with pytest.raises(ValueError, match="attn_implementation"):
        attention_maps(outputs, config, 5, 5)


def test_a_bank_that_is_not_written_shows_no_place():
    config = QAViTConfig.from_preset("micro", bank_written=False)
    model = QAViTForImageClassification(config).eval()
    model.set_attn_implementation("eager")
    outputs = model(torch.randn(1, 3, 20, 20), output_attentions=True)
    assert list(attention_maps(outputs, config, 5, 5)) == ["window", "dilated"]


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (224, 224), (600, 3), (3, 600), (2000, 1500)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_image_is_drawn(size, mode):
    picture = draw_classification(Image.new(mode, size), RESULT)
    assert picture.mode == "RGB"
    assert max(picture.size) < 900


def test_attention_shows_as_light():
    bright = np.full((8, 8), 1 / 4)
    bright[:4] = 4
    drawn = {}
    for name, grid in (("bright", bright), ("dark", 0 * bright)):
        picture = draw_classification(Image.new("L", (28, 28), 128), {**RESULT, "maps": {"window": grid}})
        drawn[name] = np.asarray(picture.convert("L"), dtype=float)[36:268, 264:496]  # the panel beside the image
    assert (drawn["bright"][:90] > drawn["bright"][-90:].max() + 80).all()
    assert drawn["dark"].std() < 1


def test_nothing_to_show_is_left_out():
    everything = draw_classification(Image.new("L", (28, 28)), RESULT)
    some = draw_classification(
        Image.new("L", (28, 28)), {"labels": RESULT["labels"], "branches": {"channel": 1.0}, "maps": {}}
    )
    assert some.width < everything.width
    assert some.height < everything.height
