"""pytest-benchmark cases on the named shapes that fit a CPU: `make bench`.

Cases of one problem do the same work on the same data. All contenders of a problem are gated, then
timed in interleaved rounds before its first case; each case then hands its own samples to
pytest-benchmark, whose timer here is a clock that those samples advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness, memory
from benchmarks.baselines import EVERYONE, LOSSES, MODES, BareProducts, bind, make_problem
from benchmarks.shapes import CPU_SHAPES, SHAPES

WORKS = ("forward", "step")
KEYS = tuple(key for key in EVERYONE if key != "lce_default")  # one row a chunk takes minutes
UNDER_AUTOCAST = ("ours", "careful", "compiled")
LARGE = 10**9  # N x C x D above which a step takes a good part of a second
ROUNDS = (5, 25)  # at least and at most
SECONDS = {"forward": 4.0, "step": 8.0}  # of timing all contenders, where that many rounds fit
WITH_PEAKS = "ms1m-arcface-fp32"  # takes one more process for each contender


def is_large(shape: str) -> bool:
    sizes = SHAPES[shape]
    return sizes.num_rows * sizes.num_classes * sizes.dim > LARGE


def contenders_of(shape: str, loss: str, mode: str) -> tuple[str, ...]:
    """Keys of those that are measured on a problem; fewer where minutes would be spent on them."""
    is_main = loss == "arcface" or mode == "fp32"
    if is_large(shape) and not is_main:
        return ()
    if mode == "autocast":
        keys = UNDER_AUTOCAST
    elif is_large(shape) and mode != "fp32":
        keys = tuple(key for key in KEYS if key in UNDER_AUTOCAST)
    else:
        keys = KEYS
    # Each shape, loss, mode and work is compiled anew.
    return tuple(key for key in keys if key != "compiled" or is_main)


def parameters() -> Iterator[Any]:
    for shape in CPU_SHAPES:
        for loss in LOSSES:
            for mode in MODES:
                for key in contenders_of(shape, loss, mode):
                    problem = f"{shape}-{loss}-{mode}"
                    yield pytest.param(problem, key, id=f"{problem}-{key}")


class ReplayedClock:
    """A clock that stands still but for the samples that are replayed on it."""

    __name__ = "interleaved rounds, by time.perf_counter"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, samples: Iterator[float]) -> None:
        self.now += next(samples)


CLOCK = ReplayedClock()


@dataclass
class Measured:
    """What was found out about one problem."""

    shape: str
    loss: str
    mode: str
    samples: dict[str, dict[str, list[float]]]  # by work and key, seconds; "products" too
    errors: dict[str, dict[str, float]]
    details: dict[str, dict[str, Any]]
    missing: dict[str, str]
    refused: dict[str, str]
    peaks: dict[str, dict[str, Any]]


def time_all(steps: dict[str, harness.Steps], work: str, *, once: bool) -> dict[str, list[float]]:
    """Samples of each by key: as many interleaved rounds as fit, judged by a first one."""
    first = harness.interleave(list(steps.values()), rounds=1, warmups=0 if once else 1)
    if once:
        return dict(zip(steps, first, strict=True))
    one_round = sum(samples[0] for samples in first)
    rounds = min(max(int(SECONDS[work] / one_round), ROUNDS[0]), ROUNDS[1])
    samples = harness.interleave(list(steps.values()), rounds, warmups=0)
    return dict(zip(steps, samples, strict=True))


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return harness.environment()


@pytest.fixture(scope="module")
def measured_before() -> dict[str, Measured]:
    return {}


@pytest.fixture
def measured(request: pytest.FixtureRequest, measured_before: dict[str, Measured]) -> Measured:
    """What was found out about the problem, now or for an earlier case."""
    if request.param not in measured_before:
        measured_before[request.param] = measure(request, request.param)
    return measured_before[request.param]


def measure(request: pytest.FixtureRequest, problem_name: str) -> Measured:
    """Gate and time, in interleaved rounds, those contenders of a problem that were selected."""
    shape, loss, mode = problem_name.split("-")
    selected = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.callspec.params["measured"] == problem_name
    ]
    keys = list(dict.fromkeys(str(params["key"]) for params in selected))
    sizes = SHAPES[shape]
    problem = make_problem(loss, sizes.num_rows, sizes.num_classes, sizes.dim).in_mode(mode)
    contenders, missing = bind(problem, keys)
    errors, refused = harness.admit(harness.Gate(problem), contenders)
    admitted = {key: contenders[key] for key in errors}
    everyone = {**admitted, "products": BareProducts(problem)}
    once = bool(request.config.getoption("benchmark_disable"))
    samples = {}
    for work in WORKS:
        if any(params["work"] == work for params in selected):
            steps: dict[str, harness.Steps] = dict(everyone)
            if work == "forward":
                steps = {key: harness.ForwardAlone(one) for key, one in everyone.items()}
            samples[work] = time_all(steps, work, once=once)
    details = {key: contender.details for key, contender in contenders.items()}
    peaks = {}
    if problem_name == WITH_PEAKS and not once:
        for key in admitted:
            chunk = details[key].get("chunk_rows")
            peaks[key] = memory.measure_apart(
                sizes.num_rows, sizes.num_classes, sizes.dim, key, mode, loss, chunk
            )
    return Measured(shape, loss, mode, samples, errors, details, missing, refused, peaks)


@pytest.mark.parametrize("work", WORKS, ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("measured", "key"), list(parameters()), indirect=["measured"])
@pytest.mark.benchmark(timer=CLOCK)
def test_speed(
    benchmark: BenchmarkFixture,
    environment: dict[str, Any],
    measured: Measured,
    key: str,
    work: str,
) -> None:
    if key in measured.missing:
        pytest.skip(f"{key}: {measured.missing[key]}")
    if key in measured.refused:
        pytest.fail(f"{key}: {measured.refused[key]}")
    samples = measured.samples[work]
    benchmark.group = f"{measured.shape}-{measured.loss}-{measured.mode} {work}"
    replayed = iter(samples[key])
    benchmark.pedantic(CLOCK.replay, args=(replayed,), rounds=len(samples[key]))
    sizes = SHAPES[measured.shape]
    floor, time = (harness.summary(samples[one])["median_s"] for one in ("products", key))
    benchmark.extra_info.update(
        {
            "shape": {"n": sizes.num_rows, "c": sizes.num_classes, "d": sizes.dim},
            "shape_name": measured.shape,
            "loss": measured.loss,
            "dtype": measured.mode,
            "work": work,
            "contender": key,
            "relative_errors": measured.errors[key],
            "floor_s": floor,
            "fraction_of_floor": floor / time,
            "environment": environment,
            **measured.details[key],
            **(measured.peaks.get(key, {}) if work == "step" else {}),
        }
    )
    assert next(replayed, None) is None  # every sample was handed over
    assert torch.isfinite(torch.tensor(samples[key])).all()
