"""What the compiler made of a kernel's main loop, read from its assembly and from its TTGIR.

The main loop is the innermost one with matrix instructions: in the assembly the smallest region
that a branch closes backwards, in the TTGIR the blocks with a product.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from triton._C.libtriton import gluon_ir, ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

# Instructions of the matrix units: NVIDIA's warp-group, warp and fp64 products, Blackwell's, AMD's.
MATRIX = re.compile(r"\b(HGMMA|HMMA|DMMA|UTCHMMA|UTC\w*MMA|v_mfma\w*|v_smfma\w*)")
# Lanes that exchange registers: NVIDIA's shuffles, AMD's permutations and data-parallel primitives.
SHUFFLES = re.compile(r"SHFL|ds_bpermute|ds_permute|ds_swizzle|v_permlane|\w+_dpp\b")
SHARED_ACCESS = re.compile(r"(?:LDS|STS|LDSM|STSM|ds_read|ds_write)\w*(?:\.M?\w*)*")
BANKS_BYTES = 128  # what shared memory serves in a cycle
WARP_GROUP_ROWS = 64  # of a result, for which a warp-group product reads all of its second operand

_CUDA = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")
_CUDA_BROADCAST = re.compile(r"SHFL\.IDX\b[^;]*, RZ, 0x1f")  # of lane 0, to have the warp's number
_CUDA_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_HIP = re.compile(r"^(?:(\.L\w+):|\s+([a-z]\w+)([^;\n]*))", re.MULTILINE)
_HIP_TARGET = re.compile(r"(\.L\w+)\s*$")
_PRODUCTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
_COPIES = {"ttg.async_copy_global_to_local": 1, "ttng.async_tma_copy_global_to_local": -3}


@dataclass(frozen=True)
class Loop:
    """Instructions that a warp issues: in a step of the main loop, and around it for one tile.

    Around: the rest of the loop over tiles, of the kernel where there is none. A kernel without a
    product in a loop has no steps.
    """

    step: Counter[str]
    around: int

    def count(self, pattern: re.Pattern[str]) -> int:
        """How many of a step's instructions match."""
        return sum(count for name, count in self.step.items() if pattern.match(name))

    @property
    def instructions(self) -> int:
        """How many there are in a step."""
        return self.step.total()

    def per_matrix(self) -> float | None:
        """Instructions for each of the matrix unit; None where there are none."""
        products = self.count(MATRIX)
        return self.instructions / products if products else None

    def shared(self) -> str:
        """Loads and stores of shared memory with their widths, and how many."""
        found = [(name, n) for name, n in sorted(self.step.items()) if SHARED_ACCESS.match(name)]
        return " ".join(f"{name} x{count}" for name, count in found)


def loop(assembly: str) -> Loop:
    """The main loop in SASS or AMD's assembly."""
    is_cuda = _CUDA.search(assembly) is not None
    names, backward = (_cuda if is_cuda else _hip)(assembly)
    regions = sorted((last - first, first, last) for first, last in backward)
    has_product = [bool(MATRIX.match(name)) for name in names]
    for _, first, last in regions:
        if any(has_product[first : last + 1]):
            break
    else:
        return Loop(Counter(), len(names))
    outer = [b - a for _, a, b in regions if a <= first and b >= last and (a, b) != (first, last)]
    whole = outer[0] + 1 if outer else len(names)
    return Loop(Counter(names[first : last + 1]), whole - (last + 1 - first))


