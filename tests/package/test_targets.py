"""Every kernel with its default tiles, compiled for four architectures without a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# With which embedding sizes: `make kernels` compiles all.
DIMS = {
    **dict.fromkeys(("bf16", "tf32"), ("64", "512", "1024")),
    **dict.fromkeys(("fp16", "ieee", "fp64"), ("64", "512")),
}
WITH_PRODUCTS = {
    "sweep_kernel",
    "sweep_kernel, keeping",
    "gradient_kernel",
    "gradient_kernel, only",
    "weight_kernel",
    "embeddings_kernel",
    "embeddings_kernel, only",
    "fused_weight_kernel",
    "fused_embeddings_kernel",
    "sweep_kernel, lent",
    "lent_weight_kernel",
    "lent_weight_kernel, beyond",
    "embeddings_kernel, lent",
    "sweep_kernel, shaped",
    "sweep_kernel, centres",
    "gradient_kernel, shaped",
    "gradient_kernel, centres",
}
DESCRIBED = {  # on sm_90 with bf16 products
    "sweep_kernel, described",
    "sweep_kernel, keeping, described",
    "gradient_kernel, described",
    "weight_kernel, described",
    "sweep_kernel, lent, described",
    "lent_weight_kernel, described",
    "lent_weight_kernel, beyond, described",
    "sweep_kernel, shaped, described",
    "gradient_kernel, shaped, described",
}
WITHOUT_PRODUCTS = {
    "prepare_kernel",
    "rows_kernel",
    "gradient_kernel, kept",
    "gradient_kernel, lent",
    "finish_kernel",
    "lent_prepare_kernel",
    "lent_targets_kernel",
    "lent_finish_kernel",
}


SPILLED_BY_36 = 256  # bytes
# in bf16, over a list of classes
LISTED = {
    "sweep_kernel, listed",
    "gradient_kernel, listed",
    "weight_kernel, listed",
    "embeddings_kernel, listed",
    "sweep_kernel, shaped, listed",
    "gradient_kernel, shaped, listed",
    "sweep_kernel, lent, listed",
    "embeddings_kernel, lent, listed",
    "lent_weight_kernel, listed",
    "lent_targets_kernel, listed",
    "lent_finish_kernel, listed",
}


def _names_compared_with_none(kernel: ast.FunctionDef) -> set[str]:
    return {
        node.left.id
        for node in ast.walk(kernel)
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Is | ast.IsNot)
        and isinstance(node.left, ast.Name)
    }


def test_no_kernel_asks_whether_a_group_is_there() -> None:
    """Triton 3.6 can't compare a NamedTuple that has a field None; its fields and pointers can."""
    asked: set[str] = set()
    for file in (ROOT / "fused_margin" / "_triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and "jit" in str(
                [ast.unparse(decorator) for decorator in node.decorator_list]
            ):
                asked |= _names_compared_with_none(node)
    assert asked
    assert not {name for name in asked if not name.endswith(("_ptr", "_desc"))}


