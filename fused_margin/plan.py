"""Memory, communication and time of a step with classes split over GPUs, before renting them.

    python -m fused_margin.plan --classes 1e8 --dim 512 --gpus 64 --gpu-memory 80

Formulas of `docs/scaling.md`: memory and bytes are checked against what ranks on CPUs measure;
times follow from the rates that are given, whose defaults are an H100's.
"""

from __future__ import annotations

import argparse
import decimal
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fused_margin import _validate, _validate_shards
from fused_margin.distributed import bytes_per_step

STATES = {"sgd": 0, "momentum": 1, "adam": 2}  # numbers for each weight
# as many that a step makes for a while: torch's, with foreach, its default on GPUs; and of sampled
# rows RowSparseSGD's and RowSparseAdam's
COPIED = {"sgd": 0, "momentum": 0, "adam": 1}
COPIED_ROWS = {"sgd": 0, "momentum": 1, "adam": 5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS = ("fp32", "bf16")  # the optimiser's state has their dtype, the gradient too
CHUNK = 64 << 20  # of the kernels: the gradient of the cosines of some classes
PARTIAL = 64 << 20  # and partial sums of d_x, or one if that is more
BLOCK = 64 << 20  # of the gradient, where it is used up by blocks
ROUNDED = 5  # as much again that rounds a block to bf16: weights, momentum, random bits, in fp32
TARGETS = 24  # bytes of each number of the embeddings, in which a target's nearest centre is found
ROUNDS = 9  # of R - 1 hops in a step: four gathers, two all-reduces of two, a reduce-scatter
PASSES = {"sgd": 3, "momentum": 5, "adam": 7}  # over the weights, of an optimiser's step
DRAWN = 32  # bytes for each class of a shard, to draw a sample of them; gone over ten times
SAMPLED = 0.1  # the rate that is suggested
MOST_GPUS = 1 << 16
LARGEST = 2**63 - 1  # numbers of a tensor


class Setting(NamedTuple):
    """What is to be trained, and on what.

    Attributes:
        classes: C. dim: D. gpus: R, over which the classes are split. rows: of each GPU, n.
        optimizer: of `STATES`. embeddings: of `DTYPES`.
        rate: of the classes that take part in a step.
        in_backward: whether `SGDInBackward` updates the class weights. weights: of `WEIGHTS`.
        gpu_memory: bytes of a GPU, of which ``reserved`` are for the backbone.
        network: bytes a second that a GPU sends. latency: seconds of one hop of a collective.
        products: flops a second. memory_rate: bytes a second.
        sub_centers: K, rows of weights for each class.
        copies: of each shard, by a mesh of data x classes with ``copies * gpus`` GPUs.
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
    copies: int = 1

    @property
    def shard(self) -> int:
        """Classes of the GPU with most of them."""
        return math.ceil(self.classes / self.gpus)

    @property
    def is_sampled(self) -> bool:
        """Whether a part of the classes takes part in a step."""
        return self.rate < 1.0

    @property
    def taken(self) -> int:
        """Classes of a shard that take part in a step; the positives at least."""
        if not self.is_sampled:
            return self.shard
        return min(self.shard, max(int(self.rate * self.shard), self.rows))


class Plan(NamedTuple):
    """Of one GPU: bytes by what they hold, bytes sent in a step, seconds by what takes them."""

    memory: dict[str, int]
    sent: int
    seconds: dict[str, float]


def refusal(setting: Setting) -> str | None:
    """Why the package doesn't train so, with the remedy; None if it does."""
    if setting.classes * setting.sub_centers * setting.dim > LARGEST:
        return (
            f"{setting.classes:,} classes x {setting.sub_centers} x {setting.dim:,} are more"
            " numbers than a tensor can have, 2^63 - 1; give fewer --classes or a smaller --dim"
        )
    if setting.in_backward and setting.optimizer == "adam":
        return (
            "--in-backward is SGD, with or without momentum, not adam; give --optimizer momentum,"
            " or leave --in-backward"
        )
    if setting.in_backward and setting.is_sampled:
        return "--in-backward updates all classes; leave --rate, or leave --in-backward for it"
    if setting.in_backward and setting.copies > 1:
        return (
            "--in-backward can't average the gradients of copies; leave --copies, and split the"
            " classes over all GPUs, or leave --in-backward"
        )
    if setting.weights == "bf16" and not setting.in_backward:
        return (
            "--weights bf16 needs --in-backward: other optimisers round to nearest, and lose small"
            " updates"
        )
    if setting.weights == "bf16" and setting.embeddings != "bf16":
        return (
            f"--weights bf16 needs --embeddings bf16, got {setting.embeddings}: a loss takes"
            " weights in fp32, or in the dtype of the embeddings"
        )
    if setting.is_sampled and setting.sub_centers > 1:
        return "sampled negatives can't be had with sub-centres; leave --rate, or --sub-centers"
    if setting.is_sampled and setting.copies > 1:
        return (
            "sampled negatives can't be had with copies, which would sample other classes; leave"
            " --copies, and split the classes over all GPUs, or leave --rate"
        )
    try:
        rows = setting.classes * setting.sub_centers
        _validate_shards.whole_classes(rows, setting.gpus, setting.sub_centers)
    except ValueError as error:
        return str(error)
    return None


def plan(setting: Setting) -> Plan:
    """What a GPU needs, by the formulas of docs/scaling.md.

    Raises:
        TypeError: a number is none.
        ValueError: a number or a name is out of range, or the package doesn't train so.
    """
    _checked(setting)
    _validate_shards.can_be_planned(refusal(setting))
    return _planned(setting)


def _checked(setting: Setting) -> None:
    """Check the numbers and names of a setting that isn't from the command line."""
    for name in ("classes", "dim", "gpus", "rows", "sub_centers", "copies"):
        _validate.size(name, getattr(setting, name), 2 if name == "classes" else 1)
    for name, names in (("optimizer", STATES), ("embeddings", DTYPES), ("weights", WEIGHTS)):
        _validate.choice(name, getattr(setting, name), tuple(names))
    for name in ("gpu_memory", "network", "products", "memory_rate"):
        _validate.positive(name, getattr(setting, name))
    for name in ("reserved", "latency"):
        _validate.between(name, getattr(setting, name), 0.0, _validate.LARGEST_SCALE)
    _validate.positive("rate", setting.rate)
    _validate.between("rate", setting.rate, 0.0, 1.0)


def _planned(setting: Setting) -> Plan:
    row = setting.sub_centers * setting.dim * DTYPES[setting.weights].itemsize  # of a class
    dtype = DTYPES[setting.embeddings]
    num_rows = setting.rows * setting.gpus
    numbers = num_rows * setting.dim
    state = setting.shard * row * STATES[setting.optimizer]
    if setting.is_sampled and setting.optimizer == "adam":
        state += 4 * setting.shard  # how often each class was updated
    if setting.in_backward:
        gradient, copied = BLOCK, ROUNDED * BLOCK if setting.weights == "bf16" else 0
    else:
        gradient = setting.taken * row
        copies = (COPIED_ROWS if setting.is_sampled else COPIED)[setting.optimizer]
        # the mean over copies is made of a copy
        copied = gradient * max(copies, 1 if setting.copies > 1 else 0)
    memory = {
        "class weights": setting.shard * row,
        "optimiser state": state,
        "gradient": gradient,
        "copies during a step": copied,
        "a permutation of classes": DRAWN * setting.shard if setting.is_sampled else 0,
        "all embeddings, gradient": 3 * numbers * dtype.itemsize,
        "targets' nearest centres": TARGETS * numbers if setting.sub_centers > 1 else 0,
        "inverse norms": setting.taken * setting.sub_centers * 4,
        "kernels": CHUNK + max(PARTIAL, 4 * numbers),
    }
    sent = bytes_per_step(setting.rows, setting.dim, setting.gpus, dtype)
    averaged = 2 * (setting.copies - 1) * gradient // setting.copies
    flops = 8 * num_rows * setting.taken * setting.sub_centers * setting.dim
    hops = ROUNDS * (setting.gpus - 1) + 2 * (setting.copies - 1)
    seconds = {
        "products": flops / setting.products,
        "optimiser": PASSES[setting.optimizer] * setting.taken * row / setting.memory_rate,
        "sampling": 10 * DRAWN * setting.shard / setting.memory_rate if setting.is_sampled else 0.0,
        "sending": sent / setting.network,
        "averaging copies": averaged / setting.network,
        "latency": hops * setting.latency,
    }
    return Plan(memory, sent + averaged, seconds)


def available(setting: Setting) -> float:
    """Bytes that the class weights and what belongs to them may take."""
    return setting.gpu_memory - setting.reserved


def fits(setting: Setting) -> bool:
    """Whether the memory suffices."""
    return sum(_planned(setting).memory.values()) <= available(setting)


def seconds(setting: Setting) -> float:
    """Of a step, of which nothing overlaps."""
    return sum(_planned(setting).seconds.values())


def fewest_gpus(setting: Setting) -> int | None:
    """The least number of GPUs over which the classes can be split so that it fits.

    None up to `MOST_GPUS`.
    """
    # gathered rows grow with the GPUs, so that the largest number needn't do
    powers = (1 << exponent for exponent in range(MOST_GPUS.bit_length()))
    high = next((count for count in powers if fits(setting._replace(gpus=count))), None)
    if high is None:
        return None
    low = high // 2 + 1
    while low < high:  # what is sharded shrinks faster than gathered rows grow, at the sizes met
        middle = (low + high) // 2
        low, high = (low, middle) if fits(setting._replace(gpus=middle)) else (middle + 1, high)
    several = (setting._replace(gpus=count) for count in range(low, MOST_GPUS + 1))
    # of sub-centres no class may be cut
    return next((one.gpus for one in several if refusal(one) is None and fits(one)), None)


class Advice(NamedTuple):
    """A sentence, and the setting that it leads to.

    Attributes:
        gain: of that setting: ``"fits"``; ``"time"``, a step is shorter; ``"time of a row"``.
    """

    said: str
    setting: Setting | None = None
    gain: str = ""


def advice(setting: Setting) -> list[Advice]:
    """What to turn on: each of it goes with all else that is set, or says what to leave out."""
    said = [] if fits(setting) else list(_to_fit(setting))
    said += _to_be_faster(setting)
    return said or [Advice("It fits as it is.")]


def _to_fit(setting: Setting) -> Iterator[Advice]:
    yield Advice("It doesn't fit.")
    if available(setting) <= 0:
        yield Advice(
            f"Of {_size(setting.gpu_memory)} a GPU {_size(setting.reserved)} are reserved for the"
            " model, which leaves nothing: set --reserved to what that takes."
        )
        return
    count = fewest_gpus(setting)
    if count is not None:
        of_each = ", of each copy" if setting.copies > 1 else ""
        found = setting._replace(gpus=count)
        yield Advice(f"It fits on {count:,} GPUs{of_each}.", found, "fits")
    is_adam = setting.optimizer == "adam"
    with_momentum = setting._replace(optimizer="momentum")
    if is_adam and fits(with_momentum):
        yield Advice(
            "It fits with SGD and momentum, one state for each weight less than Adam's:"
            f" {_options(setting, with_momentum)}.",
            with_momentum, "fits",
        )  # fmt: skip
    yield from _in_backward(setting)
    sampled = _sampled(setting)
    if sampled is not None and fits(sampled):
        kind = "RowSparseAdam" if is_adam else "RowSparseSGD"
        yield Advice(
            f"It fits with sampled negatives, sample_negatives(criterion, {SAMPLED}) and fm.optim."
            f"{kind}: {_options(setting, sampled)}. The gradient has the sampled rows only.",
            sampled, "fits",
        )  # fmt: skip


def _all_gpus(setting: Setting) -> Setting:
    """The classes split over all GPUs, without copies."""
    return setting._replace(gpus=setting.gpus * setting.copies, copies=1)


def _sampled(setting: Setting) -> Setting | None:
    """The same with sampled negatives, and without what these can't be had with."""
    found = _all_gpus(setting)._replace(rate=SAMPLED, in_backward=False, weights="fp32")
    return None if setting.is_sampled or refusal(found) is not None else found


def _in_backward(setting: Setting) -> Iterator[Advice]:
    """Whether it would fit without a gradient, or with weights in bf16 besides."""
    optimizer = "sgd" if setting.optimizer == "sgd" else "momentum"
    without = _all_gpus(setting)._replace(in_backward=True, rate=1.0, optimizer=optimizer)
    in_half = without._replace(weights="bf16", embeddings="bf16")
    other = ""
    if setting.optimizer == "adam":
        other = ", which is SGD with momentum, another optimiser than Adam with another lr"
    said = f"the optimiser in the backward, fm.optim.SGDInBackward{other}"
    if not setting.in_backward and refusal(without) is None and fits(without):
        yield Advice(
            f"It fits with {said}: {_options(setting, without)}. There is no gradient then.",
            without, "fits",
        )  # fmt: skip
    elif setting.weights != "bf16" and refusal(in_half) is None and fits(in_half):
        yield Advice(
            f"It fits with weights in bf16 and {said}: {_options(setting, in_half)}. That is half"
            " the bytes, and no gradient.",
            in_half, "fits",
        )  # fmt: skip


def _to_be_faster(setting: Setting) -> Iterator[Advice]:
    times, now = _planned(setting).seconds, seconds(setting)
    sampled = _sampled(setting)
    is_possible = sampled is not None and (fits(sampled) or not fits(setting))
    if times["products"] > 0.05 and sampled is not None and is_possible and seconds(sampled) < now:
        yield Advice(
            f"Products take {1e3 * times['products']:.0f} ms; with sampled negatives the whole step"
            f" would take {1e3 * seconds(sampled):.0f} ms: {_options(setting, sampled)}.",
            sampled, "time",
        )  # fmt: skip
    between = times["sending"] + times["averaging copies"] + times["latency"]
    if between <= 0.5 * now:
        return
    said = (
        f"Communication takes {1e3 * between:.1f} of {1e3 * now:.1f} ms,"
        f" {1e3 * times['latency']:.1f} of it latency"
    )
    meshes = [one for one in _meshes(setting) if fits(one) or not fits(setting)]
    best = min(meshes, key=seconds, default=setting)
    if seconds(best) < now:
        yield Advice(
            f"{said}: split the classes over {best.gpus:,} GPUs in {best.copies:,} copies, a mesh"
            f" of data x classes, {1e3 * seconds(best):.1f} ms: {_options(setting, best)}.",
            best, "time",
        )  # fmt: skip
        return
    more = setting._replace(rows=4 * setting.rows)
    if seconds(more) < 4 * now and (fits(more) or not fits(setting)):
        yield Advice(
            f"{said}: four times the rows on each GPU would take {1e3 * seconds(more):.1f} ms:"
            f" {_options(setting, more)}.",
            more, "time of a row",
        )  # fmt: skip


def _meshes(setting: Setting) -> Iterator[Setting]:
    """As many GPUs with more copies, without what these can't be had with."""
    plain = setting._replace(rate=1.0, in_backward=False, weights="fp32")
    factor = 2
    while setting.gpus % factor == 0:
        found = plain._replace(gpus=setting.gpus // factor, copies=setting.copies * factor)
        if refusal(found) is None:
            yield found
        factor *= 2


def _options(before: Setting, after: Setting) -> str:
    """The command's options that lead from one setting to another."""
    turned_on, left = [], []
    flags = ("gpus", "copies", "rows", "optimizer", "embeddings", "rate", "in_backward", "weights")
    defaults = Setting._field_defaults
    for name in flags:
        value, option = getattr(after, name), f"--{name.replace('_', '-')}"
        if value == getattr(before, name):
            continue
        if name in ("copies", "rate", "in_backward", "weights") and value == defaults[name]:
            left.append(option)
        else:
            turned_on.append(option if value is True else f"{option} {value}")
    parts = [" ".join(turned_on)] if turned_on else []
    parts += [f"without {' and '.join(left)}"] if left else []
    return ", ".join(parts)


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
    copies = "" if setting.copies == 1 else f" in {setting.copies:,} copies"
    title = f"{setting.classes:,} classes x {setting.dim} on {setting.gpus:,} GPUs{copies}"
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
        *(one.said for one in advice(setting)),
    ]
    return "\n".join(lines)


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number, as 100000000 or 1e8."""

    def parse(text: str) -> int:
        try:
            value = decimal.Decimal(text)
        except decimal.InvalidOperation:
            value = decimal.Decimal("nan")
        # first the bounds: of 1e999999999 all digits would be written out
        if not value.is_finite() or not least <= value <= most or value != int(value):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least} to {most:,}, as 1e8, got {text!r}"
            )
        return int(value)

    return parse


def _number(
    least: float, most: float, unit: str, *, has_zero: bool = False
) -> Callable[[str], float]:
    """A number within bounds, which both belong to them, or 0."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most or (has_zero and value == 0)):
            also = "0, or " if has_zero else ""
            raise argparse.ArgumentTypeError(
                f"expected {also}a number from {least:g} to {most:,.0f} {unit}, got {text!r}"
            )
        return value

    return parse


def _rate(text: str) -> float:
    """A part of the classes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a part of the classes, above 0 and at most 1 (all of them), got {text!r}"
        )
    return value


def parse_arguments(arguments: list[str] | None) -> Setting:
    """The setting that a command line asks for."""
    default = Setting(2, 1, 1)
    parser = argparse.ArgumentParser(
        prog="python -m fused_margin.plan", description=(__doc__ or "").partition("\n")[0]
    )
    gpus = _whole(1, MOST_GPUS)
    parser.add_argument("--classes", type=_whole(2, 10**15), required=True, help="C, as 1e8")
    parser.add_argument("--dim", type=_whole(1, 10**6), required=True, help="D, the embedding size")
    parser.add_argument("--gpus", type=gpus, required=True, help="R, that split the classes")
    parser.add_argument(
        "--copies", type=gpus, default=1, help="of each shard, a mesh of data x classes"
    )
    parser.add_argument(
        "--rows", type=_whole(1, 10**7), default=default.rows, help="of a GPU (%(default)s)"
    )
    parser.add_argument("--optimizer", choices=STATES, default=default.optimizer)
    parser.add_argument("--embeddings", choices=DTYPES, default=default.embeddings)
    parser.add_argument("--sub-centers", type=_whole(1, 10**4), default=1, help="K of each class")
    parser.add_argument("--rate", type=_rate, default=1.0, help="of sampled classes, up to 1")
    parser.add_argument(
        "--in-backward", action="store_true", help="class weights by fm.optim.SGDInBackward"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=default.weights,
        help="of the classes, and their state (%(default)s); bf16 with --in-backward",
    )  # fmt: skip
    in_gb, size = "GB (%(default)s)", _number(1e-3, 1e6, "GB")
    reserved = _number(1e-3, 1e6, "GB", has_zero=True)
    parser.add_argument("--gpu-memory", type=size, default=80.0, help=in_gb)
    parser.add_argument("--reserved", type=reserved, default=16.0, help=f"for the model, {in_gb}")
    for name, least, most, value, unit, what in (
        ("--network", 1e-3, 1e6, 50.0, "GB/s", ""),
        ("--latency", 1e-3, 1e6, 5.0, "us", " a hop"),
        ("--products", 1e-3, 1e6, 200.0, "TFLOP/s", ""),
        ("--memory-rate", 1e-3, 1e6, 2500.0, "GB/s", ""),
    ):
        kind = _number(least, most, unit, has_zero=name == "--latency")
        parser.add_argument(name, type=kind, default=value, help=f"{unit}{what} (%(default)s)")
    given = parser.parse_args(arguments)
    setting = Setting(
        given.classes, given.dim, given.gpus, given.rows, given.optimizer, given.embeddings,
        given.rate, given.in_backward, given.weights, given.gpu_memory * 1e9,
        given.reserved * 1e9, given.network * 1e9, given.latency * 1e-6, given.products * 1e12,
        given.memory_rate * 1e9, given.sub_centers, given.copies,
    )  # fmt: skip
    reason = refusal(setting)
    if reason is not None:
        parser.error(reason)
    return setting


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; 1 if it doesn't fit."""
    setting = parse_arguments(arguments)
    print(report(setting))
    return 0 if fits(setting) else 1


if __name__ == "__main__":
    sys.exit(main())
