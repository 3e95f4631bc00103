"""Kernels access nothing but what they are given, whatever is masked afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_margin as fm
from fused_margin import _validate
from fused_margin.sampling import sample_negatives

pytest.importorskip("triton", reason="Triton is not installed")
if not _validate.INTERPRETED:
    pytest.skip("kernels run on a GPU here, where addresses aren't seen", allow_module_level=True)

from bounds import checked  # imports Triton

from fused_margin._triton import launch, planning

# what beside a plain loss reads or leaves more
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "centres": {"sub_centers": 3},
    "smoothing": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", planning.STRATEGIES)
def test_losses(strategy: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1 << 13)
    num_rows, num_classes, dim = 33, 70, 40
    criterion = fm.ArcFaceLoss(num_classes, dim, backend="triton", **OPTIONS[options])
    x, labels = torch.randn(num_rows, dim).half(), torch.randint(num_classes, (num_rows,))
    labels[::4] = -100
    with planning.override(strategy), checked() as beyond:
        loss, _ = criterion(x.requires_grad_(), labels, return_stats=True)
        loss.backward()
        criterion(x[:1], labels[1:2]).backward()
    assert not beyond


@pytest.mark.parametrize("strategy", ["chunked", "lent"])
def test_some_of_the_classes(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of W by their list, also of a batch of which d_w holds a part."""
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1 << 13)
    criterion = fm.ArcFaceLoss(1200, 64, backend="triton")
    sample_negatives(criterion, 0.5)
    x, labels = torch.randn(112, 64, requires_grad=True), torch.randint(1200, (112,))
    with planning.override(strategy), checked() as beyond:
        criterion(x, labels).backward()
    assert not beyond


def test_a_load_beyond_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test sees what it looks for: partials that begin too late."""
    rows_kernel = launch.rows_kernel

    class Beyond:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(partial: torch.Tensor, *others: Any, **keywords: Any) -> None:
                rows_kernel[grid](partial[1:], *others, **keywords)

            return run

    monkeypatch.setattr(launch, "rows_kernel", Beyond())
    with checked() as beyond:
        fm.ArcFaceLoss(40, 5, backend="triton")(torch.randn(3, 5), torch.randint(40, (3,)))
    assert set(beyond) == {"rows_kernel"}
