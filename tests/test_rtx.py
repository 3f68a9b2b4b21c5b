"""The tensorrt-rtx target up to execution: explicit masks against ONNX Runtime, plans really built, every refusal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from families import FAMILIES, Exported

from tests import tiny
from trtpass import io, passes, rtx
from trtpass.canonicalize import canonicalize
from trtpass.errors import InputError
from trtpass.ir import make_node
from trtpass.passes.cache import insert_cache
from trtpass.passes.explicit_masks import ExplicitMasks, explicit_masks
from trtpass.passes.fresh_cache import concat_fresh_cache
from trtpass.passes.turing import products_as_sums

CAPACITY = 16
builds = pytest.mark.tensorrt


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("tensorrt") and not rtx.available():
        pytest.skip(f"tensorrt-rtx is not installed: {rtx.INSTALL}")


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def decode_feeds(model: ir.Model, tokens: int, past: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    feeds = {
        "input_ids": rng.integers(0, 64, (len(past), tokens)),
        "lengths": np.full(len(past), tokens, np.int32),
        "past_lengths": np.array(past, np.int32),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past."):
            shape = [len(past), *(int(d) for d in list(value.shape or [])[1:])]  # type: ignore[arg-type]
            feeds[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def decode(**options: int) -> ir.Model:
    return insert_cache(tiny.decoder(**options), "decode", capacity=CAPACITY, logits="all")  # type: ignore[arg-type]


def profile(model: ir.Model, most: int, batch: int = 2) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Shapes of every input: ``tokens`` from 1 to ``most``, ``batch`` from 1."""
    found = {}
    for value in model.graph.inputs:
        shape = list(value.shape or [])
        sizes = [[n if i == 0 else t if not isinstance(d, int) else d for i, d in enumerate(shape)]
                 for n, t in ((1, 1), (1, min(most, 8)), (batch, most))]  # fmt: skip
        found[str(value.name)] = (sizes[0], sizes[1], sizes[2])
    return found


def written(model: ir.Model, folder: Path, name: str = "graph") -> Path:
    io.save(model, folder / f"{name}.onnx", weights=f"{name}.bin")
    return folder / f"{name}.onnx"


