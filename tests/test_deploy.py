"""``trtpass deploy``: repositories that NVIDIA's own parser reads, that stand alone, and that appear whole or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_engines import tiny_engine
from typer.testing import CliRunner

import trtpass
from tests.vit_engines import TOME, images, vit_engine
from trtpass import native
from trtpass.cli import app
from trtpass.deploy.pbtxt import Enum, render
from trtpass.deploy.repository import Request, deploy
from trtpass.deploy.tensors import Spec, batches, declared, warm_up
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Check, Manifest, artifact
from trtpass.runtime import Engine
from trtpass.serving.metrics import ARRAYS, TEXT
from trtpass.sessions import open_session
from trtpass.text import Tokenizer

ROOT = Path(trtpass.__file__).resolve().parent.parent
TYPES = {"float": "FP32", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}  # ONNX Runtime's names and Triton's
TEXT_TYPES = {"text_input": "STRING", "input_ids": "INT64", "max_tokens": "INT32", "stop": "STRING",
              "temperature": "FP32", "top_p": "FP32", "seed": "INT64", "stream": "BOOL",
              "return_logits": "BOOL"}  # fmt: skip
Copy = Callable[..., Path]


def config(folder: Path) -> Any:
    """``config.pbtxt`` as NVIDIA's parser reads it."""
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from tritonclient.grpc import model_config_pb2

    made = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert made.name == folder.name
    return made


def types(tensors: Any) -> dict[str, str]:
    from tritonclient.grpc import model_config_pb2

    return {t.name: model_config_pb2.DataType.Name(t.data_type).removeprefix("TYPE_") for t in tensors}


def same_as_session(made: Any, graph: Path) -> None:
    """The configuration's tensors are those of ONNX Runtime's session, the batch apart."""
    session = open_session(graph, "CPUExecutionProvider", 1)
    for tensors, items in ((made.input, session.get_inputs()), (made.output, session.get_outputs())):
        expected = {}
        for item in items:
            sizes = [d if isinstance(d, int) else -1 for d in item.shape][1 if made.max_batch_size else 0 :]
            expected[item.name] = (TYPES[re.sub(r"tensor\((.*)\)", r"\1", item.type)], sizes)
        found = types(tensors)
        assert {t.name: (found[t.name], list(t.dims)) for t in tensors} == expected


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine(tmp_path_factory, "dense")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_engine(tmp_path_factory, TOME)[1]


@pytest.fixture
def copied(tmp_path: Path, dense: Path) -> Copy:
    """``copied(field=value, ..., files={name: text})``: the dense engine, changed, with a manifest that fits."""

    def make(files: dict[str, bytes] | None = None, **fields: Any) -> Path:
        folder = shutil.copytree(dense, tmp_path / "engine")
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        manifest = Manifest.read(folder)
        new = [artifact(folder, folder / name) for name in files or {}]
        manifest.model_copy(update={"artifacts": [*manifest.artifacts, *new], **fields}).write(folder)
        return folder

    return make


def test_a_text_model(dense: Path, tmp_path: Path) -> None:
    made = deploy(Request(dense, tmp_path, "tale", rows=3, prompt_tokens=50, threads=1))
    read = config(tmp_path / "tale")
    assert (read.backend, read.max_batch_size, read.model_transaction_policy.decoupled) == ("python", 0, True)
    assert types(read.input) == TEXT_TYPES and all(tensor.optional for tensor in read.input)
    assert {t.name: list(t.dims) for t in read.output}["logits"] == [256]
    assert {key: value.string_value for key, value in read.parameters.items()} == made["limits"] == {
        "rows": "3", "queue": "64", "prompt_tokens": "50", "new_tokens": "96", "default_max_tokens": "96",
        "pages": "auto", "threads": "1", "drain_seconds": "25",
    }  # fmt: skip
    assert [(group.kind, group.count) for group in read.instance_group] == [(read.instance_group[0].KIND_CPU, 1)]


