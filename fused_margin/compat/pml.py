r"""pytorch-metric-learning's losses and regularisers, with its signatures, units and state.

```python
from fused_margin.compat import pml as losses  # was: from pytorch_metric_learning import losses
```

Values and gradients are those of pytorch-metric-learning 2 in fp32 and fp64. What differs:

- `W` is (D, C) as there, but its memory is that of a contiguous (C, D), so that the kernels read
  whole rows. It is drawn by the same generator calls, so that a seed gives the same numbers.
- Its values keep their dtype where embeddings are half precision (there they are rounded to it for
  good), and the loss is fp32 then; embeddings of more bits widen it for good, as there. It moves to
  the embeddings' device, as there.
- ArcFace's slope is finite where an embedding lies on its class's weight (there it is NaN), and
  within 0.0032 rad of it it is bounded, see `margins.sine`; a margin above pi is an error. The
  slope of a multiple angle at pi is the one just below, not its negative.
- The loss of a row that is classified well is small where it rounds to 0 there: AvgNonZeroReducer,
  which leaves out losses of 0, counts it.
- An empty batch has loss 0, not NaN. A row of label -100 has loss 0 and counts in the mean.
- ``collect_stats=True``, distances other than those named, and reference embeddings are errors.
- ``fully_shard``, `torch.optim.LBFGS` and ``torch.nn.utils.parameters_to_vector`` refuse W, as
  parameters have to be contiguous there; those of `fused_margin.losses` are.

Reducers and distances are pytorch-metric-learning's own objects, which is not imported here.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fused_margin import (
    _compiled,
    _names,
    _remedies,
    _setup,
    _validate,
    _validate_margins,
    _validate_settings,
    functional,
    margins,
    metrics,
)
from fused_margin._numerics import accumulation_dtype
from fused_margin.compat import _dots, _refusals
from fused_margin.compat._options import LossOptions, Regularizer
from fused_margin.compat._regularizers import (
    CenterInvariantRegularizer,
    LpRegularizer,
    RegularFaceRegularizer,
    SparseCentersRegularizer,
    ZeroMeanRegularizer,
    mean,
    part,
)
from fused_margin.functional.core import margin_loss
from fused_margin.functional.options import Options, expanded

__all__ = [
    "ArcFaceLoss",
    "CenterInvariantRegularizer",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "LpRegularizer",
    "NormalizedSoftmaxLoss",
    "RegularFaceRegularizer",
    "SparseCentersRegularizer",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "ZeroMeanRegularizer",
]

Tensor = torch.Tensor


def _takes_everything(reducer: Any) -> bool:
    """Whether one reducer gets all sub-losses at once, in place of a copy of it for each."""
    kinds = {kind.__name__ for kind in type(reducer).__mro__}
    return bool(kinds & {"MultipleReducers", "DoNothingReducer"})


def _row_weights(indices_tuple: Any, losses: Tensor) -> Tensor | None:
    """How often a miner has chosen each row, over the most often; None for all equal."""
    if indices_tuple is None:
        return None
    _refusals.indices_tuple(indices_tuple)
    indices = torch.cat([chosen.to(losses.device) for chosen in indices_tuple])
    if indices.numel() == 0:
        return None
    counts = torch.bincount(indices, minlength=losses.shape[0])
    return counts.to(losses.dtype) / counts.max()


class _ClassWeights(_names.Watched, nn.Module):
    """W, regularisers and reduction, as all these losses have them.

    Args:
        num_columns: columns of W.
        embedding_size: D, its rows.
        weight_regularizer: function of W's transpose, (C, D); its value is added to the loss.
        weight_reg_weight: a factor of that.
        embedding_regularizer: function of the embeddings, (N, D), likewise.
        embedding_reg_weight: a factor of that.
        reducer: one of pytorch_metric_learning.reducers; None is the mean.
        weight_init_func: fills W, (D, C); ``torch.nn.init.normal_`` by default.
        distance: see the class; None is its default.
        collect_stats: False or None.
    """

    W: nn.Parameter
    distances: tuple[str, ...] = ("CosineSimilarity",)

    def __init__(
        self, num_columns: int, embedding_size: int, *,
        weight_regularizer: Regularizer | None = None, weight_reg_weight: float = 1,
        embedding_regularizer: Regularizer | None = None, embedding_reg_weight: float = 1,
        reducer: Any = None, weight_init_func: Callable[[Tensor], Any] | None = None,
        distance: Any = None, collect_stats: bool | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        _validate.keywords(unknown, (), type(self))
        num_columns = _validate.size("num_classes", num_columns, 2)
        embedding_size = _validate.size("embedding_size", embedding_size, 1)
        _refusals.distance(distance, self.distances, type(self).__name__)
        _refusals.collect_stats(collect_stats)
        _refusals.reducer(reducer)
        self.distance = distance
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        names = self.sub_loss_names()
        if reducer is None or _takes_everything(reducer):
            self.reducer = reducer
        elif len(names) == 1:
            self.reducer = copy.deepcopy(reducer)
        else:
            self.reducer = nn.ModuleDict({name: copy.deepcopy(reducer) for name in names})
        self.weight_init_func = nn.init.normal_ if weight_init_func is None else weight_init_func
        self.W = nn.Parameter(torch.empty(num_columns, embedding_size).t())
        self.reset_parameters()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Show in signatures and errors what ``**options`` stands for."""
        super().__init_subclass__(**keywords)
        own: Any = cls.__dict__.get("__init__")
        if own is None:
            return
        base: Any = super(cls, cls).__init__
        more = {
            name: parameter.default
            for name, parameter in inspect.signature(base).parameters.items()
            if name in LossOptions.__annotations__ and parameter.kind is parameter.KEYWORD_ONLY
        }
        own.__signature__ = expanded(own, more, LossOptions)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As for any module, with what to do about class weights of another name."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            error.args = (f"{error}{_remedies.of_another_name('W', state_dict, self.W)}",)
            raise

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As for any module, with what to do about a W that lies the other way."""
        name = f"{prefix}W"
        error_msgs += _remedies.of_transposed(name, state_dict.get(name), self.W)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def reset_parameters(self) -> None:
        """Fill W anew by ``weight_init_func``."""
        # row by row of (D, C), as the peer's memory lies: the same seed gives the same numbers
        drawn = nn.Parameter(torch.empty(self.W.shape, dtype=self.W.dtype, device=self.W.device))
        self.weight_init_func(drawn)
        with torch.no_grad():
            self.W.copy_(drawn)

    def grow(self, num_new: int, optimizer: Any = None, **_: Any) -> None:
        """Raise: `MarginSoftmaxLoss.grow` is of weights with a row for each class."""
        _refusals.grow(type(self).__name__)

    def sub_loss_names(self) -> list[str]:
        """Names of what is summed, in the order in which reducers get it."""
        names = ["loss"]
        if self.weight_regularizer is not None:
            names.append("weight_reg_loss")
        if self.embedding_regularizer is not None:
            names.append("embedding_reg_loss")
        return names

    def _losses(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row, (N,); weight is W's transpose."""
        raise NotImplementedError

    @_compiled.raising()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss, 0-d, or what the reducer makes of it.

        Args:
            embeddings: (N, D).
            labels: (N,), any integer dtype and device.
            indices_tuple: what a miner returns. A row's loss is weighed by how often the row is in
                it, over the most often.
            ref_emb: not supported, as in pytorch-metric-learning.
            ref_labels: not supported.
        """
        _refusals.peer_call(embeddings, labels, ref_emb, ref_labels, type(self).__name__)
        if isinstance(embeddings, torch.Tensor) and embeddings.is_floating_point():
            _refusals.mixture(labels)
        _setup.warn_if_unsynchronized(self, self.W)
        if isinstance(embeddings, torch.Tensor) and isinstance(labels, torch.Tensor):
            self._follow(embeddings)
            labels = labels.to(embeddings.device)
        weight = self.W.t()
        losses = self._losses(embeddings, weight, labels)  # pyright: ignore[reportArgumentType]
        row_weights = _row_weights(indices_tuple, losses)
        if row_weights is not None:
            losses = losses * row_weights
        rows = torch.arange(losses.shape[0], device=losses.device)
        parts = {"loss": part(losses, rows)}
        if self.weight_regularizer is not None:
            value = self.weight_regularizer(weight) * self.weight_reg_weight
            parts["weight_reg_loss"] = part(value, None)
        if self.embedding_regularizer is not None:
            value = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            parts["embedding_reg_loss"] = part(value, None)
        return self._reduced(parts, embeddings, labels)

    def _follow(self, embeddings: Tensor) -> None:
        """Bring W to the device of the embeddings, and to fp32 or fp64 if they have more bits."""
        if _validate.is_dtensor(self.W) or self.W.is_meta or embeddings.is_meta:
            return
        if self.W.device != embeddings.device:
            self.W.data = self.W.data.to(embeddings.device)
        is_wide = embeddings.dtype in (torch.float32, torch.float64)
        is_wider = is_wide and embeddings.itemsize > self.W.itemsize
        if is_wider and not torch.is_autocast_enabled(embeddings.device.type):
            self.W.data = self.W.data.to(embeddings.dtype)

    def _reduced(self, parts: dict[str, dict[str, Any]], embeddings: Tensor, labels: Any) -> Any:
        reducer = self.reducer
        if isinstance(reducer, nn.ModuleDict):
            return torch.stack(
                [reducer[name]({name: one}, embeddings, labels) for name, one in parts.items()]
            ).sum()
        if reducer is not None:
            return reducer(parts, embeddings, labels)
        total = mean(parts.pop("loss")["losses"])
        for more in parts.values():
            total = total + more["losses"]
        return total

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin.

        Args:
            embeddings: (N, D).

        Returns:
            (N, C), fp32 or fp64: the matrix that the loss itself never builds.
        """
        raise NotImplementedError

    def _shown(self) -> dict[str, Any]:
        return {}

    def extra_repr(self) -> str:
        """Sizes, margin and scale, with units."""
        dim, columns = self.W.shape
        shown = {"num_classes": columns, "embedding_size": dim} | self._shown()
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class _OnKernels(_ClassWeights):
    """A loss with a margin on the target cosine and one scale, which the kernels compute.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        sub_centers: K columns of W for each class.
        backend: as in `functional.arcface`.
        memory_budget: likewise.
        options: see `_ClassWeights`.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, *, sub_centers: int = 1,
        backend: str = "auto", memory_budget: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        num_classes = _validate.size("num_classes", num_classes, 2)
        self_centers = _validate.size("sub_centers", sub_centers, 1)
        super().__init__(num_classes * self_centers, embedding_size, **options)
        self.num_classes, self.sub_centers = num_classes, self_centers
        self.backend = _validate.backend_name(backend)
        self.memory_budget = _validate.memory_budget(memory_budget)

    def psi(self, embeddings: Tensor, labels: Tensor) -> functional.Psi:
        """The margin, see `MarginSoftmaxLoss.psi`."""
        raise NotImplementedError

    def _scale(self) -> float:
        raise NotImplementedError

    def _losses(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        _validate.tensors(embeddings, weight, labels)
        options = Options(
            "none", -100, self.backend, self.memory_budget, sub_centers=self.sub_centers
        )
        psi = self.psi(embeddings, labels)
        return margin_loss(embeddings, weight, labels, psi, self._scale(), options)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines, (N, C)."""
        return functional.cosine_logits(
            embeddings, self.W.t(), self._scale(), sub_centers=self.sub_centers
        )

    def extra_repr(self) -> str:
        """Sizes, margin and scale, with units."""
        sizes = f"num_classes={self.num_classes}, embedding_size={self.W.shape[0]}"
        return ", ".join([sizes, *(f"{name}={value}" for name, value in self._shown().items())])


