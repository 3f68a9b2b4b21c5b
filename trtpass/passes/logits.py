"""Logits of the last valid token only: chosen before lm_head, so that ``[B, S, V]`` is never computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors
from trtpass.errors import AnchorError
from trtpass.ir import add_input, constant, dims, is_op, make_node
from trtpass.passes import Pass, PassResult, Site

# Between lm_head and the output these act on each logit alone, so they commute with choosing a token.
_POINTWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")


@dataclass(frozen=True)
class LastLogitsOptions:
    """None: the row lengths come from the graph input ``lengths``."""


class LastLogits(Pass):
    """``logits [B, S, V]`` becomes ``[B, 1, V]``: the row at ``lengths - 1``, chosen before the lm_head product."""

    name = "last-logits"
    summary = "computes the logits of the last valid token of each row only"
    source = "plumbing: what decoding reads"
    method = False
    Options: ClassVar[type] = LastLogitsOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        lm_head(anchors)

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        head, logits = lm_head(anchors), anchors.logits
        hidden = head.inputs[0]
        if logits is None or hidden is None:  # excluded by requires
            raise AnchorError("no logits output was found")
        width = dims(hidden)
        shape = dims(logits)
        if width is None or shape is None or len(width) != 3:
            raise AnchorError(
                f"lm_head '{head.name}' reads '{hidden.name}' of shape {width}",
                "a hidden state [batch, sequence, width]",
            )
        graph = model.graph
        lengths = add_input(graph, "lengths", ir.DataType.INT32, [shape[0]])
        # index [B, 1, 1]: with one batch dimension, GatherND picks hidden[b, index[b, 0, 0]] -> [B, 1, E]
        last = make_node("Sub", [lengths, constant(graph, "last.one", np.array(1, np.int32))],
                         [("last.position", ir.DataType.INT32, [shape[0]])])  # fmt: skip
        wide = make_node("Cast", last.outputs, [("last.position64", ir.DataType.INT64, [shape[0]])],
                         {"to": int(ir.DataType.INT64)})  # fmt: skip
        index = make_node(
            "Unsqueeze", [wide.outputs[0], constant(graph, "last.axes", np.array([1, 2], np.int64))],
            [("last.index", ir.DataType.INT64, [shape[0], 1, 1])],
        )  # fmt: skip
        chosen = make_node("GatherND", [hidden, index.outputs[0]],
                           [("last.hidden", hidden.dtype, [shape[0], 1, width[2]])], {"batch_dims": 1})  # fmt: skip
        graph.insert_before(head, [last, wide, index, chosen])
        head.replace_input_with(0, chosen.outputs[0])
        node: ir.Node | None = logits.producer()
        while node is not None:  # every value from lm_head down to the output now has one token
            for value in node.outputs:
                known = dims(value)
                if known is not None and len(known) == 3:
                    value.shape = ir.Shape([known[0], 1, known[2]])
            node = None if node is head else _upper(node)
        return PassResult(self.name, True, (Site(-1, {"hidden": "last.hidden"}),))


def _upper(node: ir.Node) -> ir.Node | None:
    """The producer of the one input that is not constant."""
    moving = [v for v in node.inputs if v is not None and v.const_value is None]
    return moving[0].producer() if len(moving) == 1 else None


def lm_head(anchors: Anchors) -> ir.Node:
    """The MatMul that makes the logits, found by walking up from them through bias, dtype and soft-cap nodes.

    Raises:
        AnchorError: no logits, or something between the product and the output that mixes tokens.
    """
    if anchors.logits is None:
        raise AnchorError(
            "no logits output was found: " + "; ".join(m for m in anchors.missing if "logits" in m),
            "a graph output [batch, sequence, vocabulary] made by a MatMul",
            "ask for logits=all if the graph's output is something else",
        )
    node = anchors.logits.producer()
    while node is not None and is_op(node, *_POINTWISE):
        node = _upper(node)
    if node is None or not is_op(node, "MatMul") or node.inputs[0] is None:
        raise AnchorError(
            f"output '{anchors.logits.name}' comes from {'a graph input' if node is None else node.op_type}",
            "a MatMul, then at most bias, dtype and soft-cap",
            "ask for logits=all",
        )
    return node
