"""insightface's margins and PartialFC_V2, and copied heads: equal to what their originals compute.

The originals are restated from their formulas on the whole (N, C) matrix, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_margin.compat import heads, insightface

Tensor = torch.Tensor
N, C, D = 30, 17, 6


def batch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at all angles to their class's weight, a zero one among them."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(C, (N,), generator=generator)
    own = F.normalize(weight.detach())[labels]
    x = torch.randn(N, D, generator=generator, dtype=weight.dtype)
    x[:10] += 3 * own[:10]
    x[10:20] = 0.3 * x[10:20] - own[10:20]
    x[10:14] = 0.02 * x[10:14] - own[10:14]  # past theta + m = pi for a margin of 0.2
    x[20] = 0.0
    return x, labels


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(w).t()


def at_targets(values: Tensor, cosine: Tensor, labels: Tensor) -> Tensor:
    return torch.where(F.one_hot(labels, C).bool(), values, cosine)


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# Of theta and of its cosine: the target's logit over the scale
Psi = Callable[[Tensor, Tensor], Tensor]


def arc(m: float, past: float | None, easy: bool = False) -> Psi:
    """cos(theta + m), cos(theta) - past where theta + m > pi; None: throughout."""

    def psi(theta: Tensor, cosine: Tensor) -> Tensor:
        inside = cosine > 0 if easy else torch.ones_like(cosine, dtype=torch.bool)
        beyond = cosine
        if not easy and past is not None:
            inside, beyond = theta + m <= math.pi, cosine - past
        return torch.where(inside, (theta + m).cos(), beyond)

    return psi


HEADS: dict[str, tuple[Callable[[], Any], float, Psi]] = {
    "kaggle": (
        lambda: heads.ArcMarginProduct(D, C), 30.0, arc(0.5, 0.5 * math.sin(0.5))
    ),
    "kaggle-easy": (
        lambda: heads.ArcMarginProduct(D, C, 45.0, 0.4, True, 0.0), 45.0, arc(0.4, None, True)
    ),
    "wespeaker": (lambda: heads.WeSpeakerAAM(D, C), 32.0, arc(0.2, 1 - math.cos(0.2))),
    "wespeaker-easy": (
        lambda: heads.WeSpeakerAAM(D, C, margin=0.5, easy_margin=True), 32.0, arc(0.5, None, True)
    ),
    "speechbrain": (
        lambda: heads.SpeechBrainAAM(D, C), 30.0, arc(0.2, 0.2 * math.sin(0.2))
    ),
    "cosface": (lambda: heads.AddMarginProduct(D, C), 30.0, lambda theta, cosine: cosine - 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    make, scale, psi = HEADS[name]
    head = make().double()
    x, labels = batch(head.weight)
    x.requires_grad_()
    actual = results(head(x, labels), x, head.weight)
    # the originals' slopes have no floor; no row lies so near that it would show
    cosine = cosines(x, head.weight)
    logits = scale * at_targets(psi(cosine.acos(), cosine), cosine, labels)
    expected = results(F.cross_entropy(logits, labels), x, head.weight)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.logits(x), scale * cosine)


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_weight_of_a_linear_layer(name: str) -> None:
    torch.manual_seed(4)
    head = HEADS[name][0]()
    torch.manual_seed(4)
    expected = nn.init.xavier_uniform_(torch.empty(C, D))
    torch.testing.assert_close(head.weight.detach(), expected, rtol=0, atol=0)
    assert list(head.state_dict()) == ["weight"]
    assert (head.in_features, head.out_features) == (D, C)
    x, labels = batch(head.weight)
    torch.testing.assert_close(head(x[:, None], labels[:, None]), head(x, labels))


@pytest.mark.parametrize("easy", [False, True])
def test_what_ls_eps_computes(easy: bool) -> None:
    """The margin's share in every logit; of other classes to second order in the cosine."""
    share, m = 0.1, 0.5
    head = heads.ArcMarginProduct(D, C, 30.0, m, easy, share).double()
    x, labels = batch(head.weight)
    x.requires_grad_()
    past = None if easy else m * math.sin(m)
    cosine = cosines(x, head.weight)
    margin = arc(m, past, easy)(cosine.acos(), cosine)
    one_hot = (1.0 - share) * F.one_hot(labels, C) + share / C
    logits = 30.0 * (one_hot * margin + (1.0 - one_hot) * cosine)
    expected = results(F.cross_entropy(logits, labels), x, head.weight)
    actual = results(head(x, labels), x, head.weight)
    bound = 30.0 * share * math.sin(m) / (2 * C)
    assert float((actual[0] - expected[0]).abs()) <= bound
    for got, want in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
    plain = heads.ArcMarginProduct(D, C, 30.0, m, easy).double()
    plain.load_state_dict(head.state_dict())
    assert float((plain(x, labels) - actual[0]).detach().abs()) > 10 * bound
    head.ls_eps = 0.0
    torch.testing.assert_close(head(x, labels), plain(x, labels))


