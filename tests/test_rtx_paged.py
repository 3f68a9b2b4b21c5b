"""Engines with a paged cache on tensorrt-rtx: lowered graphs against float32 in ONNX Runtime, plans really built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from families import Exported
from safetensors.numpy import save_file
from test_rtx import run, written

from trtpass import passes, rtx
from trtpass.canonicalize import canonicalize
from trtpass.passes.lower import lower
from trtpass.passes.paged_cache import PagedCacheOptions, insert_paged_cache

LAYERS, HEADS, WIDTH = 2, 2, 96  # of tests/families.py
PAGE, ENTRIES, BATCH, TOKENS = 16, 4, 2, 40
POOL = BATCH * HEADS * ENTRIES
PLANS = {  # snapkv keeps all that is decoded; the pools of qwen3 have fixed sizes
    "prefill": ("qwen3:kvzap", "llama:snapkv"),
    "decode": ("llama:kvzap-mlp",),
}
builds = pytest.mark.tensorrt


@pytest.fixture
def graph(tiny_export: Callable[[str], Exported], tmp_path: Path) -> Callable[..., ir.Model]:
    """``graph(phase, policy, family)``: a tiny model's graph of one phase, with a policy; ``fixed``: sizes of pools."""

    def make(
        phase: str, policy: str = "kvzap", family: str = "llama", threshold: float = 0.0, fixed: bool = True
    ) -> ir.Model:
        model = tiny_export(family).model.clone()
        canonicalize(model)
        name, _, kind = policy.partition("-") if policy.startswith("kvzap") else (policy, "", "")
        options = f",weights={surrogate(tmp_path, kind == 'mlp')},threshold={threshold}" if name == "kvzap" else ""
        if phase == "prefill" or name != "snapkv":
            passes.parse(f"{name}:window=8,sinks=2{options}")(model)
        pools = {"pages": POOL, "entries": ENTRIES} if fixed else {}
        return insert_paged_cache(model, PagedCacheOptions(phase, PAGE, window=8, sinks=2, logits="all", **pools))

    return make


