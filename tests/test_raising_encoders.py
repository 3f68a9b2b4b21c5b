"""Encoders that somebody else exported: every spelling of norm and GELU, sizes, reshapes, and the whole of DINOv2."""

from __future__ import annotations

import io as bytes_io
import warnings
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from encoders import CLS, TOKENS, tiny_encoder

from trtpass.anchors import find
from trtpass.canonicalize import RaiseReport, canonicalize
from trtpass.encoders import describe
from trtpass.errors import InputError
from trtpass.ir import check, const_ints, dims, is_op
from trtpass.quiet import quiet
from trtpass.raising.sizes import infer_sizes


def run(model: ir.Model | onnx.ModelProto | str, *arrays: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    given = proto if isinstance(proto, str) else proto.SerializeToString()
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)})[0]


def text_graph(body: str, constants: str, shape: str = "B, S, 8") -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 18]>'
    text = f"{header} g (float[{shape}] x) => (float y) <{constants}> {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def raised(proto: onnx.ModelProto) -> tuple[ir.Model, RaiseReport]:
    model = ir.from_proto(proto)
    report = canonicalize(model)
    check(model, "the raised graph")
    return model, report


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def same(proto: onnx.ModelProto, model: ir.Model, shape: tuple[int, ...] = (2, 3, 8)) -> None:
    x = np.random.default_rng(0).normal(1.0, 2.0, shape).astype(np.float32)
    np.testing.assert_allclose(run(model, x), run(proto, x), atol=2e-6, rtol=1e-5)


NORM = "m = ReduceMean<keepdims: int = 1>(x, last) c = Sub(x, m) "
ROOT = "v = ReduceMean(q, last) e = Add(v, eps) r = Sqrt(e) "
CONSTANTS = (
    "int64[1] last = {-1}, float eps = {0.00001}, float two = {2.0}, float one = {1.0}, float low = {-0.5}, "
    "float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] b = {8, 7, 6, 5, 4, 3, 2, 1}"
)


@pytest.mark.parametrize(
    "body",
    [
        NORM + "q = Pow(c, two) " + ROOT + "n = Div(c, r) s = Mul(n, w) y = Add(s, b)",
        NORM + "q = Mul(c, c) " + ROOT + "i = Reciprocal(r) n = Mul(i, c) s = Mul(w, n) y = Add(b, s)",
        NORM + "q = Mul(c, c) " + ROOT + "i = Div(one, r) n = Mul(c, i) s = Mul(n, w) y = Add(s, b)",
        NORM + "q = Mul(c, c) v = ReduceMean(q, last) e = Add(eps, v) i = Pow(e, low) n = Mul(c, i) y = Mul(n, w)",
        NORM + "d = Sub(x, m) q = Mul(d, d) " + ROOT + "n = Div(c, r) s = Mul(n, w) y = Add(s, b)",
        NORM + "q = Pow(c, two) " + ROOT + "y = Div(c, r)",
    ],
)
def test_every_spelling_of_layer_norm(body: str) -> None:
    proto = text_graph(body, CONSTANTS)
    model, report = raised(proto)
    assert report.counts["layer_norm"] == 1 and report.counts["rms_norm"] == 0 and report.near_misses == ()
    assert count(model) == {"LayerNormalization": 1}
    same(proto, model)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("v = ReduceMean(q, last)", "v = ReduceMean(q, first)", "not the last one"),
        ("ReduceMean<keepdims: int = 1>(x, last)", "ReduceMean<keepdims: int = 1>(x, first)", "not the last one"),
        ("e = Add(v, eps)", "e = Add(v, v)", "no constant epsilon"),
        ("n = Div(c, r)", "n = Div(x, r)", "not multiplied by the inverse"),
    ],
)
def test_what_is_nearly_a_layer_norm_stays(old: str, new: str, reason: str) -> None:
    body = NORM + "q = Pow(c, two) " + ROOT + "n = Div(c, r) s = Mul(n, w) y = Add(s, b)"
    assert old in body
    proto = text_graph(body.replace(old, new), CONSTANTS + ", int64[1] first = {1}")
    model, report = raised(proto)
    assert report.counts["layer_norm"] == report.counts["rms_norm"] == 0
    assert any(reason in why for why in report.near_misses), report.near_misses
    same(proto, model)


def test_rms_norm_is_still_rms_norm() -> None:
    proto = text_graph("q = Pow(x, two) " + ROOT + "i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w)", CONSTANTS)
    model, report = raised(proto)
    assert report.counts["rms_norm"] == 1 and count(model) == {"RMSNormalization": 1}
    same(proto, model)