def test_an_encoder_in_both_forms(vit: Path, tmp_path: Path) -> None:
    for form, rows in (("python", 5), ("onnxruntime", None)):
        deploy(Request(vit, tmp_path, form, form, rows=rows, queue=9))
        read = config(tmp_path / form)
        assert read.max_batch_size == (rows or 8) and len(read.model_warmup) == 1
        assert read.dynamic_batching.default_queue_policy.max_queue_size == 9
        same_as_session(read, vit / "engine.onnx")
    assert (tmp_path / "onnxruntime/1/model.onnx").read_bytes() == (vit / "engine.onnx").read_bytes()
    same_as_session(read, tmp_path / "onnxruntime/1/model.onnx")  # and it loads there, with its weights
    if read.model_operations.op_library_filename:
        (name,) = read.model_operations.op_library_filename
        assert (tmp_path / name).is_file() and not Path(name).is_absolute()


def test_a_bare_decoder(dense: Path, tmp_path: Path) -> None:
    made = deploy(Request(dense, tmp_path, "bare", "onnxruntime"))
    assert [m["name"] for m in made["models"]] == ["bare-prefill", "bare-decode"]
    for phase in ("prefill", "decode"):
        read = config(tmp_path / f"bare-{phase}")
        assert read.platform == "onnxruntime_onnx" and read.max_batch_size == 0
        assert read.dynamic_batching.default_queue_policy.max_queue_size == 64
        same_as_session(read, tmp_path / f"bare-{phase}" / "1" / "model.onnx")
    assert "Who holds the cache" in (tmp_path / "README.md").read_text()


def test_plans_of_tensorrt(copied: Copy, tmp_path: Path) -> None:
    plans = {"prefill.plan": b"p", "decode.plan": b"d"}
    deploy(Request(copied(plans, target="tensorrt"), tmp_path / "repo", "plan"))
    for phase, profiles in (("prefill", []), ("decode", ["0", "1"])):
        folder = tmp_path / "repo" / f"plan-{phase}"
        read = config(folder)
        assert read.platform == "tensorrt_plan" and read.default_model_filename == "model.plan"
        assert [list(g.profile) for g in read.instance_group] == [profiles]
        assert sorted(path.name for path in (folder / "1").iterdir()) == ["model.plan"]
        same_as_session(read, tmp_path / "engine" / f"{phase}.onnx")


