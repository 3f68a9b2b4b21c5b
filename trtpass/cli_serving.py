"""Commands of ``trtpass`` that have to do with Triton Inference Server; ``trtpass.cli`` imports this module."""

from __future__ import annotations

import functools
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from trtpass.cli import EngineFolder, Json, PassList, _print, app
from trtpass.errors import CheckFailed
from trtpass.server.ports import LOOPBACK


@app.command("deploy")
def deploy_command(
    engine: EngineFolder,
    output: Annotated[Path, typer.Option("-o", "--output", help="The model repository; other models in it stay.")],
    name: Annotated[str, typer.Option(help="Of the model; default: that of the engine's model.")] = "",
    form: Annotated[
        str, typer.Option(help="python (text in, text out), onnxruntime or tensorrt (bare graphs), or auto.")
    ] = "auto",
    rows: Annotated[
        int | None, typer.Option(help="Most requests that run at once; of an encoder: most rows of a batch.")
    ] = None,
    queue: Annotated[int | None, typer.Option(help="Most requests that wait; one more is refused.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Most tokens of a prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    pages: Annotated[
        int | None,
        typer.Option("--cache-pages", help="Pages of a layer's KV cache, with a cache policy; default: enough."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of an operator; default: all cores.")] = None,
    json: Json = False,
) -> None:
    """Write an engine into a model repository of Triton Inference Server. Exit 1 if its checks failed."""
    from trtpass.deploy.repository import Request, deploy, summary

    made = deploy(
        Request(engine, output, name, form, rows, queue, prompt_tokens, new_tokens, pages, threads)
    )  # fmt: skip
    _print(made, json, summary)


@app.command("serve")
def serve_command(
    repository: Annotated[Path, typer.Argument(help="A model repository, which `trtpass deploy` writes.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every address of this machine.")] = LOOPBACK,
    http_port: Annotated[int, typer.Option(help="0: any free one; so with the other two.")] = 8000,
    grpc_port: Annotated[int, typer.Option()] = 8001,
    metrics_port: Annotated[int, typer.Option()] = 8002,
    model: Annotated[
        str, typer.Option(help="Deploy this first: a known name, Hugging Face folder, ONNX file, or engine folder.")
    ] = "",
    passes: PassList = None,
    out: Annotated[Path, typer.Option(help="Folder of all engines, where --model is found or built.")] = Path(
        "engines"
    ),
    ask: Annotated[
        bool, typer.Option("--ask", help="Send one request to each text model and print the answer.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="Of that request.")] = "The capital of France is",
    once: Annotated[bool, typer.Option("--once", help="Stop when everything was ready (and asked).")] = False,
    log: Annotated[Path | None, typer.Option(help="File for the server's own words.")] = None,
    json: Json = False,
) -> None:
    """Serve a model repository with a Triton Inference Server until Ctrl-C or SIGTERM; then running answers end first.
    A model whose process dies is loaded again."""
    from trtpass.server.foreground import Request, serve

    request = Request(
        repository, model, [] if passes == ["none"] else passes, out, host, http_port, grpc_port, metrics_port, ask,
        prompt, once, log,
    )  # fmt: skip
    say = functools.partial(typer.echo, err=json)  # JSON alone on stdout: one line, once everything is ready
    serve(request, say, (lambda told: typer.echo(jsonlib.dumps(told))) if json else None)


def validate_served(engine: Path, url: str, model: str, grpc: str, json: bool) -> None:
    """``trtpass validate --url``: print what differs from the saved outputs.

    Raises:
        CheckFailed: something does.
    """
    from trtpass.server.check import check_server, render

    rows = check_server(engine, url, model=model, grpc=grpc)
    _print([row.as_dict() for row in rows] if json else rows, json, lambda r: render(r, f"{engine} served at {url}"))
    if wrong := [row.what for row in rows if not row.passed]:
        raise CheckFailed(f"the server differs: {', '.join(wrong)}", fix="see the table above")
