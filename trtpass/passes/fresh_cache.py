"""Prefill's cache for TensorRT: what is written at slot 0 is put before the rest of the cache instead of scattered.

TensorRT-RTX 1.7 ends its process (a segmentation fault in its compiler) on a graph with token-sparse operators and
TensorScatter for both keys and values of a layer; with Concat it builds. The numbers are the same; ``present`` must
then not share memory with ``past``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtpass.ir import const_array, constant, dims, int_attr, is_op, make_node, tidy


def concat_fresh_cache(model: ir.Model) -> int:
    """Replace ``TensorScatter(past, new [B, Hkv, T, D], 0)`` by ``Concat(new, past[:, :, T:])`` along its axis.

    Returns:
        How many were replaced: those whose write index is proved zero (prefill); others stay as they are (decode).
    """
    graph = model.graph
    changed = 0
    for node in list(graph):
        if not is_op(node, "TensorScatter") or not _writes_at_zero(node):
            continue
        past, new, out = node.inputs[0], node.inputs[1], node.outputs[0]
        name, axis = str(out.name), int_attr(node, "axis", -2)
        rank = len(dims(past) or [None] * 4)
        axis %= rank
        axes = constant(graph, f"fresh.axis{axis}", np.array([axis], np.int64))
        end = constant(graph, "fresh.end", np.array([np.iinfo(np.int64).max], np.int64))
        size = make_node("Shape", [new], [(f"{name}.tokens", ir.DataType.INT64, [1])], {"start": axis, "end": axis + 1})
        rest = make_node("Slice", [past, size.outputs[0], end, axes], [(f"{name}.rest", out.dtype, [None] * rank)])
        whole = make_node("Concat", [new, rest.outputs[0]], [(f"{name}.whole", out.dtype, dims(out))], {"axis": axis})
        graph.insert_before(node, [size, rest, whole])
        out.replace_all_uses_with(whole.outputs[0], replace_graph_outputs=True)
        out.name, whole.outputs[0].name = f"{name}.scattered", name
        changed += 1
    if changed:
        tidy(model)
    return changed


def _writes_at_zero(node: ir.Node) -> bool:
    index = node.inputs[2] if len(node.inputs) > 2 else None
    if index is None:  # the standard's default
        return True
    made = index.producer()
    if is_op(made, "ConstantOfShape") and made is not None and made.attributes.get("value") is not None:
        return not made.attributes["value"].as_tensor().numpy().any()
    array = const_array(index)
    return array is not None and not array.any()
