"""Names that other packages use, and names in another's place: each error says what is right."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _names, compat, metrics

X, W, Y = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 1, 5])
CRITERION: Any = fm.ArcFaceLoss(6, 4)


def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Callable[[], Any]:
    """A call that is made later, of which no type checker knows."""
    return lambda: function(*arguments, **keywords)


# What is called, and the words of its error.
ERRORS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "insightface, Kaggle": (
        call(fm.ArcFaceLoss, 6, 4, s=30, m=0.5),
        ("'s' is scale here", "'m' is margin here", "takes num_classes"),
    ),
    "OML": (
        call(fm.ArcFaceLoss, in_features=4, num_classes=6, m=0.5, s=64),
        ("missing 1", "'in_features' is embedding_size here", "'m' is margin", "'s' is scale"),
    ),
    "arcface-pytorch": (
        call(fm.CosFaceLoss, in_features=4, out_features=6),
        ("'in_features' is embedding_size here", "'out_features' is num_classes here"),
    ),
    "a function": (
        call(fmf.arcface, X, W, Y, m=0.5, s=64), ("'m' is margin here", "'s' is scale here"),
    ),
    "a function that needs a scale": (
        call(fmf.normalized_softmax, X, W, Y, s=64), ("missing 1", "'s' is scale here"),
    ),
    "labels of a function": (
        call(fmf.arcface, X, W, target=Y), ("missing 1", "'target' is labels here"),
    ),
    "the primitive": (call(fmf.cosine_lse, X, W, Y, s=9.0), ("'s' is scale here",)),
    "logits": (call(fmf.cosine_logits, X, W, s=9.0), ("'s' is scale here",)),
    "temperature": (
        call(fm.NormalizedSoftmaxLoss, 6, 4, temperature=0.05), ("pass scale=1 / temperature",),
    ),
    "combined": (call(fm.CombinedMarginLoss, 6, 4, m=0.5), ("'m' is m2 or m3 here",)),
    "m1": (call(fm.ArcFaceLoss, 6, 4, m1=1.0), ("'m1' is an argument of CombinedMarginLoss",)),
    "no margin": (
        call(fm.NormalizedSoftmaxLoss, 6, 4, m=0.5), ("'m' has no place", "without a margin"),
    ),
    "no scale": (
        call(fm.FixedAdaCosLoss, 6, 4, s=30), ("'s' is derived", "NormalizedSoftmaxLoss"),
    ),
    "MagFace": (
        call(fm.MagFaceLoss, 6, 4, l_a=10, u_a=110, l_margin=0.4, u_margin=0.8, lambda_g=35),
        ("'l_a' is lower_norm", "'u_a' is upper_norm", "'l_margin' is lower_margin",
         "'u_margin' is upper_margin", "'lambda_g' is regularizer"),
    ),
    "AdaFace": (call(fm.AdaFaceLoss, 6, 4, t_alpha=0.01), ("'t_alpha' is momentum here",)),
    "ElasticFace": (call(fm.ElasticFaceLoss, 6, 4, std=0.05), ("'std' is sigma here",)),
    "easy margin": (
        call(fm.ArcFaceLoss, 6, 4, easy_margin=True), ("'easy_margin' is boundary=\"easy\"",),
    ),
    "sub-centres": (call(fm.ArcFaceLoss, 6, 4, K=3), ("'K' is sub_centers here",)),
    "sub-centres, k": (call(fm.ArcFaceLoss, 6, 4, k=3), ("'k' is sub_centers here",)),
    "class weights of torch": (
        call(fm.ArcFaceLoss, 6, 4, weight=torch.ones(6)), ("'weight' is class_weight here",),
    ),
    "smoothing": (call(fm.ArcFaceLoss, 6, 4, eps=0.1), ("'eps' is label_smoothing here",)),
    "Kaggle's smoothing": (call(fm.ArcFaceLoss, 6, 4, ls_eps=0.1), ("heads.ArcMarginProduct",)),
    "focal": (call(fm.ArcFaceLoss, 6, 4, gamma=2.0), ("'gamma' is focal_gamma where",)),
    "sampling": (call(fm.ArcFaceLoss, 6, 4, sample_rate=0.1), ("sample_negatives(criterion, ",)),
    "filter": (
        call(fm.ArcFaceLoss, 6, 4, interclass_filtering_threshold=0.4),
        ("negatives.filtered(threshold, zero=True)",),
    ),
    "regulariser": (
        call(fm.ArcFaceLoss, 6, 4, weight_regularizer=None), ("losses of fused_margin.compat.pml",),
    ),
    "a row's weights": (
        call(fm.ArcFaceLoss, 6, 4, sample_weight=None),
        ("goes where the loss is called: criterion(embeddings, labels, sample_weight=...)",),
    ),
    "a row's weights, in the plural": (
        call(fm.ArcFaceLoss, 6, 4, sample_weights=None), ("criterion(embeddings, labels, sample_w",)
    ),
    "statistics": (
        call(fm.ArcFaceLoss, 6, 4, return_stats=True), ("criterion(embeddings, labels, return_s",),
    ),
    "negatives": (
        call(fm.ArcFaceLoss, 6, 4, negatives=fm.negatives.filtered(0.4)),
        ("is a method: implement negatives(self, embeddings, labels) in a subclass",),
    ),
    "psi": (
        call(fm.MarginSoftmaxLoss, 6, 4, psi=abs),
        ("implement psi(self, embeddings, labels)", "functional.margin_softmax"),
    ),
    "psi of a function": (
        call(fmf.arcface, X, W, Y, psi=abs), ("'psi' is an argument of functional.margin_softmax",)
    ),
    "penalty": (
        call(fm.ArcFaceLoss, 6, 4, penalty=abs), ("implement penalty(self, embeddings, labels)",)
    ),
    "a setting in the call": (
        call(CRITERION, X, Y, class_weight=torch.ones(6)),
        ("'class_weight' is a setting", "assign criterion.class_weight"),
    ),
    "another setting in the call": (
        call(CRITERION, X, Y, reduction="none"), ("'reduction' is a setting",),
    ),
    "negatives in the call": (
        call(CRITERION, X, Y, negatives=None), ("implement negatives(self, embeddings, labels)",),
    ),
    "weights in the call": (call(CRITERION, X, Y, weight=W), ("'weight' is sample_weight here",)),
    "labels of the call": (call(CRITERION, X, target=Y), ("'target' is labels here",)),
    "a miner": (call(CRITERION, X, Y, indices_tuple=None), ("losses of fused_margin.compat.pml",)),
    "sizes of a function": (
        call(fmf.arcface, X, W, Y, num_classes=6, device="cpu"),
        ("'num_classes' follows from the shape", "'device' is that of the tensors"),
    ),
    "inter-topk": (
        call(fmf.inter_topk, X, W, Y, K=2), ("'K' is sub_centers or k here",),
    ),
    "inter-topk, WeSpeaker": (
        call(fmf.inter_topk, X, W, Y, k_top=2, mp=0.1),
        ("'k_top' is k here", "'mp' is penalty here"),
    ),
    "inter-topk, margin": (call(fmf.inter_topk, X, W, Y, m=0.1), ("'m' is penalty here",)),
    "the next scale": (call(fmf.adacos_scale, X, W, Y, s=9.0), ("'s' is scale here",)),
    "the next t": (
        call(fmf.curricularface_t, X, W, Y, 0.1, alpha=0.1), ("'alpha' is momentum here",),
    ),
    "the next norms": (
        call(fmf.adaface_statistics, X, Y, torch.ones(()), torch.ones(()), t_alpha=0.1),
        ("'t_alpha' is momentum here",),
    ),
    "the nearest": (call(metrics.predict, X, W, top_k=2), ("'top_k' is k here",)),
    "evaluation": (call(metrics.evaluate, X, W, Y, K=2), ("'K' is sub_centers here",)),
    "centres": (call(metrics.center_counts, X, W, Y, K=2), ("'K' is sub_centers here",)),
    "a head's own names": (
        call(compat.heads.ArcMarginProduct, 4, 6, scale=30, margin=0.5),
        ("'scale' is s here", "'margin' is m here"),
    ),
    "insightface's own names": (
        call(compat.insightface.CombinedMarginLoss, scale=64, m1=1.0, margin=0.5),
        ("unexpected keyword", "'scale' is s here", "'margin' is m2 or m3 here"),
    ),
    "insightface's CosFace": (
        call(compat.insightface.CosFace, 64, margin=0.4), ("'margin' is m here",)
    ),
    "pytorch-metric-learning's": (
        call(compat.pml.ArcFaceLoss, 6, 4, s=30, m=0.5),
        ("ArcFaceLoss got an unexpected", "'s' is scale here", "'m' is margin here"),
    ),
    "pytorch-metric-learning's temperature": (
        call(compat.pml.NormalizedSoftmaxLoss, 6, 4, s=20), ("'s' is 1 / temperature here",),
    ),
    "pytorch-metric-learning's sizes": (
        call(compat.pml.CosFaceLoss, 6, in_features=4), ("'in_features' is embedding_size here",),
    ),
    "a call of pytorch-metric-learning's": (
        call(compat.pml.ArcFaceLoss(6, 4), X, target=Y), ("'target' is labels here",),
    ),
    "logits of a call": (
        call(CRITERION, X), ("missing 1", "without labels are criterion.logits(embeddings)"),
    ),
    "logits of a head's call": (
        call(compat.heads.ArcMarginProduct(4, 6), X), ("'label'; scaled cosines without labels",),
    ),
    "logits of insightface's call": (
        call(compat.insightface.PartialFC_V2(compat.insightface.ArcFace(), 4, 6), X),
        ("'local_labels'; scaled cosines without labels",),
    ),
    "a call of a head": (
        call(compat.heads.ArcMarginProduct(4, 6), X, targets=Y), ("'targets' is label here",),
    ),
    "what pytorch-metric-learning's takes": (
        call(compat.pml.SphereFaceLoss, 6, 4, reduction="sum"),
        ("It takes num_classes, embedding_size, margin, scale, weight_regularizer, ", "reducer"),
    ),
    "a name that nobody has": (call(fm.ArcFaceLoss, 6, 4, marjin=0.5), ("mean 'margin'? It",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    made, fragments = ERRORS[name]
    with pytest.raises(TypeError) as caught:
        made()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_every_name_is_known_somewhere() -> None:
    """The first of each group is an argument of this package, and no group has one twice."""
    kinds = [getattr(fm, name) for name in fm.losses.__all__]
    calls = [*kinds, *(getattr(fmf, name) for name in fmf.__all__)]
    calls += [getattr(metrics, name) for name in metrics.__all__]
    ours = {name for one in calls for name in inspect.signature(one).parameters}
    for group in _names.SAME:
        assert group[0] in ours
        assert len(set(group)) == len(group)
    assert {*_names.OF_FUNCTIONS, *_names.OF_CONSTRUCTORS} <= ours | {"penalty", "negatives"}


def test_errors_of_the_body_are_left_alone() -> None:
    class Own(fm.MarginSoftmaxLoss):
        def __init__(self, num_classes: int, m: float) -> None:
            super().__init__(num_classes, len(m))  # pyright: ignore[reportArgumentType]

    with pytest.raises(TypeError, match=re.compile(r"no len\(\)$")):
        Own(6, m=0.3)

    class WithLambda(fm.MarginSoftmaxLoss):
        def psi(self, embeddings: Any, labels: Any) -> Any:
            return lambda: 0.0

    with pytest.raises(TypeError, match=r"given$"):
        WithLambda(6, 4)(X, Y)


def test_a_constructor_of_ones_own() -> None:
    class Own(fm.ArcFaceLoss):
        def __init__(self, num_classes: int, margin: float) -> None:
            super().__init__(num_classes, 4, margin)

    with pytest.raises(TypeError, match=r"'classnum' is num_classes here; 'm' is margin here$"):
        call(Own, classnum=6, m=0.3)()
    assert Own(6, 0.3).margin == 0.3


METHODS: dict[str, tuple[str, Any, str]] = {
    "without arguments": (
        "negatives", lambda self: None,
        r"negatives of Own must be .* negatives\(self, embeddings, labels\), got neg.*\(self\)",
    ),
    "a value": ("negatives", fm.negatives.filtered(0.4), "got Negatives"),
    "a number": ("penalty", 0.06, "penalty of Own must be a method .* got 0.06"),
    "a penalty of the embeddings": ("penalty", lambda self, embeddings: None, "got penalty"),
    "psi of the cosines": ("psi", lambda self, u: u, r"got psi\(self, u\); it returns the func"),
    "a property": ("psi", property(lambda self: fm.margins.NO_MARGIN), "got <property"),
    "statistics": ("update_statistics", lambda self: None, "update_statistics of Own"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_cannot_be_called(name: str) -> None:
    method, value, message = METHODS[name]
    with pytest.raises(TypeError, match=message):
        type("Own", (fm.ArcFaceLoss,), {method: value})


@pytest.mark.parametrize(
    "value",
    [
        staticmethod(lambda embeddings, labels: None),
        classmethod(lambda cls, embeddings, labels: None),
        lambda self, *args: None,
        lambda self, embeddings, labels, more=None: None,
    ],
)
def test_methods_that_can_be_called(value: Any) -> None:
    Own = type("Own", (fm.ArcFaceLoss,), {"negatives": value})
    criterion = Own(6, 4)
    criterion.load_state_dict(CRITERION.state_dict())
    assert torch.equal(criterion(X, Y), CRITERION(X, Y))


@pytest.mark.parametrize("name", ["psi", "negatives", "penalty", "update_statistics"])
def test_methods_are_not_assigned(name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name} of a loss is a method: implement {name}"):
        setattr(fm.ArcFaceLoss(6, 4), name, lambda u: u)


# --- attributes -----------------------------------------------------------------------------------

heads, insightface, pml = compat.heads, compat.insightface, compat.pml
PARTIAL = functools.partial(insightface.PartialFC_V2, insightface.ArcFace(), 4, 6)
# What is assigned to which loss, and the words of its error.
ASSIGNED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "scale": (lambda: fm.ArcFaceLoss(6, 4), "s", "ArcFaceLoss would not read 's', which is scale"),
    "margin": (lambda: fm.CosFaceLoss(6, 4), "m", "'m', which is margin here. An attribute of"),
    "combined": (lambda: fm.CombinedMarginLoss(6, 4), "margin", "which is m2 or m3 here"),
    "no margin": (lambda: fm.FixedAdaCosLoss(6, 4), "margin", "has no place in a loss without"),
    "no scale": (lambda: fm.FixedAdaCosLoss(6, 4), "s", "is derived by this loss; Normalized"),
    "a moving scale": (lambda: fm.AdaCosLoss(6, 4), "s", "is derived by this loss"),
    "MagFace": (lambda: fm.MagFaceLoss(6, 4), "l_margin", "is lower_margin here"),
    "AdaFace": (lambda: fm.AdaFaceLoss(6, 4), "t_alpha", "is momentum here"),
    "torch's weights": (lambda: fm.ArcFaceLoss(6, 4), "weights", "is class_weight here"),
    "rows' weights": (lambda: fm.ArcFaceLoss(6, 4), "sample_weight", "goes where the loss is"),
    "stats": (lambda: fm.ArcFaceLoss(6, 4), "return_stats", "goes where the loss is called"),
    "temperature": (lambda: fm.NormalizedSoftmaxLoss(6, 4), "temperature", "the inverse of scale"),
    "easy margin": (lambda: fm.ArcFaceLoss(6, 4), "easy_margin", 'is boundary="easy"'),
    "centres": (lambda: fm.ArcFaceLoss(6, 4), "K", "is sub_centers here"),
    "a head": (lambda: heads.WeSpeakerAAM(4, 6), "s", "WeSpeakerAAM would not read 's', which"),
    "PartialFC": (PARTIAL, "s", "is scale here"),
    "PartialFC's margin": (PARTIAL, "m", "is an attribute of its margin_softmax"),
    "insightface's ArcFace": (insightface.ArcFace, "scale", "is s here"),
    "insightface's CosFace": (insightface.CosFace, "margin", "is m here"),
    "insightface's": (
        lambda: insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0), "margin", "is m2 or m3 here",
    ),
    "pml": (lambda: pml.ArcFaceLoss(6, 4), "s", "ArcFaceLoss would not read 's', which is scale"),
    "pml's temperature": (lambda: pml.NormalizedSoftmaxLoss(6, 4), "scale", "is 1 / temperature h"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASSIGNED)
def test_an_attribute_that_nothing_reads(name: str) -> None:
    """Of a loss as it was made, of a copy, and of a subclass without such an attribute."""
    make, attribute, words = ASSIGNED[name]
    criterion = make()
    heir = copy.deepcopy(criterion)
    heir.__class__ = type(type(criterion).__name__, (type(criterion),), {})
    for one in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), heir):
        before = dict(vars(one))
        with pytest.raises(AttributeError, match=re.escape(words)):
            setattr(one, attribute, 0.3)
        assert vars(one) == before


def test_the_original_s_names_set_a_head_s_settings() -> None:
    head = heads.ArcMarginProduct(4, 6)
    head.s, head.m = 16, 0.25
    assert (head.s, head.scale, head.m, head.margin) == (16.0, 16.0, 0.25, 0.25)
    with pytest.raises(ValueError, match="radians"):
        head.m = 28.6
    with pytest.raises(ValueError, match="sample_negatives"):
        PARTIAL().sample_rate = 0.1


@pytest.mark.parametrize("base", [fm.ArcFaceLoss, pml.ArcFaceLoss])
def test_attributes_of_ones_own(base: Any) -> None:
    """A constructor's before and after its base's, a class's, a property, a Parameter, a buffer."""

    class Own(base):
        temperature = 0.1
        tau: float

        def __init__(self, num_classes: int, embedding_size: int) -> None:
            self.s = 30.0
            super().__init__(num_classes, embedding_size)
            self.m = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("gamma", torch.zeros(()))

        @property
        def k(self) -> int:
            return self._k

        @k.setter
        def k(self, value: int) -> None:
            self._k = value

    class Further(Own):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.easy_margin = False

    own: Any = Further()
    own.s, own.temperature, own.tau, own.k, own.easy_margin = 1.0, 2.0, 3.0, 4, True
    own.m, own.gamma = torch.nn.Parameter(torch.ones(())), torch.ones(())
    own.anything = 5  # that no other package has
    assert (own.s, own.temperature, own.tau, own.k, own.easy_margin) == (1.0, 2.0, 3.0, 4, True)
    assert {"m", "gamma"} <= own.state_dict().keys()
    own(X, Y).backward()
    with pytest.raises(AttributeError, match="would not read 'mp'"):
        own.mp = 0.1
    own._parameters.pop("m")
    own.register_parameter("m", torch.nn.Parameter(torch.ones(())))


def test_a_setting_before_there_is_a_module() -> None:
    class Own(fm.ArcFaceLoss):
        def __init__(self) -> None:
            self.margin = 0.3
            super().__init__(6, 4)

    with pytest.raises(AttributeError, match=r"margin of Own is set before super\(\).__init__\(\)"):
        Own()


def test_a_schedule_of_another_package_s_name() -> None:
    with pytest.raises(ValueError, match=r"no setting 'm', but margin, .*; 'm' is margin here$"):
        fm.schedules.Linear(fm.ArcFaceLoss(6, 4), 0.0, 0.3, 0, 9, setting="m")
