"""float32 -> float16 or bfloat16 with explicit types (what TensorRT calls strongly typed), from the graph's inputs on.

Every float32 value is one of three kinds while the graph is walked in order:

* ``HALF``: becomes float16 (or bfloat16: float16 below stands for either). Graph inputs are, and so is whatever is
  computed together with one;
* ``SINGLE``: stays float32 on purpose: what follows a ``Cast`` to float32 (positions on their way to cos and sin,
  scores in operator bodies), what a schema fixes to float32, and sums that may leave float16's range;
* ``WEAK``: depends on no float32 value but constants, so it can be had in either type: it is made again in float16
  where a float16 operator asks for it, without a cast at run time.

Where HALF and SINGLE meet, HALF wins: cos and sin are cast just before RotaryEmbedding. Weights are converted one at a
time when the model is written (``onnx_ir.LazyTensor``): no second copy of the model is held.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from trtpass.anchors import Anchors
from trtpass.errors import InputError
from trtpass.half import half_array, lazy_half
from trtpass.ir import OPSET, is_op, tidy
from trtpass.passes import Pass, PassResult

# Sums of squares and running sums: 256^2 is already beyond float16.
_WIDE = frozenset({"Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "Exp", "CumSum"})


class Kind(enum.Enum):
    """How a value is treated; OTHER is anything that was not float32 or float16."""

    HALF = "float16"
    SINGLE = "float32"
    WEAK = "constant"
    OTHER = "other"


@dataclass
class HalfReport:
    """What ``to_half`` did: number of converted initializers, of inserted casts, and names of nodes kept in float32."""

    initializers: int = 0
    casts: int = 0
    kept: list[str] = field(default_factory=list)


def to_half(model: ir.Model, low: ir.DataType = ir.DataType.FLOAT16) -> HalfReport:
    """Convert a float32 model to float16 in place; functions are left as they are (their bodies follow their inputs).

    Args:
        model: of float32; what is float16 already stays so.
        low: BFLOAT16 converts to bfloat16 instead, by the same rules.

    Raises:
        InputError: a function body that mixes float16 and float32, or an operator whose types are not known. A weight
            beyond float16's range is reported when it is read, that is when the model is written.
    """
    tidy(model)
    walk = _Walk(model, low)
    walk.run(model.graph)
    walk.settle(model.graph)
    tidy(model)
    walk.restore_names(model.graph)
    return walk.report


class _Walk:
    """One conversion; ``frozen`` only infers kinds, through the body of a function, and changes nothing."""

    def __init__(self, model: ir.Model, low: ir.DataType, frozen: str = "") -> None:
        self.model = model
        self.low = low
        self.frozen = frozen
        self.opset = model.opset_imports.get("", OPSET)
        self.kinds: dict[ir.Value, Kind] = {}
        self.halves: dict[ir.Value, ir.Value] = {}
        self.singles: dict[ir.Value, ir.Value] = {}
        self.report = HalfReport()

    def kind(self, value: ir.Value | None) -> Kind:
        if value is None:
            return Kind.OTHER
        if value not in self.kinds:  # graph inputs, initializers, and values of known non-float type
            if value.dtype == self.low:
                self.kinds[value] = Kind.HALF
            elif value.dtype == ir.DataType.FLOAT:
                self.kinds[value] = Kind.WEAK if value.const_value is not None else Kind.SINGLE
            else:
                self.kinds[value] = Kind.OTHER
        return self.kinds[value]

    def run(self, graph: ir.Graph) -> None:
        """Walk the main graph."""
        for value in graph.inputs:
            if value.dtype == ir.DataType.FLOAT and value.name not in graph.initializers:
                self.mark(value, Kind.HALF)
        for node in list(graph):
            self.node(node)

    def settle(self, graph: ir.Graph) -> None:
        """Graph outputs that are still constants become float16 as well."""
        for i, value in enumerate(graph.outputs):
            if self.kind(value) is Kind.WEAK:
                graph.outputs[i] = self.as_kind(value, Kind.HALF)

    def restore_names(self, graph: ir.Graph) -> None:
        """A converted initializer takes the name of the original wherever no float32 use of that is left."""
        for original, half in self.halves.items():
            name = original.name
            if name and half.is_initializer() and half.name in graph.initializers and name not in graph.initializers:
                del graph.initializers[str(half.name)]
                half.name = name
                graph.register_initializer(half)

    # ---- kinds -------------------------------------------------------------------------------------------------------

    def mark(self, value: ir.Value, kind: Kind) -> None:
        """Record a kind; HALF retypes the value."""
        self.kinds[value] = kind
        if self.frozen:
            return
        if kind is Kind.HALF:
            value.type = ir.TensorType(self.low)
        elif kind in (Kind.SINGLE, Kind.WEAK):
            value.type = ir.TensorType(ir.DataType.FLOAT)

    def node(self, node: ir.Node) -> None:
        """Settle one node's inputs and record the kinds of its outputs."""
        if is_op(node, "If", "Loop"):
            self.control(node)
        elif (function := self.model.functions.get(node.op_identifier())) is not None:
            kinds = self.through(function, [self.kind(v) for v in node.inputs])
            for value, kind in zip(node.outputs, kinds, strict=False):
                self.mark(value, kind)
        elif is_op(node, "Constant", "ConstantOfShape"):
            self.mark(node.outputs[0], Kind.WEAK if _is_float_constant(node) else Kind.OTHER)
        elif is_op(node, "Cast"):
            self.mark(node.outputs[0], self.of_dtype(node.attributes["to"].as_int()))
        elif is_op(node, "CastLike"):
            kind = self.kind(node.inputs[1])
            self.mark(node.outputs[0], Kind.SINGLE if kind is Kind.WEAK else kind)
        else:
            self.by_schema(node)

    def by_schema(self, node: ir.Node) -> None:
        """Resolve each type variable of the operator's schema over the node's inputs."""
        schema = _schema(node, self.opset)
        word = f"tensor({self.low.name.lower()})"
        lows = {c.type_param_str: word in c.allowed_type_strs for c in schema.type_constraints}
        groups: dict[str, list[int]] = {}
        for i, value in enumerate(node.inputs):
            if self.kind(value) is not Kind.OTHER:
                groups.setdefault(schema.inputs[min(i, len(schema.inputs) - 1)].type_str, []).append(i)
        kinds = {self.kind(node.inputs[i]) for members in groups.values() for i in members}
        decided: dict[str, Kind] = {}
        for variable, members in groups.items():
            own = {self.kind(node.inputs[i]) for i in members}
            if not lows.get(variable, False):
                kind = Kind.SINGLE
            elif kinds == {Kind.WEAK}:
                kind = Kind.HALF if not self.frozen and _reads_weight(node) else Kind.WEAK
            elif self.frozen:
                own.discard(Kind.WEAK)  # beside float16 it fails in as_kind: a body's constants are what they are
                kind = Kind.HALF if Kind.HALF in own else Kind.SINGLE if own else Kind.WEAK
            elif node.op_type in _WIDE:
                kind = Kind.SINGLE
            elif Kind.HALF in own or _reads_weight(node):
                kind = Kind.HALF
            elif Kind.SINGLE in own:
                kind = Kind.SINGLE
            else:
                kind = Kind.HALF if Kind.HALF in kinds else Kind.SINGLE
            decided[variable] = kind
            if kind is not Kind.WEAK:
                for i in members:
                    value = node.inputs[i]
                    if value is not None and self.kind(value) is not kind:
                        node.replace_input_with(i, self.as_kind(value, kind, node))
        if Kind.SINGLE in decided.values():
            self.report.kept.append(str(node.name))
        for i, value in enumerate(node.outputs):
            variable = schema.outputs[min(i, len(schema.outputs) - 1)].type_str
            if variable in decided:
                self.mark(value, decided[variable])
            elif value.dtype == ir.DataType.FLOAT or variable == "tensor(float)":
                self.mark(value, Kind.SINGLE)

    def through(self, function: ir.Function, kinds: Sequence[Kind]) -> list[Kind]:
        """Kinds of a function's outputs for given kinds of its inputs, which are taken as they are."""
        walk = _Walk(self.model, self.low, frozen=f"{function.domain}::{function.name}")
        for value, kind in zip(function.inputs, kinds, strict=False):
            walk.kinds[value] = Kind.SINGLE if kind is Kind.WEAK else kind
        for node in function:
            walk.node(node)
        found = [walk.kind(v) for v in function.outputs]
        return [Kind.SINGLE if k is Kind.WEAK else k for k in found]

    def control(self, node: ir.Node) -> None:
        """If and Loop: walk the bodies; what crosses their borders has one kind on every path."""
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        carried = 0
        if node.op_type == "Loop":
            carried = len(node.inputs) - 2
            for outer, inner in zip(node.inputs[2:], bodies[0].inputs[2:], strict=True):
                kind = self.kind(outer)
                self.mark(inner, Kind.SINGLE if kind is Kind.WEAK else kind)
        for body in bodies:
            for inner_node in list(body):
                self.node(inner_node)
        skip = 1 if node.op_type == "Loop" else 0  # a Loop body first returns its condition
        for i, value in enumerate(node.outputs):
            ends = [self.kind(body.outputs[i + skip]) for body in bodies]
            if i < carried:
                wanted = self.kind(bodies[0].inputs[i + 2])
            else:
                wanted = Kind.HALF if Kind.HALF in ends else Kind.SINGLE if Kind.OTHER not in ends else Kind.OTHER
            for body, end in zip(bodies, ends, strict=True):
                if end is not wanted:
                    body.outputs[i + skip] = self.as_kind(body.outputs[i + skip], wanted)
            self.mark(value, wanted)

    def of_dtype(self, dtype: int) -> Kind:
        """The kind of what is cast to an ONNX type on purpose."""
        return {ir.DataType.FLOAT: Kind.SINGLE, self.low: Kind.HALF}.get(ir.DataType(dtype), Kind.OTHER)

    # ---- conversions -------------------------------------------------------------------------------------------------

    def as_kind(self, value: ir.Value, kind: Kind, user: ir.Node | None = None) -> ir.Value:
        """``value`` in the wanted kind, converted once."""
        have = self.kind(value)
        if have is kind or (have is Kind.WEAK and kind is Kind.SINGLE):
            return value
        if self.frozen:
            where = f"node {user.op_type} -> '{user.outputs[0].name}'" if user is not None else "its outputs"
            raise InputError(
                f"the body of {self.frozen} meets float16 and float32 at {where} (value '{value.name}')",
                "bodies that follow the type of their inputs",
                "use CastLike on the constant, or Cast both sides to float32",
            )
        memo = self.halves if kind is Kind.HALF else self.singles
        if value not in memo:
            remake = have is Kind.WEAK and kind is Kind.HALF
            memo[value] = self.weak_half(value) if remake else self.cast(value, kind)
        return memo[value]

    def cast(self, value: ir.Value, kind: Kind) -> ir.Value:
        """A Cast right after ``value`` is made, so that every later use may share it."""
        to = self.low if kind is Kind.HALF else ir.DataType.FLOAT
        out = ir.Value(name=f"{value.name}.{to.name.lower()}", type=ir.TensorType(to), shape=value.shape)
        node = ir.node("Cast", [value], {"to": int(to)}, outputs=[out], name=f"{out.name}_Cast")
        _insert(node, value)
        self.kinds[out] = kind
        self.report.casts += 1
        return out

    def weak_half(self, value: ir.Value) -> ir.Value:
        """A float16 edition of a constant expression."""
        name = f"{value.name}.{self.low.name.lower()}"
        producer = value.producer()
        if producer is None:
            tensor, graph = value.const_value, value.graph
            if tensor is None or not isinstance(graph, ir.Graph):
                raise InputError(f"initializer '{value.name}' has no data", "a model with its weights")
            lazy = lazy_half(tensor, str(value.name), self.low)
            out = ir.Value(name=name, type=ir.TensorType(self.low), shape=value.shape, const_value=lazy)
            graph.register_initializer(out)
            self.report.initializers += 1
        else:
            out = ir.Value(name=name, type=ir.TensorType(self.low), shape=value.shape)
            inputs = [
                self.as_kind(v, Kind.HALF) if v is not None and self.kind(v) is Kind.WEAK else v
                for v in producer.inputs
            ]
            attributes = list(producer.attributes.values())
            if is_op(producer, "Constant", "ConstantOfShape"):
                array = half_array(_constant_array(producer), str(value.name), self.low)
                attributes = [ir.AttrTensor("value", ir.tensor(array))]
            node = ir.Node(
                producer.domain, producer.op_type, inputs, attributes, outputs=[out], name=f"{name}_{producer.op_type}"
            )
            _insert(node, value)
        self.kinds[out] = Kind.HALF
        return out


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain != "" or not onnx.defs.has(node.op_type, domain):
        raise InputError(
            f"node '{node.name}' is {node.domain or 'ai.onnx'}::{node.op_type}, whose types are not known",
            "standard operators and functions of the model",
            "convert to float16 before lowering to a runtime's own operators",
        )
    return onnx.defs.get_schema(node.op_type, opset, domain)


