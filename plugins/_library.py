"""Bodies as functions that can be put into a model."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtpass.errors import InputError
from trtpass.op import DOMAIN, Op

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@cache
def _compiled(name: str, kind: str) -> bytes:
    """The serialized body: helpers that it calls are inlined, so that it stands alone; named as its operator."""
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    from plugins import all_ops
    from plugins._body import op as opset

    source = all_ops()[name].bodies[kind]()
    parts = [source, *source.function_ir.get_called_functions().values()]
    functions = [ir.serde.deserialize_function(part.to_function_proto()) for part in parts]
    empty = ir.Graph([], [], nodes=[], opset_imports={"": opset.version, DOMAIN: source.opset.version}, name=name)
    model = ir.Model(empty, ir_version=10, functions=functions)
    InlinePass(criteria=lambda function: function.name != source.name)(model)
    (function,) = model.functions.values()
    function.opset_imports.pop(DOMAIN, None)
    function.name = name
    for number, node in enumerate(function.all_nodes()):
        node.name = f"{node.op_type}_{number}"  # unique in subgraphs too, as parsers want them
    proto = ir.serde.serialize_function(function)
    proto.ClearField("value_info")  # types follow from the inputs: one body serves float32 and float16
    return proto.SerializeToString()


def function_proto(op: Op, kind: str) -> onnx.FunctionProto:
    """The body of an operator as a protobuf message in domain ``trtpass``; ``kind`` is ``dynamic`` or ``static``.

    Raises:
        InputError: the operator has no body of that kind.
    """
    import onnx

    if kind not in op.bodies:
        raise InputError(f"{op.name} has no {kind} body", f"one of {', '.join(sorted(op.bodies)) or 'none'}")
    return onnx.FunctionProto.FromString(_compiled(op.name, kind))


def function(op: Op, kind: str) -> ir.Function:
    """The body of an operator as an onnx-ir function, a fresh copy at each call (a function belongs to one model).

    Raises:
        InputError: the operator has no body of that kind.
    """
    import onnx_ir as ir

    return ir.serde.deserialize_function(function_proto(op, kind))
