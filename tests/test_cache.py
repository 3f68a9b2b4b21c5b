"""The cache pass: prefill then decode equal the stateless graph at every step, on ragged batches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny

from trtpass.errors import AnchorError, InputError
from trtpass.ir import check, is_op
from trtpass.passes import parse
from trtpass.passes.cache import InsertCache, insert_cache

LAYERS, KV_HEADS, WIDTH, VOCAB = 2, 2, 16, 64
ATOL = 1e-4  # fp32, two layers: the attention kernels differ in the order of their sums


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # TensorScatter warns that it copies where past and present are not one buffer
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def empty_cache(batch: int, capacity: int) -> dict[str, np.ndarray]:
    shape = (batch, KV_HEADS, capacity, WIDTH)
    return {f"past.{i}.{role}": np.zeros(shape, np.float32) for i in range(LAYERS) for role in ("key", "value")}


@pytest.fixture(scope="module")
def stateless() -> ir.Model:
    return tiny.decoder()


@pytest.fixture(scope="module")
def reference(stateless: ir.Model) -> ort.InferenceSession:
    return session(stateless)


def names(values: list[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def test_names_shapes_and_order_are_those_of_the_contract(stateless: ir.Model) -> None:
    cache = [f"{i}.{role}" for i in range(LAYERS) for role in ("key", "value")]
    for phase, first in (("prefill", ["input_ids", "lengths"]), ("decode", ["input_ids", "lengths", "past_lengths"])):
        model = insert_cache(stateless, phase)
        assert names(model.graph.inputs) == first + [f"past.{c}" for c in cache]
        assert names(model.graph.outputs) == ["logits"] + [f"present.{c}" for c in cache]
        by_name = {v.name: v for v in [*model.graph.inputs, *model.graph.outputs]}
        assert str(by_name["input_ids"].shape) == "[batch,tokens]"
        assert str(by_name["logits"].shape) == f"[batch,1,{VOCAB}]"
        assert str(by_name["past.1.value"].shape) == str(by_name["present.1.value"].shape) == "[batch,2,capacity,16]"
        assert by_name["lengths"].dtype == ir.DataType.INT32
        assert model.metadata_props["trtpass.phase"] == phase
        check(model, phase)


def test_fixed_capacity_and_all_logits(stateless: ir.Model) -> None:
    model = insert_cache(stateless, "decode", capacity=32, logits="all")
    assert str(model.graph.inputs[3].shape) == "[batch,2,32,16]"
    assert str(model.graph.outputs[0].shape) == f"[batch,tokens,{VOCAB}]"


def test_the_source_is_unchanged_and_weights_are_shared(stateless: ir.Model) -> None:
    before = stateless.graph.num_nodes()
    model = insert_cache(stateless, "decode")
    assert stateless.graph.num_nodes() == before and names(stateless.graph.inputs) == ["input_ids"]
    shared = model.graph.initializers["lm_head"].const_value
    assert shared is stateless.graph.initializers["lm_head"].const_value


def test_logits_of_the_whole_sequence_are_never_computed(stateless: ir.Model) -> None:
    model = insert_cache(stateless, "prefill")
    head = next(n for n in model.graph if is_op(n, "MatMul") and n.inputs[1].name == "lm_head")
    assert str(head.inputs[0].shape) == "[batch,1,64]"


@pytest.mark.parametrize("lengths", [[9], [5, 9, 1]])
def test_prefill_then_decode_equals_stateless(
    stateless: ir.Model, reference: ort.InferenceSession, lengths: list[int]
) -> None:
    rng = np.random.default_rng(1)
    batch, steps, capacity = len(lengths), 6, 16
    prompt = rng.integers(0, VOCAB, (batch, max(lengths)))
    valid = np.array(lengths, np.int32)
    prefill, decode = session(insert_cache(stateless, "prefill")), session(insert_cache(stateless, "decode"))
    logits, *cache = prefill.run(None, {"input_ids": prompt, "lengths": valid, **empty_cache(batch, capacity)})
    rows = [list(ids[:n]) for ids, n in zip(prompt, lengths, strict=True)]
    for _ in range(steps):
        for row, ids in enumerate(rows):
            expected = reference.run(None, {"input_ids": np.array([ids])})[0][0, -1]
            np.testing.assert_allclose(logits[row, 0], expected, atol=ATOL, rtol=0)
        token = rng.integers(0, VOCAB, (batch, 1))
        past = dict(zip(empty_cache(1, 1), cache, strict=True))
        feeds = {"input_ids": token, "lengths": np.ones(batch, np.int32), "past_lengths": valid, **past}
        logits, *cache = decode.run(None, feeds)
        valid = valid + 1
        for row, ids in enumerate(rows):
            ids.append(int(token[row, 0]))


def test_several_tokens_at_once_over_a_ragged_cache(stateless: ir.Model, reference: ort.InferenceSession) -> None:
    """T > 1 with right-padding: each query sees its row's cache and the tokens before it, and all logits are right."""
    rng = np.random.default_rng(2)
    prompt, valid = rng.integers(0, VOCAB, (3, 9)), np.array([5, 9, 1], np.int32)
    more, new = rng.integers(0, VOCAB, (3, 4)), np.array([4, 2, 3], np.int32)
    prefill = session(insert_cache(stateless, "prefill"))
    decode = session(insert_cache(stateless, "decode", logits="all"))
    cache = prefill.run(None, {"input_ids": prompt, "lengths": valid, **empty_cache(3, 16)})[1:]
    past = dict(zip(empty_cache(1, 1), cache, strict=True))
    logits = decode.run(None, {"input_ids": more, "lengths": new, "past_lengths": valid, **past})[0]
    for row in range(3):
        ids = np.concatenate([prompt[row, : valid[row]], more[row, : new[row]]])
        expected = reference.run(None, {"input_ids": ids[None]})[0][0, valid[row] :]
        np.testing.assert_allclose(logits[row, : new[row]], expected, atol=ATOL, rtol=0)


