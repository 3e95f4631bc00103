"""Memory, communication and time of a step with classes split over GPUs, before renting them.

    python -m fused_margin.plan --classes 1e8 --dim 512 --gpus 64 --gpu-memory 80

Formulas of `docs/scaling.md`: memory and bytes are checked against what ranks on CPUs measure;
times follow from the rates that are given, whose defaults are an H100's.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import NamedTuple

import torch

from fused_margin import _validate_shards
from fused_margin.distributed import bytes_per_step

STATES = {"sgd": 0, "momentum": 1, "adam": 2}  # numbers for each weight
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS = ("fp32", "bf16")  # the optimiser's state has their dtype, the gradient too
WORKSPACE = 128 << 20  # of the kernels: probabilities of a chunk, and partial sums of d_x
BLOCK = 64 << 20  # of the gradient, where it is used up by blocks
COLLECTIVES = 7  # of a step: two gathers, sizes, two all-reduces, slopes, a reduce-scatter
PASSES = {"sgd": 3, "momentum": 5, "adam": 7}  # over the weights, of an optimiser's step
DRAWN = 32  # bytes for each class of a shard, to draw a sample of them; gone over ten times
SAMPLED = 0.1  # the rate that is suggested


class Setting(NamedTuple):
    """What is to be trained, and on what.

    Attributes:
        classes: C. dim: D. gpus: R. rows: of each GPU, n.
        optimizer: of `STATES`. embeddings: of `DTYPES`.
        rate: of the classes that take part in a step.
        in_backward: whether `SGDInBackward` updates the class weights. weights: of `WEIGHTS`.
        gpu_memory: bytes of a GPU, of which ``reserved`` are for the backbone.
        network: bytes a second that a GPU sends. latency: seconds of one hop of a collective.
        products: flops a second. memory_rate: bytes a second.
        sub_centers: K, rows of weights for each class.
    """

    classes: int
    dim: int
    gpus: int
    rows: int = 128
    optimizer: str = "momentum"
    embeddings: str = "bf16"
    rate: float = 1.0
    in_backward: bool = False
    weights: str = "fp32"
    gpu_memory: float = 80e9
    reserved: float = 16e9
    network: float = 50e9
    latency: float = 5e-6
    products: float = 200e12
    memory_rate: float = 2.5e12
    sub_centers: int = 1

    @property
    def shard(self) -> int:
        """Classes of the GPU with most of them."""
        return math.ceil(self.classes / self.gpus)

    @property
    def taken(self) -> int:
        """Of these, those that take part in a step; the positives at least."""
        if self.rate >= 1.0:
            return self.shard
        return min(self.shard, max(int(self.rate * self.shard), self.rows))


class Plan(NamedTuple):
    """Of one GPU: bytes by what they hold, bytes sent in a step, seconds by what takes them."""

    memory: dict[str, int]
    sent: int
    seconds: dict[str, float]


def plan(setting: Setting) -> Plan:
    """What a GPU needs, by the formulas of docs/scaling.md."""
    row = setting.sub_centers * setting.dim * DTYPES[setting.weights].itemsize  # of a class
    dtype = DTYPES[setting.embeddings]
    num_rows = setting.rows * setting.gpus
    is_sampled = setting.taken < setting.shard
    memory = {
        "class weights": setting.shard * row,
        "optimiser state": setting.shard * row * STATES[setting.optimizer],
        "gradient": BLOCK if setting.in_backward else setting.taken * row,
        "a permutation of classes": DRAWN * setting.shard if is_sampled else 0,
        "all embeddings, gradient": num_rows * setting.dim * (dtype.itemsize + 4),
        "inverse norms": setting.taken * setting.sub_centers * 4,
        "kernels": WORKSPACE,
    }
    sent = bytes_per_step(setting.rows, setting.dim, setting.gpus, dtype)
    flops = 8 * num_rows * setting.taken * setting.sub_centers * setting.dim
    hops = COLLECTIVES * (setting.gpus - 1)
    seconds = {
        "products": flops / setting.products,
        "optimiser": PASSES[setting.optimizer] * setting.taken * row / setting.memory_rate,
        "sampling": 10 * DRAWN * setting.shard / setting.memory_rate if is_sampled else 0.0,
        "sending": sent / setting.network,
        "latency": hops * setting.latency,
    }
    return Plan(memory, sent, seconds)


def available(setting: Setting) -> float:
    """Bytes that the class weights and what belongs to them may take."""
    return setting.gpu_memory - setting.reserved


def fits(setting: Setting) -> bool:
    """Whether the memory suffices."""
    return sum(plan(setting).memory.values()) <= available(setting)


def fewest_gpus(setting: Setting) -> int | None:
    """The least number of GPUs on which it fits; None up to 65,536."""
    # gathered rows grow with the GPUs, so that the largest number needn't do
    powers = (1 << exponent for exponent in range(17))
    high = next((count for count in powers if fits(setting._replace(gpus=count))), None)
    if high is None:
        return None
    low = high // 2 + 1
    while low < high:  # what is sharded shrinks faster than gathered rows grow, at the sizes met
        middle = (low + high) // 2
        low, high = (low, middle) if fits(setting._replace(gpus=middle)) else (middle + 1, high)
    return low


def advice(setting: Setting) -> list[str]:
    """What to turn on, one sentence each."""
    found = plan(setting)
    can_sample = setting.rate >= 1.0 and setting.sub_centers == 1
    said = []
    if not fits(setting):
        said.append("It doesn't fit.")
        if available(setting) <= 0:
            said.append(
                f"Of {_size(setting.gpu_memory)} a GPU {_size(setting.reserved)} are reserved for"
                " the model, which leaves nothing: set --reserved to what that takes."
            )
            return said
        count = fewest_gpus(setting)
        if count is not None:
            said.append(f"It fits on {count:,} GPUs.")
        if setting.optimizer == "adam" and fits(setting._replace(optimizer="momentum")):
            said.append("It fits with SGD and momentum, one state for each weight less.")
        said += _in_backward(setting)
        if can_sample and fits(setting._replace(rate=SAMPLED)):
            said.append(
                f"It fits with sampled negatives, sample_negatives(criterion, {SAMPLED}): the"
                " gradient has the sampled rows only."
            )
    times = found.seconds
    if times["products"] > 0.05 and can_sample:
        faster = sum(plan(setting._replace(rate=SAMPLED)).seconds.values())
        said.append(
            f"Products take {1e3 * times['products']:.0f} ms; with sampled negatives at a rate of"
            f" {SAMPLED} the whole step would take {1e3 * faster:.0f} ms."
        )
    if times["sending"] + times["latency"] > 0.5 * sum(times.values()):
        said.append(
            "Sending takes more than half: use fewer GPUs for the classes, and a mesh of copies of"
            " them, data x classes."
        )
    return said or ["It fits as it is."]


def _in_backward(setting: Setting) -> list[str]:
    """Whether it would fit without a gradient, or with weights in bf16 besides."""
    optimizer = "sgd" if setting.optimizer == "sgd" else "momentum"
    without = setting._replace(in_backward=True, rate=1.0, optimizer=optimizer)
    in_half = without._replace(weights="bf16", embeddings="bf16")
    said = "the optimiser in the backward, fm.optim.SGDInBackward:"
    if not setting.in_backward and fits(without):
        return [f"It fits with {said} there is no gradient then."]
    if setting.weights != "bf16" and fits(in_half):
        return [f"It fits with weights in bf16 and {said} half the bytes, and no gradient."]
    return []


def _size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def report(setting: Setting) -> str:
    """The plan as text."""
    found = plan(setting)
    total = sum(found.memory.values())
    limit = f"{_size(setting.gpu_memory)} less {_size(setting.reserved)} reserved"
    title = f"{setting.classes:,} classes x {setting.dim} on {setting.gpus:,} GPUs"
    lines = [
        f"{title}: {setting.shard:,} classes and {setting.rows:,} rows each",
        "",
        "memory of a GPU",
        *(f"  {name:26} {_size(number):>10}" for name, number in found.memory.items() if number),
        f"  {'total':26} {_size(total):>10}  of {limit}",
        "",
        f"sent by a GPU in a step        {_size(found.sent):>10}",
        "",
        "time of a step, ms",
        *(f"  {name:26} {1e3 * number:10.2f}" for name, number in found.seconds.items() if number),
        f"  {'total, nothing overlapped':26} {1e3 * sum(found.seconds.values()):10.2f}",
        "",
        *advice(setting),
    ]
    return "\n".join(lines)


def _count(text: str) -> int:
    """A whole number, as 100000000 or 1e8."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 1 and value == int(value)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, as 1e8, got {text!r}")
    return int(value)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parse_arguments(arguments: list[str] | None) -> Setting:
    """The setting that a command line asks for."""
    default = Setting(2, 1, 1)
    parser = argparse.ArgumentParser(
        prog="python -m fused_margin.plan", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--classes", type=_count, required=True, help="C, as 1e8")
    parser.add_argument("--dim", type=_count, required=True, help="D, the embedding size")
    parser.add_argument("--gpus", type=_count, required=True, help="R")
    parser.add_argument("--rows", type=_count, default=default.rows, help="of a GPU (%(default)s)")
    parser.add_argument("--optimizer", choices=STATES, default=default.optimizer)
    parser.add_argument("--embeddings", choices=DTYPES, default=default.embeddings)
    parser.add_argument("--sub-centers", type=_count, default=1, help="K of each class")
    parser.add_argument("--rate", type=_positive, default=1.0, help="of sampled classes, up to 1")
    parser.add_argument(
        "--in-backward", action="store_true", help="class weights by fm.optim.SGDInBackward"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=default.weights,
        help="of the classes, and their state (%(default)s); bf16 with --in-backward",
    )  # fmt: skip
    in_gb = "GB (%(default)s)"
    parser.add_argument("--gpu-memory", type=_positive, default=80.0, help=in_gb)
    parser.add_argument("--reserved", type=_positive, default=16.0, help=f"for the model, {in_gb}")
    parser.add_argument("--network", type=_positive, default=50.0, help="GB/s (%(default)s)")
    parser.add_argument("--latency", type=_positive, default=5.0, help="us a hop (%(default)s)")
    parser.add_argument("--products", type=_positive, default=200.0, help="TFLOP/s (%(default)s)")
    parser.add_argument("--memory-rate", type=_positive, default=2500.0, help="GB/s (%(default)s)")
    given = parser.parse_args(arguments)
    if given.weights == "bf16" and not given.in_backward:
        parser.error(
            "--weights bf16 needs --in-backward: other optimisers round to nearest, and lose small"
            " updates"
        )
    if given.in_backward and given.rate < 1.0:
        parser.error("--in-backward updates all classes; leave --rate, or use RowSparseSGD with it")
    if given.in_backward and given.optimizer == "adam":
        parser.error("--in-backward is SGD, with or without momentum, not adam")
    if given.sub_centers > 1 and given.rate < 1.0:
        parser.error("sampled negatives can't be had with sub-centres; leave --rate")
    try:
        _validate_shards.whole_classes(
            given.classes * given.sub_centers, given.gpus, given.sub_centers
        )
    except ValueError as error:
        parser.error(str(error))
    return Setting(
        given.classes, given.dim, given.gpus, given.rows, given.optimizer, given.embeddings,
        min(given.rate, 1.0), given.in_backward, given.weights, given.gpu_memory * 1e9,
        given.reserved * 1e9, given.network * 1e9, given.latency * 1e-6, given.products * 1e12,
        given.memory_rate * 1e9, given.sub_centers,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; 1 if it doesn't fit."""
    setting = parse_arguments(arguments)
    print(report(setting))
    return 0 if fits(setting) else 1


if __name__ == "__main__":
    sys.exit(main())
