"""The report on compiled kernels: it sees what slows a main loop down, and says so."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT, needs_triton

pytestmark = needs_triton

_KERNELS = """
import dataclasses
import json
import sys

import triton
import triton.language as tl
from triton.compiler import ASTSource

from benchmarks import kernels, mainloop


@triton.jit
def product(x, w, out, D, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
            SUMS: tl.constexpr, FIRST: tl.constexpr):
    n, c, d = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, BD)
    tile = tl.zeros([BC, BN] if FIRST else [BN, BC], tl.float32)
    sums = tl.zeros([BC], tl.float32)
    for k in range(0, D, BD):
        x_rows = tl.load(x + n[:, None] * 4096 + (k + d)[None, :])
        w_rows = tl.load(w + c[:, None] * 4096 + (k + d)[None, :])
        if SUMS:
            sums += tl.sum(w_rows * w_rows, axis=1)
        w_rows = w_rows.to(tl.bfloat16)
        if FIRST:
            tile = tl.dot(w_rows, tl.trans(x_rows), tile)
        else:
            tile = tl.dot(x_rows, tl.trans(w_rows), tile)
    if FIRST:
        tile = tl.trans(tile)
    tl.store(out + n[:, None] * BC + c[None, :], tile + sums[None, :])


answer = {}
for name, architecture, options in (
    ("plain", "sm_90", (False, False)), ("sums", "sm_90", (True, False)),
    ("first", "sm_90", (False, True)), ("amd", "gfx942", (True, False)),
    ("blackwell", "sm_100", (False, False)),
):
    target = kernels.TARGETS[architecture]
    types = {"x": "*bf16", "w": "*fp32", "out": "*fp32", "D": "i32"}
    constants = dict(zip(("BN", "BC", "BD", "SUMS", "FIRST"), (128, 128, 64, *options)))
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(4)}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(product, types, constants, attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3})
    is_cuda = target.backend == "cuda"
    assembly = kernels._cuda_usage(compiled)[2] if is_cuda else compiled.asm["amdgcn"]
    loop = mainloop.loop(assembly)
    found = mainloop.operands(compiled.asm["ttgir"], target)
    answer[name] = {
        "instructions": loop.instructions, "shuffles": loop.count(mainloop.SHUFFLES),
        "matrix": loop.count(mainloop.MATRIX), "shared": loop.shared(), "first": found.first,
        "is_warp_group": found.is_warp_group, "cycles": found.cycles,
        "buffers": [dataclasses.asdict(one) for one in found.accesses],
    }
print(json.dumps(answer))
"""


def _run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is found in a product that has one fault, or none."""
    script = tmp_path_factory.mktemp("loops") / "script.py"  # a kernel's source must be in a file
    script.write_text(_KERNELS)
    return json.loads(_run(str(script)))


def test_a_reduction_in_the_loop_is_seen(loops: dict[str, Any]) -> None:
    assert loops["plain"]["shuffles"] == 0
    assert loops["sums"]["shuffles"] > 0
    assert loops["amd"]["shuffles"] > 0
    assert loops["sums"]["instructions"] > loops["plain"]["instructions"]
    assert all(one["matrix"] > 0 for one in loops.values())


def test_where_the_first_operand_comes_from(loops: dict[str, Any]) -> None:
    assert loops["plain"]["first"] == ["shared"]
    assert loops["first"]["first"] == ["registers"]
    assert loops["blackwell"]["first"] == ["shared"]
    is_warp_group = {name for name, one in loops.items() if one["is_warp_group"]}
    assert is_warp_group == {"plain", "sums", "first"}


def test_bank_conflicts_and_cycles(loops: dict[str, Any]) -> None:
    """A buffer with two readers is unswizzled; a whole step's cycles are counted by hand."""
    (load, store) = loops["plain"]["buffers"]
    assert (load["is_load"], load["dtype"], store["is_load"], store["dtype"]) == (
        True, "f32", False, "bf16",
    )  # fmt: skip
    x, w = 128 * 64 * 2, 128 * 64 * 4
    moved = (x + w) + w * (1 + load["conflicts"]) + w / 2 * (1 + store["conflicts"])
    # a product reads x once, and w in bf16 for each 64 rows
    assert loops["plain"]["cycles"] == (moved + x + 2 * w / 2) / 128
    assert "unswizzled" in {one["layout"] for one in loops["sums"]["buffers"]}
    (load,) = loops["first"]["buffers"]
    assert load["layout"] == "swizzled"
    assert all(one["conflicts"] is None for one in loops["amd"]["buffers"])


