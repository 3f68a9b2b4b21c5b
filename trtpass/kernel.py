"""What a Triton kernel of an operator declares, once; launches, machine code and TensorRT plugins are derived from it.

Like ``trtpass.op``, this module imports neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

Tactic = Mapping[str, int]
LEAST_CC = 80  # compute capability that every kernel asks for: Ampere, the first with asynchronous copies and bfloat16


@dataclass(frozen=True)
class Launch:
    """How a kernel is started for given shapes.

    Args:
        grid: the number of programs along three axes, `(x, y, z)`; y and z at most 65535.
        extras: the values of ``Kernel.extras``.
        constexprs: what the kernel is compiled for, by parameter name; they depend on fixed dimensions only.
        warps: warps of a program, 32 threads each.
        stages: depth of software pipelining.
    """

    grid: tuple[Any, Any, Any]
    extras: tuple[Any, ...]
    constexprs: Mapping[str, int | float | str]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Example:
    """One call of a size that people have: what the kernel is compiled for in reports, and how long it must take.

    Args:
        sizes: every dimension of the inputs, by name.
        attrs: attributes of the operator; the others have their defaults.
        flops: floating-point (or, in kernels that select, integer) operations that the definition asks for: two for a
            multiply-add. What a kernel does beyond them (masked halves of tiles) is its own loss.
        bytes: read and written at least once, in float16 where the operator allows it.
        tensor: whether the operations are matrix products on tensor cores.
        note: what the figures assume, such as the share of tokens kept.
    """

    sizes: Mapping[str, int]
    flops: float
    bytes: float
    tensor: bool
    attrs: Mapping[str, int | float | str]
    note: str = ""


def always(
    dims: SimpleNamespace, attrs: SimpleNamespace, dtypes: SimpleNamespace, tactic: SimpleNamespace, cc: int
) -> bool | str:
    """The ``supports`` of a kernel that takes every call."""
    return True


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of an operator: one launch that writes every element of every output.

    An output that shares memory with an input (``Op.aliases``) is the exception: the kernel writes what changes in it.

    The parameters of ``function`` are, in this order: input pointers, int32 extras, output pointers, constexprs;
    pointers are named as their ports. Tensors are contiguous and aligned to 16 bytes. There is no workspace.

    ``dims``, ``attrs`` and ``dtypes`` are namespaces: sizes by dimension name, completed attributes, dtypes by port
    name; ``tactic`` is one of ``tactics``, a namespace too. Only the fixed dimensions are sure to be ints; grid and
    extras are plain integer arithmetic on the others, which may be symbols (write ``T * k``, never ``k * T``).

    Args:
        function: the ``@triton.jit`` function.
        fixed: names of the dimensions that the kernel is compiled for, such as head widths.
        extras: names of the int32 scalars.
        geometry: ``(dims, attrs, dtypes, tactic) -> Launch``.
        example: ``tokens -> Example``, a call in a model with that context.
        tactics: ways to run it (block sizes, warps), the one that suits most first. TensorRT times them all.
        supports: ``(dims, attrs, dtypes, tactic, cc) -> True`` or the reason in words why this kernel, with this
            tactic, does not apply, from fixed dimensions only; ``cc`` is a compute capability, ``LEAST_CC`` or newer.
    """

    function: Any
    fixed: tuple[str, ...]
    extras: tuple[str, ...]
    geometry: Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace, SimpleNamespace], Launch]
    example: Callable[[int], Example]
    tactics: tuple[Tactic, ...] = ({},)
    supports: Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace, SimpleNamespace, int], bool | str] = always

    @property
    def name(self) -> str:
        """Name of the function, which is the name of the entry in its PTX."""
        return str(self.function.__name__)