HALVES = (
    "float half = {0.5}, float one = {1.0}, float root = {1.4142135}, float inverse = {0.70710677}, "
    "float three = {3.0}, float cubic = {0.044715}, float wide = {0.7978846}, float quick = {1.702}"
)
TANH = "p = Pow(x, three) k = Mul(cubic, p) a = Add(x, k) z = Mul(a, wide) t = Tanh(z) o = Add(one, t) "


@pytest.mark.parametrize(
    ("body", "approximate"),
    [
        ("d = Div(x, root) t = Erf(d) o = Add(t, one) m = Mul(x, o) y = Mul(m, half)", "none"),
        ("d = Mul(x, inverse) t = Erf(d) o = Add(one, t) h = Mul(half, x) y = Mul(h, o)", "none"),
        ("d = Mul(inverse, x) t = Erf(d) o = Add(one, t) m = Mul(o, half) y = Mul(x, m)", "none"),
        (TANH + "h = Mul(x, half) y = Mul(h, o)", "tanh"),
        (TANH.replace("p = Pow(x, three)", "s = Mul(x, x) p = Mul(x, s)") + "m = Mul(x, o) y = Mul(half, m)", "tanh"),
    ],
)
def test_every_spelling_of_gelu(body: str, approximate: str) -> None:
    proto = text_graph(body, HALVES)
    model, report = raised(proto)
    (node,) = model.graph
    assert report.counts["gelu"] == 1 and node.op_type == "Gelu"
    assert node.attributes["approximate"].as_string() == approximate
    same(proto, model)


@pytest.mark.parametrize(
    "body",
    [
        "d = Mul(x, quick) t = Sigmoid(d) y = Mul(x, t)",
        "d = Div(x, root) t = Erf(d) o = Add(t, one) m = Mul(x, o) y = Mul(m, one)",
        "d = Div(x, three) t = Erf(d) o = Add(t, one) m = Mul(x, o) y = Mul(m, half)",
        "d = Div(x, root) t = Erf(d) o = Add(t, one) m = Mul(d, o) y = Mul(m, half)",
    ],
)
def test_what_is_no_gelu_stays(body: str) -> None:
    model, report = raised(text_graph(body, HALVES))
    assert report.counts["gelu"] == 0 and "Gelu" not in count(model)


SIZES = (
    "int64 i0 = {0}, int64 i1 = {1}, int64[1] a0 = {0}, int64[1] four = {4}, int64[1] two = {2}, int64[1] rest = {-1}"
)


@pytest.mark.parametrize(
    ("body", "shape", "target"),
    [
        (
            "s = Shape(x) b = Gather(s, i0) n = Gather(s, i1) u = Unsqueeze(b, a0) v = Unsqueeze(n, a0) "
            "t = Concat<axis: int = 0>(u, v, four, two) y = Reshape(x, t)",
            "B, S, 8",
            [0, 0, 4, 2],
        ),
        ("t = Constant<value_ints = [2, 3, 4, 2]>() y = Reshape(x, t)", "2, 3, 8", [0, 0, 4, 2]),
        ("s = Shape<end: int = 2>(x) t = Concat<axis: int = 0>(s, rest) y = Reshape(x, t)", "B, S, 4, 2", [0, 0, 8]),
        (  # the size of a tensor of the same shape, and arithmetic that changes nothing
            "z = Relu(x) s = Shape(z) b = Gather(s, a0) "
            "t = Concat<axis: int = 0>(b, rest, four, two) y = Reshape(x, t)",
            "B, 3, 8",
            [0, 0, 4, 2],
        ),
    ],
)
def test_a_reshape_copies_leading_sizes(body: str, shape: str, target: list[int]) -> None:
    proto = text_graph(body, SIZES, shape)
    model, report = raised(proto)
    (node,) = (n for n in model.graph if is_op(n, "Reshape"))
    assert report.counts["reshapes"] == 1 and const_ints(node.inputs[1]) == target
    same(proto, model, (2, 3, 8) if shape.count(",") == 2 else (2, 3, 4, 2))


def test_a_reshape_that_merges_leading_sizes_stays() -> None:
    model, report = raised(text_graph("t = Constant<value_ints = [-1, 8]>() y = Reshape(x, t)", SIZES))
    assert report.counts["reshapes"] == 0 and [n.op_type for n in model.graph] == ["Reshape"]


