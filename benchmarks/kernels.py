"""What the compiler makes of every kernel with its default configuration, without a GPU.

``python -m benchmarks.kernels`` compiles each kernel for each architecture and prints registers,
spilled bytes, shared memory and matrix instructions; it fails if a default spills or misses the
matrix unit. Triton must not be in interpreter mode (unset TRITON_INTERPRET).
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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_margin._triton import backward, configs, forward
from fused_margin._triton.launch import FINISH_COLUMNS, FINISH_ROWS

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
DIMS = (128, 512, 1024)
# operand type -> (dtype of x, of W, of G, accumulation, compute, precision of cosines, of the rest)
TYPES = {
    "bf16": ("bf16", "fp32", "bf16", "fp32", "bf16", "ieee", "ieee"),
    "fp16": ("fp16", "fp32", "fp32", "fp32", "fp16", "ieee", "tf32"),
    "tf32": ("fp32", "fp32", "fp32", "fp32", "fp32", "tf32", "tf32"),
    "ieee": ("fp32", "fp32", "fp32", "fp32", "fp32", "ieee", "ieee"),
    "fp64": ("fp64", "fp64", "fp64", "fp64", "fp64", "ieee", "ieee"),
}
# instructions of the matrix units: NVIDIA's warp-group, warp and fp64 products, Blackwell's, AMD's
MATRIX = re.compile(r"\b(HGMMA|HMMA|DMMA|UTCHMMA|UTC\w*MMA|v_mfma\w*|v_smfma\w*)")
SPILLS = re.compile(r"\b(LDL|STL)\b")


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
    matrix: str  # matrix instructions found, with their counts
    wide_offsets: bool  # the pointer arithmetic on classes is 64-bit
    ordered_merge: bool | None  # forward: store, barrier, atomic in this order

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
        is_fp64 = self.operands == "fp64"
        has_unit = self.operands != "ieee" and not (is_fp64 and self.architecture in without_fp64)
        if has_unit and not self.matrix and self.kernel != "finish_kernel":
            found.append("misses the matrix unit")
        if not self.wide_offsets:
            found.append("has 32-bit offsets")
        if self.ordered_merge is False:
            found.append("merges without store, barrier, atomic in order")
        return found


def _signature(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        else:
            signature[name] = parameter.annotation_type or "i32"
    return signature


def _kernels(architecture: str, operands: str, dim: int) -> Iterator[tuple[Any, dict, dict, dict]]:
    """(kernel, types of pointers, constants, options) of each kernel with its default tiles."""
    x, w, g, acc, compute, precision, gradient_precision = TYPES[operands]
    config = configs.config(configs.family(*_target(architecture)), operands)
    pointers = {
        "x_ptr": f"*{x}", "w_ptr": f"*{w}", "d_x_ptr": f"*{x}", "d_w_ptr": f"*{w}",
        "g_ptr": f"*{g}", "labels_ptr": "*i64", "counters_ptr": "*i32",
    } | {
        f"{name}_ptr": f"*{acc}"
        for name in ("partial", "lse", "u", "inv_x", "inv_w", "row_loss", "loss", "d_lse", "d_u",
                     "count", "radial", "grad", "d_scale")
    }  # fmt: skip
    common = {"ACC": triton.language.str_to_ty(acc, None), "stride_xd": 1, "stride_wd": 1}
    cosine = common | {
        "COMPUTE": triton.language.str_to_ty(compute, None),
        "PRECISION": precision, "NORMALIZE_FIRST": compute == "fp16",
        "HAS_SCALE_TENSOR": False, "scale_ptr": None, "stride_label": 1,
    }  # fmt: skip
    product = common | {"PRECISION": gradient_precision}

    def blocks(tile: configs.Tile, rows: str, columns: str) -> dict[str, int]:
        columns_size = min(tile.columns, dim) if columns == "BLOCK_D" else tile.columns
        return {rows: tile.rows, columns: columns_size, "BLOCK_K": tile.inner}

    def options(tile: configs.Tile) -> dict[str, Any]:
        return {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        }

    yield (
        forward.forward_kernel,
        pointers,
        cosine
        | blocks(config.forward, "BLOCK_N", "BLOCK_C")
        | {"HAS_MARGIN": True, "STRAIGHT_THROUGH": False, "REDUCTION": "mean"},
        options(config.forward),
    )
    yield (
        backward.gradient_kernel,
        pointers,
        cosine
        | blocks(config.gradient, "BLOCK_N", "BLOCK_C")
        | {"HAS_GRAD": True, "HAS_COUNT": True},
        options(config.gradient),
    )
    yield (
        backward.weight_kernel,
        pointers,
        product | blocks(config.weight, "BLOCK_C", "BLOCK_D"),
        options(config.weight),
    )
    yield (
        backward.embeddings_kernel,
        pointers,
        {key: value for key, value in product.items() if key != "stride_xd"}
        | blocks(config.embeddings, "BLOCK_N", "BLOCK_D")
        | {"IS_FIRST": False},
        options(config.embeddings),
    )
    finish = common | {
        "HAS_SCALE_TENSOR": False, "scale_ptr": None, "HAS_GRAD": True, "HAS_COUNT": True,
        "NEED_X": True, "NEED_SCALE": False, "d_scale_ptr": None,
        "BLOCK_N": FINISH_ROWS, "BLOCK_D": min(FINISH_COLUMNS, dim),
    }  # fmt: skip
    del finish["stride_wd"]
    tile = configs.Tile(FINISH_ROWS, FINISH_COLUMNS, 0, 4, 2)
    yield backward.finish_kernel, pointers, finish, options(tile)


def _target(architecture: str) -> tuple[str, int | str]:
    target = TARGETS[architecture]
    return target.backend, target.arch


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


def _ordered_merge(ptx: str) -> bool:
    """Whether the PTX stores partials, then has a barrier, then the releasing atomic."""
    events = [
        kind
        for line in ptx.splitlines()
        for kind, pattern in (
            ("store", r"\bst\.global"),
            ("barrier", r"\bbar\.sync|\bbarrier\.sync"),
            ("atomic", r"\batom\.global\.gpu\.acq_rel|\batom\.(?:\w+\.)*acq_rel(?:\.\w+)*"),
        )
        if re.search(pattern, line)
    ]
    first_atomic = events.index("atomic") if "atomic" in events else -1
    before = events[:first_atomic] if first_atomic > 0 else []
    return "store" in before and before[-1] == "barrier" and events[first_atomic + 1] == "barrier"


def compile_row(kernel: Any, pointers: dict, constants: dict, options: dict,
                architecture: str, operands: str, dim: int) -> Row:  # fmt: skip
    """Compile one kernel and read off what became of it."""
    signature = _signature(kernel, pointers, constants)
    divisible = [["tt.divisibility", 16]]
    multiples = {"D", "N", "stride_xn", "stride_wc"}
    attributes = {
        (index,): divisible
        for index, name in enumerate(kernel.arg_names)
        if (name.endswith("_ptr") and signature[name] != "constexpr") or name in multiples
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[architecture], options=options)
    is_cuda = TARGETS[architecture].backend == "cuda"
    registers, spilled, assembly = (_cuda_usage if is_cuda else _hip_usage)(compiled)
    counts: dict[str, int] = {}
    for name in MATRIX.findall(assembly):
        counts[name] = counts.get(name, 0) + 1
    return Row(
        kernel=kernel.__name__,
        architecture=architecture,
        operands=operands,
        dim=dim,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix=" ".join(f"{name} x{count}" for name, count in sorted(counts.items())),
        wide_offsets=_wide_offsets(compiled.asm["ttir"]),
        ordered_merge=(
            _ordered_merge(compiled.asm["ptx"])
            if is_cuda and kernel is forward.forward_kernel
            else None
        ),
    )


def report(architectures: list[str], operand_types: list[str], dims: list[int]) -> Iterator[Row]:
    """Compile and describe every kernel; equal configurations of two dims are compiled once."""
    for architecture in architectures:
        for operands in operand_types:
            done: dict[str, Row] = {}
            for dim in dims:
                for kernel, pointers, constants, options in _kernels(architecture, operands, dim):
                    key = f"{kernel.__name__} {constants} {options}"
                    if key not in done:
                        done[key] = compile_row(
                            kernel, pointers, constants, options, architecture, operands, dim
                        )
                    yield Row(**{**asdict(done[key]), "dim": dim})


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if a default is unfit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operands", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    columns = f"{'kernel':18} {'arch':7} {'type':5} {'D':>5} {'regs':>4} {'spill':>5} {'shared':>7}"
    print(f"{columns}  matrix instructions")
    for row in report(options.architectures, options.operands, options.dims):
        rows.append(row)
        problems = "; ".join(row.problems())
        print(
            f"{row.kernel:18} {row.architecture:7} {row.operands:5} {row.dim:5} {row.registers:4}"
            f" {row.spill_bytes:5} {row.shared_bytes:7}  {row.matrix or '-'}"
            + (f"  <-- {problems}" if problems else ""),
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    unfit = sum(bool(row.problems()) for row in rows)
    print(f"{len(rows)} kernels, {unfit} unfit")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
