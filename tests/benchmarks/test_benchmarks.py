"""The benchmarks run, write what they promise, and time nothing that is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import Tensor

from fused_margin import functional

pytestmark = pytest.mark.usefixtures("one_thread")
HAS_PEAK = Path("/proc/self/clear_refs").exists()
HAS_LCE = hasattr(F, "linear_cross_entropy")
TINY = ["--n", "4", "--c", "50", "--d", "8", "--rounds", "1"]
GPU_ONLY = {"cce", "cce_exact", "liger", "liger_fp32"}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return (
        importlib.import_module("benchmarks.baselines"),
        importlib.import_module("benchmarks.harness"),
    )


@pytest.fixture
def load(benchmarks):
    """Import a module of the benchmarks by its name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What `benchmarks.cpu` writes and prints on a tiny shape."""
    path = tmp_path_factory.mktemp("new") / "folder" / "cpu.json"
    sizes = ["--n", "8", "--c", "200", "--d", "16", "--rounds", "3", "--threads", "1"]
    options = ["--no-compile", "--no-memory", "--json", str(path)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.syspath_prepend(str(ROOT))
        importlib.import_module("benchmarks.cpu").main([*sizes, *options])
    return path.read_text(), out.getvalue()


@pytest.fixture
def cpu_result(cpu_run: tuple[str, str]) -> tuple[dict[str, Any], str]:
    written, printed = cpu_run
    return json.loads(written), printed


def test_cpu_run_writes_times_ratios_and_environment(cpu_result) -> None:
    result, printed = cpu_result
    assert result["shape"] == {"n": 8, "c": 200, "d": 16}
    lower_bounds = {"lce", "lce_chunked"} if HAS_LCE else set()
    ours = {"ours", "ours_bf16", "ours_autocast"}
    eager = {"careful", "careful_bf16", "usual"}
    assert set(result["results"]) == ours | lower_bounds | eager | {"products"}
    for key, row in result["results"].items():
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] == row["median_s"] > 0
        assert row["name"] in printed
        assert row.get("drops_margin", False) == (key in lower_bounds)
    medians = {key: row["median_s"] for key, row in result["results"].items()}
    rivals = {"careful", "usual"} | lower_bounds
    assert result["ratios_of_medians"] == pytest.approx(
        {
            **{f"{key}_over_ours": medians[key] / medians["ours"] for key in rivals},
            "ours_over_products": medians["ours"] / medians["products"],
            "ours_over_ours_bf16": medians["ours"] / medians["ours_bf16"],
            "ours_over_ours_autocast": medians["ours"] / medians["ours_autocast"],
            "careful_bf16_over_ours_bf16": medians["careful_bf16"] / medians["ours_bf16"],
        }
    )
    environment = result["environment"]
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert {"fused_margin", "cpu", "device", "date", "git_revision"} <= set(environment)


def test_cpu_run_lists_those_without_a_time(cpu_result) -> None:
    result, printed = cpu_result
    assert set(result["without_time"]) == GPU_ONLY | (set() if HAS_LCE else {"lce", "lce_chunked"})
    for key in GPU_ONLY:
        assert result["without_time"][key] == "runs on GPUs only, not on cpu"
        assert f"no time for {key}: runs on GPUs only" in printed


@pytest.mark.skipif(not HAS_LCE, reason="torch has no linear_cross_entropy")
def test_cpu_run_records_the_search_for_the_chunk(cpu_result) -> None:
    result, _ = cpu_result
    row = result["results"]["lce_chunked"]
    assert set(row["search_s"]) == {"8", "4", "2", "1"}
    assert row["search_s"][str(row["chunk_rows"])] == min(row["search_s"].values())
    assert row["own_choice_s"] > 0


def test_cpu_run_takes_the_peak_of_each_contender(load, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, asked = load("cpu"), []

    def measure_apart(n: int, c: int, d: int, key: str, mode: str, **options: Any):
        asked.append((n, c, d, key, mode))
        return {"peak_growth_mib": 2.0, "above_x_w_and_d_w_mib": 1.0}

    monkeypatch.setattr(cpu.memory, "measure_apart", measure_apart)
    settings = cpu._parse([*TINY, "--no-compile"])
    result = cpu.measure(settings)
    assert {(4, 50, 8, "ours", mode) for mode in ("fp32", "bf16", "autocast")} <= set(asked)
    for key, row in result["results"].items():
        assert row.get("above_x_w_and_d_w_mib") == (None if key == "products" else 1.0)


def test_results_are_named_after_device_and_shape(load, benchmarks) -> None:
    _, harness = benchmarks
    stem = load("cpu").file_stem
    assert stem({"n": 64, "c": 100_000, "d": 512}) == "n64"
    assert stem({"n": 64, "c": 5_000, "d": 512}) == "n64-c5000-d512"
    path = harness.result_path("n64")
    assert path.parent == ROOT / "benchmarks" / "results"
    assert path.name == f"{harness.slug(harness.cpu_name())}-n64.json"


def test_wrong_rival_gets_no_time(load, benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines, _ = benchmarks
    right = baselines.CONTENDERS["careful"]

    def wrong(problem):
        return right(dataclasses.replace(problem, scale=1.01 * problem.scale))

    monkeypatch.setitem(baselines.EVERYONE, "careful", wrong)
    cpu = load("cpu")
    result = cpu.measure(cpu._parse([*TINY, "--no-compile", "--no-memory"]))
    assert "careful" not in result["results"]
    assert "careful_over_ours" not in result["ratios_of_medians"]
    assert result["without_time"]["careful"].startswith("wrong result: careful eager")
    assert "no time for careful: wrong result" in cpu.table(result)


def test_wrong_result_of_ours_ends_the_run(load, benchmarks, monkeypatch: pytest.MonkeyPatch):
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 4, 50, 8)
    gate = harness.Gate(problem)
    gate.expected()
    wrong = baselines.ours(dataclasses.replace(problem, scale=1.01 * problem.scale))
    with pytest.raises(harness.WrongResultError, match="fused_margin"):
        harness.admit(gate, {"ours": wrong})


def test_rival_that_fails_is_listed(benchmarks) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 4, 50, 8)
    rival = baselines.careful(problem)

    def fail() -> Tensor:
        raise AssertionError("no kernel for this\nand a long traceback")

    rival.compute_loss = fail
    errors, refused = harness.admit(harness.Gate(problem), {"careful": rival})
    assert errors == {}
    assert refused == {"careful": "failed: AssertionError: no kernel for this"}


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["arcface", "fixed_adacos"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_gate_passes_every_contender(benchmarks, loss: str, mode: str) -> None:
    baselines, harness = benchmarks
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


def test_gate_passes_compiled_code_under_autocast(benchmarks) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 8, 60, 16).in_mode("autocast")
    compiled = baselines.careful(problem)
    loss = torch.compile(baselines.careful_loss, backend="aot_eager", fullgraph=True)
    x, w = compiled.leaves
    compiled.compute_loss = lambda: loss(x, w, problem.labels, problem.margin, problem.scale)
    errors = harness.Gate(problem).check(compiled)
    assert errors["d_x"] > 1e-4  # products were in bf16


def test_yardstick_in_chunks_of_rows_is_the_whole(
    benchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 7, 40, 8)
    whole = harness._exact(problem)
    monkeypatch.setattr(harness, "YARDSTICK_BYTES", 3 * 8 * 40)
    for part, expected in zip(harness._exact(problem), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)


def test_missing_torch_function_is_listed(benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines, _ = benchmarks
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    problem = baselines.make_problem("arcface", 4, 20, 8)
    contenders, missing = baselines.bind(problem, ["lce", "lce_chunked", "lce_default"])
    assert contenders == {}
    reason = f"torch {torch.__version__} has no linear_cross_entropy"
    assert missing == dict.fromkeys(["lce", "lce_chunked", "lce_default"], reason)


def test_missing_package_is_listed(benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines, _ = benchmarks
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    for package in ("cut_cross_entropy", "liger_kernel"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    problem = baselines.make_problem("arcface", 4, 20, 8).in_mode("bf16")
    _, missing = baselines.bind(problem, GPU_ONLY)
    assert missing == dict.fromkeys(GPU_ONLY, "not installed")


def test_package_that_breaks_on_import_is_listed(
    benchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines, _ = benchmarks
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
def test_gpu_packages_are_called_and_gated(
    benchmarks, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    baselines, harness = benchmarks
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


def test_cut_cross_entropy_refuses_fp32(benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines, _ = benchmarks
    fake_modules(monkeypatch)
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    _, missing = baselines.bind(baselines.make_problem("arcface", 4, 20, 8), ["cce", "cce_exact"])
    assert missing == dict.fromkeys(["cce", "cce_exact"], "takes bf16 and fp16, not float32")


def test_gate_refuses_a_lower_bound_without_its_scale(
    benchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines, harness = benchmarks
    fake_modules(monkeypatch)
    monkeypatch.setattr(baselines, "_require_gpu", lambda problem: None)
    problem = baselines.make_problem("arcface", 32, 500, 64).in_mode("bf16")
    wrong = baselines.liger(dataclasses.replace(problem, scale=0.8 * problem.scale))
    with pytest.raises(harness.WrongResultError, match="Liger"):
        harness.Gate(problem).check(wrong)


def test_search_takes_the_quickest_chunk_that_fits(
    benchmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines, _ = benchmarks
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


def test_bare_products_are_the_three_products(benchmarks) -> None:
    baselines, _ = benchmarks
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


# --- the gate and the rounds ----------------------------------------------------------------------


@pytest.mark.parametrize("wrong_part", ["loss", "d_x", "d_w of targets", "d_w of other classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_refuses_a_wrong_part(benchmarks, dtype: torch.dtype, wrong_part: str) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 32, 500, 64).to(dtype)
    gate = harness.Gate(problem)
    contender = baselines.ours(problem)
    factor = 1.0 + 3.0 * harness.TOLERANCES[dtype]
    is_target = torch.zeros(500, 1, dtype=torch.bool)
    is_target[problem.labels] = True
    x, w = contender.leaves
    if wrong_part == "loss":
        right = contender.compute_loss
        contender.compute_loss = lambda: right() * factor
    elif wrong_part == "d_x":
        x.register_hook(lambda grad: grad * factor)
    else:
        rows = is_target if wrong_part == "d_w of targets" else ~is_target
        w.register_hook(lambda grad: torch.where(rows, grad * factor, grad))
    with pytest.raises(harness.WrongResultError, match=wrong_part):
        gate.check(contender)


def test_gate_refuses_a_wrong_forward_alone(benchmarks) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 4, 10, 8)
    contender = baselines.ours(problem)
    right = contender.compute_loss
    contender.compute_loss = lambda: right() * (1.0 if torch.is_grad_enabled() else float("nan"))
    with pytest.raises(harness.WrongResultError, match="loss"):
        harness.Gate(problem).check(contender)


def test_gate_refuses_nan(benchmarks) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 4, 10, 8)
    contender = baselines.ours(problem)
    contender.leaves[0].register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(harness.WrongResultError, match="d_x"):
        harness.Gate(problem).check(contender)


def test_every_round_times_every_contender_with_gradients_cleared(benchmarks) -> None:
    _, harness = benchmarks
    log: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def clear(self) -> None:
            log.append(f"clear {self.name}")

        def step(self) -> None:
            log.append(f"step {self.name}")

    seconds = harness.interleave([Recorder("a"), Recorder("b")], rounds=8, warmups=1)
    assert [len(samples) for samples in seconds] == [8, 8]
    steps = [line for line in log if line.startswith("step")]
    assert len(steps) == 2 * 9
    rounds = [tuple(steps[start : start + 2]) for start in range(0, 18, 2)]
    assert set(rounds) == {("step a", "step b"), ("step b", "step a")}  # nobody always goes first
    assert all(log[log.index(step) - 1] == step.replace("step", "clear") for step in set(steps))


# --- files ----------------------------------------------------------------------------------------


def test_json_is_replaced_whole_or_not_at_all(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, harness = benchmarks
    path = tmp_path / "new" / "result.json"
    harness.write_json(path, {"run": 1})
    folders = []

    def interrupted(source: Path, target: Path) -> Path:
        folders.append(source.parent)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harness.write_json(path, {"run": 2})
    with pytest.raises(TypeError):
        harness.write_json(path, {"run": object()})
    assert folders == [path.parent]  # a rename across file systems wouldn't be atomic
    assert json.loads(path.read_text()) == {"run": 1}
    assert list(path.parent.iterdir()) == [path]


# --- peak memory ----------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_run_counts_and_enforces_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    sizes = ["--n", "256", "--c", "40000", "--d", "64"]
    done = run("-m", "benchmarks.memory", *sizes, "--limit-mib", "0", "--json", str(path))
    assert done.returncode == 1
    assert "above the limit" in done.stderr
    result = json.loads(path.read_text())
    d_w = 40_000 * 64 * 4 / 2**20
    assert result["d_w_mib"] == pytest.approx(d_w)
    assert result["peak_growth_mib"] > d_w  # the gradient itself is seen
    assert result["above_x_w_and_d_w_mib"] == pytest.approx(result["peak_growth_mib"] - d_w)
    assert result["eager_by_formula_mib"] > 3 * 256 * 40_000 * 4 / 2**20
    assert result["contender"] == "ours"


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_of_a_rival_is_measured_apart(load) -> None:
    found = load("memory").measure_apart(256, 40_000, 16, "careful", loss="fixed_adacos")
    assert set(found) == {"peak_growth_mib", "above_x_w_and_d_w_mib"}
    at_least_two_matrices = 2 * 256 * 40_000 * 4 / 2**20
    assert found["above_x_w_and_d_w_mib"] > at_least_two_matrices


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_that_can_not_be_measured_has_a_reason(load) -> None:
    found = load("memory").measure_apart(8, 100, 8, "liger", mode="bf16")
    assert found == {"peak_not_measured": "exit status 1: liger: runs on GPUs only, not on cpu"}


# --- pytest-benchmark -----------------------------------------------------------------------------


def test_pytest_cases_run_and_say_what_they_are(tmp_path: Path, load) -> None:
    path = tmp_path / "bench.json"
    cases = "mnist and arcface and autocast and not compiled"
    arguments = ["--benchmark-only", f"--benchmark-json={path}", "-k", cases]
    done = run("-m", "pytest", "benchmarks/test_bench.py", "-q", *arguments)
    assert done.returncode == 0, done.stdout
    condensed = load("report").condense(json.loads(path.read_text()))
    assert len(condensed["rows"]) == 2 * 2  # two contenders, forward with and without backward
    for row in condensed["rows"]:
        assert row["shape"] == {"n": 128, "c": 10, "d": 128}
        assert (row["shape_name"], row["loss"], row["dtype"]) == ("mnist", "arcface", "autocast")
        assert row["contender"] in {"ours", "careful"}
        assert row["fraction_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert set(row["relative_errors"]) >= {"loss", "d_x", "d_w of targets"}
        assert row["rounds"] == 25
    assert {"device", "torch", "git_revision"} <= set(condensed["environment"])


def test_pytest_cases_cover_losses_dtypes_and_shapes(load) -> None:
    pytest_cases = load("test_bench")
    names = {parameter.id for parameter in pytest_cases.parameters()}
    for shape in ("mnist", "voxceleb2", "sop", "ms1m"):
        for mode in ("fp32", "bf16", "autocast"):
            for key in ("ours", "careful", "compiled"):
                assert f"{shape}-arcface-{mode}-{key}" in names
        assert f"{shape}-fixed_adacos-fp32-ours" in names
        assert f"{shape}-arcface-fp32-lce_chunked" in names


def test_shapes_are_named_after_themselves(load) -> None:
    shapes = load("shapes")
    assert all(name == shape.name for name, shape in shapes.SHAPES.items())
    assert set(shapes.CPU_SHAPES) <= set(shapes.SHAPES)
    ms1m = shapes.SHAPES["ms1m"]
    assert (ms1m.num_rows, ms1m.num_classes, ms1m.dim) == (256, 85_742, 512)


# --- scaling --------------------------------------------------------------------------------------

SCALING = ["--classes", "16,64,256,1024", "--rows", "2,4", "--n", "4", "--c", "32", "--d", "8"]
SCALING += ["--seconds", "0", "--no-memory"]


def test_scaling_resumes_after_an_interruption(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling, path = load("scaling"), tmp_path / "scaling.json"
    measure, measured = scaling.measure, []

    def interrupted(point, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(point)
        return measure(point, *arguments, **keywords)

    monkeypatch.setattr(scaling, "measure", interrupted)
    assert scaling.main([*SCALING, "--json", str(path)]) == 130
    before = json.loads(path.read_text())["points"]
    assert [(point["n"], point["c"]) for point in before] == [(2, 32), (4, 32), (4, 16)]

    first, measured[:] = measured[:], []
    assert scaling.main([*SCALING, "--json", str(path), "--resume"]) == 0
    assert not set(measured) & set(first)
    result = json.loads(path.read_text())
    assert result["points"][:3] == before
    assert [point["c"] for point in result["points"][3:]] == [64, 256, 1024]
    for point in result["points"]:
        assert set(point["results"]) == {"ours", "careful", "products"}
        assert all(row["median_s"] > 0 for row in point["results"].values())
    assert set(result["slopes"]) == {"classes", "rows"}
    assert "1,024" in capsys.readouterr().out


def test_scaling_does_not_mix_versions(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling, path = load("scaling"), tmp_path / "scaling.json"
    environment = load("harness").environment() | {"torch": "1.0"}
    path.write_text(json.dumps({"environment": environment, "points": []}))
    assert scaling.main([*SCALING, "--json", str(path), "--resume"]) == 1
    assert "another torch (1.0, now " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"environment": {}}', '{"environment": {}, "points": [{"n": 1}]}',
     '{"environment": [1], "points": []}', '{"environment": {}, "points": 3}', "\udcff"],
)  # fmt: skip
def test_scaling_names_a_file_it_can_not_resume(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "scaling.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert load("scaling").main([*SCALING, "--json", str(path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} holds no points of this benchmark (")
    assert "start anew without --resume, or name another file" in error


def test_scaling_needs_a_file_to_resume(load) -> None:
    with pytest.raises(SystemExit):
        load("scaling").main(["--resume"])


def test_eager_code_is_left_out_where_it_does_not_fit(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = load("scaling")
    point = scaling.Point("classes", 4, 100, 8)
    needed = 2 * 4 * 100 * 8 + 16 * 100 * 8  # W, its gradient, and five more of their size less d_w
    monkeypatch.setattr(scaling.harness, "machine_memory", lambda: int(needed / 0.6) + 1)
    assert scaling.fits(point)
    monkeypatch.setattr(scaling.harness, "machine_memory", lambda: int(needed / 0.6) - 1)
    peak = {"peak_growth_mib": 2.0, "above_x_w_and_d_w_mib": 1.0}
    monkeypatch.setattr(scaling.memory, "measure_apart", lambda n, c, d, key: peak)
    entry = scaling.measure(point, 0.0, with_memory=True)
    assert set(entry["results"]) == {"ours", "products"}
    assert entry["memory"] == {
        "ours": peak,
        "careful": {"by_formula_mib": pytest.approx(16 * 100 * 8 / 2**20)},
    }
    assert entry["without_time"] == {"careful": "needs more than 60% of the memory"}


def test_slope_is_that_of_the_larger_half(load) -> None:
    sizes = [1, 10, 100, 1000, 10_000]
    flat_then_square = [1.0, 1.0, 1.0, 100.0, 10_000.0]
    assert load("scaling").slope(sizes, flat_then_square) == pytest.approx(2.0)
    assert load("scaling").slope([10, 1000], [1.0, 2.0]) is None


# --- the report -----------------------------------------------------------------------------------


DRY_STEPS = {"environment": {"cpu": "a", "threads": 1}}


def scaling_result(environment: dict[str, Any]) -> dict[str, Any]:
    points = []
    for sweep, sizes in (("classes", (1000, 30_000, 1_000_000)), ("rows", (16, 64))):
        for size in sizes:
            n, c = (256, size) if sweep == "classes" else (size, 100_000)
            careful = {"by_formula_mib": c * 4e-3}
            if size < 1_000_000:
                careful["above_x_w_and_d_w_mib"] = c * 4e-3
            names = ("ours", "careful", "products")
            points.append(
                {
                    "sweep": sweep,
                    "n": n,
                    "c": c,
                    "d": 128,
                    "results": {key: {"name": key, "median_s": 1e-8 * n * c} for key in names},
                    "memory": {
                        "ours": {"above_x_w_and_d_w_mib": 37.0},
                        "careful": careful,
                    },
                }
            )
    return {
        "benchmark": "scaling, ArcFace, forward + backward, fp32",
        "environment": environment,
        "points": points,
        "slopes": {"classes": {"ours": 0.98, "careful": None}, "rows": {"ours": None}},
    }


def gpu_result(environment: dict[str, Any]) -> dict[str, Any]:
    floor = {"step_ms": 10.0, "8NCD_ms": 11.0}
    errors = {"loss": 1e-4, "d_x": 2e-3}
    row = {"relative_errors": errors, "extra_bytes": 1 << 26, "floor": floor}
    rows = {
        "ours": row | {"name": "fused_margin", "step": {"median_ms": 15.0}},
        "liger": row | {"name": "Liger", "step": {"median_ms": 45.0}},
        "cce": {"floor": floor, "status": "unavailable", "message": "not installed"},
    }
    shape = {"name": "llm", "num_rows": 4096, "num_classes": 128_256, "dim": 4096, "origin": ""}
    return {
        "benchmark": "gpu",
        "dry_run": False,
        "steps": {
            "environment": environment | {"device": "NVIDIA H200", "gpu": {"name": "NVIDIA H200"}},
            "baselines/llm/bf16": {"shape": shape, "mode": "bf16", "rows": rows},
        },
    }


@pytest.fixture
def results(cpu_result, benchmarks, tmp_path: Path) -> Path:
    """A folder with one result of each kind."""
    _, harness = benchmarks
    cpu, _ = cpu_result
    environment = cpu["environment"]
    row = {
        "shape_name": "mnist", "loss": "arcface", "dtype": "fp32", "fraction_of_floor": 0.25,
        "median_s": 0.004,
    }  # fmt: skip
    everything = {
        "cpu": cpu,
        "scaling": scaling_result(environment),
        "gpu": gpu_result(environment),
        "memory": {
            "benchmark": "memory, ArcFace, forward + backward, fp32",
            "shape": {"n": 256, "c": 1_000_000, "d": 128},
            "environment": environment,
            "above_x_w_and_d_w_mib": 37.3,
            "eager_by_formula_mib": 3906.0,
        },
        "shapes": {
            "benchmark": "shapes, forward and forward + backward",
            "environment": environment,
            "rows": [
                row | {"contender": "ours", "work": "step"},
                row | {"contender": "careful", "work": "step", "median_s": 0.006},
            ],
        },
    }
    for name, result in everything.items():
        harness.write_json(tmp_path / "results" / f"{name}.json", result)
    return tmp_path / "results"


def test_report_has_tables_and_charts_of_every_kind(
    load, results: Path, cpu_result, tmp_path: Path
) -> None:
    docs = tmp_path / "docs"
    assert load("report").main(["--results", str(results), "--docs", str(docs)]) == 0
    text = (docs / "benchmarks.md").read_text()
    cpu, _ = cpu_result
    ratios = cpu["ratios_of_medians"]
    line = next(line for line in text.splitlines() if line.startswith("| 8 | 200 | 16 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4] == f"{ratios['ours_over_products']:.2f}"
    assert cells[5:8] == [
        f"{ratios['careful_over_ours']:.2f}", "–", f"{ratios['usual_over_ours']:.2f}"
    ]  # fmt: skip
    assert cells[-1] == f"{ratios['ours_over_ours_bf16']:.2f}"
    assert "Liger, fp32 sums (runs on GPUs only, not on cpu)" in text
    assert "`python -m benchmarks.cpu --n 8 --c 200 --d 16 --rounds 3`" in text
    assert "fused_margin C^0.98" in text
    assert "4,000 (formula)" in text
    assert "| mnist | ArcFace | fp32 | forward + backward | 4 | 25% | 1.50 |" in text
    assert "| **fused_margin** | 15 | 1.00 | 0.67 | 2e-03 | 64 |" in text
    assert "Cut Cross-Entropy (not installed)" in text
    assert "## NVIDIA H200" in text
    assert cpu["environment"]["date"][:10] in text

    images = {path.name for path in (docs / "images").iterdir()}
    assert images == {
        "cpu.png", "gpu-llm-bf16.png", "scaling-classes-memory.png", "scaling-classes-time.png",
        "scaling-rows-memory.png", "scaling-rows-time.png",
    }  # fmt: skip
    assert all(f"(images/{name})" in text for name in images)
    for name in images:
        data = (docs / "images" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 80_000
        width, height = struct.unpack(">II", data[16:24])
        assert 700 < width < 1000
        assert 200 < height < 700


def test_report_is_the_same_each_time(load, results: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("once", "twice"):
        docs = tmp_path / name
        assert load("report").main(["--results", str(results), "--docs", str(docs)]) == 0
        files = sorted(path for path in docs.rglob("*") if path.is_file())
        contents.append({path.relative_to(docs): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_report_takes_the_newer_of_two(
    load, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads((results / "cpu.json").read_text())
    old["environment"]["date"] = "2001-01-01T00:00:00+00:00"
    (results / "another.json").write_text(json.dumps(old))
    stems = {result.stem for result in load("report").load(results)}
    assert "cpu" in stems
    assert "another" not in stems
    assert "another.json is left out for the newer cpu.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a result"),
        ("[]", "not a result"),
        ('{"benchmark": "cpu, x"}', "not a result"),
        ('{"benchmark": "weather", "environment": {"cpu": "a", "threads": 1}}', "'weather'"),
        (json.dumps({"benchmark": "gpu", "dry_run": True, "steps": DRY_STEPS}), "dry run"),
    ],
)
def test_report_names_the_file_it_can_not_use(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "strange.json").write_text(content)
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert load("report").main(arguments) == 1
    printed = capsys.readouterr().err
    assert "strange.json" in printed
    assert message in printed
    assert not (tmp_path / "docs").exists()


def test_report_names_the_result_that_lacks_something(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"benchmark": "cpu, x", "environment": {"cpu": "a", "threads": 1}, "shape": {}}
    (tmp_path / "lacking.json").write_text(json.dumps(result))
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert load("report").main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: lacking.json can't be reported (KeyError(")
    assert "measure again, or remove the file" in error


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": []}', '{"benchmarks": 1}',
     '{"benchmarks": [{"extra_info": {"contender": "ours", "environment": {}}, "stats": {}}]}'],
)  # fmt: skip
def test_report_names_a_file_of_cases_it_can_not_use(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    folders = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert load("report").main([*folders, "--bench", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: ")
    assert not (tmp_path / "results").exists()


def test_report_refuses_an_empty_folder(load, tmp_path: Path) -> None:
    report = load("report")
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 1
    with pytest.raises(report.ReportError, match="no case"):
        report.condense({"benchmarks": []})


def test_committed_report_is_that_of_the_committed_results(load) -> None:
    document = ROOT / "docs" / "benchmarks.md"
    report = load("report")
    built = report.build(report.load(ROOT / "benchmarks" / "results"))
    assert document.read_text(encoding="utf-8") == built.text(), "stale: make bench-report"
    images = ROOT / "docs" / report.IMAGES
    assert [name for name in built.charts if not (images / name).is_file()] == []


# --- the command lines ----------------------------------------------------------------------------

SMALL, LEAST_1, LEAST_2 = "0 -1 x 1.5", "of at least 1", "of at least 2"
THREADS = ("--threads", f"{SMALL} 1025", "from 1 to 1024")
OPTIONS: dict[str, list[tuple[str, str, str]]] = {
    "cpu": [
        *((option, f"{SMALL} 1", LEAST_2) for option in ("--n", "--c", "--d")),
        ("--rounds", SMALL, LEAST_1),
        THREADS,
    ],
    "memory": [
        ("--n", SMALL, LEAST_1),
        ("--c", f"{SMALL} 1", LEAST_2),
        ("--d", SMALL, LEAST_1),
        ("--chunk", SMALL, LEAST_1),
        ("--limit-mib", "-1 nan x", "from 0 to 1e+09"),
        THREADS,
    ],
    "scaling": [
        *((option, f"{SMALL} 1", LEAST_2) for option in ("--n", "--c", "--d")),
        *((option, f"{SMALL} 1 8,1 8, ,", LEAST_2) for option in ("--classes", "--rows")),
        ("--seconds", "-1 nan inf x", "from 0 to 86400"),
        THREADS,
    ],
    "roofline": [
        ("--n", SMALL, LEAST_1),
        ("--c", f"{SMALL} 1", LEAST_2),
        ("--d", SMALL, LEAST_1),
    ],
    "gpu": [("--minutes", "0 -1 nan inf x", "from 0.1 to 1440")],
    "kernels": [("--dims", f"{SMALL} 8 100 16384", "a power of 2")],
}


@pytest.mark.parametrize(
    ("command", "option", "value", "bounds"),
    [
        (command, option, value, bounds)
        for command, options in OPTIONS.items()
        for option, values, bounds in options
        for value in values.split()
    ],
)
def test_numbers_out_of_bounds_are_one_line_errors(
    load, capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, bounds: str
) -> None:
    if command == "kernels":
        pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(SystemExit) as caught:
        load(command).main([f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    given = value.split(",")[-1] if "," in value else value
    assert error.startswith(f"python -m benchmarks.{command}: error: argument {option}: expected a")
    assert bounds in error
    assert error.endswith(f"got {given!r}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "fixed_adacos", "--c", "2"], "--loss fixed_adacos needs --c 3 or more"),
        (["--chunk", "5"], "--chunk is for --contender lce_chunked"),
    ],
)
def test_memory_options_that_do_not_go_together(
    load, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("memory").main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cpu", "scaling"])
def test_a_wrong_result_ends_the_command_in_a_sentence(
    load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """With two columns the remedy is a larger problem."""
    right = functional.arcface

    def wrong(*args: Any, backend: str = "auto", **options: Any) -> Tensor:
        factor = 1.0 if backend == "reference" else 1.01
        return factor * right(*args, backend=backend, **options)

    monkeypatch.setattr(functional, "arcface", wrong)
    sizes = ["--n", "2", "--c", "10", "--d", "2", "--no-memory"]
    more = {
        "cpu": ["--rounds", "1", "--no-compile"],
        "scaling": ["--rows", "2", "--classes", "10", "--seconds", "0"],
    }
    assert load(command).main([*sizes, *more[command]]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: fused_margin: relative error above 2e-05 in ")
    assert error.endswith("N=2, D=2 leave few digits to compare: try N >= 8 and D >= 16")


def test_kernels_say_that_triton_is_missing() -> None:
    code = """
import runpy, sys
sys.modules["triton"] = None
runpy.run_module("benchmarks.kernels", run_name="__main__")
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Triton compiles the kernels and isn't installed; ")
    assert "Traceback" not in done.stderr
