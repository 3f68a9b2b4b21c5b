"""Commands of ``trtpass`` that have to do with Triton Inference Server; ``trtpass.cli`` imports this module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtpass.cli import EngineFolder, Json, _print, app


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
