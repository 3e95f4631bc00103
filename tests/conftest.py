"""Settings that must precede every import of `fused_margin`, and fixtures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

LONGEST = ("test_targets.py", "test_train_sharded.py")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton decides at decoration time whether kernels are interpreted on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# cuBLAS asks for it wherever deterministic algorithms are turned on, as `poisoned_memory` does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A graph that another revision of the package compiled, its operators' arguments included, must not
# be found again.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

from helpers import poisoned_memory  # noqa: E402 - the environment comes first


def pytest_configure() -> None:
    """Refuse to pass without having checked anything; share the cores among processes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if not __debug__:
        raise pytest.UsageError(
            "the tests are assertions, which python -O leaves out: run them without -O and with"
            " PYTHONOPTIMIZE unset"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; skip tests of real hardware where there is none."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cpu_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks make the CPU backend take larger problems' ways for small ones."""
    from fused_margin import _loans
    from fused_margin._cpu import backend, single, tiny

    if request.node.get_closest_marker("cpu_blocks") is not None:
        monkeypatch.setattr(single, "LOGITS", -1)
        monkeypatch.setattr(_loans, "may_lend", lambda w: False)
    if request.node.get_closest_marker("cpu_ahead") is not None:
        monkeypatch.setattr(single, "LOGITS", -1)
        monkeypatch.setattr(backend, "ROWS_FOR_AHEAD", 1 << 30)
    if request.node.get_closest_marker("cpu_single") is not None:
        monkeypatch.setattr(tiny, "MULTIPLICATIONS", -1)
        monkeypatch.setattr(single, "LOWERED", 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny work on two threads is mostly waiting for the second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory from `torch.empty` is NaN for the duration of the test."""
    with poisoned_memory():
        yield
