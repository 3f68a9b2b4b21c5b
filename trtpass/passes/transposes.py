"""Transposes that move no data: into the branches of an If, and from the rows of a Gather to its indices.

A method's attention gives ``[B, H, S, D]`` and the projection after it reads ``[B, S, H*D]``. Rows are gathered there
anyhow, so the order is a matter of the indices, which are D times smaller.
"""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import dims, int_attr, is_op, make_node

SWAP = [0, 2, 1, 3]


def is_swap(node: ir.Node | None) -> bool:
    """Whether ``node`` exchanges the middle axes: ``[B, H, S, D]`` and ``[B, S, H, D]``."""
    perm = node.attributes.get("perm") if node is not None and is_op(node, "Transpose") else None
    return perm is not None and list(perm.as_ints()) == SWAP


def swap_in_branches(model: ir.Model) -> int:
    """Where all that reads an If's output swaps its axes, let each branch swap instead, in place; returns how many."""
    done = 0
    for node in [n for n in model.graph.all_nodes() if is_op(n, "If")]:
        for number, output in enumerate(node.outputs):
            users = list(output.consumers())
            if not users or output.is_graph_output() or not all(is_swap(user) for user in users):
                continue
            for name in ("then_branch", "else_branch"):
                branch = node.attributes[name].as_graph()
                swapped = _swap(branch.outputs[number], f"{branch.outputs[number].name}.swapped")
                branch.append(swapped)
                branch.outputs[number] = swapped.outputs[0]
            output.shape = _swapped(output)
            for user in users:
                _replace(user, output)
            done += 1
    return done


def swap_indices(model: ir.Model) -> int:
    """``swap(Gather(rows [R, D], index [B, H, S]))`` is ``Gather(rows, index [B, S, H])``: in place; how many."""
    done = 0
    for node in [n for n in model.graph.all_nodes() if is_swap(n)]:
        rows = node.inputs[0]
        gather = None if rows is None else rows.producer()
        if rows is None or gather is None or not is_op(gather, "Gather") or int_attr(gather, "axis", 0):
            continue
        data, index = gather.inputs[0], gather.inputs[1]
        if data is None or index is None or len(dims(data) or []) != 2 or len(list(rows.uses())) != 1:
            continue
        if rows.is_graph_output() or not isinstance(gather.graph, ir.Graph):
            continue
        turned = make_node(
            "Transpose", [index], [(f"{index.name}.{gather.name}.swapped", index.dtype, None)], {"perm": SWAP[:3]}
        )
        gather.graph.insert_before(gather, turned)
        gather.replace_input_with(1, turned.outputs[0])
        rows.shape = _swapped(rows)
        _replace(node, rows)
        done += 1
    return done


def take_place(old: ir.Value, new: ir.Value) -> None:
    """``new`` is read wherever ``old`` was, and takes its name too where it is an output of the graph."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Remove ``node``; ``value`` takes the place of its output."""
    take_place(node.outputs[0], value)
    if isinstance(node.graph, ir.Graph):
        node.graph.remove(node, safe=True)


def _swap(value: ir.Value, name: str) -> ir.Node:
    shape = _swapped(value)
    return make_node(
        "Transpose", [value], [(name, value.dtype, None if shape is None else list(shape))], {"perm": SWAP}
    )


def _swapped(value: ir.Value) -> ir.Shape | None:
    shape = dims(value)
    return ir.Shape([shape[axis] for axis in SWAP]) if shape is not None and len(shape) == 4 else None
