"""Models of a single operator node with its body, and three ways to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from plugins._library import function_proto
from trtpass.op import DOMAIN, VERSION, Op

Array = np.ndarray[Any, Any]


def model_of(
    op: Op, kind: str, inputs: Sequence[Array], attrs: Mapping[str, Any], symbolic: bool = True
) -> onnx.ModelProto:
    """A model of one node; ``symbolic`` inputs have named sizes, else the sizes of the given arrays."""
    element = [helper.np_dtype_to_tensor_dtype(x.dtype) for x in inputs]
    floating = helper.np_dtype_to_tensor_dtype(next((x.dtype for x in inputs if x.dtype.kind == "f"), np.dtype("f4")))
    given = [
        helper.make_tensor_value_info(port.name, kind_of, list(port.axes) if symbolic else list(x.shape))
        for port, kind_of, x in zip(op.inputs, element, inputs, strict=True)
    ]
    outputs = []  # their sizes always have names: a body may cut C
    for port in op.outputs:
        fixed = len(port.dtypes) == 1
        kind_of = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtypes[0])) if fixed else floating
        outputs.append(helper.make_tensor_value_info(port.name, kind_of, list(port.axes)))
    names = [[port.name for port in ports] for ports in (op.inputs, op.outputs)]
    node = helper.make_node(op.name, *names, domain=DOMAIN, **op.complete(attrs))
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], op.name, given, outputs)
    return helper.make_model(graph, functions=[function_proto(op, kind)], opset_imports=opsets, ir_version=10)


def named(op: Op, inputs: Sequence[Array]) -> dict[str, Array]:
    return {port.name: x for port, x in zip(op.inputs, inputs, strict=True)}


def in_onnxruntime(
    op: Op, kind: str, inputs: Sequence[Array], attrs: Mapping[str, Any], symbolic: bool = True, threads: int = 1
) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = model_of(op, kind, inputs, attrs, symbolic).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, named(op, inputs))


def in_onnx_reference(op: Op, kind: str, inputs: Sequence[Array], attrs: Mapping[str, Any]) -> list[Array]:
    return ReferenceEvaluator(model_of(op, kind, inputs, attrs)).run(None, named(op, inputs))


def in_torch(op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any]) -> list[Array]:
    """The reference itself."""
    made = op(*(torch.from_numpy(x) for x in inputs), **attrs)
    return [x.numpy() for x in (made if isinstance(made, tuple) else (made,))]
