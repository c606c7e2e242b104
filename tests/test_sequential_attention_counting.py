"""SequentialAttentionCounting: steps, memory, marks, ragged images, switches, losses, and each fault of the described
design."""

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import AutoModel, Qwen2VLConfig, Qwen2VLModel

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.counting_losses import VISITED
from regard.modeling.counting_outputs import CountedObjects
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.modeling.picture_patches import draw_marks, patches_of, pictures_of

SWITCHES = ("use_memory", "use_foveation", "use_cross_attention", "use_reasoning")
SIZES = ((4, 4), (6, 4), (2, 8))  # rows and columns of patches, which are the cells too


def make_model(**changes) -> Any:
    torch.manual_seed(0)
    config = SequentialAttentionCountingConfig.from_preset("micro", **changes)
    model = SequentialAttentionCountingModel(config).eval()
    torch.nn.init.constant_(model.look.no_more.bias, -9.0)  # goes on to the end
    return model


def vision(model: Any) -> Any:
    return model.config.vlm_config.vision_config


def make_inputs(sizes=SIZES, categories: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise of some sizes, each asked for some categories of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows, index = [], []
    for number, (height, width) in enumerate(sizes):
        for category in range(categories):
            words = torch.randint(4, 260, (2 + category + number,), generator=generator)
            rows.append(torch.tensor([*words, 261, *[260] * (height * width // 4), 262, 263, 264, 265]))
            index.append(number)
    patches = sum(height * width for height, width in sizes)
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, *size] for size in sizes]),
        "input_ids": input_ids,
        "attention_mask": (input_ids > 0).long(),
        "image_index": torch.tensor(index),
    }


def still(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with patches that do not change over time, as those of a picture."""
    pictures = pictures_of(inputs["pixel_values"], inputs["image_grid_thw"], vision(model))
    return inputs | {"pixel_values": patches_of(pictures, vision(model))}


def with_objects(inputs: dict[str, torch.Tensor], numbers=(3, 0, 2)) -> dict[str, torch.Tensor]:
    """Objects, counted in their order, and every step."""
    generator = torch.Generator().manual_seed(9)
    most = max(numbers)
    here = torch.arange(most) < torch.tensor(numbers)[:, None]
    objects = torch.rand(len(numbers), most, 2, generator=generator).masked_fill(~here[..., None], -1.0)
    steps = torch.arange(most + 1).expand(len(numbers), -1)
    return inputs | {
        "objects": objects,
        "points": objects,
        "point_objects": torch.arange(most).expand(len(numbers), -1).masked_fill(~here, -1),
        "steps": steps.masked_fill(steps > torch.tensor(numbers)[:, None], -1),
    }


def counts_equal(first: list[CountedObjects], second: list[CountedObjects]):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.points, other.points, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)
        assert one.count_estimate == pytest.approx(other.count_estimate, abs=1e-4)
        assert one.complete == other.complete


# Steps.


@torch.no_grad()
def test_steps_one_after_the_other_are_all_steps_at_once():
    model, inputs = make_model(), make_inputs()
    steps = [outputs for _, outputs in model.stream(**inputs)]
    assert len(steps) == model.config.max_memory_objects + 1
    points = torch.stack([torch.stack((each.x, each.y), -1)[:, 0] for each in steps[:-1]], dim=1)
    together = model(**inputs, points=points, steps=torch.arange(len(steps)).expand(3, -1))
    for number, each in enumerate(steps):
        seen = together.pointer_logits[:, number] > -VISITED / 2
        same = each.pointer_logits[:, 0] > -VISITED / 2
        both = seen & same  # a cell may point outside itself: forward knows the point, and not which cell it was
        torch.testing.assert_close(
            each.pointer_logits[:, 0][both], together.pointer_logits[:, number][both], rtol=1e-4, atol=1e-4
        )
        assert (seen != same).sum() <= number * 3
    torch.testing.assert_close(steps[0].done[:, 0], together.done[:, 0])
    torch.testing.assert_close(steps[0].count_estimate, together.count_estimate)


@torch.no_grad()
def test_rows_that_are_done_drop_out_and_the_others_do_not_notice():
    model = make_model()
    inputs: dict[str, Any] = {**make_inputs(categories=2)}
    first = next(model.stream(**inputs))[1].done[:, 0]
    inputs["done_threshold"] = float(first.sort().values[[2, 3]].mean())  # three of six rows have none at all
    active = [rows.tolist() for rows, _ in model.stream(**inputs)]
    assert active[0] == list(range(6))
    assert len(active[1]) == 3
    assert all(set(after) <= set(before) for before, after in itertools.pairwise(active))
    counted = model.count(**inputs)
    assert sorted(result.count > 0 for result in counted) == [False] * 3 + [True] * 3
    for row in range(6):
        image = int(inputs["image_index"][row])
        start = sum(height * width for height, width in SIZES[:image])
        here = slice(start, start + math.prod(SIZES[image]))
        words = inputs["attention_mask"][row].bool()
        alone = model.count(
            pixel_values=inputs["pixel_values"][here],
            image_grid_thw=inputs["image_grid_thw"][image : image + 1],
            input_ids=inputs["input_ids"][row : row + 1, words],
            done_threshold=inputs["done_threshold"],
        )
        counts_equal(alone, counted[row : row + 1])


@torch.no_grad()
def test_it_ends_and_never_points_at_a_cell_again():
    model, inputs = make_model(max_memory_objects=40), make_inputs()
    chosen: dict[int, list[int]] = {row: [] for row in range(3)}
    for rows, outputs in model.stream(**inputs, done_threshold=1 - 1e-6):  # as late as can be
        for row, cell, done in zip(rows.tolist(), outputs.pointer_logits[:, 0].argmax(-1), outputs.done, strict=True):
            if done < 1 - 1e-6:
                chosen[row].append(int(cell))
    for (rows, columns), cells in zip(SIZES, chosen.values(), strict=True):
        assert 3 <= len(cells) <= rows * columns  # some are taken out by what points near them
        assert len(set(cells)) == len(cells)
    counted = model.count(**inputs, max_objects=2, done_threshold=1 - 1e-6)
    assert [(result.count, result.complete) for result in counted] == [(2, False)] * 3
    assert [result.count for result in make_model().count(**inputs)] == [5] * 3


@torch.no_grad()
def test_a_count_says_what_it_found():
    inputs = make_inputs()
    model = make_model()
    for result in model.count(**inputs):
        assert ((result.points >= 0) & (result.points <= 1)).all()
        assert ((result.scores >= 0.5) & (result.scores <= 1)).all()
        assert result.count == len(result.points)
    torch.nn.init.constant_(model.look.no_more.bias, 99.0)
    assert [(result.count, result.complete) for result in model.count(**inputs)] == [(0, True)] * 3
    points, scores = torch.zeros(20, 2), torch.ones(20)
    assert CountedObjects(points, scores, 21.9, True).agrees
    assert not CountedObjects(points, scores, 22.1, True).agrees
    assert CountedObjects(points[:0], scores[:0], 0.9, True).agrees


@torch.no_grad()
@pytest.mark.parametrize("marking", ["memory", "image"])
def test_ragged_images_and_many_categories_are_as_each_alone(marking, monkeypatch):
    model = make_model(marking=marking, max_memory_objects=3)
    inputs = still(model, make_inputs(categories=3))
    counted = model.count(**inputs)
    start = 0
    for image, (height, width) in enumerate(SIZES):
        rows = inputs["image_index"] == image
        alone = model.count(
            pixel_values=inputs["pixel_values"][start : start + height * width],
            image_grid_thw=inputs["image_grid_thw"][image : image + 1],
            input_ids=inputs["input_ids"][rows],
            attention_mask=inputs["attention_mask"][rows],
        )
        counts_equal(alone, counted[3 * image : 3 * image + 3])
        start += height * width


@torch.no_grad()
def test_an_image_is_encoded_once_for_its_categories_and_may_be_given_encoded(monkeypatch):
    model, inputs = make_model(), make_inputs(categories=4)
    encoded, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *args: encoded.append(len(args[1])) or encode(*args))
    counted = model.count(**inputs)
    assert encoded == [3]
    images = encode(inputs.pop("pixel_values"), inputs.pop("image_grid_thw"))
    counts_equal(model.count(images=images, **inputs), counted)
    torch.testing.assert_close(model(images=images, **inputs).done.shape, torch.Size([12, 1]))
    assert encoded == [3]


@torch.no_grad()
def test_the_category_changes_what_is_seen():
    model = make_model()
    inputs = make_inputs(sizes=[(4, 4)], categories=2)
    logits = model(**inputs).pointer_logits[:, 0]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# Marks.


@torch.no_grad()
def test_marks_are_drawn_where_objects_were_counted():
    model = make_model()
    inputs = still(model, make_inputs())
    given = (inputs["pixel_values"], inputs["image_grid_thw"], vision(model))
    pictures = pictures_of(*given)
    assert [tuple(picture.shape) for picture in pictures] == [(3, 8 * rows, 8 * columns) for rows, columns in SIZES]
    assert torch.equal(patches_of(pictures, vision(model)), inputs["pixel_values"])
    points = torch.tensor([[[0.25, 0.5], [-1, -1]], [[-1.0, -1], [-1, -1]], [[1.0, 0.0], [0.5, 0.5]]])
    marked, grid = draw_marks(*given, points, torch.tensor([1, 0, 1]))
    assert grid.tolist() == [[1, 6, 4], [1, 4, 4], [1, 6, 4]]
    first, second, third = pictures_of(marked, grid, vision(model))
    assert first[:, 24, 8].tolist() == [2, -2, 2]
    changed = (first != pictures[1]).any(0)
    assert 40 < changed.sum() < 60
    assert changed[:, 20:].sum() == 0
    assert torch.equal(second, pictures[0])
    assert third[:, 0, 31].tolist() == third[:, 24, 16].tolist() == [2, -2, 2]


@torch.no_grad()
def test_marking_on_the_image_encodes_it_anew_for_each_object(monkeypatch):
    model = make_model(marking="image", max_memory_objects=2)
    inputs = still(model, make_inputs(categories=2))
    encoded, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *args: encoded.append(len(args[1])) or encode(*args))
    steps = list(model.stream(**inputs))
    assert encoded == [3, 6, 6]
    points = torch.stack([torch.stack((each.x, each.y), -1)[:, 0] for _, each in steps[:2]], dim=1)
    for number, (_, each) in enumerate(steps):
        marked = model.forward_with_attention(**inputs, points=points, num_marked=torch.full((6,), number))
        free = each.pointer_logits[:, 0] > -VISITED / 2
        torch.testing.assert_close(
            each.pointer_logits[:, 0][free], marked.pointer_logits[:, 0][free], rtol=1e-3, atol=1e-3
        )
    with pytest.raises(ValueError, match="one step of each row"):
        model(**inputs, points=points, steps=torch.zeros(6, 2, dtype=torch.long))
    images = encode(inputs.pop("pixel_values"), inputs.pop("image_grid_thw"))
    with pytest.raises(ValueError, match="give pixel_values"):
        next(model.stream(images=images, **inputs))


# Modules, and the faults of the described design.


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**with_objects(make_inputs())).loss.backward()
    return {name: torch.zeros(1) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_every_module_learns_from_the_first_step_as_gates_are_not_closed():
    """The described design's memory and foveation had no gradient at all: a gate of 0 does that."""
    assert [name for name, grad in gradients(make_model()).items() if not grad.abs().sum()] == []
    closed = gradients(make_model(initial_gate=0))
    inside = ("look.memory", "look.foveation", "look.cross_attention", "look.reasoning", "look.counted")
    for name, grad in closed.items():
        if name.startswith(inside):
            assert bool(grad.abs().sum() > 0) == name.endswith(".gate"), name


@torch.no_grad()
def test_a_false_stop_is_not_in_the_prior():
    """Among sampled steps "done" is as frequent as the sampling makes it: `done_log_odds` takes that out."""
    model = make_model()
    inputs = with_objects(make_inputs())
    plain = model(**inputs)
    shifted = model(**inputs, done_log_odds=torch.tensor([2.0, 0.0, 1.0]))
    logits = plain.done_logits + torch.tensor([[2.0], [0.0], [1.0]])
    is_done = inputs["steps"] == torch.tensor([[3], [0], [2]])
    valid = inputs["steps"] >= 0
    wrong = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_done.float(), reduction="none")
    torch.testing.assert_close(shifted.loss_done, wrong[valid].mean())
    assert torch.equal(shifted.done, plain.done)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_module_can_be_switched_off(switch):
    with torch.no_grad():
        whole, without = make_model(), make_model(**{switch: False})
        assert without.num_parameters() < whole.num_parameters()
        inputs = with_objects(make_inputs())
        outputs = without(**inputs, return_attention_maps=True)
        assert without.count(**make_inputs())[0].count == 5
        expected = {"use_foveation": "glimpses", "use_memory": "memory_states"}.get(switch)
        assert expected is None or getattr(outputs, expected) is None
    assert [name for name, grad in gradients(without).items() if not grad.abs().sum()] == []


def test_the_baseline_has_none_of_them():
    config = SequentialAttentionCountingConfig.from_preset("baseline")
    assert not any(getattr(config, switch) for switch in SWITCHES)
    off: dict[str, Any] = dict.fromkeys(SWITCHES, False)
    model = make_model(**off)
    assert model.look.counted is None
    assert model.count(**make_inputs())[0].count == 5
    assert [name for name, grad in gradients(model).items() if not grad.abs().sum()] == []


@torch.no_grad()
def test_attention_maps_on_request():
    model = make_model(attn_implementation="eager")
    inputs = with_objects(make_inputs())
    outputs = model(**inputs, return_attention_maps=True)
    cells = outputs.pointer_logits.shape[2]
    assert outputs.glimpses.shape == (3, 4, 4, cells)
    torch.testing.assert_close(outputs.glimpses.sum(-1), torch.ones(3, 4, 4))
    assert outputs.counted_attention.shape == (3, 4, 2, 3, 4)
    assert outputs.counted_attention[0, 1, :, :, 2:].abs().max() < 1e-6  # not counted yet
    assert outputs.memory_states.shape == (3, 4, 16)
    assert outputs.memory_states[:, 0].abs().max() == 0
    assert model(**inputs).glimpses is None
    inputs.pop("steps")
    one = model.forward_with_attention(**inputs, num_marked=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(one.glimpses[0, 0], outputs.glimpses[0, 2])


# Losses.


@torch.no_grad()
def test_losses_equal_their_formulas():
    model = make_model(done_loss_weight=2.0, where_loss_weight=3.0, location_loss_weight=4.0, count_loss_weight=5.0)
    inputs = with_objects(make_inputs())
    outputs = model(**inputs)
    surprise = []
    for row, number in enumerate((3, 0, 2)):
        rows, columns = SIZES[row]
        cells = [
            min(rows - 1, int(y * rows)) * columns + min(columns - 1, int(x * columns))
            for x, y in inputs["objects"][row, :number].tolist()
        ]
        for step in range(number):
            left = [cell for cell in cells[step:] if cell not in cells[:step]]
            log_probability = outputs.pointer_logits[row, step].log_softmax(-1)
            surprise.append(-sum(log_probability[cell] for cell in left) / len(left))
    torch.testing.assert_close(outputs.loss_where, torch.stack(surprise).mean())
    numbers = torch.tensor([3.0, 0.0, 2.0])
    expected = torch.nn.functional.smooth_l1_loss(outputs.count_estimate.log1p(), numbers.log1p(), beta=0.1)
    torch.testing.assert_close(outputs.loss_count, expected)
    location = outputs.loss_x + outputs.loss_y
    total = 2 * outputs.loss_done + 3 * outputs.loss_where + 4 * location + 5 * outputs.loss_count
    torch.testing.assert_close(outputs.loss, total)


def test_images_without_objects_have_losses_and_gradients():
    model, inputs = make_model(), make_inputs()
    nothing = {
        "objects": torch.zeros(3, 0, 2),
        "points": torch.zeros(3, 0, 2),
        "point_objects": torch.zeros(3, 0, dtype=torch.long),
        "steps": torch.zeros(3, 1, dtype=torch.long),
    }
    outputs = model(**inputs, **nothing)
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)
    assert outputs.loss_where == outputs.loss_x == 0


def test_a_cell_that_points_outside_the_image_learns_to_point_inside():
    model, inputs = make_model(), with_objects(make_inputs())
    torch.nn.init.zeros_(model.heads.offset.weight)
    torch.nn.init.ones_(model.heads.offset.bias)  # cells at the right and lower edges point beyond them
    inputs["objects"] = inputs["objects"].masked_fill(inputs["objects"] >= 0, 0.99)
    outputs = model(**inputs)
    assert (outputs.cell_points <= 1).all()
    assert (outputs.cell_points == 1).any()
    (outputs.loss_x + outputs.loss_y).backward()
    assert (model.heads.offset.bias.grad > 0).all()


# Around a published backbone, and wrong input.


@torch.no_grad()
def test_built_around_a_published_backbone(tmp_path):
    torch.manual_seed(5)
    vlm: Any = SequentialAttentionCountingConfig.from_preset("micro").vlm_config
    published = Qwen2VLModel(Qwen2VLConfig(**{k: v for k, v in vlm.to_dict().items() if k != "model_type"}))
    published.save_pretrained(tmp_path / "vlm")
    config = SequentialAttentionCountingConfig.from_preset("micro", max_memory_objects=3)
    model = SequentialAttentionCountingModel.from_vlm_pretrained(str(tmp_path / "vlm"), config).eval()
    assert model.config.max_memory_objects == 3
    for name, weight in published.state_dict().items():
        assert torch.equal(weight, model.vlm.state_dict()[name]), name
    model.save_pretrained(tmp_path / "whole")
    inputs = make_inputs()
    again = AutoModel.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(again(**inputs).done, model(**inputs).done)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_count(dtype, tmp_path):
    make_model().save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    for result in half.count(**make_inputs()):
        assert torch.isfinite(result.points).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18}, "hidden_size=18"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"cell_size": 4}, "cell_size=4"),
        ({"step_token_ids": [1, 2]}, "step_token_ids"),
        ({"max_memory_objects": 0}, "max_memory_objects=0"),
        ({"done_threshold": 1.0}, "done_threshold=1.0"),
        ({"marking": "smell"}, "marking"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        SequentialAttentionCountingConfig.from_preset("micro", **changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="choose one of tiny"):
        SequentialAttentionCountingConfig.from_preset("large")


@pytest.mark.parametrize("name", ["pixel_values", "input_ids"])
def test_missing_inputs_are_named(name):
    model, inputs = make_model(), make_inputs()
    inputs.pop(name)
    for call in (model, lambda **given: next(model.stream(**given))):
        with pytest.raises(ValueError, match="Give input_ids, and either pixel_values"):
            call(**inputs)


def test_rows_and_images_must_agree():
    model, inputs = make_model(), make_inputs(categories=2)
    inputs.pop("image_index")
    with pytest.raises(ValueError, match="6 rows about 3 images"):
        model(**inputs)
    objects = with_objects(make_inputs())
    objects.pop("point_objects")
    with pytest.raises(ValueError, match="point_objects"):
        model(**objects)
