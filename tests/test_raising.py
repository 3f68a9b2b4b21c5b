"""Exports of every family and opset raise to one canonical form that computes the same; near misses say why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from trtpass.anchors import find
from trtpass.canonicalize import RaiseReport, canonicalize
from trtpass.errors import InputError
from trtpass.ir import check, dims, is_op
from trtpass.quiet import quiet

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 16
ATOL = 2e-4  # float32, two layers: Attention and RMSNormalization order their sums differently

FAST = [("llama", 24), ("llama", 18), ("qwen3", 20)]
# every opset with Llama, every family with the oldest and the newest: a dialect is one of either, not of both
SLOW = [
    ("llama", 23), ("llama", 20), ("qwen2", 24), ("qwen2", 18), ("qwen3", 24), ("qwen3", 18), ("mistral", 24),
    ("mistral", 18),
]  # fmt: skip
CASES = [pytest.param(*case) for case in FAST] + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]

Raw = Callable[[str, int], onnx.ModelProto]


@pytest.fixture(scope="module")
def raw(tiny_folders: dict[str, Path]) -> Raw:
    """``raw(family, opset)``: what PyTorch's exporter gives with its own settings, nothing of ours applied."""
    made: dict[tuple[str, int], onnx.ModelProto] = {}

    def export(family: str, opset: int) -> onnx.ModelProto:
        if (family, opset) not in made:
            made[family, opset] = torch_export(tiny_folders[family], opset)
        return made[family, opset]

    return export


def torch_export(folder: Path, opset: int) -> onnx.ModelProto:
    import torch

    from graphs import resolve

    module = resolve(str(folder)).load().module

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    with quiet():
        program = torch.onnx.export(
            Logits().eval(),
            (torch.zeros((2, 17), dtype=torch.int64),),
            dynamo=True,
            opset_version=opset,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def run(proto: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: ids})[0]


def raised(proto: onnx.ModelProto) -> tuple[ir.Model, RaiseReport]:
    model = ir.from_proto(proto)
    return model, canonicalize(model)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


@pytest.mark.parametrize(("family", "opset"), CASES)
def test_exports_raise_to_canonical_form_and_compute_the_same(raw: Raw, family: str, opset: int) -> None:
    proto = raw(family, opset)
    model, report = raised(proto)
    norms = 2 * LAYERS + 1 + (2 * LAYERS if family == "qwen3" else 0)
    count = operators(model)
    assert (count["Attention"], count["RotaryEmbedding"], count["RMSNormalization"]) == (LAYERS, 2 * LAYERS, norms)
    assert count["Softmax"] == count["ReduceMean"] == 0
    assert report.near_misses == ()
    assert report.modified and report.counts["grouped"] == report.counts["causal"] == LAYERS
    assert_nothing_is_materialised(model)
    for block in find(model).blocks:
        assert (block.heads, block.kv_heads, block.head_dim, block.causal) == (HEADS, KV_HEADS, WIDTH, True)
        assert block.scale == pytest.approx(WIDTH**-0.5)
    check(model, "the raised graph")
    assert model.opset_imports[""] == 24
    rng = np.random.default_rng(0)
    result = ir.to_proto(model)
    for batch, length in ((1, 1), (1, 19), (3, 8)):
        ids = rng.integers(0, 128, (batch, length))
        # One row at a time: at opset 23 the exporter gives cos and sin a batch of 1, which runs for one row only.
        expected = np.concatenate([run(proto, row[None]) for row in ids])
        np.testing.assert_allclose(run(result, ids), expected, atol=ATOL, rtol=0)


