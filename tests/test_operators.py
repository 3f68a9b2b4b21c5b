"""What holds for every operator: each folder under plugins/ is found and held to the same contract."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from one_op import Array, in_onnx_reference, in_onnxruntime, in_torch, model_of

import plugins
from plugins import all_ops
from plugins._library import function, function_proto
from trtpass.errors import InputError
from trtpass.op import DOMAIN, FLOATS, Case, Op

KINDS = ("dynamic", "static")
SIZES = {1, 63, 127, 128, 129, 1000}  # sequence lengths that every operator is tried at
SMALL = 40_000  # elements over all inputs: the ONNX reference evaluator is slow

# Output lengths that depend on data, sorts over the sequence, branches: what a TensorRT network cannot hold.
NOT_STATIC = {"NonZero", "Compress", "Unique", "TopK", "If", "SequenceAt", "GatherElements"}


def _cases(small: bool = False) -> list[Any]:
    found = []
    for op in all_ops().values():
        for case in op.case_list() if op.case_list else ():
            if not small or sum(np.size(x) for x in case.make(0)) <= SMALL:
                found.append(pytest.param(op, case, id=f"{op.name}-{case.name}"))
    return found


def _bodies(small: bool = False) -> list[Any]:
    """Every case of every body; an operator with one body for both kinds is tried once."""
    found = []
    for parameters in _cases(small):
        op, case = parameters.values
        for kind in KINDS if op.bodies["dynamic"] is not op.bodies["static"] else KINDS[1:]:
            found.append(pytest.param(op, case, kind, id=f"{parameters.id}-{kind}"))
    return found


def _compare(op: Op, inputs: Sequence[Array], actual: Sequence[Array], expected: Sequence[Array]) -> None:
    """Integers exactly, floats within the operator's tolerance; a capacity may be shorter where the rest is padding."""
    dtype = next((str(x.dtype) for x in inputs if x.dtype.kind == "f"), "float32")
    tokens = op.bind([x.shape for x in inputs]).get("S")
    for port, mine, theirs in zip(op.outputs, actual, expected, strict=True):
        assert mine.dtype == theirs.dtype, port.name
        if mine.shape != theirs.shape and port.axes[-1] == "C":
            pad = [(0, 0)] * (mine.ndim - 1) + [(0, theirs.shape[-1] - mine.shape[-1])]
            mine = np.pad(mine, pad, constant_values=tokens)
        if mine.dtype.kind == "i":
            np.testing.assert_array_equal(mine, theirs, err_msg=port.name)
        else:
            limits = {"rtol": op.tolerance.rtol[dtype], "atol": op.tolerance.atol[dtype]}
            np.testing.assert_allclose(mine.astype("f8"), theirs.astype("f8"), **limits, err_msg=port.name)


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "fixed"])
@pytest.mark.parametrize(("op", "case", "kind"), _bodies())
def test_body_equals_reference_in_onnxruntime(op: Op, case: Case, kind: str, symbolic: bool) -> None:
    inputs = case.make(0)
    expected = in_torch(op, inputs, case.attrs)
    _compare(op, inputs, in_onnxruntime(op, kind, inputs, case.attrs, symbolic), expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("op", "case", "kind"), _bodies(small=True))
def test_body_equals_reference_in_the_onnx_reference(op: Op, case: Case, kind: str) -> None:
    inputs = case.make(1)
    _compare(op, inputs, in_onnx_reference(op, kind, inputs, case.attrs), in_torch(op, inputs, case.attrs))


@pytest.mark.parametrize(("op", "case"), _cases())
def test_shape_function_on_ints_equals_the_reference(op: Op, case: Case) -> None:
    inputs = case.make(0)
    shapes = op.output_shapes([x.shape for x in inputs], case.attrs)
    made = in_torch(op, inputs, case.attrs)
    assert list(shapes.items()) == [(port.name, x.shape) for port, x in zip(op.outputs, made, strict=True)]