def test_wespeaker_s_sub_centres() -> None:
    """The rows of a class lie one after the other, as there."""
    head = heads.WeSpeakerAAM(D, C, 32.0, 0.2, K=3).double()
    assert head.weight.shape == (3 * C, D)
    assert (head.in_features, head.out_features) == (D, C)
    x, labels = batch(head.weight[::3])
    x.requires_grad_()
    cosine = cosines(x, head.weight).unflatten(1, (C, 3)).max(dim=2).values
    logits = 32.0 * at_targets(arc(0.2, 1 - math.cos(0.2))(cosine.acos(), cosine), cosine, labels)
    expected = results(F.cross_entropy(logits, labels), x, head.weight)
    for got, want in zip(results(head(x, labels), x, head.weight), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.logits(x), 32.0 * cosine)


def test_wespeaker_s_inter_topk() -> None:
    """The hardest other classes come nearer by an angle; without it, in fine-tuning, none does."""
    head = heads.WeSpeakerAAM(D, C, 32.0, 0.2, K=2, mp=0.06, k_top=5).double()
    x, labels = batch(head.weight[::2])
    is_usual = x.norm(dim=1) > 0.0  # to a row of zeros all classes are as near
    x, labels = x[is_usual].detach().requires_grad_(), labels[is_usual]
    for m, mp in ((0.2, 0.06), (0.5, 0.06), (0.0, 0.06), (0.2, 0.0)):
        head.update(m)
        head.mp, penalty = mp, mp * m / 0.2
        margin = arc(m, 1 - math.cos(m))
        cosine = cosines(x, head.weight).unflatten(1, (C, 2)).max(dim=2).values
        others = cosine.detach().scatter(1, labels[:, None], -2.0)
        is_hard = torch.zeros_like(cosine).scatter(1, others.topk(5, dim=1).indices, 1.0) > 0.0
        turned = torch.where(is_hard, (cosine.acos() - penalty).cos(), cosine)
        logits = 32.0 * at_targets(margin(cosine.acos(), cosine), turned, labels)
        expected = results(F.cross_entropy(logits, labels), x, head.weight)
        for got, want in zip(results(head(x, labels), x, head.weight), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_heads_take_shared_options() -> None:
    x, labels = torch.randn(6, 8), torch.randint(10, (6,))
    head = heads.ArcMarginProduct(8, 10, label_smoothing=0.1)
    loss, stats = head(x[:, None], labels, return_stats=True)
    logits = 30.0 * torch.where(F.one_hot(labels, 10).bool(), torch.nan, head.logits(x) / 30.0)
    assert torch.equal(stats.hardest_class, logits.nan_to_num(-100.0).argmax(dim=1))
    hard = heads.ArcMarginProduct(8, 10)
    hard.load_state_dict(head.state_dict())
    assert float(loss.detach()) != float(hard(x, labels).detach())


def test_update_sets_the_margin() -> None:
    head = heads.WeSpeakerAAM(D, C, margin=0.0).double()
    other = heads.WeSpeakerAAM(D, C, margin=0.3).double()
    other.load_state_dict(head.state_dict())
    x, labels = batch(head.weight)
    assert float(head(x, labels).detach()) < float(other(x, labels).detach())
    head.update(0.3)
    torch.testing.assert_close(head(x, labels), other(x, labels))
    assert "margin=0.3, scale=32" in repr(head)
    with pytest.raises(ValueError, match=r"math\.radians"):
        head.update(20)


MARGINS: dict[str, tuple[Any, float, Psi]] = {
    "combined-arc": (insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0), 64.0, arc(0.5, None)),
    "combined-cos": (
        insightface.CombinedMarginLoss(64, 1.0, 0.0, 0.4), 64.0, lambda theta, cosine: cosine - 0.4
    ),
    "arc": (insightface.ArcFace(30.0, 0.3), 30.0, arc(0.3, None)),
    "cos": (insightface.CosFace(), 64.0, lambda theta, cosine: cosine - 0.4),
}  # fmt: skip


