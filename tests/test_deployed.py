"""What ``trtpass deploy`` leaves: models that run on their own code, papers, a dashboard, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_engines import tiny_engine
from typer.testing import CliRunner

import trtpass
from tests.vit_engines import TOME, images, vit_engine
from trtpass import native
from trtpass.cli import app
from trtpass.deploy.repository import Request, deploy
from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.runtime import Engine
from trtpass.serving.metrics import ARRAYS, TEXT
from trtpass.text import Tokenizer

ROOT = Path(trtpass.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine(tmp_path_factory, "dense")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_engine(tmp_path_factory, TOME)[1]


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
    assert (
        "| one | python |\n| two | python |" in table
        and 'key: "rows" value { string_value: "2" }' in (tmp_path / "one" / "config.pbtxt").read_text()
    )
    (tmp_path / "two" / ".trtpass").unlink()
    with pytest.raises(InputError, match="did not write"):
        deploy(Request(dense, tmp_path, "two"))
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(InputError, match=r"README\.md is there"):
        deploy(Request(dense, tmp_path, "three"))
    assert not (tmp_path / "three").exists() and (tmp_path / "README.md").read_text() == "# Mine\n"


def test_no_file_names_a_place_of_this_machine(
    dense: Path, vit: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deploy(Request(dense, tmp_path, "text"))
    deploy(Request(dense, tmp_path, "bare", "onnxruntime"))
    deploy(Request(vit, tmp_path, "vit"))
    places = [str(place).encode() for place in (ROOT, tmp_path_factory.getbasetemp(), Path.home())]
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