class Expr:
    """A symbol as TensorRT has them: arithmetic with the symbol on the left only, no comparison, no length."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _of(self, other: Any) -> int:
        return other.value if isinstance(other, Expr) else other

    def __add__(self, other: Any) -> Expr:
        return Expr(self.value + self._of(other))

    def __sub__(self, other: Any) -> Expr:
        return Expr(self.value - self._of(other))

    def __mul__(self, other: Any) -> Expr:
        return Expr(self.value * self._of(other))

    def __floordiv__(self, other: Any) -> Expr:
        return Expr(self.value // self._of(other))

    def __bool__(self) -> bool:
        raise TypeError("a symbol has no truth value")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError("symbols cannot be compared")


@pytest.mark.parametrize(("op", "case"), _cases())
def test_shape_function_on_symbols(op: Op, case: Case) -> None:
    sizes = [x.shape for x in case.make(0)]
    expected = op.output_shapes(sizes, case.attrs)
    made = op.output_shapes([[Expr(n) for n in shape] for shape in sizes], case.attrs)
    assert {k: tuple(e.value for e in v) for k, v in made.items()} == expected

    names = [[ir.SymbolicDim(axis) for axis in port.axes] for port in op.inputs]
    symbolic = op.output_shapes(names, case.attrs)
    bound = op.bind(sizes)
    for name, shape in symbolic.items():
        assert all(isinstance(d, ir.SymbolicDim) for d in shape)
        assert tuple(int(d.evaluate(bound)) for d in shape) == expected[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", all_ops().values(), ids=lambda op: op.name)
def test_body_has_the_schema_of_the_operator(op: Op, kind: str) -> None:
    proto = function_proto(op, kind)
    assert (proto.domain, proto.name) == (DOMAIN, op.name)
    assert list(proto.input) == [port.name for port in op.inputs]
    assert len(proto.output) == len(op.outputs)
    assert list(proto.attribute) == [attr.name for attr in op.attrs]
    assert not proto.attribute_proto
    assert [(x.domain, x.version) for x in proto.opset_import] == [("", 24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", all_ops().values(), ids=lambda op: op.name)
def test_body_is_standard_and_well_formed(op: Op, kind: str) -> None:
    inputs = op.case_list()[0].make(0)
    onnx.checker.check_model(model_of(op, kind, inputs, {}), full_check=True)
    nodes = list(function(op, kind).all_nodes())
    assert {node.domain for node in nodes} == {""}
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    if kind == "static":
        assert not {node.op_type for node in nodes} & NOT_STATIC


@pytest.mark.parametrize("op", all_ops().values(), ids=lambda op: op.name)
def test_function_hands_out_copies_and_refuses_unknown_kinds(op: Op) -> None:
    assert function(op, "static") is not function(op, "static")
    with pytest.raises(InputError, match="one of dynamic, static"):
        function(op, "quick")


def gaps(op: Op) -> list[str]:
    """What an operator lacks, in words; empty when it is complete."""
    found: list[str] = []
    doc = inspect.getdoc(op.reference) or ""
    for name in [*(p.name for p in (*op.inputs, *op.outputs)), *(a.name for a in op.attrs)]:
        if not re.search(rf"\b{name}\b", doc):
            found.append(f"the docstring does not mention {name}")
    if not re.search(r"arXiv \d{4}\.\d{4,5}, section", op.source):
        found.append("the source is not a paper with its arXiv id and section")
    if len(op.tolerance.reason) < 20:
        found.append("the tolerance has no reason")
    if any(set(port.dtypes) & set(FLOATS) for port in op.outputs):
        floats = {d for port in op.inputs for d in port.dtypes if d in FLOATS}
        for dtype in sorted(floats):
            if dtype not in op.tolerance.atol or dtype not in op.tolerance.rtol:
                found.append(f"no tolerance for {dtype}")
    found += [f"no {kind} body" for kind in KINDS if kind not in op.bodies]
    cases = op.case_list() if op.case_list else []
    names = [case.name for case in cases]
    if len(set(names)) < max(len(names), 8):
        found.append("fewer than 8 cases, or two of one name")
    made = [case.make(0) for case in cases]
    bound = [op.bind([x.shape for x in inputs]) for inputs in made]
    for size in sorted(SIZES - {b.get("S") for b in bound}):
        found.append(f"no case at S = {size}")
    if not any(b["B"] >= 3 for b in bound):
        found.append("no batch of 3")
    allowed = {d for port in op.inputs for d in port.dtypes}
    tried = {str(x.dtype) for inputs in made for x in inputs}
    found += [f"no case with {dtype}" for dtype in sorted(allowed - tried)]
    for attr in op.attrs:
        if all(case.attrs.get(attr.name, attr.default) == attr.default for case in cases):
            found.append(f"{attr.name} is never anything but its default")
    return found


@pytest.mark.parametrize("op", all_ops().values(), ids=lambda op: op.name)
def test_operator_is_complete(op: Op) -> None:
    assert gaps(op) == []


def test_every_folder_is_an_operator() -> None:
    folders = {m.name for m in pkgutil.iter_modules(plugins.__path__) if m.ispkg}
    assert folders == {op.folder for op in all_ops().values()}
    assert len(folders) >= 4
    for name, op in all_ops().items():
        assert name == op.name == "".join(part.capitalize() for part in op.folder.split("_"))


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"source": "a blog"}, "the source is not a paper"),
        ({"bodies": {}}, "no static body"),
        ({"case_list": None}, "fewer than 8 cases"),
        ({"reference": lambda: None}, "the docstring does not mention mass"),
    ],
)
def test_a_gap_is_found(change: dict[str, Any], gap: str) -> None:
    broken = dataclasses.replace(all_ops()["ColumnMass"], **change)
    assert any(gap in words for words in gaps(broken))


@pytest.mark.parametrize(("op", "case"), _cases())
def test_cases_are_fixed_by_their_seed(op: Op, case: Case) -> None:
    first, again, other = case.make(3), case.make(3), case.make(4)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again, strict=True) if a.dtype.kind == "f")
    assert [x.shape for x in first] == [x.shape for x in other]
