"""Bodies as functions that can be put into a model.

A node that calls one must carry every attribute of its operator: ``op.complete(attrs)``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtpass.errors import InputError
from trtpass.op import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def _state_loop_conditions(function: ir.Function) -> None:
    """Give each Loop without a first condition a true one: onnx's reference evaluator takes a missing one for false."""
    import onnx_ir as ir

    for node in list(function.all_nodes()):
        if node.op_type == "Loop" and node.inputs[1] is None and node.graph is not None:
            true = ir.node("Constant", [], attributes={"value": ir.tensor(True, name="true")})
            true.outputs[0].name = f"{node.outputs[0].name}_first"
            node.graph.insert_before(node, true)
            node.replace_input_with(1, true.outputs[0])


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
    _state_loop_conditions(function)
    for number, node in enumerate(function.all_nodes()):
        node.name = f"{node.op_type}_{number}"  # unique in subgraphs too, as parsers want them
    proto = ir.serde.serialize_function(function)
    proto.ClearField("value_info")  # types follow from the inputs: one body serves float32 and float16
    # No default values: onnx's inliner and its reference evaluator lose them in silence. Nodes carry every attribute.
    proto.attribute.extend(attribute.name for attribute in proto.attribute_proto)
    proto.ClearField("attribute_proto")
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


def swapped_function(op: Op, kind: str) -> ir.Function:
    """An operator on tensors that lie as ``[B, S, N, D]``: the operator between transposes of all that has four axes.

    Its domain is ``trtpass.bshd``; it calls the operator's own function, which the model must hold too.
    """
    import onnx_ir as ir

    def turned(value: ir.Value, name: str) -> ir.Node:
        node = ir.node("Transpose", [value], attributes={"perm": [0, 2, 1, 3]}, name=f"turn_{name}")
        node.outputs[0].name = name
        return node

    given = [ir.Value(name=port.name) for port in op.inputs]
    nodes: list[ir.Node] = []
    read = []
    for port, value in zip(op.inputs, given, strict=True):
        if len(port.axes) == 4:
            nodes.append(turned(value, f"{port.name}_bhsd"))
            value = nodes[-1].outputs[0]
        read.append(value)
    types = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
    attributes = [ir.RefAttr(a.name, a.name, types[a.type]) for a in op.attrs]
    call = ir.Node(DOMAIN, op.name, read, attributes, num_outputs=len(op.outputs), name=op.name)
    nodes.append(call)
    made = []
    for port, value in zip(op.outputs, call.outputs, strict=True):
        wide = len(port.axes) == 4
        value.name = f"{port.name}_bhsd" if wide else port.name
        if wide:
            nodes.append(turned(value, port.name))
            value = nodes[-1].outputs[0]
        made.append(value)
    proto_opset = function_proto(op, kind).opset_import
    opsets = {**{entry.domain: entry.version for entry in proto_opset}, DOMAIN: VERSION}
    graph = ir.Graph(given, made, nodes=nodes, opset_imports=opsets, name=f"{op.name}_bshd")
    declared = [ir.Attr(a.name, types[a.type], None) for a in op.attrs]
    return ir.Function(f"{DOMAIN}.bshd", op.name, graph=graph, attributes=declared)
