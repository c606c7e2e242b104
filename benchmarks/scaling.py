"""What training should cost on eight GPUs, and on eight machines of eight: an estimate, from counted operations.

    python benchmarks/scaling.py

Operations and parameters are counted on the models themselves; speeds are published, and the share of them that is
reached is assumed. Prints Markdown; docs/scaling.md says what stands behind it.
"""

import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MACHINES, GPUS_A_MACHINE = 8, 8
UTILIZATION = 0.3  # of the published peak: assumed
CORES_A_GPU, IMAGES_A_CORE = 16, 100  # decoded and resized in a second: assumed
GRADIENT_BYTES = 4  # float32, as the weights that autocast keeps


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense bfloat16 operations a second; bytes a second, each way, of NVLink, and of the network
    adapter that each GPU of a DGX has."""

    name: str
    peak: float
    nvlink: float
    network: float


GPUS = (Gpu("A100", 312e12, 300e9, 25e9), Gpu("H100", 989e12, 450e9, 50e9))


@dataclass(frozen=True)
class Workload:
    """A model on a data set.

    Args:
        name: of both.
        samples: in an epoch.
        images: decoded in an epoch.
        batch_size: samples a step on each GPU.
        parameters: that learn.
        operations: forward and backward, for one sample.
    """

    name: str
    samples: int
    images: int
    batch_size: int
    parameters: float
    operations: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, samples a second of all GPUs, seconds of an epoch; efficiency is time that is not spent on
    exchanging gradients; `bound` is what limits."""

    compute: float
    exchange: float
    decode: float
    samples_per_second: float
    epoch: float
    efficiency: float
    bound: str


def all_reduce_seconds(number_of_bytes: float, gpus: int, bandwidth: float) -> float:
    """A ring passes each byte 2 (n - 1) / n times through the slowest of its links."""
    return 2 * (gpus - 1) / gpus * number_of_bytes / bandwidth


def estimate(workload: Workload, gpu: Gpu, machines: int) -> Estimate:
    """Of a step in which nothing of the exchange is hidden behind the backward pass, and decoding is behind all."""
    gpus = machines * GPUS_A_MACHINE
    compute = workload.batch_size * workload.operations / (gpu.peak * UTILIZATION)
    bandwidth = gpu.nvlink if machines == 1 else gpu.network
    exchange = all_reduce_seconds(workload.parameters * GRADIENT_BYTES, gpus, bandwidth)
    images = workload.batch_size * workload.images / workload.samples
    decode = images / (CORES_A_GPU * IMAGES_A_CORE)
    step = max(compute + exchange, decode)
    speed = gpus * workload.batch_size / step
    bound = "decoding" if decode == step else "computing" if compute >= exchange else "network"
    return Estimate(compute, exchange, decode, speed, workload.samples / speed, compute / (compute + exchange), bound)


def count_operations(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    """Floating-point operations of forward and backward, two for a multiplication with its addition.

    Backward is taken for twice forward: the counter takes convolutions of single channels for dense ones there.
    """
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return 3 * counter.get_total_flops()


def workloads() -> list[Workload]:
    """The three of docs/scaling.md, counted on the shipped presets."""
    from regard.configuration.configuration_qavit import QAViTConfig
    from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
    from regard.modeling.modeling_qavit import QAViTForImageClassification
    from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel

    questions, images = 443_757, 82_783
    together = round(questions / images)  # an image is encoded once for its questions
    classifier = QAViTForImageClassification(QAViTConfig.from_preset("tiny", num_labels=1000))
    side = classifier.config.image_size
    classified = count_operations(classifier, pixel_values=torch.zeros(1, 3, side, side))
    answerer = QueryConditionedVQAModel(QueryConditionedVQAConfig.from_preset("base", num_labels=3000))
    side = answerer.config.image_size
    asked = count_operations(
        answerer,
        pixel_values=torch.zeros(1, 3, side, side),
        input_ids=torch.ones(together, 14, dtype=torch.long),
        image_index=torch.zeros(together, dtype=torch.long),
    )
    return [
        # Trained parameters and operations: docs/counting_with_qwen2_vl.md; adapters around a frozen backbone.
        Workload("SequentialAttentionCounting, Qwen2-VL-2B, FSC-147", 3_659, 3_659, 4, 23.8e6, 3.8e12),
        Workload("QAViT tiny, ImageNet", 1_281_167, 1_281_167, 256, classifier.num_parameters(), classified),
        Workload(
            "QueryConditionedVQA base, VQA v2", questions, images, 128, answerer.num_parameters(), asked / together
        ),
    ]


def table(rows: list[Workload]) -> str:
    """Markdown."""
    lines = [
        "| training | parameters that learn | operations a sample | bytes of gradients |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.1f} M | {row.operations / 1e9:.1f} G | "
            f"{row.parameters * GRADIENT_BYTES / 1e6:.0f} MB |"
        )
    lines += [
        "",
        "| training | GPUs | batch | compute, ms | exchange, ms | decode, ms | efficiency | samples/s | epoch | by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        for gpu in GPUS:
            for machines in (1, MACHINES):
                found, gpus = estimate(row, gpu, machines), machines * GPUS_A_MACHINE
                lines.append(
                    f"| {row.name} | {gpus} {gpu.name} | {gpus * row.batch_size} | {1e3 * found.compute:.1f} | "
                    f"{1e3 * found.exchange:.1f} | {1e3 * found.decode:.1f} | {found.efficiency:.0%} | "
                    f"{found.samples_per_second:,.0f} | {found.epoch:,.0f} s | {found.bound} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(workloads()))
    sys.exit(0)