def _cuda(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions, and indices of the first and last of what branches close."""
    found = _CUDA.findall(sass)
    at = {int(address, 16): index for index, (address, *_) in enumerate(found)}
    backward = []
    for index, (_, name, operands) in enumerate(found):
        target = _CUDA_TARGET.search(operands) if name.startswith("BRA") else None
        first = None if target is None else at.get(int(target[1], 16))
        if first is not None and first < index:
            backward.append((first, index))
    names = [
        "BROADCAST" if _CUDA_BROADCAST.match(name + operands) else name
        for _, name, operands in found
    ]
    return names, backward


def _hip(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    names: list[str] = []
    at: dict[str, int] = {}
    backward = []
    for label, name, operands in _HIP.findall(assembly):
        if label:
            at[label] = len(names)
            continue
        target = (
            _HIP_TARGET.search(operands) if name.startswith("s_") and "branch" in name else None
        )
        if target is not None and target[1] in at:
            backward.append((at[target[1]], len(names)))
        names.append(name)
    return names, backward


@dataclass(frozen=True)
class Access:
    """Registers that the main loop loads from, or stores to, a buffer in shared memory.

    ``conflicts``: by how many cycles an access takes longer than without bank conflicts; None where
    that isn't known, as of AMD's banks.
    """

    is_load: bool
    dtype: str
    layout: str
    conflicts: int | None
    cycles: float

    def __str__(self) -> str:
        verb = "from" if self.is_load else "to"
        slower = f", {self.conflicts + 1}-way conflicts" if self.conflicts else ""
        return f"{verb} {self.dtype} {self.layout}{slower}"


@dataclass(frozen=True)
class Operands:
    """Where a kernel's products have their operands from.

    Attributes:
        first: where first operands of products lie: "registers", "shared", "tensor memory".
        is_warp_group: whether products are those of Hopper's warp groups.
        accesses: to buffers of operands.
        cycles: of shared memory, for one step of the main loop; 0 where that isn't known.
    """

    first: tuple[str, ...]
    is_warp_group: bool
    accesses: tuple[Access, ...]
    cycles: float


def operands(ttgir: str, target: GPUTarget) -> Operands:
    """Read what happens to operands from the last form of a kernel that still knows them."""
    context = ir.context()
    ir.load_dialects(context)
    make_backend(target).load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(str(Path(file.name)), context)
    module.context = context
    builder = gluon_ir.GluonOpBuilder(context)
    blocks: dict[int, list[ir.operation]] = {}
    module.walk(lambda operation: _gather(operation, blocks))
    first: dict[str, None] = {}
    accesses: dict[Access, None] = {}
    cycles: list[float] = []
    is_warp_group = False
    for operations in blocks.values():
        products = [one for one in operations if one.get_name() in _PRODUCTS]
        if not products:
            continue
        used = 0.0
        for one in products:
            first[_place(one)] = None
            if one.get_name() == "ttng.warp_group_dot":
                is_warp_group = True
                used += _product_bytes(one) / BANKS_BYTES
        for access in _accesses(operations, builder, target.backend == "cuda"):
            accesses[access] = None
            used += access.cycles
        for one in operations:
            if one.get_name() in _COPIES:
                index = _COPIES[one.get_name()] % one.get_num_operands()
                used += _bytes(one.get_operand(index)) / BANKS_BYTES
        cycles.append(used)
    return Operands(
        tuple(first), is_warp_group, tuple(accesses), cycles[0] if is_warp_group else 0.0
    )


def _gather(operation: ir.operation, blocks: dict[int, list[ir.operation]]) -> None:
    block = operation.get_block()
    if block is not None:
        blocks.setdefault(block.id(), []).append(operation)


def _type(value: ir.value) -> tuple[tuple[int, ...], str, str]:
    """Shape, dtype and the rest of the type of a tensor or a buffer."""
    text = str(value.get_type())
    found = re.match(r"(?:tensor|!ttg\.memdesc)<((?:\d+x)+)(\w+)(.*)", text)
    if found is None:
        raise ValueError(f"no tensor and no buffer: {text[:200]}")
    shape = tuple(map(int, found[1].split("x")[:-1]))
    return shape, found[2], found[3]


def _bits(dtype: str) -> int:
    return int(re.sub(r"\D", "", dtype))


def _bytes(value: ir.value) -> float:
    shape, dtype, _ = _type(value)
    size = _bits(dtype) / 8
    for extent in shape:
        size *= extent
    return size


def _place(product: ir.operation) -> str:
    """Where a product has its first operand from."""
    text = str(product.get_operand(0).get_type())
    if text.startswith("tensor"):
        return "registers"
    return "tensor memory" if "tensor_memory" in text else "shared"


def _product_bytes(product: ir.operation) -> float:
    """Bytes that a warp-group product reads from shared memory."""
    (rows, _), *_ = _type(product.get_result(0))
    from_first = _bytes(product.get_operand(0)) if _place(product) == "shared" else 0.0
    return from_first + max(1, rows // WARP_GROUP_ROWS) * _bytes(product.get_operand(1))


def _layout(rest: str) -> str:
    if re.search(r"swizzled_shared<\{[^}]*maxPhase = 1[,}]", rest) or "ByteWidth = 0" in rest:
        return "unswizzled"
    return "swizzled"


def _accesses(
    operations: Sequence[ir.operation], builder: gluon_ir.GluonOpBuilder, is_cuda: bool
) -> Iterator[Access]:
    for one in operations:
        name = one.get_name()
        if name == "ttg.local_load":
            buffer, registers = one.get_operand(0), one.get_result(0)
        elif name == "ttg.local_store":
            registers, buffer = one.get_operand(0), one.get_operand(1)
        elif name == "ttg.local_alloc" and one.get_num_operands():
            registers, buffer = one.get_operand(0), one.get_result(0)
        else:
            continue
        shape, dtype, _ = _type(registers)
        if len(shape) < 2:
            continue  # no operand
        conflicts = None
        if is_cuda:
            conflicts = builder.get_shared_bank_conflicts(
                builder.get_gluon_layout_from_tensor(registers)._to_ir(builder),
                builder.get_gluon_layout_from_memdesc(buffer)._to_ir(builder),
                list(shape),
                _bits(dtype),
            )
        cycles = _bytes(registers) / BANKS_BYTES * (1 + (conflicts or 0))
        yield Access(name == "ttg.local_load", dtype, _layout(_type(buffer)[2]), conflicts, cycles)
