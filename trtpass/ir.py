"""Small helpers over onnx-ir that passes share: making nodes, walking, constants, checking without weights.

Nothing here reads a weight: initializers stay lazy, and checks run on a *skeleton*, the model with large initializers
turned into typed inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from trtpass.errors import InputError

OPSET = 24  # canonical form: Attention-24, TensorScatter-24, RotaryEmbedding-23, RMSNormalization-23
IR_VERSION = 10
SMALL = 1024  # bytes; constants up to this size may be read by passes and are kept in skeletons


def const_array(value: ir.Value | None, limit: int = SMALL) -> np.ndarray | None:
    """The array of a small constant (initializer or Constant node), else None; reads at most ``limit`` bytes."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None and (node := value.producer()) is not None and node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.nbytes > limit:
        return None
    return tensor.numpy()


def const_scalar(value: ir.Value | None) -> float | int | None:
    """The Python number of a one-element constant, else None."""
    array = const_array(value)
    return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None


def const_ints(value: ir.Value | None) -> list[int] | None:
    """The integers of a small 0-D or 1-D integer constant, else None."""
    array = const_array(value)
    if array is None or array.dtype.kind not in "iu" or array.ndim > 1:
        return None
    return [int(x) for x in array.reshape(-1)]


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute or its default."""
    attr = node.attributes.get(name)
    return default if attr is None else int(attr.value)


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """A float attribute or its default."""
    attr = node.attributes.get(name)
    return default if attr is None else float(attr.value)


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether ``node`` is one of the given operators ("ai.onnx" is the standard domain too)."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain == "ai.onnx")


def dims(value: ir.Value | None) -> list[Any] | None:
    """The shape as ints and symbols (a size that is not known is None), or None where the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else (d if d.value is not None else None) for d in value.shape]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A named small initializer; the same name and content is reused, so that repeated edits do not pile up copies."""
    existing = graph.initializers.get(name)
    if existing is not None:
        have = const_array(existing, limit=array.nbytes)
        if have is not None and have.dtype == array.dtype and np.array_equal(have, array):
            return existing
        raise InputError(f"the graph already has an initializer '{name}' with another value")
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[tuple[str, ir.DataType | None, Sequence[Any] | ir.Shape | None]],
    attributes: dict[str, Any] | None = None,
    *,
    domain: str = "",
    name: str | None = None,
) -> ir.Node:
    """A node whose outputs are named and typed: ``(name, dtype, shape)`` with ints, symbols or None as sizes."""
    values = [
        ir.Value(
            name=label,
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(list(shape)),
        )
        for label, dtype, shape in outputs
    ]
    return ir.node(
        op_type, inputs, attributes or {}, domain=domain, outputs=values, name=name or f"{outputs[0][0]}_{op_type}"
    )


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[Any]) -> ir.Value:
    """The graph input ``name``, added at the end if it is not there.

    Raises:
        InputError: an input of that name exists with another dtype or rank.
    """
    for value in graph.inputs:
        if value.name == name:
            if value.dtype != dtype or value.shape is None or len(value.shape) != len(shape):
                raise InputError(
                    f"graph input '{name}' is {value.dtype} {value.shape}",
                    f"{dtype} {list(shape)}",
                    "rename that input",
                )
            return value
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
    graph.inputs.append(value)
    return value


def all_value_names(graph: ir.Graph) -> set[str]:
    """Names of all values of a graph, without its subgraphs."""
    names = {v.name for v in graph.inputs if v.name} | set(graph.initializers)
    names.update(v.name for node in graph for v in node.outputs if v.name)
    return names


def tidy(model: ir.Model) -> None:
    """Remove what nothing uses (nodes, initializers, functions) and sort topologically, in place."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.TopologicalSortPass()(model)


def drop_idle_inputs(model: ir.Model) -> None:
    """Remove graph inputs that nothing reads, in place, and name them in the property ``trtpass.dropped_inputs``.

    Such as ``lengths`` where all logits are asked for: a plan has no input that does nothing.
    """
    idle = [v for v in model.graph.inputs if not v.uses() and not v.is_graph_output()]
    if idle:
        model.graph.inputs[:] = [v for v in model.graph.inputs if v not in idle]
        model.metadata_props["trtpass.dropped_inputs"] = ",".join(str(v.name) for v in idle)


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto whose initializers above ``SMALL`` bytes are typed inputs: small, and no weight is read.

    External ones of any size too: the checker would look for their file in the working directory.
    """
    graph = model.graph
    large = [
        v for v in graph.initializers.values()
        if v.const_value is None or v.const_value.nbytes > SMALL or isinstance(v.const_value, ir.ExternalTensor)
    ]  # fmt: skip
    for value in large:
        del graph.initializers[value.name]  # type: ignore[arg-type]
    saved_inputs = list(graph.inputs)
    try:
        graph.inputs.extend(large)
        return ir.to_proto(model)
    finally:
        graph.inputs[:] = saved_inputs
        for value in large:
            graph.register_initializer(value)


def check(model: ir.Model, what: str) -> None:
    """Raise unless the model passes ONNX's checker (schemas, single assignment, topological order).

    Raises:
        InputError: what the checker says, prefixed by ``what``.
    """
    try:
        onnx.checker.check_model(skeleton(model))
    except onnx.checker.ValidationError as error:
        message = str(error).strip().splitlines()
        raise InputError(f"{what} is not valid ONNX: {' '.join(message[:3])}") from error


def untyped(values: Iterable[ir.Value]) -> list[str]:
    """Names of values whose dtype or rank is unknown."""
    return [str(v.name) for v in values if v.dtype is None or v.shape is None]
