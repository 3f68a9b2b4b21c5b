"""TensorRT plugins derived from kernel declarations: shapes, tactics and machine code of each operator.

TensorRT's quick-deployable plugins are Python functions of fixed signatures (``tensorrt.plugin.register``, ``autotune``
and ``aot_impl``). All three are made here from what the operator and its kernels declare, so nothing is said twice.
With an ``aot_impl`` the builder embeds the kernel's PTX in the plan, which then needs neither Python nor a library.

A plugin's integers are the operator's; a float attribute ``x`` travels as the integer ``x_bits``, its float32 bits:
what a parser makes of 64-bit floats in plugin fields differs between versions, an integer is an integer in all.
"""

from __future__ import annotations

import inspect
import struct
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtpass.errors import InputError
from trtpass.kernel import Kernel
from trtpass.launch import arguments, dtypes_of, floating_of
from trtpass.op import Op
from trtpass.ptx import Compiled, compile_ahead, supports

NAMESPACE = "trtpass"
VERSION = "1"  # of quick-deployable plugins; TensorRT gives them no other
TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32"}
_ENUM = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}


@dataclass(frozen=True)
class Plugin:
    """The three functions that TensorRT asks for, with the signatures that it checks."""

    name: str
    describe: Callable[..., Any]
    autotune: Callable[..., Any]
    aot_impl: Callable[..., Any]


def bits(value: float) -> int:
    """The float32 bits of ``value`` as an integer."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def from_bits(value: int) -> float:
    """The float32 with these bits."""
    return float(struct.unpack("<f", struct.pack("<i", value))[0])


def encode(op: Op, attrs: Mapping[str, Any]) -> dict[str, int]:
    """Attributes of the plugin for (some) attributes of the operator; those not given have their defaults."""
    complete = op.complete(attrs)
    own = {a.name: complete[a.name] for a in op.attrs if a.type is not float}
    return own | {f"{a.name}_bits": bits(complete[a.name]) for a in op.attrs if a.type is float}


def decode(op: Op, values: Mapping[str, int]) -> dict[str, Any]:
    """Attributes of the operator from those of the plugin."""
    return {a.name: from_bits(values[f"{a.name}_bits"]) if a.type is float else values[a.name] for a in op.attrs}


def ways(op: Op) -> tuple[tuple[Kernel, int], ...]:
    """Every kernel of ``op`` with every tactic; TensorRT knows each by its position here plus one."""
    kernels = op.kernel_list() if op.kernel_list else ()
    return tuple((kernel, tactic) for kernel in kernels for tactic in range(len(kernel.tactics)))


def usable(op: Op, dims: Mapping[str, Any], attrs: Mapping[str, Any], floating: str, cc: int) -> list[int] | str:
    """The tactics, by TensorRT's number, that apply; or, where none does, why the first one does not."""
    reasons: list[str] = []
    found: list[int] = []
    try:
        known = ways(op)
    except ModuleNotFoundError as error:  # a kernel is an optimisation: without Triton, or its file, there are bodies
        return f"its kernel needs the module {error.name}, which is not there"
    for number, (kernel, tactic) in enumerate(known, start=1):
        reason = supports(op, kernel, dims, attrs, floating, cc, tactic)
        if reason is True:
            found.append(number)
        else:
            reasons.append(str(reason))
    return found or (reasons[0] if reasons else f"{op.name} has no Triton kernel")


