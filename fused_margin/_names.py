"""What other packages call the arguments of this one: the hints of errors about names."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Names of one thing, this package's first. A name may stand for several.
SAME: tuple[tuple[str, ...], ...] = (
    ("num_classes", "out_features", "classnum", "class_num", "num_class", "n_classes", "n_class",
     "nClasses", "num_labels", "out_neurons", "out_dim", "num_ids", "num_identities"),
    ("embedding_size", "in_features", "in_feat", "embedding_dim", "embed_dim", "emb_dim", "dim",
     "embed_size", "emb_size", "feat_dim", "feature_dim", "feature_size", "input_size", "in_dim",
     "inp_dim", "nOut"),
    ("margin", "m", "arc_margin", "cos_margin"),
    ("scale", "s", "arc_scale", "logit_scale", "scale_factor", "norm_scale"),
    ("sub_centers", "K", "k", "num_centers", "num_subcenters", "n_centers", "centers_per_class"),
    ("k", "K", "k_top", "top_k", "topk", "top"),
    ("penalty", "mp", "m", "margin"),
    ("m2", "m", "margin"),
    ("m3", "m", "margin"),
    ("label_smoothing", "smoothing", "smooth", "smooth_eps", "eps", "epsilon"),
    ("focal_gamma", "focusing"),
    ("focal_alpha", "alpha"),
    ("class_weight", "class_weights", "weight", "weights", "cls_weight"),
    ("sample_weight", "sample_weights", "weight", "weights"),
    ("ignore_index", "ignore_label", "ignore_lb", "padding_idx"),
    ("reduction", "size_average", "reduce"),
    ("momentum", "t_alpha", "alpha", "ema"),
    ("sigma", "std"),
    ("lower_margin", "l_margin", "m", "margin"),
    ("upper_margin", "u_margin", "m", "margin"),
    ("lower_norm", "l_a"),
    ("upper_norm", "u_a"),
    ("regularizer", "lambda_g", "lamda", "lambda_"),
    ("kind", "mode", "margin_type", "loss_type"),
    ("embeddings", "embedding", "x", "input", "inputs", "feature", "features", "feats"),
    ("labels", "label", "y", "target", "targets"),
    ("device", "device_id"),
)  # fmt: skip

OF_PML = "is an argument of the losses of fused_margin.compat.pml"
OF_COMBINED = "is an argument of CombinedMarginLoss (combined_margin)"
# Of what a call takes under no name, in words that follow the name.
REMARKS: dict[str, str] = {
    "temperature": "is the inverse of scale: pass scale=1 / temperature",
    "tau": "is the inverse of scale: pass scale=1 / tau",
    "gamma": "is focal_gamma where it is the exponent of 1 - p, and scale in Circle loss",
    "easy_margin": 'is boundary="easy" of ArcFace and its kin',
    "ls_eps": (
        "is label_smoothing in most packages; fused_margin.compat.heads.ArcMarginProduct computes"
        " it as Kaggle's notebooks do"
    ),
    "margin": (
        "has no place in a loss without a margin; ArcFace takes one in radians, CosFace an offset"
        " of the cosine"
    ),
    "scale": "is derived by this loss; NormalizedSoftmaxLoss (normalized_softmax) takes one",
    "m1": OF_COMBINED,
    "m2": OF_COMBINED,
    "m3": OF_COMBINED,
    "sample_rate": "is the rate of fused_margin.sampling.sample_negatives(criterion, rate)",
    "interclass_filtering_threshold": (
        "is that of fused_margin.negatives.filtered(threshold, zero=True), and an argument of"
        " fused_margin.compat.insightface.CombinedMarginLoss"
    ),
    "mp": "is the penalty of functional.inter_topk, which makes negatives",
    "k_top": "is k of functional.inter_topk, which makes negatives",
    "fp16": "is torch.autocast here: call the loss under it",
    "indices_tuple": OF_PML,
    "ref_emb": OF_PML,
    "ref_labels": OF_PML,
    "weight_regularizer": OF_PML,
    "weight_reg_weight": OF_PML,
    "embedding_regularizer": OF_PML,
    "embedding_reg_weight": OF_PML,
    "weight_init_func": OF_PML,
    "reducer": OF_PML,
    "distance": OF_PML,
}
# Where names of this package belong that aren't taken: by a constructor, a call or a function.
CALLED = "goes where the loss is called: criterion(embeddings, labels, {0}=...)"
SET = "is a setting: give it to the constructor, or assign criterion.{0}"
METHOD = "is a method: implement {0}(self, embeddings, labels) in a subclass"
OF_SHAPE = "follows from the shape of weight, (C, D)"
OF_TENSORS = "is that of the tensors"
OF_MARGIN_SOFTMAX = "is an argument of functional.margin_softmax"
OF_CONSTRUCTORS = {
    "sample_weight": CALLED,
    "return_stats": CALLED,
    "psi": f"{METHOD}; or it {OF_MARGIN_SOFTMAX}",
    "negatives": f"{METHOD}; or pass it to a function, as functional.margin_softmax",
    "penalty": METHOD,
}
OF_FUNCTIONS = {
    "num_classes": OF_SHAPE,
    "embedding_size": OF_SHAPE,
    "device": OF_TENSORS,
    "dtype": OF_TENSORS,
    "psi": OF_MARGIN_SOFTMAX,
}


def hints(names: Iterable[str], call: Callable[..., Any], settings: Iterable[str] = ()) -> str:
    """What was likely meant by keywords that ``call`` doesn't take; "" if nothing is known.

    Args:
        names: the keywords that were given.
        call: a function or a class.
        settings: what the constructor takes, if ``call`` is the call of a module.
    """
    taken = [name for name in inspect.signature(call).parameters if name != "self"]
    places = OF_CONSTRUCTORS if isinstance(call, type) else OF_FUNCTIONS
    if settings:
        places = {**dict.fromkeys(settings, SET), "negatives": OF_CONSTRUCTORS["negatives"]}
    meant = {name: _hint(name, taken, places) for name in names if name not in taken}
    texts = ((name, text) for name, text in meant.items() if text)
    return "; ".join(t if t.startswith("did you mean") else f"{n!r} {t}" for n, t in texts)


def _hint(name: str, taken: list[str], places: Mapping[str, str]) -> str:
    known = of_attribute(name, taken, places)
    near = [] if known else difflib.get_close_matches(name, taken, n=1)
    return f"did you mean {near[0]!r}?" if near else known


def of_attribute(name: str, taken: list[str], places: Mapping[str, str]) -> str:
    """What was likely meant by a name that isn't taken; "" if nothing is known.

    Args:
        name: as it was given.
        taken: the names that are. places: where others belong.
    """
    if name in places:
        return places[name].format(name)
    if "temperature" in taken and any(name in group for group in SAME if group[0] == "scale"):
        return "is 1 / temperature here"
    groups = [group for group in SAME if name in group]
    same = dict.fromkeys(one for group in groups for one in group if one in taken)
    if same:
        return f"is {' or '.join(same)} here"
    ours = [name, *(group[0] for group in groups if places.get(group[0]) != METHOD)]
    for known in (places, REMARKS):
        for one in ours:
            if one in known:
                return known[one].format(one)
    return ""


def explain(error: TypeError, call: Callable[..., Any], given: tuple[Any, ...], names: Any) -> None:
    """Add hints to an error of Python's own about the arguments of a call.

    Args:
        error: as it was caught where the call was made.
        call: what was called. given, names: with what arguments and keywords.
    """
    traceback = error.__traceback__
    if traceback is None or traceback.tb_next is not None:
        return  # something inside it raised
    settings: Iterable[str] = ()
    if call.__name__ == "__init__":
        call = type(given[0])
    elif given and hasattr(given[0], "settings"):
        settings = inspect.signature(type(given[0])).parameters
    text = hints(names, call, settings)
    if re.search("missing .*'(local_)?labels?'$", str(error)) and hasattr(given[0], "logits"):
        text = text or "scaled cosines without labels are criterion.logits(embeddings)"
    if "positional argument" in str(error) and " were given" in str(error):
        parameters = list(inspect.signature(call).parameters.values())
        order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        text = f"in order it takes {', '.join(order)}, and all else by name"
    if text:
        error.args = (f"{error}; {text}",)


def constructor(call: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor whose class has `unread` look at later assignments."""

    @functools.wraps(call)
    def __init__(*args: P.args, **kwargs: P.kwargs) -> None:
        call(*args, **kwargs)
        made: Any = args[0]
        if type(made).__init__ is __init__:  # not that of a base class, which others go on from
            made.__dict__["_is_made"] = True

    return __init__


