"""Triton kernels of operators: started on tensors, or compiled ahead of time on a machine without a GPU.

With ``TRITON_INTERPRET=1`` set before triton is first imported, ``launch`` runs a kernel on CPU tensors, slowly, in
Triton's interpreter; otherwise tensors are on a GPU. ``compile_ahead`` works in a process without that variable.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trtpass.errors import InputError
from trtpass.op import Kernel, Launch, Op

if TYPE_CHECKING:
    from torch import Tensor

COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120)
PTX_VERSION = 87  # CUDA 12.8, the first that knows SM120; Triton's own choice follows its assembler
SCRATCH = 2  # pointers that Triton 3.9 adds behind the declared parameters: global and profiling scratch memory

_Namespaces = tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]
_TYPES = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for compute capability ``cc``: ``shared`` bytes of dynamic shared memory, ``threads`` in a program."""

    name: str
    cc: int
    ptx: str
    cubin: bytes
    shared: int
    threads: int

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Type and symbol of each parameter of the PTX entry, in order; an aligned pointer has type ``ptr``."""
        declared = re.search(rf"\.entry {self.name}\((.*?)\)", self.ptx, re.S)
        if declared is None:
            raise InputError(f"the PTX has no entry {self.name}")
        found = re.findall(r"\.param \.(\w+)(?: \.(ptr)[^,]*?)? (\w+),?$", declared[1], re.M)
        return tuple((pointer or kind, symbol) for kind, pointer, symbol in found)

    def references(self, symbol: str) -> int:
        """How often the PTX names a parameter beyond its declaration."""
        return len(re.findall(rf"\b{symbol}\b", self.ptx)) - 1


@dataclass(frozen=True)
class Usage:
    """What the assembler reports for a kernel: registers of a thread, bytes spilled and bytes of stack."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


def dtypes_of(op: Op, floating: str) -> SimpleNamespace:
    """The dtype of every port, by name, in a call whose floating inputs are of dtype ``floating``."""
    ports = (*op.inputs, *op.outputs)
    return SimpleNamespace(**{p.name: floating if floating in p.dtypes else p.dtypes[0] for p in ports})


def _arguments(op: Op, dims: Mapping[str, Any], attrs: Mapping[str, Any], floating: str) -> _Namespaces:
    return SimpleNamespace(**dims), SimpleNamespace(**op.complete(attrs)), dtypes_of(op, floating)


def supports(
    op: Op, kernel: Kernel, dims: Mapping[str, Any], attrs: Mapping[str, Any], floating: str, cc: int
) -> bool | str:
    """``True``, or why ``kernel`` does not apply, in words; ``dims`` has the fixed dimensions at least."""
    if missing := [name for name in kernel.fixed if not isinstance(dims.get(name), int)]:
        return f"the size of {', '.join(missing)} is not known"
    return kernel.supports(*_arguments(op, dims, attrs, floating), cc)


def launch(
    op: Op, kernel: Kernel, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: Mapping[str, Any]
) -> Launch:
    """Start ``kernel`` once; it overwrites ``outputs``, which have the shapes and dtypes of ``op``.

    Raises:
        InputError: a shape or dtype that does not fit, or a tensor that is not contiguous.
    """
    dims = op.bind([tuple(x.shape) for x in inputs])
    floating = next(str(x.dtype).removeprefix("torch.") for x in inputs if x.is_floating_point())
    dtypes = vars(dtypes_of(op, floating))
    shapes = op.output_shapes([tuple(x.shape) for x in inputs], attrs)
    for port, tensor in zip((*op.inputs, *op.outputs), (*inputs, *outputs), strict=True):
        shape = shapes.get(port.name, tuple(tensor.shape))
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"torch.{dtypes[port.name]} {list(shape)}"
        if found != expected:
            raise InputError(f"{op.name}.{port.name} is {found}", expected)
        if not tensor.is_contiguous():
            raise InputError(f"{op.name}.{port.name} is not contiguous", "a contiguous tensor", "call .contiguous()")
    how = kernel.geometry(*_arguments(op, dims, attrs, floating))
    options = {"num_warps": how.warps, "num_stages": how.stages}
    kernel.function[how.grid](*inputs, *how.extras, *outputs, **how.constexprs, **options)
    return how


def compile_ahead(
    op: Op, kernel: Kernel, sizes: Mapping[str, int], attrs: Mapping[str, Any], floating: str, cc: int
) -> Compiled:
    """Compile ``kernel`` for compute capability ``cc``; no GPU is needed.

    Args:
        op: the operator of the kernel.
        kernel: one of its kernels.
        sizes: the sizes of the kernel's fixed dimensions; all others stay symbols.
        attrs: attributes of the operator.
        floating: dtype of the floating inputs.
        cc: compute capability, such as 89.

    Raises:
        InputError: the kernel does not apply, or its constexprs depend on a dimension that is not fixed.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if (reason := supports(op, kernel, sizes, attrs, floating, cc)) is not True:
        raise InputError(f"the kernel {kernel.function.__name__} of {op.name} does not apply: {reason}")
    names = {axis for port in op.inputs for axis in port.axes}
    dims = {name: sizes[name] if name in kernel.fixed else ir.SymbolicDim(name) for name in names}
    how = kernel.geometry(*_arguments(op, dims, attrs, floating))
    for name, value in how.constexprs.items():
        if not isinstance(value, (int, float, str)):
            raise InputError(f"{kernel.function.__name__}.{name} is {value!r}", f"a value from {kernel.fixed} alone")
    types = vars(dtypes_of(op, floating))
    signature = {
        **{port.name: f"*{_TYPES[types[port.name]]}" for port in op.inputs},
        **dict.fromkeys(kernel.extras, "i32"),
        **{port.name: f"*{_TYPES[types[port.name]]}" for port in op.outputs},
        **dict.fromkeys(how.constexprs, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    made = triton.compile(
        triton.compiler.ASTSource(kernel.function, signature, dict(how.constexprs), aligned),
        target=GPUTarget("cuda", cc, 32),
        # said, because Triton's defaults for the last two change between versions
        options={
            "num_warps": how.warps,
            "num_stages": how.stages,
            "ptx_version": PTX_VERSION,
            "enable_fp_fusion": True,
        },
    )
    meta = made.metadata
    return Compiled(meta.name, cc, made.asm["ptx"], made.asm["cubin"], meta.shared, meta.num_warps * 32)


def usage(compiled: Compiled) -> Usage:
    """What Triton's ``ptxas``, the one that made the cubin, reports for the PTX of ``compiled``.

    Raises:
        InputError: it refuses the PTX; the error carries its words.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", compiled.ptx, re.M)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.ptx, encoding="utf-8")
        options = ["-v", f"-arch={target[1] if target else ''}", "-o", str(source.with_suffix(".cubin"))]
        command = [get_ptxas(compiled.cc).path, *options, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {
        "registers": re.search(r"Used (\d+) registers", done.stderr),
        "spill_stores": re.search(r"(\d+) bytes spill stores", done.stderr),
        "spill_loads": re.search(r"(\d+) bytes spill loads", done.stderr),
        "stack": re.search(r"(\d+) bytes stack frame", done.stderr),
    }
    if done.returncode or not all(found.values()):
        raise InputError(f"ptxas refuses {compiled.name} for SM{compiled.cc}: {(done.stdout + done.stderr).strip()}")
    return Usage(**{name: int(match[1]) for name, match in found.items() if match})