@pytest.fixture
def mainloop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.mainloop")


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x1 */
        /*0010*/                   LDS.128 R4, [R2] ;            /* 0x1 */
        /*0020*/              @!P0 BRA 0x20 ;                    /* 0x1 */
        /*0030*/                   SHFL.BFLY PT, R3, R3 ;        /* 0x1 */
        /*0040*/                   HGMMA.64x128x16.F32 R8 ;      /* 0x1 */
        /*0050*/                   LDS.128 R4, [R2] ;            /* 0x1 */
        /*0060*/               @P1 BRA 0x40 ;                    /* 0x1 */
        /*0070*/                   SHFL.BFLY PT, R3, R3 ;        /* 0x1 */
        /*0080*/               @P2 BRA.U UP0, 0x10 ;             /* 0x1 */
        /*0090*/                   EXIT ;                        /* 0x1 */
        /*00a0*/                   BRA 0xa0;                     /* 0x1 */
"""
AMD = """
kernel:
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; outer
\tds_bpermute_b32 v1, v2, v3
.LBB0_2:                                ; inner
\tds_read_b128 v[0:3], v4
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[0:1], v[2:3], v[0:15]
\tv_mov_b32_dpp v1, v2 row_shr:1
\ts_cbranch_scc1 .LBB0_2
\tv_exp_f32 v1, v1
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
"""


def test_the_main_loop_is_the_innermost_with_products(mainloop: ModuleType) -> None:
    loop = mainloop.loop(SASS)
    assert loop.step == Counter({"HGMMA.64x128x16.F32": 1, "LDS.128": 1, "BRA": 1})
    assert loop.around == 5  # the rest of the loop over tiles
    assert (loop.per_matrix(), loop.count(mainloop.SHUFFLES)) == (3.0, 0)
    loop = mainloop.loop(AMD)
    assert loop.instructions == 4
    assert loop.around == 3
    assert loop.count(mainloop.SHUFFLES) == 1
    assert loop.shared() == "ds_read_b128 x1"
    broadcast = SASS.replace("LDS.128 R4, [R2]", "SHFL.IDX PT, R4, R2, RZ, 0x1f")
    assert mainloop.loop(broadcast).count(mainloop.SHUFFLES) == 0
    shuffled = SASS.replace("LDS.128 R4, [R2]", "SHFL.IDX PT, R4, R2, R5, 0x1f")
    assert mainloop.loop(shuffled).count(mainloop.SHUFFLES) == 1
    without = mainloop.loop(SASS.replace("HGMMA", "FFMA"))
    assert (without.instructions, without.around, without.per_matrix()) == (0, 11, None)


def _row(kernels: ModuleType, **changes: Any) -> Any:
    row = kernels.Row(
        kernel="some_kernel", architecture="sm_90", operands="bf16", dim=512, registers=200,
        spill_bytes=0, shared_bytes=1 << 16, occupancy=0.125, warps=8, loads="128b x4",
        matrix="HGMMA x4", wide_offsets=True, instructions=100, per_matrix=25.0, around=1000,
        shuffles=0, shared="", buffers="from f32 unswizzled", conflicts=1, first_operand="shared",
        is_warp_group=True, shared_cycles=100.0, l2_bytes_per_flop=0.01,
    )  # fmt: skip
    return replace(row, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"matrix": ""}, "misses the matrix unit"),
        ({"shuffles": 4}, "shuffles 4 times in a step"),
        ({"conflicts": 2}, r"has bank conflicts (from f32 unswizzled)"),
        ({"first_operand": "registers"}, "has an operand of a warp-group product in registers"),
        ({"architecture": "gfx942", "conflicts": None, "is_warp_group": False}, "bank conflicts"),
        ({"shared_bytes": 1 << 18}, "needs 262144 bytes of shared memory"),
        ({"wide_offsets": False}, "32-bit offsets"),
    ],
)
def test_what_makes_a_kernel_unfit(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    """Each by itself, unless a reason is given for that kernel."""
    kernels = importlib.import_module("benchmarks.kernels")
    monkeypatch.setattr(kernels, "ACCEPTED", {})
    assert _row(kernels).problems() == []
    row = _row(kernels, **changes)
    (problem,) = row.problems()
    assert words in problem
    (name,) = row.found()
    key = ("some_*", row.architecture, "*bf16")
    kernels.ACCEPTED[key] = {name: "because"}
    assert row.problems() == []
    assert row.accepted() == {name: (key, "because")}
    assert replace(row, kernel="other_kernel").problems() == [problem]


def test_candidates_are_those_of_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report compiles what `tune` tries, with the tile in the launch."""
    kernels = importlib.import_module("benchmarks.kernels")
    launches = importlib.import_module("benchmarks.launches")
    tuning = importlib.import_module("fused_margin.tuning")
    target = kernels.TARGETS["sm_90"]
    found = list(launches.candidates(target, "autocast-bf16", 64))
    tiles = importlib.import_module("fused_margin._triton.tiles")
    present = tiles.DESCRIBED["sm_90", "bf16"]
    expected = tuning.candidates(present, "bf16", *launches.MANY, 64)
    assert [(kernel, tile) for kernel, tile, _ in found] == list(expected)
    for _, tile, launch in found:
        blocks = (launch.keywords["BLOCK_N"], launch.keywords["BLOCK_C"])
        assert blocks == (tile.n, tile.c)
