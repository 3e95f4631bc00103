"""Where a public name is, for errors of who asks for it at another place."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect

import fused_margin as fm

# Nearest to a newcomer first; each has a list of what is public.
MODULES = (
    "losses", "functional", "margins", "negatives", "metrics", "sampling", "optim", "distributed",
    "regularizers", "schedules", "convert", "tuning", "compat", "compat.heads",
    "compat.insightface", "compat.pml",
)  # fmt: skip
CUTOFF = 0.75  # how alike a misspelled name is, of `difflib`
# What others call a loss, without "Loss" at its end.
ALIASES = {
    **dict.fromkeys(
        ("AMSoftmax", "AdditiveMarginSoftmax", "LargeMarginCosine", "LMCL"), "CosFaceLoss"
    ),
    **dict.fromkeys(("AAMSoftmax", "AdditiveAngularMarginSoftmax", "InsightFace"), "ArcFaceLoss"),
    **dict.fromkeys(("NormFace", "CosineSoftmax", "NormSoftmax"), "NormalizedSoftmaxLoss"),
    **dict.fromkeys(("ASoftmax", "AngularSoftmax"), "SphereFaceLoss"),
    **dict.fromkeys(("SubArcFace", "SubCenterArcFace"), "ArcFaceLoss(..., sub_centers=3)"),
    **dict.fromkeys(("ArcFaceHead", "ArcHead"), "ArcFaceLoss"),
    "AdditiveAngularMargin": "ArcFaceLoss, or with SpeechBrain's arguments"
    " fused_margin.compat.heads.SpeechBrainAAM",
}


def whereabouts(name: str) -> str:
    """Where a name is that was asked for in vain, as the end of an error; "" if nowhere."""
    if name.startswith("_"):
        return ""  # asked for by tools, for which nothing is to be imported
    if importlib.util.find_spec(f"fused_margin.{name}") is not None:
        # asked too by `from fused_margin import name`, which imports it then
        return f"; it is a module: import fused_margin.{name}"
    modules = {one: importlib.import_module(f"fused_margin.{one}") for one in MODULES}
    places: dict[str, list[str]] = {one: [f"fused_margin.{one}"] for one in fm.__all__}
    for module, imported in modules.items():
        for one in imported.__all__:
            if module != "losses":  # which are at the top
                places.setdefault(one, []).append(f"fused_margin.{module}.{one}")
    found = places.get(f"{name}Loss", [])[:1] + places.get(name, [])
    alias = ALIASES.get(name.removesuffix("Loss"))
    if alias is not None and not found:
        return f"; it is fused_margin.{alias}"
    if found:
        return f"; it is {' or '.join(found)}"
    if inspect.isroutine(vars(fm.MarginSoftmaxLoss).get(name)):
        return f"; it is a method of losses, criterion.{name}(...)"
    near = difflib.get_close_matches(name, places, n=1, cutoff=CUTOFF)
    return f"; did you mean {' or '.join(places[near[0]])}?" if near else ""
