"""What the compiler makes of every kernel with its default configuration, without a GPU.

``python -m benchmarks.kernels`` compiles each kernel for each architecture and prints

- registers, spilled bytes, shared memory, and the share of the warps a processor can hold that
  these allow (occupancy);
- of the main loop: instructions, in all and for each of the matrix unit; shuffles between lanes;
  where the product's first operand comes from; the buffers of operands that pass through registers,
  with their bank conflicts; bytes between L2 and multiprocessors for 1000 flops of a large call;
- matrix instructions, accesses to shared memory, and the widths of global loads.

It fails if a default spills, misses the matrix unit, shuffles in its main loop, has conflicts (or,
on AMD, whose banks Triton doesn't count, an unswizzled buffer), or has a warp-group product with an
operand in registers, unless `ACCEPTED` gives a reason. --candidates compiles what tuning tries
instead, and fails on nothing. Triton must not be in interpreter mode (unset TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fused_margin import _validate

if not _validate.has_triton():
    sys.exit(f"error: Triton compiles the kernels and isn't installed; {_validate.get_triton()}")

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import launches, mainloop
from benchmarks.mainloop import MATRIX
from benchmarks.traffic import traffic
from fused_margin import tuning
from fused_margin._triton import planning, tiles

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
    "gradient_kernel, lent",
    "lent_prepare_kernel",
    "lent_targets_kernel",
    "lent_finish_kernel",
)
DIMS = (64, 128, 512, 1024)
ALL_DIMS = tuple(1 << exponent for exponent in range(4, 14))  # a tile is as wide where D is narrow
SPILLS = re.compile(r"\b(LDL|STL)\b")
CUDA_LOADS = re.compile(r"\bLDG(?:STS)?\.([\w.]+)")  # to registers, or straight to shared memory
HIP_LOADS = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
CUDA_BLOCKS = re.compile(r"\bUTMALDG")  # a block of a matrix by its descriptor
CUDA_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
HIP_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


# What is wrong with a default, each with the words that say so.
PROBLEMS = {
    "spill": "spills {row.spill_bytes} bytes",
    "shared memory": "needs {row.shared_bytes} bytes of shared memory",
    "matrix unit": "misses the matrix unit",
    "offsets": "has 32-bit offsets",
    "shuffles": "shuffles {row.shuffles} times in a step",
    "conflicts": "has bank conflicts ({row.buffers})",
    "registers": "has an operand of a warp-group product in registers",
}
# (kernel, architecture, operands), as patterns: what is accepted of its problems, and why.
ACCEPTED: dict[tuple[str, str, str], dict[str, str]] = {
    ("gradient_kernel*", "sm_90", "*bf16"): {
        "registers": "W comes first, so that sums over the batch stay within a warp; products are"
        " exact by tests/package/test_gpu_exact.py",
        "conflicts": "W by descriptor, in fp32 rows of 128 bytes, is read 8 bytes a lane: 3.4 ms of"
        " shared memory at webface42m beside 10 of L2",
    },
    ("gradient_kernel*", "sm_90", "*fp16"): {
        "registers": "as in bf16",
        "conflicts": "as in bf16",
    },
    ("sweep_kernel, keeping", "sm_90", "*16"): {
        "conflicts": "only where no descriptor can be used",
    },
    ("sweep_kernel, lent", "sm_90", "*16"): {
        "conflicts": "only where no descriptor can be used",
    },
    ("sweep_kernel, shaped, listed", "sm_90", "*bf16"): {
        "conflicts": "rows of W by their list have no descriptor",
    },
    ("sweep_kernel, lent, listed", "sm_90", "*bf16"): {
        "conflicts": "rows of W by their list have no descriptor",
    },
    ("sweep_kernel, shaped", "sm_90", "*16"): {
        "conflicts": "only where no descriptor can be used",
    },
    ("sweep_kernel, centres", "sm_90", "*16"): {
        "conflicts": "the rows of W of a class, which share a tile, have no descriptor",
    },
    ("weight_kernel", "sm_90", "fp16"): {
        "conflicts": "TF32 wants both operands along the batch, x is transposed on its way",
    },
    ("fused_*_kernel", "sm_90", "*"): {
        "registers": "G goes from the first product into the second without shared memory; exact by"
        " the same test",
        "conflicts": "for small D, where exponentials and launches bind",
    },
    ("fused_weight_kernel", "*", "*"): {
        "shuffles": "each step finishes a tile of G, and sums it over the batch",
    },
    ("*_kernel*", "*", "ieee"): {"conflicts": "no matrix unit that waits"},
    ("*_kernel*", "*", "fp64"): {"conflicts": "fp64 is for checking"},
    ("*_kernel*", "sm_8?", "*"): {
        "conflicts": "asynchronous copies leave W in fp32, whose buffer serves norm and product;"
        " nothing has been measured there",
    },
    ("*_kernel*", "sm_100", "*"): {
        "conflicts": "Triton takes operands that are cast through unswizzled buffers; nothing has"
        " been measured there",
    },
    ("*_kernel*", "gfx942", "*"): {
        "conflicts": "Triton's choice for operands of few columns, or read across; the banks of AMD"
        " aren't modelled",
    },
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture.

    Attributes:
        occupancy: warps resident at once, of those that a multiprocessor has room for.
        warps: of a program.
        loads: widths of global loads in bits, with their counts.
        matrix: matrix instructions found, with their counts.
        wide_offsets: the pointer arithmetic on classes is 64-bit.
        instructions: that a warp issues in a step of the main loop. per_matrix: for each of the
            matrix unit; None without a product. around: issued for a tile outside of that loop.
        shuffles: between lanes, in a step. shared: loads and stores of shared memory, likewise.
        buffers: of operands that pass through registers, and how they are laid out.
        conflicts: most cycles that an access to one takes; None where that isn't known.
        first_operand: where a product has it from.
        is_warp_group: whether products are those of Hopper's warp groups.
        shared_cycles: of shared memory in a step, on Hopper.
        l2_bytes_per_flop: between L2 and multiprocessors; None without a product.
    """

    kernel: str
    architecture: str
    operands: str
    dim: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    warps: int
    loads: str
    matrix: str
    wide_offsets: bool
    instructions: int
    per_matrix: float | None
    around: int
    shuffles: int
    shared: str
    buffers: str
    conflicts: int | None
    first_operand: str
    is_warp_group: bool
    shared_cycles: float
    l2_bytes_per_flop: float | None

    def _has(self, problem: str) -> bool:
        if problem == "spill":
            return self.spill_bytes > 0
        if problem == "shared memory":
            return self.shared_bytes > SHARED_MEMORY_LIMIT[self.architecture]
        if problem == "matrix unit":
            # IEEE fp32 has no matrix unit on NVIDIA; fp64 has none on consumer parts, and Triton
            # emits no fp64 matrix instruction for sm_100
            without_fp64 = ("sm_86", "sm_100")
            is_fp64 = "fp64" in self.operands
            has_unit = self.operands != "ieee" and not (
                is_fp64 and self.architecture in without_fp64
            )
            kernel = self.kernel.removesuffix(", listed")
            return has_unit and not self.matrix and kernel not in WITHOUT_PRODUCT
        if problem == "offsets":
            return not self.wide_offsets
        if problem == "shuffles":
            return self.shuffles > 0
        if problem == "conflicts":
            return "unswizzled" in self.buffers if self.conflicts is None else self.conflicts > 1
        return self.is_warp_group and "registers" in self.first_operand

    def found(self) -> dict[str, str]:
        """Every problem, in words."""
        return {name: text.format(row=self) for name, text in PROBLEMS.items() if self._has(name)}

    def accepted(self) -> dict[str, tuple[tuple[str, str, str], str]]:
        """Those that `ACCEPTED` allows, with its key and the reason."""
        allowed = {}
        own = (self.kernel, self.architecture, self.operands)
        for key, reasons in ACCEPTED.items():
            if all(map(fnmatchcase, own, key)):
                for name in reasons.keys() & self.found().keys():
                    allowed[name] = key, reasons[name]
        return allowed

    def problems(self) -> list[str]:
        """What makes this default unfit."""
        allowed = self.accepted()
        return [text for name, text in self.found().items() if name not in allowed]


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
    loop = mainloop.loop(assembly)
    found = mainloop.operands(compiled.asm["ttgir"], target)
    known = [access.conflicts + 1 for access in found.accesses if access.conflicts is not None]
    return Row(
        kernel=name,
        architecture=architecture,
        operands=operands,
        dim=dim,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        occupancy=_occupancy(architecture, registers, shared, options["num_warps"]),
        warps=options["num_warps"],
        loads=_loads(assembly, is_cuda),
        matrix=" ".join(f"{what} x{count}" for what, count in sorted(counts.items())),
        wide_offsets=_wide_offsets(compiled.asm["ttir"]),
        instructions=loop.instructions,
        per_matrix=loop.per_matrix(),
        around=loop.around,
        shuffles=loop.count(mainloop.SHUFFLES),
        shared=loop.shared(),
        buffers="; ".join(map(str, found.accesses)),
        conflicts=max(known, default=1) if is_cuda else None,
        first_operand=", ".join(found.first),
        is_warp_group=found.is_warp_group,
        shared_cycles=found.cycles,
        l2_bytes_per_flop=traffic(launch).l2_bytes_per_flop(),
    )


