"""Triton kernels started on tensors, and operators computed step by step.

With ``TRITON_INTERPRET=1`` set before triton is first imported, ``launch`` runs a kernel on CPU tensors, slowly, in
Triton's interpreter; otherwise tensors are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel, Launch
from trtpass.op import KERNEL_FLOATS, Op

if TYPE_CHECKING:
    from torch import Tensor


def dtypes_of(op: Op, floating: str) -> SimpleNamespace:
    """The dtype of every port, by name, in a call whose floating inputs are of dtype ``floating``."""
    ports = (*op.inputs, *op.outputs)
    return SimpleNamespace(**{p.name: floating if p.floating else p.dtypes[0] for p in ports})


def floating_of(op: Op, dtypes: Sequence[str]) -> str:
    """The dtype of the first floating input of a call with these input dtypes; float32 where none has one of ours."""
    ports = zip(op.inputs, dtypes, strict=True)
    found = (dtype for port, dtype in ports if port.floating and dtype in KERNEL_FLOATS)
    return next(found, "float32")


def arguments(
    op: Op, dims: Mapping[str, Any], attrs: Mapping[str, Any], floating: str, tactic: Mapping[str, int]
) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """The namespaces that a kernel's functions take."""
    named = SimpleNamespace(**dims), SimpleNamespace(**op.complete(attrs))
    return *named, dtypes_of(op, floating), SimpleNamespace(**tactic)


def launch(
    op: Op,
    kernel: Kernel,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attrs: Mapping[str, Any],
    tactic: int = 0,
) -> Launch:
    """Start ``kernel`` once; it overwrites ``outputs``, which have the shapes and dtypes of ``op``.

    Args:
        op: the operator.
        kernel: one of its kernels.
        inputs: its inputs, contiguous.
        outputs: where results go, contiguous; one that shares memory with an input (``Op.aliases``) is that input.
        attrs: attributes of the operator.
        tactic: position in ``kernel.tactics``.

    Raises:
        InputError: a shape or dtype that does not fit, a tensor that is not contiguous, or an output that is not the
            input whose memory it shares.
    """
    dims = op.bind([tuple(x.shape) for x in inputs])
    floating = floating_of(op, [str(x.dtype).removeprefix("torch.") for x in inputs])
    dtypes = vars(dtypes_of(op, floating))
    shapes = op.output_shapes([tuple(x.shape) for x in inputs], attrs)
    tensors = dict(zip((p.name for p in (*op.inputs, *op.outputs)), (*inputs, *outputs), strict=True))
    for name, tensor in tensors.items():
        shape = shapes.get(name, tuple(tensor.shape))
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"torch.{dtypes[name]} {list(shape)}"
        if found != expected:
            raise InputError(f"{op.name}.{name} is {found}", expected)
        if not tensor.is_contiguous():
            raise InputError(f"{op.name}.{name} is not contiguous", "a contiguous tensor", "call .contiguous()")
    for output, source in op.aliases.items():
        if tensors[output].data_ptr() != tensors[source].data_ptr():
            raise InputError(f"{op.name}.{output} has memory of its own", f"the memory of its input '{source}'")
    how = kernel.geometry(*arguments(op, dims, attrs, floating, kernel.tactics[tactic]))
    options = {"num_warps": how.warps, "num_stages": how.stages}
    if all(how.grid):
        kernel.function[how.grid](*inputs, *how.extras, *outputs, **how.constexprs, **options)
    return how


def run_steps(
    op: Op,
    inputs: Sequence[Any],
    attrs: Mapping[str, Any],
    run: Callable[[Op, Sequence[Any], Mapping[str, Any]], Sequence[Any]],
) -> tuple[Any, ...]:
    """Compute ``op`` by its steps; ``run(step_op, inputs, attrs)`` computes one of them and returns its outputs."""
    values = dict(zip((port.name for port in op.inputs), inputs, strict=True))
    complete = op.complete(attrs)
    for step in op.step_list() if op.step_list else ():
        own = {a.name: complete[a.name] for a in step.op.attrs if a.name in complete}
        made = run(step.op, [values[name] for name in step.inputs], own)
        values.update(zip(step.outputs, made, strict=True))
    return tuple(values[port.name] for port in op.outputs)
