"""The ``trtpass`` command. Heavy modules are imported inside the commands that need them.

Exit codes: 0 done, 1 a check failed, 2 the input or the request was wrong. Every command takes ``--json``.
"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trtpass.errors import CheckFailed, InputError, TrtpassError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(
    "Rewrites transformer graphs so that fewer tokens are attended to or cached, and builds engines that are proved "
    "against PyTorch."))  # fmt: skip
calibrate_app = typer.Typer(no_args_is_help=True, help="Measure, once a model, what passes need to know.")
app.add_typer(calibrate_app, name="calibrate")
fit_app = typer.Typer(no_args_is_help=True, help="Fit the small models that passes bring into a graph.")
app.add_typer(fit_app, name="fit")

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
PassList = Annotated[
    list[str] | None,
    typer.Option(
        "-p", "--pass", help="NAME[:key=value,...]; repeatable; 'none': the dense engine. See `trtpass passes`."
    ),
]
EngineFolder = Annotated[
    Path, typer.Argument(help="Folder of an engine, engines/<model>/<recipe>.", show_default=False)
]


def _print(value: Any, as_json: bool, render: Any = None) -> None:
    """JSON, or what ``render(value)`` makes of it."""
    if as_json:
        typer.echo(jsonlib.dumps(value, indent=2, default=str))
        return
    from rich.console import Console

    # a table must not be cut where there is no terminal to measure
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False, highlight=False)
    shown = render(value) if render else value
    console.print(shown, markup=not isinstance(shown, str))  # a shape such as [B, S] in plain text is not markup


@app.command("build")
def build_command(
    model: Annotated[
        str | None, typer.Argument(help="Known name, Hugging Face folder, or ONNX file.", show_default=False)
    ] = None,
    passes: PassList = None,
    dense: Annotated[bool, typer.Option("--dense", help="No method: the dense engine.")] = False,
    target: Annotated[str, typer.Option(help="cpu, portable, tensorrt-rtx or tensorrt.")] = "cpu",
    sm: Annotated[
        str,
        typer.Option(
            help="Compute capabilities of a plan, such as 89 or 80,89. Default: all; for tensorrt this GPU's, or 90."
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of all engines.")] = Path("engines"),
    logits: Annotated[str, typer.Option(help="last (of each row) or all tokens.")] = "last",
    kernels: Annotated[
        bool, typer.Option(help="Native kernels in a CPU engine; without, for a machine that has no library of them.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Type of a plan's weights and cache: float16 or bfloat16.")] = "float16",
    page: Annotated[int, typer.Option(help="Slots of a page of the KV cache, with a cache policy.")] = 64,
    size: Annotated[
        list[str] | None,
        typer.Option(help="NAME=N[+N...] for an open size of an encoder; a plan is built for each choice. Repeatable."),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Arrays to check an encoder with, an .npz file; default: the model's, or noise.")
    ] = None,
    json: Json = False,
) -> None:
    """Build an engine and prove it. Without MODEL: list what is known."""
    from graphs import known

    if not model:
        models_command(json=json)
        return
    from trtpass.build import Request, build
    from trtpass.manifest import render
    from trtpass.progress import bar

    if dense and passes:
        raise InputError("both --dense and -p were given", "one of them")
    if logits not in ("last", "all"):
        raise InputError(f"--logits {logits}", "last or all")
    chosen: list[str] | None = [] if dense or passes == ["none"] else passes
    wanted = tuple(s.strip() for s in sm.split(",") if s.strip())
    sizes = _sizes(size or [])
    request = Request(model, chosen, target, wanted, out, logits, kernels, dtype, page, sizes, inputs)
    with bar(f"building {model if model in known() else Path(model).name}") as report:
        manifest, folder = build(request, report)
    _print(manifest.model_dump(mode="json") if json else manifest, json, lambda m: render(m, folder))
    if manifest.checks.failed:
        raise CheckFailed(f"checks failed: {', '.join(manifest.checks.failed)}", fix="see the table above")
    if manifest.unbuilt:
        from trtpass.trt.builder import INSTEAD

        raise InputError(
            f"no plan was built: {manifest.unbuilt}",
            f"a machine with TensorRT and the GPU; the graphs that it reads are in {folder}, checked",
            INSTEAD,
        )


def _sizes(given: list[str]) -> dict[str, tuple[int, ...]]:
    """``["batch=1+8"]`` to ``{"batch": (1, 8)}``."""
    sizes: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, _, numbers = text.partition("=")
        parts = numbers.split("+")
        if not name or name in sizes or not all(part.isdecimal() for part in parts):
            raise InputError(f"--size {text}", "NAME=N or NAME=N+N, each name once, such as batch=1+8")
        sizes[name] = tuple(map(int, parts))
    return sizes


@app.command("models")
def models_command(json: Json = False) -> None:
    """List the models that are known by name, and what else MODEL may be."""
    from graphs import known

    rows = {name: recipe.summary for name, recipe in known().items()}

    def render(value: dict[str, str]) -> str:
        lines = [f"  {name:<20} {summary}" for name, summary in value.items()]
        return "MODEL is one of\n" + "\n".join(lines) + "\nor a Hugging Face folder with safetensors, or an ONNX file."

    _print(rows, json, render)


@app.command("passes")
def passes_command(json: Json = False) -> None:
    """List the passes and their options."""
    import dataclasses

    from trtpass.passes import all_methods

    rows = {
        name: {
            "summary": cls.summary,
            "source": cls.source,
            "options": {f.name: f.default for f in dataclasses.fields(cls.Options)},
        }
        for name, cls in all_methods().items()
    }

    def render(value: dict[str, Any]) -> str:
        return "\n".join(
            f"{name}: {row['summary']} ({row['source']})\n  " + ", ".join(f"{k}={v}" for k, v in row["options"].items())
            for name, row in value.items()
        )

    _print(rows, json, render)


@app.command("doctor")
def doctor_command(json: Json = False) -> None:
    """What this machine can build and run, and for each thing it cannot, why."""
    import dataclasses

    from trtpass.doctor import examine, render

    findings = examine()
    _print([dataclasses.asdict(f) for f in findings] if json else findings, json, render)


@app.command("inspect")
def inspect_command(file: Annotated[Path, typer.Argument(help="An ONNX file.")], json: Json = False) -> None:
    """Anchors found in an ONNX file, methods that apply, and why others do not."""
    import dataclasses

    from trtpass import io
    from trtpass.inspect import inspect, render

    found = inspect(io.load(file))
    _print(dataclasses.asdict(found) if json else found, json, lambda f: render(f, file.name))


@app.command("rewrite")
def rewrite_command(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write; its weights go beside it.")],
    passes: PassList = None,
    json: Json = False,
) -> None:
    """Raise an ONNX file to canonical form and apply passes to it."""
    import dataclasses

    from trtpass import io
    from trtpass import passes as passlib
    from trtpass.canonicalize import canonicalize

    steps = [passlib.parse(text) for text in passes or []]
    model = io.load(file)
    raised = canonicalize(model)
    results = passlib.run(model, steps)
    io.save(model, output, weights=f"{output.stem}.weights.bin")
    report = {
        "output": str(output),
        "raised": raised.counts,
        "near_misses": raised.near_misses,
        "passes": [dataclasses.asdict(dataclasses.replace(r, plan=None)) for r in results],
    }

    def render(value: dict[str, Any]) -> str:
        lines = [f"wrote {output}", "raised: " + ", ".join(f"{n} {k}" for k, n in value["raised"].items() if n)]
        for r in results:
            lines.append(f"{r.name}: {len(r.sites)} sites" + ("" if r.modified else ", nothing changed"))
            lines += [f"  not at {reason}" for reason in r.near_misses]
            lines += [f"  {note}" for note in r.notes]
            lines += [f"  warning: {warning}" for warning in r.warnings]
        return "\n".join(lines)

    _print(report, json, render)


@app.command("validate")
def validate_command(
    engine: EngineFolder,
    quality: Annotated[bool, typer.Option("--quality", help="Also measure quality, dense against rewritten.")] = False,
    short: Annotated[bool, typer.Option("--short", help="A short form of --quality.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text for --quality instead of the public-domain one.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the torch model is, if it moved.")] = None,
    url: Annotated[
        str, typer.Option(help="Instead: compare the answers of the server at this address with what torch answered.")
    ] = "",
    model_name: Annotated[str, typer.Option(help="With --url: the model's name there, if it was given one.")] = "",
    grpc_url: Annotated[str, typer.Option(help="With --url: host:port of gRPC; default: the port after --url's.")] = "",
    json: Json = False,
) -> None:
    """Prove an engine again: files, torch = ONNX, twin = rewritten, rewritten = engine; or with --url what is served of
    it. Exit 1 if a check fails."""
    if url:
        from trtpass.cli_serving import validate_served

        validate_served(engine, url, model_name, grpc_url, json)
        return
    from trtpass.manifest import Manifest, render
    from trtpass.progress import bar
    from trtpass.validate import validate

    with bar("validating") as report:
        checks = validate(engine, model, report)
    if quality:
        from trtpass.quality import cache, measure
        from trtpass.quality import render as render_quality

        with bar("quality") as report:
            paged = Manifest.read(engine).page is not None
            measured = (cache.measure if paged else measure)(engine, text=text, short=short, report=report)
        if not json:
            _print(measured, False, render_quality)
    manifest = Manifest.read(engine)
    _print(manifest.model_dump(mode="json") if json else manifest, json, lambda m: render(m, engine))
    if checks.failed:
        raise CheckFailed(f"checks failed: {', '.join(checks.failed)}")


@app.command("generate")
def generate_command(
    engine: EngineFolder,
    prompt: Annotated[list[str], typer.Option(help="The prompt; repeat for a batch.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    chunk: Annotated[int | None, typer.Option(help="Prefill in chunks of so many tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For temperature > 0.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeat for several.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.")] = None,
    provider: Annotated[
        str, typer.Option(help="ONNX Runtime provider: cpu, cuda, ... Another one is an error.")
    ] = "cpu",
    pages: Annotated[
        int | None,
        typer.Option("--cache-pages", help="Pages of a layer's KV cache, with a cache policy; default: enough."),
    ] = None,
    json: Json = False,
) -> None:
    """Generate text with an engine; it streams as it is made."""
    from trtpass.generate import generate

    rows = generate(
        engine, prompt, max_tokens=max_tokens, chunk=chunk, temperature=temperature, top_p=top_p, seed=seed,
        stop=stop or (), threads=threads, provider=provider, pages=pages,
        say=None if json else lambda text: typer.echo(text, err=True),
        write=None if json else lambda piece: typer.echo(piece, nl=False),
    )  # fmt: skip
    if json:
        _print(rows, True)
    if any(row["stopped"] == "cache" for row in rows):
        raise InputError(
            "the KV cache is full, and generation ended there", "room for the keys that are kept",
            "give more --cache-pages, or leave the option away",
        )  # fmt: skip


@app.command("bench")
def bench_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks; default: all that run here. With --serve: engine folders.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Lengths, such as 2048,4096,8192.")] = "2048,4096,8192",
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats of each side.")] = 7,
    engine: Annotated[Path | None, typer.Option(help="Engine folder; default: the newest of engines/.")] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu (one thread) on a machine that others use too.")] = "wall",
    serve: Annotated[
        bool, typer.Option("--serve", help="Only serve.*: dense against rewritten engines on one real server.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure speed and memory against the strongest baseline, interleaved in one process."""
    import dataclasses

    from trtpass.bench import NAMES, render, run

    try:
        lengths = tuple(int(x) for x in tokens.split(","))
    except ValueError as error:
        raise InputError(f"--tokens {tokens}", "lengths joined by commas, such as 2048,4096") from error
    folders = [Path(name) for name in names or []] if serve else []
    chosen = [name for name in NAMES if name.startswith("serve.")] if serve else names or []
    records = run(chosen, tokens=lengths, threads=threads, repeats=repeats, engine=engine, clock=clock, engines=folders)
    _print([dataclasses.asdict(r) for r in records] if json else records, json, render)


