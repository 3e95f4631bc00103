"""What the example of a million classes takes, what eager code would, and what is available."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import million_classes
import numpy as np
import pytest
import torch
from million_command import LOSSES, read_run, run_main, small_training
from study import identities as identities_module
from study import memory as memory_module
from torch.profiler import ProfilerActivity, profile

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")


def allocated_at_peak(action: Callable[[], object]) -> tuple[int, int]:
    """Peak of what torch allocates meanwhile, and the largest piece, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = np.array([event.nbytes() for event in events])
    return int(changes.cumsum().max()), int(changes.max())


def forward_backward(
    loss: str, num_rows: int, num_classes: int, dim: int, *, eager: bool
) -> Callable[[], None]:
    criterion = million_classes.LOSSES[loss](num_classes, dim)
    embeddings = torch.randn(num_rows, dim, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))

    def step() -> None:
        if eager:
            million_classes.eager_loss(criterion, embeddings, labels).backward()
        else:
            criterion(embeddings, labels).backward()

    return step


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("num_rows", "dim"), [(96, 16), (64, 64), (16, 96)])
def test_eager_code_takes_what_the_formula_says(loss: str, num_rows: int, dim: int) -> None:
    num_classes = 20_000
    step = forward_backward(loss, num_rows, num_classes, dim, eager=True)
    peak, _ = allocated_at_peak(step)
    measured = peak - 4 * num_classes * dim  # without the gradient of the weights
    formula = memory_module.eager_bytes(loss, num_rows, num_classes, dim)
    assert 0.97 * formula < measured < 1.1 * formula


@pytest.mark.parametrize("loss", LOSSES)
def test_training_holds_no_batch_by_classes_matrix(loss: str) -> None:
    num_rows, num_classes, dim = 64, 500_000, 4
    step = forward_backward(loss, num_rows, num_classes, dim, eager=False)
    fm.empty_cache()
    peak, largest = allocated_at_peak(step)
    matrix, gradient = 4 * num_rows * num_classes, 4 * num_classes * dim
    assert largest < 0.4 * matrix
    assert peak - gradient < 0.6 * matrix
    assert peak < memory_module.working_bytes(argparse.Namespace(batch=num_rows, embedding=dim))


def test_evaluation_holds_no_batch_by_classes_matrix() -> None:
    training, _ = small_training("--classes", "100000", "--embedding", "4")
    fm.empty_cache()
    _, largest = allocated_at_peak(lambda: million_classes.evaluate(training, 32))
    assert largest < 0.2 * 4 * identities_module.FRESH_SAMPLES * 100_000


@pytest.mark.parametrize("loss", LOSSES)
def test_eager_code_computes_the_same(loss: str) -> None:
    criterion: Any = million_classes.LOSSES[loss](300, 8).double()
    embeddings, labels = torch.randn(40, 8, dtype=torch.float64), torch.randint(300, (40,))
    with torch.no_grad():  # targets at every angle, past pi - m too
        embeddings[:20] = criterion.weight[labels[:20]] * torch.linspace(-1, 1, 20)[:, None]
        embeddings[:20] += 0.1 * torch.randn(20, 8)
    gradients = []
    for compute in (criterion, lambda *given: million_classes.eager_loss(criterion, *given)):
        leaf = embeddings.clone().requires_grad_()
        criterion.weight.grad = None
        loss_value = compute(leaf, labels)
        loss_value.backward()
        gradients.append((loss_value.detach(), leaf.grad, criterion.weight.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_of_this_process_and_from_now_on() -> None:
    torch.ones(200 << 20, dtype=torch.uint8)  # freed: not to be counted
    memory: Any = memory_module.PeakMemory(torch.device("cpu"))
    assert memory.is_exact
    assert memory.growth() < 8 << 20
    torch.ones(100 << 20, dtype=torch.uint8)
    assert 95 << 20 < memory.growth() < 110 << 20


def test_peak_that_cannot_be_reset_is_reported_as_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text = Path.write_text

    def refuse(path: Path, *given: Any, **named: Any) -> int:
        if path.name == "clear_refs":
            raise PermissionError(path)
        return write_text(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", refuse)
    path = tmp_path / "result.json"
    assert run_main("--json", str(path)) == 0
    assert read_run(path)["memory"]["peak_growth_is_exact"] is False
    assert "all else (network, cosines, ...), at least " in capsys.readouterr().out


def test_available_memory_is_the_least_of_system_and_groups(tmp_path: Path) -> None:
    def write(folder: Path, limit: str, used: int, reclaimable: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\nslab 7\n")

    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    left = memory_module.left_in_control_groups
    write(root / "user" / "session", "1000", 300, 50)
    write(root / "user", "max", 400, 50)
    membership.write_text("4:memory:/elsewhere\n0::/user/session\n")
    assert left(membership, root) == [750]
    write(root, "5000", 400, 0)  # as a container sees its own
    assert left(membership, root) == [750, 4600]
    membership.write_text("4:memory:/elsewhere\n")
    assert left(membership, root) == [4600]
    assert left(tmp_path / "missing", root) == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_available_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = memory_module.available_bytes(torch.device("cpu"))
    assert available is not None
    assert 0 < available <= total
