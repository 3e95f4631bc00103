r"""Margin-softmax losses as functions of embeddings, class weights and labels.

For row n with cosines :math:`c_{nk} = \hat x_n \cdot \hat w_k` and label :math:`y_n`, every loss is

.. math:: -\log \frac{e^{s \psi(u_n)}}{e^{s \psi(u_n)} + \sum_{k \ne y_n} e^{s c_{nk}}},
    \qquad u_n = c_{n y_n},

with a margin :math:`\psi` on the target cosine; some reshape the cosines of other classes too
(`fused_margin.negatives`). Neither the (N, C) cosines nor a normalised copy of
the weights is built, except by ``backend="reference"``; a bounded part of the cosines may be kept
for the backward (``memory_budget``).
"""

from fused_margin.functional.adaptive import (
    adacos_scale,
    adaface,
    adaface_statistics,
    elasticface,
    magface,
)
from fused_margin.functional.core import Psi as Psi
from fused_margin.functional.core import cosine_logits, cosine_lse, margin_softmax
from fused_margin.functional.fixed import (
    arcface,
    combined_margin,
    cosface,
    fixed_adacos,
    fixed_adacos_scale,
    normalized_softmax,
    sphereface,
)
from fused_margin.functional.others import (
    circle_softmax,
    curricularface,
    curricularface_t,
    inter_topk,
    mv_softmax,
)

__all__ = [
    "adacos_scale",
    "adaface",
    "adaface_statistics",
    "arcface",
    "circle_softmax",
    "combined_margin",
    "cosface",
    "cosine_logits",
    "cosine_lse",
    "curricularface",
    "curricularface_t",
    "elasticface",
    "fixed_adacos",
    "fixed_adacos_scale",
    "inter_topk",
    "magface",
    "margin_softmax",
    "mv_softmax",
    "normalized_softmax",
    "sphereface",
]
