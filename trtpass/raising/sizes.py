"""Sizes of every tensor, through the integer arithmetic that exporters put above Reshape, Expand and Resize.

ONNX's own shape inference loses a size as soon as it goes through such arithmetic. Here the contents of short integer
tensors are followed element by element; an element is an integer or the name of a size. Nothing is read but constants
of up to 64 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from trtpass.ir import const_array, const_scalar, constant, dims, int_attr, is_op
from trtpass.raising.size_rules import Size, broadcast, element, reshaped, sliced

_LONGEST = 64
_FAILURES = (  # of an operator or a value that ONNX does not know, or that does not fit
    onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError,
    OverflowError, TypeError,
)  # fmt: skip


def infer_sizes(graph: ir.Graph) -> Sizes:
    """Fill in the sizes of all node outputs, in place; what is known already stays unless it can be told better.

    A size better than another: a number before a name, the name of a graph input's size before any other name. A size
    that nothing tells gets a name of its own. Float32 scalars that come from sizes alone (scales such as
    ``1 / sqrt(D)``) become constants.
    """
    sizes = Sizes(graph)
    for node in graph:
        sizes.visit(node)
    for value, number in sizes.floats.items():
        shape = shape_of(value)
        if shape in ([], [1]) and const_scalar(value) is None and not value.is_graph_output():
            array = np.full([1] if shape else [], number, np.float32)
            value.replace_all_uses_with(constant(graph, f"folded_{number!r}{'_row' if shape else ''}", array))
    return sizes


class Sizes:
    """What is known of sizes and of the contents of short integer tensors. One instance a graph, nodes in order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.version = graph.opset_imports.get("", 1)
        self.given = {str(d.value) for v in graph.inputs for d in v.shape or () if not isinstance(d, int) and d.value}
        self.known: dict[ir.Value, tuple[Size, ...]] = {}
        self.floats: dict[ir.Value, float] = {}
        self.taken = {str(d) for n in graph for v in n.outputs for d in shape_of(v) or () if isinstance(d, str)}
        self.made = 0

    def contents(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """The elements of an integer (or boolean) tensor of rank 0 or 1, in order; None where they are not known."""
        if value is None:
            return None
        if value not in self.known:
            array = const_array(value)
            if array is None or array.dtype.kind not in "iub" or array.ndim > 1 or array.size > _LONGEST:
                return None
            self.known[value] = tuple(int(x) for x in array.reshape(-1))
        return self.known[value]

    def visit(self, node: ir.Node) -> None:
        """Work out the outputs of one node whose inputs are known."""
        if node.domain != "" or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return
        if is_op(node, "Constant"):
            if (tensor := ir.convenience.get_const_tensor(node.outputs[0])) is not None:
                node.outputs[0].shape = ir.Shape(tensor.shape.numpy())
            return
        if (number := _float(self, node)) is not None:
            self.floats[node.outputs[0]] = number
        found = _evaluate(self, node)
        if found is not None and len(found) <= _LONGEST:
            self.known[node.outputs[0]] = found
        told = self._shape(node)
        complete = told is not None and node.outputs[0].dtype is not None
        shapes = [told] if complete else self._by_onnx(node, told)
        for value, shape in zip(node.outputs, shapes, strict=False):
            if shape is not None:
                self._merge(value, shape)

    def _merge(self, value: ir.Value, shape: Sequence[Size]) -> None:
        old = shape_of(value)
        if old is None or len(old) != len(shape):
            old = [None] * len(shape)
        value.shape = ir.Shape([self._better(a, b) for a, b in zip(old, shape, strict=True)])

    def _better(self, old: Size, new: Size) -> int | str:
        for size in (new, old):
            if isinstance(size, int):
                return size
        for size in (new, old):
            if size in self.given:
                return str(size)
        if old is not None or new is not None:
            return str(new if old is None else old)
        while (name := f"size_{self.made}") in self.taken or name in self.given:
            self.made += 1
        self.taken.add(name)
        return name

    def _shape(self, node: ir.Node) -> list[Size] | None:
        """The shape of the only output where contents tell it."""
        x = shape_of(node.inputs[0]) if node.inputs else None
        if is_op(node, "Reshape"):
            target = self.contents(node.inputs[1])
            return None if target is None else reshaped(x, target, int_attr(node, "allowzero", 0))
        if is_op(node, "Expand"):
            target = self.contents(node.inputs[1])
            return None if target is None or x is None else broadcast(x, target)
        if is_op(node, "ConstantOfShape"):
            return _listed(self.contents(node.inputs[0]))
        if is_op(node, "Resize") and len(node.inputs) > 3 and "axes" not in node.attributes:
            return _listed(self.contents(node.inputs[3]))
        return None

    def _by_onnx(self, node: ir.Node, told: list[Size] | None) -> list[list[Size] | None]:
        """Shapes of the outputs by ONNX's inference of this one node; also sets types that are missing."""
        if any(value is not None and value.dtype is None for value in node.inputs):
            return []
        try:
            types, data = self._typed(node)
            schema = onnx.defs.get_schema(node.op_type, self.version, "")
            opset = [onnx.helper.make_opsetid("", self.version)]
            found = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data, opset_imports=opset)
        except _FAILURES:
            return []
        shapes: list[list[Size] | None] = []
        for i, value in enumerate(node.outputs):
            tensor = found[value.name].tensor_type if value.name in found else None
            if tensor is not None and value.type is None and tensor.elem_type:
                value.type = ir.TensorType(ir.DataType(tensor.elem_type))
            if i == 0 and told is not None:
                shapes.append(told)
            elif tensor is None or not tensor.HasField("shape"):
                shapes.append(None)
            else:
                shapes.append(
                    [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
                )
        return shapes

    def _typed(self, node: ir.Node) -> tuple[dict[str, onnx.TypeProto], dict[str, onnx.TensorProto]]:
        """Types of the inputs by name, and contents of those that are numbers throughout."""
        types, data = {}, {}
        for value in node.inputs:
            if value is None or value.dtype is None:
                continue
            name, kind, shape = str(value.name), int(value.dtype), shape_of(value)
            types[name] = onnx.helper.make_tensor_type_proto(kind, shape)
            elements = self.contents(value)
            numbers = [e for e in elements or () if isinstance(e, int)]
            if elements is not None and shape is not None and len(numbers) == len(elements):
                data[name] = onnx.helper.make_tensor(name, kind, [len(numbers)] if shape else [], numbers)
        return types, data


def shape_of(value: ir.Value | None) -> list[Size] | None:
    """Sizes of a tensor as numbers and names; None if not even the rank is known."""
    found = dims(value)
    if found is None:
        return None
    return [d if d is None or isinstance(d, int) else str(d) for d in found]


def _listed(sizes: tuple[Size, ...] | None) -> list[Size] | None:
    return None if sizes is None or any(isinstance(s, int) and s < 0 for s in sizes) else list(sizes)


def _evaluate(sizes: Sizes, node: ir.Node) -> tuple[Size, ...] | None:
    """The elements of the output of one node of shape arithmetic, or None."""
    if is_op(node, "Shape"):
        shape = shape_of(node.inputs[0])
        if shape is None:
            return None
        end = int_attr(node, "end", len(shape))
        return tuple(shape)[slice(int_attr(node, "start", 0), end)]
    if is_op(node, "Cast") and node.inputs[0] in sizes.floats and _is_integer(node):
        return (int(sizes.floats[node.inputs[0]]),)
    parts = [sizes.contents(v) for v in node.inputs if v is not None]
    if not parts or any(p is None for p in parts):
        return None
    values = [p for p in parts if p is not None]
    first = values[0]
    if is_op(node, "Unsqueeze", "Squeeze", "Reshape"):
        return first if len(shape_of(node.outputs[0]) or ()) < 2 else None
    if is_op(node, "Identity", "Cast"):
        return first if node.op_type == "Identity" or _is_integer(node) else None
    if is_op(node, "Concat"):
        return tuple(size for part in values for size in part)
    if is_op(node, "Gather") and int_attr(node, "axis", 0) == 0:
        at = [i for i in values[1] if isinstance(i, int) and -len(first) <= i < len(first)]
        return tuple(first[i] for i in at) if len(at) == len(values[1]) else None
    if is_op(node, "Slice"):
        return sliced(first, values[1:])
    if is_op(node, "ConstantOfShape") and len(first) == 1 and isinstance(first[0], int) and first[0] <= _LONGEST:
        fill = node.attributes["value"].value.numpy().reshape(-1)[0] if "value" in node.attributes else 0.0
        return (int(fill),) * first[0] if hasattr(fill, "dtype") and fill.dtype.kind in "iu" else None
    if is_op(node, "Add", "Sub", "Mul", "Div", "Equal", "Where"):
        length = max(len(v) for v in values)
        if any(len(v) not in (1, length) for v in values):
            return None
        rows = zip(*(v * (length if len(v) == 1 else 1) for v in values), strict=True)
        return tuple(element(node.op_type, *row) for row in rows)
    return None


def _float(sizes: Sizes, node: ir.Node) -> float | None:
    """The value of a float32 scalar that is computed from numbers alone, or None."""
    if not is_op(node, "Cast", "Sqrt", "Reciprocal", "Div", "Mul", "Pow") or not node.inputs:
        return None
    if is_op(node, "Cast") and int_attr(node, "to", 0) != ir.DataType.FLOAT:
        return None
    numbers: list[float] = []
    for value in node.inputs:
        elements = sizes.contents(value)
        number = sizes.floats[value] if value in sizes.floats else const_scalar(value)
        if elements is not None and len(elements) == 1 and isinstance(elements[0], int):
            number = elements[0]
        if number is None or value is None or (value.dtype != ir.DataType.FLOAT and not is_op(node, "Cast")):
            return None
        numbers.append(float(number))
    if node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
        return None
    try:
        first, other = np.float32(numbers[0]), np.float32(numbers[-1])
        with np.errstate(all="ignore"):
            result = {
                "Cast": lambda: first, "Sqrt": lambda: np.sqrt(first), "Reciprocal": lambda: np.float32(1) / first,
                "Div": lambda: first / other, "Mul": lambda: first * other, "Pow": lambda: first**other,
            }[node.op_type]()  # fmt: skip
    except ArithmeticError:
        return None
    return float(result) if np.isfinite(result) else None


def _is_integer(cast: ir.Node) -> bool:
    return int_attr(cast, "to", 0) in (ir.DataType.INT64, ir.DataType.INT32)
