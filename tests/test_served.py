"""Engines on a server: the same answers as the runtime's and as PyTorch's, and the commands around it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny_engines import tiny_engine

from tests.served import GATED, PATIENCE, Served, gated, model_processes, needed, until
from tests.vit_engines import images
from trtpass import cli
from trtpass.build import save_example
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Manifest
from trtpass.runtime import Engine
from trtpass.server import client
from trtpass.server.check import check_server, saved
from trtpass.server.control import Control
from trtpass.server.foreground import PROMPT as ASKED
from trtpass.server.foreground import Request, serve

pytestmark = pytest.mark.server

TEXT = ("dense", "sparse", "kvzap")
ANY_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
PROMPT = "the quick brown fox jumps over the lazy dog, twice"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["trtpass", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("model", TEXT)
def test_one_answer_over_http_over_grpc_and_of_the_runtime(served: Served, model: str) -> None:
    folder = served.engines[model]
    engine = Engine.open(folder, threads=1, context=Manifest.read(folder).context)
    ids = list(PROMPT.encode())  # the tiny tokenizer's ids are the ranks of its letters, not bytes: any will do
    mine = tuple(step.tokens[0] for step in engine.generate([ids], 20))
    options: dict[str, Any] = {"max_tokens": 20, "timeout": PATIENCE}
    answers = [
        client.generate(served.http, model, ids, **options),
        client.join(client.stream(served.http, model, ids, **options)),
        client.join(client.stream_grpc(served.grpc, model, ids, **options)),
    ]
    assert [answer.tokens for answer in answers] == [mine] * 3
    assert len({answer.text for answer in answers}) == 1 and answers[0].finish == "length"
    assert answers[0].prompt_tokens == len(ids) and answers[0].completion_tokens == 20
    assert (answers[0].kept < 1) == (model == "kvzap")


def test_a_text_is_a_prompt(served: Served) -> None:
    pieces = list(client.stream(served.http, "dense", PROMPT, max_tokens=8, timeout=PATIENCE))
    assert len(pieces) > 1 and sum(len(piece.tokens) for piece in pieces) == 8
    assert client.join(pieces).text == client.generate(served.http, "dense", PROMPT, max_tokens=8).text


def test_arrays(served: Served) -> None:
    feed = images(2)
    mine = Engine.open(served.engines["vit"], threads=1).run(feed)
    theirs = client.infer(served.grpc, "vit", feed, timeout=PATIENCE)
    assert theirs.keys() == mine.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(theirs[name], array, atol=1e-5)


def test_a_model_process_brings_its_own_code_and_no_torch(served: Served) -> None:
    """The environments share packages, but what a serving machine lacks must not be loaded."""
    for model in model_processes(served.process):
        files = {entry.path for entry in model.memory_maps()}
        assert any("onnxruntime" in file for file in files)
        assert not [file for file in files if "/torch/" in file or "libtorch" in file]
        kernels = [file for file in files if "plugins/_native" in file]
        assert all(Path(file).is_relative_to(served.process.repository) for file in kernels)


def test_metrics_of_each_model(served: Served) -> None:
    client.generate(served.http, "kvzap", PROMPT, max_tokens=4, timeout=PATIENCE)
    with urllib.request.urlopen(served.metrics, timeout=PATIENCE) as response:
        lines = response.read().decode().splitlines()
    assert [line for line in lines if line.startswith('trtpass_decode_tokens_total{model="kvzap"')]


@pytest.mark.parametrize("model", [*TEXT, "vit"])
def test_validate_compares_a_server_with_torch(served: Served, model: str) -> None:
    rows = check_server(served.engines[model], served.http, model=model, grpc=served.grpc)
    assert all(row.passed for row in rows), rows
    assert {row.against for row in rows} == ({"onnxruntime"} if model == "vit" else {"torch", "runtime"})
    assert all(row.max_abs is not None and row.max_abs < 1e-3 for row in rows if row.tolerance != "exact")


def changed(folder: Path, engine: Path, by: float) -> Path:
    """A copy of an engine with other saved outputs."""
    copy = Path(shutil.copytree(engine, folder / "engine"))
    feed, runner, outputs = saved(copy)
    for name, array in outputs.items():
        outputs[name] = array.copy()
        outputs[name].flat[-1] += by  # one number, of the last row
    save_example(copy, feed, outputs, runner)
    return copy


@pytest.mark.parametrize("model", ["sparse", "vit"])
def test_validate_fails_on_a_difference(
    served: Served, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = changed(tmp_path, served.engines[model], 0.05)
    words = ["validate", str(copy), "--url", served.http, "--model-name", model, "--grpc-url", served.grpc]
    assert run(monkeypatch, *words, "--json") == 1
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    wrong = [row for row in rows if not row["passed"]]
    assert len(wrong) == 1 and abs(wrong[0]["max_abs"] - 0.05) < 1e-3 and "outputs differ by 5" in wrong[0]["note"]
    assert "the server differs" in shown.err and wrong[0]["what"] in shown.err
    assert run(monkeypatch, *words) == 1
    assert "FAILED outputs differ" in " ".join(capsys.readouterr().out.split())


def test_validate_notices_another_engine(served: Served) -> None:
    """The tokens and logits of one model are not those of another."""
    rows = check_server(served.engines["dense"], served.http, model="kvzap")
    assert [row.what for row in rows if not row.passed]


def test_validate_needs_what_was_saved(served: Served, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(served.engines["dense"], tmp_path / "engine"))
    (copy / "outputs.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        check_server(copy, served.http, model="dense")


def test_serve_does_all_of_it_once(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What make serve runs: deploy, start, ask, say how to call it."""
    needed()
    engine, repository = tiny_engine(tmp_path_factory, "dense"), tmp_path / "repository"
    words = ["--model", str(engine), "--ask", "--once", "--json", *ANY_PORTS]
    assert run(monkeypatch, "serve", str(repository), *words) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    [name] = told["models"]
    assert told["answers"][name] and f"{ASKED!r} -> {told['answers'][name]!r}" in shown.err
    url = f"{told['http']}/v2/models/{name}/generate"
    for said in (f"deployed {name} into", f"curl -s {url} -d", f"{url}_stream", told["grpc"], told["metrics"]):
        assert said in shown.err
    with pytest.raises(InputError, match="does not answer"):
        client.generate(told["http"], name, "x")
    assert run(monkeypatch, "serve", str(tmp_path / "nothing"), *ANY_PORTS) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_sigterm_drains_streams_that_run(tmp_path: Path) -> None:
    needed()
    gate = tmp_path / "gate"
    program = [sys.executable, "-c", "from trtpass.cli import main; main()"]
    words = [*program, "serve", str(gated(tmp_path / "repository")), "--json", *ANY_PORTS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        told = json.loads(process.stdout.readline())
        family = psutil.Process(process.pid).children(recursive=True)
        asked: dict[str, Any] = {"model": GATED, "prompt": str(gate), "max_tokens": 4, "timeout": PATIENCE}
        streams = [client.stream(told["http"], **asked), client.stream_grpc(told["grpc"], **asked)]
        assert [next(pieces).tokens for pieces in streams] == [(0,), (0,)]
        process.send_signal(signal.SIGTERM)
        control = Control(told["http"], {})
        until(lambda: not control.ready(), "the end of new requests")
        gate.touch()
        assert [client.join(pieces).tokens for pieces in streams] == [(1, 2, 3), (1, 2, 3)]
        assert process.wait(PATIENCE) == 0
        assert "stopping: running answers come to their end first" in process.stderr.read()
    assert len(family) == 2 and not any(member.is_running() for member in family)


def test_a_foreground_server_that_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed()

    def killed(told: dict[str, Any]) -> None:
        [server] = [p for p in psutil.Process().children() if f"--model-repository={tmp_path}" in p.cmdline()]
        server.kill()

    gated(tmp_path)
    request = Request(tmp_path, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(InputError, match=r"ended by itself \(exit code -9\)"):
        serve(request, lambda line: None, killed)


def test_a_failed_check_is_not_served(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = Path(shutil.copytree(tiny_engine(tmp_path_factory, "dense"), tmp_path / "engine"))
    manifest = Manifest.read(copy)
    manifest.checks.engine.status = "failed"
    manifest.write(copy)
    with pytest.raises(CheckFailed, match="checks"):
        serve(Request(tmp_path / "repository", str(copy)), lambda line: None)