def unread(module: Any, name: str, taken: Iterable[str]) -> None:
    """Refuse another package's name for an attribute, which nothing would read.

    What a constructor has made, or a class says, is its own.

    Args:
        module: of a class whose constructors have the decorator.
        name: what is assigned.
        taken: the attributes that the module reads.
    """
    kind = type(module)
    if not module.__dict__.get("_is_made") or hasattr(kind, name) or hasattr(module, name):
        return
    meant = of_attribute(name, list(taken), getattr(kind, "_elsewhere", {}))
    if not meant or any(name in inspect.get_annotations(one) for one in kind.__mro__):
        return
    raise AttributeError(
        f"{kind.__name__} would not read {name!r}, which {meant}. An attribute of your own is made"
        " in the constructor of a subclass, or has another name"
    )


class Watched:
    """A base before `nn.Module` for a class without settings: `unread` looks at assignments."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let constructors say when they are done."""
        super().__init_subclass__(**keywords)
        own = cls.__dict__.get("__init__")
        if own is not None:
            cls.__init__ = constructor(hinting(own))

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, but for names that other packages have for what it reads."""
        unread(self, name, (one for one in vars(self) if not one.startswith("_")))
        super().__setattr__(name, value)


def hinting(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate what is called with names: its errors about them say what was likely meant."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except TypeError as error:
            explain(error, call, args, kwargs)
            raise

    return wrapped
