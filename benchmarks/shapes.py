"""The shapes that benchmarks, tests and tables refer to by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem: N batch rows, C classes, D embedding size."""

    name: str
    num_rows: int
    num_classes: int
    dim: int
    origin: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mnist", 128, 10, 128, "handwritten digits"),
        Shape("faces16", 16, 16, 512, "sixteen faces"),
        Shape("voxceleb2", 256, 5_994, 192, "speakers"),
        Shape("sop", 256, 11_318, 512, "products (Stanford Online Products)"),
        Shape("ms1m", 256, 85_742, 512, "faces (MS1MV2)"),
        Shape("glint360k", 512, 360_232, 512, "faces"),
        Shape("webface42m", 1024, 2_059_906, 512, "faces"),
        Shape("ten_million", 512, 10_000_000, 512, "what fits one 141 GB GPU"),
        Shape("llm", 4096, 128_256, 4096, "only to compare with language-model kernels"),
    )
}

# Those whose dense rivals and fp64 yardstick take seconds and a few GB on two cores.
CPU_SHAPES = ("mnist", "voxceleb2", "sop", "ms1m")
