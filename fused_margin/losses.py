"""Losses as modules that own the class weights; the mathematics is in `functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_margin import _setup, _validate, functional

__all__ = ["ArcFaceLoss", "CosFaceLoss", "FixedAdaCosLoss", "NormalizedSoftmaxLoss"]


class _MarginSoftmaxLoss(nn.Module):
    """Class weights (C, D) and the options that every loss shares.

    The weights are parameters of the loss: give ``criterion.parameters()`` to an optimiser beside
    the model's.

    Attributes:
        weight: (C, D) parameter, one row per class, drawn from normal(0, 1/D) so that rows start
            with norm about 1.
    """

    weight: nn.Parameter
    _scale: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_classes = _validate.size("num_classes", num_classes, 2)
        embedding_size = _validate.size("embedding_size", embedding_size, 1)
        self.reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
        self.ignore_index = _validate.ignore_index(ignore_index)
        self.backend = _validate.choice("backend", backend, _validate.BACKENDS)
        self.memory_budget = _validate.memory_budget(memory_budget)
        dtype = _validate.floating("dtype", torch.float32 if dtype is None else dtype)
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class weights anew from normal(0, 1/D)."""
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    @property
    def num_classes(self) -> int:
        """C, the rows of the weight."""
        return self.weight.shape[0]

    @property
    def embedding_size(self) -> int:
        """D, the columns of the weight."""
        return self.weight.shape[1]

    @property
    def scale(self) -> float:
        """The scale s of the logits; may be set, as ``margin`` may, between any two steps."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        scale = _validate.scale(value, torch.device("cpu"))
        assert isinstance(scale, float)
        self._scale = scale

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, but what would make a hyperparameter a parameter is refused."""
        if name in ("scale", "margin"):
            _validate.no_tensor(name, value)
        super().__setattr__(name, value)

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scaled cosines s cos(theta), without margin.

        Args:
            embeddings: (N, D).

        Returns:
            (N, C), fp32 or fp64: this builds the matrix that the loss itself never builds.
        """
        return functional.cosine_logits(embeddings, self.weight, self.scale)

    def _options(self) -> dict[str, Any]:
        _setup.warn_if_unsynchronized(self)  # here, where every forward comes by
        return {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "backend": self.backend,
            "memory_budget": self.memory_budget,
        }

    def _hyperparameters(self) -> str:
        return f"scale={self.scale:g}"

    def extra_repr(self) -> str:
        """The arguments of the module, for ``repr``."""
        budget = "" if self.memory_budget is None else f", memory_budget={self.memory_budget}"
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size},"
            f" {self._hyperparameters()}, reduction={self.reduction!r},"
            f" ignore_index={self.ignore_index}, backend={self.backend!r}{budget}"
        )


class ArcFaceLoss(_MarginSoftmaxLoss):
    """ArcFace with its own class weights; see `functional.arcface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in radians, at most pi.
        scale: s > 0.
        boundary: ``"linear"``, ``"continuous"`` or ``"none"``, for theta + m > pi.
        grad: ``"exact"`` or ``"straight_through"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are left out.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, see `functional.arcface`.
        device: device of the class weights.
        dtype: dtype of the class weights, fp32 by default.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        *,
        boundary: str = "linear",
        grad: str = "exact",
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            memory_budget=memory_budget,
            device=device,
            dtype=dtype,
        )
        self.margin = _validate.angular_margin(margin)
        self.scale = scale
        self.boundary = _validate.choice("boundary", boundary, _validate.BOUNDARIES)
        self.grad = _validate.choice("grad", grad, _validate.GRADS)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of embeddings (N, D) and labels (N,): 0-d, or (N,) for ``reduction="none"``."""
        return functional.arcface(
            embeddings,
            self.weight,
            labels,
            self.margin,
            self.scale,
            boundary=self.boundary,
            grad=self.grad,
            **self._options(),
        )

    def _hyperparameters(self) -> str:
        return (
            f"margin={self.margin:g}, scale={self.scale:g}, boundary={self.boundary!r},"
            f" grad={self.grad!r}"
        )


class CosFaceLoss(_MarginSoftmaxLoss):
    """CosFace with its own class weights; see `functional.cosface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine, at most 2.
        scale: s > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are left out.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, see `functional.arcface`.
        device: device of the class weights.
        dtype: dtype of the class weights, fp32 by default.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64.0,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            memory_budget=memory_budget,
            device=device,
            dtype=dtype,
        )
        self.margin = _validate.cosine_margin(margin)
        self.scale = scale

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of embeddings (N, D) and labels (N,): 0-d, or (N,) for ``reduction="none"``."""
        return functional.cosface(
            embeddings, self.weight, labels, self.margin, self.scale, **self._options()
        )

    def _hyperparameters(self) -> str:
        return f"margin={self.margin:g}, scale={self.scale:g}"


class FixedAdaCosLoss(_MarginSoftmaxLoss):
    """Fixed AdaCos with its own class weights and no hyperparameter; see `functional.fixed_adacos`.

    Args:
        num_classes: C >= 3; the scale is sqrt(2) * ln(C - 1).
        embedding_size: D >= 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are left out.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, see `functional.arcface`.
        device: device of the class weights.
        dtype: dtype of the class weights, fp32 by default.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            memory_budget=memory_budget,
            device=device,
            dtype=dtype,
        )
        _validate.fixed_adacos_classes(num_classes)

    @property
    def scale(self) -> float:
        """sqrt(2) * ln(C - 1), of the weight as it is."""
        return functional.fixed_adacos_scale(self.num_classes)

    @scale.setter
    def scale(self, value: float) -> None:
        raise AttributeError(
            "the scale of Fixed AdaCos follows from the number of classes and can't be set; for a"
            " scale of your choice use NormalizedSoftmaxLoss"
        )

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of embeddings (N, D) and labels (N,): 0-d, or (N,) for ``reduction="none"``."""
        return functional.fixed_adacos(embeddings, self.weight, labels, **self._options())


class NormalizedSoftmaxLoss(_MarginSoftmaxLoss):
    """Normalised softmax with its own class weights; see `functional.normalized_softmax`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0, the inverse of a temperature.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are left out.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, see `functional.arcface`.
        device: device of the class weights.
        dtype: dtype of the class weights, fp32 by default.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 20.0,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            memory_budget=memory_budget,
            device=device,
            dtype=dtype,
        )
        self.scale = scale

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of embeddings (N, D) and labels (N,): 0-d, or (N,) for ``reduction="none"``."""
        return functional.normalized_softmax(
            embeddings, self.weight, labels, self.scale, **self._options()
        )