# ---- explicit masks, in ONNX Runtime ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, CAPACITY])
@pytest.mark.parametrize("causal", [1, 0])
def test_explicit_masks_keep_the_numbers(tokens: int, causal: int) -> None:
    model = decode()
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", causal)
    feeds = decode_feeds(model, tokens, [0, (CAPACITY - tokens) // 2, CAPACITY - tokens])
    before = run(model, feeds)
    assert explicit_masks(model) == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = run(model, feeds)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5, rtol=1e-5)
    feeds["past_lengths"] = feeds["past_lengths"][::-1].copy()
    assert tokens == CAPACITY or np.abs(run(model, feeds)[0] - after[0]).max() > 1e-2  # the lengths matter


def test_one_mask_serves_all_layers_and_causality_leaves_attention() -> None:
    model = decode(layers=3)
    result = ExplicitMasks()(model)
    assert result.modified
    attentions = [n for n in model.graph if n.op_type == "Attention"]
    assert len({n.inputs[3] for n in attentions}) == 1
    assert all(len(n.inputs) == 4 and "is_causal" not in n.attributes for n in attentions)
    assert not ExplicitMasks()(model).modified


def test_prefill_keeps_causality() -> None:
    model = insert_cache(tiny.decoder(), "prefill", capacity=CAPACITY)
    assert explicit_masks(model) == 0
    assert all(n.attributes["is_causal"].as_int() == 1 for n in model.graph if n.op_type == "Attention")


def test_symbolic_capacity_is_refused() -> None:
    with pytest.raises(InputError, match="symbolic capacity 'capacity'"):
        explicit_masks(insert_cache(tiny.decoder(), "decode"))


def test_fresh_cache_by_concat_keeps_the_numbers() -> None:
    model = insert_cache(tiny.decoder(), "prefill", capacity=CAPACITY, logits="all")
    feeds = decode_feeds(model, 5, [0, 0])
    del feeds["past_lengths"]
    before = run(model, feeds)
    assert concat_fresh_cache(model) == 4
    for one, other in zip(before, run(model, feeds), strict=True):
        np.testing.assert_array_equal(other, one)
    assert concat_fresh_cache(decode()) == 0  # written at past_lengths


def test_products_as_sums_keep_the_numbers() -> None:
    a, b = ir.val("a", ir.DataType.FLOAT, ["n", 2, "m", 4]), ir.val("b", ir.DataType.FLOAT, [2, 4, "k"])
    out = make_node("MatMul", [a, b], [("y", ir.DataType.FLOAT, ["n", 2, "m", "k"])])
    model = ir.Model(ir.Graph([a, b], out.outputs, nodes=[out], opset_imports={"": 24}), ir_version=10)
    rng = np.random.default_rng(0)
    feeds = {"a": rng.standard_normal((3, 2, 5, 4), np.float32), "b": rng.standard_normal((2, 4, 7), np.float32)}
    [before] = run(model, feeds)
    assert products_as_sums(model) == 1
    assert [v.name for v in model.graph.outputs] == ["y"]
    [after] = run(model, feeds)
    np.testing.assert_allclose(after, before, atol=1e-6, rtol=1e-5)


def test_rewritten_graph_lowered_to_half_agrees_with_itself_in_single() -> None:
    """Static bodies in float16 against the same graph in float32, where every token is kept: one rounding apart."""
    model = tiny.decoder()
    passes.parse("token-sparse:coverage=0,min_tokens=0,window=4,layers=all")(model)
    tokens = np.random.default_rng(5).integers(0, 64, (2, 24))
    feeds = {"input_ids": tokens, "lengths": np.array([24, 17], np.int32)}
    from trtpass.passes.lower import lower

    [single] = run(lower(model, "portable").model, feeds)[:1]
    [half] = run(rtx.lower(model), feeds)[:1]
    assert half.dtype == np.float16
    difference = np.abs(half[0].astype(np.float32) - single[0])
    assert difference.max() <= 0.03 * np.abs(single).max()


def test_inputs_that_do_nothing_are_dropped_and_named() -> None:
    model = insert_cache(tiny.decoder(), "decode", capacity=CAPACITY, logits="all")
    lowered = rtx.lower(model)
    assert [str(v.name) for v in model.graph.inputs][:3] == ["input_ids", "lengths", "past_lengths"]
    assert [str(v.name) for v in lowered.graph.inputs][:2] == ["input_ids", "past_lengths"]
    assert lowered.metadata_props["trtpass.dropped_inputs"] == "lengths"
    last = rtx.lower(insert_cache(tiny.decoder(), "decode", capacity=CAPACITY))
    assert "trtpass.dropped_inputs" not in last.metadata_props


# ---- what a build refuses, before TensorRT sees it -------------------------------------------------------------------


def refused(path: Path, match: str, **options: object) -> None:
    target = path.with_name("refused.plan")
    present = set(path.parent.iterdir())
    with pytest.raises(InputError, match=match):
        rtx.build_plan(path, target, **{"profile": {}, "compute_capabilities": ["SM89"], **options})  # type: ignore[arg-type]
    assert set(path.parent.iterdir()) == present  # no plan, no temporary file


@builds
def test_refusals_before_the_parser(tmp_path: Path) -> None:
    model = decode()
    refused(written(model, tmp_path), r"nonpad_kv_seqlen, which the parser silently ignores: .*Attention")
    symbolic = insert_cache(tiny.decoder(), "prefill")
    refused(written(symbolic, tmp_path), "TensorScatter over a cache of symbolic length 'capacity'")
    sparse = tiny.decoder()
    passes.parse("token-sparse:min_tokens=0")(sparse)
    sparse.functions.clear()
    refused(written(sparse, tmp_path), r"trtpass::ColumnMass is not standard, has no body, and is no plugin")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07garbage")
    refused(tmp_path / "broken.onnx", "cannot be read as ONNX")
    refused(tmp_path / "absent.onnx", "cannot be read as ONNX")
    refused(tmp_path / "absent.onnx", "compute capabilities SM90", compute_capabilities=["SM90"])
    refused(tmp_path / "absent.onnx", "compute capabilities none", compute_capabilities=[])


def test_missing_package_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "available", lambda: False)
    refused(written(tiny.decoder(), tmp_path), r"tensorrt-rtx is not installed[\s\S]*trtpass\[rtx\]")


# ---- what TensorRT says ----------------------------------------------------------------------------------------------