def _degrees(margin: float) -> str:
    return f"{margin:.4g} rad ({math.degrees(margin):.4g} degrees)"


class ArcFaceLoss(_OnKernels):
    """ArcFace as pytorch-metric-learning's: cos(theta + m), cos(theta) - m sin(m) past pi.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in degrees. The attribute ``margin`` is in radians, as there.
        scale: s > 0.
        options: see `_OnKernels` and `_ClassWeights`; ``distance`` may be CosineSimilarity.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 3.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, **options)
        self.margin = _validate_margins.angular_margin(_refusals.degrees(margin))
        self.scale = scale
        _validate_settings.number_scale(scale)

    def psi(self, embeddings: Tensor, labels: Tensor) -> margins.Margin:
        """cos(theta + m)."""
        return margins.angular(self.margin)

    def _scale(self) -> float:
        return self.scale

    def _shown(self) -> dict[str, Any]:
        return {"margin": _degrees(float(self.margin)), "scale": self.scale}


class CosFaceLoss(_OnKernels):
    """CosFace as pytorch-metric-learning's: cos(theta) - m.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine.
        scale: s > 0.
        options: see `_OnKernels` and `_ClassWeights`; ``distance`` may be CosineSimilarity.

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018,
        arXiv:1801.09414, eq. 4.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, *, margin: float = 0.35, scale: float = 64,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = _validate_margins.cosine_margin(margin), scale
        _validate_settings.number_scale(scale)

    def psi(self, embeddings: Tensor, labels: Tensor) -> margins.Margin:
        """cos(theta) - m."""
        return margins.additive(self.margin)

    def _scale(self) -> float:
        return self.scale

    def _shown(self) -> dict[str, Any]:
        return {"margin": f"{self.margin} (cosine)", "scale": self.scale}