@calibrate_app.command("drift")
def drift_command(
    model: Annotated[str, typer.Argument(help="Known name or Hugging Face folder.")],
    text: Annotated[Path | None, typer.Option(help="Text to measure on; default: the public-domain one.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to use.")] = 2048,
    json: Json = False,
) -> None:
    """Measure inter-layer representation drift and store it beside the recipe."""
    from trtpass.calibrate import calibrate_drift

    stored = calibrate_drift(model, text, tokens)

    def render(value: dict[str, Any]) -> str:
        lines = [f"layer {i:>3}  R = {r:.4f}" for i, r in enumerate(value["values"])]
        return "\n".join([*lines, f"drift:0.5 is layers={value['half']}", f"stored in {value['path']}"])

    _print(stored, json, render)


@fit_app.command("kvzap")
def fit_kvzap_command(
    model: Annotated[str, typer.Argument(help="Known name or Hugging Face folder.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Text to fit on, plain or .gz; default: the public-domain one.")
    ] = None,
    kind: Annotated[str, typer.Option(help="linear or mlp.")] = "linear",
    out: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file, or a folder. Default: <model>.kvzap-<kind>.safetensors here."),
    ] = None,
    contexts: Annotated[int, typer.Option(help="Contexts to fit on, of 256 to 3500 tokens.")] = 48,
    seed: Annotated[int, typer.Option(help="Of places, lengths and initial weights.")] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of what is collected; a later run continues with it. Default: <out>.work."),
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Leave that folder, for a fit of the other kind.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.")] = None,
    json: Json = False,
) -> None:
    """Fit the small model by which `-p kvzap` tells which keys a KV cache can drop (KVzap's surrogate of KVzip+
    scores), and measure it on text that it was not fitted on. Run it again to continue."""
    from trtpass.kvzap.fit import Request, fit, render
    from trtpass.progress import bar

    with bar("fitting kvzap") as report:
        record = fit(Request(model, kind, out, corpus, contexts, seed, work, keep_work, threads), report)
    _print(record, json, render)


