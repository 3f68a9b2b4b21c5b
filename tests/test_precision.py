"""float16 conversion: which values change type, the numbers, lazy weights, and the failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import script
from onnxscript.onnx_opset import opset24 as op
from onnxscript.values import Opset

from tests import tiny
from trtpass import io
from trtpass.errors import InputError
from trtpass.half import half_array
from trtpass.passes.cache import insert_cache
from trtpass.passes.precision import Fp16, to_half

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
TEST = Opset("trtpass.test", 1)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def ids(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (batch, tokens))


def graph_of(
    nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], weights: list[ir.Value]
) -> ir.Model:
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 24}), ir_version=10)


def weight(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def test_weights_activations_and_outputs_become_half_and_names_stay() -> None:
    model = tiny.decoder()
    names = set(model.graph.initializers)
    to_half(model)
    graph = model.graph
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert set(graph.initializers) == names
    single = {v.name for v in graph.initializers.values() if v.dtype == FLOAT}
    assert single == {"inverse_frequency"}
    assert [v.dtype for v in graph.outputs] == [HALF]
    for node in graph:
        if node.op_type in ("MatMul", "Attention", "RMSNormalization", "RotaryEmbedding"):
            assert {v.dtype for v in (*node.inputs, *node.outputs)} == {HALF}, node.name


def test_positions_are_computed_in_single_and_cast_once_before_rotary() -> None:
    model = tiny.decoder(layers=3)
    to_half(model)
    angles = [n for n in model.graph if n.op_type in ("Cos", "Sin")]
    assert [n.inputs[0].dtype for n in angles] == [FLOAT, FLOAT]
    casts = [n for n in model.graph if n.op_type == "Cast" and n.outputs[0].dtype == HALF]
    assert len(casts) == 2  # cos and sin, shared by the six rotary embeddings
    assert all(u.op_type == "RotaryEmbedding" for c in casts for u in c.outputs[0].consumers())


def test_logits_agree_with_single_precision() -> None:
    feeds = {"input_ids": ids(2, 40)}
    [single] = run(tiny.decoder(), feeds)
    model = tiny.decoder()
    to_half(model)
    [half] = run(model, feeds)
    assert half.dtype == np.float16
    # 11 bits, a dozen roundings deep, on logits of a few units
    np.testing.assert_allclose(half.astype(np.float32), single, atol=0.03 * float(np.abs(single).max()), rtol=0)
    assert np.abs(half.astype(np.float32) - single).max() > 0


def test_caches_become_half_and_phases_go_on_sharing_weights(tmp_path: Path) -> None:
    model = tiny.decoder()
    graphs = {f"{phase}.onnx": insert_cache(model, phase, capacity=16) for phase in ("prefill", "decode")}
    for graph in graphs.values():
        to_half(graph)
        assert {v.dtype for v in graph.graph.inputs if str(v.name).startswith("past.")} == {HALF}
    io.save_shared({"decode.onnx": graphs["decode.onnx"]}, tmp_path, weights="one.bin")
    io.save_shared(graphs, tmp_path, weights="both.bin")
    assert (tmp_path / "both.bin").stat().st_size == (tmp_path / "one.bin").stat().st_size


def test_no_weight_is_read_before_the_model_is_written() -> None:
    reads: list[str] = []
    model = tiny.decoder()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == FLOAT and tensor.size > 512:  # smaller ones stay in the protobuf

            def read(tensor: ir.TensorProtocol = tensor, name: str = str(value.name)) -> ir.TensorProtocol:
                reads.append(name)
                return tensor

            value.const_value = ir.LazyTensor(read, dtype=FLOAT, shape=ir.Shape(tensor.shape), name=value.name)
    to_half(model)
    assert reads == []
    ir.to_proto(model)
    assert {"embedding", "lm_head", "0.q"} <= set(reads)


@pytest.mark.parametrize(("name", "place"), [("1.gate", (3, 5)), ("norm", (7,))])
def test_weight_beyond_range_is_named(name: str, place: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny.decoder()
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[place] = -7e4
    value.const_value = ir.tensor(array, name=name)
    with pytest.raises(InputError, match=rf"'{name}' holds -70000"):
        to_half(model)
        io.save(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_half_array_edges() -> None:
    largest = np.finfo(np.float32).max
    out = half_array(np.array([largest, -largest, np.inf, -np.inf, np.nan, 65504, 1e-9], np.float32), "x")
    np.testing.assert_array_equal(out, np.array([65504, -65504, np.inf, -np.inf, np.nan, 65504, 0], np.float16))
    with pytest.raises(InputError, match="'eps' = 1e-12 becomes 0"):
        half_array(np.array([1e-12], np.float32), "eps")
    assert half_array(np.zeros((2, 0), np.float32), "empty").shape == (2, 0)


def test_sums_of_squares_stay_single() -> None:
    x = ir.val("x", FLOAT, ["n", 4])
    two, axes = weight("two", np.array(2.0, np.float32)), weight("axes", np.array([-1], np.int64))
    square = ir.node("Pow", [x, two])
    mean = ir.node("ReduceMean", [square.outputs[0], axes])
    root = ir.node("Sqrt", [mean.outputs[0]])
    out = ir.node("Div", [x, root.outputs[0]])
    out.outputs[0].name = "y"
    model = graph_of([square, mean, root, out], [x], [out.outputs[0]], [two, axes])
    to_half(model)
    big = np.full((1, 4), 3e4, np.float16)  # its square overflows float16
    [y] = run(model, {"x": big})
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, np.ones((1, 4), np.float16))


def test_constant_is_made_twice_where_both_types_need_it() -> None:
    x, flag = ir.val("x", FLOAT, ["n"]), ir.val("flag", ir.DataType.INT32, ["n"])
    shared = weight("shared", np.array([0.1], np.float32))
    position = ir.node("Cast", [flag], {"to": int(FLOAT)})
    scaled = ir.node("Mul", [position.outputs[0], shared])
    other = ir.node("Add", [x, shared])
    scaled.outputs[0].name, other.outputs[0].name = "scaled", "other"
    model = graph_of([position, scaled, other], [x, flag], [scaled.outputs[0], other.outputs[0]], [shared])
    to_half(model)
    assert {v.name: v.dtype for v in model.graph.initializers.values()} == {"shared": FLOAT, "shared.float16": HALF}
    a, b = run(model, {"x": np.ones(1, np.float16), "flag": np.array([3], np.int32)})
    assert (a.dtype, b.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(a, np.float32(0.1) * np.float32(3))
    np.testing.assert_array_equal(b, np.float16(1) + np.float16(0.1))


def test_loop_carries_keep_one_type() -> None:
    x = ir.val("x", FLOAT, [3])
    trip, on = weight("trip", np.array(4, np.int64)), weight("on", np.array(True))
    half = weight("half", np.array(0.5, np.float32))
    inner = [ir.val("i", ir.DataType.INT64, []), ir.val("c", ir.DataType.BOOL, []), ir.val("s", FLOAT, [3])]
    step = ir.node("Mul", [inner[2], half])
    again = ir.node("Identity", [inner[1]])
    body = ir.Graph(inner, [again.outputs[0], step.outputs[0]], nodes=[step, again], name="body")
    loop = ir.node("Loop", [trip, on, x], {"body": body})
    loop.outputs[0].name = "y"
    model = graph_of([loop], [x], [loop.outputs[0]], [trip, on, half])
    to_half(model)
    [y] = run(model, {"x": np.array([16, 32, 48], np.float16)})
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, np.array([1, 2, 3], np.float16))


@script(TEST, default_opset=op)
def Follows(x):
    return op.Cast(op.CastLike(op.ReduceSum(op.Cast(x, to=1), keepdims=1), x) * op.CastLike(2.0, x), to=1)


@script(TEST, default_opset=op)
def Mixes(x):
    two = op.Constant(value_float=2.0)
    return x * two


def with_call(function: object) -> ir.Model:
    x = ir.val("x", FLOAT, ["n"])
    proto = function.to_function_proto()  # type: ignore[attr-defined]
    call = ir.node(proto.name, [x], domain=proto.domain)
    after = ir.node("Neg", [call.outputs[0]])
    after.outputs[0].name = "y"
    model = graph_of([call, after], [x], [after.outputs[0]], [])
    body = ir.serde.deserialize_function(proto)
    model.functions[body.identifier()] = body
    model.opset_imports[proto.domain] = 1
    return model


def test_types_are_followed_through_a_function_body() -> None:
    model = with_call(Follows)
    to_half(model)
    assert model.graph.outputs[0].dtype == FLOAT  # the body ends in a Cast to float32
    [y] = run(model, {"x": np.array([1, 2, 3], np.float16)})
    np.testing.assert_array_equal(y, np.array([-12], np.float32))


def test_a_body_that_mixes_types_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"body of trtpass\.test::Mixes meets float16 and float32"):
        to_half(with_call(Mixes))


def test_operators_of_unknown_types_are_refused() -> None:
    x = ir.val("x", FLOAT, ["n"])
    node = ir.node("Gelu", [x], domain="com.microsoft")
    with pytest.raises(InputError, match=r"com\.microsoft::Gelu, whose types are not known"):
        to_half(graph_of([node], [x], [node.outputs[0]], []))


def test_the_pass_reports_and_a_second_run_changes_nothing() -> None:
    model = tiny.decoder()
    assert Fp16()(model).modified
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not Fp16()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_bfloat16_keeps_the_range_of_float32() -> None:
    """Mask fillers stay finite, infinities and NaN stay what they are, and nothing is refused."""
    largest = np.finfo(np.float32).max
    given = np.array([largest, -largest, 1e30, 1e-30, np.inf, -np.inf, np.nan, 1.0], np.float32)
    made = half_array(given, "w", ir.DataType.BFLOAT16).astype(np.float32)
    assert np.isfinite(made[:4]).all() and (np.abs(made[:2]) > 3.3e38).all()
    np.testing.assert_allclose(made[[2, 3, 7]], given[[2, 3, 7]], rtol=2**-8)
    assert made[4] == np.inf and made[5] == -np.inf and np.isnan(made[6])
