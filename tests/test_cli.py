"""Every command: help, JSON, exit codes 0, 1 and 2, and one clear message for each kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import tiny
from proofs import SHORT
from tiny_engines import tiny_engine, tiny_model

from trtpass import cli, io
from trtpass.ir import is_op

COMMANDS = ["build", "models", "passes", "doctor", "inspect", "rewrite", "validate", "generate", "bench"]
COMMANDS += ["deploy", "serve"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments) -> (exit code, stdout, stderr)`` of the ``trtpass`` command, in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtpass", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canonical decoder on disk, with external data."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    io.save(tiny.decoder(), path)
    return path


def test_every_command_is_tested_here() -> None:
    names = {c.name for c in cli.app.registered_commands} | {g.name for g in cli.app.registered_groups}
    assert names == {*COMMANDS, "calibrate", "fit"}


@pytest.mark.parametrize(
    "command", [[], *([c] for c in COMMANDS), ["calibrate"], ["calibrate", "drift"], ["fit"], ["fit", "kvzap"]]
)
def test_help(run: Run, command: list[str]) -> None:
    code, out, err = run(*command, "--help")
    assert code == 0 and "Usage" in out and err == ""
    if command and command not in (["calibrate"], ["fit"]):
        assert "--json" in out


@pytest.mark.parametrize("command", ["models", "passes", "doctor"])
def test_lists(run: Run, command: str) -> None:
    code, out, _ = run(command)
    assert code == 0 and out.strip()
    code, out, _ = run(command, "--json")
    assert code == 0 and json.loads(out)


def test_build_without_a_model_lists_them(run: Run) -> None:
    code, out, _ = run("build")
    assert code == 0 and "smollm2-135m" in out and "Hugging Face folder" in out
    code, out, _ = run("build", "--json")
    assert code == 0 and "smollm2-135m" in json.loads(out)
    assert run("build", "")[0] == 0  # make engine without MODEL


def test_inspect(run: Run, model: Path) -> None:
    code, out, _ = run("inspect", model)
    assert code == 0 and "token-sparse: applies" in out and "RoPE" in out
    found = json.loads(run("inspect", model, "--json")[1])
    assert [b["heads"] for b in found["blocks"]] == [4, 4] and found["methods"]["token-sparse"] == ""
    assert found["blocks"][0]["causal"] is True and found["missing"] == []


def test_rewrite(run: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    code, out, _ = run("rewrite", model, "-p", SHORT, "-o", output, "--json")
    report = json.loads(out)
    assert code == 0 and report["output"] == str(output)
    written = io.load(output)
    assert sum(n.op_type == "TokenSparseAttention" for n in written.graph) == 2
    code, out, _ = run("rewrite", model, "-p", SHORT, "-o", output)
    assert code == 0 and "2 sites" in out


def test_build_and_validate_with_json(run: Run, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    code, out, err = run("build", tiny_model(tmp_path_factory), "-p", SHORT, "--out", tmp_path, "--json")
    assert code == 0 and err == ""
    manifest = json.loads(out)
    assert manifest["checks"]["rewrite"]["status"] == "passed"
    (folder,) = (tmp_path / "with-text").iterdir()
    code, out, _ = run("validate", folder, "--json")
    assert code == 0 and json.loads(out)["checks"]["engine"]["status"] == "passed"
    code, out, _ = run("validate", folder)
    assert code == 0 and "check export" in out and "passed" in out


def test_a_changed_engine_is_exit_code_1(run: Run, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_engine(tmp_path_factory, "dense"), tmp_path / "engine"))
    with (folder / "decode.onnx").open("ab") as file:
        file.write(b"\0")
    code, _, err = run("validate", folder)
    assert code == 1 and "decode.onnx' has changed" in err and "Traceback" not in err


def test_a_failed_check_is_exit_code_1_and_still_prints_the_table(
    run: Run, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtpass import compare

    monkeypatch.setattr(compare, "ATOL", 0.0)
    monkeypatch.setattr(compare, "RTOL", 0.0)
    code, out, err = run("build", tiny_model(tmp_path_factory), "--dense", "--out", tmp_path)
    assert code == 1 and "failed" in out and "checks failed: export" in err


def test_generate(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_engine(tmp_path_factory, "dense")
    code, out, _ = run("generate", folder, "--prompt", "ab", "--prompt", "c", "--max-tokens", 3, "--json")
    rows = json.loads(out)
    assert code == 0 and [len(r["tokens"]) for r in rows] == [3, 3] and rows[0]["prompt_tokens"] == 2
    assert run("generate", folder, "--prompt", "ab", "--max-tokens", 3)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------


def failed(outcome: tuple[int, str, str], code: int = 2) -> str:
    """The one message of a failure."""
    got, out, err = outcome
    assert got == code, (out, err)
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err + out, err
    assert not err.startswith("error: unexpected"), err
    return err


def save_edited(model: Path, path: Path, change: Callable[[ir.Model], None]) -> Path:
    graph = io.load(model)
    change(graph)
    proto = ir.to_proto(graph)
    path.write_bytes(proto.SerializeToString())
    for file in model.parent.iterdir():
        if file.suffix == ".bin":
            shutil.copy(file, path.parent)
    return path


def truncated(model: Path, path: Path) -> Path:
    path.write_bytes(model.read_bytes()[:-200])
    return path


def missing_data(model: Path, path: Path) -> Path:
    return Path(shutil.copy(model, path))


def outside(model: Path, path: Path) -> Path:
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../etc/passwd"
    path.write_bytes(proto.SerializeToString())
    return path


def cycle(model: Path, path: Path) -> Path:
    proto = onnx.load(model)
    nodes = proto.graph.node
    nodes[-2].input[0] = nodes[-1].output[0]
    path.write_bytes(proto.SerializeToString())
    return path


def unknown_operator(model: Path, path: Path) -> Path:
    def change(graph: ir.Model) -> None:
        next(n for n in graph.graph if is_op(n, "Attention")).op_type = "Attentino"

    return save_edited(model, path, change)


def empty(model: Path, path: Path) -> Path:
    path.write_bytes(b"")
    return path


BROKEN = [truncated, missing_data, outside, cycle, unknown_operator, empty]


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_files_are_one_clear_error(
    run: Run, model: Path, tmp_path: Path, damage: Callable[[Path, Path], Path]
) -> None:
    bad = damage(model, tmp_path / "bad.onnx")
    out = tmp_path / "engines"
    failed(run("inspect", bad))
    failed(run("rewrite", bad, "-p", SHORT, "-o", tmp_path / "y.onnx"))
    failed(run("build", bad, "-p", SHORT, "--out", out))
    assert not (tmp_path / "y.onnx").exists()
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "token-sparse:coverage=1.0"], "coverage=1.0"),
        (["-p", "token-sparse:coverage=-0.1"], "coverage=-0.1"),
        (["-p", "token-sparse:layers=7"], "layer 7"),
        (["-p", "token-sparse:layers=drift:0.5"], "calibrate drift"),
        (["-p", "tokensparse"], "token-sparse"),
        (["-p", "token-sparse:colour=3"], "colour"),
    ],
)
def test_bad_passes(run: Run, model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in failed(run("rewrite", model, *arguments, "-o", tmp_path / "y.onnx"))
    assert message in failed(run("build", model, *arguments, "--out", tmp_path / "engines"))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "no-such-model"], "no model 'no-such-model'"),
        (["build", "x", "--dense", "-p", SHORT], "one of them"),
        (["build", "x", "--logits", "some"], "last or all"),
        (["build", "smollm2-135m", "--target", "gpu"], "target 'gpu'"),
        (["build", "smollm2-135m", "--sm", "89"], "SM=89"),
        (["inspect", "nowhere.onnx"], "nowhere.onnx"),
        (["validate", "nowhere"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["bench", "--tokens", "many"], "--tokens many"),
        (["bench", "no.such.benchmark"], "no.such.benchmark"),
        (["calibrate", "drift", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_requests(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert message in failed(run(*arguments))
        code, _, err = run(*arguments, "--json")
        assert code == 2 and message in json.loads(err)["error"]
    finally:
        os.chdir(here)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["nonsense"], ["build", "--nonsense"], ["inspect"], ["generate", "x"]])
def test_usage_errors_are_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in err


def test_no_attention(run: Run, tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["n"])
    node = ir.node("Relu", [x], outputs=[ir.val("y", ir.DataType.FLOAT, ["n"])])
    plain = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    path = tmp_path / "plain.onnx"
    path.write_bytes(ir.to_proto(plain).SerializeToString())
    code, out, _ = run("inspect", path)
    assert code == 0 and "no Attention node" in out and "does not apply" in out
    assert "no attention block" in failed(run("rewrite", path, "-p", "token-sparse", "-o", tmp_path / "y.onnx"))
    assert "'plain' is not a decoder" in failed(run("build", path, "--out", tmp_path / "e"))


def test_unsupported_architecture(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    settings: dict[str, Any] = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(settings))
    message = failed(run("build", folder, "--out", tmp_path / "engines"))
    assert "t5" in message.lower() and "llama" in message
    assert not (tmp_path / "engines").exists()


def test_an_unexpected_error_says_how_to_report_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import graphs

    def broken() -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(graphs, "known", broken)
    code, _, err = run("models")
    assert code == 2 and "unexpected RuntimeError: surprise" in err and "--traceback" in err
    with pytest.raises(RuntimeError, match="surprise"):
        run("models", "--traceback")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(cli.INTERRUPTED)])
def test_interruptions_are_exit_code_2(run: Run, monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    def interrupted(**_: object) -> None:
        raise stop

    monkeypatch.setattr(cli, "app", interrupted)
    code, _, err = run("models")
    assert code == 2 and "interrupted" in err
