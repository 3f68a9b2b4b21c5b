"""Nodes of one pass: operators with their shapes, and the few standard nodes around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from plugins._library import function
from trtpass.ir import constant, make_node
from trtpass.op import DOMAIN, VERSION

F32, I32, I64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
_TYPES = {"int32": I32, "float32": F32}


class Emitter:
    """Collects nodes whose names start with ``label``; ``take`` hands them over.

    Sizes in shapes are ints, symbols (``ir.SymbolicDim``) or None; arithmetic of an operator's shape on a size that is
    not an int gives None, and callers name such a size.
    """

    def __init__(self, model: ir.Model, label: str) -> None:
        self.model, self.graph, self.label = model, model.graph, label
        self.nodes: list[ir.Node] = []

    def op(
        self, name: str, inputs: Sequence[ir.Value], roles: Sequence[str], sizes: dict[str, Any], **attrs: Any
    ) -> list[ir.Value]:
        """A node of operator ``name``; ``roles`` name its outputs, ``sizes`` the dimensions of their shapes."""
        op = all_ops()[name]
        floating = next((v.dtype for v, port in zip(inputs, op.inputs, strict=True) if port.floating), F32)
        outputs = [
            (
                f"{self.label}.{role}",
                floating if port.floating else _TYPES[port.dtypes[0]],
                [sizes.get(axis) for axis in port.axes],
            )
            for role, port in zip(roles, op.outputs, strict=True)
        ]
        node = make_node(
            name, inputs, outputs, op.complete(attrs), domain=DOMAIN, name=f"{self.label}.{roles[0]}.{name}"
        )
        self.nodes.append(node)
        body = function(op, "dynamic")
        self.model.functions.setdefault(body.identifier(), body)
        self.model.opset_imports[DOMAIN] = VERSION
        return list(node.outputs)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        role: str,
        dtype: ir.DataType | None,
        shape: Sequence[Any],
        **attrs: Any,
    ) -> ir.Value:
        """A standard node with one output."""
        node = make_node(
            op_type, inputs, [(f"{self.label}.{role}", dtype, shape)], attrs, name=f"{self.label}.{role}.{op_type}"
        )
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return constant(
            self.graph, "reduction.ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64)
        )

    def scalar(self, value: float | int, dtype: type = np.float32) -> ir.Value:
        """A 0-D constant."""
        name = f"reduction.{np.dtype(dtype).name}_{value}".replace("-", "m")
        return constant(self.graph, name, np.array(value, dtype))

    def array(self, name: str, values: np.ndarray) -> ir.Value:
        """A constant of this site."""
        return constant(self.graph, f"{self.label}.{name}", values)

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call."""
        made, self.nodes = self.nodes, []
        return made
