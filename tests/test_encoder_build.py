"""Engines of encoders: what a folder holds, what its manifest claims, plans of fixed sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tiny_vit import vit
from tests.vit_engines import TOME, images, vit_engine, vit_file
from trtpass import encoder_build, encoder_checks, io, rtx
from trtpass.build import Request, build
from trtpass.encoder_choices import MARGIN, flips
from trtpass.encoder_engine import EncoderEngine
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Manifest, render
from trtpass.passes.lower import Lowered
from trtpass.reduction import definition
from trtpass.runtime import Engine
from trtpass.trt.lower import faults, plugin_nodes
from trtpass.validate import validate

Build = Callable[..., tuple[Manifest, Path]]


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``built(*passes)``: see ``vit_engine``."""
    return partial(vit_engine, tmp_path_factory)


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_file(tmp_path_factory)


def original(file: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return encoder_checks.session(file).run(None, feed)


# ---- what is built --------------------------------------------------------------------------------------------------


def test_a_file_without_tokens_in_is_built_dense(built: Build, file: Path) -> None:
    manifest, folder = built(own=True)
    assert manifest.kind == "encoder" and manifest.passes == [] and manifest.context == 0
    assert manifest.inputs == {"image": "float32 [batch, 3, 24, 24]"}
    assert manifest.outputs == {"features": "float32 [batch, 37, 16]"}
    names = {"dense.onnx", "model.onnx", "engine.onnx", "weights.bin", "inputs.json", "outputs.json"}
    assert {a.path for a in manifest.artifacts} == names
    assert {p.name for p in folder.iterdir()} == {*names, "manifest.json", ".trtpass"}
    assert {name: check.status for name, check in manifest.checks.items()} == {
        "export": "passed", "rewrite": "not_run", "engine": "passed",
    }  # fmt: skip
    assert "the given ONNX file" in manifest.checks.export.reason
    for rows in (1, 3):
        (expected,) = original(file, images(rows))
        np.testing.assert_allclose(Engine.open(folder).run(images(rows))["features"], expected, atol=1e-5)


@pytest.mark.parametrize(("passes", "target", "head"), [
    (TOME, "cpu", "tokens"),
    ("evit:keep=0.7,layers=0", "portable", "cls"),
])  # fmt: skip
def test_a_shorter_stream_is_proved_and_counted(built: Build, passes: str, target: str, head: str) -> None:
    manifest, folder = built(passes, target=target, head=head)
    assert [check.status for _, check in manifest.checks.items()] == ["passed"] * 3, manifest.checks
    for _, check in manifest.checks.items():
        assert check.max_abs is not None and check.max_abs < 1e-4 and "2x3x24x24" in check.tolerance
    assert manifest.checks.rewrite.flipped == 0.0 and manifest.checks.engine.flipped == 0.0
    (record,) = manifest.passes
    after = 33 if passes == TOME else 28  # 37 - 4; the class token, ceil(0.7 * 36), and the fused one
    assert record.tokens == [37, after] and record.layers == [0]
    assert record.kept == pytest.approx(after / 37, abs=1e-6) and record.pruned == pytest.approx(
        1 - after / 37, abs=1e-6
    )
    table = _text(render(manifest, folder))
    assert f"tokens 37 -> {after}" in table and f"kept {after / 37:.1%}" in table
    made = Engine.open(folder).run(images(3))
    assert list(made) == list(manifest.outputs)
    if head == "cls":
        assert made["logits"].shape == (3, 5) and made["token_owner"].shape == (3, 37)
    else:
        assert made["features"].shape == (3, 37, 16)


def _text(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return str(capture.get())


def test_examples_are_in_polygraphys_form_and_of_the_rewritten_graph(built: Build) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    _, folder = built(TOME)
    (feed,) = load_json(str(folder / "inputs.json"))
    results = RunResults.load(str(folder / "outputs.json"))
    (stored,) = next(iter(results))[1]
    np.testing.assert_allclose(EncoderEngine.open(folder).run(feed)["features"], stored["features"], atol=1e-5)


def test_nothing_removed_proves_nothing(built: Build) -> None:
    manifest, _ = built("tome:r=0")
    assert manifest.checks.rewrite.status == "not_run" and manifest.checks.engine.status == "passed"
    assert manifest.passes[0].kept is None and manifest.passes[0].sites == 0


# ---- what a manifest claims -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(built: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built(TOME)[1], tmp_path / "engine"))


def test_validate_repeats_the_checks_of_the_folder(copy: Path) -> None:
    said = json.loads((copy / "manifest.json").read_text())
    said["checks"]["engine"] = {"status": "failed"}
    (copy / "manifest.json").write_text(json.dumps(said))
    assert not validate(copy).failed
    assert Manifest.read(copy).checks.engine.status == "passed"
    (copy / "engine.onnx").write_bytes((copy / "dense.onnx").read_bytes())
    with pytest.raises(CheckFailed, match=r"'engine\.onnx' has changed"):
        validate(copy)


def test_another_original_fails_the_export_check(copy: Path, tmp_path: Path) -> None:
    io.save(vit(2, seed=1), tmp_path / "other.onnx")
    checks = validate(copy, str(tmp_path / "other.onnx"))
    assert checks.failed == ["export"] and "outputs differ" in checks.export.reason


def test_a_wrong_engine_fails_its_check(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = encoder_checks.lower

    def wrong(model: ir.Model, target: str, kernels: bool) -> Lowered:
        for node in model.graph:
            if node.op_type == "Attention":
                node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        return right(model, target, kernels)

    monkeypatch.setattr(encoder_checks, "lower", wrong)
    assert validate(copy).failed == ["engine"]


@pytest.mark.parametrize("wrong", ["tokens", "keep"])
def test_a_site_that_is_not_its_definition_fails(copy: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = definition.reduce_row

    def other(*arguments: Any) -> Any:
        step = right(*arguments)
        if wrong == "tokens":
            step.row.tokens *= 1.01
        else:
            step.keep = step.keep.flip(0)
        return step

    monkeypatch.setattr(definition, "reduce_row", other)
    checks = validate(copy)
    assert checks.failed == ["rewrite"]
    assert ("outputs differ" if wrong == "tokens" else "from the cut") in checks.rewrite.reason


def test_flips_are_measured_from_the_cut() -> None:
    score = np.array([[np.inf, 4.0, 3.0, 2.9999, 1.0]], np.float32)  # range 3, cut 3
    keep = np.array([[1, 1, 1, 0, 0]], np.int32)

    def against(other: list[int]) -> Any:
        return flips({0: {"keep": np.array([other], np.int32)}}, {0: {"keep": keep, "score": score}})

    same, near, far, protected = (
        against(o) for o in ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 1, 0], [0, 1, 1, 1, 0])
    )
    assert (same.flipped, same.worst, same.share) == (0, 0.0, 0.0)
    assert near.flipped == 2 and near.share == 2 / 5 and near.worst < MARGIN
    assert far.flipped == 2 and far.worst == pytest.approx(1 / 3)
    assert protected.worst == float("inf")
    merged = {0: {"keep": keep, "score": score, "target": np.array([[0, 1]], np.int32)}}
    other = {0: {"keep": keep, "target": np.array([[0, 2]], np.int32)}}
    assert flips(other, merged).flipped == 1 and flips(other, merged).decisions == 7


@pytest.mark.parametrize("step", ["kind_of", "lower", "EncoderLadder", "save_example"])
def test_a_failure_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(encoder_build, step, fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        build(Request(str(file), [], out=tmp_path / "engines"))
    assert [p for p in (tmp_path / "engines").rglob("*") if not p.is_dir() or p.name.startswith(".")] == []


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "passes",
    [[], [TOME], ["evit:keep=0.7,layers=0"], ["ficoco-v:keep=0.8,layers=0"], ["scc:tau=0.3,max_keep=0.6,layer=0"]],
)
def test_plans_of_fixed_sizes_for_two_generations(tmp_path: Path, passes: list[str]) -> None:
    if not rtx.available():
        pytest.skip(f"tensorrt-rtx is not installed: {rtx.INSTALL}")
    io.save(vit(1 + (passes == [TOME])), tmp_path / "vit.onnx")  # with tome the next block has a mask
    batches = [1] if passes else [1, 3]
    request = Request(str(tmp_path / "vit.onnx"), passes, "tensorrt-rtx", ("89", "120"), tmp_path / "engines")
    manifest, folder = build(replace(request, sizes={"batch": batches}))
    assert manifest.sm == ["SM89", "SM120"] and manifest.variants == [{"batch": n} for n in batches]
    assert {p.name for p in folder.glob("*.plan")} == {f"engine.batch{n}.plan" for n in batches}
    for n in batches:
        graph = onnx.load(folder / f"engine.batch{n}.onnx", load_external_data=False).graph
        (port,) = graph.input
        assert [d.dim_value for d in port.type.tensor_type.shape.dim] == [n, 3, 24, 24]
        assert not {node.domain for node in graph.node} - {""}
    assert manifest.checks.export.status == "passed" and not manifest.checks.failed
    assert manifest.checks.rewrite.status == ("passed" if passes else "not_run")
    assert manifest.checks.engine.status == "not_run" and "GPU" in manifest.checks.engine.reason
    assert "equal within" in manifest.checks.engine.reason
    with pytest.raises(InputError, match="TARGET=cpu"):
        Engine.open(folder)


def test_graphs_for_tensorrt_are_written_where_no_plan_can_be_built(file: Path, tmp_path: Path) -> None:
    manifest, folder = build(Request(str(file), [TOME], "tensorrt", ("90",), tmp_path))
    graph = io.load(folder / "engine.batch1.onnx")
    assert {"RowDirections", "MatchRows"} <= {node.op_type for node in plugin_nodes(graph)}  # BipartiteMatch
    assert faults(graph) == [] and not manifest.checks.failed
    if manifest.unbuilt:
        assert manifest.unbuilt in manifest.checks.engine.reason


def test_a_wrong_graph_of_a_plan_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = encoder_checks.EncoderLadder.engine
    right = encoder_checks.inline_bodies

    def wrong(model: ir.Model, kind: str) -> None:
        next(n for n in model.graph if n.op_type == "Attention").attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        right(model, kind)

    monkeypatch.setattr(encoder_checks, "inline_bodies", wrong)
    monkeypatch.setattr(encoder_checks.EncoderLadder, "engine", lambda self, *_: ladder(self, "tensorrt-rtx"))
    checks = validate(copy)
    assert checks.failed == ["engine"] and "A plan's graph" in checks.engine.reason


def test_plans_are_named_by_their_sizes() -> None:
    assert encoder_build.stem({"batch": 8, "height": 64}) == "engine.batch8-height64"
    assert encoder_build.stem({}) == "engine.fixed"  # engine.onnx is what ONNX Runtime runs