def derive(op: Op, trt: Any, cc: int) -> Plugin:
    """The plugin of ``op`` for compute capability ``cc``.

    Args:
        op: an operator with Triton kernels.
        trt: the module ``tensorrt``, with its ``plugin``.
        cc: of the GPU that the plan is built on, such as 90.
    """
    api = trt.plugin
    compiled: dict[Any, Compiled] = {}  # TensorRT asks for each kernel several times
    names = {getattr(trt.DataType, enum): dtype for dtype, enum in _ENUM.items()}

    def read(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Symbolic dimensions, attributes and floating dtype of a call."""
        descs = [given[port.name] for port in op.inputs]
        attrs = decode(op, given)
        floating = floating_of(op, [names.get(desc.dtype, str(desc.dtype)) for desc in descs])
        return op.bind([desc.shape_expr for desc in descs]), attrs, floating

    def describe(given: Mapping[str, Any]) -> Any:
        _, attrs, floating = read(given)
        shapes = op.output_shapes([given[port.name].shape_expr for port in op.inputs], attrs)
        dtypes = vars(dtypes_of(op, floating))
        made = []
        for port in op.outputs:
            if port.name in op.aliases:
                made.append(given[op.aliases[port.name]].aliased())
            else:
                dtype = getattr(trt.DataType, _ENUM[dtypes[port.name]])
                made.append(api.from_shape_expr(tuple(shapes[port.name]), dtype))
        return tuple(made)

    def autotune(given: Mapping[str, Any]) -> Any:
        dims, attrs, floating = read(given)
        numbers = usable(op, _known(dims), attrs, floating, cc)
        if isinstance(numbers, str):
            raise InputError(f"no kernel of {op.name} applies: {numbers}", fix="lower the graph for this GPU again")
        dtypes = vars(dtypes_of(op, floating))
        ports = ", ".join(TYPES[dtypes[port.name]] for port in (*op.inputs, *op.outputs))
        return [api.AutoTuneCombination(ports, "LINEAR", numbers)]

    def aot_impl(given: Mapping[str, Any]) -> Any:
        dims, attrs, floating = read(given)
        kernel, tactic = ways(op)[given["tactic"] - 1]
        known = _known(dims)
        key = (given["tactic"], floating, *((n, known.get(n)) for n in kernel.fixed), *attrs.items())
        if key not in compiled:
            compiled[key] = compile_ahead(op, kernel, known, attrs, floating, cc, tactic)
        made = compiled[key]
        sizes = {name: known[name] if name in kernel.fixed else size for name, size in dims.items()}
        how = kernel.geometry(*arguments(op, sizes, attrs, floating, kernel.tactics[tactic]))
        params = api.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = how.grid
        params.block_x, params.shared_mem = made.threads, made.shared
        extras = api.SymIntExprs(len(how.extras))
        for i, value in enumerate(how.extras):
            extras[i] = api.SymInt32(value)
        return made.name, made.ptx, params, extras

    desc = api.TensorDesc
    first = {**{port.name: desc for port in op.inputs}, **dict.fromkeys(encode(op, {}), int)}
    several = types.GenericAlias(tuple, (desc,) * len(op.outputs))
    listed = {"outputs": several}
    made = (str, str, api.KernelLaunchParams, api.SymIntExprs)
    return Plugin(
        op.name,
        _signed(describe, first, several),
        _signed(autotune, {**first, **listed}, types.GenericAlias(list, (api.AutoTuneCombination,))),
        _signed(aot_impl, {**first, **listed, "tactic": int}, types.GenericAlias(tuple, made)),
    )


def _known(dims: Mapping[str, Any]) -> dict[str, int]:
    """Those of TensorRT's symbolic dimensions that are constants."""
    found = {}
    for name, size in dims.items():
        if isinstance(size, int):
            found[name] = size
        elif not size.is_fake and size.is_constant:
            found[name] = int(size.constant_value())
    return found


def _signed(function: Callable[[Mapping[str, Any]], Any], parameters: Mapping[str, Any], returns: Any) -> Any:
    """A function of these named, annotated parameters that hands their values to ``function`` as one mapping."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__name__ = function.__name__
    return call


def register(ops: Sequence[Op], trt: Any, cc: int) -> None:
    """Register the plugin of each operator with TensorRT, for this process."""
    for op in ops:
        plugin = derive(op, trt, cc)
        identifier = f"{NAMESPACE}::{plugin.name}"
        trt.plugin.register(identifier)(plugin.describe)
        trt.plugin.autotune(identifier)(plugin.autotune)
        trt.plugin.aot_impl(identifier)(plugin.aot_impl)
