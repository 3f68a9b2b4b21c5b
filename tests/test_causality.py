"""Proofs of causality: many spellings are proved, and whatever is proved is the lower triangle at every size."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from trtpass.causality import prove_causal

SIZES = (1, 2, 3, 5, 9)
LOWEST = float(np.finfo(np.float32).min)

# Positions of keys and queries, and constants, that every mask below may use.
PRELUDE = """
   zero = Constant<value_int: int = 0>()
   one = Constant<value_int: int = 1>()
   two = Constant<value_int: int = 2>()
   four = Constant<value_int: int = 4>()
   true = Constant<value: tensor = bool {1}>()
   axis0 = Constant<value_ints: ints = [0]>()
   axis1 = Constant<value_ints: ints = [1]>()
   axes01 = Constant<value_ints: ints = [0, 1]>()
   lowest = Constant<value_float: float = -3.4028234663852886e38>()
   nothing = Constant<value_float: float = 0.0>()
   onef = Constant<value_float: float = 1.0>()
   half = Constant<value_float: float = 0.5>()
   size1 = Shape<start: int = 1, end: int = 2>(ids)
   size = Squeeze(size1)
   square = Concat<axis: int = 0>(size1, size1)
   range = Range(zero, size, one)
   key = Unsqueeze(range, axis0)
   query = Unsqueeze(range, axis1)
