"""What `import regard` and `regard --help` cost, in fresh processes.

    python benchmarks/import_time.py [--runs 5]

Prints the medians, and exits with 1 if a bar is missed: `import regard` at most 1.2 times
`from transformers import ViTModel`, `regard --help` under a second.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "from transformers import ViTModel": ["-c", "from transformers import ViTModel"],
    "import regard": ["-c", "import regard"],
    "regard --help": ["-m", "regard_cli", "--help"],
}
MOST_RATIO, MOST_SECONDS = 1.2, 1.0


def measure(runs: int) -> dict[str, float]:
    """Median seconds of each command; the runs are interleaved, after one that fills the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(runs + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the imports and the help.")
    parser.add_argument("--runs", type=int, default=5)
    medians = measure(parser.parse_args().runs)
    for name, value in medians.items():
        print(f"{value:7.2f} s  {name}")
    ratio = medians["import regard"] / medians["from transformers import ViTModel"]
    print(f"{ratio:7.2f}    import regard / ViTModel (at most {MOST_RATIO})")
    return int(ratio > MOST_RATIO or medians["regard --help"] > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
