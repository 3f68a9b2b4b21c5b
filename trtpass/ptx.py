"""Triton kernels as machine code, compiled ahead of time on a machine without a GPU.

TensorRT embeds the PTX of a kernel in a plan and passes it the declared parameters alone, so the two pointers that
Triton adds behind them are proved unused and taken out.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trtpass.errors import InputError
from trtpass.kernel import LEAST_CC, Kernel
from trtpass.launch import arguments, dtypes_of
from trtpass.op import Op

COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120)
PTX_VERSION = 87  # CUDA 12.8, the first that knows SM120; Triton's own choice follows its assembler
SCRATCH = 2  # pointers that Triton 3.9 adds behind the declared parameters: global and profiling scratch memory

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for compute capability ``cc``: ``shared`` bytes of dynamic shared memory, ``threads`` in a program."""

    name: str
    cc: int
    ptx: str
    shared: int
    threads: int

    @property
    def target(self) -> str:
        """What the PTX says that it is for, such as ``sm_90a``."""
        found = re.search(r"^\.target (\w+)", self.ptx, re.M)
        return found[1] if found else ""

    @property
    def version(self) -> str:
        """The PTX version, such as ``8.7``."""
        found = re.search(r"^\.version ([\d.]+)", self.ptx, re.M)
        return found[1] if found else ""

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Type and symbol of each parameter of the PTX entry, in order; a pointer has type ``ptr``."""
        found = re.findall(r"\.param \.(\w+)(?: \.(ptr)[^,]*?)? (\w+),?$", self._declaration()[1], re.M)
        return tuple((pointer or kind, symbol) for kind, pointer, symbol in found)

    def references(self, symbol: str) -> int:
        """How often the PTX names a parameter beyond its declaration."""
        return len(re.findall(rf"\b{symbol}\b", self.ptx)) - 1

    def products(self) -> dict[str, int]:
        """Instructions of the tensor cores in the PTX, by kind: ``mma``, ``wgmma``, ``tcgen05``."""
        kinds = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
        found = {kind: len(re.findall(pattern, self.ptx)) for kind, pattern in kinds.items()}
        return {kind: count for kind, count in found.items() if count}

    def _declaration(self) -> re.Match[str]:
        declared = re.search(rf"\.entry {self.name}\((.*?)\)", self.ptx, re.S)
        if declared is None:
            raise InputError(f"the PTX has no entry {self.name}")
        return declared


@dataclass(frozen=True)
class Usage:
    """What the assembler reports for a kernel: registers of a thread, bytes spilled, bytes of stack; and the cubin."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    cubin: bytes = dataclasses.field(repr=False, default=b"")


def supports(
    op: Op, kernel: Kernel, dims: Mapping[str, Any], attrs: Mapping[str, Any], floating: str, cc: int, tactic: int = 0
) -> bool | str:
    """``True``, or why ``kernel`` does not apply, in words; ``dims`` has the fixed dimensions at least."""
    if cc < LEAST_CC:
        return f"compute capability {cc} is below {LEAST_CC}"
    if missing := [name for name in kernel.fixed if not isinstance(dims.get(name), int)]:
        return f"the size of {', '.join(missing)} is not known"
    return kernel.supports(*arguments(op, dims, attrs, floating, kernel.tactics[tactic]), cc)


def compile_ahead(
    op: Op, kernel: Kernel, sizes: Mapping[str, int], attrs: Mapping[str, Any], floating: str, cc: int, tactic: int = 0
) -> Compiled:
    """Compile ``kernel`` for compute capability ``cc``; no GPU is needed.

    Args:
        op: the operator of the kernel.
        kernel: one of its kernels.
        sizes: the sizes of the kernel's fixed dimensions; all others stay symbols.
        attrs: attributes of the operator.
        floating: dtype of the floating inputs.
        cc: compute capability, such as 89.
        tactic: position in ``kernel.tactics``.

    Raises:
        InputError: the kernel does not apply, its constexprs depend on a dimension that is not fixed, or it needs
            memory that only Triton's own launcher provides.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if (reason := supports(op, kernel, sizes, attrs, floating, cc, tactic)) is not True:
        raise InputError(f"the kernel {kernel.name} of {op.name} does not apply: {reason}")
    names = {axis for port in op.inputs for axis in port.axes}
    dims = {name: sizes[name] if name in kernel.fixed else ir.SymbolicDim(name) for name in names}
    how = kernel.geometry(*arguments(op, dims, attrs, floating, kernel.tactics[tactic]))
    for name, value in how.constexprs.items():
        if not isinstance(value, (int, float, str)):
            raise InputError(f"{kernel.name}.{name} is {value!r}", f"a value from {kernel.fixed} alone")
    types = vars(dtypes_of(op, floating))
    signature = {
        **{port.name: f"*{_TYPES[types[port.name]]}" for port in op.inputs},
        **dict.fromkeys(kernel.extras, "i32"),
        **{port.name: f"*{_TYPES[types[port.name]]}" for port in op.outputs},
        **dict.fromkeys(how.constexprs, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    # the last two are said, because Triton's defaults for them change between versions
    own = {"num_warps": how.warps, "num_stages": how.stages, "ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    source = triton.compiler.ASTSource(kernel.function, signature, dict(how.constexprs), aligned)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # a plan carries no paths of the machine that built it
        made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=own)
    meta = made.metadata
    return without_scratch(Compiled(meta.name, cc, made.asm["ptx"], meta.shared, meta.num_warps * 32))


def without_scratch(compiled: Compiled) -> Compiled:
    """``compiled`` without the parameters that Triton adds behind the declared ones.

    Raises:
        InputError: one of them is used: TensorRT would not pass it.
    """
    hidden = compiled.parameters[-SCRATCH:]
    used = [symbol for kind, symbol in hidden if kind != "ptr" or compiled.references(symbol)]
    if used:
        raise InputError(
            f"{compiled.name} for SM{compiled.cc} uses {', '.join(used)}, memory that only Triton's launcher provides",
            "a kernel without scratch memory",
            "do without descriptors made in the kernel (tl.make_tensor_descriptor)",
        )
    declaration = compiled._declaration()
    ends = {symbol for _, symbol in hidden}
    lines = [line for line in declaration[1].splitlines() if not ends & set(re.findall(r"\w+(?=,?$)", line))]
    kept = "\n".join(lines).rstrip().rstrip(",") + "\n"
    start, end = declaration.span(1)
    return dataclasses.replace(compiled, ptx=compiled.ptx[:start] + kept + compiled.ptx[end:])


def usage(compiled: Compiled) -> Usage:
    """What Triton's ``ptxas`` makes of the PTX of ``compiled``.

    Raises:
        InputError: it refuses the PTX; the error carries its words.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.ptx, encoding="utf-8")
        binary = source.with_suffix(".cubin")
        options = ["-v", f"-arch={compiled.target}", "-o", str(binary)]
        command = [get_ptxas(compiled.cc).path, *options, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cubin = binary.read_bytes() if binary.is_file() else b""
    found = {
        "registers": re.search(r"Used (\d+) registers", done.stderr),
        "spill_stores": re.search(r"(\d+) bytes spill stores", done.stderr),
        "spill_loads": re.search(r"(\d+) bytes spill loads", done.stderr),
        "stack": re.search(r"(\d+) bytes stack frame", done.stderr),
    }
    if done.returncode or not all(found.values()):
        raise InputError(f"ptxas refuses {compiled.name} for SM{compiled.cc}: {(done.stdout + done.stderr).strip()}")
    return Usage(**{name: int(match[1]) for name, match in found.items() if match}, cubin=cubin)
