"""Statistics of batches over two processes, and a learnt scale that is sharded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_distributed import train
from torch import nn
from two_processes import CLASSES, DIM, Arrays, Pair, alone, assert_close, batches, build, mine

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fused_margin as fm
import fused_margin.functional as fmf


@pytest.mark.parametrize("setup", ["both wrapped", "both sharded", "inside"])
@pytest.mark.parametrize("loss", ["AdaFaceLoss", "CurricularFaceLoss", "MagFaceLoss"])
def test_two_processes_equal_one(pair: Pair, loss: str, setup: str) -> None:
    """Norms and cosines of the rows of both ranks are in the statistics of each."""
    for state in pair.run(train, setup, loss):
        assert_close(state, alone(loss))


def _embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, DIM, generator=generator, dtype=torch.float64)  # 6 rows and 5
    w = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (11,), generator=generator)
    labels[1] = -100
    return x + w[labels.clamp_min(0)], w, labels


def adacos_of(rows: list[int]) -> tuple[float, float, float]:
    """The scale of this rank's rows beside the other's, of no row here, and of none at all."""
    x, w, labels = _embeddings()
    start = sum(rows[: dist.get_rank()])
    part = slice(start, start + rows[dist.get_rank()])
    found = float(fmf.adacos_scale(x[part], w, labels[part], 20.0))
    part = slice(0, 4) if dist.get_rank() else slice(0, 0)
    lonely = float(fmf.adacos_scale(x[part], w, labels[part], 20.0))
    return found, lonely, float(fmf.adacos_scale(x[:0], w, labels[:0], 20.0))


def _expected(parts: list[torch.Tensor]) -> float:
    """B of all rows together; the mean angle, by rows, of the medians of parts."""
    x, w, labels = _embeddings()
    cosines = nn.functional.normalize(x) @ nn.functional.normalize(w).t()
    sums, angles, count = 0.0, 0.0, 0
    for part in parts:
        rows = part[labels[part] != -100]
        own = cosines[rows].gather(1, labels[rows][:, None])[:, 0]
        sums += float((20.0 * cosines[rows]).exp().sum() - (20.0 * own).exp().sum())
        angles += float(own.acos().median()) * len(rows)
        count += len(rows)
    return math.log(sums / count) / math.cos(min(math.pi / 4, angles / count))


def test_adacos_has_one_scale_on_all_ranks(pair: Pair) -> None:
    first, second = pair.run(adacos_of, [6, 5])
    assert first == second
    rows = torch.arange(11)
    assert first[0] == pytest.approx(_expected([rows[:6], rows[6:]]), rel=1e-12)
    assert first[1] == pytest.approx(_expected([rows[:4]]), rel=1e-12)
    assert first[2] == 20.0


def train_adacos() -> tuple[list[float], Arrays]:
    """Scales of each step, of a criterion that nothing wraps; DDP of the whole."""
    trainee = build("AdaCosLoss")
    module = nn.parallel.DistributedDataParallel(trainee)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scales = []
    for rows, labels in batches():
        module(mine(rows), mine(labels)).backward()
        optimizer.step()
        fm.check_setup(module, optimizer)
        optimizer.zero_grad()
        scales.append(float(trainee.criterion.scale))
    return scales, {"weight": trainee.criterion.weight.detach().numpy()}


def test_training_with_adacos(pair: Pair) -> None:
    (first, weight), (second, other) = pair.run(train_adacos)
    assert first == second
    assert len(set(first)) == len(first)
    assert_close(weight, other)


def sharded_scale() -> list[tuple[float, float]]:
    """The loss and the scale's gradient: of the function, and of a module that is sharded."""
    x, labels = batches()[0]
    given = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    scale = nn.Parameter(torch.tensor([12.0], dtype=torch.float64))
    torch.manual_seed(0)
    criterion: Any = fm.ArcFaceLoss(CLASSES, x.shape[1], scale=scale, dtype=torch.float64)
    expected = fmf.arcface(x, criterion.weight, labels, scale=given)
    (slope,) = torch.autograd.grad(expected, given)
    fully_shard(criterion)
    loss = criterion(x, labels)
    loss.backward()
    gradient = criterion.scale.grad.full_tensor()
    return [(expected.item(), slope.item()), (loss.item(), gradient.item())]


def test_a_learnt_scale_is_sharded(pair: Pair) -> None:
    for plain, sharded in pair.run(sharded_scale):
        assert sharded == pytest.approx(plain, rel=1e-12)
