"""Bodies as onnx-ir functions, for passes that put them into a model."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtpass.errors import InputError
from trtpass.op import DOMAIN, Op

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def function_proto(op: Op, kind: str) -> onnx.FunctionProto:
    """The body of an operator as a protobuf; ``kind`` is ``dynamic`` or ``static``.

    Raises:
        InputError: the operator has no body of that kind.
    """
    if kind not in op.bodies:
        raise InputError(f"{op.name} has no {kind} body", f"one of {', '.join(sorted(op.bodies)) or 'none'}")
    proto = op.bodies[kind]().to_function_proto()
    proto.domain, proto.name, proto.doc_string = DOMAIN, op.name, ""
    return proto


@cache
def _built(name: str, kind: str) -> bytes:
    from plugins import all_ops

    return function_proto(all_ops()[name], kind).SerializeToString()


def function(op: Op, kind: str) -> ir.Function:
    """The body of an operator as an onnx-ir function in domain ``trtpass``, a fresh copy at each call.

    Compiling the onnxscript source is cached; a copy is handed out because a function belongs to one model.

    Raises:
        InputError: the operator has no body of that kind.
    """
    import onnx
    import onnx_ir as ir

    if kind not in op.bodies:
        raise InputError(f"{op.name} has no {kind} body", f"one of {', '.join(sorted(op.bodies)) or 'none'}")
    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(_built(op.name, kind)))
