"""The losses the studies compare, under one interface, and what is added to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import fused_margin as fm

ARCFACE_DEGREES = 28.6
ARCFACE_SCALE = 64.0
SUBCENTER_ARCFACE, SUB_CENTERS = "subcenter_arcface", 3


class LinearCrossEntropy(nn.Module):
    """A linear head and softmax cross-entropy, called like a margin loss."""

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(embedding_size, num_classes)

    @property
    def weight(self) -> Tensor:
        """Weights of the classes, (C, D)."""
        return self.head.weight

    def logits(self, embeddings: Tensor) -> Tensor:
        return self.head(embeddings)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(embeddings), labels)


class OutputCrossEntropy(nn.Module):
    """Cross-entropy of the network's D outputs themselves, of which the first C are the classes.

    So it was published: 128 outputs for ten digits. The others are learned to be low.
    """

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        if embedding_size < num_classes:
            raise ValueError(
                f"the outputs are the logits: {embedding_size} can't tell {num_classes} classes"
            )

    def logits(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(embeddings, labels)


class DegreesAsOffsetLoss(fm.MarginSoftmaxLoss):
    """What was published as Simple ArcFace: s (cos θ - 28.6), degrees taken off the cosine.

    The offset is far outside what a cosine margin can be (at most 2), so that the target's share of
    the softmax is zero in fp32 whatever the network does. The gradient is that of the log-sum-exp
    of the other classes' logits minus the target's: no sample ever counts as learned.
    """

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__(num_classes, embedding_size, scale=ARCFACE_SCALE)

    def psi(self, embeddings: Tensor, labels: Tensor) -> fm.functional.Psi:
        return lambda cosine: cosine - ARCFACE_DEGREES


@dataclass(frozen=True)
class Variant:
    """A loss of the study, and a regulariser of its class weights.

    Attributes:
        title: as in tables and pictures.
        build: makes the criterion from (C, D).
        regularizer: makes the regulariser, whose value is added to the loss, or None.
    """

    title: str
    build: Callable[[int, int], nn.Module]
    regularizer: Callable[[], nn.Module] | None = None


def setting(criterion: nn.Module, name: str) -> float | None:
    """A number of the criterion, such as its scale, as training has left it, or None."""
    value = getattr(criterion, name, None)
    return None if value is None else float(value)


def arcface(num_classes: int, embedding_size: int) -> nn.Module:
    return fm.ArcFaceLoss(
        num_classes, embedding_size, margin=math.radians(ARCFACE_DEGREES), scale=ARCFACE_SCALE
    )


def subcenter_arcface(num_classes: int, embedding_size: int) -> nn.Module:
    return fm.ArcFaceLoss(
        num_classes, embedding_size, margin=math.radians(ARCFACE_DEGREES), scale=ARCFACE_SCALE,
        sub_centers=SUB_CENTERS,
    )  # fmt: skip


def losses() -> dict[str, Variant]:
    """The losses without regulariser, by the name the command line gives them."""
    return {
        "arcface": Variant("ArcFace", arcface),
        "cosface": Variant("CosFace", fm.CosFaceLoss),
        "fixed_adacos": Variant("Fixed AdaCos", fm.FixedAdaCosLoss),
        "adacos": Variant("AdaCos", fm.AdaCosLoss),
        "adaface": Variant("AdaFace", fm.AdaFaceLoss),
        SUBCENTER_ARCFACE: Variant("Sub-centre ArcFace", subcenter_arcface),
        "cross_entropy": Variant("Cross-entropy", LinearCrossEntropy),
    }


def regularized(
    variants: dict[str, Variant], name: str, short: str, regularizer: Callable[[], nn.Module]
) -> dict[str, Variant]:
    """Return the variants, each with the regulariser added: `name` in keys, `short` in titles.

    But for sub-centres: the regularisers take a row of weights for a class, and would drive the
    rows of one class apart.
    """
    return {
        f"{key}+{name}": Variant(f"{variant.title} + {short}", variant.build, regularizer)
        for key, variant in variants.items()
        if key != SUBCENTER_ARCFACE
    }


def as_published() -> dict[str, Variant]:
    """The losses of the article's code, which adds a regulariser to its ArcFace.

    And AdaCos whose scale follows the batches, which it tried first and gave no figure of.
    """
    return {
        "arcface": Variant("ArcFace", arcface),
        "simple_arcface": Variant("Simple ArcFace", DegreesAsOffsetLoss),
        "fixed_adacos": Variant("Fixed AdaCos", fm.FixedAdaCosLoss),
        "adacos": Variant("AdaCos", fm.AdaCosLoss),
        "cross_entropy": Variant("Cross-entropy", OutputCrossEntropy),
    }
