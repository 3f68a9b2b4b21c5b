"""Lowering without native kernels: bodies are inlined, causal attention becomes the contrib operator, numbers stay."""

from __future__ import annotations

import functools
import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny

from trtpass.errors import InputError
from trtpass.ir import is_op
from trtpass.passes import parse
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import Lowered, inline_bodies
from trtpass.passes.lower import lower as lower_anyhow

lower = functools.partial(lower_anyhow, kernels=False)  # test_lower_native.py has the other half
ATOL = 1e-4  # fp32: another order of the sums in softmax and in its product with V


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.all_nodes())


def attention_decisions(lowered: Lowered) -> list[tuple[str, str]]:
    return [(d.decision, d.reason) for d in lowered.decisions if "body" not in d.decision]


def prefill_feeds(kv_heads: int, width: int, tokens: int = 40, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (3, kv_heads, tokens, width)
    cache = {f"past.{i}.{role}": np.zeros(shape, dtype) for i in range(2) for role in ("key", "value")}
    lengths = np.array([tokens // 2, tokens, 3], np.int32)
    return {"input_ids": rng.integers(0, 64, (3, tokens)), "lengths": lengths, **cache}


def valid_part(outputs: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Logits, and the rows of the cache that hold a token."""
    logits, *cache = outputs
    return [logits] + [c[row, :, :n] for c in cache for row, n in enumerate(lengths)]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_cpu_equals_portable_in_both_phases(options: dict[str, object]) -> None:
    model = tiny.decoder(**options)
    feeds = prefill_feeds(options.get("kv_heads", 2), 16)
    outputs = {}
    for target in ("portable", "cpu"):
        prefill = lower(insert_cache(model, "prefill"), target).model
        decode = lower(insert_cache(model, "decode"), target).model
        assert count(prefill, "GroupQueryAttention") == count(decode, "GroupQueryAttention") == 2 * (target == "cpu")
        cache = session(prefill).run(None, feeds)
        past = dict(zip([n for n in feeds if n.startswith("past")], cache[1:], strict=True))
        lengths = np.array([20, 39, 3], np.int32)
        step = session(decode).run(
            None,
            {"input_ids": np.array([[1], [2], [3]]), "lengths": np.ones(3, np.int32), "past_lengths": lengths, **past},
        )
        outputs[target] = valid_part(cache, feeds["lengths"]) + valid_part(step, lengths + 1)
    for portable, cpu in zip(outputs["portable"], outputs["cpu"], strict=True):
        np.testing.assert_allclose(cpu, portable, atol=ATOL, rtol=0)


def test_decode_of_several_tokens_for_one_row() -> None:
    """The form of a chunk: batch 1, T > 1, a past."""
    model = tiny.decoder()
    rng = np.random.default_rng(5)
    past = {
        f"past.{i}.{r}": rng.standard_normal((1, 2, 32, 16), np.float32) for i in range(2) for r in ("key", "value")
    }
    feeds = {
        "input_ids": np.arange(7)[None],
        "lengths": np.array([7], np.int32),
        "past_lengths": np.array([9], np.int32),
    }
    portable, cpu = (session(lower(insert_cache(model, "decode"), t).model) for t in ("portable", "cpu"))
    np.testing.assert_allclose(cpu.run(None, feeds | past)[0], portable.run(None, feeds | past)[0], atol=ATOL, rtol=0)


def test_float16_is_lowered_too() -> None:
    model = tiny.decoder(dtype=np.float16)
    portable, cpu = (lower(insert_cache(model, "prefill"), target) for target in ("portable", "cpu"))
    assert count(cpu.model, "GroupQueryAttention") == 2
    feeds = prefill_feeds(2, 16, dtype=np.float16)
    expected, got = (session(lowered.model).run(None, feeds)[0] for lowered in (portable, cpu))
    # fp16 has 11 bits and logits reach 4: a unit in the last place is 4e-3; two layers round differently
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=2e-2, rtol=0)


def test_the_contrib_operator_writes_the_cache_itself() -> None:
    for phase, reason in (("prefill", "fresh keys, writes the cache"), ("decode", "cache of this step")):
        lowered = lower(insert_cache(tiny.decoder(), phase), "cpu")
        assert attention_decisions(lowered) == [("GroupQueryAttention", reason)] * 2
        assert count(lowered.model, "TensorScatter") == 0
        made = [n for n in lowered.model.graph if n.op_type == "GroupQueryAttention"]
        assert [n.outputs[1].name for n in made] == ["present.0.key", "present.1.key"]


def test_transposes_around_attention_disappear() -> None:
    lowered = lower(insert_cache(tiny.decoder(qk_norm=True), "decode"), "cpu").model
    assert count(lowered, "Transpose") == 0
    turned = [n for n in lowered.graph if is_op(n, "RotaryEmbedding")]
    assert [n.attributes["num_heads"].value for n in turned] == [4, 2, 4, 2]


def test_present_outputs_are_kept_without_a_cache() -> None:
    """ONNX Runtime's fast path needs them, so no clean-up may drop them."""
    lowered = lower(tiny.decoder(), "cpu").model
    made = [n for n in lowered.graph if n.op_type == "GroupQueryAttention"]
    assert len(made) == 2 and all(len(n.outputs) == 3 and all(v.name for v in n.outputs) for n in made)


def test_portable_has_standard_operators_only() -> None:
    model = tiny.decoder()
    parse("token-sparse:coverage=0.2,window=4,min_tokens=4,layers=all")(model)
    lowered = lower(insert_cache(model, "prefill"), "portable").model
    assert {node.domain for node in lowered.graph.all_nodes()} <= {"", "ai.onnx"}
    assert not lowered.functions and set(lowered.opset_imports) == {""}


@pytest.mark.parametrize("select", ["head", "group"])
def test_a_method_is_inlined_and_its_attention_lowered(select: str) -> None:
    model = tiny.decoder()
    parse(f"token-sparse:coverage=0.3,window=4,min_tokens=8,layers=all,select={select}")(model)
    prefill = insert_cache(model, "prefill")
    feeds = prefill_feeds(2, 16)
    results = {}
    for target in ("portable", "cpu"):
        lowered = lower(prefill, target)
        assert sum(d.decision == "dynamic body" for d in lowered.decisions) == 8  # four operators in each of two layers
        counts = [v for n in lowered.model.graph for v in n.outputs if re.search(r"token_sparse\.count$", v.name or "")]
        assert len(counts) == 2  # selections keep their names, so that they can be read
        lowered.model.graph.outputs.extend(counts)
        results[target] = session(lowered.model).run(None, feeds)
        if target == "cpu":
            inside = [d for d in lowered.decisions if "TokenSparseAttention /" in d.node]
            assert len(inside) >= 2 and {d.decision for d in inside} == {"GroupQueryAttention"}
    for portable, cpu in zip(results["portable"][-2:], results["cpu"][-2:], strict=True):
        assert portable.min() < 40  # something was pruned
        np.testing.assert_array_equal(cpu, portable)
    np.testing.assert_allclose(results["cpu"][0], results["portable"][0], atol=ATOL, rtol=0)


def test_inlined_nodes_say_which_operator_they_belong_to() -> None:
    model = tiny.decoder()
    parse("token-sparse:layers=1")(model)
    lowered = lower(model, "portable").model
    origins = {n.metadata_props["trtpass.op"] for n in lowered.graph.all_nodes() if "trtpass.op" in n.metadata_props}
    assert origins == {"ColumnMass", "CoverageBudget", "SelectTokens", "TokenSparseAttention"}
    sites = {n.metadata_props["trtpass.site"] for n in lowered.graph.all_nodes() if "trtpass.site" in n.metadata_props}
    assert "layer1.token_sparse.ColumnMass" in sites


def attention(edit: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """One Attention on graph inputs, with one property that the contrib operator cannot express."""
    width = 12 if edit == "width" else 16
    kv = "other" if edit == "cross" else "tokens"
    q = ir.val("q", dtype, ["batch", "heads" if edit == "heads" else 4, "tokens", width])
    k = ir.val("k", dtype, ["batch", 2, kv, width])
    v = ir.val("v", dtype, ["batch", 2, kv, 8 if edit == "values" else width])
    mask = ir.val("mask", dtype, ["tokens", "tokens"])
    inputs = [q, k, v, mask] if edit == "mask" else [q, k, v]
    attributes = {"is_causal": int(edit != "bidirectional")} | ({"softcap": 30.0} if edit == "softcap" else {})
    node = ir.node("Attention", inputs, attributes, outputs=[ir.val("y", dtype)], name="attention")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("width", "multiples of 8"),
        ("cross", "not known to be the same"),
        ("heads", "not fixed"),
        ("values", "one width"),
        ("mask", "mask"),
        ("bidirectional", "not causal"),
        ("softcap", "soft-capped"),
    ],
)
def test_what_does_not_fit_stays_and_says_why(edit: str, reason: str) -> None:
    lowered = lower(attention(edit), "cpu", kernels=edit != "bidirectional")  # a kernel takes that one
    [(decision, why)] = attention_decisions(lowered)
    assert decision == "Attention" and reason in why
    assert count(lowered.model, "GroupQueryAttention") == 0


def test_double_precision_stays() -> None:
    [(decision, why)] = attention_decisions(lower(attention("", ir.DataType.DOUBLE), "cpu"))
    assert decision == "Attention" and "not float32 or float16" in why


def test_unknown_targets_and_operators_are_refused() -> None:
    with pytest.raises(InputError, match="portable, cpu"):
        lower(tiny.decoder(), "gpu")
    model = attention("")
    node = model.graph.node(0)
    node.domain, node.op_type = "trtpass", "Unheard"
    with pytest.raises(InputError, match="Unheard"):
        inline_bodies(model, "dynamic")


def test_the_source_is_unchanged() -> None:
    model = insert_cache(tiny.decoder(), "decode")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lower(model, "cpu")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
