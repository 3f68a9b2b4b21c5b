"""Multimodal graphs with fewer tokens, in tower, projector and decoder: twin = rewritten graph, identity, bad input."""

from __future__ import annotations

import functools
import re
from typing import Any

import multimodal
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from test_golden import Golden
from test_golden import text as text_of
from transformers import AttentionInterface

from trtpass.anchors import find
from trtpass.errors import AnchorError, InputError
from trtpass.ir import make_node
from trtpass.multimodal import decoder_of, describe, tower_of
from trtpass.passes import PassResult, parse
from trtpass.passes.cache import insert_cache
from trtpass.reduction.decoder import DROPPED, SPAN_KEY, Shortened
from trtpass.variants import expose

Arrays = dict[str, np.ndarray]
DECODER = [  # methods after which the decoder carries fewer tokens
    ("llava", "fastv:layer=1"), ("llava", "random-span:layer=1,ratio=0.4"),
    ("llava", "ficoco-l:layers=0-1,keep=0.7,eps=0.9"), ("llava", "scc:tau=0.5"), ("llava", "scc:tau=0.6,max_keep=0.1"),
    ("llava", "scc-two-step:tau=0.4,group=5"), ("llava", "ficoco-vl:tower_keep=0.7,layers=0-1"),
    ("llava", "ficoco-vl:tower_keep=0.7,keep=1"), ("qwen2vl", "fastv:layer=1"),
    ("qwen2vl", "ficoco-l:layers=0-1,keep=0.7"), ("qwen2vl", "scc:tau=0.3"),
    ("qwen2vl", "scc-two-step:tau=0.3,group=3"), ("qwen2vl", "ficoco-vl:tower_keep=0.8,layers=1,grid=4x6"),
]  # fmt: skip
TOWER = [
    ("llava", "tome:r=3"), ("llava", "ficoco-v:keep=0.7"), ("llava", "evit:keep=0.6"), ("llava", "scc:tau=0.3,layer=0"),
    ("qwen2vl", "tome:r=3"), ("qwen2vl", "ficoco-v:keep=0.8,grid=4x6,layers=0-1"),
    ("qwen2vl", "random-tokens:r=4,layers=0+2"),
]  # fmt: skip


class RotatedAttention(torch.nn.Module):
    """Attention of Qwen2-VL's tower on rows that stay apart, `[B, P, E]`, by transformers' registry."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.is_causal = inner, inner.config, False

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch, tokens, _ = hidden_states.shape
        heads = self.inner.qkv(hidden_states).reshape(batch, tokens, 3, self.inner.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # [B, H, P, D]
        q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        attend = AttentionInterface()[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, None, scaling=self.inner.scaling)
        return self.inner.proj(out.reshape(batch, tokens, -1)), None

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(-3) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(-3)


class RotatedBlock(torch.nn.Module):
    """A block of Qwen2-VL's tower in the form that twins split: attention, then MLP."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = inner.norm1, inner.norm2, inner.mlp
        self.attn = RotatedAttention(inner.attn)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any) -> torch.Tensor:
        x: torch.Tensor = hidden_states + self.attn(self.norm1(hidden_states), *position_embeddings)[0]
        return x + self.mlp(self.norm2(x))


