"""fastv, ficoco-l and random-span as graphs: twin = rewritten graph, rows do not know each other, bad requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from families import Exported
from proofs import edit, ladder, raised

from trtpass import passes
from trtpass.compare import run_onnx
from trtpass.errors import AnchorError, InputError
from trtpass.reduction.decoder import DROPPED, SPAN_KEY, Shortened, Span
from trtpass.variants import expose

LENGTHS = [40, 27, 33]
METHODS = [
    "fastv:span=3:20,layer=1",
    "fastv:span=3:-5,layer=1,ratio=0.7",
    "fastv:span=3:20,layer=1,ratio=1",
    "random-span:span=3:-5,layer=1,seed=3",
    "ficoco-l:span=3:20,layers=0-1,keep=0.7",
    "ficoco-l:span=0:-5,layers=0-1,keep=0.6,eps=0.9",
    "ficoco-l:span=3:-30,layers=0,keep=0.5",  # one row has nothing of the span
]


@pytest.fixture(scope="module")
def llama(tiny_export: Callable[[str], Exported]) -> Exported:
    return tiny_export("llama")


@pytest.mark.parametrize("text", METHODS)
def test_twin_is_rewritten_graph(llama: Exported, text: str) -> None:
    check = ladder(llama, [text], LENGTHS).rewrite()
    assert check.status == "passed" and check.flipped == 0.0, check
    assert check.max_abs is not None and check.max_abs < 1e-4 and "3x40 tokens" in check.tolerance


def test_other_norms_and_no_padding(tiny_export: Callable[[str], Exported]) -> None:
    check = ladder(tiny_export("qwen3"), [METHODS[5]], [40]).rewrite()
    assert check.status == "passed" and check.flipped == 0.0, check


def test_a_wrong_graph_fails(llama: Exported) -> None:
    wrong = ladder(llama, [METHODS[4]], LENGTHS)
    edit(wrong.rewritten, "model.layers.0.self_attn.q_proj.weight", 3.0)
    assert wrong.rewrite().status == "failed"
    other = ladder(llama, [METHODS[4]], LENGTHS)
    other.passes = [passes.parse(METHODS[4].replace("keep=0.7", "keep=0.7,beta=0.1"))]
    assert "from the cut" in other.rewrite().reason  # the twin would have chosen others


@pytest.mark.parametrize("text", [METHODS[1], METHODS[5]])
def test_rows_of_a_batch_are_as_alone(llama: Exported, text: str) -> None:
    whole = ladder(llama, [text], LENGTHS)
    graph = whole.rewritten
    together = run_onnx(graph, whole.folder, whole.probe.feed(graph))
    for row, length in enumerate(LENGTHS):
        feed = {
            "input_ids": whole.probe.input_ids[row : row + 1, :length],
            "lengths": whole.probe.lengths[row : row + 1],
        }
        alone = run_onnx(graph, whole.folder, feed)
        np.testing.assert_allclose(alone["logits"][0], together["logits"][row, :length], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(alone[DROPPED][:, 0], together[DROPPED][:, row])


@pytest.mark.parametrize("text", METHODS)
def test_what_stays_is_what_arithmetic_says(llama: Exported, text: str) -> None:
    proof = ladder(llama, [text], LENGTHS)
    graph = proof.rewritten
    sites = proof.results[0].sites
    expose(graph, [site.values["keep"] for site in sites] + [site.values["index"] for site in sites])
    made = run_onnx(graph, proof.folder, proof.probe.feed(graph))
    record = Shortened.read(graph.metadata_props[SPAN_KEY])
    assert record is not None
    held = [[length - n for n in record.lengths(length)] for length in LENGTHS]
    np.testing.assert_array_equal(made[DROPPED].T, held)
    keep, span = made[sites[0].values["keep"]], Span.parse(record.span, "")
    for row, length in enumerate(LENGTHS):
        start, stop = span.of(length)
        inside = int(keep[row, start:stop].sum())
        assert keep[row, :start].all() and keep[row, stop:length].all() and not keep[row, length:].any()
        permille = passes.parse(text).options.permille
        assert inside == ((stop - start) * permille + 500) // 1000


def test_fastv_keeps_what_the_last_token_looks_at(llama: Exported) -> None:
    """Against transformers' own attention probabilities."""
    import torch

    proof = ladder(llama, ["fastv:span=3:30,layer=1"], [40])
    graph, module = proof.rewritten, llama.loaded.module
    name = proof.results[0].sites[0].values["keep"]
    expose(graph, [name])
    keep = run_onnx(graph, proof.folder, proof.probe.feed(graph))[name][0]
    before = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            out = module(torch.from_numpy(proof.probe.input_ids), output_attentions=True)
    finally:
        module.config._attn_implementation = before
    seen = out.attentions[0][0].mean(0)[-1, 3:30].numpy()
    assert set(np.flatnonzero(keep[3:30])) == set(np.argsort(-seen)[:14])  # 27 / 2, half up


@pytest.mark.parametrize(
    "text", ["fastv:span=3:20,layer=1,ratio=0", "ficoco-l:span=3:-5,keep=1", "random-span:span=1:9,layer=1,ratio=0"]
)
def test_dropping_nothing_changes_nothing(text: str) -> None:
    model = tiny.decoder()
    before = ir.to_proto(model).SerializeToString()
    result = passes.parse(text)(model)
    assert not result.modified and "nothing is dropped" in result.near_misses[0]
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv:span=600:4", "is empty"),
        ("fastv:span=4:4", "is empty"),
        ("fastv:span=-4:4", "starts at -4"),
        ("fastv:span=4", "START:STOP"),
        ("fastv:span=4:", "START:STOP"),
        ("fastv:span=4:x", "START:STOP"),
        ("fastv:span=4:-0", "ends with the row"),
        ("fastv:span=4:9999999", "up to"),
        ("fastv:span=1:4,ratio=1.5", "ratio=1.5"),
        ("fastv:span=1:4,layer=0", "layer=0"),
        ("ficoco-l:span=1:4,keep=0", "keep=0"),
        ("ficoco-l:span=1:4,beta=2", "beta=2"),
        ("ficoco-l:span=1:4,gam=-1", "gam=-1"),
        ("ficoco-l:span=1:4,eps=0", "eps=0"),
        ("random-span:span=1:4,seed=-1", "seed=-1"),
    ],
)
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        passes.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv", "no tokens of an image"),
        ("fastv:span=3:20,layer=2", "layer=2 of 2 layers"),
        ("ficoco-l:span=3:20,layers=5", "indices from 0 to 1"),
    ],
)
def test_bad_requests(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        passes.parse(text)(tiny.decoder())


def test_methods_do_not_mix(llama: Exported) -> None:
    sparse = "token-sparse:coverage=0.3,window=4,min_tokens=8,layers=1"
    for first, second in ((METHODS[0], sparse), (METHODS[0], METHODS[5]), (sparse, METHODS[0])):
        model = raised(llama)
        passes.parse(first)(model)
        with pytest.raises(InputError, match="one"):
            passes.parse(second)(model)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(AnchorError, match="not causal"):
        passes.parse(METHODS[0])(tiny.decoder(causal=False))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cuts": 3}', '{"cuts": [{"layer": "x"}]}', "null"])
def test_a_broken_property(text: str) -> None:
    with pytest.raises(InputError, match="build again"):
        Shortened.read(text)