def main() -> None:
    """Entry point: every failure is one clear message and an exit code."""
    arguments = sys.argv[1:]
    show = "--traceback" in arguments
    try:
        app(args=[a for a in arguments if a != "--traceback"], standalone_mode=True)
    except TrtpassError as error:
        if show:
            raise
        _fail(str(error), error.exit_code, "--json" in arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's own answer to Ctrl-C
            _fail("interrupted; nothing half-written was left behind", 2, "--json" in arguments)
        raise
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left behind", 2, "--json" in arguments)
    except ModuleNotFoundError as error:
        if show:
            raise
        extra = {"tensorrt_rtx": "rtx", "triton": "kernels", "matplotlib": "plot"}.get(str(error.name), "export")
        _fail(
            f"the package '{error.name}' is not installed\n  To do: pip install 'trtpass[{extra}]'",
            2,
            "--json" in arguments,
        )
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(2)
    except Exception as error:
        if show:
            raise
        text = str(error).strip().splitlines() or [""]
        advice = "To do: run it again with --traceback and report that"
        _fail(f"unexpected {type(error).__name__}: {text[0][:300]}\n  {advice}", 2, "--json" in arguments)


def _fail(message: str, code: int, as_json: bool) -> None:
    typer.echo(jsonlib.dumps({"error": message}) if as_json else f"error: {message}", err=True)
    sys.exit(code)


import trtpass.cli_serving  # noqa: E402, F401 - its commands; it needs what is defined above