def _reads_weight(node: ir.Node) -> bool:
    """A matrix of weights at work: it is kept once, in float16, even where the other side came in float32."""
    operand = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}.get(node.op_type)
    if operand is None or node.domain not in ("", "ai.onnx"):
        return False
    value = node.inputs[operand]
    while value is not None and is_op(above := value.producer(), "Transpose"):
        value = above.inputs[0]
    if value is None or not value.is_initializer() or value.shape is None:
        return False
    rank = len(value.shape)  # inverse frequencies are 3-D and stay float32
    return rank == 2 if node.op_type == "MatMul" else rank >= 2


def _is_float_constant(node: ir.Node) -> bool:
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        return True
    if "value_float" in node.attributes or "value_floats" in node.attributes:
        return True
    attribute = node.attributes.get("value")
    return attribute is not None and not attribute.is_ref() and attribute.as_tensor().dtype == ir.DataType.FLOAT


def _constant_array(node: ir.Node) -> np.ndarray:
    """The float32 array of a Constant or ConstantOfShape node."""
    for key in ("value_float", "value_floats"):
        if key in node.attributes:
            return np.asarray(node.attributes[key].value, np.float32)
    attribute = node.attributes.get("value")
    return np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()


def _insert(node: ir.Node, value: ir.Value) -> None:
    """Put ``node`` right after the producer of ``value``, or first in the graph that ``value`` is an input of."""
    producer = value.producer()
    graph = producer.graph if producer is not None else value.graph
    if graph is None:
        raise InputError(f"value '{value.name}' belongs to no graph")
    if producer is not None:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


class Fp16(Pass):
    """``to_half`` as a step of a pipeline."""

    name = "fp16"
    summary = "float16 weights, activations and cache; positions, scores and sums of squares stay float32"
    source = "strongly typed networks (TensorRT)"
    method = False

    @dataclass(frozen=True)
    class NoOptions:
        """None."""

    Options: ClassVar[type] = NoOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Nothing: any graph of standard operators and model-local functions."""

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        before = {v.name: v.dtype for v in model.graph.inputs}
        report = to_half(model)
        changed = bool(report.initializers or report.casts) or before != {v.name: v.dtype for v in model.graph.inputs}
        return PassResult(self.name, modified=changed)
