"""``trtpass serve``: a server in the foreground, from an engine that may not be built yet to Ctrl-C."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from trtpass.errors import CheckFailed, InputError
from trtpass.server import client
from trtpass.server.ports import LOOPBACK
from trtpass.server.process import Server
from trtpass.server.watch import Watch

PROMPT = "The capital of France is"
MAX_TOKENS = 32
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to serve.

    Args:
        repository: the folder of model folders.
        model: deployed into it first: a known name, Hugging Face folder or ONNX file, built where its engine is not
            there yet, or the folder of an engine; empty: what is in the repository.
        passes: of that build, as ``trtpass.build.Request`` has them.
        out: folder of all engines.
        host, http_port, grpc_port, metrics_port: as ``trtpass.server.process.Server`` has them.
        ask: whether to send one request to every text model, and print the answer.
        prompt: of that request.
        once: stop after that.
        log: file for the server's own words.
    """

    repository: Path
    model: str = ""
    passes: Sequence[str] | None = None
    out: Path = Path("engines")
    host: str = LOOPBACK
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    ask: bool = False
    prompt: str = PROMPT
    once: bool = False
    log: Path | None = None


def serve(request: Request, say: Say, ready: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Build and deploy what is missing, serve until Ctrl-C or SIGTERM, then drain and stop.

    Args:
        request: what to serve.
        say: called with lines for the user.
        ready: called once with addresses, models and answers, when all of them are there.

    Raises:
        InputError: whatever keeps the server from starting, or ended it.
        CheckFailed: the engine was built and a check failed.
    """
    if request.model:
        deploy(request, say)
    with _signals():
        try:
            _serve(request, say, ready)
        except KeyboardInterrupt:  # while it started, or once more while it drained
            say("stopped without waiting")


def _serve(request: Request, say: Say, ready: Callable[[dict[str, Any]], None] | None) -> None:
    with Server(
        request.repository, host=request.host, http_port=request.http_port, grpc_port=request.grpc_port,
        metrics_port=request.metrics_port, log=request.log,
    ) as server:  # fmt: skip
        try:
            with Watch(server, say):
                told = _present(server, request, say)
                if ready is not None:
                    ready(told)
                if request.once:
                    return
                say("Ctrl-C stops the server.")
                code = server.wait()
        except KeyboardInterrupt:
            say("stopping: running answers come to their end first; Ctrl-C again stops at once")
            return
        words = "; ".join(server.words()[-3:]) or "its log has no errors"
        raise InputError(f"the server ended by itself (exit code {code}): {words}")


def deploy(request: Request, say: Say) -> None:
    """The model's engine into the repository, built where there is none."""
    from trtpass.deploy.repository import Request as Deployment
    from trtpass.deploy.repository import deploy as write
    from trtpass.manifest import NAME

    folder = Path(request.model)
    if not (folder / NAME).is_file():
        folder = _engine(request, say)
    made = write(Deployment(folder, request.repository))
    say(f"deployed {', '.join(model['name'] for model in made['models'])} into {request.repository}")


def _engine(request: Request, say: Say) -> Path:
    """The folder of the engine, which is built where it is not there."""
    from graphs import resolve
    from trtpass import passes
    from trtpass.build import Request as Build
    from trtpass.build import build, slug
    from trtpass.encoder_build import default_passes
    from trtpass.manifest import NAME
    from trtpass.progress import bar

    recipe = resolve(request.model)
    texts = default_passes(recipe) if request.passes is None else request.passes
    folder = request.out / recipe.name / slug([passes.parse(text) for text in texts], "cpu")
    if (folder / NAME).is_file():
        say(f"engine: {folder}")
        return folder
    with bar(f"building {recipe.name}") as report:
        manifest, folder = build(Build(request.model, texts, "cpu", out=request.out), report)
    if manifest.checks.failed:
        raise CheckFailed(f"checks failed: {', '.join(manifest.checks.failed)}", fix=f"trtpass validate {folder}")
    say(f"built {folder}")
    return folder


def _present(server: Server, request: Request, say: Say) -> dict[str, Any]:
    """Say where the server is and how to call its models; send the one request."""
    models = {name: server.control.config(name) for name in server.control.states()}
    say(f"ready: {server.http} (HTTP), {server.grpc} (gRPC), {server.metrics} (metrics)")
    for header, key in server.control.headers.items():
        say(f"loading, unloading and tracing need the header {header}: {key}")
    answers = {}
    for name, config in models.items():
        text = any(tensor["name"] == "text_input" for tensor in config["input"])
        if text and request.ask:
            answers[name] = _ask(server, name, request.prompt, say)
        for line in (_text_commands if text else _array_commands)(server, name, request.prompt):
            say(line)
    say(f"curl -s {server.metrics} | grep '^trtpass_'")
    return {
        "http": server.http, "grpc": server.grpc, "metrics": server.metrics, "models": list(models), "answers": answers
    }  # fmt: skip


def _ask(server: Server, name: str, prompt: str, say: Say) -> str:
    answer = client.join(client.stream(server.http, name, prompt, max_tokens=MAX_TOKENS))
    say(f"{name}: {prompt!r} -> {answer.text!r}")
    usage = f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, ended by {answer.finish}"
    say(f"  {usage}, kept {answer.kept:.1%}")
    return answer.text


def _text_commands(server: Server, name: str, prompt: str) -> list[str]:
    body = {"text_input": prompt, "max_tokens": MAX_TOKENS}
    code = (
        "from trtpass.server.client import stream_grpc\n"
        f"for piece in stream_grpc({server.grpc!r}, {name!r}, {prompt!r}, max_tokens={MAX_TOKENS}): "
        "print(piece.text, end='', flush=True)"
    )
    url = f"{server.http}/v2/models/{name}"
    return [
        f"curl -s {url}/generate -d {shlex.quote(json.dumps(body))}",
        f"curl -sN {url}/generate_stream -d {shlex.quote(json.dumps({**body, 'stream': True}))}",
        _python(code),
    ]


def _array_commands(server: Server, name: str, prompt: str) -> list[str]:
    code = (
        "import numpy; from trtpass.server.client import infer\n"
        f"print(infer({server.grpc!r}, {name!r}, dict(numpy.load('inputs.npz'))))"
    )
    return [_python(code)]


def _python(code: str) -> str:
    """A shell's words for a program, in double quotes where they can hold it: they are easier to read."""
    plain = not any(letter in code for letter in '"$`\\!')
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    taken = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