def surrogate(folder: Path, mlp: bool) -> Path:
    """A checkpoint of random weights; an MLP's are 12 wide inside."""
    rng = np.random.default_rng(0)
    sizes = {"0.": (WIDTH // 8, WIDTH), "2.": (HEADS, WIDTH // 8)} if mlp else {"": (HEADS, WIDTH)}
    arrays = {}
    for key, (out, into) in ((f"layers.{i}.{name}", size) for i in range(LAYERS) for name, size in sizes.items()):
        arrays[f"{key}weight"] = (rng.standard_normal((out, into)) / np.sqrt(into)).astype(np.float32)
        arrays[f"{key}bias"] = (rng.standard_normal(out) * 0.1).astype(np.float32)
    save_file(arrays, folder / "surrogate.safetensors")
    return folder / "surrogate.safetensors"


def sizes(model: ir.Model, tokens: int, batch: int) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """The profile of a graph: shapes of each dynamic input at 1 row, token and page, in between, and at most."""
    cache = [{"pages": n, "free": n, "entries": m} for n, m in ((1, 1), (POOL, ENTRIES), (POOL, ENTRIES))]
    calls = [{"batch": n, "tokens": t} for n, t in ((1, 1), (1, min(tokens, 8)), (batch, tokens))]
    found = {}
    for value in model.graph.inputs:
        shape = list(value.shape or [])
        if not all(isinstance(d, int) for d in shape):
            of = [{**one, **two} for one, two in zip(cache, calls, strict=True)]
            made = [[d if isinstance(d, int) else known[str(d.value)] for d in shape] for known in of]
            found[str(value.name)] = (made[0], made[1], made[2])
    return found


# ---- the lowered graphs, in ONNX Runtime -----------------------------------------------------------------------------


def named(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name; pools in the type that the graph has."""
    wanted = {str(v.name): v.dtype.numpy() for v in model.graph.inputs if v.dtype is not None}
    made = run(model, {name: x.astype(wanted[name]) for name, x in feeds.items()})
    return {str(v.name): x for v, x in zip(model.graph.outputs, made, strict=True)}


def clear_threshold(model: ir.Model, feeds: dict[str, np.ndarray]) -> float:
    """In the middle of the widest gap between the scores of a graph: no rounding moves a token across it."""
    made = [v for node in model.graph for v in node.outputs if str(v.name).endswith("kvzap.score")]
    model.graph.outputs.extend(made)
    outputs = named(lower(model, "portable").model, feeds)
    scores = np.sort(np.concatenate([outputs[str(v.name)].ravel() for v in made]))
    some = scores[len(scores) // 3 : 2 * len(scores) // 3]
    at = int(np.diff(some).argmax())
    return float(some[at] + some[at + 1]) / 2


def first_feeds() -> dict[str, np.ndarray]:
    pools = {f"past.{i}.{role}": np.full((POOL, PAGE, 16), 7.0) for i in range(LAYERS) for role in ("key", "value")}
    free = np.stack([np.random.default_rng(i).permutation(POOL) for i in range(LAYERS)])
    ids = np.random.default_rng(3).integers(0, 128, (BATCH, TOKENS))
    return {"input_ids": ids, "lengths": np.array([TOKENS, 29]), "free": free, **pools}


def next_feeds(before: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One more token in each row, behind what its owners hold, on a page of their own where that is full."""
    at = before["slot"].max(-1) + 1  # [L, B, Hkv]
    table = np.full((LAYERS, BATCH, HEADS, ENTRIES), -1)
    table[..., : before["page_table"].shape[-1]] = before["page_table"]
    for layer, row, head in np.ndindex(*at.shape):
        entry = at[layer, row, head] // PAGE
        if table[layer, row, head, entry] < 0:
            table[layer, row, head, entry] = min(set(feeds["free"][layer]) - set(table[layer].ravel()))
    pools = {name.replace("present", "past"): x for name, x in before.items() if name.startswith("present")}
    asked = {"input_ids": np.array([[5], [9]]), "lengths": np.ones(BATCH), "past_lengths": feeds["lengths"]}
    return {**asked, "page_table": table, "slot": at[..., None], "held": at + 1, **pools}


def test_lowered_graphs_agree_with_single_precision(graph: Callable[..., ir.Model]) -> None:
    """Static bodies in float16 against dynamic ones in float32, a prefill and a step: where tokens go is equal."""
    feeds = first_feeds()
    threshold = clear_threshold(graph("prefill"), feeds)
    for phase in ("prefill", "decode"):
        model = graph(phase, threshold=threshold)
        single, half = named(lower(model, "portable").model, feeds), named(rtx.lower(model), feeds)
        assert half["logits"].dtype == np.float16
        for name in single:
            if single[name].dtype.kind == "i":
                np.testing.assert_array_equal(half[name], single[name], err_msg=name)
            elif name == "logits":
                valid = np.arange(single[name].shape[1]) < feeds["lengths"][:, None]
                off = np.abs(half[name].astype(np.float32) - single[name])[valid].max()
                assert off <= 0.01 * np.abs(single[name][valid]).max(), off
            else:
                np.testing.assert_allclose(half[name], single[name], atol=0.05, rtol=0.05, err_msg=name)
        if phase == "prefill":
            kept = (single["slot"] >= 0).sum((1, 2, 3))
            assert (kept > 0).all() and (kept < HEADS * feeds["lengths"].sum()).all()  # each layer evicts something
            feeds = next_feeds(single, feeds)


# ---- what TensorRT says ----------------------------------------------------------------------------------------------


@pytest.fixture
def _package() -> None:
    if not rtx.available():
        pytest.skip(f"tensorrt-rtx is not installed: {rtx.INSTALL}")


@builds
@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize(("phase", "which"), [(phase, which) for phase, some in PLANS.items() for which in some])
def test_plans_with_a_paged_cache(graph: Callable[..., ir.Model], phase: str, which: str, tmp_path: Path) -> None:
    """For every architecture, all inputs in use; a decode plan takes chunks of a prompt too."""
    family, policy = which.split(":")
    model = rtx.lower(graph(phase, policy, family, fixed=family == "qwen3"))
    report = rtx.build_plan(written(model, tmp_path), tmp_path / "a.plan", profile=sizes(model, TOKENS, BATCH))
    assert report.compute_capabilities == rtx.SMS
    assert (report.attentions, report.decomposed) == (LAYERS, False)
    shared = {"free"} if phase == "prefill" else {"past_lengths", "page_table", "slot", "held"}
    assert {"input_ids", "lengths", *shared} == {name for name in report.inputs if not name.startswith("past.")}
    assert report.inputs["past.1.value"] == "HALF" and len(report.inputs) == 2 + len(shared) + 2 * LAYERS
