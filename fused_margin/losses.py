"""Losses as modules that own the class weights; the mathematics is in `functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fused_margin import _compiled, _setup, _validate, functional, margins

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "FixedAdaCosLoss",
    "MarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
]


class MarginSoftmaxLoss(nn.Module):
    r"""Class weights (C, D), a scale and the options that all losses share: their base class.

    The weights are parameters of the loss: give ``criterion.parameters()`` to an optimiser beside
    the model's. A subclass with a margin of its own implements `psi`, and has everything else:

    ```python
    class SphereFaceLoss(fm.MarginSoftmaxLoss):
        def psi(self, embeddings, labels):
            return lambda u: 2 * u * u.abs() - 1  # cos(2 theta), and monotone


    class ClassMarginLoss(fm.MarginSoftmaxLoss):
        def __init__(self, class_margins, embedding_size, scale=64.0, **options):
            super().__init__(len(class_margins), embedding_size, scale, **options)
            self.register_buffer("class_margins", class_margins)

        def psi(self, embeddings, labels):
            classes = labels.clamp(0, self.num_classes - 1)  # those out of range are refused later
            return fm.margins.additive(self.class_margins[classes])
    ```

    What is in `settings` may be assigned between any two steps, as a schedule does; it is checked
    as in the constructor, and not in ``state_dict()``, which holds the weight alone.
    `torch.compile` compiles a schedule of a number twice, for its first value and for all others.
    (But the integers ``ignore_index`` and ``memory_budget`` for each value, where a compiled
    function finds the module in a global variable: torch takes those for constants. Give it the
    module as an argument, or in another module.)

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0. None only from a subclass that derives it, in a property ``scale``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that are left out.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, see `functional.arcface`.
        device: device of the class weights.
        dtype: dtype of the class weights, fp32 by default.

    Attributes:
        weight: (C, D) parameter, one row per class, drawn from normal(0, 1/D) so that rows start
            with norm about 1.
        settings: what may be assigned, in the order of ``repr``, with the function that checks a
            value and returns what is kept. A subclass may add its own.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "scale": _validate.module_scale,
        "reduction": _validate.reduction,
        "ignore_index": _validate.ignore_index,
        "backend": _validate.backend_name,
        "memory_budget": _validate.memory_budget,
    }
    weight: nn.Parameter
    _scale: float

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float | None = 64.0, *,
        reduction: str = "mean", ignore_index: int = -100, backend: str = "auto",
        memory_budget: int | None = None, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        num_classes = _validate.size("num_classes", num_classes, 2)
        embedding_size = _validate.size("embedding_size", embedding_size, 1)
        if scale is not None or type(self).scale is MarginSoftmaxLoss.scale:
            self.scale = scale
        self.reduction, self.ignore_index = reduction, ignore_index
        self.backend, self.memory_budget = backend, memory_budget
        dtype = _validate.floating("dtype", torch.float32 if dtype is None else dtype)
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, but what is in `settings` is checked."""
        check = self.settings.get(name)
        super().__setattr__(name, value if check is None else check(value))

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
        """The scale s of the logits."""
        return self._scale

    @scale.setter
    def scale(self, value: Any) -> None:  # a float, by `settings`
        self._scale = value

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        r"""The margin of this batch, a function of the target cosines: :math:`\psi(u)`.

        Args:
            embeddings: (N, D), not normalised.
            labels: (N,) as they were given, those of ignored rows and out of range included:
                ``labels.clamp(0, self.num_classes - 1)`` can index.

        Returns:
            One of `margins`, which the fused operator takes if its margin is a number; or a
            function of (N,) cosines, see `functional.margin_softmax`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no margin: implement psi(self, embeddings, labels), which"
            " returns one of fused_margin.margins, margins.NO_MARGIN included, or a function of the"
            " target cosines"
        )

    @_compiled.raising()
    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of embeddings (N, D) and labels (N,): 0-d, or (N,) for ``reduction="none"``."""
        _setup.warn_if_unsynchronized(self)
        weight = self.weight
        _validate.tensors(embeddings, weight, labels)
        ignore_index, memory_budget = self._integers()
        return functional._margin_softmax(
            embeddings, weight, labels, self.psi(embeddings, labels), self.scale, self.reduction,
            ignore_index, self.backend, memory_budget,
        )  # fmt: skip

    def _integers(self) -> tuple[int, int | None]:
        """ignore_index and memory_budget."""
        if not torch.compiler.is_dynamo_compiling():
            return self.ignore_index, self.memory_budget
        # Dynamo takes the integers of a module for constants, unless told so where it meets them
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
            return (
                _validate.ignore_index(self.ignore_index),
                _validate.memory_budget(self.memory_budget),
            )

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scaled cosines s cos(theta), without margin.

        Args:
            embeddings: (N, D).

        Returns:
            (N, C), fp32 or fp64: this builds the matrix that the loss itself never builds.
        """
        return functional.cosine_logits(embeddings, self.weight, self.scale)

    def extra_repr(self) -> str:
        """Sizes and settings, for ``repr``."""
        names = ("num_classes", "embedding_size", *self.settings)
        shown = ((name, getattr(self, name)) for name in names)
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in shown
            if value is not None
        )


class ArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace with its own class weights; see `functional.arcface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in radians, at most pi.
        scale: s > 0.
        boundary: ``"linear"``, ``"continuous"`` or ``"none"``, for theta + m > pi.
        grad: ``"exact"`` or ``"straight_through"``.
        reduction: see `MarginSoftmaxLoss`, likewise what follows.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate.angular_margin,
        "scale": _validate.module_scale,
        "boundary": _validate.boundary,
        "grad": _validate.grad,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.5, scale: float = 64.0, *,
        boundary: str = "linear", grad: str = "exact", reduction: str = "mean",
        ignore_index: int = -100, backend: str = "auto", memory_budget: int | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_classes, embedding_size, scale, reduction=reduction, ignore_index=ignore_index,
            backend=backend, memory_budget=memory_budget, device=device, dtype=dtype,
        )  # fmt: skip
        self.margin, self.boundary, self.grad = margin, boundary, grad

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta + m)."""
        return margins.angular(self.margin, self.boundary, self.grad)


class CosFaceLoss(MarginSoftmaxLoss):
    """CosFace with its own class weights; see `functional.cosface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine, at most 2.
        scale: s > 0.
        reduction: see `MarginSoftmaxLoss`, likewise what follows.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate.cosine_margin,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64.0, *,
        reduction: str = "mean", ignore_index: int = -100, backend: str = "auto",
        memory_budget: int | None = None, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_classes, embedding_size, scale, reduction=reduction, ignore_index=ignore_index,
            backend=backend, memory_budget=memory_budget, device=device, dtype=dtype,
        )  # fmt: skip
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta) - m."""
        return margins.additive(self.margin)


class FixedAdaCosLoss(MarginSoftmaxLoss):
    """Fixed AdaCos with its own class weights and no hyperparameter; see `functional.fixed_adacos`.

    Args:
        num_classes: C >= 3; the scale is sqrt(2) * ln(C - 1).
        embedding_size: D >= 1.
        reduction: see `MarginSoftmaxLoss`, likewise what follows.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **MarginSoftmaxLoss.settings,
        "scale": _validate.derived_scale,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, *, reduction: str = "mean",
        ignore_index: int = -100, backend: str = "auto", memory_budget: int | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_classes, embedding_size, None, reduction=reduction, ignore_index=ignore_index,
            backend=backend, memory_budget=memory_budget, device=device, dtype=dtype,
        )  # fmt: skip
        _validate.fixed_adacos_classes(self.num_classes)

    @property
    def scale(self) -> float:
        """sqrt(2) * ln(C - 1), of the weight as it is."""
        return functional.fixed_adacos_scale(self.num_classes)

    @scale.setter
    def scale(self, value: Any) -> None:
        _validate.derived_scale(value)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN


class NormalizedSoftmaxLoss(MarginSoftmaxLoss):
    """Normalised softmax with its own class weights; see `functional.normalized_softmax`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0, the inverse of a temperature.
        reduction: see `MarginSoftmaxLoss`, likewise what follows.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float = 20.0, *,
        reduction: str = "mean", ignore_index: int = -100, backend: str = "auto",
        memory_budget: int | None = None, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_classes, embedding_size, scale, reduction=reduction, ignore_index=ignore_index,
            backend=backend, memory_budget=memory_budget, device=device, dtype=dtype,
        )  # fmt: skip

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN
