"""``trtpass generate``: text in, text out, streamed as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.paged import CacheFull, PagedEngine
from trtpass.runtime import Engine
from trtpass.sampling import Step
from trtpass.text import AnswerText, Tokenizer

RUNNABLE = ("cpu", "portable")


def generate(
    folder: Path,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    chunk: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    threads: int | None = None,
    provider: str = "cpu",
    pages: int | None = None,
    write: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Generate from an engine folder.

    Args:
        prompts: one text a row; they run as one batch, of any lengths.
        chunk: tokens of prefill at a time; None reads whole prompts.
        temperature, top_p, seed: as for ``Engine.generate``.
        stop: texts that end a row, whose text is cut before the first of them (``trtpass.text.StopText``).
        provider: of ONNX Runtime; a session that got another one is an error (the runtime falls back in silence).
        pages: pages of each layer's pool, where the cache is paged; None has room for every key.
        write: called with each piece of text of a single prompt as it is made, or with the whole of each of several.
        say: called once with what runs where.

    Returns:
        A dict a row: ``prompt``, ``text``, ``prompt_tokens``, ``tokens`` (new ids), ``stopped`` (stop, length,
        context, cache: no page was left), ``provider``; and where the cache is paged ``cache``: the largest
        ``bytes`` that it held, all rows together, and of the row the share of its keys that was ``kept`` at its end.

    Raises:
        InputError: no engine there, a target that does not run here, an empty prompt, or what ``Engine`` refuses.
    """
    manifest = Manifest.read(folder)
    if manifest.kind == "encoder":
        raise InputError(
            f"'{manifest.model}' is an encoder: it generates no text",
            "the engine of a decoder",
            "run it with trtpass.runtime.Engine.open(folder).run({input: array})",
        )
    if manifest.target not in RUNNABLE:
        raise InputError(
            f"this engine's target is '{manifest.target}', whose plans run on a GPU in TensorRT",
            f"an engine of target {' or '.join(RUNNABLE)}",
            "build one with TARGET=cpu",
        )
    if chunk is not None and manifest.whole_prompt:
        raise InputError(
            f"prefill in chunks of {chunk}, but '{manifest.whole_prompt}' is defined on whole prompts only: it selects "
            "tokens by what the last queries of the prompt look at",
            "a whole prompt",
            "leave --chunk away, or use a dense engine (trtpass build --dense)",
        )
    tokenizer = Tokenizer.open(folder)
    rows = [tokenizer.encode(text) for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise InputError(f"the prompt {text!r} has no tokens", "at least one")
    engine = Engine.open(folder, provider, threads, manifest.context)
    if say:
        say(f"{manifest.model}, target {manifest.target}, on {engine.provider}")
    answers = [AnswerText(tokenizer, stop) for _ in rows]
    texts, tokens = [""] * len(rows), [list[int]() for _ in rows]
    stopped: list[str | None] = [None] * len(rows)
    paged = engine if isinstance(engine, PagedEngine) else None
    if pages is not None and paged is None:
        raise InputError(f"{pages} pages for a dense cache", "an engine with a cache policy")
    if paged is not None:
        paged.limit_pages = pages
    steps = engine.generate(
        rows, max_tokens, manifest.stop_ids, temperature, seed, chunk, top_p, lambda i, token: answers[i].push(token)
    )

    def show(row: int, piece: str) -> None:
        texts[row] += piece
        if write and piece and len(rows) == 1:
            write(piece)

    for step in _until_full(steps, say):
        for i, token in enumerate(step.tokens):
            if token is None:
                continue
            tokens[i].append(token)
            reason = step.stopped[i]
            piece, stopped[i] = answers[i].finish(reason) if reason else (answers[i].take(), None)
            show(i, piece)
    for i in [i for i, reason in enumerate(stopped) if reason is None]:
        piece, stopped[i] = answers[i].finish("cache")
        show(i, piece)
    if write:
        write("\n" if len(rows) == 1 else "".join(f"[{i}] {text}\n" for i, text in enumerate(texts)))
    made: list[dict[str, Any]] = [
        {
            "prompt": p,
            "text": t,
            "prompt_tokens": len(r),
            "tokens": n,
            "stopped": s,
            "provider": engine.provider,
        }
        for p, t, r, n, s in zip(prompts, texts, rows, tokens, stopped, strict=True)
    ]
    usage = None if paged is None else paged.usage
    if usage is not None:
        for one, share in zip(made, usage.kept.tolist(), strict=True):
            one["cache"] = {"bytes": usage.bytes, "kept": round(share, 4)}
        if say:
            say(f"the cache held {usage.kept.mean():.1%} of the keys, {usage.bytes / 1e6:.1f} MB at most")
    return made


def _until_full(steps: Iterator[Step], say: Callable[[str], None] | None) -> Iterator[Step]:
    """Steps until the cache is full: what was generated stays."""
    first = True
    while True:
        try:
            yield next(steps)
        except StopIteration:
            return
        except CacheFull as full:
            if first:
                raise  # not even the prompt fits
            if say:
                say(str(full))
            return
        first = False
