"""The base class of all losses: class weights, settings, options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Set
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import TypedDict, Unpack

from fused_margin import (
    _centers,
    _compiled,
    _growth,
    _names,
    _ops,
    _remedies,
    _setup,
    _updates,
    _validate,
    _validate_settings,
    functional,
)
from fused_margin.distributed import _shards
from fused_margin.functional.core import margin_loss
from fused_margin.functional.options import Options, expanded
from fused_margin.negatives import Negatives


class LossOptions(TypedDict, total=False):
    """What ``**options`` of a loss may be; `MarginSoftmaxLoss` describes each."""

    reduction: str
    ignore_index: int
    backend: str
    memory_budget: int | None
    class_weight: torch.Tensor | None
    focal_gamma: float | None
    focal_alpha: float | None
    label_smoothing: float
    sub_centers: int
    device: torch.device | str | int | None
    dtype: torch.dtype | None


DEFAULTS: dict[str, Any] = {
    name: Options._field_defaults.get(name) for name in LossOptions.__annotations__
}


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

    What is in `settings` may be assigned between any two steps, as a schedule does
    (`fused_margin.schedules`); it is checked as in the constructor, and not in ``state_dict()``,
    which holds parameters and statistics alone. `torch.compile` compiles a schedule of a number
    twice, for its first value and for all others. (But the integers ``ignore_index`` and
    ``memory_budget`` for each value, where a compiled function finds the module in a global
    variable: torch takes those for constants. Give it the module as an argument, or in another
    module.) A tensor among the settings, as ``class_weight``, is a buffer that moves with the
    module; ``to_empty()`` loses it as any other, and a learnt scale, so assign it after that.

    A loss with statistics, as `AdaCosLoss` and `AdaFaceLoss`, updates them at the start of each
    ``forward`` in training mode, from the rows that are not ignored, and of all ranks where
    `torch.distributed` is initialised (of sharded classes those that hold shards): each rank then
    has to make as many calls. As part of what activation checkpointing runs twice such a loss
    raises. With gradient accumulation they are updated for every part of a batch.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0; or a Parameter of one element, as ``nn.Parameter(torch.tensor(64.0))``, which
            is learnt and part of ``state_dict()`` (`fully_shard` wants it of shape (1,)). None only
            from a subclass that derives it, in a property ``scale``.
        **options: keywords that all losses share.

            - reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            - ignore_index: label of rows that are left out, -100.
            - backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
            - memory_budget: bytes that the forward may keep for the backward, None for the default;
              see `functional.arcface`.
            - class_weight: (C,) floating, as `torch.nn.functional.cross_entropy` takes it.
            - focal_gamma, focal_alpha: alpha (1 - p)^gamma is a factor of each loss; see
              `functional.arcface`.
            - label_smoothing: the part of the target that goes to all classes alike, in [0, 1]. A
              class weight is a factor of the row's whole loss, where `torch.nn.functional
              .cross_entropy` weighs each class's part of the smoothing.
            - sub_centers: K rows of weights for each class, of which the nearest counts: see
              `functional.arcface`. Class k's are rows K k to K k + K - 1. It can't be assigned.
            - device, dtype: of the class weights; fp32 by default.

    Attributes:
        weight: (C, D) parameter, one row per class (K with ``sub_centers=K``), drawn from
            normal(0, 1/D) so that rows start with norm about 1.
        settings: what may be assigned, in the order of ``repr``, with the function that checks a
            value and returns what is kept. A subclass may add its own.
        sampler: what `sampling.sample_negatives` sets, else None: all classes take part.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "scale": _validate_settings.module_scale,
        "reduction": _validate.reduction,
        "ignore_index": _validate.ignore_index,
        "backend": _validate.backend_name,
        "memory_budget": _validate.memory_budget,
        "class_weight": _validate_settings.module_class_weight,
        "focal_gamma": _validate_settings.focal_gamma,
        "focal_alpha": _validate_settings.focal_alpha,
        "label_smoothing": _validate.smoothing,
    }
    _elsewhere: ClassVar[dict[str, str]] = {
        name: text for name, text in _names.OF_CONSTRUCTORS.items() if text == _names.CALLED
    }
    weight: nn.Parameter
    scale: Any  # a number, a Parameter, or what a subclass derives
    reduction: str
    ignore_index: int
    backend: str
    memory_budget: int | None
    class_weight: torch.Tensor | None
    focal_gamma: float | None
    focal_alpha: float | None
    label_smoothing: float
    sub_centers: int
    sampler: Any  # of `fused_margin.sampling`, or None
    _emptied: Set[str] = frozenset()  # what `to_empty` has left without values, until they are seen

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float | nn.Parameter | None = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__()
        _validate.keywords(options, DEFAULTS, type(self))
        chosen: dict[str, Any] = {**DEFAULTS, **options}
        _validate_settings.sizes_first(type(self), num_classes, embedding_size)
        num_classes = _validate.size("num_classes", num_classes, 2)
        embedding_size = _validate.size("embedding_size", embedding_size, 1)
        device, dtype = chosen.pop("device"), chosen.pop("dtype")
        dtype = _validate.floating("dtype", torch.float32 if dtype is None else dtype)
        self.sub_centers = _validate.size("sub_centers", chosen.pop("sub_centers"), 1)
        if self.sub_centers > 1:
            _centers.own(self)
        num_rows = num_classes * self.sub_centers
        self.weight = nn.Parameter(
            torch.empty(num_rows, embedding_size, device=device, dtype=dtype)
        )
        statistics = self.initial_statistics()
        for name in statistics:
            exact = torch.promote_types(dtype, torch.float32)
            self.register_buffer(name, torch.empty((), device=device, dtype=exact))
        if scale is not None or not ("scale" in statistics or hasattr(type(self), "scale")):
            self.scale = scale
        for name, value in chosen.items():
            setattr(self, name, value)
        self.sampler = None
        self.reset_parameters()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Check its methods; show what ``**options`` stands for in signatures and ``help()``."""
        super().__init_subclass__(**keywords)
        _validate_settings.methods(cls)
        own = cls.__dict__.get("__init__")
        if own is not None:
            hinted: Any = _names.constructor(_names.hinting(own))
            hinted.__signature__ = expanded(own, DEFAULTS, LossOptions)
            cls.__init__ = hinted

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, but what is in `settings` is checked, and tensors become buffers."""
        if name == "sub_centers" and name in self.__dict__:
            _validate_settings.fixed(name, self.sub_centers, value)
        if name in _validate_settings.METHODS:
            _validate_settings.is_method(name)
        check = self.settings.get(name)
        is_parameter = isinstance(value, nn.Parameter)
        if check is None:
            _names.unread(self, name, _validate_settings.assignable(self))
            super().__setattr__(name, value)
            return
        _validate_settings.constructed(self, name)
        value = check(value)
        if self._parameters.get(name) is not None and not is_parameter:
            _validate_settings.learnt(name, value)
        is_statistic = name in self._buffers and name not in self._non_persistent_buffers_set
        if isinstance(value, torch.Tensor) and not is_parameter and not is_statistic:
            _validate_settings.per_class(name, value, self.num_classes)
            self.__dict__.pop(name, None)
            self.register_buffer(name, value.to(self.weight.device), persistent=False)
            return
        if name in self._buffers and not isinstance(value, torch.Tensor):
            delattr(self, name)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As for any module, but statistics keep their precision where parameters lose theirs.

        A moving mean in bf16 would stay where it is: a hundredth of a batch is less than a step
        of it.
        """
        before = {name: self._buffers.get(name) for name in self.initial_statistics()}
        was_meta = self.weight.device.type == "meta"
        super()._apply(fn, recurse)
        if was_meta and self.weight.device.type != "meta":  # by `to_empty`
            self._mark_emptied(self.settings.keys() | before.keys())
            if self.sampler is not None:
                self.sampler.reset_parameters()
        for name, buffer in before.items():
            after = self._buffers.get(name)
            if buffer is not None and after is not None and after.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(after.device)
        return self

    @torch.no_grad()
    def _mark_emptied(self, names: Set[str]) -> None:
        """Make tensors that have no values any more NaN, and remember which."""
        tensors = {name: self._parameters.get(name, self._buffers.get(name)) for name in names}
        emptied = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for tensor in emptied.values():
            tensor.fill_(float("nan"))
        self.__dict__["_emptied"] = frozenset(emptied)

    def __setstate__(self, state: Any) -> None:
        """As for any module: of a copy, or of what was pickled."""
        super().__setstate__(state)
        if self.sub_centers > 1:
            _centers.own(self)

    def initial_statistics(self) -> dict[str, float]:
        """Buffers that a loss keeps from batch to batch, by name, with what they start from."""
        return {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the class weights anew from normal(0, 1/D), and forget statistics.

        As the constructor does, with the same weights for the same seed; a learnt scale and tensors
        among the settings stay. Shards are drawn by blocks
        of classes, so that any number of ranks draws the same: others than a whole criterion's.
        """
        draw_normal(self.weight, self.embedding_size**-0.5)
        for name, value in self.initial_statistics().items():
            getattr(self, name).fill_(value)
        if self.sampler is not None:
            self.sampler.reset_parameters()

    def grow(
        self, num_new: int, optimizer: Any = None, *, weight: torch.Tensor | None = None,
        **of_new_classes: float | torch.Tensor | None,
    ) -> range:  # fmt: skip
        """Add classes to a loss that is being trained, between two steps.

        The weights of the classes so far stay, with what the optimisers keep of them. The new ones
        begin without momentum or moments, and all with one norm, the geometric mean of those so
        far: the loss doesn't see norms, but a row of twice the norm turns four times as slowly.
        Parameters stay the same objects, so that optimisers and
        their schedulers go on; the sampler goes on too. `AdaCosLoss` keeps the scale that its
        batches have made (before the first it is that of the new number); the next batch adapts it
        to all classes. `torch.optim.Adam` corrects its moments by a count of steps that is the
        weight's as a whole, so that new rows' first updates are up to three times as long;
        `optim.RowSparseAdam` counts for each row.

        **Sharded** (`distributed.shard_classes`) it is a collective: every rank makes the same call
        with the same arguments. Shards are cut anew, rows are sent to the ranks that hold them now,
        and the result is that of one process with the same seed. No rank ever has more than its old
        and its new shard.

        **Memory**: old and new weights are there at once for a moment, then old and new of each
        state of the optimiser, one after the other: 20 GB more for 10 million classes at D = 512 in
        fp32. If that fails, go on from a checkpoint.

        ```python
        new = criterion.grow(len(new_people), optimizer)  # labels of the new classes
        new = criterion.grow(2, optimizer, weight=class_means, class_weight=1.0, margin=0.3)
        averaged.module.grow(2, weight=criterion.weight[-2:], class_weight=1.0, margin=0.3)
        ```

        The last line is for a moving average, as `torch.optim.swa_utils.AveragedModel` keeps it,
        here of the criterion: its next update raises if it hasn't grown too (of shards give
        ``full_tensor()``). A checkpoint from before has fewer classes, weights and state of the
        optimiser alike: build both of as many, load it, and grow. `torch.optim`'s optimisers load a
        state of other sizes without a word and fail at their next step.

        Args:
            num_new: how many, >= 1.
            optimizer: the one that holds the weight, or several; each that has made a step with it.
                One that keeps something of the weight and isn't given is looked for, and refused.
            weight: (num_new, D), directions of the new classes (num_new K rows with sub-centres),
                as means of their embeddings, of any norms but 0; by default drawn from a normal
                distribution. To have norms of your own, write them into
                ``criterion.weight[-num_new:]`` afterwards (of shards that is a copy: into the rows
                of ``weight.to_local()``).
            of_new_classes: for each tensor with a number for each class, as ``class_weight``, a
                margin, or what a subclass has registered: a number, or a tensor (num_new, ...),
                which is taken as it is.
                None for one whose first dimension only happens to be C.

        Returns:
            The new classes.

        Raises:
            ValueError: the weight has a gradient, belongs to a module of DDP or FSDP2, or is held
                by a graph; a row that is given is 0 or not finite; a tensor with a number for each
                class isn't named; an optimiser keeps what can't grow, or wasn't given. Nothing has
                changed then.
        """
        draws_normal = type(self).reset_parameters is MarginSoftmaxLoss.reset_parameters
        asked = _growth.Asked(num_new, optimizer, weight, of_new_classes, draws_normal)
        return _growth.grow(self, asked)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As for any module, with what to do about class weights of another name."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            text = _remedies.of_another_name("weight", state_dict, self.weight)
            error.args = (f"{error}{text}",)
            raise

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As for any module, but weights may be whole or sharded, whichever these are.

        And statistics have fp32 at least, also where a state is assigned (``assign=True``).
        """
        name = f"{prefix}weight"
        error_msgs += _remedies.of_transposed(name, state_dict.get(name), self.weight)
        if isinstance(state_dict.get(name), torch.Tensor):
            state_dict[name] = _shards.fitted(state_dict[name], self.weight)
            given = state_dict[name]
            if given.ndim == 2 and given.shape[1] == self.weight.shape[1]:
                error_msgs += _remedies.of_other_classes(
                    type(self).__name__, given.shape[0], self.weight.shape[0], self.sub_centers
                )
        if self.sampler is None:  # as a setting, it isn't of the state of a loss without
            state_dict.pop(f"{prefix}sampler.step", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.initial_statistics():
            value = self._buffers.get(name)
            if value is not None and value.itemsize < torch.float32.itemsize:
                self._buffers[name] = value.float()

    @property
    def num_classes(self) -> int:
        """C, the rows of the weight over those of a class."""
        return self.weight.shape[0] // self.sub_centers

    @property
    def embedding_size(self) -> int:
        """D, the columns of the weight."""
        return self.weight.shape[1]

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

    def negatives(self, embeddings: torch.Tensor, labels: torch.Tensor) -> Negatives | None:
        """What becomes of the other classes' cosines in this batch; None for s c.

        Args:
            embeddings: (N, D), not normalised.
            labels: (N,) as they were given.
        """
        return None

    def update_statistics(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Update buffers, by `set_statistic`; called in training mode, before `psi`.

        Args:
            embeddings: (N, D), not normalised.
            labels: (N,) as they were given.
        """

    @torch.no_grad()
    def set_statistic(self, name: str, value: torch.Tensor) -> None:
        """Overwrite a buffer of `initial_statistics` in place, as `update_statistics` does.

        Args:
            name: of the buffer.
            value: one element; it is cast.
        """
        # Dynamo takes a 0-d fp64 tensor on a CPU for a number, and a compiled `copy_` into one is
        # lost without a word (torch 2.13); into a view of it, it isn't
        self.get_buffer(name).view(1).copy_(value)

    def penalty(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """What is added to the loss of each row, (N,); None for nothing."""
        return None

    @_compiled.raising()
    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Loss of embeddings (N, D) and labels (N,).

        Args:
            embeddings: (N, D).
            labels: (N,).
            sample_weight: (N,) floating, a factor of each row's loss, by which a mean is weighted.
            return_stats: return the loss and a `metrics.Evaluation` of the same sweep:
                ``loss, stats = criterion(x, y, return_stats=True)``, ``stats.accuracy()``.

        Returns:
            0-d loss, or (N,) for ``reduction="none"``.
        """
        _setup.warn_if_unsynchronized(self)
        if self._emptied and not torch.compiler.is_compiling():
            _validate_settings.filled(self, self._emptied)
            self.__dict__["_emptied"] = frozenset()
        weight = self.weight
        _validate.tensors(embeddings, weight, labels)
        ignore_index, memory_budget = self._integers()
        has_statistics = type(self).update_statistics is not MarginSoftmaxLoss.update_statistics
        if self.training and has_statistics:
            _setup.not_recomputed(self, "statistics")
            _ops.check_labels(labels, self.num_classes, ignore_index)  # before they change anything
            with torch.no_grad():
                self.update_statistics(embeddings, labels)
        is_sampled = False
        if self.training and self.sampler is not None:
            is_sampled = self.sampler.rate < 1.0
            if not is_sampled:
                _setup.check_sampled(self, weight, is_sparse=False)
                self.sampler.begin()
        options = Options(
            reduction=self.reduction, ignore_index=ignore_index, backend=self.backend,
            memory_budget=memory_budget, class_weight=self.class_weight,
            sample_weight=sample_weight, focal_gamma=self.focal_gamma, focal_alpha=self.focal_alpha,
            label_smoothing=self.label_smoothing, sub_centers=self.sub_centers,
            negatives=_validate.negatives(self.negatives(embeddings, labels)),
            return_stats=_validate.flag("return_stats", return_stats),
        )  # fmt: skip
        given = (
            embeddings, weight, labels, self.psi(embeddings, labels), self._current_scale(),
            options, self.penalty(embeddings, labels),
        )  # fmt: skip
        is_compiling = torch.compiler.is_dynamo_compiling()
        if is_sampled and is_compiling:
            from fused_margin import _uncompiled

            return _uncompiled.call(self._sampled_loss, *given)
        if is_sampled:
            return self._sampled_loss(*given)
        with contextlib.nullcontext() if self.training or is_compiling else _updates.paused():
            return margin_loss(*given)

    def _sampled_loss(self, *given: Any) -> Any:
        """`margin_loss` over the classes that take part in this step."""
        _setup.not_recomputed(self, "classes")
        _setup.check_sampled(self, self.weight, is_sparse=True)
        return margin_loss(*given, sampler=self.sampler.begin())

    def _current_scale(self) -> float | torch.Tensor:
        """The scale; of a buffer a copy, which autograd may keep while the buffer changes."""
        scale = self.scale
        return scale.reshape(()).clone() if isinstance(scale, torch.Tensor) else scale

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
        return functional.cosine_logits(
            embeddings, self.weight, self._current_scale(), sub_centers=self.sub_centers
        )

    def extra_repr(self) -> str:
        """Sizes and settings, for ``repr``; None is left out."""
        names = ["num_classes", "embedding_size", *self.settings]
        if self.sub_centers > 1:
            names.append("sub_centers")
        if not self.label_smoothing:
            names.remove("label_smoothing")
        shown = ((name, getattr(self, name)) for name in names)
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown if value is not None)


def draw_normal(weight: torch.Tensor, std: float) -> None:
    """Fill class weights from normal(0, std^2); of shards each rank its own."""
    if _validate.is_dtensor(weight):
        _shards.draw_normal(weight, std)
    else:
        nn.init.normal_(weight, std=std)


_init: Any = _names.constructor(_names.hinting(MarginSoftmaxLoss.__init__))
_init.__signature__ = expanded(MarginSoftmaxLoss.__init__, DEFAULTS, LossOptions)
MarginSoftmaxLoss.__init__ = _init


def of_rows(
    name: str, value: float | torch.Tensor, labels: torch.Tensor, num_classes: int
) -> float | torch.Tensor:
    """A setting that is a number, or one for each class, for the rows of a batch: (N,) then."""
    if not isinstance(value, torch.Tensor):
        return value
    _validate_settings.per_class(name, value, num_classes)
    return value[labels.long().clamp(0, num_classes - 1)]  # those out of range are refused later


def _shown(value: Any) -> str:
    """A setting in ``repr``: of a tensor its shape, of one with a single element that."""
    if isinstance(value, torch.Tensor):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "Tensor"
        is_number = value.numel() == 1 and not (value.is_meta or _validate.is_dtensor(value))
        inside = f"{value.item():g}" if is_number else f"shape {tuple(value.shape)}"
        return f"{kind}({inside})"
    return f"{value:g}" if isinstance(value, float) else repr(value)