"""


def build(body: str, more_inputs: str = "", kind: str = "bool") -> tuple[ir.Value, onnx.ModelProto]:
    """The value ``mask`` of ``PRELUDE + body``, and the model that computes it."""
    text = (
        f'<ir_version: 10, opset_import: ["" : 24]> g (int64[batch, sequence] ids{more_inputs}) '
        f"=> ({kind}[s, t] mask) {{ {PRELUDE} {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(proto).graph.outputs[0], proto


def visible(proto: onnx.ModelProto, size: int) -> np.ndarray:
    """The mask at one size as booleans ``[size, size]``; other outputs than a mask are a failure of the test."""
    (mask,) = ReferenceEvaluator(proto).run(None, {"ids": np.zeros((2, size), np.int64)})
    if mask.dtype != bool:
        assert set(np.unique(mask > -1e4)) <= {True, False} and np.all((mask == 0) | (mask <= -1e4))
        mask = mask == 0
    return np.broadcast_to(mask, np.broadcast_shapes(mask.shape, (1, 1, size, size)))[0, 0]


CAUSAL = {
    "less or equal": "mask = LessOrEqual(key, query)",
    "greater or equal": "mask = GreaterOrEqual(query, key)",
    "not greater": "hidden = Greater(key, query) mask = Not(hidden)",
    "not less": "hidden = Less(query, key) mask = Not(hidden)",
    "strict, shifted": "next = Add(query, one) mask = Less(key, next)",
    "both shifted": "a = Add(key, four) b = Add(query, four) mask = LessOrEqual(a, b)",
    "difference": "gap = Sub(query, key) mask = GreaterOrEqual(gap, zero)",
    "scaled on both sides and back": "a = Mul(key, two) b = Sub(a, key) mask = LessOrEqual(b, query)",
    "in float32": "k = Cast<to: int = 1>(key) q = Cast<to: int = 1>(query) mask = LessOrEqual(k, q)",
    "in int32": "k = Cast<to: int = 6>(key) q = Cast<to: int = 6>(query) mask = LessOrEqual(k, q)",
    "4-D": "m = LessOrEqual(key, query) mask = Unsqueeze(m, axes01)",
    "and true": "m = LessOrEqual(key, query) mask = And(m, true)",
    "double negation": "m = LessOrEqual(key, query) n = Not(m) mask = Not(n)",
    "boolean trilu": "ones = Expand(true, square) mask = Trilu<upper: int = 0>(ones)",
    "not the upper trilu": "ones = Expand(true, square) up = Trilu<upper: int = 1>(ones, one) mask = Not(up)",
    "trilu of ones, cast": (
        "ones = ConstantOfShape<value: tensor = float[1] {1.0}>(square) low = Trilu<upper: int = 0>(ones) "
        "mask = Cast<to: int = 9>(low)"
    ),
    "cumulative sum as positions": (
        "ones = ConstantOfShape<value: tensor = int64[1] {1}>(size1) count = CumSum(ones, zero) "
        "k = Unsqueeze(count, axis0) q = Unsqueeze(count, axis1) mask = LessOrEqual(k, q)"
    ),
    "sliced from longer positions": (
        "longer = Add(size, four) all = Range(zero, longer, one) some = Slice(all, axis0, size1, axis0) "
        "k = Unsqueeze(some, axis0) mask = LessOrEqual(k, query)"
    ),
    "expanded first": "k = Expand(key, square) q = Expand(query, square) mask = LessOrEqual(k, q)",
    "gathered by position": (
        "row = Unsqueeze(range, axis0) c = Unsqueeze(range, axis1) z = Sub(c, c) where = Concat<axis: int = 1>(z, c) "
        "g = GatherND(row, where) k = Unsqueeze(g, axis0) mask = LessOrEqual(k, query)"
    ),
}
ADDITIVE = {
    "where": "m = LessOrEqual(key, query) mask = Where(m, nothing, lowest)",
    "where, inverted": "m = Greater(key, query) mask = Where(m, lowest, nothing)",
    "(1 - mask) * lowest": (
        "m = LessOrEqual(key, query) f = Cast<to: int = 1>(m) hidden = Sub(onef, f) mask = Mul(hidden, lowest)"
    ),
    "upper trilu of lowest": "full = Expand(lowest, square) mask = Trilu<upper: int = 1>(full, one)",
    "minus infinity": (
        "low = Constant<value: tensor = float {-inf}>() m = LessOrEqual(key, query) mask = Where(m, nothing, low)"
    ),
}
NOT_CAUSAL = {
    "strict": ("mask = Less(key, query)", "not key <= query"),
    "anticausal": ("mask = GreaterOrEqual(key, query)", "not key <= query"),
    "off by one": ("next = Add(query, one) mask = LessOrEqual(key, next)", "not key <= query"),
    "sliding window": (
        "m = LessOrEqual(key, query) low = Sub(query, four) w = Greater(key, low) mask = And(m, w)",
        "a sliding window",
    ),
    "bidirectional": ("mask = Expand(true, square)", "not key <= query"),
    "causal or near": (
        "m = LessOrEqual(key, query) ahead = Add(query, two) w = Less(key, ahead) mask = Or(m, w)",
        "not key <= query",
    ),
    "causal at size 4 only": (
        "s = Sub(query, four) t = Add(s, size) mask = LessOrEqual(key, t)",
        "not key <= query",
    ),
    "causal up to size 4 only": (
        "m = LessOrEqual(key, query) long = Greater(size, four) mask = Or(m, long)",
        "not key <= query",
    ),
    "one query for all": ("last = Sub(size, one) mask = LessOrEqual(key, last)", "shape"),
    "the last key is missing": (
        "last = Sub(size, one) fewer = Range(zero, last, one) k = Unsqueeze(fewer, axis0) mask = LessOrEqual(k, query)",
        "shape",
    ),
    "sized by the batch": (
        "b = Shape<start: int = 0, end: int = 1>(ids) n = Squeeze(b) r = Range(zero, n, one) k = Unsqueeze(r, axis0) "
        "q = Unsqueeze(r, axis1) mask = LessOrEqual(k, q)",
        "shape",
    ),
    "half precision": (
        "k = Cast<to: int = 10>(key) q = Cast<to: int = 10>(query) mask = LessOrEqual(k, q)",
        "FLOAT16",
    ),
    "bfloat16": ("k = Cast<to: int = 16>(key) q = Cast<to: int = 16>(query) mask = LessOrEqual(k, q)", "BFLOAT16"),
    "bytes wrap around": ("k = Cast<to: int = 3>(key) q = Cast<to: int = 3>(query) mask = LessOrEqual(k, q)", "INT8"),
    "unsigned difference": (
        "k = Cast<to: int = 13>(key) q = Cast<to: int = 13>(query) z = Cast<to: int = 13>(zero) d = Sub(q, k) "
        "mask = GreaterOrEqual(d, z)",
        "UINT64",
    ),
    "pairs, by truncation": (
        "k = Cast<to: int = 1>(key) h = Mul(k, half) "
        "t = Cast<to: int = 7>(h) p = Mul(t, two) mask = LessOrEqual(p, query)",
        "1/2|0.5",
    ),
    "rounded away by a large offset": (
        "big = Constant<value_float: float = 1e9>() k = Cast<to: int = 1>(key) q = Cast<to: int = 1>(query) "
        "a = Add(k, big) b = Add(q, big) mask = LessOrEqual(a, b)",
        "1000000000",
    ),
    "first key from the end": (
        "row = Unsqueeze(range, axis0) c = Unsqueeze(range, axis1) z = Sub(c, c) b = Sub(c, one) "
        "where = Concat<axis: int = 1>(z, b) g = GatherND(row, where) h = Add(g, one) k = Unsqueeze(h, axis0) "
        "mask = LessOrEqual(k, query)",
        "from the end",
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_boolean_spellings_are_proved(name: str) -> None:
    mask, proto = build(CAUSAL[name])
    assert prove_causal(mask, "sequence") == ""
    for size in SIZES:
        np.testing.assert_array_equal(visible(proto, size), np.tri(size, dtype=bool))


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_spellings_are_proved(name: str) -> None:
    mask, proto = build(ADDITIVE[name], kind="float")
    assert prove_causal(mask, "sequence") == ""
    for size in SIZES:
        np.testing.assert_array_equal(visible(proto, size), np.tri(size, dtype=bool))


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_other_masks_are_not_proved_and_the_reason_says_why(name: str) -> None:
    body, reason = NOT_CAUSAL[name]
    said = prove_causal(build(body)[0], "sequence")
    assert said.startswith("mask 'mask'")
    assert any(part in said for part in reason.split("|")), said


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        (
            "m = LessOrEqual(key, query) p = Unsqueeze(padding, axis1) mask = And(m, p)",
            ", bool[batch, sequence] padding",
        ),
        (
            "m = LessOrEqual(key, query) b = Cast<to: int = 9>(padding) p = Unsqueeze(b, axis1) mask = And(m, p)",
            ", int64[batch, sequence] padding",
        ),
    ],
)  # fmt: skip
def test_a_padding_mask_is_named(body: str, extra: str) -> None:
    said = prove_causal(build(body, extra)[0], "sequence")
    assert "padding" in said and "depends on the input" in said


def test_a_mask_that_is_itself_an_input_is_named() -> None:
    value = ir.val("attention_bias", ir.DataType.FLOAT, [1, 1, "sequence", "sequence"])
    ir.Graph([value], [], nodes=[])
    assert "attention_bias" in prove_causal(value, "sequence")


def test_weak_additive_masks_are_not_proved() -> None:
    body = "weak = Constant<value_float: float = -10.0>() m = LessOrEqual(key, query) mask = Where(m, nothing, weak)"
    assert "additive values" in prove_causal(build(body, kind="float")[0], "sequence")


def test_an_operator_that_is_not_interpreted_is_named() -> None:
    said = prove_causal(build("m = Mod(key, two) mask = LessOrEqual(m, query)")[0], "sequence")
    assert "Mod" in said


def test_a_fixed_length_is_compared_with_the_mask() -> None:
    mask, _ = build("five = Constant<value_int: int = 5>() r = Range(zero, five, one) k = Unsqueeze(r, axis0) "
                    "q = Unsqueeze(r, axis1) mask = LessOrEqual(k, q)")  # fmt: skip
    assert prove_causal(mask, 5) == ""
    assert "shape [5, 5]" in prove_causal(mask, 6)
    assert "shape [5, 5]" in prove_causal(mask, "sequence")


# ---------------------------------------------------------------------------------------------------------------------
# The property: whatever is proved is the lower triangle. Masks are random; most are near causal, so that proofs happen.


@st.composite
def position(draw: st.DrawFn, name: str, start: str, lines: list[str]) -> str:
    """A random integer expression over ``key`` or ``query`` (``start``), appended to ``lines``."""
    value = start
    for step in range(draw(st.integers(0, 3))):
        new = f"{name}{step}"
        kind = draw(st.sampled_from(["add", "sub", "mul", "mix", "float", "int32", "byte", "half", "same", "clip"]))
        constant = draw(st.sampled_from(["zero", "one", "two", "four", "size"]))
        other = draw(st.sampled_from(["key", "query"]))
        to_int, to_float = f"{new}_i = Cast<to: int = 7>({value})", f"{new}_f = Cast<to: int = 1>({value})"
        lines.append(
            {
                "add": f"{to_int} {new} = Add({new}_i, {constant})",
                "sub": f"{to_int} {new} = Sub({new}_i, {constant})",
                "mul": f"{to_int} {new} = Mul({new}_i, {constant})",
                "mix": f"{to_int} {new} = Sub({new}_i, {other})",
                "float": f"{to_float} {new}_b = Mul({new}_f, onef) {new} = Cast<to: int = 7>({new}_b)",
                "int32": f"{new}_a = Cast<to: int = 6>({value}) {new} = Cast<to: int = 7>({new}_a)",
                "byte": f"{new}_a = Cast<to: int = 2>({value}) {new} = Cast<to: int = 7>({new}_a)",
                "half": f"{to_float} {new}_b = Mul({new}_f, half) {new} = Cast<to: int = 7>({new}_b)",
                "same": f"{to_int} {new}_b = Min({new}_i, {value}) {new} = Max({new}_b, {value})",
                "clip": f"{new} = Max({value}, zero)",
            }[kind]
        )
        value = new
    return value


@st.composite
def condition(draw: st.DrawFn, name: str, lines: list[str], depth: int) -> str:
    """A random boolean expression ``[S, S]`` or one that broadcasts to it."""
    shape = draw(st.sampled_from(["relation", "relation", "not", "not", "and", "or", "where"])) if depth else "relation"
    if shape == "relation":
        left, right = draw(st.sampled_from([("key", "query"), ("query", "key"), ("key", "query"), ("size", "key")]))
        a = draw(position(f"{name}l", left, lines))
        b = draw(position(f"{name}r", right, lines))
        op = draw(st.sampled_from(["LessOrEqual", "GreaterOrEqual", "Less", "Greater", "Equal"]))
        lines.append(f"{name} = {op}({a}, {b})")
        return name
    first = draw(condition(f"{name}x", lines, depth - 1))
    if shape == "not":
        lines.append(f"{name} = Not({first})")
        return name
    second = draw(st.one_of(st.just("true"), condition(f"{name}y", lines, depth - 1)))
    if shape == "where":
        third = draw(st.one_of(st.just(first), st.just(second)))
        lines.append(f"{name} = Where({first}, {second}, {third})")
    else:
        lines.append(f"{name} = {shape.capitalize()}({first}, {second})")
    return name


@st.composite
def masks(draw: st.DrawFn) -> tuple[str, str]:
    """Body and element type of a random mask."""
    lines: list[str] = []
    seen = draw(condition("c", lines, 2))
    form = draw(st.sampled_from(["plain", "plain", "where", "hide", "trilu"]))
    if form == "plain":
        lines.append(f"mask = Identity({seen})")
    elif form == "where":
        lines.append(f"mask = Where({seen}, nothing, lowest)")
    elif form == "hide":
        lines.append(f"f = Cast<to: int = 1>({seen}) h = Sub(onef, f) mask = Mul(h, lowest)")
    else:
        lines.append(f"e = Expand({seen}, square) mask = Trilu<upper: int = 0>(e)")
    return "\n".join(lines), "float" if form in ("where", "hide") else "bool"


def test_whatever_is_proved_is_the_lower_triangle() -> None:
    proved: list[str] = []

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(masks())
    def search(mask: tuple[str, str]) -> None:
        body, kind = mask
        value, proto = build(body, kind=kind)
        reason = prove_causal(value, "sequence")
        event("not proved" if reason else "proved")
        if not reason:
            proved.append(body)
            for size in SIZES:
                np.testing.assert_array_equal(visible(proto, size), np.tri(size, dtype=bool), err_msg=body)

    search()
    assert len(set(proved)) >= 20, "too few masks were proved for this test to say anything"


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(masks(), st.sampled_from(["key", "query", "range", "square", "size1"]), st.data())
def test_operators_swapped_at_random_give_a_reason_and_no_exception(
    mask: tuple[str, str], wrong: str, data: st.DataObject
) -> None:
    """Graphs that make no sense (wrong ranks, wrong types) end in a reason."""
    body, kind = mask
    lines = body.split("\n")
    where = data.draw(st.integers(0, len(lines) - 1))
    lines[where] = lines[where].replace("key", wrong).replace("query", wrong)
    value, _ = build("\n".join(lines), kind=kind)
    assert isinstance(prove_causal(value, "sequence"), str)