def straight_through(value: Tensor, cosine: Tensor) -> Tensor:
    """As where the margin is applied under no_grad, in place."""
    return cosine + (value - cosine).detach()


@pytest.mark.parametrize("name", MARGINS)
def test_partial_fc(name: str) -> None:
    margin, scale, psi = MARGINS[name]
    criterion = insightface.PartialFC_V2(margin, D, C).double()
    x, labels = batch(criterion.weight)
    x.requires_grad_()
    cosine = cosines(x, criterion.weight).clamp(-1, 1)
    changed = straight_through(at_targets(psi(cosine.acos(), cosine), cosine, labels), cosine)
    expected = results(F.cross_entropy(scale * changed, labels), x, criterion.weight)
    for given in (labels, labels[:, None]):
        actual = results(criterion(x, given), x, criterion.weight)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    # the margin alone, on finished cosines; a row of label -1 has none
    partly = labels.clone()
    partly[::2] = -1
    logits = cosines(x, criterion.weight).detach()
    got = margin(logits.clone(), partly[:, None])
    torch.testing.assert_close(got[::2], scale * logits[::2])
    torch.testing.assert_close(got[1::2], (scale * changed).detach()[1::2])


def test_partial_fc_with_the_exact_gradient() -> None:
    margin = insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0, grad="exact")
    criterion = insightface.PartialFC_V2(margin, D, C, sample_rate=1.0, fp16=True).double()
    x, labels = batch(criterion.weight)
    cosine = cosines(x, criterion.weight)
    logits = 64 * at_targets((cosine.acos() + 0.5).cos(), cosine, labels)
    expected = results(F.cross_entropy(logits, labels), criterion.weight)
    actual = results(criterion(x, labels), criterion.weight)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["combined-arc", "combined-cos"])
def test_interclass_filtering(name: str) -> None:
    """Other classes above the threshold have the logit 0 and no gradient."""
    plain, scale, psi = MARGINS[name]
    margin = insightface.CombinedMarginLoss(scale, 1.0, plain.m2, plain.m3, 0.3)
    criterion = insightface.PartialFC_V2(margin, D, C).double()
    x, labels = batch(criterion.weight)
    x.requires_grad_()
    cosine = cosines(x, criterion.weight).clamp(-1, 1)
    is_target = F.one_hot(labels, C).bool()
    kept = torch.where((cosine > 0.3) & ~is_target, 0.0, cosine)
    assert int((kept != cosine).sum()) > N
    changed = straight_through(at_targets(psi(cosine.acos(), cosine), kept, labels), kept)
    expected = results(F.cross_entropy(scale * changed, labels), x, criterion.weight)
    actual = results(criterion(x, labels), x, criterion.weight)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    logits = cosines(x, criterion.weight).detach()
    torch.testing.assert_close(margin(logits.clone(), labels), (scale * changed).detach())
    assert "interclass_filtering_threshold=0.3" in repr(criterion)
    _, stats = criterion(x, labels, return_stats=True)
    assert float(stats.hardest_cosine.max()) > 0.3  # what is left out is shown all the same


def test_partial_fc_follows_its_margin() -> None:
    margin = insightface.ArcFace(30.0, 0.1)
    criterion = insightface.PartialFC_V2(margin, D, C)
    assert list(criterion.state_dict()) == ["weight"]
    assert 0.005 < float(criterion.weight.detach().std()) < 0.02
    x, labels = batch(criterion.weight)
    before = float(criterion(x, labels).detach())
    margin.margin = 0.5
    assert float(criterion(x, labels).detach()) > before
    assert criterion(x[:7], labels[:7]).ndim == 0  # a smaller batch
    assert "margin=0.5 rad" in repr(criterion)
    assert criterion.scale == 30.0
    criterion.scale = 64
    assert margin.s == 64.0