def _compile(architectures: tuple[str, ...], directory: Path, *options: str) -> list[dict]:
    file = directory / f"{architectures[0]}.json"
    file.unlink(missing_ok=True)  # that of other options
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", *options, "--json", str(file)]
    run = subprocess.run(
        [*command, "--architectures", *architectures],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert file.exists(), run.stdout + run.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The compile report of all architectures, made by two processes side by side."""
    pytest.importorskip("triton", reason="Triton is not installed")
    directory = tmp_path_factory.mktemp("kernels")
    halves = (("sm_90", "gfx942"), ("sm_80", "sm_100"))
    chosen = {dims: [o for o in DIMS if DIMS[o] == dims] for dims in DIMS.values()}

    def compiled(half: tuple[str, ...]) -> list[dict]:
        found = []
        for dims, operands in chosen.items():
            found += _compile(half, directory, "--dims", *dims, "--operands", *operands)
        return found

    with ThreadPoolExecutor(len(halves)) as pool:
        return [row for rows in pool.map(compiled, halves) for row in rows]


def _names(rows: list[dict]) -> list[str]:
    return [f"{r['kernel']} {r['architecture']} {r['operands']} D={r['dim']}" for r in rows]


def _spills_at_most() -> int:
    """Bytes that a kernel may spill, none with the Triton that the tiles were chosen with.

    3.6, which torch 2.11 brings, makes some of a few kernels spill.
    """
    is_old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    return SPILLED_BY_36 if is_old else 0


def _unfit(rows: list[dict]) -> list[tuple[str, str, list[str]]]:
    """Kernels with problems, but for spills that are to be expected."""
    found = []
    for row in rows:
        allowed = 0 < row["spill_bytes"] <= _spills_at_most()
        problems = [p for p in row["problems"] if not (allowed and p.startswith("spills"))]
        if problems:
            found.append((row["kernel"], row["architecture"], problems))
    return found


def test_report_covers_every_default(rows: list[dict]) -> None:
    assert {(r["architecture"], r["operands"], r["dim"]) for r in rows} == {
        (a, o, int(d)) for a in ARCHITECTURES for o, dims in DIMS.items() for d in dims
    }
    assert {r["kernel"] for r in rows} == WITH_PRODUCTS | DESCRIBED | WITHOUT_PRODUCTS | LISTED
    described = [r for r in rows if r["kernel"] in DESCRIBED]
    assert {(r["architecture"], r["operands"]) for r in described} == {
        ("sm_90", "bf16"), ("sm_90", "fp16")
    }  # fmt: skip
    assert not _names([r for r in described if "blocks" not in r["loads"]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_default_spills(rows: list[dict], architecture: str) -> None:
    mine = [r for r in rows if r["architecture"] == architecture]
    assert not _names([r for r in mine if r["spill_bytes"] > _spills_at_most()])
    assert sum(r["spill_bytes"] > 0 for r in mine) <= len(mine) / 10


def test_no_default_is_unfit(rows: list[dict]) -> None:
    """Spills, shuffles in main loops, bank conflicts and so on, but for reasons that are given."""
    assert not _unfit(rows)


def test_fp32_embeddings_under_autocast(tmp_path: Path) -> None:
    """They reach the kernels as they are, where x is not cast beforehand."""
    pytest.importorskip("triton", reason="Triton is not installed")
    found = _compile(("sm_90",), tmp_path, "--dims", "512", "--operands", "autocast-bf16")
    assert {r["kernel"] for r in found} >= {"weight_kernel", "sweep_kernel, described"}
    assert not _unfit(found)


@pytest.mark.parametrize("operands", ["bf16", "fp16", "tf32", "fp64"])
def test_matrix_unit_on_sm_90(rows: list[dict], operands: str) -> None:
    expected = "DMMA" if operands == "fp64" else "HGMMA"
    mine = [
        r for r in rows
        if (r["architecture"], r["operands"]) == ("sm_90", operands)
        and r["kernel"] in WITH_PRODUCTS | DESCRIBED
    ]  # fmt: skip
    assert mine
    assert not _names([r for r in mine if expected not in r["matrix"]])


def test_matrix_unit_elsewhere(rows: list[dict]) -> None:
    """Not so for fp64 on sm_100, for which Triton emits no matrix instruction."""
    mine = [
        r for r in rows
        if r["operands"] != "ieee" and r["kernel"] in WITH_PRODUCTS
        and (r["operands"], r["architecture"]) != ("fp64", "sm_100")
    ]  # fmt: skip
    assert not _names([r for r in mine if not r["matrix"]])


def test_loads_are_wide(rows: list[dict]) -> None:
    """Tiles of x, W and G are read 16 bytes at a time."""
    mine = [r for r in rows if r["operands"] == "bf16" and r["kernel"] in WITH_PRODUCTS]
    assert not _names([r for r in mine if "128b" not in r["loads"]])


def test_occupancy_is_a_share(rows: list[dict]) -> None:
    assert all(0.0 < r["occupancy"] <= 1.0 for r in rows)


def test_offsets_are_64_bit(rows: list[dict]) -> None:
    """C D and N C pass 2^31: no offset may multiply in 32 bits."""
    assert not _names([r for r in rows if not r["wide_offsets"]])


def test_shared_memory_fits(rows: list[dict]) -> None:
    limits = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
    assert not _names([r for r in rows if r["shared_bytes"] > limits[r["architecture"]]])


def test_operands_of_different_widths_compile(tmp_path: Path) -> None:
    """Triton's fp64 product takes no operand that was loaded with 16 bits, unless it can't tell."""
    pytest.importorskip("triton", reason="Triton is not installed")
    types = ("bf16+fp64", "fp64+bf16")
    mixed = _compile(("sm_80", "sm_90"), tmp_path, "--dims", "64", "--operands", *types)
    assert {(r["architecture"], r["operands"]) for r in mixed} == {
        (a, o) for a in ("sm_80", "sm_90") for o in types
    }
    assert not _names([r for r in mixed if r["spill_bytes"]])
    with_products = [r for r in mixed if r["kernel"] in WITH_PRODUCTS]
    assert not _names([r for r in with_products if "DMMA" not in r["matrix"]])


_NARROW = """
import benchmarks.kernels as kernels
import triton
import triton.language as tl
from triton.compiler import ASTSource

@triton.jit
def narrow(x_ptr, row, stride):
    tl.store(x_ptr + (row + tl.arange(0, 16)) * stride, 1.0)

@triton.jit
def wide(x_ptr, row, stride):
    tl.store(x_ptr + (row + tl.arange(0, 16)).to(tl.int64) * stride, 1.0)

for kernel in (narrow, wide):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "row": "i32", "stride": "i32"}, {}, {})
    compiled = triton.compile(source, target=kernels.TARGETS["sm_90"], options={})
    print(kernel.__name__, kernels._wide_offsets(compiled.asm["ttir"]))
