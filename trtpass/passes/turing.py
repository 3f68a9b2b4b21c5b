"""float32 products for SM75: TensorRT-RTX compiles no float32 matrix product for Turing.

Those that float16 graphs keep are small beside the model: inverse frequencies times positions (one term a sum), the
scores of the last W queries, and sums of votes. Written as Mul and ReduceSum they are fused and never materialised
(activation memory of the plan, as the builder reports it), and exact in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trtpass.errors import InputError
from trtpass.ir import constant, dims, is_op, make_node, tidy


def products_as_sums(model: ir.Model) -> int:
    """Rewrite every float32 ``MatMul(a [.., M, K], b [.., K, N])`` as ``ReduceSum(a[.., M, 1, K] * b^T[.., 1, N, K])``.

    Returns:
        How many products were rewritten, in the main graph.

    Raises:
        InputError: an operand whose rank is unknown or below 2.
    """
    graph = model.graph
    common.ShapeInferencePass(data_prop=True)(model)  # inlined bodies come without shapes
    changed = 0
    for node in list(graph):
        if not is_op(node, "MatMul") or node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
        ranks = [len(dims(v) or []) for v in (a, b)]
        if a is None or b is None or min(ranks) < 2:
            raise InputError(f"float32 MatMul '{node.name}' has operands of rank {ranks}", "known ranks, 2 or more")
        name, single = str(out.name), ir.DataType.FLOAT
        order = [*range(ranks[1] - 2), ranks[1] - 1, ranks[1] - 2]
        last = constant(graph, "product.last", np.array([-1], np.int64))
        left_axis = constant(graph, "product.left", np.array([-2], np.int64))
        right_axis = constant(graph, "product.right", np.array([-3], np.int64))
        left = make_node("Unsqueeze", [a, left_axis], [(f"{name}.left", single, [None] * (ranks[0] + 1))])
        turned = make_node("Transpose", [b], [(f"{name}.turned", single, [None] * ranks[1])], {"perm": order})
        right = make_node(
            "Unsqueeze", [turned.outputs[0], right_axis], [(f"{name}.right", single, [None] * (ranks[1] + 1))]
        )
        terms = make_node(
            "Mul", [left.outputs[0], right.outputs[0]], [(f"{name}.terms", single, [None] * (max(ranks) + 1))]
        )
        total = make_node("ReduceSum", [terms.outputs[0], last], [(f"{name}.sum", single, dims(out))], {"keepdims": 0})
        graph.insert_before(node, [left, turned, right, terms, total])
        out.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        out.name, total.outputs[0].name = f"{name}.product", name
        changed += 1
    if changed:
        tidy(model)
    return changed
