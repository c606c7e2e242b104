"""Trains tiny models of all kinds and tells what came of it: test_launch.py runs this in one process and in two.

    python tests/launched.py [--from OTHER] FOLDER BATCH_SIZE NAME [NAME ...]

The first process writes FOLDER/NAME/result.json, each FOLDER/process-N.json. Under ACCELERATE_USE_FSDP=true, as
`accelerate launch` sets it, weights are sharded. With --from, trainings go on from OTHER/NAME/checkpoint-2, which
then is loaded as the best in FOLDER/NAME/best, and as one that nothing is left to do for in FOLDER/NAME/restored.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_trainer_image_text_slot as slot
import test_trainer_qavit as qavit
import test_trainer_query_conditioned_vqa as vqa
import test_trainer_sequential_attention_counting as counting
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image, ImageDraw
from torch.distributed.tensor import DTensor

from regard.processes import end_process_group
from regard.train_counting import add_adapters

Rows = list[dict[str, Any]]


def one_object(number: int) -> dict[str, Any]:
    """A square with all the cells around it; or none, in a third of the images."""
    x, y, color = 12 + number % 2 * 8, 12 + number // 2 % 2 * 8, ("red", "blue")[number // 4]
    image = Image.new("RGB", (32, 32), "white")
    row: dict[str, Any] = {"pixel_values": image, "image_id": str(number), "category": color, "points": []}
    if number % 3:
        ImageDraw.Draw(image).rectangle((x - 3, y - 3, x + 2, y + 2), fill=color)
        row["points"].append([x, y])
    return row


def some_boxes() -> Rows:
    """Questions about four images; nobody knows what to look at in the third."""
    rows = vqa.make_rows(4)
    for row in rows[4:6]:
        row["boxes"] = []
    return rows


def with_adapters(folder: Path, **arguments: Any) -> Any:
    """A trainer of adapters and of modules of their own."""
    trainer = counting.make_trainer(folder, **arguments)
    torch.manual_seed(0)  # the trainer has drawn other numbers in each process
    model: Any = add_adapters(trainer.model, 2, None, (".*q_proj",))
    return counting.AlternatingCountTrainer(
        model, trainer.args, counting.make_processor(), eval_dataset=trainer.eval_dataset
    )


# Of each trainer what makes it, the rows, and the settings that leave nothing to chance. Processes have unlike numbers
# of characters, objects and boxes, over which the losses are means.
KINDS: dict[str, tuple[Callable[..., Any], Rows, dict[str, Any]]] = {
    "image_text_slot": (
        slot.make_trainer,
        [slot.row(text) for text in ("a", "to", "stop", "potters", "opts", "p", "stoppers", "it")],
        {"logged_readings": 1},
    ),
    "qavit": (qavit.make_trainer, qavit.make_rows(8), {"ema_decay": 0.5, **qavit.PLAIN}),
    "qavit_without_average": (qavit.make_trainer, qavit.make_rows(8), {"ema_decay": 0.0, **qavit.PLAIN}),
    "query_conditioned_vqa": (vqa.make_trainer, some_boxes(), {}),
    "sequential_attention_counting": (
        counting.make_trainer,
        [one_object(number) for number in range(8)],
        {"point_jitter": 0.0, "double_points": 0.0, "logged_counts": 1},
    ),
    "muon": (vqa.make_trainer, some_boxes(), {"muon_learning_rate": 1e-3}),
    "adapters": (with_adapters, [one_object(number) for number in range(8)], {"logged_counts": 0}),
}


def make(name: str, folder: Path, batch_size: int, **changes: Any) -> Any:
    """A trainer of three steps."""
    make_trainer, rows, settings = KINDS[name]
    trainer = make_trainer(
        folder,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=False,
        report_to="tensorboard",
        eval_steps=3,
        **{"eval_strategy": "steps", **settings, **changes},
    )
    trainer.train_dataset, trainer.eval_dataset = rows, rows[:7]
    return trainer


def rows_read(trainer: Any, shards: int) -> list[int]:
    """Which of eight rows of a stream this process reads in an epoch."""
    trainer.train_dataset = Dataset.from_dict({"row": range(8)}).to_iterable_dataset(num_shards=shards)
    trainer.data_collator = lambda rows: {"row": torch.tensor([row["row"] for row in rows])}
    return torch.cat([batch["row"] for batch in trainer.get_train_dataloader()]).tolist()


def shard_on_cpus() -> None:
    """Let accelerate shard where there are no GPUs, in place of which it quietly falls back to DDP."""
    initialize = AcceleratorState.__init__

    def initialize_as_on_gpus(self, *args, **kwargs):
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    AcceleratorState.__init__ = initialize_as_on_gpus


def resume(other: str, folder: str, size: str, *names: str) -> None:
    for name in names:
        trainer = make(name, Path(folder, name), int(size), eval_strategy="no")
        checkpoint = str(Path(other, name, "checkpoint-2"))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.state.best_model_checkpoint = checkpoint
        trainer._load_best_model()
        trainer.save_model(str(Path(folder, name, "best")))
        trainer = make(name, Path(folder, name), int(size), eval_strategy="no")
        trainer.restore(checkpoint)
        trainer.save_model(str(Path(folder, name, "restored")))


def main(folder: str, size: str, *names: str) -> None:
    state, batch_size, own = PartialState(), int(size), {}
    for name in names:
        trainer = make(name, Path(folder, name), batch_size, per_device_eval_batch_size=batch_size // 2)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.args.per_device_eval_batch_size = batch_size
        again = trainer.evaluate()
        if state.is_main_process:
            sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            result = {"sharded": sharded, "log": trainer.state.log_history, "larger_batches": again}
            Path(folder, name, "result.json").write_text(json.dumps(result))
        own[name] = {"noise": torch.rand(()).item()}
    if "query_conditioned_vqa" in names:
        trainer = make("query_conditioned_vqa", Path(folder, "stream"), batch_size, eval_strategy="no")
        trainer.train_dataset = Dataset.from_list(trainer.train_dataset).to_iterable_dataset()
        trainer.train()
        own["stream"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        own["rows"] = {shards: rows_read(trainer, shards) for shards in (1, 4)}
        ones = torch.ones(2)
        own["means"] = trainer._means({"both": ones} | ({} if state.is_main_process else {"last": 5 * ones}))
    Path(folder, f"process-{state.process_index}.json").write_text(json.dumps(own))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    if sys.argv[1] == "--from":
        resume(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
    end_process_group()
