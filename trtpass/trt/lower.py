"""A graph for TensorRT: trtpass nodes become plugin nodes where their kernels apply, and bodies elsewhere.

A plugin node has the operator's name, the plugin's attributes and no body: TensorRT's parser prefers a model-local
function over a plugin of the same name. An operator of several launches becomes its steps, a node each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from plugins import all_ops, kernel_ops
from trtpass.errors import InputError
from trtpass.ir import check, dims, drop_idle_inputs, make_node, tidy
from trtpass.op import DOMAIN, VERSION, Op, Port, Step
from trtpass.passes.explicit_masks import explicit_masks
from trtpass.passes.lower import TARGET_KEY, Decision, Lowered, inline_bodies
from trtpass.passes.mask_types import mask_types
from trtpass.passes.precision import to_half
from trtpass.trt.plugins import NAMESPACE, decode, encode, usable
from trtpass.trt.plugins import VERSION as PLUGIN_VERSION

TARGET = "tensorrt"
DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
CC_KEY, DTYPE_KEY = "trtpass.cc", "trtpass.dtype"  # properties of a lowered graph


def lower(model: ir.Model, cc: int, dtype: str = "float16") -> Lowered:
    """A copy of a prefill, decode or stateless graph for TensorRT on a GPU of compute capability ``cc``.

    Args:
        model: canonical, with trtpass nodes or without; it is not changed, and the copy reads its weights lazily.
        cc: of the GPU that will build and run the plan, such as 90.
        dtype: ``float16`` or ``bfloat16``, of weights, activations and cache.

    Raises:
        InputError: another dtype, an operator without kernel and static body, or a symbolic cache.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' for TensorRT", f"one of {', '.join(DTYPES)}")
    copy = model.clone()
    nodes = [node for node in copy.graph.all_nodes() if node.domain == DOMAIN and node.op_type in all_ops()]
    if any(dims(value) is None for node in nodes for value in node.inputs):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    kept = {node: choose(node, dtype, cc) for node in nodes}
    decisions = inline_bodies(copy, "static", {n: True if isinstance(c, tuple) else c for n, c in kept.items()})
    to_half(copy, DTYPES[dtype])
    mask_types(copy)
    explicit_masks(copy)
    for node in [n for n in copy.graph.all_nodes() if n.domain == DOMAIN]:
        steps = kept[node]
        if isinstance(steps, str):
            raise InputError(f"node '{node.name}' was not lowered: {steps}")
        names = " + ".join(step.op.name for step in steps)
        reason = f"{names} in {dtype}, compiled for SM{cc}"
        decisions.append(Decision(str(node.name), "TensorRT plugin" + "s" * (len(steps) > 1), reason))
        _replace(node, steps, dtype)
    for identifier in [key for key in copy.functions if key[0] == DOMAIN]:
        del copy.functions[identifier]
    tidy(copy)
    drop_idle_inputs(copy)
    if any(node.domain == DOMAIN for node in copy.graph.all_nodes()):
        copy.graph.opset_imports[DOMAIN] = VERSION
    copy.metadata_props.update({TARGET_KEY: TARGET, CC_KEY: str(cc), DTYPE_KEY: dtype})
    check(copy, f"the graph lowered to '{TARGET}'")
    problems = faults(copy)
    if problems:
        raise InputError(f"the graph lowered to '{TARGET}' is wrong: {'; '.join(problems)}", "plugin nodes as declared")
    return Lowered(copy, tuple(decisions))


@dataclass(frozen=True)
class Call:
    """One launch in place of a node: the step, its attributes, and the shapes of what it makes."""

    step: Step
    attrs: dict[str, Any]
    dims: dict[str, Any]
    shapes: dict[str, tuple[Any, ...]]


def calls(op: Op, steps: Sequence[Step], attrs: Mapping[str, Any], given: Sequence[Sequence[Any]]) -> Iterator[Call]:
    """Each of ``steps`` with its attributes and shapes, for inputs of ``op`` with these shapes."""
    values = dict(zip((port.name for port in op.inputs), given, strict=True))
    for step in steps:
        own = {a.name: attrs[a.name] for a in step.op.attrs if a.name in attrs}
        shapes = [values[name] for name in step.inputs]
        made = step.op.output_shapes(shapes, own)
        values.update(zip(step.outputs, made.values(), strict=True))
        yield Call(step, own, step.op.bind(shapes), made)


def choose(node: ir.Node, dtype: str, cc: int) -> tuple[Step, ...] | str:
    """The launches that compute this node, or why there are none: its own kernel, else its steps."""
    op = all_ops()[node.op_type]
    given = _shapes(node)
    if any(len(shape) != len(port.axes) for shape, port in zip(given, op.inputs, strict=False)):
        return "its shapes are not known"
    attrs = attributes_of(op, node)
    reason = usable(op, op.bind(given), attrs, dtype, cc)
    if not isinstance(reason, str):
        return (Step(op, tuple(port.name for port in op.inputs), tuple(port.name for port in op.outputs)),)
    steps = tuple(op.step_list()) if op.step_list else ()
    for call in calls(op, steps, attrs, given):
        if isinstance(found := usable(call.step.op, call.dims, call.attrs, dtype, cc), str):
            return f"{call.step.op.name}: {found}"
    return steps or reason


