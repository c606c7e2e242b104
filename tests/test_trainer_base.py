"""What all trainers share: parameter groups, Muon beside another optimizer, learning rates of their own."""

import copy
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers import get_scheduler

from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.trainers.base import MuonWithOptimizer, RegardTrainer, RegardTrainingArguments


def make_trainer(tmp_path, **arguments) -> Any:
    torch.manual_seed(0)
    model = QueryConditionedVQAModel(QueryConditionedVQAConfig.from_preset("micro", num_labels=4))
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "use_cpu": True, **arguments}
    return RegardTrainer(model, RegardTrainingArguments(output_dir=str(tmp_path), **settings))


def groups_by_name(trainer: RegardTrainer) -> dict[str, dict]:
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, 20, 20, generator=generator),
        "input_ids": torch.randint(4, 80, (4, 6), generator=generator),
        "labels": torch.arange(4),
    }


def steps(trainer: RegardTrainer, optimizer: torch.optim.Optimizer, seeds) -> None:
    for seed in seeds:
        trainer.model(**inputs(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_stock_optimizer_without_other_rates(tmp_path):
    trainer = make_trainer(tmp_path)
    groups = groups_by_name(trainer)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert {group["lr"] for group in groups.values()} == {1e-3}
    assert groups["text_proj.weight"]["weight_decay"] == 0.1
    assert groups["text_proj.bias"]["weight_decay"] == 0


def test_encoders_have_a_rate_of_their_own(tmp_path):
    groups = groups_by_name(make_trainer(tmp_path, backbone_learning_rate=1e-4))
    assert groups.keys() == {name for name, _ in make_trainer(tmp_path).model.named_parameters()}
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(1e-4 if name.startswith(("text_model.", "vision_model.")) else 1e-3), name


def test_muon_takes_the_matrices_of_linear_layers(tmp_path):
    groups = groups_by_name(make_trainer(tmp_path, muon_learning_rate=4e-3, backbone_learning_rate=1e-4))
    assert groups["text_proj.weight"]["use_muon"]
    assert groups["text_proj.weight"]["lr"] == pytest.approx(4e-3)
    assert groups["text_model.encoder.layer.0.attention.self.query.weight"]["lr"] == pytest.approx(4e-4)
    for name in ("text_proj.bias", "head.classifier.weight", "text_model.embeddings.word_embeddings.weight"):
        assert not groups[name]["use_muon"], name


def test_muon_beside_adamw_moves_every_parameter_as_each_would_alone(tmp_path):
    trainer = make_trainer(tmp_path, muon_learning_rate=4e-3)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, MuonWithOptimizer)
    trainer.model(**inputs(0)).loss.backward()
    groups = trainer.parameter_groups(trainer.model)
    alone = {parameter: parameter.detach().clone() for group in groups for parameter in group["params"]}
    optimizer.step()
    for uses_muon, optimizer_class in ((True, torch.optim.Muon), (False, torch.optim.AdamW)):
        copies = {}
        for group in groups:
            if group["use_muon"] is uses_muon:
                for parameter in group["params"]:
                    copy = torch.nn.Parameter(alone[parameter].clone())
                    copy.grad = None if parameter.grad is None else parameter.grad.clone()
                    copies[parameter] = copy, group["weight_decay"]
        for parameter, (copy, weight_decay) in copies.items():
            if uses_muon:
                optimizer_class([copy], lr=4e-3, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw").step()
            else:
                optimizer_class([copy], lr=1e-3, weight_decay=weight_decay).step()
            torch.testing.assert_close(parameter, copy)
            assert copy.grad is None or not torch.equal(copy, alone[parameter])


def test_muon_follows_the_scheduler_and_goes_on_from_its_state(tmp_path):
    trainer = make_trainer(tmp_path, muon_learning_rate=4e-3)
    optimizer = trainer.create_optimizer()
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    steps(trainer, optimizer, [0])
    scheduler.step()
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.00075, 0.003]
    weights, state = copy.deepcopy((trainer.model.state_dict(), optimizer.state_dict()))
    steps(trainer, optimizer, [1, 2])

    again = make_trainer(tmp_path, muon_learning_rate=4e-3)
    resumed = again.create_optimizer()
    again.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    steps(again, resumed, [1, 2])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_rates_under_muon_fall_to_their_share_of_the_least_one(tmp_path):
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    trainer = make_trainer(tmp_path, muon_learning_rate=4e-3, **kwargs)
    scheduler = trainer.create_scheduler(2, trainer.create_optimizer())
    for _ in range(2):
        trainer.optimizer.step()
        scheduler.step()
    assert sorted({round(rate, 9) for rate in scheduler.get_last_lr()}) == [1e-4, 4e-4]


def test_evaluation_leaves_nothing_out(tmp_path):
    trainer = make_trainer(
        tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=3, remove_unused_columns=False
    )
    rows: Any = [{"labels": row} for row in range(7)]
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader(rows)) == 7
    assert trainer.args.dataloader_drop_last


def test_an_evaluation_counts_each_sample_alike(tmp_path):
    rows: Any = [{name: value[row] for name, value in inputs(seed).items()} for seed in (0, 1) for row in range(4)][:7]
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)

    def losses(dataset: Any) -> list[float]:
        metrics = trainer.evaluate(dataset)
        return [metrics["eval_loss"], metrics["eval_loss_answer"]]

    first, second = losses(rows[:4]), losses(rows[4:])
    assert losses(rows) == pytest.approx([(4 * a + 3 * b) / 7 for a, b in zip(first, second, strict=True)])
    assert losses(IterableDataset.from_generator(lambda: iter(rows))) == pytest.approx(losses(rows))
