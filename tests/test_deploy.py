"""``trtpass deploy``: repositories that NVIDIA's own parser reads, that stand alone, and that appear whole or not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_engines import tiny_engine

import trtpass
from tests.vit_engines import TOME, vit_engine
from trtpass.deploy.pbtxt import Enum, render
from trtpass.deploy.repository import Request, deploy
from trtpass.deploy.tensors import Spec, batches, declared, warm_up
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Check, Manifest, artifact
from trtpass.sessions import open_session

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
    """``copied(field=value, ..., files={name: data})``: an engine, changed, with a manifest that fits."""

    def make(files: dict[str, bytes] | None = None, engine: Path = dense, **fields: Any) -> Path:
        folder = shutil.copytree(engine, tmp_path / "engine")
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


def test_plans_of_an_encoder_have_a_model_for_each_choice_of_sizes(copied: Copy, vit: Path, tmp_path: Path) -> None:
    graph = (vit / "engine.onnx").read_bytes()
    files = {f"engine.batch{n}.{kind}": graph for n in (1, 8) for kind in ("onnx", "plan")}
    folder = copied(files, engine=vit, target="tensorrt", variants=[{"batch": 1}, {"batch": 8}])
    made = deploy(Request(folder, tmp_path / "repo", "plan"))
    assert [m["name"] for m in made["models"]] == ["plan-batch1", "plan-batch8"]
    read = config(tmp_path / "repo" / "plan-batch8")
    assert read.platform == "tensorrt_plan" and read.max_batch_size == 0 and not read.instance_group[0].profile
    same_as_session(read, vit / "engine.onnx")


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
