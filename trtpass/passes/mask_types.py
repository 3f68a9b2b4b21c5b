"""Attention masks of numbers in the type of the queries, as TensorRT needs them (ONNX lets the two differ)."""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import dims, is_op, make_node

MASK = 3  # index of Attention's input attn_mask


def mask_types(model: ir.Model) -> int:
    """Cast every numeric mask of an Attention to the type of its queries, in place; returns how many casts were made.

    A mask that several nodes share is cast once.
    """
    cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention") and len(n.inputs) > MASK]:
        mask, q = node.inputs[MASK], node.inputs[0]
        if mask is None or q is None or q.dtype is None or mask.dtype in (None, ir.DataType.BOOL, q.dtype):
            continue
        if (mask, q.dtype) not in cast:
            made = make_node(
                "Cast", [mask], [(f"{mask.name}.{q.dtype.name.lower()}", q.dtype, dims(mask))], {"to": int(q.dtype)}
            )
            node.graph.insert_before(node, made)  # type: ignore[union-attr]
            cast[mask, q.dtype] = made.outputs[0]
        node.replace_input_with(MASK, cast[mask, q.dtype])
    return len(cast)
