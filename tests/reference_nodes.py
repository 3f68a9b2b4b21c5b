"""A graph with plugin nodes on a CPU: onnx's reference evaluator, with each plugin computed by its torch reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from plugins import kernel_ops
from trtpass.op import DOMAIN, Op
from trtpass.trt.plugins import decode, encode


def _node(op: Op) -> type[OpRun]:
    def run(self: OpRun, *inputs: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
        values = decode(op, {name: attrs[name] for name in encode(op, {})})
        made = op(*(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs), **values)
        return tuple(x.numpy() for x in (made if isinstance(made, tuple) else (made,)))

    attributes = {"op_domain": DOMAIN, "_run": run, "op_schema": None}
    return type(op.name, (OpRun,), attributes)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a lowered graph by name."""
    proto = ir.to_proto(model)
    made = ReferenceEvaluator(proto, new_ops=[_node(op) for op in kernel_ops().values()]).run(None, dict(feeds))
    return {value.name: np.asarray(array) for value, array in zip(proto.graph.output, made, strict=True)}
