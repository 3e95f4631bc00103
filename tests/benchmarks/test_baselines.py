"""The contenders: who can be bound, what each computes, and which chunk is the quickest."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contenders import GPU_ONLY, HAS_LCE
from torch import Tensor

from benchmarks import baselines, harness

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", ["arcface", "fixed_adacos"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_gate_passes_every_contender(loss: str, mode: str) -> None:
    problem = baselines.make_problem(loss, 32, 500, 64).in_mode(mode)
    keys = [key for key in baselines.EVERYONE if key != "compiled"]
    contenders, missing = baselines.bind(problem, keys)
    without = set(GPU_ONLY) if mode == "fp32" else GPU_ONLY | {"usual"}
    if not HAS_LCE:
        without |= {"lce", "lce_default", "lce_chunked"}
    assert set(missing) == without
    gate = harness.Gate(problem)
    for contender in contenders.values():
        errors = gate.check(contender)
        assert set(errors) == {"loss", "d_x", "d_w of targets", "d_w of other classes"}
        assert contender.drops_margin == (
            loss == "arcface" and contender.name.startswith("F.linear_cross_entropy")
        )


def test_gate_passes_compiled_code_under_autocast() -> None:
    problem = baselines.make_problem("arcface", 8, 60, 16).in_mode("autocast")
    compiled = baselines.careful(problem)
    loss = torch.compile(baselines.careful_loss, backend="aot_eager", fullgraph=True)
    x, w = compiled.leaves
    compiled.compute_loss = lambda: loss(x, w, problem.labels, problem.margin, problem.scale)
    errors = harness.Gate(problem).check(compiled)
    assert errors["d_x"] > 1e-4  # products were in bf16


def test_yardstick_in_chunks_of_rows_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = baselines.make_problem("arcface", 7, 40, 8)
    whole = harness._exact(problem)
    monkeypatch.setattr(harness, "YARDSTICK_BYTES", 3 * 8 * 40)
    for part, expected in zip(harness._exact(problem), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)


def test_missing_torch_function_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    problem = baselines.make_problem("arcface", 4, 20, 8)
    contenders, missing = baselines.bind(problem, ["lce", "lce_chunked", "lce_default"])
    assert contenders == {}
    reason = f"torch {torch.__version__} has no linear_cross_entropy"
    assert missing == dict.fromkeys(["lce", "lce_chunked", "lce_default"], reason)


def test_missing_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    for package in ("cut_cross_entropy", "liger_kernel"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    problem = baselines.make_problem("arcface", 4, 20, 8).in_mode("bf16")
    _, missing = baselines.bind(problem, GPU_ONLY)
    assert missing == dict.fromkeys(GPU_ONLY, "not installed")


def test_package_that_breaks_on_import_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    problem = baselines.make_problem("arcface", 4, 20, 8).in_mode("bf16")
    _, missing = baselines.bind(problem, ["liger"])
    assert missing["liger"].startswith("installed, but can't be imported: ")


def fake_modules(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put modules in the place of the two GPU packages; returns the keywords of their calls."""
    calls: list[dict[str, Any]] = []

    def cross_entropy(x: Tensor, w: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
        assert x.dtype == w.dtype == torch.bfloat16
        calls.append(keywords)
        return F.cross_entropy((x @ w.t()).float(), labels)

    for name in ("cut_cross_entropy", "liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    functional = types.ModuleType("liger_kernel.transformers.functional")
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", cross_entropy, False)
    cut = sys.modules["cut_cross_entropy"]
    monkeypatch.setattr(cut, "linear_cross_entropy", cross_entropy, False)
    return calls


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_gpu_packages_are_called_and_gated(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    calls = fake_modules(monkeypatch)
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    problem = baselines.make_problem("arcface", 32, 500, 64).in_mode(mode)
    contenders, missing = baselines.bind(problem, ["cce", "cce_exact", "liger", "liger_fp32"])
    assert missing == {}
    assert all(contender.drops_margin for contender in contenders.values())
    errors, refused = harness.admit(harness.Gate(problem), contenders)
    assert set(errors) == GPU_ONLY, refused
    keywords = [{}, {"filter_eps": None}, {}, {"accum_dtype": torch.float32}]
    assert calls == [each for each in keywords for _ in ("forward", "step")]


def test_cut_cross_entropy_refuses_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch)
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    _, missing = baselines.bind(baselines.make_problem("arcface", 4, 20, 8), ["cce", "cce_exact"])
    assert missing == dict.fromkeys(["cce", "cce_exact"], "takes bf16 and fp16, not float32")


def test_gate_refuses_a_lower_bound_without_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch)
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    problem = baselines.make_problem("arcface", 32, 500, 64).in_mode("bf16")
    wrong = baselines.liger(dataclasses.replace(problem, scale=0.8 * problem.scale))
    with pytest.raises(harness.WrongResultError, match="Liger"):
        harness.Gate(problem).check(wrong)


def test_search_takes_the_quickest_chunk_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = baselines.make_problem("arcface", 6, 20, 8)
    times = {8: None, 4: 2.0, 2: 1.0, 1: 3.0}

    def bind(problem, chunk: int):
        contender = baselines.careful(problem)
        contender.details["chunk"] = chunk
        return contender

    def time_step(contender, problem) -> float:
        seconds = times[contender.details["chunk"]]
        if seconds is None:
            raise torch.OutOfMemoryError
        return seconds

    monkeypatch.setattr(baselines, "lce_chunked", bind)
    monkeypatch.setattr(baselines, "_time_step", time_step)
    assert baselines.search_chunk(problem) == times
    assert baselines.best_chunk(times) == 2
    with pytest.raises(baselines.UnavailableError, match="fits the memory"):
        baselines.best_chunk({8: None})


def test_bare_products_are_the_three_products() -> None:
    problem = baselines.make_problem("arcface", 4, 20, 8)
    products = baselines.BareProducts(problem)
    products.step()
    cosines = problem.x @ problem.w.t()
    torch.testing.assert_close(products.cosines, cosines)
    torch.testing.assert_close(products.d_w, cosines.t() @ problem.x)
    torch.testing.assert_close(products.d_x, cosines @ problem.w)
    for mode in ("bf16", "autocast"):
        in_mode = baselines.BareProducts(problem.in_mode(mode))
        in_mode.step()
        assert {in_mode.cosines.dtype, in_mode.d_w.dtype} == {torch.bfloat16}


def test_the_auto_chunker_has_to_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that Inductor leaves whole is no rival; small logits it leaves."""
    problem = baselines.make_problem("arcface", 8, 60, 16)
    metrics = importlib.import_module("torch._inductor.metrics")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contender = baselines.auto_chunked(problem)
    assert contender.drops_margin
    with pytest.raises(baselines.UnavailableError, match="nothing to chunk"):
        contender.step()
    monkeypatch.setattr(metrics, "num_auto_chunking", metrics.num_auto_chunking + 1)
    assert max(harness.Gate(problem).check(contender).values()) < 1e-5
    monkeypatch.setitem(sys.modules, "torch._inductor.config", types.ModuleType("config"))
    with pytest.raises(baselines.UnavailableError, match="has no auto-chunker"):
        baselines.auto_chunked(problem)