class SplitQwen2VL(torch.nn.Module):
    """``multimodal.Qwen2VL`` with a tower whose blocks are modules of their own."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(RotatedBlock(block) for block in whole.inner.model.visual.blocks)
        self.whole = whole

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        inner, tables = self.whole.inner, (self.whole.cos, self.whole.sin)
        visual, (batch, tokens, _) = inner.model.visual, pixel_values.shape
        x = visual.patch_embed(pixel_values.flatten(0, 1)).reshape(batch, tokens, -1)
        for block in self.blocks:
            x = block(x, position_embeddings=tables)
        embeds = inner.model.get_input_embeddings()(input_ids)
        embeds = multimodal.placed(input_ids, embeds, visual.merger(x.flatten(0, 1)))
        out = inner.model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
        logits: torch.Tensor = inner.lm_head(out.last_hidden_state)
        return logits


def module_of(name: str) -> Any:
    """The torch model that a twin is made of."""
    module = exported(name)[0].module
    return SplitQwen2VL(module).eval() if name == "qwen2vl" else module


@functools.cache
def exported(name: str) -> tuple[multimodal.Multimodal, ir.Model]:
    tiny = multimodal.tiny_llava() if name == "llava" else multimodal.tiny_qwen2vl()
    return tiny, tiny.export()


def inputs_of(name: str) -> Arrays:
    """Two rows with the image at different places; the first ends in two tokens of padding."""
    made = {key: x.numpy().copy() for key, x in exported(name)[0].inputs.items()}
    made["input_ids"][1] = np.roll(made["input_ids"][1], 2)
    made["lengths"] = np.array([made["input_ids"].shape[1] - 2, made["input_ids"].shape[1]], np.int32)
    return made


def run(model: ir.Model, inputs: Arrays, names: tuple[str, ...] = ()) -> Arrays:
    model = model.clone()
    expose(model, names)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = session.run(None, {v.name: inputs[v.name] for v in session.get_inputs()})
    return dict(zip((o.name for o in session.get_outputs()), made, strict=True))


def rewritten(name: str, text: str) -> tuple[Any, ir.Model, PassResult]:
    step, model = parse(text), exported(name)[1].clone()
    return step, model, step(model)


def valid(inputs: Arrays, rows: np.ndarray) -> np.ndarray:
    """Rows ``[n, ...]`` of the tokens of ``rows [B, S, ...]`` that are no padding."""
    return rows[np.arange(rows.shape[1])[None] < inputs["lengths"][:, None]]


@pytest.mark.parametrize(("name", "text"), DECODER)
def test_twin_equals_the_rewritten_graph(name: str, text: str) -> None:
    """With each side's own choices, then with the graph's; only what is no padding means anything."""
    step, model, result = rewritten(name, text)
    inputs = inputs_of(name)
    names = [s.values[r] for s in result.sites for r in ("score", "keep", "target", "tokens") if r in s.values]
    outputs = run(model, inputs, tuple(names))
    roles = ("score", "keep", "target")
    graph = {s.layer: {r: outputs[s.values[r]] for r in roles if r in s.values} for s in result.sites}
    twin = step.twin(module_of(name), result)
    for forced in (None, {layer: {r: x for r, x in made.items() if r != "score"} for layer, made in graph.items()}):
        mine = twin.run_inputs(inputs, forced)
        np.testing.assert_allclose(valid(inputs, outputs["logits"]), valid(inputs, mine.logits), atol=5e-5, rtol=1e-4)
        assert set(mine.selections) == set(graph)
        for layer, made in graph.items():
            for role, array in made.items():
                np.testing.assert_allclose(mine.selections[layer][role], array, atol=1e-5, err_msg=f"{role} of {layer}")
    gone = outputs[DROPPED]
    assert gone.shape == (multimodal.TEXT_LAYERS, 2) and (gone[-1] > 0).any(), "nothing dropped proves nothing"
    assert outputs[result.sites[-1].values["tokens"]].shape[1] == (inputs["lengths"] - gone[-1]).max() or "vl" in text


@pytest.mark.parametrize(("name", "text"), TOWER)
def test_a_shorter_tower(name: str, text: str) -> None:
    step, model, result = rewritten(name, text)
    inputs = inputs_of(name)
    names = [s.values[r] for s in result.sites for r in ("keep", "target", "tokens") if r in s.values]
    outputs = run(model, inputs, tuple(names))
    forced = {s.layer: {r: outputs[s.values[r]] for r in ("keep", "target") if r in s.values} for s in result.sites}
    del inputs["lengths"]
    for given in (None, forced):
        mine = step.twin(module_of(name), result).run(inputs, given)
        np.testing.assert_allclose(outputs["logits"], mine.outputs["logits"], atol=5e-5, rtol=1e-4)
    assert outputs[result.sites[-1].values["tokens"]].shape[1] < {"llava": 26, "qwen2vl": 24}[name]


@pytest.mark.parametrize("text", ["fastv:layer=1,ratio=0", "ficoco-vl:keep=1,tower_keep=1", "tome:r=0"])
def test_dropping_nothing_changes_nothing(text: str) -> None:
    _, model, result = rewritten("llava", text)
    assert not result.modified and "nothing is dropped" in result.near_misses[0]
    assert [node.op_type for node in model.graph] == [node.op_type for node in exported("llava")[1].graph]


@pytest.mark.parametrize(("name", "text"), [("llava", "scc:tau=1.5"), ("qwen2vl", "scc:tau=1.5,layer=projector")])
def test_above_every_cosine_all_image_tokens_stay(name: str, text: str) -> None:
    _, model, result = rewritten(name, text)
    inputs = inputs_of(name)
    outputs, before = run(model, inputs), run(exported(name)[1], inputs)
    assert not outputs[DROPPED].any() and "no cosine is above" in result.warnings[0]
    np.testing.assert_allclose(valid(inputs, outputs["logits"]), valid(inputs, before["logits"]), atol=2e-5)


def test_below_every_cosine_one_image_token_is_left() -> None:
    _, model, _ = rewritten("llava", "scc:tau=-2")
    inputs = inputs_of("llava")
    outputs = run(model, inputs)
    assert (outputs[DROPPED] == exported("llava")[0].tokens - 1).all()
    image = inputs["input_ids"] == multimodal.IMAGE_TOKEN
    for row, mask in zip(outputs["logits"], image, strict=True):  # all of them have the row of the first
        np.testing.assert_array_equal(row[mask], np.broadcast_to(row[mask][:1], row[mask].shape))


@pytest.mark.parametrize("text", ["fastv:layer=1", "scc:tau=0.5", "ficoco-vl:tower_keep=0.7,layers=1"])
def test_a_row_does_not_depend_on_its_batch(text: str) -> None:
    _, model, _ = rewritten("llava", text)
    inputs = inputs_of("llava")
    together = run(model, inputs)
    for b, length in enumerate(inputs["lengths"]):
        alone = {key: x[b : b + 1] for key, x in inputs.items()}
        alone["input_ids"] = alone["input_ids"][:, :length]
        made = run(model, alone)
        np.testing.assert_allclose(made["logits"][0], together["logits"][b, :length], atol=2e-5)
        np.testing.assert_array_equal(made[DROPPED][:, 0], together[DROPPED][:, b])


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_where_the_image_meets_the_text(name: str) -> None:
    tiny, model = exported(name)
    found, inputs = describe(find(model)), inputs_of(name)
    assert found.tokens == tiny.tokens and len(found.decoder.blocks) == multimodal.TEXT_LAYERS
    assert [b.layer for b in found.decoder.blocks] == [0, 1, 2] and not found.tower.blocks[0].causal
    visual = run(model, inputs, (str(found.visual.name),))[str(found.visual.name)]
    np.testing.assert_array_equal(visual, inputs["input_ids"] == multimodal.IMAGE_TOKEN)


def test_ficoco_vl_says_what_the_decoder_starts_with() -> None:
    _, model, result = rewritten("llava", "ficoco-vl:tower_keep=0.7,layers=0-1")
    assert "18 of 25 image tokens" in " ".join(result.notes)  # 25 to 18 in the tower's second block
    record = Shortened.read(model.metadata_props[SPAN_KEY])
    assert record is not None and record.lengths(36) == [29, 25, 22]  # 18 to 14 to 11 image tokens


def test_other_graphs_have_one_part() -> None:
    import tiny

    anchors = find(tiny.decoder())
    assert tower_of(anchors) is anchors and decoder_of(anchors) is anchors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tome:r=3,restore=none", "restore=none on a multimodal graph"),
        ("ficoco-vl:span=4:9", "span=4:9"),
        ("ficoco-vl:tower_keep=0", "tower_keep=0"),
        ("ficoco-vl:grid=4x4", "grid=4x4 has 16 places"),
        ("scc:layer=head", "auto, projector or a block's number"),
        ("fastv:layer=3", "layer=3 of 3 layers"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rewritten("llava", text)


@pytest.mark.parametrize("text", ["fastv", "ficoco-vl", "scc:layer=projector"])
def test_no_place_where_an_image_enters(text: str) -> None:
    """The node that is not what was looked for is named."""
    model = exported("llava")[1].clone()
    where = describe(find(model)).embeds.producer()
    assert where is not None
    embeds = where.outputs[0]
    sum_ = make_node("Add", where.inputs[1:], [("mixed", embeds.dtype, embeds.shape)], name="mixed")
    model.graph.insert_after(where, sum_)
    for node, place in list(embeds.uses()):
        node.replace_input_with(place, sum_.outputs[0])
    with pytest.raises(AnchorError, match="comes from Add 'mixed', not from Where"):
        parse(text)(model)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("scc", "scc"),
        ("scc", "fastv:layer=1"),
        ("fastv:layer=1", "scc"),
        ("tome:r=1", "ficoco-vl"),
        ("tome:r=1", "fastv:layer=1"),
        ("fastv:layer=1", "tome:r=1"),
    ],
)
def test_one_method_alone(first: str, second: str) -> None:
    _, model, _ = rewritten("llava", first)
    with pytest.raises(InputError, match="one"):
        parse(second)(model)


def test_a_number_that_the_data_says_has_no_caches() -> None:
    _, model, _ = rewritten("llava", "scc:tau=0.5")
    with pytest.raises(InputError, match="depends on the data"):
        Shortened.read(model.metadata_props[SPAN_KEY])
    with pytest.raises(InputError, match="depends on the data"):
        insert_cache(model, "prefill")


@pytest.mark.parametrize(
    ("name", "text"), [("fastv", "fastv:layer=1"), ("scc", "scc:tau=0.9"), ("ficoco-vl", "ficoco-vl:layers=0")]
)
def test_golden(name: str, text: str, golden: Golden) -> None:
    """Lines of new nodes, and of what reads them."""
    _, model, result = rewritten("llava", text)
    marks = (f".{name}", name.replace("-", "_"), "ficoco-v.", "reduction.")
    start = ("function", "metadata trtpass", "output", "stream")
    every = {line: re.sub(r"\[[^]]*\]", "", line) for line in text_of(model).splitlines()}  # names of sizes out
    lines = [line for line, bare in every.items() if line.startswith(start) or any(mark in bare for mark in marks)]
    assert len(lines) > 10 and result.modified
    golden(f"multimodal.{name}", "\n".join(lines) + "\n")