@pytest.mark.parametrize("rows", [3, C])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ArcMarginProduct", {}), ("ArcMarginProduct", {"easy_margin": True}), ("WeSpeakerAAM", {}),
        ("SpeechBrainAAM", {"easy_margin": True}), ("AddMarginProduct", {}),
    ],
)  # fmt: skip
def test_margins_per_class(name: str, options: dict[str, Any], rows: int) -> None:
    """As of one margin for the rows of each class, also where there are as many rows as classes."""
    labels = torch.randperm(C)[:rows]
    x, found = torch.randn(rows, D), torch.linspace(0.1, 0.5, C)
    head = getattr(heads, name)(D, C, **options)
    head.reduction, expected = "none", torch.zeros(rows)
    for row, label in enumerate(labels.tolist()):
        head.margin = float(found[label])
        expected[row] = head(x, labels)[row]
    head.margin = found
    torch.testing.assert_close(head(x, labels), expected)


Combined = insightface.CombinedMarginLoss
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "filtering": (
        lambda: Combined(64, 1, 0.5, 0, 1.4), ValueError, "threshold must be in .*got 1.4"
    ),
    "ignored margins": (lambda: Combined(64, 1, 0.3, 0.2), ValueError, "ignores m1 and m2"),
    "multiple": (lambda: Combined(64, 1.35, 0.5, 0), ValueError, "fused_margin.CombinedMarginLoss"),
    "negative": (lambda: Combined(64, 1, 0, -0.1), ValueError, "fused_margin.CombinedMarginLoss"),
    "scale": (lambda: Combined(0, 1, 0.5, 0), ValueError, "> 0"),
    "sampling": (
        lambda: insightface.PartialFC_V2(insightface.ArcFace(), D, C, 0.1), ValueError,
        "sample_rate=0.1",
    ),
    "other margins": (
        lambda: insightface.PartialFC_V2(nn.Identity(), D, C),  # pyright: ignore[reportArgumentType]
        TypeError, "torch.nn.modules.linear.Identity; import it from there",
    ),
    "labels": (
        lambda: insightface.PartialFC_V2(insightface.ArcFace(), D, C)(
            torch.randn(2, D), torch.tensor([0, -1])
        ),
        ValueError, "labels must be in",
    ),
    "smoothing": (
        lambda: heads.ArcMarginProduct(D, C, ls_eps=1.1), ValueError, r"ls_eps must be in \[0, 1\]"
    ),
    "inter-topk": (
        lambda: heads.WeSpeakerAAM(D, C, K=3, mp=0.06, k_top=9), ValueError,
        "k_top must be at most 8",
    ),
    "swapped sizes": (
        lambda: heads.ArcMarginProduct(C, D)(torch.randn(2, D), torch.tensor([0, 1])), ValueError,
        r"num_classes=17, embedding_size=6 by name \(in compat out_features and in_features",
    ),
    "degrees": (lambda: heads.ArcMarginProduct(D, C, m=28.6), ValueError, "math.radians"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_partial_fc_refuses_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_margin import _setup

    monkeypatch.setattr(_setup, "_ranks", lambda: 2)
    with pytest.raises(ValueError, match="over 2 ranks"):
        insightface.PartialFC_V2(insightface.ArcFace(), D, C)


def test_rows_may_be_weighed() -> None:
    x, labels, weights = torch.randn(6, 8), torch.randint(10, (6,)), torch.rand(6)
    peer = insightface.PartialFC_V2(insightface.CosFace(), 8, 10)
    for criterion in (heads.ArcMarginProduct(8, 10), peer):
        rows = torch.stack([criterion(x[i : i + 1], labels[i : i + 1]) for i in range(6)])
        expected = (rows * weights).sum() / weights.sum()
        torch.testing.assert_close(criterion(x, labels, sample_weight=weights), expected)
