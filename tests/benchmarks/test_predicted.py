"""Predicted times of kernels: what launches move, and how far off an H100 the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from helpers import ROOT, needs_triton

from benchmarks import roofline, shapes

pytestmark = needs_triton

_PREDICT = """
import dataclasses
import json

from benchmarks import launches, predicted, roofline, shapes, traffic
from benchmarks.kernels import TARGETS
from fused_margin._triton import planning
from fused_margin._triton.tiles import Tile, default

# those of revision c444f9f, which was measured
measured = dataclasses.replace(
    default("sm_90", "bf16"),
    forward=Tile(256, 128, 32, 8, 4),
    gradient=Tile(128, 128, 64, 8, 3),
    weight=Tile(64, 128, 256, 8, 3),
    embeddings=Tile(256, 64, 128, 8, 3),
)
dtypes = roofline.DTYPES["autocast-bf16"]
answer = {}
predictor = predicted.Predictor(roofline.H100, pointers=True, tiles=measured)
for name in ("webface42m", "glint360k", "llm"):
    step = predictor.step(shapes.SHAPES[name], dtypes, "chunked")
    answer[name] = {k: [one.launches, *one.seconds.values()] for k, one in step.kernels.items()}

shape = shapes.Shape("test", 300, 1000, 512, "test")
moved = {}
for strategy in ("chunked", "kept"):
    operands = launches.TYPES["bf16"]
    with launches.recorded(TARGETS["sm_90"], described=False) as found:
        with planning.override(strategy):
            launches.step(300, 1000, 512, operands)
    for launch in found:
        name = launches.variant(launch)
        moved[f"{strategy} {name}"] = dataclasses.asdict(traffic.traffic(launch)) | {
            "tile": {k: launch.keywords.get(k) for k in ("BLOCK_N", "BLOCK_C", "BLOCK_D")},
            "grid": launch.grid,
        }
answer["moved"] = moved
known = set(traffic._OF)
answer["unknown"] = [name for name in launches.KERNELS if name not in known]
print(json.dumps(answer))
"""


def _run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return json.loads(_run("-c", _PREDICT))


@pytest.mark.parametrize("name", ["webface42m", "glint360k", "llm"])
def test_the_model_against_an_h100(answer: dict[str, Any], name: str) -> None:
    """At 5.5 TB/s each kernel of the chunked backward is within a third of what was measured."""
    file = ROOT / "benchmarks" / "results" / "nvidia-h100-gpu.json"
    kernels = json.loads(file.read_text())["steps"][f"kernels/{name}/autocast-bf16"]["step"]
    for kernel in ("sweep_kernel", "gradient_kernel", "weight_kernel", "embeddings_kernel"):
        launches, slow, fast = answer[name][kernel]
        assert launches == kernels[kernel]["count"]
        assert fast < slow
        assert 0.75 < 1e3 * slow / kernels[kernel]["ms"] < 1.35, kernel


def test_every_kernel_is_known(answer: dict[str, Any]) -> None:
    assert answer["unknown"] == []


def test_what_launches_move(answer: dict[str, Any]) -> None:
    """Counted by hand for N = 300, C = 1000, D = 512, in bf16 with fp32 W."""
    n, c, d = 300, 1000, 512
    pitch = 304
    moved = answer["moved"]

    def blocks(size: int, block: int) -> int:
        return -(-size // block)

    sweep = moved["chunked sweep_kernel"]
    tile = sweep["tile"]
    row_blocks, class_blocks = blocks(n, tile["BLOCK_N"]), blocks(c, tile["BLOCK_C"])
    assert sweep["flops"] == 2 * n * c * d
    assert sweep["l2_bytes"] == 2 * n * d * class_blocks + 4 * c * d * row_blocks
    assert sweep["memory_bytes"] == 2 * n * d + 4 * c * d
    assert sweep["tiles"] == row_blocks * class_blocks
    assert sweep["steps"] == sweep["tiles"] * blocks(d, tile["BLOCK_D"])
    keeping = moved["kept sweep_kernel, keeping"]
    assert keeping["memory_bytes"] - sweep["memory_bytes"] == 2 * c * pitch

    weight = moved["chunked weight_kernel"]
    tile = weight["tile"]
    of_x = 2 * n * d * blocks(c, tile["BLOCK_C"])
    of_g = 2 * c * pitch * blocks(d, tile["BLOCK_D"])
    assert weight["l2_bytes"] == of_x + of_g + 2 * 4 * c * d
    assert weight["scratch_bytes"] == 2 * c * pitch

    name = next(key for key in moved if key.startswith("chunked embeddings_kernel"))
    embeddings, tile = moved[name], moved[name]["tile"]
    splits = embeddings["grid"][2]
    partials = 0 if "only" in name else 4 * splits * n * d
    of_g = 2 * c * pitch * blocks(d, tile["BLOCK_D"])
    assert embeddings["l2_bytes"] == of_g + 4 * c * d * blocks(n, tile["BLOCK_N"]) + partials

    kept = moved["kept gradient_kernel, kept"]
    assert kept["flops"] == 0
    assert kept["memory_bytes"] == kept["scratch_bytes"] == 2 * c * pitch


def test_work_with_lent_memory() -> None:
    """Exponentials lie where d_w will: nothing comes on top, and 6NCD where there is room."""
    dtypes = roofline.DTYPES["autocast-bf16"]
    shape = shapes.SHAPES["webface42m"]
    ncd = shape.num_rows * shape.num_classes * shape.dim
    lent, kept, chunked = (
        roofline.work(shape, dtypes, name, backward=True) for name in ("lent", "kept", "chunked")
    )
    assert lent.flops == kept.flops == {"bf16": 6 * ncd}
    assert lent.memory < chunked.memory
    # W once more, and exponentials read twice
    more = 4 * shape.num_classes * shape.dim + 2 * shape.num_rows * shape.num_classes
    assert lent.bytes - kept.bytes == pytest.approx(more)
    # fp32 products: exponentials are twice as long, and half of them have room
    half = shapes.Shape("half", 1024, 100_000, 512, "test")
    ncd = half.num_rows * half.num_classes * half.dim
    some, none = (
        roofline.work(half, roofline.DTYPES["tf32"], name, backward=True)
        for name in ("lent", "chunked")
    )
    assert (some.flops, none.flops) == ({"tf32": 7 * ncd}, {"tf32": 8 * ncd})
    assert some.memory == none.memory
    # fp32 embeddings of 64 dimensions: less than a quarter
    least = shapes.Shape("least", 1024, 100_000, 64, "test")
    of_least = [
        roofline.work(least, roofline.DTYPES["tf32"], name, backward=True)
        for name in ("lent", "chunked")
    ]
    assert of_least[0] == of_least[1]


def test_command_prints_kernels() -> None:
    arguments = ["--shape", "ms1m", "--device", "h100", "--strategy", "chunked", "lent"]
    lines = _run("-m", "benchmarks.roofline", *arguments).splitlines()
    totals = [line.split() for line in lines if line.startswith("total")]
    assert len(totals) == 2
    for total in totals:
        floor, fast, slow = map(float, total[2:5])
        assert floor < fast <= slow
    assert any(line.startswith("lent_weight_kernel, described") for line in lines)
