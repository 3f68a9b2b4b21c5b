"""The tensorrt target up to what needs a GPU: what is missing is said, kernels compile, and the build runs elsewhere.

The build itself is tried with TensorRT-RTX in the place of TensorRT: the same process, the same calls, a real builder,
but no plugins.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("triton", reason="the target tensorrt needs Triton kernels")

from plugins import kernel_ops
from tests import tiny
from trtpass import io, passes, rtx
from trtpass.build import Request, build
from trtpass.cli import main
from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.passes.cache import insert_cache
from trtpass.plans import Source, _profile, _tokens
from trtpass.trt import builder
from trtpass.trt import lower as trt
from trtpass.trt.plugins import ways

SPARSE = "token-sparse:layers=all,min_tokens=8,window=4,coverage=0.3"
STAND_IN = '''
"""TensorRT-RTX under the name of TensorRT, for a process of a test."""
import tensorrt_rtx
from tensorrt_rtx import *
from tensorrt_rtx import __version__

class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config
'''


def prefill(sparse: bool = True) -> ir.Model:
    model = tiny.decoder()
    if sparse:
        passes.parse(SPARSE)(model)
    return insert_cache(model, "prefill", capacity=64)


def written(model: ir.Model, folder: Path) -> Path:
    io.save(model, folder / "graph.onnx", weights="graph.bin")
    return folder / "graph.onnx"


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "installed", lambda: "10.16.0.72")
    monkeypatch.setattr(builder, "gpus", lambda: [("H100", 90)])


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_each_thing_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, with_a_gpu: None) -> None:
    assert builder.missing() == builder.missing(90) == []
    assert builder.missing(89) == ["no GPU here is SM89: there is H100 (SM90)"]
    monkeypatch.setattr(builder, "installed", lambda: "10.14.1.48")
    assert "TensorRT 10.14.1.48 is older than 10.15" in builder.missing()[0]
    monkeypatch.setattr(builder, "installed", lambda: None)
    monkeypatch.setattr(builder, "gpus", lambda: "no NVIDIA driver")
    assert len(builder.missing(90)) == 2
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    assert any("triton is not installed" in words for words in builder.missing())


def test_a_build_says_what_is_missing_and_what_to_use_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "installed", lambda: None)
    path = written(trt.lower(prefill(), 90).model, tmp_path)
    present = set(tmp_path.iterdir())
    words = r"cannot be built here: TensorRT 10.15 .*[\s\S]*TARGET=tensorrt-rtx .* or TARGET=cpu"
    with pytest.raises(InputError, match=words):
        builder.build_plan(path, tmp_path / "a.plan", profiles=[])
    assert set(tmp_path.iterdir()) == present


# ---- the command, on a machine without TensorRT ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not builder.missing():
        pytest.skip("this machine builds TensorRT plans: tests/gpu tests that")
    out = tmp_path_factory.mktemp("engines")
    manifest, folder = build(Request(str(tiny_folders["llama"]), [SPARSE], "tensorrt", sm=("90",), out=out))
    assert not manifest.checks.failed
    return folder


def test_the_graphs_are_written_and_checked_in_any_case(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.sm == ["SM90"] and "TensorRT" in manifest.unbuilt
    assert manifest.checks.engine.status == "not_run" and manifest.unbuilt in manifest.checks.engine.reason
    assert manifest.checks.export.status == manifest.checks.rewrite.status == "passed"
    names = {item.path for item in manifest.artifacts}
    assert {"prefill.onnx", "decode.onnx", "weights.fp16.bin"} <= names and not any(n.endswith(".plan") for n in names)
    model = io.load(folder / "prefill.onnx")
    assert trt.faults(model) == [] and trt.plugin_nodes(model)
    assert any("kernels compile for SM90 to PTX" in line for line in manifest.lowering)


def test_the_command_ends_with_one_message(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    words = ["build", str(tiny_folders["qwen3"]), "-p", SPARSE, "--target", "tensorrt", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["trtpass", *words, "--out", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["sm"] == ["SM90"]
    message = json.loads(said.err)["error"]  # one, with all that is missing
    assert "no plan was built: TensorRT" in message and "TARGET=tensorrt-rtx" in message
    made = next(tmp_path.glob("*/*"))
    assert trt.DTYPE_KEY in io.load(made / "decode.onnx").metadata_props
    assert (made / "weights.bf16.bin").is_file()


def test_every_kernel_of_a_graph_compiles_once(tmp_path: Path) -> None:
    graph = trt.lower(prefill(), 89).model
    kernels = builder.kernels_of(graph)
    nodes = {node.op_type: node for node in trt.plugin_nodes(graph)}  # one of each: layers share their kernels
    assert len(nodes) < len(trt.plugin_nodes(graph))
    tactics = {name: len(ways(kernel_ops()[name])) for name in nodes}
    assert len(nodes) <= len(kernels) <= sum(tactics.values())
    assert {k.name for k in kernels} == {ways(kernel_ops()[name])[0][0].name for name in nodes}
    assert {k.cc for k in kernels} == {89}
    graph.metadata_props[trt.CC_KEY] = "70"
    with pytest.raises(InputError, match="not fit for TensorRT"):
        builder.kernels_of(graph)


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_timings_are_kept_for_these_kernels_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_a_gpu: None
) -> None:
    first = builder.timing_cache(tmp_path, 90)
    assert first == builder.timing_cache(tmp_path, 90)
    others = [builder.timing_cache(tmp_path, 89)]
    monkeypatch.setattr(builder, "installed", lambda: "11.0.0.114")
    others.append(builder.timing_cache(tmp_path, 90))
    monkeypatch.setattr(builder, "fingerprint", lambda: "other")
    others.append(builder.timing_cache(tmp_path, 90))
    assert len({first, *others}) == 4


def test_the_fingerprint_covers_every_kernel_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    original = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.add(path.name if path.parent.name == "plugins" else f"{path.parent.name}/{path.name}")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    builder.fingerprint()
    root = Path(builder.__file__).parent.parent.parent / "plugins"
    wanted = {f"{path.parent.name}/{path.name}" for path in root.glob("*/kernel*.py")}
    wanted |= {f"{path.parent.name}/{path.name}" for path in root.glob("*/steps.py")}
    assert wanted | {path.name for path in root.glob("_triton*.py")} <= read


# ---- the process that builds, with TensorRT-RTX as its library -------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_a_gpu: None) -> None:
    if not rtx.available():
        pytest.skip(f"tensorrt-rtx is not installed: {rtx.INSTALL}")
    (tmp_path / "library" / "tensorrt").mkdir(parents=True)
    (tmp_path / "library" / "tensorrt" / "__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))


@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_plan_of_several_profiles_with_a_timing_cache(dtype: str, tmp_path: Path, stand_in: None) -> None:
    graph = trt.lower(insert_cache(tiny.decoder(), "decode", capacity=64), 90, dtype).model
    path = written(graph, tmp_path)
    profiles = [_profile(graph, tokens, 64) for tokens in _tokens("decode", 64)]
    assert len(profiles) == 2
    plan = builder.build_plan(path, tmp_path / "a.plan", profiles=profiles, cache=tmp_path / "cache")
    assert plan.bytes == (tmp_path / "a.plan").stat().st_size > 0
    assert plan.inputs["past.0.key"] == {"float16": "HALF", "bfloat16": "BF16"}[dtype]
    assert plan.compute_capabilities == ("SM90",) and plan.profiles == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [builder.timing_cache(tmp_path, 90).name]


@pytest.mark.tensorrt
def test_a_failed_build_leaves_nothing(tmp_path: Path, stand_in: None) -> None:
    graph = trt.lower(prefill(sparse=False), 90).model
    path = written(graph, tmp_path)
    present = set(tmp_path.iterdir())
    with pytest.raises(InputError, match="the profile lacks"):
        builder.build_plan(path, tmp_path / "a.plan", profiles=[{"other": ([1], [1], [1])}], cache=tmp_path / "cache")
    assert set(tmp_path.iterdir()) == present
    graph.graph[0].domain = "somebody"
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"TensorRT.* cannot build .*somebody::"):
        builder.build_plan(written(graph, tmp_path / "other"), tmp_path / "a.plan", profiles=[])


@pytest.mark.tensorrt
def test_plugins_are_registered_in_the_process_that_builds(tmp_path: Path, stand_in: None) -> None:
    """TensorRT-RTX has no plugins, so the process must stop where it registers the first."""
    path = written(trt.lower(prefill(), 90).model, tmp_path)
    with pytest.raises(InputError, match=r"process ended \(exit code 1\).*has no attribute 'plugin'"):
        builder.build_plan(path, tmp_path / "a.plan", profiles=[])


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_profiles_of_both_phases() -> None:
    source = Source(tiny.decoder(), tiny.decoder(), 4096, "last")
    graphs = source.graphs(lambda model: trt.lower(model, 90).model)
    (whole,) = (_profile(graphs["prefill"], tokens, 4096) for tokens in _tokens("prefill", 4096))
    single, chunk = (_profile(graphs["decode"], tokens, 4096) for tokens in _tokens("decode", 4096))
    assert whole["input_ids"] == ([1, 1], [1, 1024], [4, 4096])
    assert single["input_ids"] == ([1, 1], [1, 1], [4, 1])
    assert chunk["input_ids"] == ([1, 1], [1, 1], [4, 512])
    assert single["past.0.key"] == ([1, 2, 4096, 16], [1, 2, 4096, 16], [4, 2, 4096, 16])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("x", target="tensorrt", sm=("80", "90")), "one compute capability"),
        (Request("x", target="tensorrt", sm=("CURRENT",)), "one compute capability"),
        (Request("x", target="tensorrt-rtx", sm=("75",), dtype="bfloat16"), "bfloat16 for SM75"),
    ],
)
def test_what_cannot_be_asked_for(request_: Request, words: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    asked = dataclasses.replace(request_, model=str(tiny_folders["llama"]), passes=[], out=tmp_path)
    with pytest.raises(InputError, match=words):
        build(asked)
    assert not list(tmp_path.rglob("*.onnx"))


def test_bfloat16_is_written_as_bfloat16() -> None:
    model = trt.lower(insert_cache(tiny.decoder(), "decode", capacity=64), 90, "bfloat16").model
    kinds = {v.dtype for v in model.graph.initializers.values() if len(v.shape or []) > 1}
    assert ir.DataType.BFLOAT16 in kinds and ir.DataType.FLOAT16 not in kinds
    original = {v.name: v for v in tiny.decoder().graph.initializers.values()}
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.BFLOAT16 and name in original and value.const_value is not None:
            theirs: Any = original[name].const_value
            ours = value.const_value.numpy().astype(np.float32)
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=2**-8, atol=0)