def test_sizes_go_through_the_arithmetic_of_expand() -> None:
    """The class token that exporters repeat for each row: Expand to Where(size == -1, 1, size)."""
    body = (
        "s = Shape(x) b = Gather(s, i0) u = Unsqueeze(b, a0) t = Concat<axis: int = 0>(u, rest, rest) "
        "h = Shape(t) ones = ConstantOfShape<value = int64[1] {1}>(h) m = Mul(ones, rest) e = Equal(t, m) "
        "w = Where(e, ones, t) c = Expand(cls, w) y = Concat<axis: int = 1>(c, x)"
    )
    model = ir.from_proto(text_graph(body, SIZES + ", float[1, 1, 8] cls = {1, 2, 3, 4, 5, 6, 7, 8}", "B, 5, 8"))
    infer_sizes(model.graph)
    assert [str(d) for d in dims(model.graph.outputs[0]) or []] == ["B", "6", "8"]


def torchscript(family: str, opset: int) -> tuple[onnx.ModelProto, torch.Tensor]:
    """What PyTorch's older exporter gives: decomposed attention, norms (opset 14), scales on queries and on keys."""
    tiny = tiny_encoder(family)
    (x,) = tiny.inputs.values()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).last_hidden_state

    file = bytes_io.BytesIO()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden().eval(), (x,), file, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue()), x


@pytest.mark.parametrize(("family", "opset"), [("vit", 14), ("clip", 14), ("dinov2", 17), ("whisper", 14)])
def test_another_exporter_raises_to_the_same_form(family: str, opset: int) -> None:
    proto, x = torchscript(family, opset)
    model, report = raised(proto)
    assert report.near_misses == ()
    made = count(model)
    assert (made["Attention"], made["LayerNormalization"], made["Softmax"], made["Erf"]) == (3, 7, 0, 0)
    found = describe(model, find(model))
    assert (found.tokens, found.cls, found.head) == (TOKENS[family], CLS[family], "tokens")
    for rows in (1, 3):
        given = torch.randn((rows, *x.shape[1:])).numpy()
        np.testing.assert_allclose(run(model, given), run(proto, given), atol=1e-5, rtol=0)
    shortened(model)
    assert run(model, x.numpy()).shape[1] == 7


def shortened(model: ir.Model, tokens: int = 7) -> None:
    """Cut the stream to its first tokens after the first attention, in place, as passes do."""
    graph, value = model.graph, find(model).blocks[0].residual_out
    assert value is not None
    ends = [ir.val(f"cut_{n}", const_value=ir.tensor(np.array([n]), name=f"cut_{n}")) for n in (0, tokens, 1)]
    for end in ends:
        graph.register_initializer(end)
    cut = ir.node("Slice", [value, *ends])
    value.replace_all_uses_with(cut.outputs[0])
    cut.replace_input_with(0, value)
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, cut)
    for node in graph:  # their sizes are other ones now
        for out in node.outputs:
            out.shape = None
    for out in graph.outputs:
        out.shape = None


@pytest.fixture(scope="module")
def dinov2() -> tuple[str, ir.Model, RaiseReport]:
    from graphs import dinov2_saliency
    from trtpass import io

    try:
        file = dinov2_saliency.onnx_file()
    except InputError as error:
        pytest.skip(str(error))
    model = io.load(file)
    return str(file), model, canonicalize(model)


@pytest.mark.model
def test_dinov2_raises_by_structure(dinov2: tuple[str, ir.Model, RaiseReport]) -> None:
    _, model, report = dinov2
    made = {name: n for name, n in report.counts.items() if n}
    assert made == {"layer_norm": 25, "gelu": 12, "attention": 12, "reshapes": 51} and report.near_misses == ()
    anchors = find(model)
    assert anchors.missing == () and len(anchors.blocks) == 12
    assert {(b.heads, b.kv_heads, b.head_dim, round(b.scale, 6)) for b in anchors.blocks} == {(6, 6, 64, 0.125)}
    assert all(b.mlp_out is not None and b.qkv_input is not None for b in anchors.blocks)
    found = describe(model, anchors)
    assert (found.tokens, found.cls, found.grid, found.head) == (257, 1, (16, 16), "grid")


@pytest.mark.model
def test_dinov2_computes_the_same_raised_and_in_torch(dinov2: tuple[str, ir.Model, RaiseReport]) -> None:
    from graphs import dinov2_saliency

    file, model, _ = dinov2
    photos = dinov2_saliency.examples()["input_image"]
    noise = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    with torch.inference_mode():
        module = dinov2_saliency.torch_module()
        for x in (noise, photos[:3], photos[3:]):
            expected = run(file, x)
            assert expected.std() > 0.01
            np.testing.assert_allclose(run(model, x), expected, atol=1e-4, rtol=0)
            np.testing.assert_allclose(module(torch.from_numpy(x))["output_importance"], expected, atol=1e-4, rtol=0)