def test_decode_depends_on_past_lengths(stateless: ir.Model) -> None:
    """The same token after a longer past has another position and sees more keys."""
    decode = session(insert_cache(stateless, "decode"))
    rng = np.random.default_rng(3)
    past = {name: rng.standard_normal(zeros.shape, np.float32) for name, zeros in empty_cache(1, 8).items()}
    runs = [
        decode.run(None, {"input_ids": np.array([[7]]), "lengths": np.ones(1, np.int32),
                          "past_lengths": np.array([n], np.int32), **past})[0]
        for n in (2, 3)
    ]  # fmt: skip
    assert np.abs(runs[0] - runs[1]).max() > 1e-2


def test_a_rewritten_graph_prefills_and_refuses_to_decode(stateless: ir.Model) -> None:
    rewritten = stateless.clone()
    parse("token-sparse:coverage=0.2,window=4,min_tokens=4,layers=1")(rewritten)
    prefill = insert_cache(rewritten, "prefill")
    assert names(prefill.graph.inputs) == names(insert_cache(stateless, "prefill").graph.inputs)
    assert prefill.metadata_props["trtpass.whole_prompt"] == "token-sparse"
    with pytest.raises(AnchorError, match="before method passes"):
        insert_cache(rewritten, "decode")


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(AnchorError, match="bidirectional"):
        insert_cache(tiny.decoder(causal=False), "decode")


def test_a_second_source_of_positions_is_refused(stateless: ir.Model) -> None:
    """A learned position table beside rotary embedding would restart at 0 in decode."""
    model = stateless.clone()
    graph = model.graph
    counted = next(n for n in graph if is_op(n, "Range")).outputs[0]
    embedded = next(n for n in graph if is_op(n, "Gather"))
    table = ir.Value(name="table", const_value=ir.tensor(np.zeros((64, 64), np.float32), name="table"))
    graph.register_initializer(table)
    looked_up = ir.node("Gather", [table, counted], {"axis": 0})
    added = ir.node("Add", [embedded.outputs[0], looked_up.outputs[0]])
    users = [(use.node, use.idx) for use in embedded.outputs[0].uses() if use.node is not added]
    graph.insert_after(embedded, [looked_up, added])
    for node, index in users:
        node.replace_input_with(index, added.outputs[0])
    insert_cache(model, "prefill")
    with pytest.raises(AnchorError, match="counts tokens"):
        insert_cache(model, "decode")


def test_without_logits_or_attention(stateless: ir.Model) -> None:
    headless = stateless.clone()
    headless.graph.outputs[:] = [next(n for n in headless.graph if is_op(n, "Attention")).outputs[0]]
    with pytest.raises(AnchorError, match="logits"):
        insert_cache(headless, "prefill")
    x = ir.val("x", ir.DataType.FLOAT, ["n"])
    node = ir.node("Relu", [x], outputs=[ir.val("y", ir.DataType.FLOAT, ["n"])])
    plain = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    with pytest.raises(AnchorError, match="no Attention node"):
        insert_cache(plain, "decode")


@pytest.mark.parametrize("bad", [{"phase": "both"}, {"logits": "first"}, {"capacity": 0}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        InsertCache.Options(**bad)
