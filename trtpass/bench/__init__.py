"""``trtpass bench``: speed and memory against the strongest baseline, both sides interleaved in one process.

Every benchmark first compares its results with an oracle, on poisoned outputs, and raises ``CheckFailed`` instead of
reporting a speed where they differ. docs/benchmarks.md has figures and how to read them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtpass.bench.record import Record, pays_from, render
from trtpass.errors import InputError

if TYPE_CHECKING:
    from trtpass.bench.measure import Machine

__all__ = ["NAMES", "Record", "pays_from", "render", "run"]

NAMES = {
    "dense.attention": "dense attention: GroupQueryAttention against other forms and the matmul peak",
    "tsa.attention": "attention of a token-sparse layer at forced kept fractions and at the coverage's own",
    "tsa.overhead": "scoring, budget and selection as a share of dense attention",
    "tsa.prefill": "whole prefill of an engine's model, rewritten against dense",
    "ragged.decode": "a decode step over what each head holds, in pages, against one over the whole context",
    "kvzap.bytes": "memory of a paged cache at an engine's threshold: pages held, and the whole process",
    "kvzap.decode": "whole-model decode over what a policy keeps, against the dense engine, and against kvpress",
    "kvzap.attention": "attention alone of such a step, by kernel and by body, against the fastest dense one",
    "kvzap.scorer": "scoring as a share of the products with weights",
    "scc.components": "merging by connected components, whole, against PyTorch or NumPy, and its products alone",
    "merge.encoder": "an encoder that carries 75, 50 and 25% of its tokens, against the original file",
    "merge.overhead": "the same, against as many tokens chosen for free",
    "gpu.attention": "one layer in a TensorRT plan on a GPU, ours against TensorRT's own dense attention, 4K to 128K",
    "serve.throughput": "clients of a real server: tokens a second of rewritten engines against the dense one",
    "serve.latency": "what those clients wait for the first token and between tokens, median and 99th percentile",
    "serve.overhead": "the same requests through the server, through its scheduler alone, and as one batch",
    "compile.passes": "time and memory of all passes on a 36-layer, 8B-shaped graph",
}
ENGINES = Path("engines")


def run(
    names: Sequence[str],
    *,
    tokens: Sequence[int] = (2048, 4096, 8192),
    threads: int | None = None,
    repeats: int = 7,
    engine: Path | None = None,
    clock: str = "wall",
    engines: Sequence[Path] = (),
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> list[Record]:
    """Run benchmarks.

    Args:
        names: of ``NAMES``; none means all that run here.
        tokens: lengths of a row.
        threads: threads of one operator; default: the cores that this process may use.
        repeats: interleaved repeats of each side.
        engine: folder of an engine, for real q, k, v and whole prefill; default: the newest under ``engines/``.
        clock: ``wall``, or ``cpu`` (one thread) for a machine that others use too.
        engines: folders that ``serve.*`` compares; default: ``engine``, else those of smollm2-135m that are there.
        note: told, in words, what is being run, and what was left out and why.

    Raises:
        InputError: an unknown name, a length below 1, or a benchmark that was asked for and cannot run here.
        CheckFailed: a result is wrong; nothing is reported then.
    """
    from trtpass.bench import dense, measure

    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"unknown benchmark '{unknown[0]}'", f"one of {', '.join(NAMES)}")
    if repeats < 1 or (threads is not None and threads < 1):
        raise InputError(f"repeats={repeats}, threads={threads}", "1 or more")
    dense.need_lengths(tokens)
    chosen = [name for name in NAMES if not names or name in names]
    machine = measure.describe(threads or (1 if clock == "cpu" else measure.cores()), clock)
    folder = _engine(engine)
    records: list[Record] = []
    attention = [name for name in chosen if name in ("dense.attention", "tsa.attention", "tsa.overhead")]
    if attention:
        records += _attention(attention, tokens, machine, repeats, folder, note)
    if "tsa.prefill" in chosen:
        if folder is not None:
            from trtpass.bench import prefill

            note(f"tsa.prefill: {folder}")
            records += prefill.run(tokens, folder, machine, repeats)
        elif names:
            raise InputError("tsa.prefill needs an engine, and there is none", "an engine folder", _BUILD)
        else:
            note(f"tsa.prefill left out: there is no engine; {_BUILD}")
    if "ragged.decode" in chosen:
        from trtpass import native
        from trtpass.bench import ragged

        library = native.find()
        if names or not isinstance(library, str):
            note("ragged.decode: noise of its own, at one context")
            records += ragged.run(machine, repeats)
        else:
            note(f"ragged.decode left out: {library}")
    if kvzap := [name for name in chosen if name.startswith("kvzap.")]:
        records += _kvzap(kvzap, bool(names), machine, repeats, engine, note)
    if "scc.components" in chosen:
        from trtpass import native
        from trtpass.bench import merging

        library = native.find()
        if names or not isinstance(library, str):
            note("scc.components: tokens of a made-up scene")
            try:
                records += merging.run(machine, repeats)
            except merging.NotHere as reason:
                if names:
                    raise
                note(f"scc.components left out: {reason}")
        else:
            note(f"scc.components left out: {library}")
    if merge := [name for name in chosen if name.startswith("merge.")]:
        from trtpass.bench import encoder

        try:
            records += encoder.run(merge, machine, repeats, note)
        except encoder.NotHere as reason:
            if names:
                raise
            note(f"{', '.join(merge)} left out: {reason.found}")
    if "gpu.attention" in chosen:
        from trtpass.trt import builder

        lacking = builder.missing()
        if names or not lacking:
            from trtpass.bench import gpu

            records += gpu.run(note=note)  # lengths of its own: a GPU needs longer ones to be busy
        else:
            note(f"gpu.attention left out: {'; '.join(lacking)}")
    if serve := [name for name in chosen if name.startswith("serve.")]:
        given = engines or ([] if engine is None else [engine])
        records += _serve(serve, bool(names), machine, repeats, given, note)
    if "compile.passes" in chosen:
        from trtpass.bench import compiling

        note("compile.passes: exporting a 36-layer graph (not measured), then all passes in a process of their own")
        try:
            records += compiling.run(machine, repeats=min(repeats, 3))
        except compiling.NotHere as reason:
            if names:
                raise
            note(f"compile.passes left out: {reason}")
    return records


_BUILD = "run make engine MODEL=smollm2-135m (its weights come with make setup), or give --engine"


def _kvzap(
    chosen: Sequence[str],
    asked: bool,
    machine: Machine,
    repeats: int,
    engine: Path | None,
    note: Callable[[str], None],
) -> list[Record]:
    """Benchmarks of an engine with a cache policy: the one given, else the newest."""
    from trtpass.bench import cache_memory, kvzap

    found = [file.parent for file in ENGINES.glob("*/*/policy.safetensors")]
    folder = engine or max(found, key=lambda folder: folder.stat().st_mtime, default=None)
    if folder is None:
        if asked:
            raise InputError(f"{chosen[0]} needs an engine with a cache policy", "its folder", kvzap.BUILD)
        note(f"{', '.join(chosen)} left out: there is no engine with a cache policy; {kvzap.BUILD}")
        return []
    try:
        records = kvzap.run([n for n in chosen if n in kvzap.NAMES], folder, machine, repeats, note)
        if "kvzap.bytes" in chosen:
            records += cache_memory.run(folder, machine, kvzap.LENGTHS, note)
    except InputError as reason:  # such as an engine with a dense cache, or a shorter context
        if asked:
            raise
        note(f"{', '.join(chosen)} left out: {reason.found}")
        return []
    return records


def _serve(
    chosen: Sequence[str],
    asked: bool,
    machine: Machine,
    repeats: int,
    engines: Sequence[Path],
    note: Callable[[str], None],
) -> list[Record]:
    """Benchmarks of a server over several engines; left out where there is no server or nothing to compare."""
    from trtpass.bench import serve

    try:
        return serve.run(chosen, serve.find(engines, ENGINES), machine, repeats, note)
    except InputError as reason:
        if asked:
            raise
        note(f"{', '.join(chosen)} left out: {reason.found}")
        return []


def _engine(given: Path | None) -> Path | None:
    """The folder that was given, else the newest of a decoder under ``engines/``, else None."""
    if given is not None:
        if not (given / "dense.onnx").is_file():
            raise InputError(f"{given} has no dense.onnx", "the folder of an engine", _BUILD)
        return given
    found = [file.parent for file in ENGINES.glob("*/*/dense.onnx") if (file.parent / "tokenizer.json").is_file()]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def _attention(
    names: Sequence[str],
    tokens: Sequence[int],
    machine: Machine,
    repeats: int,
    folder: Path | None,
    note: Callable[[str], None],
) -> list[Record]:
    """Benchmarks of one layer, on q, k, v of the engine's model where there is one, else on noise."""
    from trtpass.bench import dense, inputs, sparse
    from trtpass.bench.layer import Heads

    if folder is not None:
        note(f"capturing q, k, v of {folder} at {max(tokens)} tokens")
        layers, heads = inputs.captured(folder, inputs.sparse_layers(folder), max(tokens), machine.threads)
    else:
        note("no engine: attention runs on seeded noise, so the coverage's own kept fraction is left out; " + _BUILD)
        heads = Heads()
        layers = inputs.seeded(heads, max(tokens))
    records: list[Record] = []
    if "dense.attention" in names:
        note("dense.attention")
        records += dense.run(tokens, layers, heads, machine, repeats)
    if sparse_names := [name for name in names if name.startswith("tsa.")]:
        note(", ".join(sparse_names))
        records += sparse.run(sparse_names, tokens, layers, heads, machine, repeats)
    return records
