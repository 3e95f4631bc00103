"""Steps are timed in turns, whole, and kept with the threads they were timed on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import step_times
import torch
from study import training

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = step_times.Shape(
    lambda size: step_times.SmallResidualNetwork(1, size), (1, 32, 32), 8, 5, 16, "fp32"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "SHAPES", {"small": SMALL, "half": SMALL})


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.json"
    arguments = ["--rounds", "4", "--threads", "1", "--device", "cpu", "--json", str(path)]
    assert step_times.main([*arguments, "--shapes", "small"]) == 0
    content = json.loads(path.read_text())
    (run,) = content["runs"]
    assert content["settings"]["rounds"] == 4
    assert (run["shape"], run["threads"], run["rows"], run["classes"]) == ("small", 1, 8, 5)
    assert list(run["seconds"]) == list(step_times.LOSSES)
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in run["seconds"].values())
    assert step_times.main([*arguments, "--resume"]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [run["shape"] for run in runs] == ["small", "half"]
    assert runs[0] == run  # not timed again
    assert "Fixed AdaCos" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        step_times.main(arguments)
    assert "exists; add --resume" in capsys.readouterr().err


def test_a_step_trains_network_and_class_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    train_epoch = training.train_epoch

    def watched(*arguments: Any) -> float:
        network, criterion = arguments[:2]
        before = [p.detach().clone() for p in (*network.parameters(), *criterion.parameters())]
        loss = train_epoch(*arguments)
        after = [*network.parameters(), *criterion.parameters()]
        seen.append([(a - b).abs().max() for a, b in zip(after, before, strict=True)])
        return loss

    monkeypatch.setattr(step_times, "train_epoch", watched)
    for name in step_times.LOSSES:
        assert step_times.make_step(name, SMALL, torch.device("cpu"))() > 0
        assert all(change > 0 for change in seen[-1])
        # head, convolutions and norms, and one or two tensors of the criterion
        assert len(seen[-1]) == len(seen[0]) + (name == "cross_entropy")


def test_rounds_are_interleaved_and_ratios_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def make_step(name: str, *_: object) -> Callable[[], float]:
        def step() -> float:
            order.append(name)
            slow = 1.0 if len(order) % 2 else 10.0  # a machine that is busy now and then
            return slow * (2.0 if name == "cross_entropy" else 1.0)

        return step

    monkeypatch.setattr(step_times, "make_step", make_step)
    run = step_times.measure(SMALL, 40, torch.device("cpu"))
    steps = order[step_times.WARM_UP * len(step_times.LOSSES) :]
    size = len(step_times.LOSSES)
    rounds = [steps[start : start + size] for start in range(0, len(steps), size)]
    assert len(rounds) == 40
    assert all(sorted(one) == sorted(step_times.LOSSES) for one in rounds)
    first = Counter(one[0] for one in rounds)
    assert set(first) == set(step_times.LOSSES)  # none is always first

    for name in step_times.LOSSES:
        run["seconds"][name] = [2.0, 4.0, 6.0, 8.0]
    run["seconds"]["cross_entropy"] = [1.0, 2.0, 3.0, 4.0]
    low, median, high = step_times.ratios(run, "cross_entropy")
    assert low == median == high == 0.5


def test_fewer_rounds_than_quartiles_need_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step_times.main(["--rounds", "3"])
    assert "expected a whole number of at least 4" in capsys.readouterr().err
