"""``trtpass deploy``: an engine as a model of Triton Inference Server.

``REPO/`` then holds::

    <name>/config.pbtxt      shapes, types, batching, limits        README.md         how to run and to call it
    <name>/1/                what the server loads                  requirements.txt  of a model process
    (<name>-prefill, <name>-decode: bare graphs of a decoder)       grafana.json      a dashboard

A model's folder appears whole or not at all; others in the repository stay. Nothing in it names a place on the machine
that wrote it.
"""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtpass.deploy import forms
from trtpass.deploy.papers import check_papers, write_papers
from trtpass.deploy.pbtxt import render
from trtpass.deploy.plan import VERSION, Model, Source
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Manifest
from trtpass.serving.request import Limits
from trtpass.serving.settings import LARGEST, Settings
from trtpass.staging import staged

AUTO = "auto"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENCODER_ROWS = 8  # most rows of one run
TEXT_ONLY = ("prompt_tokens", "new_tokens", "pages")


@dataclass(frozen=True)
class Request:
    """What to deploy.

    Args:
        engine: folder of the engine.
        out: the repository.
        name: of the model; empty takes that of the engine's model.
        form: ``python``, ``onnxruntime``, ``tensorrt``, or ``auto``: python where ONNX Runtime runs the engine.
        rows, queue, prompt_tokens, new_tokens, pages, threads: limits, as ``trtpass.serving.request.Limits`` has them;
            None takes the usual ones, within the engine's context. Of an encoder ``rows`` is the largest batch.
    """

    engine: Path
    out: Path
    name: str = ""
    form: str = AUTO
    rows: int | None = None
    queue: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    pages: int | None = None
    threads: int | None = None


def deploy(request: Request) -> dict[str, Any]:
    """Write the models of an engine into a repository.

    Returns:
        ``repository``, ``form``, ``models`` (``name``, ``bytes``), ``limits``.

    Raises:
        InputError: no engine there, a wrong name or limit, a form that the engine cannot have, or a full disk. Nothing
            has been written then.
        CheckFailed: a file is not the one of the manifest, or the engine's checks failed.
    """
    from trtpass.validate import verify_files

    manifest = Manifest.read(request.engine)
    form = _form(request.form, manifest)
    name = _name(request.name or default_name(manifest))
    if manifest.checks.failed:
        raise CheckFailed(
            f"checks of this engine failed: {', '.join(manifest.checks.failed)}", "an engine that is proved",
            "build it again",
        )  # fmt: skip
    source = Source(request.engine, manifest, name, _settings(request, manifest), _rows(request, manifest))
    verify_files(request.engine, manifest)
    models: list[Model] = getattr(forms, form)(source)
    check_papers(request.out)
    with ExitStack() as stack:
        for model in models:
            work = stack.enter_context(staged(request.out / model.name))
            _write(model, work)
    write_papers(request.out)
    return {
        "repository": str(request.out), "form": form,
        "models": [{"name": m.name, "bytes": _bytes(request.out / m.name)} for m in models],
        "limits": source.settings.parameters() if form == "python" and manifest.kind == "decoder" else {},
    }  # fmt: skip


def summary(made: dict[str, Any]) -> str:
    """What ``deploy`` did, for people."""
    lines = [f"{m['name']}: {m['bytes'] / 1e6:.1f} MB, {made['form']} form" for m in made["models"]]
    if made["limits"]:
        lines.append("limits: " + ", ".join(f"{key} {value}" for key, value in made["limits"].items()))
    return "\n".join([*lines, f"written to {made['repository']}; its README.md says how to run and to call it"])


def _form(asked: str, manifest: Manifest) -> str:
    if asked != AUTO and asked not in forms.FORMS:
        raise InputError(f"--form {asked}", f"one of {', '.join((AUTO, *forms.FORMS))}")
    if asked != AUTO:
        return asked
    return "tensorrt" if manifest.target.startswith("tensorrt") else "python"


def default_name(manifest: Manifest) -> str:
    """The name of an engine's model where none is given."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", manifest.model).strip("-._")


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(
            f"the name {name!r}", "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit",
            "give --name",
        )  # fmt: skip
    return name


def _settings(request: Request, manifest: Manifest) -> Settings:
    """The limits asked for, else the usual ones, within the engine's context."""
    for key in ("rows", "queue", "prompt_tokens", "new_tokens", "pages", "threads"):
        given, least = getattr(request, key), 0 if key == "queue" else 1
        if given is not None and not least <= given <= LARGEST:
            raise InputError(f"{key.replace('_', ' ')}: {given}", f"a number from {least} to {LARGEST}")
        if given is not None and manifest.kind == "encoder" and key in TEXT_ONLY:
            raise InputError(f"{key.replace('_', ' ')}: {given}, for an encoder", "limits of rows, queue and threads")
    if request.pages is not None and manifest.page is None:
        raise InputError(f"{request.pages} pages for a dense cache", "an engine with a cache policy")
    usual, context = Limits(), manifest.context or LARGEST
    for key in ("prompt_tokens", "new_tokens"):
        if (getattr(request, key) or 0) > context:
            raise InputError(
                f"{key.replace('_', ' ')}: {getattr(request, key)}", f"at most {context}, the engine's context"
            )
    limits = Limits(
        rows=request.rows or usual.rows,
        queue=usual.queue if request.queue is None else request.queue,
        prompt_tokens=request.prompt_tokens or min(usual.prompt_tokens, context),
        new_tokens=request.new_tokens or min(usual.new_tokens, context),
        pages=request.pages,
        threads=request.threads,
    )
    return Settings(limits, min(Settings.default_max_tokens, limits.new_tokens))


def _rows(request: Request, manifest: Manifest) -> int:
    return request.rows or (ENCODER_ROWS if manifest.kind == "encoder" else Limits.rows)


def _write(model: Model, work: Path) -> None:
    version = work / VERSION
    version.mkdir()
    for name, path in model.files.items():
        shutil.copyfile(path, version / name)
    for name, text in model.texts.items():
        (version / name).write_text(text)
    for fill in model.fill:
        fill(version)
    (work / "config.pbtxt").write_text(render(model.config))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