class NormalizedSoftmaxLoss(_OnKernels):
    """Normalised softmax as pytorch-metric-learning's: cos(theta) / T.

    With ``distance=DotProductSimilarity(normalize_embeddings=False)`` embeddings are taken as they
    are, and logits are ||x|| cos(theta) / T; then ``backend`` and ``memory_budget`` say nothing.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        temperature: T > 0.
        options: see `_OnKernels` and `_ClassWeights`; ``distance`` may be CosineSimilarity or
            DotProductSimilarity.

    References:
        Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, 2019,
        arXiv:1811.12649.
    """

    distances = ("DotProductSimilarity", "CosineSimilarity")

    def __init__(
        self, num_classes: int, embedding_size: int, temperature: float = 0.05, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.temperature = _validate.positive("temperature", temperature)
        _validate_settings.number_scale(self._scale())

    def psi(self, embeddings: Tensor, labels: Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN

    def _scale(self) -> float:
        return 1.0 / self.temperature

    @property
    def _keeps_norms(self) -> bool:
        return self.distance is not None and not self.distance.normalize_embeddings

    def _losses(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if not self._keeps_norms:
            return super()._losses(embeddings, weight, labels)
        psi = self.psi(embeddings, labels)
        return _dots.losses(embeddings, weight, labels, psi, self._scale(), keep_x=True)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines, (N, C), times norms of embeddings that are not normalised."""
        return _dots.logits(embeddings, self.W.t(), self._scale(), keep_x=self._keeps_norms)

    def _shown(self) -> dict[str, Any]:
        return {"temperature": self.temperature}


class SubCenterArcFaceLoss(ArcFaceLoss):
    """Sub-centre ArcFace as pytorch-metric-learning's: of K rows of a class the nearest counts.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in degrees. The attribute ``margin`` is in radians, as there.
        scale: s > 0.
        sub_centers: K >= 1; W is (D, C K), columns of a class side by side.
        options: see `_OnKernels` and `_ClassWeights`; ``distance`` may be CosineSimilarity.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces,
        ECCV 2020.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64,
        sub_centers: int = 3, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_classes, embedding_size, margin, scale, sub_centers=sub_centers, **options
        )

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows that are far from the centre most rows of their class are nearest to.

        Args:
            embeddings: (N, D).
            labels: (N,).
            threshold: least angle of an outlier, in degrees.
            return_dominant_centers: as in pytorch-metric-learning both are returned in any case.

        Returns:
            Numbers of the rows, class by class, and the dominant centres (D, C), 0 for a class
            without rows.
        """
        rows = self.W.t()
        counts = metrics.center_counts(embeddings, rows, labels, self.sub_centers)
        dominant = metrics.dominant_centers(counts)
        is_far = metrics.outlier_angles(embeddings, rows, labels, dominant) > math.radians(
            threshold
        )
        order = labels.argsort(stable=True)
        chosen = rows[dominant].to(accumulation_dtype(embeddings, rows))
        chosen = chosen.masked_fill(counts.sum(dim=1, keepdim=True) == 0, 0.0)
        return order[is_far[order]], chosen.t()

    def _shown(self) -> dict[str, Any]:
        return super()._shown() | {"sub_centers": self.sub_centers}


class LargeMarginSoftmaxLoss(_ClassWeights):
    r"""L-Softmax as pytorch-metric-learning's: ``s ||w|| ||x|| psi(theta)``.

    .. math:: \psi(\theta) = (-1)^k \cos(m \theta) - 2k, \quad k = \lfloor m \theta / \pi \rfloor

    Norms are part of the logits, which the kernels don't know: plain PyTorch, block by block of
    classes, with as little memory as the other losses.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, a whole number from 1 on.
        scale: s > 0.
        options: see `_ClassWeights`; ``distance`` may be CosineSimilarity.

    References:
        Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, 2016,
        arXiv:1612.02295, eq. 5, 6.
    """

    _keeps_weight_norms = True

    def __init__(
        self, num_classes: int, embedding_size: int, margin: int = 4, scale: float = 1,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, **options)
        self.num_classes = num_classes
        self.margin, self.scale = _refusals.peer_margin(margin), scale
        _validate_settings.number_scale(scale)

    def _losses(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return _dots.losses(
            embeddings, weight, labels, lambda u: multiple_angle(u, self.margin), self.scale,
            keep_x=True, keep_w=self._keeps_weight_norms,
        )  # fmt: skip

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scaled products, (N, C)."""
        return _dots.logits(
            embeddings, self.W.t(), self.scale, keep_x=True, keep_w=self._keeps_weight_norms
        )

    def _shown(self) -> dict[str, Any]:
        return {"margin": f"{self.margin} (times theta)", "scale": self.scale}


class SphereFaceLoss(LargeMarginSoftmaxLoss):
    """SphereFace as pytorch-metric-learning's: `LargeMarginSoftmaxLoss` with ||w|| = 1.

    References:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017,
        arXiv:1704.08063, eq. 7.
    """

    _keeps_weight_norms = False


def multiple_angle(u: Tensor, margin: int) -> Tensor:
    """(-1)^k cos(m theta) - 2k of u = cos(theta), with k = floor(m theta / pi), at most m - 1."""
    previous, current = torch.ones_like(u), u
    for _ in range(margin - 1):  # Chebyshev's recurrence
        previous, current = current, 2.0 * u * current - previous
    k = (margin * u.detach().acos() / math.pi).floor().clamp_max(margin - 1)
    return (1.0 - 2.0 * (k % 2)) * current - 2.0 * k


def __getattr__(name: str) -> Any:
    """Raise: say where other names of pytorch-metric-learning are."""
    raise AttributeError(_refusals.of_peer(name))
