"""Nodes for native kernels: dense causal attention too, and every tensor in the layout in which projections write it.

A node that a kernel serves keeps its body as a model-local function: ONNX Runtime takes the kernel where the library is
registered and the body where it is not, so an engine also runs, slower, on a machine without the library.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from plugins._library import function, swapped_function
from trtpass import native
from trtpass.ir import constant, dims, float_attr, is_op, make_node
from trtpass.op import DOMAIN, VERSION, Op
from trtpass.passes.contrib import graph_of, match
from trtpass.passes.transposes import SWAP, is_swap, take_place

Choice = tuple[str, str, str]  # node, decision, reason


def fits(node: ir.Node, op: Op) -> bool | str:
    """Whether a native kernel serves this node, or the reason in words why none does."""
    found = {port.name: _dtype(value) for port, value in zip(op.inputs, node.inputs, strict=False)}
    return native.fits(op, found)


def _dtype(value: ir.Value | None) -> str | None:
    return None if value is None or value.dtype is None else str(value.dtype.numpy())


def keep_body(model: ir.Model, node: ir.Node, op: Op, kind: str = "dynamic") -> None:
    """Give the model what ``node`` falls back to where the library is not registered."""
    for make in (function, swapped_function)[: 1 + (node.domain == native.SWAPPED)]:
        made = make(op, kind)
        model.functions.setdefault(made.identifier(), made)
        model.opset_imports[made.domain] = VERSION


def attention_to_native(model: ir.Model) -> list[Choice]:
    """Causal Attention over fresh keys to ``CausalAttention``, in place; says so for each that was replaced."""
    op = all_ops()["CausalAttention"]
    choices: list[Choice] = []
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention")]:
        site = match(node)
        if isinstance(site, str) or site.visible is not None or fits(node, op) is not True:
            continue  # lowering to the contrib operator says what becomes of it
        old = node.outputs[0]
        made = make_node(
            op.name, [site.q, site.k, site.v], [(f"{old.name}.native", old.dtype, dims(old))],
            {"scale": float_attr(node, "scale", 0.0)}, domain=DOMAIN, name=str(node.name),
        )  # fmt: skip
        made.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph_of(node), node, [node], [made], [old], [made.outputs[0]])
        keep_body(model, made, op)
        choices.append((str(node.name), "native kernel", f"CausalAttention in {_dtype(site.q)}: fresh keys"))
    return choices


def interleave(model: ir.Model, nodes: Iterable[ir.Node]) -> int:
    """Let nodes of native kernels read and write ``[B, S, N, D]`` where that saves their transposes; returns how many.

    Projections write that layout and the next one reads it; only the cache wants ``[B, N, S, D]``.
    """
    done = 0
    for node in nodes:
        op = all_ops()[node.op_type]
        wide = [i for i, port in enumerate(op.inputs) if len(port.axes) == 4]
        sources = [_source(node.inputs[i]) for i in wide]
        made = [value for port, value in zip(op.outputs, node.outputs, strict=True) if len(port.axes) == 4]
        if not wide or not all(sources) or any(value.is_graph_output() for value in made):
            continue
        for i in wide:
            node.replace_input_with(i, _swapped(node.inputs[i], model.graph))  # type: ignore[arg-type]
        node.domain = native.SWAPPED
        for output in made:
            _swap_output(node, output)
        keep_body(model, node, op)
        done += 1
    return done


def _source(value: ir.Value | None) -> ir.Value | None:
    """The ``[B, S, N, D]`` value that ``value [B, N, S, D]`` is made from, perhaps through a rotary embedding."""
    node = None if value is None else value.producer()
    if node is not None and is_op(node, "RotaryEmbedding") and len(node.inputs) == 3 and node.inputs[0] is not None:
        shape = dims(value)
        if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            return None
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and is_swap(node) else None


def _swapped(value: ir.Value, main: ir.Graph) -> ir.Value:
    """``value [B, N, S, D]`` as ``[B, S, N, D]``, no data moved; others who read a rotated value get a Transpose."""
    node = value.producer()
    if node is None:
        raise ValueError(f"'{value.name}' is an input")  # excluded by _source
    if is_swap(node):
        return node.inputs[0]  # type: ignore[return-value]
    batch, count, tokens, width = dims(value)  # type: ignore[misc]
    source = _source(value)
    graph, name = graph_of(node), f"{value.name}.bshd"
    flat = make_node(
        "Reshape", [source, constant(main, f"flat{count * width}", np.array([0, 0, count * width], np.int64))],
        [(f"{name}.flat", value.dtype, [batch, tokens, count * width])],
    )  # fmt: skip
    turned = make_node(
        "RotaryEmbedding", [flat.outputs[0], *node.inputs[1:]],
        [(f"{name}.rotated", value.dtype, [batch, tokens, count * width])],
        {**{key: a.value for key, a in node.attributes.items()}, "num_heads": count},
    )  # fmt: skip
    heads = constant(main, f"heads{count}x{width}", np.array([0, 0, count, width], np.int64))
    split = make_node("Reshape", [turned.outputs[0], heads], [(name, value.dtype, [batch, tokens, count, width])])
    back = make_node("Transpose", split.outputs, [(f"{name}.back", value.dtype, dims(value))], {"perm": SWAP})
    graph.insert_before(node, [flat, turned, split, back])
    take_place(value, back.outputs[0])
    graph.remove(node, safe=True)
    return split.outputs[0]


def _swap_output(node: ir.Node, output: ir.Value) -> None:
    """``output`` becomes ``[B, S, N, D]``: readers that swap it read it as it is, others get a Transpose."""
    shape = dims(output)
    output.shape = None if shape is None else ir.Shape([shape[axis] for axis in SWAP])
    others = [(user, i) for user, i in output.uses() if not is_swap(user)]
    for user in [user for user in output.consumers() if is_swap(user)]:
        take_place(user.outputs[0], output)
        graph_of(user).remove(user, safe=True)
    if others:
        back = make_node("Transpose", [output], [(f"{output.name}.bhsd", output.dtype, shape)], {"perm": SWAP})
        graph_of(node).insert_after(node, back)
        for user, i in others:
            user.replace_input_with(i, back.outputs[0])
