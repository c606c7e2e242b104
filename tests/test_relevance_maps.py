"""Maps from the relevance of layers, on cases with known answers."""

import copy

import pytest
import torch

from regard import QueryConditionedVQAConfig, QueryConditionedVQAModel
from regard.modeling import modeling_query_conditioned_vqa as modeling
from regard.modeling.relevance_maps import gradient_relevance, patch_grid, roll_up


def make_model(**config) -> QueryConditionedVQAModel:
    torch.manual_seed(0)
    model = QueryConditionedVQAModel(QueryConditionedVQAConfig.from_preset("micro", num_labels=4, **config)).eval()
    with torch.no_grad():
        for layer in model.encoder.layers:  # open the gates, so that everything bears on the answer
            for name, parameter in layer.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 20, 20, generator=generator),
        "input_ids": torch.randint(4, 80, (3, 6), generator=generator),
        "attention_mask": (torch.arange(6) < torch.tensor([[6], [2], [4]])).long(),
        "image_index": torch.tensor([1, 0, 1]),
    }


def test_rolling_up_weighs_later_layers_more():
    relevance = torch.eye(3)[None].repeat(2, 1, 1)
    torch.testing.assert_close(roll_up(relevance), torch.tensor([[0.25, 0.25, 0.5]] * 2))
    torch.testing.assert_close(roll_up(7 * relevance[:, :1]), relevance[:, 0])
    assert torch.isfinite(roll_up(0 * relevance)).all()
    for wrong in (relevance[0], relevance[:, :0]):
        with pytest.raises(ValueError, match="questions, layers, patches"):
            roll_up(wrong)


@pytest.mark.parametrize("conditioning", ["words", "vector"])
@pytest.mark.parametrize("score", ["dot", "additive", "bilinear"])
def test_gradients_weigh_the_relevance(inputs, conditioning, score):
    model = make_model(conditioning=conditioning, relevance_score=score)
    maps = gradient_relevance(model, **inputs)
    assert maps.shape == (3, 2, 25)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2))
    assert (maps >= 0).all()
    assert (maps == 0).any(), "some patches speak against the answer"


def test_the_gradient_is_that_of_the_best_answer(inputs, monkeypatch):
    """By finite differences, of the first layer and the last."""
    model = make_model()
    outputs = model(**inputs)
    best, softmax = outputs.logits.argmax(-1)[:, None], modeling.masked_softmax
    maps = gradient_relevance(model, **inputs)

    @torch.no_grad()
    def logits_with(step: torch.Tensor, changed: int) -> torch.Tensor:
        calls = iter(range(4))  # words and patches of each layer
        monkeypatch.setattr(
            modeling,
            "masked_softmax",
            lambda *args: softmax(*args) + (step if next(calls) == 2 * changed + 1 else 0),
        )
        return model(**inputs).logits.gather(1, best)[:, 0]

    for layer in range(2):
        steps = 0.01 * torch.eye(25)
        slopes = torch.stack([(logits_with(one, layer) - logits_with(-one, layer)) / 0.02 for one in steps], dim=1)
        weighed = outputs.relevance[:, layer] * slopes.clamp(min=0)
        torch.testing.assert_close(maps[:, layer], weighed / weighed.sum(-1, keepdim=True), rtol=0.02, atol=1e-3)


def test_where_nothing_speaks_for_the_answer_it_is_the_relevance(inputs):
    model = make_model()
    with torch.no_grad():
        model.head.classifier.weight.zero_()
    torch.testing.assert_close(gradient_relevance(model, **inputs), model(**inputs).relevance)


@pytest.mark.parametrize("keep", [5, 25, 99])
def test_patches_that_were_not_kept_have_no_relevance(inputs, keep):
    model = make_model(keep_patches=keep)
    relevance = model(**inputs).relevance
    maps = gradient_relevance(model, **inputs)
    assert ((maps > 0) <= (relevance > 0)).all()
    assert (maps[:, 1] > 0).sum(-1).max() <= keep
    with torch.no_grad():
        model.head.classifier.weight.zero_()
    torch.testing.assert_close(gradient_relevance(model, **inputs), model(**inputs).relevance)


def test_nothing_of_the_model_changes(inputs):
    model = make_model()
    model.requires_grad_(False)
    before, given = copy.deepcopy(model.state_dict()), dict(inputs)
    with torch.no_grad():
        frozen = gradient_relevance(model, **inputs)
        assert not torch.is_grad_enabled()
    model.requires_grad_(True)
    torch.testing.assert_close(gradient_relevance(model, **inputs), frozen)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.encoder.layers)
    assert inputs == given
    features = {**inputs, "pixel_values": None, "image_features": model.encode_image(inputs["pixel_values"])}
    torch.testing.assert_close(gradient_relevance(model, **features), frozen)
    with pytest.raises(ValueError, match="Give input_ids"):
        gradient_relevance(model, input_ids=inputs["input_ids"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.encoder.layers)
    with pytest.raises(ValueError, match=r"model\.eval"):
        gradient_relevance(model.train(), **inputs)


@pytest.mark.parametrize(
    ("patches", "height", "width", "grid"),
    [
        (196, 224, 224, (14, 14)),
        (25, 20, 20, (5, 5)),
        (1, 20, 20, (1, 1)),
        (98, 112, 224, (7, 14)),
        (98, 224, 112, (14, 7)),
        (35, 20, 28, (5, 7)),
        (60, 96, 167, (6, 10)),  # patches of 16: a rest of 7 pixels is left out
        (66, 96, 167, (6, 11)),  # strides of 16: a rest of 7 pixels has its own
        (7, 3, 600, (1, 7)),
    ],
)
def test_grids(patches, height, width, grid):
    assert patch_grid(patches, height, width) == grid


@pytest.mark.parametrize(("patches", "height", "width"), [(197, 224, 224), (6, 224, 224), (7, 20, 20), (0, 20, 20)])
def test_no_grid(patches, height, width):
    with pytest.raises(ValueError, match=f"{patches} patches make no grid"):
        patch_grid(patches, height, width)
