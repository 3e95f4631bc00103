"""The three products are the three products by every route, and the quickest is taken."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines, products


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_every_route_multiplies(mode: str) -> None:
    problem = baselines.make_problem("arcface", 24, 2500, 16).in_mode(mode)
    found = list(products.routes(problem))
    assert {route.block for route in found} == {0, 1024, 2048}
    assert len(set(map(str, found))) == len(found) >= 6
    x, w = problem.x.double(), problem.w.to(problem.x.dtype).double()
    cosines = x @ w.t()
    expected = cosines.t() @ x, cosines @ w
    tolerance = 1e-5 if mode == "fp32" else 2e-2
    for route in found:
        routed = products.RoutedProducts(problem, route)
        for _ in range(2):  # nothing is added to what a step left
            routed.forward()
            routed.step()
        for part, whole in zip((routed.d_w, routed.d_x), expected, strict=True):
            assert (part.double() - whole).norm() < tolerance * whole.norm(), route


def test_the_quickest_route_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = baselines.make_problem("arcface", 4, 1500, 8)
    chosen = products.Route(1024, True, False)
    monkeypatch.setattr(products, "_time", lambda routed: 1.0 if routed.route == chosen else 2.0)
    quickest, seconds = products.quickest(problem)
    assert quickest.route == chosen
    assert quickest.name == "three products, blocks of 1,024 classes, classes first"
    assert set(seconds) == set(map(str, products.routes(problem)))


def test_onednn_is_asked_where_it_multiplies_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = baselines.make_problem("arcface", 4, 50, 8)
    for has_it in (True, False):
        monkeypatch.setattr(products, "MULTIPLIES_FP32_BY_ONEDNN", has_it)
        assert any(route.by_onednn for route in products.routes(problem)) == has_it
    assert not any(route.by_onednn for route in products.routes(problem.to(torch.bfloat16)))
