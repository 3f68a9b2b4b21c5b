"""Building: what a finished folder holds, and that nothing is left of a build that failed."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from proofs import SHORT
from tiny_engines import tiny_engine, tiny_model

from trtpass import build as building
from trtpass.build import Request, build, slug
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Manifest
from trtpass.passes import parse
from trtpass.validate import validate, verify_files

GRAPHS = ["dense.onnx", "model.onnx", "prefill.onnx", "decode.onnx"]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine(tmp_path_factory, "sparse")


@pytest.fixture
def copy(sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sparse, tmp_path / "engine"))


def test_a_folder_holds_everything_and_the_manifest_says_so(sparse: Path) -> None:
    names = {p.name for p in sparse.iterdir()}
    expected = {*GRAPHS, "weights.bin", "inputs.json", "outputs.json", "manifest.json", "tokenizer.json"}
    assert expected <= names
    assert not {name for name in names if name.startswith(".")} - {".trtpass"}
    said = json.loads((sparse / "manifest.json").read_text())
    assert said["model"] == "with-text" and said["target"] == "cpu" and said["sm"] == [] and said["context"] == 96
    (record,) = said["passes"]
    assert record["name"] == "token-sparse" and record["options"]["coverage"] == 0.3
    assert record["sites"] == 2 and record["layers"] == [0, 1] and 0 < record["pruned"] < 1
    for check in ("export", "rewrite", "engine"):
        item = said["checks"][check]
        assert item["status"] == "passed", item
        assert set(item) == {"status", "reason", "max_abs", "max_rel", "tolerance", "flipped"}
        assert item["max_abs"] < 1e-2 and item["max_rel"] < 1e-2 and "atol" in item["tolerance"]
    assert said["checks"]["export"]["flipped"] is None and said["checks"]["rewrite"]["flipped"] < 0.05
    assert {"python", "onnx", "onnxruntime", "torch", "transformers"} <= set(said["versions"])
    assert {a["path"] for a in said["artifacts"]} >= expected - {"manifest.json"}
    assert all(a["bytes"] == (sparse / a["path"]).stat().st_size for a in said["artifacts"])
    assert said["quality"] is None and said["whole_prompt"] == "token-sparse"
    verify_files(sparse, Manifest.read(sparse))


def test_no_graph_names_a_path_of_this_machine(sparse: Path) -> None:
    for name in GRAPHS:
        content = (sparse / name).read_bytes()
        for place in (str(sparse.parent.parent), str(Path.cwd()), "site-packages", "stack_trace"):
            assert place.encode() not in content, (name, place)


@pytest.mark.parametrize(
    "family",
    [
        "qwen3",
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("mistral", marks=pytest.mark.slow),
    ],
)
def test_every_family_builds(tiny_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    manifest, folder = build(Request(str(tiny_folders[family]), [SHORT], out=tmp_path))
    assert folder.parent == tmp_path / f"tiny-{family}"
    assert [check.status for _, check in manifest.checks.items()] == ["passed"] * 3
    assert manifest.near_misses == [] and manifest.raised["causal"] == 2


def test_the_same_input_gives_the_same_bytes_and_replaces_the_folder(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """In one process: the order in which loops of bodies carry their values follows Python's hash seed."""
    request = Request(str(tiny_model(tmp_path_factory)), [SHORT], out=tmp_path)
    first, before = build(request)
    inode = before.stat().st_ino
    second, folder = build(request)
    assert folder == before and folder.stat().st_ino != inode
    one, two = ({a.path: a.sha256 for a in manifest.artifacts} for manifest in (first, second))
    assert {name: two[name] for name in [*GRAPHS, "weights.bin"]} == {
        name: one[name] for name in [*GRAPHS, "weights.bin"]
    }
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_dense_and_portable(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_engine(tmp_path_factory, "dense", "portable")
    manifest = Manifest.read(folder)
    assert folder.name == "dense.portable" and manifest.passes == [] and manifest.whole_prompt is None
    assert manifest.checks.rewrite.status == "not_run" and manifest.checks.engine.status == "passed"
    assert not any(
        n.domain == "com.microsoft" for n in onnx.load(folder / "prefill.onnx", load_external_data=False).graph.node
    )


def test_an_onnx_file_is_a_model_too(sparse: Path, tmp_path: Path) -> None:
    manifest, folder = build(Request(str(sparse / "dense.onnx"), [SHORT], out=tmp_path))
    assert manifest.model == "dense" and manifest.context == building.DEFAULT_CONTEXT
    assert manifest.checks.engine.status == "passed" and not manifest.checks.failed
    assert (folder / "weights.bin").stat().st_size > 0


def test_all_logits(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    _, folder = build(Request(str(tiny_model(tmp_path_factory)), [], out=tmp_path, logits="all"))
    (logits, *_) = onnx.load(folder / "prefill.onnx", load_external_data=False).graph.output
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", "tokens", 256]


# ---------------------------------------------------------------------------------------------------------------------


def leftovers(out: Path) -> list[str]:
    return [str(p) for p in out.rglob("*") if not p.is_dir() or p.name.startswith(".")] if out.exists() else []


@pytest.mark.parametrize("step", ["_canonical", "_lower", "check_ladder", "_save_example", "artifact"])
def test_a_failure_in_the_middle_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(building, step, fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        build(Request(str(tiny_model(tmp_path_factory)), [], out=tmp_path))
    assert leftovers(tmp_path) == []


def test_a_failed_build_keeps_the_folder_that_was_there(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_engine(tmp_path_factory, "dense", "portable")
    folder = Path(shutil.copytree(source, tmp_path / source.parent.name / source.name))
    monkeypatch.setattr(building, "check_ladder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(Request(str(tiny_model(tmp_path_factory)), [], "portable", out=tmp_path))
    verify_files(folder, Manifest.read(folder))
    assert list(folder.parent.iterdir()) == [folder]


def trtpass(*arguments: object, limit: int | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own; ``limit``: the most bytes of a file, as on a full disk."""

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]

    return subprocess.Popen(
        [BIN / "trtpass", *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=None if limit is None else few_bytes,
    )  # fmt: skip


def test_ctrl_c_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    process = trtpass("build", tiny_model(tmp_path_factory), "--dense", "--out", tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/.*.tmp")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert list(tmp_path.glob("*/.*.tmp")), "the build never began to write"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors and "interrupted" in errors
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    process = trtpass("build", tiny_model(tmp_path_factory), "--dense", "--out", tmp_path, limit=200_000)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in errors and "disk is full" in errors
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", target="gpu"), "target 'gpu'"),
        (Request("x", dtype="bfloat16"), "no dtype: only plans have one"),
        (Request("x", target="tensorrt", dtype="float32"), "float16, bfloat16"),
        (Request("x", sm=("SM89",)), "no SM"),
        (Request("no-such-model"), "no model 'no-such-model'"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path: Path, request_: Request, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=message):
        build(replace(request_, out=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_folders_are_named_after_what_differs_from_the_defaults() -> None:
    assert slug([], "cpu") == "dense.cpu"
    assert slug([parse("token-sparse")], "portable") == "token-sparse.portable"
    name = slug([parse("token-sparse:layers=drift:0.5,coverage=0.01")], "cpu")
    assert name == "token-sparse_coverage=0.01_layers=drift-0.5.cpu"


# ---------------------------------------------------------------------------------------------------------------------


def polygraphy(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command that the README prints."""
    command = (
        "polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json "
        "--atol 1e-3 --rtol 1e-3"
    )
    program, *arguments = command.split()
    return subprocess.run([BIN / program, *arguments], cwd=folder, capture_output=True, text=True, timeout=180)


def perturb(folder: Path, name: str) -> None:
    """Add 1 to the first entry of one weight in weights.bin."""
    tensors = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    (tensor,) = (t for t in tensors if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    weights = np.memmap(folder / entry["location"], np.float32, "r+", int(entry.get("offset", 0)), (1,))
    weights[0] += 1.0
    weights.flush()


def test_polygraphy_agrees_and_notices_one_weight(copy: Path) -> None:
    good = polygraphy(copy)
    assert good.returncode == 0, good.stdout + good.stderr
    perturb(copy, "model.layers.1.mlp.down_proj.weight")
    assert polygraphy(copy).returncode == 1


def test_validate_notices_a_changed_file(copy: Path) -> None:
    perturb(copy, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(CheckFailed, match=r"weights\.bin.*has changed"):
        validate(copy)
    (copy / "decode.onnx").unlink()
    with pytest.raises(CheckFailed, match="is missing"):
        validate(copy)


def test_validate_proves_again_and_records_a_failure(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = validate(copy)
    assert not checks.failed and checks.rewrite.status == "passed"
    perturb(copy, "model.layers.1.mlp.down_proj.weight")
    monkeypatch.setattr("trtpass.validate.verify_files", lambda *_: None)
    assert validate(copy).failed == ["export", "rewrite"]
    assert Manifest.read(copy).checks.failed == ["export", "rewrite"]


def test_a_manifest_cannot_lead_outside_its_folder(copy: Path) -> None:
    manifest = Manifest.read(copy)
    manifest.artifacts[0].path = "../../secret"
    with pytest.raises(InputError, match="outside"):
        verify_files(copy, manifest)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00\xff"])
def test_a_broken_manifest_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="not a trtpass manifest"):
        Manifest.read(tmp_path)
    with pytest.raises(InputError, match="has no manifest"):
        Manifest.read(tmp_path / "nothing")
