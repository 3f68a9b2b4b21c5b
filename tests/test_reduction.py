"""Encoders with fewer tokens: twin = rewritten graph for every method and family, identity, sizes, what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from encoders import FAMILIES, TOKENS, Tiny, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import Golden
from test_golden import text as text_of
from typer.testing import CliRunner

from trtpass import io
from trtpass.anchors import find
from trtpass.cli import app
from trtpass.encoder_export import export_encoder
from trtpass.errors import AnchorError, InputError
from trtpass.passes import PassResult, all_methods, parse
from trtpass.reduction.definition import Row, open_row, reduce_row, restore_row
from trtpass.reduction.options import Budget, ReductionOptions
from trtpass.variants import expose

Arrays = dict[str, np.ndarray]
MIX = "reduce:filter=evit,correlate=ficoco-v,compress=mean,keep=0.8,layers=all"
TWINS = [
    *((family, "tome:r=3") for family in FAMILIES),
    *((family, "ficoco-v:keep=0.7") for family in ("vit", "dinov2-registers")),
    *((family, "evit:keep=0.6") for family in ("clip", "dinov2-registers")),
    *((family, "scc:tau=0.3") for family in ("dinov2", "whisper")),
    ("whisper", "ficoco-v:keep=0.7,grid=1x24"), ("whisper", "scc-two-step:tau=0.3,group=5"), ("dinov2", MIX),
    ("vit", "random-tokens:r=2"),
]  # fmt: skip
MORE = [  # options, tried on one family
    "tome:r=4,inflect=-1", "tome:r=5+0+2", "tome:r=3,proportional=false", "tome:r=3,restore=none",
    "scc:tau=0.3,restore=none", "reduce:filter=ficoco-v,correlate=tome,compress=size,keep=0.7,layers=1",
    "scc:tau=0.3,max_keep=0.3,proportional=true",
    "reduce:filter=random,correlate=ficoco-v,compress=mean,r=4,proportional=true,eps=0.8,layers=all", "tome:r=3,cls=3",
    "evit:keep=0.6,restore=none", "random-tokens:r=3,restore=grid,grid=5x5",
]  # fmt: skip


@functools.cache
def exported(family: str) -> tuple[Tiny, ir.Model]:
    tiny = tiny_encoder(family)
    return tiny, tiny.export()


def run(model: ir.Model, tiny: Tiny, names: tuple[str, ...] = ()) -> Arrays:
    model = model.clone()
    expose(model, names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = session.run(None, {name: x.numpy() for name, x in tiny.inputs.items()})
    return dict(zip((o.name for o in session.get_outputs()), made, strict=True))


def rewritten(family: str, text: str) -> tuple[Tiny, Any, ir.Model, PassResult]:
    tiny, dense = exported(family)
    step, model = parse(text), dense.clone()
    return tiny, step, model, step(model)


def chosen(result: PassResult, outputs: Arrays, roles: tuple[str, ...]) -> dict[int, Arrays]:
    return {s.layer: {r: outputs[s.values[r]] for r in roles if r in s.values} for s in result.sites}


def check_twin(family: str, text: str) -> Arrays:
    """The twin's own choices are the graph's, and so are its outputs; with what the graph chose forced on it, too."""
    tiny, step, model, result = rewritten(family, text)
    names = [s.values[r] for s in result.sites for r in ("score", "keep", "target", "owner") if r in s.values]
    outputs = run(model, tiny, tuple(names))
    twin = step.twin(tiny.module, result)
    inputs = {name: x.numpy() for name, x in tiny.inputs.items()}
    graph = chosen(result, outputs, ("score", "keep", "target"))
    for forced in (None, chosen(result, outputs, ("keep", "target"))):
        mine = twin.run(inputs, forced)
        for name, value in mine.outputs.items():
            np.testing.assert_allclose(outputs[name], value, atol=2e-5, rtol=1e-4)
        for layer, roles in graph.items():
            for role, array in roles.items():
                np.testing.assert_allclose(mine.selections[layer][role], array, atol=1e-5, err_msg=f"{role} of {layer}")
    shorter = [outputs[s.values["owner"]].max() + 1 < TOKENS[family] for s in result.sites]
    assert all(shorter), "a site that removes nothing proves nothing"
    return outputs


@pytest.mark.parametrize(("family", "text"), TWINS)
def test_twin_equals_the_rewritten_graph(family: str, text: str) -> None:
    check_twin(family, text)


@pytest.mark.parametrize("text", MORE)
def test_options(text: str) -> None:
    check_twin("vit", text)


@pytest.mark.parametrize(
    ("text", "kept"), [("ficoco-v:r=4", 22), ("random-tokens:keep=0.5,layers=1", 14), ("evit:r=5,layers=0", 21)]
)
def test_a_budget_takes_the_place_of_the_presets_own(text: str, kept: int) -> None:
    tiny, _, model, result = rewritten("vit", text)
    keep = run(model, tiny, (result.sites[0].values["keep"],))[result.sites[0].values["keep"]]
    assert keep.sum(1).tolist() == [kept, kept]


@pytest.mark.parametrize("text", ["tome:r=0", "evit:keep=1", "ficoco-v:keep=1", "random-tokens:r=0+0+0"])
def test_identity_leaves_the_graph_alone(text: str) -> None:
    _, _, model, result = rewritten("vit", text)
    assert not result.modified
    assert "nothing is dropped" in result.near_misses[0]
    assert [node.op_type for node in model.graph] == [node.op_type for node in exported("vit")[1].graph]


def test_above_every_cosine_nothing_merges() -> None:
    tiny, _, model, result = rewritten("vit", "scc:tau=1.5")
    assert any("tau=1.5" in w for w in result.warnings)
    np.testing.assert_allclose(
        run(model, tiny)["last_hidden_state"], run(exported("vit")[1], tiny)["last_hidden_state"], atol=5e-6
    )


def test_below_every_cosine_one_token_is_left() -> None:
    tiny, _, model, _ = rewritten("clip", "scc:tau=-2,restore=none")
    outputs = run(model, tiny)
    assert outputs["last_hidden_state"].shape[1] == 2  # the class token is never merged
    assert outputs["token_size"].tolist() == [[1, 25], [1, 25]]


@pytest.mark.parametrize(
    "text", ["tome:r=3", "tome:r=5,inflect=0.5", "scc:tau=0.3", "ficoco-v:keep=0.6", "evit:keep=0.5"]
)
def test_sizes_sum_to_the_number_of_tokens(text: str) -> None:
    tiny, _, model, _ = rewritten("vit", f"{text},restore=none")
    outputs = run(model, tiny)
    np.testing.assert_allclose(outputs["token_size"].sum(1), TOKENS["vit"], rtol=1e-6)
    owner = outputs["token_owner"]
    assert owner.shape == (2, TOKENS["vit"])
    assert owner.max() < outputs["last_hidden_state"].shape[1]
    for b, c in np.ndindex(outputs["token_size"].shape):
        owned = np.flatnonzero(owner[b] == c)
        mean, ends = (owned.mean(), [owned[0], owned[-1]]) if owned.size else (0, [TOKENS["vit"], -1])
        assert outputs["token_position"][b, c] == pytest.approx(mean)
        assert outputs["token_range"][b, c].tolist() == ends


@pytest.mark.parametrize("text", ["tome:r=3", "scc:tau=0.3", "evit:keep=0.6", "ficoco-v:keep=0.7"])
def test_a_row_does_not_depend_on_its_batch(text: str) -> None:
    tiny, _, model, _ = rewritten("dinov2", text)
    together = run(model, tiny)["last_hidden_state"]
    for b in range(2):
        alone = Tiny(tiny.family, tiny.module, {name: x[b : b + 1] for name, x in tiny.inputs.items()})
        np.testing.assert_allclose(run(model, alone)["last_hidden_state"][0], together[b], atol=5e-6)


class Blocks(torch.nn.Module):
    """The blocks of a ViT alone: ``x [B, N, E]`` of any N."""

    def __init__(self) -> None:
        super().__init__()
        inner = tiny_encoder("vit").module
        self.layers, self.norm, self.config = inner.layers, inner.layernorm, inner.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@functools.cache
def any_length() -> tuple[torch.nn.Module, ir.Model]:
    module = Blocks().eval()
    x = torch.randn(2, 21, 32)
    return module, export_encoder(module, {"x": x}, dynamic={"x": {0: "batch", 1: "tokens"}})


@pytest.mark.parametrize(
    "text",
    ["tome:r=3", "evit:keep=0.7,cls=1,restore=none", "scc:tau=0.3", "ficoco-v:keep=0.7,grid=1x64", "random-tokens:r=4"],
)
def test_any_number_of_tokens(text: str) -> None:
    """One graph, whose number of tokens is known only when it runs."""
    module, dense = any_length()
    step, model = parse(text), dense.clone()
    result = step(model)
    for count in (15, 40):
        x = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(count))
        outputs = run(model, Tiny("blocks", module, {"x": x}))
        name = result.plan.outputs[0]
        expected = step.twin(module, result).run({"x": x.numpy()}).outputs[name]
        np.testing.assert_allclose(outputs[name], expected, atol=2e-5, rtol=1e-4)


def test_rows_of_a_batch_lose_different_tokens() -> None:
    tiny, _, model, result = rewritten("vit", "tome:r=6")
    keep = run(model, tiny, (result.sites[0].values["keep"],))[result.sites[0].values["keep"]]
    assert keep.sum(1).tolist() == [20, 20]
    assert (keep[0] != keep[1]).any()


def test_class_token_only_heads_get_no_rows_back() -> None:
    tiny, dense = exported("clip")
    model = dense.clone()
    hidden = model.graph.outputs[0]
    index = ir.Value(name="zero", const_value=ir.tensor(np.array(0, np.int64), name="zero"))
    model.graph.register_initializer(index)
    node = ir.node("Gather", [hidden, index], {"axis": 1})
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "cls", hidden.dtype, ir.Shape(["batch", 32])
    model.graph.append(node)
    model.graph.outputs[:] = [node.outputs[0]]
    result = parse("tome:r=3")(model)
    assert "nothing is restored" in result.notes[0]
    assert not any(n.op_type == "RestoreTokens" for n in model.graph)
    short = run(model, tiny)
    full = step_outputs("tome:r=3,restore=grid", tiny, dense)
    np.testing.assert_allclose(short["cls"], full["last_hidden_state"][:, 0], atol=5e-6)


def step_outputs(text: str, tiny: Tiny, dense: ir.Model) -> Arrays:
    model = dense.clone()
    parse(text)(model)
    return run(model, tiny)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tome:r=13", "drops 13 of 26 tokens"),
        ("tome:r=12+12+12", "site 1 drops 12 of 14"),
        ("tome:r=4+4", "2 figures for 3 layers"),
        ("random-tokens:r=25", "drops 25 of 26 tokens"),
        ("tome:r=-1", "r=-1"),
        ("tome:r=1,keep=0.5", "one of the two"),
        ("ficoco-v:r=2,keep=0.5", "one of the two"),
        ("evit:keep=0", "a share in"),
        ("evit:correlate=tome", "correlate=tome with compress=fuse"),
        ("ficoco-v:eps=1", "0.001 to 0.999"),
        ("ficoco-v:grid=4x4", "grid=4x4 has 16 places"),
        ("ficoco-v:grid=five", "rows x columns"),
        ("reduce:filter=clever", "one of tome, evit"),
        ("scc:layer=3", "layer=3"),
        ("scc:tau=nan", "tau is NaN"),
        ("scc-two-step:group=0", "group=0"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rewritten("vit", text)


def test_a_grid_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(InputError, match="grid=ROWSxCOLUMNS"):
        rewritten("whisper", "ficoco-v")
    with pytest.raises(AnchorError, match="CLS token, and none was found"):
        rewritten("whisper", "evit")


def test_a_decoder_is_refused() -> None:
    import tiny

    with pytest.raises(AnchorError, match="is causal"):
        parse("tome:r=1")(tiny.decoder(layers=2))


def test_a_second_reduction_is_refused() -> None:
    _, _, model, _ = rewritten("vit", "tome:r=2")
    with pytest.raises(InputError, match="shortened by tome"):
        parse("evit")(model)


def test_few_tokens_are_legal_with_a_warning() -> None:
    _, _, _, result = rewritten("vit", "reduce:filter=random,correlate=none,compress=drop,keep=0.04,layers=1")
    assert "below 5%" in result.warnings[0]


def test_where_a_stream_stops_is_said() -> None:
    """Something on the way that needs every token by its place: the message names it."""
    _, dense = exported("vit")
    model = dense.clone()
    last = find(model).blocks[1].residual_out
    assert last is not None
    table = ir.Value(name="table", const_value=ir.tensor(np.ones((1, 26, 32), np.float32), name="table"))
    model.graph.register_initializer(table)
    table.shape = ir.Shape([1, 26, 32])
    users = list(last.uses())
    node = ir.node("Mul", [last, table], name="by_place")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "placed", last.dtype, last.shape
    producer = last.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)
    for user, place in users:
        user.replace_input_with(place, node.outputs[0])
    with pytest.raises(AnchorError, match=r"by_place|found no end|has no residual"):
        parse("tome:r=2,layers=0")(model)


def test_every_preset_says_its_source_and_options() -> None:
    for name in ("tome", "evit", "ficoco-v", "scc"):
        assert "arXiv" in all_methods()[name].source


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(0, 10), st.integers(0, 2), st.integers(0, 2**16))
def test_merging_conserves_what_the_tokens_sum_to(count: int, r: int, cls: int, seed: int) -> None:
    """Size-weighted means: sizes and the weighted sum of tokens stay, whatever merges; every token keeps an owner."""
    generator = torch.Generator().manual_seed(seed)
    x, q, k = (torch.randn(*s, generator=generator) for s in ((count, 8), (2, count, 4), (2, count, 4)))
    r = min(r, max(count - cls, 0) // 2)
    row = Row(x, torch.ones(count), torch.arange(count), torch.arange(count))
    made = reduce_row(row, q, k, 0.5, ReductionOptions(), Budget(cls, 1000, r), cls, 0).row
    assert len(made.tokens) == count - r
    assert float(made.size.sum()) == pytest.approx(count)
    torch.testing.assert_close((made.tokens * made.size[:, None]).sum(0), x.sum(0), atol=1e-4, rtol=1e-4)
    assert bool((made.owner >= 0).all())
    torch.testing.assert_close(made.tokens[:cls], x[:cls])


def test_dropped_tokens_take_their_nearest_neighbour() -> None:
    row = open_row(torch.arange(9.0)[:, None])
    row.owner = torch.tensor([0, -1, 1, -1, -1, -1, 2, -1, 3])  # corners of a 3 x 3 grid
    row.tokens = torch.tensor([[0.0], [2.0], [6.0], [8.0]])
    assert restore_row(row, 0, 3)[:, 0].tolist() == [0, 0, 2, 0, 0, 2, 6, 6, 8]
    assert restore_row(row, 0, 0)[:, 0].tolist() == [0, 0, 2, 2, 2, 6, 6, 6, 8]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tome", "tome:r=5,layers=0"), ("evit", "evit:keep=0.5,layers=1"), ("ficoco-v", "ficoco-v:keep=0.5,layers=2"),
        ("scc", "scc:tau=0.9,layer=1"), ("scc-two-step", "scc-two-step:group=7,layer=1"),
        ("random-tokens", "random-tokens:r=5,layers=2"),
    ],
)  # fmt: skip
def test_golden(name: str, text: str, golden: Golden) -> None:
    """The text of the graph from the first new node on: what is before it is the export."""
    *_, model, result = rewritten("vit", text)
    lines = text_of(model).splitlines()
    label = f"layer{result.sites[0].layer}.{name}"
    new = [
        line
        for line in lines
        if label in line or line.startswith(("function", "metadata trtpass", "output", "reduc", "stream"))
    ]
    golden(f"reduction.{name}", "\n".join(new) + "\n")


def test_rewrite_says_what_was_decided(tmp_path: Path) -> None:
    tiny, dense = exported("clip")
    io.save(dense.clone(), tmp_path / "clip.onnx")
    out = tmp_path / "short.onnx"
    words = ["rewrite", str(tmp_path / "clip.onnx"), "-p", "evit:keep=0.5", "-o", str(out), "--json"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    (record,) = json.loads(ran.stdout)["passes"]
    assert record["name"] == "evit" and len(record["sites"]) == 2
    assert "restore=auto: all rows are restored" in record["notes"][0]
    _, _, model, _ = rewritten("clip", "evit:keep=0.5")
    given = {name: x.numpy() for name, x in tiny.inputs.items()}
    made = ort.InferenceSession(str(out)).run(None, given)[0]
    np.testing.assert_allclose(made, run(model, tiny)["last_hidden_state"], atol=1e-6)
