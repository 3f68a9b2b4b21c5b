"""``merge.encoder``: schedules, counted operations, what is measured; and the lowering of encoders that it measures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiny_vit import vit

from trtpass import native
from trtpass.bench import encoder, measure
from trtpass.bench.layer import parse as text
from trtpass.errors import CheckFailed, InputError
from trtpass.passes import parse
from trtpass.passes.lower import lower
from trtpass.passes.tables import fold_tables

MACHINE = measure.Machine("a processor", 2, 1, "1.31", 1.0, 0.0)
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    native.register(options)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" for n in model.graph)


@pytest.mark.parametrize("share", [0.9, *encoder.SHARES])
def test_schedules_keep_what_is_asked_for_and_never_merge_more_than_half(share: float) -> None:
    made = encoder.schedule(share)
    assert abs(made.share - share) < 0.01
    before = (encoder.TOKENS, *made.carried[:-1])
    for left, after in zip(before, made.carried, strict=True):
        assert 0 <= left - after <= (left - encoder.CLS) // 2
    assert made.carried[-1] >= encoder.FLOOR * share * encoder.TOKENS
    assert parse(made.method).options.figures() == tuple(d for d in made.drops if d)


def test_operations_are_those_of_the_formulas() -> None:
    """A convolution of 4 channels to 6, a transposed one of 6 to 2, a product and an attention."""
    graph = text(
        """g (float[b,4,5,5] x, float[b,7,3] y, float[b,2,7,8] q, float[b,1,9,8] k, float[b,1,9,5] v)
          => (float[b,2,6,6] up, float[b,7,10] z, float[b,2,7,5] out)
          <float[6,4,3,3] w = {0}, float[6,2,2,2] t = {0}, float[3,10] m = {0}> {
            conv = Conv(x, w)
            up = ConvTranspose<strides=[2,2]>(conv, t)
            z = MatMul(y, m)
            out = Attention(q, k, v)
        }"""
    )
    for name, shape in (("w", (6, 4, 3, 3)), ("t", (6, 2, 2, 2)), ("m", (3, 10))):
        graph.graph.initializers[name].const_value = ir.tensor(np.ones(shape, np.float32), name=name)
    for number, node in enumerate(graph.graph):
        node.name = f"node{number}"
    feeds = {
        str(v.name): np.ones([2 if isinstance(d, ir.SymbolicDim) else d for d in v.shape or []], np.float32)
        for v in graph.graph.inputs
        if v.name not in graph.graph.initializers
    }
    conv, up = 2 * (6 * 9) * (4 * 9), 2 * (6 * 9) * (2 * 4)
    product, attention = 2 * (7 * 10) * 3, 2 * 2 * 7 * 9 * (8 + 5)
    assert encoder.operations(graph, feeds) == 2 * (conv + up + product + attention)  # batch 2
    with pytest.raises(CheckFailed):
        encoder.products("Conv", [[1]], [[1]])


def test_kernels_and_attention_count_alike(library: native.Library) -> None:
    feeds = {"image": IMAGES}
    count = [encoder.operations(lower(vit(), target).model, feeds) for target in ("cpu", "portable")]
    assert count[0] == count[1] > 0
    short = vit()
    parse("tome:r=4")(short)
    assert encoder.operations(lower(short, "cpu").model, feeds) < count[0]


@pytest.mark.parametrize("method", ["", "tome:r=4,layers=0", "tome:r=5+3+1", "evit", "ficoco-v", "scc:layer=0"])
def test_encoders_get_their_kernel_with_and_without_a_mask(method: str, library: native.Library) -> None:
    """Odd numbers of tokens; no mask is spelt out, and of the transposes only those of the patches are left."""
    model = vit()
    if method:
        parse(method)(model)
    lowered = lower(model, "cpu")
    found = kinds(lowered.model)
    assert found[f"{native.SWAPPED}::EncoderAttention"] == 3 and not found["::Attention"]
    expected = kinds(vit())["::Transpose"] - 4 * 3
    assert found["::Transpose"] == expected
    shapes = [list(v.shape or []) for n in lowered.model.graph for v in n.outputs]
    assert not any(len(shape) == 4 and shape[1] == 1 for shape in shapes)
    assert sum(d.reason.startswith("EncoderAttention") for d in lowered.decisions) == 3
    got, right = (outputs(m, {"image": IMAGES}) for m in (lowered.model, lower(model, "portable").model))
    for mine, theirs in zip(got, right, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=0)
    alone = ort.SessionOptions()  # without the library the same file runs by its bodies
    alone.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(lowered.model).SerializeToString(), alone, ["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": IMAGES})[0], right[0], atol=2e-5, rtol=0)


def attention(inputs: str, attributes: str = "", mask: str = "") -> ir.Model:
    return text(
        f"""g (float[b,2,n,8] q, float[b,2,n,8] k, float[b,2,n,8] v, {inputs}) => (float[b,2,n,8] out) {{
            {mask}
            out = Attention{attributes}(q, k, v{", mask" if "mask" in inputs + mask else ""})
        }}"""
    )


BIAS = "axes = Constant<value_ints=[{}]>() row = Unsqueeze({}, axes) mask = Expand(row, size)"


@pytest.mark.parametrize(
    ("model", "stays"),
    [
        (attention("float[b,n] bias, int64[4] size", mask=BIAS.format("1,2", "bias")), False),
        (attention("float[b,n] bias, int64[4] size", mask=BIAS.format("1,3", "bias")), True),  # a bias of queries
        (attention("float[1,n] bias, int64[4] size", mask=BIAS.format("1,2", "bias")), True),  # one for all rows
        (attention("float[b,1,n,n] mask"), True),
        (attention("bool[b,n] bias, int64[4] size", mask=BIAS.format("1,2", "bias")), True),
        (attention("float[b] unused", "<softcap=9.0>"), True),
        (attention("float[b] unused", "<scale=0.3>"), False),
    ],
)
def test_only_a_bias_of_keys_becomes_one(model: ir.Model, stays: bool, library: native.Library) -> None:
    lowered = lower(model, "cpu").model
    assert sum("Attention" in n.op_type and n.domain == "" for n in lowered.graph) == stays
    rng = np.random.default_rng(0)
    sizes: dict[Any, int] = {"b": 2, "n": 7}
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[d.value] for d in value.shape or []]
        feeds[str(value.name)] = (rng.standard_normal(shape) * 2).astype(value.dtype.numpy() if value.dtype else "f4")
    if "size" in feeds:
        feeds["size"] = np.array([2, 1, 7, 7])
    np.testing.assert_allclose(
        outputs(lowered, feeds)[0], outputs(lower(model, "portable").model, feeds)[0], atol=2e-5, rtol=0
    )


def table(resize: str) -> ir.Model:
    """A table of 3 x 3 places, scaled to 6 x 4 of an image whose batch is free, as exporters write it."""
    made = text(
        f"""g (float[b,3,6,4] image) => (float[b,24,2] out)
            <float[1,9,2] table = {{0}}, int64[4] square = {{0}}> {{
            whole = Shape(image)
            two = Constant<value_ints=[2]>() four = Constant<value_ints=[4]>() none = Constant<value_ints=[1,2]>()
            places = Slice(whole, two, four)
            sizes = Concat<axis=0>(none, places)
            grid = Reshape(table, square)
            map = Transpose<perm=[0,3,1,2]>(grid)
            factors = Constant<value_floats=[1.0,1.0,2.0,1.34]>()
            {resize}
            flat_shape = Constant<value_ints=[1,2,24]>()
            flat = Reshape(scaled, flat_shape)
            rows = Transpose<perm=[0,2,1]>(flat)
            first = Constant<value_int=0>()
            count = Shape<start=0,end=1>(image)
            rest = Constant<value_ints=[1,1]>()
            all = Concat<axis=0>(count, rest)
            out = Expand(rows, all)
        }}"""
    )
    values = np.random.default_rng(0).standard_normal((1, 9, 2)).astype(np.float32)
    made.graph.initializers["table"].const_value = ir.tensor(values, name="table")
    made.graph.initializers["square"].const_value = ir.tensor(np.array([1, 3, 3, 2]), name="square")
    for name, shape in (("grid", [1, 3, 3, 2]), ("map", [1, 2, 3, 3]), ("scaled", [1, 2, 6, 4])):
        next(v for n in made.graph for v in n.outputs if v.name == name).shape = ir.Shape(shape)
    return made


@pytest.mark.parametrize(
    ("resize", "folds"),
    [
        ('scaled = Resize<mode="cubic",coordinate_transformation_mode="half_pixel">(map, , , sizes)', True),
        ('scaled = Resize<mode="linear">(map, , , sizes)', True),
        ('scaled = Resize<mode="linear">(map, , factors)', False),  # factors say more than the shape
        ('other = Add(map, map) scaled = Resize<mode="linear">(other, , , sizes)', False),
    ],
)
def test_a_table_is_scaled_once(resize: str, folds: bool) -> None:
    model = table(resize)
    feeds = {"image": np.zeros((3, 3, 6, 4), np.float32)}
    before = outputs(model, feeds)
    lowered = lower(model, "cpu").model
    assert kinds(lowered)["::Resize"] == (not folds)
    np.testing.assert_array_equal(outputs(lowered, feeds)[0], before[0])
    assert fold_tables(lowered) == 0


@pytest.mark.model
@pytest.mark.slow
def test_one_record_a_comparison(monkeypatch: pytest.MonkeyPatch, library: native.Library) -> None:
    """Real weights, times that are made up: original 4 s, raised 3 s, rewritten 2 s, the free one 1 s."""
    try:
        encoder.model.onnx_file()
        encoder.model.photos()
    except InputError as error:
        pytest.skip(str(error))

    def made_up(sides: Any, repeats: int, *_: Any, **__: Any) -> Any:
        assert len(sides) == 4
        return np.repeat([[4.0], [3.0], [2.0], [1.0]], repeats, 1)

    monkeypatch.setattr(encoder, "interleave", made_up)
    records = encoder.run(["merge.encoder", "merge.overhead"], MACHINE, 2, lambda _: None, [1], [0.25])
    found = {(r.name, r.params["kept"] < 1, r.baseline): r for r in records}
    assert {key: r.ratio for key, r in found.items()} == {
        ("merge.encoder", True, encoder.ORIGINAL): 2.0,
        ("merge.encoder", True, encoder.RAISED): 1.5,
        ("merge.encoder", False, encoder.ORIGINAL): round(4 / 3, 4),
        ("merge.overhead", True, encoder.FREE): 0.5,
    }
    raised, short = found["merge.encoder", False, encoder.ORIGINAL], found["merge.encoder", True, encoder.ORIGINAL]
    assert raised.limit == 1.0
    assert raised.params["gflop"] == pytest.approx(15.2, abs=0.1)  # 12.1 in the blocks, 3 in the head
    assert short.limit == pytest.approx(15.2 / short.params["gflop"], rel=0.01)
    assert 6.0 < short.params["gflop"] < 6.6