@pytest.mark.parametrize(("fields", "form", "error"), [
    ({"target": "tensorrt-rtx"}, "auto", "does not read these plans"),
    ({"target": "tensorrt-rtx"}, "python", "the python form of an engine of target 'tensorrt-rtx'"),
    ({"target": "tensorrt"}, "onnxruntime", "the onnxruntime form of an engine of target 'tensorrt'"),
    ({"target": "tensorrt", "unbuilt": "no GPU here"}, "auto", "no plan: no GPU here"),
    ({"target": "tensorrt"}, "tensorrt", "prefill.plan does not exist"),
    ({}, "tensorrt", "engine of target 'cpu'"),
    ({"page": 64}, "onnxruntime", "the host moves its pages"),
    ({}, "docker", "one of auto, python, onnxruntime, tensorrt"),
])  # fmt: skip
def test_forms_that_cannot_be(copied: Copy, tmp_path: Path, fields: dict[str, Any], form: str, error: str) -> None:
    with pytest.raises(InputError, match=error):
        deploy(Request(copied(**fields), tmp_path / "repo", "m", form))
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(("request_", "error"), [
    ({"name": "../up"}, "the name '../up'"), ({"name": "a/b"}, "the name"), ({"name": ".hidden"}, "the name"),
    ({"name": "a\n"}, "the name"), ({"name": "a" * 65}, "at most 64"), ({"rows": 0}, "rows: 0"),
    ({"queue": -1}, "queue: -1"), ({"threads": 1 << 30}, "threads"), ({"prompt_tokens": 97}, "at most 96"),
    ({"new_tokens": 97}, "at most 96"), ({"pages": 5}, "5 pages for a dense cache"),
])  # fmt: skip
def test_wrong_requests(dense: Path, tmp_path: Path, request_: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        deploy(Request(dense, tmp_path / "repo", **request_))
    assert list(tmp_path.iterdir()) == []


def test_limits_of_texts_are_none_of_an_encoder(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for an encoder"):
        deploy(Request(vit, tmp_path, new_tokens=5))


def test_a_broken_engine_leaves_nothing_behind(copied: Copy, tmp_path: Path) -> None:
    folder = copied()
    for name, error in (("weights.bin", "has changed"), ("tokenizer.json", "does not exist|is missing")):
        kept = (folder / name).read_bytes()
        if name == "weights.bin":
            (folder / name).write_bytes(kept[:-1] + b"?")
        else:
            (folder / name).unlink()
        with pytest.raises((InputError, CheckFailed), match=error):
            deploy(Request(folder, tmp_path / "repo"))
        (folder / name).write_bytes(kept)
    assert not (tmp_path / "repo").exists()
    manifest = Manifest.read(folder)
    manifest.checks.engine = Check(status="failed")
    manifest.write(folder)
    with pytest.raises(CheckFailed, match="checks of this engine failed: engine"):
        deploy(Request(folder, tmp_path / "repo"))
    assert not (tmp_path / "repo").exists()


def test_a_failure_while_writing_keeps_what_was_there(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(Request(dense, tmp_path, "m", rows=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="disk is full"):
        deploy(Request(dense, tmp_path, "m", rows=9))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == before


def test_other_models_and_papers_of_others_stay(dense: Path, vit: Path, tmp_path: Path) -> None:
    deploy(Request(dense, tmp_path, "one"))
    deploy(Request(vit, tmp_path, "two"))
    deploy(Request(dense, tmp_path, "one", rows=2))
    table = (tmp_path / "README.md").read_text()
    assert "| one | python |\n| two | python |" in table and config(tmp_path / "one").parameters["rows"]
    (tmp_path / "two" / ".trtpass").unlink()
    with pytest.raises(InputError, match="did not write"):
        deploy(Request(dense, tmp_path, "two"))
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(InputError, match=r"README\.md is there"):
        deploy(Request(dense, tmp_path, "three"))
    assert not (tmp_path / "three").exists() and (tmp_path / "README.md").read_text() == "# Mine\n"


def test_no_file_names_a_place_of_this_machine(dense: Path, vit: Path, tmp_path: Path) -> None:
    deploy(Request(dense, tmp_path, "text"))
    deploy(Request(dense, tmp_path, "bare", "onnxruntime"))
    deploy(Request(vit, tmp_path, "vit"))
    places = [str(place).encode() for place in (ROOT, dense.parent, vit.parent, tmp_path, Path.home())]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [(path, place) for path in files for place in places if len(place) > 5 and place in path.read_bytes()]


FRESH = """
import importlib.util, json, sys
from pathlib import Path

folder, checkout, fakes, inputs = map(Path, sys.argv[1:])
sys.path[:] = [entry for entry in sys.path if entry and not Path(entry).resolve().is_relative_to(checkout)
               or "site-packages" in entry]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
assert importlib.util.find_spec("trtpass") is None
spec = importlib.util.spec_from_file_location("triton_python_backend_utils", fakes)
pb = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pb)
absent = "torch transformers typer rich onnxscript polygraphy graphs psutil safetensors".split()
sys.modules.update(dict.fromkeys(absent))  # importing one of them is an error

import numpy as np

def load(name, **config):
    version = folder / name / "1"
    sys.modules.pop("model", None)
    loader = importlib.util.spec_from_file_location("model", version / "model.py")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize({"model_config": json.dumps(config), "model_repository": str(folder / name),
                     "model_version": "1", "model_name": name})
    return made

threads = {"threads": {"string_value": "1"}}
text = load("text", parameters=threads)
asked = pb.Request(text_input=pb.text("hello"), max_tokens=np.array([5], np.int32))
text.execute([asked])
answer = asked.sender.one().arrays
text.finalize()
(made,) = load("vit", parameters=threads, max_batch_size=8).execute([pb.Request(("features",), image=np.load(inputs))])
used = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ("trtpass", "plugins") and m.__file__]
print(json.dumps({"tokens": answer["token_ids"].tolist(), "features": made.arrays["features"].tolist(),
                  "native": not isinstance(sys.modules["trtpass.native"].find(), str), "outside": [
                  file for file in used if not Path(file).resolve().is_relative_to(folder.resolve())]}))
"""


def test_a_copied_model_runs_on_its_own_code(dense: Path, vit: Path, tmp_path: Path) -> None:
    import numpy as np

    for engine, name in ((dense, "text"), (vit, "vit")):
        deploy(Request(engine, tmp_path / "repo", name))
    moved = tmp_path / "elsewhere"
    (tmp_path / "repo").rename(moved)
    feed = images(2)
    np.save(tmp_path / "image.npy", feed["image"])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, moved, ROOT, Path(__file__).parent / "fake_triton.py", tmp_path / "image.npy"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    expected = [s.tokens[0] for s in Engine.open(dense, threads=1).generate([Tokenizer.open(dense).encode("hello")], 5)]
    assert made["tokens"] == expected and made["outside"] == []
    assert made["native"] == isinstance(native.find(), native.Library)
    np.testing.assert_allclose(made["features"], Engine.open(vit, threads=1).run(feed)["features"], atol=1e-5)


def test_requirements_are_exact(dense: Path, tmp_path: Path) -> None:
    deploy(Request(dense, tmp_path))
    lines = (tmp_path / "requirements.txt").read_text().splitlines()[1:]
    names = [re.fullmatch(r"([a-z-]+)==\d[\d.]*", line)[1] for line in lines]  # type: ignore[index]
    assert names == ["numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers", "pydantic"]


def test_the_dashboard_shows_every_metric_and_no_other(dense: Path, tmp_path: Path) -> None:
    deploy(Request(dense, tmp_path))
    made = json.loads((tmp_path / "grafana.json").read_text())
    used = {
        re.sub("_bucket$", "", name)
        for panel in made["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"\b((?:trtpass|nv)_\w+)", target["expr"])
    }
    assert {name for name in used if name.startswith("trtpass_")} == {*TEXT, *ARRAYS}
    assert {name for name in used if not name.startswith("trtpass_")} == {
        "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_pending_request_count",
    }  # fmt: skip
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "model"]
    places = [tuple(panel["gridPos"].values())[:2] for panel in made["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in made["panels"]})


B, T = "batch", "tokens"


@pytest.mark.parametrize(("inputs", "outputs", "expected"), [
    ([(B, 3, 8)], [(B, 5)], True),
    ([(B, T), (B,)], [(B, T, 4)], True),
    ([(B, T)], [(B, "kept", 4)], False),  # how many are kept may depend on the other rows
    ([(B, T)], [(B, "?", 4)], False),
    ([(B, T)], [(B, B)], False),
    ([(B, 3), (4, 3)], [(B, 5)], False),
    ([(B, 3), ("rows", 3)], [(B, 5)], False),
    ([(B, 3), ()], [(B, 5)], False),
    ([(2, 3)], [(2, 5)], False),
    ([("?", 3)], [("?", 5)], False),
])  # fmt: skip
def test_when_requests_share_a_batch(inputs: list[Any], outputs: list[Any], expected: bool) -> None:
    assert batches([Spec("x", "FP32", s) for s in inputs], [Spec("y", "FP32", s) for s in outputs]) == expected


def test_tensors_without_sizes_and_open_ones() -> None:
    scalar, row = Spec("n", "INT64", ()), Spec("x", "FP32", (B, T))
    assert declared([scalar], False, True) == [
        {"name": "n", "data_type": "TYPE_INT64", "dims": [1], "reshape": {"shape": []}}
    ]
    assert declared([row], True, True)[0]["dims"] == [-1] and declared([row], False, False)[0]["dims"] == [-1, -1]
    assert warm_up([row], True, {}) == [] and warm_up([row], True, {T: 7})[0]["inputs"][0]["value"]["dims"] == [7]


def test_names_of_tensors_are_written_safely() -> None:
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from tritonclient.grpc import model_config_pb2

    name = 'a"\n\\ } é\x07'
    tensor = {"name": name, "data_type": Enum("TYPE_FP32"), "dims": [], "optional": True}
    text = render({"name": "m", "input": [tensor], "instance_group": [{"profile": [name, "1"]}]})
    read = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert read.input[0].name == name and list(read.instance_group[0].profile) == [name, "1"]


def test_the_command(dense: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", str(dense), "-o", str(tmp_path), "--rows", "2", "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert (
        made["form"] == "python"
        and made["limits"]["rows"] == "2"
        and made["models"][0]["name"] == Manifest.read(dense).model
    )
    assert "limits: rows 16" in CliRunner().invoke(app, ["deploy", str(dense), "-o", str(tmp_path)]).stdout
