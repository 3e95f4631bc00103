"""Predicted times of the kernels of a step, without the GPU: from their launches and compiled code.

The launches are the package's own, recorded with tensors that have no memory, so that tiles, grids,
chunks and splits are what a call would get. The time of a kernel is the longest of

- its products over the matrix unit's rate,
- its accesses to shared memory, bank conflicts included, and the instructions it issues in its main
  loop, each over the multiprocessors that its last wave leaves busy,
- its bytes from and to device memory over the bandwidth; G and the partials of d_x count where a
  chunk of G takes more than half of the L2 cache,
- its bytes between L2 and multiprocessors, over the two rates of `Chip.l2_rates`,

and, where a program fills a multiprocessor, so that nothing hides it, of each tile the instructions
around its loop, if it has one, and `ROUND` seconds until its first operands are there. Kernels
without a product take `ROUND` seconds for each load that waits for another. A step takes no less
than `LAUNCH` seconds on the host for each launch. Of loops without a known count and of branches
not taken nothing is known: every instruction of a kernel counts once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget

from benchmarks import kernels, launches, roofline
from benchmarks.launches import Launch, Operands
from benchmarks.shapes import Shape
from benchmarks.traffic import Traffic, cdiv, traffic
from fused_margin._triton import planning
from fused_margin._triton.tiles import Tiles

LAUNCH = 30e-6  # s of the host for one, Python included
ROUND = 0.7e-6  # s from a load of device memory to its use
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of a warp in a cycle
ARCHITECTURES = {"H100 SXM": "sm_90", "H200": "sm_90"}
LIMITS = ("matrix unit", "shared memory", "issue", "latency", "device memory", "L2")


@dataclass
class Prediction:
    """All launches of one kernel.

    Attributes:
        seconds: by L2 rate.
        parts: seconds that each of `LIMITS` takes by itself, L2 at the lower rate; latency is that
            of loads which wait for each other.
        around: of them, seconds that nothing hides.
        floor: seconds of its products and its device memory at least.
    """

    launches: float = 0.0
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    floor: float = 0.0
    around: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))
    seconds: dict[float, float] = field(default_factory=dict)

    def add(self, other: Prediction) -> None:
        """Count other launches in."""
        self.launches += other.launches
        self.l2_bytes += other.l2_bytes
        self.memory_bytes += other.memory_bytes
        self.floor += other.floor
        self.around += other.around
        for name, value in other.parts.items():
            self.parts[name] += value
        for rate, value in other.seconds.items():
            self.seconds[rate] = self.seconds.get(rate, 0.0) + value

    def limit(self) -> str:
        """What takes longest, and the share of what nothing hides."""
        name = max(self.parts, key=lambda part: self.parts[part])
        longest = max(self.seconds.values())
        return f"{name}; {self.around / longest:.0%} around the loop" if self.around else name


@dataclass(frozen=True)
class Step:
    """What is predicted for a step.

    Attributes:
        kernels: by name and variant, in the order of the launches.
        host: seconds of the host.
    """

    kernels: Mapping[str, Prediction]
    host: float

    def total(self, rate: float) -> float:
        """Seconds with an L2 rate."""
        device = sum(kernel.seconds[rate] for kernel in self.kernels.values())
        return max(device, self.host)


def _one(launch: Launch, row: kernels.Row, operand: str, device: roofline.Device) -> Prediction:
    """A single launch."""
    chip, moved = device.chip, traffic(launch)
    assert chip is not None
    programs_at_once = max(1, round(row.occupancy * chip.warps / row.warps)) * chip.processors
    waves = cdiv(moved.programs, programs_at_once)
    # the share of the multiprocessors' time; a few programs spread out
    places = chip.processors if waves == 1 else waves * programs_at_once
    busy = min(1.0, moved.programs / places)
    cycle = 1.0 / (chip.clock * chip.processors * busy)
    issue = row.warps / SCHEDULERS * cycle
    parts: dict[str, float] = {
        "matrix unit": moved.flops / device.rate(operand) / busy if moved.flops else 0.0,
        "shared memory": moved.steps * row.shared_cycles * cycle,
        "issue": moved.steps * row.instructions * issue,
        "latency": moved.rounds * ROUND,
        "device memory": _memory(moved, chip) / device.bandwidth,
    }
    instructions = moved.tiles * row.around * issue
    fills = programs_at_once == chip.processors
    around = moved.tiles / programs_at_once * ROUND if fills else 0.0
    if fills and moved.steps:
        around += instructions
    else:
        parts["issue"] += instructions
    seconds = {rate: max(*parts.values(), moved.l2_bytes / rate) + around for rate in chip.l2_rates}
    parts["L2"] = moved.l2_bytes / min(chip.l2_rates)
    floor = max(
        moved.flops / device.rate(operand) if moved.flops else 0.0,
        moved.memory_bytes / device.bandwidth,
    )
    return Prediction(1.0, moved.l2_bytes, _memory(moved, chip), floor, around, parts, seconds)


def _memory(moved: Traffic, chip: roofline.Chip) -> float:
    is_large = moved.scratch_bytes > chip.l2_bytes / 2
    return moved.memory_bytes + (moved.scratch_bytes if is_large else 0.0)


def _operands(dtypes: roofline.Dtypes) -> Operands:
    autocast = None if dtypes.compute is dtypes.x else dtypes.compute
    return Operands(dtypes.x, dtypes.w, dtypes.operand != "ieee", autocast)


class Predictor:
    """Predicts steps on a device; compiles each kernel once.

    Args:
        device: one of `roofline.DEVICES` with a chip.
        pointers: have the package read all matrices by pointers, none by descriptors.
        tiles: those to use; the package's own if None.
    """

    def __init__(
        self, device: roofline.Device, *, pointers: bool = False, tiles: Tiles | None = None
    ) -> None:
        self.device, self.pointers, self.tiles = device, pointers, tiles
        self.architecture = ARCHITECTURES[device.name]
        self._rows: dict[str, kernels.Row] = {}

    def choice(self, shape: Shape, dtypes: roofline.Dtypes) -> str:
        """The strategy that the package takes where it may keep nothing on top."""
        given = _operands(dtypes)
        target = kernels.TARGETS[self.architecture]
        chosen = launches.plan_for(target, given.x, given.w, given.compute, given.lowers)
        sizes = (shape.num_rows, shape.num_classes, shape.dim)
        strategy = planning.strategy_for(*sizes, chosen.tiles, kept_bytes=1, budget=0)
        x = torch.empty(shape.num_rows, shape.dim, dtype=given.x, device="meta")
        w = torch.empty(shape.num_classes, shape.dim, dtype=given.w, device="meta")
        return "lent" if planning.is_lent(x, w, roofline.SCALE, chosen, 0) else strategy

    def step(self, shape: Shape, dtypes: roofline.Dtypes, strategy: str) -> Step:
        """Predict forward and backward of a strategy."""
        target: GPUTarget = kernels.TARGETS[self.architecture]
        operands = _operands(dtypes)
        recorded = launches.recorded(target, operands.lowers, not self.pointers, self.tiles)
        with recorded as found, planning.override(strategy):
            launches.step(shape.num_rows, shape.num_classes, shape.dim, operands)
        each: dict[str, Prediction] = {}
        for launch in found:
            name = launches.variant(launch)
            of_products = name.startswith(("weight", "embeddings", "fused", "lent_weight"))
            operand = "tf32" if dtypes.operand == "fp16" and of_products else dtypes.operand
            one = _one(launch, self._row(launch, name, target, dtypes), operand, self.device)
            each.setdefault(name, Prediction()).add(one)
        return Step(each, LAUNCH * len(found))

    def _row(
        self, launch: Launch, name: str, target: GPUTarget, dtypes: roofline.Dtypes
    ) -> kernels.Row:
        key = launches.key(launch, target)
        if key not in self._rows:
            dim = 0  # of no interest
            self._rows[key] = kernels.compile_row(
                launch, name, self.architecture, dtypes.operand, dim
            )
        return self._rows[key]


def table(step: Step, device: roofline.Device, name: str) -> str:
    """Format a step for people."""
    assert device.chip is not None
    slow, fast = device.chip.l2_rates
    heads = (("launches", 9), ("L2 GB", 8), ("mem. GB", 8))
    heads += tuple((f"{limit.split()[0]} ms", 11) for limit in LIMITS)
    heads += (("floor ms", 9), (f"{fast / 1e12:g} TB/s", 9), (f"{slow / 1e12:g} TB/s", 9))
    lines = [
        f"{name}: predicted ms of each kernel, by the rate between L2 and multiprocessors",
        " " * 34 + "".join(f"{head:>{width}}" for head, width in heads) + "  bound by",
    ]
    for kernel, one in step.kernels.items():
        figures = (*one.parts.values(), one.floor, one.seconds[fast], one.seconds[slow])
        lines.append(
            f"{kernel:34}{one.launches:9.0f}{one.l2_bytes / 1e9:8.2f}{one.memory_bytes / 1e9:8.2f}"
            + "".join(
                f"{1e3 * value:{width}.3f}"
                for value, (_, width) in zip(figures, heads[3:], strict=True)
            )
            + f"  {one.limit()}"
        )
    floor = sum(one.floor for one in step.kernels.values())
    lines.append(
        f"{'total':34}{sum(one.launches for one in step.kernels.values()):9.0f}{'':82}"
        f"{1e3 * floor:9.3f}{1e3 * step.total(fast):9.3f}{1e3 * step.total(slow):9.3f}"
        f"  host {1e3 * step.host:.2f} ms"
    )
    return "\n".join(lines)
