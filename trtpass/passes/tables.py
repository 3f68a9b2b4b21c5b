"""Tables that a graph scales anew in each run, such as DINOv2's position embeddings, scaled once and for all."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from trtpass.ir import IR_VERSION, OPSET, constant, dims, is_op, make_node
from trtpass.passes.transposes import take_place

LIMIT = 1 << 24  # bytes of a table, before and after
_MOVES = ("Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity")


def fold_tables(model: ir.Model) -> int:
    """Replace each Resize of an initializer to a fixed shape by what it gives, in place; returns how many.

    Exporters compute the sizes from those of the image, which a runtime does not fold where the batch is free.
    """
    done = 0
    for node in [n for n in model.graph if is_op(n, "Resize")]:
        chain = _chain(node)
        table = None if chain is None or chain[0].inputs[0] is None else chain[0].inputs[0].const_value
        if chain is None or table is None or table.nbytes > LIMIT or table.dtype != ir.DataType.FLOAT:
            continue
        old = node.outputs[0]
        made = ir.Value(name=f"{old.name}.table", shape=old.shape, type=old.type)
        made.const_value = ir.tensor(_evaluated(chain, table.numpy()), name=made.name)
        model.graph.register_initializer(made)
        take_place(old, made)
        done += 1
    return done


def _chain(node: ir.Node) -> list[ir.Node] | None:
    """The nodes from an initializer to ``node``, each of a fixed result that depends on nothing else but its shape."""
    if len(node.inputs) < 4 or node.inputs[3] is None or any(v is not None for v in node.inputs[1:3]):
        return None  # scaled by factors: not known from the shape
    if "axes" in node.attributes or "keep_aspect_ratio_policy" in node.attributes or node.outputs[0].is_graph_output():
        return None
    chain: list[ir.Node] = []
    at: ir.Node | None = node
    while at is not None:
        shape = dims(at.outputs[0])
        known = shape is not None and all(isinstance(size, int) for size in shape)
        known = known and 4 * math.prod(shape or []) <= LIMIT
        if not known or at.inputs[0] is None or (at is not node and not is_op(at, *_MOVES)):
            return None
        chain.insert(0, at)
        at = at.inputs[0].producer()
    return chain


def _evaluated(chain: list[ir.Node], table: np.ndarray) -> np.ndarray:
    """What the chain makes of ``table``, computed by ONNX Runtime."""
    import onnxruntime

    first = ir.Value(name="table", type=ir.TensorType(ir.DataType.from_numpy(table.dtype)), shape=ir.Shape(table.shape))
    graph = ir.Graph([first], [], nodes=[], opset_imports={"": OPSET}, name="table")
    at = first
    for number, node in enumerate(chain):
        to = node.outputs[0]
        rest: list[ir.Value | None] = []
        kind = "Reshape" if is_op(node, "Reshape", "Unsqueeze", "Squeeze") else node.op_type
        if kind in ("Reshape", "Resize"):
            size = constant(graph, f"size{number}", np.array(dims(to), np.int64))
            rest = [size] if kind == "Reshape" else [None, None, size]
        keep = {} if kind == "Reshape" else {name: a.value for name, a in node.attributes.items()}
        made = make_node(kind, [at, *rest], [(f"made{number}", to.dtype, dims(to))], keep)
        graph.append(made)
        at = made.outputs[0]
    graph.outputs.append(at)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"table": table})[0]
    return result
