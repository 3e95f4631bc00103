"""What the compiler makes of every kernel with its default configuration, without a GPU.

``python -m benchmarks.kernels`` compiles each kernel for each architecture and prints registers,
spilled bytes, shared memory, the share of the warps a processor can hold that these allow
(occupancy), matrix instructions and the widths of global loads; it fails if a default spills or
misses the matrix unit. Triton must not be in interpreter mode (unset TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_margin import _validate

if not _validate.has_triton():
    sys.exit(f"error: Triton compiles the kernels and isn't installed; {_validate.get_triton()}")

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import launches
from fused_margin._triton import tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_LIMIT = {  # bytes a program may use
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
# what a multiprocessor has: registers, bytes of shared memory, warps, programs
MULTIPROCESSOR = {
    "sm_80": (65536, 164 << 10, 64, 32),
    "sm_86": (65536, 100 << 10, 48, 16),
    "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32),
}
AMD_REGISTERS, AMD_WAVES, AMD_SIMDS = 512, 8, 4  # of a SIMD's lane, of a SIMD, of a compute unit
AMD_SHARED = 64 << 10
WITHOUT_PRODUCT = (
    "prepare_kernel",
    "rows_kernel",
    "finish_kernel",
    "gradient_kernel, kept",
)
DIMS = (64, 128, 512, 1024)
ALL_DIMS = tuple(1 << exponent for exponent in range(4, 14))  # a tile is as wide where D is narrow
# instructions of the matrix units: NVIDIA's warp-group, warp and fp64 products, Blackwell's, AMD's
MATRIX = re.compile(r"\b(HGMMA|HMMA|DMMA|UTCHMMA|UTC\w*MMA|v_mfma\w*|v_smfma\w*)")
SPILLS = re.compile(r"\b(LDL|STL)\b")
CUDA_LOADS = re.compile(r"\bLDG(?:STS)?\.([\w.]+)")  # to registers, or straight to shared memory
HIP_LOADS = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
CUDA_BLOCKS = re.compile(r"\bUTMALDG")  # a block of a matrix by its descriptor
CUDA_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
HIP_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    architecture: str
    operands: str
    dim: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float  # warps resident at once, of those that a multiprocessor has room for
    loads: str  # widths of global loads in bits, with their counts
    matrix: str  # matrix instructions found, with their counts
    wide_offsets: bool  # the pointer arithmetic on classes is 64-bit

    def problems(self) -> list[str]:
        """What makes this default unfit."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_MEMORY_LIMIT[self.architecture]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory")
        # IEEE fp32 has no matrix unit on NVIDIA; fp64 has none on consumer parts, and Triton emits
        # no fp64 matrix instruction for sm_100
        without_fp64 = ("sm_86", "sm_100")
        is_fp64 = "fp64" in self.operands
        has_unit = self.operands != "ieee" and not (is_fp64 and self.architecture in without_fp64)
        if has_unit and not self.matrix and self.kernel not in WITHOUT_PRODUCT:
            found.append("misses the matrix unit")
        if not self.wide_offsets:
            found.append("has 32-bit offsets")
        return found


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuda_usage(compiled: Any) -> tuple[int, int, str]:
    """Registers, spilled bytes (stack, or local loads and stores), and the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def run(option: str) -> str:
            command = [_tool("cuobjdump"), option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, sass = run("-res-usage"), run("-sass")
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed something unexpected: {usage[:200]!r}")
    registers, stack, _, local = map(int, found.groups())
    spilled = max(stack, local)
    if not spilled and SPILLS.search(sass):
        raise RuntimeError("local loads or stores in the SASS, yet no stack is reported")
    return registers, spilled, sass


def _hip_usage(compiled: Any) -> tuple[int, int, str]:
    """Vector registers, scratch bytes, and the assembly."""
    assembly = compiled.asm["amdgcn"]
    found = {
        key: re.search(rf"\.{key}:\s+(\d+)", assembly)
        for key in ("vgpr_count", "private_segment_fixed_size")
    }
    vgpr, scratch = found["vgpr_count"], found["private_segment_fixed_size"]
    if vgpr is None or scratch is None:
        raise RuntimeError("the AMD assembly lacks its resource metadata")
    return int(vgpr[1]), int(scratch[1]), assembly


def _wide_offsets(ttir: str) -> bool:
    """Whether every product with a runtime stride or size that reaches a pointer is 64-bit.

    In the TTIR an offset is what `tt.addptr` adds; it may be i32 only if it is a contiguous run
    (a range plus a start), never a product by a runtime value.
    """
    definition = dict(re.findall(r"(%\w+)(?::\d+)? = ([^\n]+)", ttir))

    def multiplies(value: str, seen: set[str]) -> bool:
        if value in seen or value not in definition:
            return False
        seen.add(value)
        operation = definition[value]
        if operation.startswith("arith.extsi"):
            return False  # widened before use; what follows is 64-bit
        if operation.startswith("arith.muli") and "i64" not in operation:
            operands = re.findall(r"%\w+", operation)
            return not any("constant" in definition.get(o, "") for o in operands)
        return any(multiplies(operand, seen) for operand in re.findall(r"%\w+", operation))

    for offset, kind in re.findall(
        r"tt\.addptr %\w+, (%\w+) : [^\n]*?, (tensor<[^>]*>|i32|i64)", ttir
    ):
        if not kind.endswith("i64") and "xi64" not in kind and multiplies(offset, set()):
            return False
    return True


def _occupancy(architecture: str, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident at once."""
    rounded = -(-registers // 8) * 8  # registers are given out in eights per thread
    if architecture not in MULTIPROCESSOR:
        waves = min(AMD_WAVES, AMD_REGISTERS // max(rounded, 1))
        programs = waves * AMD_SIMDS // num_warps
        if shared_bytes:
            programs = min(programs, AMD_SHARED // shared_bytes)
        return programs * num_warps / (AMD_WAVES * AMD_SIMDS)
    available, shared, warps, most = MULTIPROCESSOR[architecture]
    programs = min(
        most,
        warps // num_warps,
        available // (32 * rounded * num_warps),
        shared // (shared_bytes + (1 << 10)),  # the system takes 1 KiB for each
    )
    return programs * num_warps / warps


def _loads(assembly: str, is_cuda: bool) -> str:
    """Widths of global loads in bits, widest first, with their counts."""
    counts: dict[int, int] = {}
    if is_cuda:
        for modifiers in CUDA_LOADS.findall(assembly):
            found = [CUDA_WIDTHS[part] for part in modifiers.split(".") if part in CUDA_WIDTHS]
            width = found[0] if found else 32
            counts[width] = counts.get(width, 0) + 1
    else:
        for kind in HIP_LOADS.findall(assembly):
            width = HIP_WIDTHS.get(kind, 16 if "short" in kind else 8)
            counts[width] = counts.get(width, 0) + 1
    blocks = len(CUDA_BLOCKS.findall(assembly)) if is_cuda else 0
    found = [f"{width}b x{counts[width]}" for width in sorted(counts, reverse=True)]
    return " ".join([f"blocks x{blocks}", *found] if blocks else found)


def compile_row(
    launch: launches.Launch, name: str, architecture: str, operands: str, dim: int
) -> Row:
    """Compile one kernel and read off what became of it."""
    target = TARGETS[architecture]
    source, options = launches.source(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    is_cuda = target.backend == "cuda"
    registers, spilled, assembly = (_cuda_usage if is_cuda else _hip_usage)(compiled)
    counts: dict[str, int] = {}
    for instruction in MATRIX.findall(assembly):
        counts[instruction] = counts.get(instruction, 0) + 1
    shared = compiled.metadata.shared
    return Row(
        kernel=name,
        architecture=architecture,
        operands=operands,
        dim=dim,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        occupancy=_occupancy(architecture, registers, shared, options["num_warps"]),
        loads=_loads(assembly, is_cuda),
        matrix=" ".join(f"{what} x{count}" for what, count in sorted(counts.items())),
        wide_offsets=_wide_offsets(compiled.asm["ttir"]),
    )


def report(architectures: list[str], operand_types: list[str], dims: list[int]) -> Iterator[Row]:
    """Compile and describe every kernel; equal configurations of two dims are compiled once."""
    for architecture in architectures:
        target = TARGETS[architecture]
        for operands in operand_types:
            done: dict[str, Row] = {}
            for dim in dims:
                for name, launch in launches.defaults(target, operands, dim).items():
                    key = f"{name} {launches.key(launch, target)}"
                    if key not in done:
                        done[key] = compile_row(launch, name, architecture, operands, dim)
                    yield Row(**{**asdict(done[key]), "dim": dim})


def _dim(text: str) -> int:
    if not text.isdecimal() or int(text) not in ALL_DIMS:
        sizes = ", ".join(map(str, ALL_DIMS))
        raise argparse.ArgumentTypeError(f"expected a power of 2, one of {sizes}; got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if a default is unfit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--operands", nargs="+", choices=launches.TYPES, default=list(tiles.OPERANDS)
    )
    parser.add_argument("--dims", nargs="+", type=_dim, metavar="D", default=list(DIMS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    columns = f"{'kernel':29} {'arch':7} {'type':9} {'D':>5} {'regs':>4} {'spill':>5} {'shared':>7}"
    print(f"{columns} {'warps':>5}  matrix instructions; global loads")
    for row in report(options.architectures, options.operands, options.dims):
        rows.append(row)
        problems = "; ".join(row.problems())
        print(
            f"{row.kernel:29} {row.architecture:7} {row.operands:9} {row.dim:5} {row.registers:4}"
            f" {row.spill_bytes:5} {row.shared_bytes:7} {row.occupancy:5.0%}"
            f"  {row.matrix or '-'}; {row.loads}" + (f"  <-- {problems}" if problems else ""),
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    unfit = sum(bool(row.problems()) for row in rows)
    print(f"{len(rows)} kernels, {unfit} unfit")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