def assert_nothing_is_materialised(model: ir.Model) -> None:
    """No mask or score of S x S, and no copy of K or V for every query head."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            shape = [str(d) for d in dims(value) or []]
            assert len(shape) < 2 or shape[-1] != "sequence" or shape[-2] != "sequence", f"{node.op_type}: {shape}"
            assert not (node.op_type in ("Expand", "Tile") and len(shape) >= 4), f"{node.op_type}: {shape}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_our_own_export_raises_too(tiny_export: Callable, family: str) -> None:
    exported = tiny_export(family)
    proto = onnx.load(exported.path)
    model, report = raised(proto)
    assert report.near_misses == ()
    assert report.counts["causal"] == LAYERS
    assert_nothing_is_materialised(model)
    ids = np.random.default_rng(1).integers(0, 128, (3, 21))
    np.testing.assert_allclose(run(ir.to_proto(model), ids), run(proto, ids), atol=ATOL, rtol=0)


def test_raising_twice_changes_nothing(raw: Raw) -> None:
    model, _ = raised(raw("llama", 18))
    again = canonicalize(model)
    assert not again.modified and again.near_misses == ()


def test_attention_mask_input_keeps_its_mask(raw: Raw) -> None:
    """Causal and padding: not provably causal alone, so the mask stays and the reason names the input."""
    model = ir.from_proto(raw("llama", 18))
    graph = model.graph
    padding = ir.val("attention_mask", ir.DataType.BOOL, ["batch", 1, 1, "sequence"])
    graph.inputs.append(padding)
    lowest = ir.val("lowest", const_value=ir.tensor(np.array(-1e9, np.float32), name="lowest"))
    nothing = ir.val("nothing", const_value=ir.tensor(np.array(0, np.float32), name="nothing"))
    for value in (lowest, nothing):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.register_initializer(value)
    for softmax in [n for n in graph if is_op(n, "Softmax")]:
        add = softmax.inputs[0].producer()
        side = 1 if add.inputs[0].producer().op_type in ("MatMul", "Mul") else 0
        bias = ir.node("Where", [padding, nothing, lowest])
        both = ir.node("Add", [add.inputs[side], bias.outputs[0]])
        both.outputs[0].dtype = ir.DataType.FLOAT
        graph.insert_before(add, [bias, both])
        add.replace_input_with(side, both.outputs[0])
    report = canonicalize(model)
    assert report.counts["causal"] == 0
    assert len(report.near_misses) == LAYERS and all("attention_mask" in why for why in report.near_misses)


# ---------------------------------------------------------------------------------------------------------------------
# Near misses, as text graphs: each is one step away from what a rule recognises.

HEADER = '<ir_version: 10, opset_import: ["" : 24]>'

ATTENTION = """
    kt = Transpose<perm: ints = [0, 1, 3, 2]>(k)
    scores = MatMul(q, kt)
    scaled = Mul(scores, scale)
    p = Softmax<axis: int = -1>(scaled)
    y = MatMul(p, v)