@builds
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_plan_for_every_architecture(phase: str, tmp_path: Path) -> None:
    model = rtx.lower(insert_cache(tiny.decoder(), phase, capacity=64))
    seen: list[tuple[str, float]] = []
    report = rtx.build_plan(
        written(model, tmp_path), tmp_path / "a.plan", profile=profile(model, 32),
        progress=lambda phase, done: seen.append((phase, done)),
    )  # fmt: skip
    data = (tmp_path / "a.plan").read_bytes()
    import hashlib

    assert (report.bytes, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert report.compute_capabilities == rtx.SMS
    assert (report.attentions, report.decomposed) == (2, False)
    assert set(report.inputs) == {v.name for v in model.graph.inputs}
    assert report.inputs["past.0.key"] == "HALF"
    assert report.layers > 50 and report.seconds > 0 and report.peak_memory > 1 << 26 and report.activation_memory > 0
    assert seen[0] == ("Parsing", 0.0) and seen[-1][1] == 1.0
    assert not list(tmp_path.glob(".*"))


@builds
@pytest.mark.parametrize("options", ["mode=repo,max_keep=0.5", "mode=paper,select=group"])
def test_rewritten_plan_with_static_bodies(options: str, tmp_path: Path) -> None:
    model = tiny.decoder()
    passes.parse(f"token-sparse:layers=all,{options}")(model)
    lowered = rtx.lower(insert_cache(model, "prefill", capacity=8192))
    report = rtx.build_plan(
        written(lowered, tmp_path), tmp_path / "a.plan", profile=profile(lowered, 8192, batch=1),
        compute_capabilities=["SM75", "SM120"],
    )  # fmt: skip
    assert (report.attentions, report.decomposed) == (2, False)
    scores = 4 * 8192 * 8192 * 2  # bytes of one layer's S x S scores in float16
    assert report.activation_memory < scores / 4  # nothing of size S x S is materialised


@builds
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_every_family_for_every_architecture(
    family: str, tiny_export: Callable[[str], Exported], tmp_path: Path
) -> None:
    """The regression test of our static bodies: the one real TensorRT compiler that runs without a GPU."""
    dense = tiny_export(family).model.clone()
    canonicalize(dense)
    rewritten = dense.clone()
    passes.parse("token-sparse:layers=all,min_tokens=16,window=8,max_keep=0.5")(rewritten)
    for phase, source in (("prefill", rewritten), ("decode", dense)):
        lowered = rtx.lower(insert_cache(source, phase, capacity=256))
        path = written(lowered, tmp_path, phase)
        report = rtx.build_plan(path, tmp_path / f"{phase}.plan", profile=profile(lowered, 128))
        assert report.compute_capabilities == rtx.SMS
        assert (report.attentions, report.decomposed) == (2, False)


@builds
def test_attention_without_a_fused_kernel_is_decomposed_and_said(tmp_path: Path) -> None:
    model = rtx.lower(insert_cache(tiny.decoder(layers=1, head_dim=8), "prefill", capacity=32))
    report = rtx.build_plan(
        written(model, tmp_path), tmp_path / "a.plan", profile=profile(model, 32), compute_capabilities=["SM86"]
    )
    assert report.decomposed


@builds
def test_an_input_that_reaches_no_output_fails_the_build(tmp_path: Path) -> None:
    model = rtx.lower(tiny.decoder(layers=1))
    model.graph.inputs.append(ir.val("forgotten", ir.DataType.INT32, ["batch"]))
    refused(written(model, tmp_path), "1 network inputs unused: forgotten", profile=profile(model, 8))
    model = rtx.lower(tiny.decoder(layers=1))
    dead = ir.val("forgotten", ir.DataType.INT32, ["batch"])
    model.graph.inputs.append(dead)
    model.graph.append(make_node("Neg", [dead], [("nothing", ir.DataType.INT32, ["batch"])]))
    refused(written(model, tmp_path), "1 network inputs unused: forgotten", profile=profile(model, 8))


@builds
def test_parser_errors_are_collected(tmp_path: Path) -> None:
    model = rtx.lower(tiny.decoder(layers=1))
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
    refused(written(model, tmp_path), "cannot read .*Attention.*softcap is not supported", profile=profile(model, 8))


@builds
def test_profiles_that_do_not_fit(tmp_path: Path) -> None:
    model = rtx.lower(tiny.decoder(layers=1))
    path = written(model, tmp_path)
    refused(path, "the profile lacks input_ids and names other in vain", profile={"other": ([1], [1], [1])})
    refused(path, r"the shape \[1\]", profile={"input_ids": ([1], [1], [1])})
    refused(path, "min <= opt <= max", profile={"input_ids": ([1, 4], [1, 2], [1, 8])})


@builds
def test_a_process_that_dies_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'assertion failed' >&2\nkill -SEGV $$\n")
    dying.chmod(0o755)
    model = rtx.lower(tiny.decoder(layers=1))
    path = written(model, tmp_path)
    monkeypatch.setattr(sys, "executable", str(dying))
    refused(path, r"process ended \(exit code -11\).*assertion failed", profile=profile(model, 8))


@builds
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    model = rtx.lower(tiny.decoder(layers=1))
    path = written(model, tmp_path)
    present = set(tmp_path.iterdir())

    def stop(phase: str, done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtx.build_plan(path, tmp_path / "a.plan", profile=profile(model, 8), progress=stop)
    assert set(tmp_path.iterdir()) == present


@builds
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rtx.lower(tiny.decoder(layers=1))
    path = written(model, tmp_path)
    real: Callable[..., dict[str, object]] = rtx._run

    def onto_full_disk(library: str, request: dict[str, object], progress: object) -> dict[str, object]:
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            return real(library, {**request, "descriptor": full}, progress)
        finally:
            os.close(full)

    monkeypatch.setattr(rtx, "_run", onto_full_disk)
    refused(path, "disk is full while writing", profile=profile(model, 8))