"""


def _run_without_interpreter(code: str, directory: Path) -> str:
    script = directory / "script.py"
    script.write_text(code)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_the_offset_check_can_fail(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    printed = _run_without_interpreter(_NARROW, tmp_path)
    assert printed.split() == ["narrow", "False", "wide", "True"]


_BATCHES = """
import collections
import json

from benchmarks import kernels, launches

target, variants = kernels.TARGETS["sm_90"], collections.defaultdict(set)
for num_rows in (*range(1, 1026), 1100, 1535, 2048, 3333, 4096, 4112, 5001):
    with launches.recorded(target) as found:
        launches.step(num_rows, 100_003, 512, launches.TYPES["bf16"])
    for launch in found:
        variants[launch.kernel.__name__].add(launches.key(launch, target))
print(json.dumps({name: len(keys) for name, keys in variants.items()}))
"""


def test_no_compilation_for_another_batch(tmp_path: Path) -> None:
    """Nor for another chunk: only for a tile's rows, a power of 2 from 16 on.

    And once more for the few rows with which a call is too small for descriptors. From 33 rows on
    d_w is lent; beyond 1024, for which it has no room, the sweep of the others is compiled too, for
    a chunk of whole blocks and for the last.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    counts = json.loads(_run_without_interpreter(_BATCHES, tmp_path))
    assert counts == {
        "prepare_kernel": 3,
        "sweep_kernel": 10,
        "rows_kernel": 4,
        "gradient_kernel": 4,
        "weight_kernel": 4,
        "embeddings_kernel": 6,
        "finish_kernel": 1,
        "lent_weight_kernel": 2,
        **{f"lent_{name}_kernel": 1 for name in ("prepare", "targets", "finish")},
    }