"""


def text_graph(body: str, inputs: str = "", initializers: str = "float scale = {0.25}") -> onnx.ModelProto:
    given = inputs or "float[B, 4, S, 8] q, float[B, 4, S, 8] k, float[B, 4, S, 8] v"
    proto = onnx.parser.parse_model(f"{HEADER} g ({given}) => (float[B, 4, S, 8] y) <{initializers}> {{ {body} }}")
    return onnx.shape_inference.infer_shapes(proto)


def test_decomposed_attention_without_a_mask() -> None:
    model, report = raised(text_graph(ATTENTION))
    assert report.counts["attention"] == 1 and report.near_misses == ()
    (node,) = (n for n in model.graph if is_op(n, "Attention"))
    assert node.attributes["scale"].value == 0.25 and len(node.inputs) == 3


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("axis: int = -1", "axis: int = 2", "not over the key axis"),
        ("y = MatMul(p, v)", "y = MatMul(p, v) other = Relu(p)", "exactly one MatMul"),
        ("Mul(scores, scale)", "Mul(scores, scores)", "not a constant"),
        ("[0, 1, 3, 2]", "[0, 2, 3, 1]", "keys are transposed by"),
        ("scaled = Mul(scores, scale)", "scaled = Relu(scores)", "not a MatMul"),
        # a Where that hides something else than NaN, such as dropout or padding, is not a guard
        ("y = MatMul(p, v)", "hide = Greater(p, scale) z = Sub(scale, scale) w = Where(hide, z, p) y = MatMul(w, v)",
         "exactly one MatMul"),
    ],
)  # fmt: skip
def test_attention_near_misses(old: str, new: str, reason: str) -> None:
    model, report = raised(text_graph(ATTENTION.replace(old, new)))
    assert report.counts["attention"] == 0 and operators(model)["Softmax"] == 1
    assert len(report.near_misses) == 1 and reason in report.near_misses[0]


def test_a_where_that_hides_more_than_nan_is_no_guard() -> None:
    hidden = ATTENTION.replace("y = MatMul(p, v)", "h = Greater(p, scale) w = Where(h, zero, p) y = MatMul(w, v)")
    _, report = raised(text_graph(hidden, initializers="float scale = {0.25}, float zero = {0.0}"))
    assert report.counts["attention"] == 0
    guard = ATTENTION.replace("y = MatMul(p, v)", "h = IsNaN(p) w = Where(h, zero, p) y = MatMul(w, v)")
    _, report = raised(text_graph(guard, initializers="float scale = {0.25}, float zero = {0.0}"))
    assert report.counts["attention"] == 1


@pytest.mark.parametrize(
    ("mask", "attributes", "reason"),
    [
        ("float[S, S] bias", "", "bias"),
        ("float[S, S] bias", "<is_causal: int = 1>", "beside is_causal"),
    ],
)
def test_masks_that_stay(mask: str, attributes: str, reason: str) -> None:
    given = f"float[B, 4, S, 8] q, float[B, 4, S, 8] k, float[B, 4, S, 8] v, {mask}"
    model, report = raised(text_graph(f"y = Attention{attributes}(q, k, v, bias)", given))
    (node,) = (n for n in model.graph if is_op(n, "Attention"))
    assert node.inputs[3] is not None and reason in report.near_misses[0]


def test_cross_attention_keeps_its_mask() -> None:
    given = "float[B, 4, S, 8] q, float[B, 4, T, 8] k, float[B, 4, T, 8] v, bool[S, T] m"
    _, report = raised(text_graph("y = Attention(q, k, v, m)", given))
    assert "not known to be equal" in report.near_misses[0]


@pytest.mark.parametrize(
    ("tail", "raises", "reason"),
    [
        ("[0, 0, 3, 0, 0]", True, ""),
        ("[0, 3, 0, 0, 0]", False, "not on an axis just after the head axis"),
    ],
)  # fmt: skip
def test_expanded_kv_heads(tail: str, raises: bool, reason: str) -> None:
    """K and V ``[B, 2, S, 8]`` repeated 2 times: by head (k0 k0 k1 k1) is grouping, by block (k0 k1 k0 k1) is not."""
    axis, wide = ("2", "[B, 2, 2, S, 8]") if raises else ("1", "[B, 2, 2, S, 8]")
    body = "".join(
        f"""
        {n}5 = Unsqueeze({n}, axis)
        {n}w = Expand({n}5, shape)
        {n}r = Reshape({n}w, flat)
        """
        for n in "kv"
    )
    given = "float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v"
    constants = (
        f"int64[1] axis = {{{axis}}}, int64[5] shape = {{1, {'1, 2' if raises else '2, 1'}, 1, 1}}, "
        "int64[4] flat = {0, 4, -1, 8}"
    )
    proto = text_graph(f"{body} y = Attention<is_causal: int = 1>(q, kr, vr)", given, constants)
    for info in proto.graph.value_info:  # the shape of an Expand is what the exporter annotates
        if info.name in ("kw", "vw", "kr", "vr"):
            sizes = wide if info.name[1] == "w" else "[B, 4, S, 8]"
            info.CopyFrom(onnx.parser.parse_graph(f"g (float{sizes} {info.name}) => () {{}}").input[0])
    model, report = raised(proto)
    assert report.counts["grouped"] == int(raises)
    assert operators(model)["Expand"] == (0 if raises else 2)
    assert (report.near_misses == ()) if raises else (reason in report.near_misses[0])


NORM = """
    square = Mul(x, x)
    mean = ReduceMean<keepdims: int = 1>(square, axes)
    safe = Add(mean, epsilon)
    root = Sqrt(safe)
    inverse = Reciprocal(root)
    unit = Mul(x, inverse)
    y = Mul(unit, weight)
