"""Average the weights of checkpoints that come from one another, and save the model that has them.

    python benchmarks/average_weights.py runs/new=0.5 image-text-slot-5m=0.3 runs/old=0.2 --save FOLDER

Further training with a rate that falls again ends beside where the last one ended, and the mean of such ends is often
better than each (Wortsman et al., 2022, "Model soups"). Which of them, and how much of each, is to be chosen on the
validation split. Configuration and processor are those of the first; the weights are saved in float32.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from regard.cli import complain, quiet_transformers
from regard.hub import CheckpointError, find_verb, load


def share(text: str) -> tuple[str, float]:
    """An argument MODEL=SHARE, or MODEL with a share of 1."""
    model, equals, number = text.rpartition("=")
    try:
        value = float(number) if equals else 1.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=SHARE with a share above 0, such as runs/mine=0.5")
    return model or number, value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=share, metavar="MODEL=SHARE", help="a folder, name or Hub repository")
    parser.add_argument("--save", type=Path, required=True, metavar="FOLDER", help="where the model goes")
    options = parser.parse_args(arguments)
    quiet_transformers()
    total = sum(value for _, value in options.models)
    try:
        verb = find_verb(options.models[0][0])
        loaded = [load(model, verb, "cpu") for model, _ in options.models]
    except CheckpointError as error:
        complain(error)
        return 1
    average, processor = loaded[0]
    first = average.state_dict()
    sums = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
    for (name, value), (model, _) in zip(options.models, loaded, strict=True):
        weights = model.state_dict()
        if {key: tensor.shape for key, tensor in weights.items()} != {key: t.shape for key, t in first.items()}:
            complain(f"{name}: its weights have other names or shapes than those of {options.models[0][0]}")
            return 1
        for key, tensor in weights.items():
            sums[key] += tensor * (value / total)
    average.load_state_dict(sums)
    average.save_pretrained(options.save)
    processor.save_pretrained(options.save)
    print(options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