def attributes_of(op: Op, node: ir.Node) -> dict[str, Any]:
    """The operator's attributes, completed."""
    return op.complete({a.name: node.attributes[a.name].value for a in op.attrs if a.name in node.attributes})


def _shapes(node: ir.Node) -> list[list[Any]]:
    """Shapes of the inputs in ints and symbols; what is not known is a symbol, an unknown rank has no size."""
    shapes = [dims(value) or [] for value in node.inputs]
    return [[s if isinstance(s, int) else ir.SymbolicDim(str(s)) for s in shape] for shape in shapes]


def _type(port: Port, dtype: str) -> ir.DataType:
    return DTYPES[dtype] if port.floating else ir.DataType.from_numpy(np.dtype(port.dtypes[0]))


def _replace(node: ir.Node, steps: Sequence[Step], dtype: str) -> None:
    """One plugin node for each step, in the place of ``node``, with casts around it where others use float32."""
    op, graph = all_ops()[node.op_type], node.graph
    if not isinstance(graph, ir.Graph):
        raise InputError(f"node '{node.name}' belongs to no graph")
    made: list[ir.Node] = []
    values: dict[str, ir.Value | None] = {
        port.name: _cast(value, _type(port, dtype), made) if port.floating else value
        for port, value in zip(op.inputs, node.inputs, strict=True)
    }
    known = {port.name: dims(value) for port, value in zip(op.outputs, node.outputs, strict=True)}
    for call in calls(op, steps, attributes_of(op, node), _shapes(node)):
        step, outputs = call.step, []
        for port, name in zip(step.op.outputs, step.outputs, strict=True):
            shape = known.get(name) or [s if isinstance(s, int) else None for s in call.shapes[port.name]]
            outputs.append((f"{node.name}.{name}", _type(port, dtype), shape))
        label = str(node.name) if len(steps) == 1 else f"{node.name}.{step.op.name}"
        plugin = {
            **encode(step.op, call.attrs),
            "plugin_namespace": NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
            "aot": 1,
        }
        new = make_node(step.op.name, [values[n] for n in step.inputs], outputs, plugin, domain=DOMAIN, name=label)
        new.metadata_props.update(node.metadata_props)
        values.update(zip(step.outputs, new.outputs, strict=True))
        made.append(new)
    ends = [
        _cast(values[port.name], old.dtype, made) if port.floating else values[port.name]
        for port, old in zip(op.outputs, node.outputs, strict=True)
    ]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, ends)  # type: ignore[arg-type]


def _cast(value: ir.Value | None, dtype: ir.DataType | None, made: list[ir.Node]) -> ir.Value | None:
    """``value`` in ``dtype``; a Cast is added to ``made`` where it is known to have another."""
    if value is None or None in (value.dtype, dtype) or value.dtype == dtype:
        return value
    name = f"{value.name}.{str(dtype).lower()}.{len(made)}"
    made.append(make_node("Cast", [value], [(name, dtype, dims(value))], {"to": int(dtype)}))  # type: ignore[arg-type]
    return made[-1].outputs[0]


def plugin_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes that TensorRT is to find as plugins."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def faults(model: ir.Model) -> list[str]:
    """What is wrong with the plugin nodes of a lowered graph, in words; none is what a builder wants to read.

    Every node must be a declared operator with a kernel that applies, with exactly its inputs, dtypes and attributes,
    and without a body, which TensorRT's parser would take instead.
    """
    cc, dtype = int(model.metadata_props.get(CC_KEY, 0)), model.metadata_props.get(DTYPE_KEY, "float16")
    return [f"{n.op_type} '{n.name}' {fault}" for n in plugin_nodes(model) for fault in _faults(n, model, cc, dtype)]


def _faults(node: ir.Node, model: ir.Model, cc: int, dtype: str) -> Iterator[str]:
    op = kernel_ops().get(node.op_type)
    if op is None:
        yield "has no kernel"
        return
    if node.op_identifier() in model.functions:
        yield "has a body, which the parser takes before the plugin"
    own = set(encode(op, {}))
    expected = own | {"plugin_namespace", "plugin_version", "aot"}
    if set(node.attributes) != expected:
        yield f"has attributes {sorted(node.attributes)}, not {sorted(expected)}"
        return
    ports, values = (*op.inputs, *op.outputs), (*node.inputs, *node.outputs)
    if len(node.inputs) != len(op.inputs) or len(values) != len(ports):
        yield f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
        return
    for port, value in zip(ports, values, strict=True):
        found = None if value is None else value.dtype
        if found != _type(port, dtype):
            yield f"has {port.name} of type {found}, not {_type(port, dtype)}"
    attrs = decode(op, {name: a.value for name, a in node.attributes.items() if name in own})
    try:
        reason = usable(op, op.bind(_shapes(node)), attrs, dtype, cc)
    except InputError as error:
        yield f"does not fit: {error.found}"
        return
    if isinstance(reason, str):
        yield f"has no kernel that applies: {reason}"