"""


def norm_graph(body: str) -> onnx.ModelProto:
    constants = (
        "int64[1] axes = {-1}, int64[1] middle = {1}, float epsilon = {1e-5}, "
        "float[8] weight = {1, 2, 3, 4, 5, 6, 7, 8}, float[1] scalar = {2}"
    )
    text = f"{HEADER} g (float[B, S, 8] x) => (float[B, S, 8] y) <{constants}> {{ {body} }}"
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    "change",
    [
        ("", ""),
        ("Mul(x, x)", "Pow(x, scalar)"),
        ("inverse = Reciprocal(root)\n    unit = Mul(x, inverse)", "unit = Div(x, root)"),
        ("Mul(unit, weight)", "Mul(weight, unit)"),
    ],
)
def test_rms_norms_raise_and_compute_the_same(change: tuple[str, str]) -> None:
    proto = norm_graph(NORM.replace(*change))
    model, report = raised(proto)
    assert report.counts["rms_norm"] == 1 and [n.op_type for n in model.graph] == ["RMSNormalization"]
    x = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
    np.testing.assert_allclose(run(ir.to_proto(model), x), run(proto, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("square, axes", "square, middle", "over axes [1]"),
        ("Add(mean, epsilon)", "Add(mean, x)", "no constant epsilon"),
        ("Sqrt(safe)", "Exp(safe)", "no square root"),
        ("Mul(x, inverse)", "Mul(square, inverse)", "not multiplied"),
        ("Mul(unit, weight)", "Mul(unit, scalar_free)", "weight"),
        # layer normalisation: the mean is taken away first
        ("unit = Mul(x, inverse)", "m = ReduceMean<keepdims: int = 1>(x, axes) c = Sub(x, m) unit = Mul(c, inverse)",
         "not multiplied"),
    ],
)  # fmt: skip
def test_rms_norm_near_misses(old: str, new: str, reason: str) -> None:
    body = NORM.replace(old, new).replace("scalar_free", "x")
    _, report = raised(norm_graph(body))
    assert report.counts["rms_norm"] == 0
    assert len(report.near_misses) == 1 and reason in report.near_misses[0]


ROTARY = """
    wide = Concat<axis: int = -1>(angles, angles)
    c = Cos(wide)
    s = Sin(wide)
    cos = Unsqueeze(c, one)
    sin = Unsqueeze(s, one)
    low, high = Split<axis: int = -1, num_outputs: int = 2>(x)
    minus = Neg(high)
    turned = Concat<axis: int = -1>(minus, low)
    a = Mul(x, cos)
    b = Mul(turned, sin)
    y = Add(a, b)
"""


def rotary_graph(body: str) -> onnx.ModelProto:
    text = f"""{HEADER} g (int64[B, S] input_ids, float[B, 4, S, 8] x) => (float[B, 4, S, 8] y)
    <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64 i0 = {{0}}, int64 i1 = {{1}},
     float[1, 1, 4] frequency = {{1.0, 0.5, 0.25, 0.125}}> {{
        size = Shape<start: int = 1, end: int = 2>(input_ids)
        length = Squeeze(size)
        range = Range(i0, length, i1)
        positions = Unsqueeze(range, zero)
        columns = Unsqueeze(positions, two)
        numbers = Cast<to: int = 1>(columns)
        angles = Mul(numbers, frequency)
        {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, sizes, kind in (
        ("positions", "[1, S]", "int64"), ("columns", "[1, S, 1]", "int64"), ("numbers", "[1, S, 1]", "float"),
        ("angles", "[1, S, 4]", "float"),
    ):  # fmt: skip
        proto.graph.value_info.append(onnx.parser.parse_graph(f"g ({kind}{sizes} {name}) => () {{}}").input[0])
    return onnx.shape_inference.infer_shapes(proto)


def run_rotary(proto: onnx.ModelProto, batch: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((batch, 4, 5, 8), np.float32)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.zeros((batch, 5), np.int64), "x": x})[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_raises_and_positions_get_a_batch(batch: int) -> None:
    proto = rotary_graph(ROTARY)
    model, report = raised(proto)
    assert report.counts["rotary"] == 1 and report.near_misses == ()
    (rope,) = (n for n in model.graph if is_op(n, "RotaryEmbedding"))
    assert [str(d) for d in rope.inputs[1].shape] == ["B", "S", "4"]
    np.testing.assert_allclose(run_rotary(ir.to_proto(model), batch), run_rotary(proto, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Concat<axis: int = -1>(angles, angles)", "Concat<axis: int = -1>(angles, zeros)", "not two equal halves"),
        ("s = Sin(wide)", "s = Tan(wide)", "no Sin"),
        ("a = Mul(x, cos)", "a = Mul(sin, cos)", "x is not multiplied by cos"),
        ("y = Add(a, b)", "y = Sub(a, b)", "not multiplied by sin and added"),
        ("cos = Unsqueeze(c, one)", "cos = Unsqueeze(c, zero)", "Unsqueeze on axis 1"),
    ],
)
def test_rotary_near_misses(old: str, new: str, reason: str) -> None:
    body = ROTARY.replace(old, new)
    if "zeros" in body:
        body = "zeros = Sub(angles, angles)" + body
    _, report = raised(rotary_graph(body))
    assert report.counts["rotary"] == 0
    assert len(report.near_misses) == 1 and reason in report.near_misses[0]


@pytest.mark.parametrize("opset", [12, 7])
def test_old_opsets_are_refused(opset: int) -> None:
    proto = text_graph("y = Relu(q)")
    proto.opset_import[0].version = opset
    with pytest.raises(InputError, match=f"opset {opset}"):
        raised(proto)