def report(architectures: list[str], operand_types: list[str], dims: list[int]) -> Iterator[Row]:
    """Compile and describe every kernel; equal code of two dims or types is compiled once."""
    for architecture in architectures:
        target = TARGETS[architecture]
        done: dict[str, Row] = {}
        for operands in operand_types:
            for dim in dims:
                for name, launch in launches.defaults(target, operands, dim).items():
                    key = f"{name} {launches.key(launch, target)}"
                    if key not in done:
                        done[key] = compile_row(launch, name, architecture, operands, dim)
                    yield replace(
                        done[key], operands=operands, dim=dim,
                        l2_bytes_per_flop=traffic(launch).l2_bytes_per_flop(),
                    )  # fmt: skip


def candidates(
    architectures: list[str], operand_types: list[str], dims: list[int], kernels: list[str]
) -> Iterator[Row | str]:
    """A row, or an error, for each of `launches.candidates`."""
    for architecture in architectures:
        target = TARGETS[architecture]
        for operands, dim in itertools.product(operand_types, dims):
            for kernel, tile, launch in launches.candidates(target, operands, dim):
                if kernel not in kernels:
                    continue
                sizes = (tile.n, tile.c, tile.d, tile.num_warps, tile.num_stages)
                what = f"{kernel} {'x'.join(map(str, sizes))}"
                try:
                    yield compile_row(launch, what, architecture, operands, dim)
                except (*planning.FAILURES, RuntimeError) as error:  # or a pass of the compiler
                    yield f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
        "--operands", nargs="+", choices=launches.TYPES, default=list(launches.REPORTED)
    )
    parser.add_argument("--dims", nargs="+", type=_dim, metavar="D", default=list(DIMS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    names = (*tiles.AXES, *tuning.FUSED)
    parser.add_argument(
        "--candidates", nargs="*", choices=names, help="of these kernels; of all if none is named"
    )
    options = parser.parse_args(arguments)
    rows = []
    print(
        f"{'kernel':32} {'arch':6} {'type':13} {'D':>4} {'regs':>4} {'spill':>5} {'shared':>6}"
        f" {'warps':>5} {'loop':>4} {'/mma':>5} {'shfl':>4} {'B/kflop':>7}  first operand; buffers;"
        " matrix instructions; shared and global accesses"
    )
    chosen = (options.architectures, options.operands, options.dims)
    if options.candidates is not None:
        for row in candidates(*chosen, options.candidates or list(names)):
            print(row if isinstance(row, str) else _line(row), flush=True)
        return 0
    for row in report(*chosen):
        rows.append(row)
        print(_line(row), flush=True)
    if options.json:
        found = [asdict(row) | {"problems": row.problems()} for row in rows]
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    used: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        for name, (key, reason) in row.accepted().items():
            used.setdefault(key, {})[name] = reason
    for key, reasons in used.items():
        for name, reason in reasons.items():
            print(f"accepted: {name} of {', '.join(key)}: {reason}")
    unfit = sum(bool(row.problems()) for row in rows)
    print(f"{len(rows)} kernels, {unfit} unfit")
    return 1 if unfit else 0


def _line(row: Row) -> str:
    """A row of the report."""
    each = "-" if row.per_matrix is None else f"{row.per_matrix:.1f}"
    per_flop = "-" if row.l2_bytes_per_flop is None else f"{1e3 * row.l2_bytes_per_flop:.1f}"
    rest = (row.first_operand, row.buffers, row.matrix, f"{row.shared} {row.loads}".strip())
    problems = "; ".join(row.problems())
    return (
        f"{row.kernel:32} {row.architecture:6} {row.operands:13} {row.dim:4} {row.registers:4}"
        f" {row.spill_bytes:5} {row.shared_bytes:6} {row.occupancy:5.0%} {row.instructions:4}"
        f" {each:>5} {row.shuffles:4} {per_flop:>7}  {'; '.join(part or '-' for part in rest)}"
        + (f"  <-- {problems}" if problems else "")
    )


if __name__ == "__main__":
    sys.exit(main())
