"""Running an engine on ONNX Runtime: prefill, decode and generation over one static cache, for ragged batches.

The cache is allocated once per call of ``prefill`` and bound as past and present alike, so decode moves no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.bound import DECODE, PREFILL, Bound, State, key
from trtpass.errors import InputError
from trtpass.reduction.decoder import DROPPED, SPAN_KEY, Shortened
from trtpass.sampling import Sampler, Step
from trtpass.sessions import Source, dtype_of, open_session, properties, provider_name

__all__ = ["DECODE", "ENGINE", "PREFILL", "Engine", "State", "last", "padded"]

ENGINE = "engine"  # the one graph of an encoder


class Engine(Bound):
    """A prefill and a decode graph, opened on one provider; see ``Engine.open``."""

    def __init__(
        self, sources: Mapping[str, Source], provider: str, threads: int | None, context: int | None, decode: Any
    ) -> None:
        self.provider = provider
        self._sources, self._threads = dict(sources), threads
        self._sessions = {key(DECODE): decode}
        inputs = {item.name: item for item in decode.get_inputs()}
        self.cache_inputs = tuple(name for name in inputs if name.startswith("past."))
        if not self.cache_inputs or not self.inputs <= inputs.keys():
            raise InputError(
                f"the decode graph has inputs {', '.join(inputs)}",
                f"{', '.join(sorted(self.inputs))} and past.{{i}}.key, past.{{i}}.value",
                "insert a cache with the cache pass",
            )
        stated = decode.get_modelmeta().custom_metadata_map
        self.shortened = Shortened.read(stated.get(SPAN_KEY)) if DROPPED in inputs else None
        self._cache_dtype = dtype_of(inputs[self.cache_inputs[0]].type)
        self._logits_dtype = dtype_of(decode.get_outputs()[0].type)
        slots = self._read_cache(inputs)
        limit = stated.get("trtpass.context", "")
        limits = [x for x in (context, int(limit) if limit.isdecimal() else None, slots) if isinstance(x, int)]
        self.fixed_capacity: int | None = slots if isinstance(slots, int) else None
        self.context: int | None = min(limits, default=None)
        vocab = decode.get_outputs()[0].shape[-1]
        if not isinstance(vocab, int):
            raise InputError(f"the decode graph's logits have {vocab} entries", "a fixed vocabulary")
        self.vocab = vocab

    inputs = frozenset({"input_ids", "lengths", "past_lengths"})  # of the decode graph, beside the cache's own

    def _read_cache(self, inputs: Mapping[str, Any]) -> int | None:
        """Heads and widths of the cache; slots of a row where the graph fixes them."""
        self._cache_shapes = {n: (inputs[n].shape[1], inputs[n].shape[3]) for n in self.cache_inputs}
        sizes = {n: inputs[n].shape[2] for n in self.cache_inputs}
        self._slots = {n: size if isinstance(size, int) else None for n, size in sizes.items()}
        return max((size for size in self._slots.values() if size is not None), default=None)

    @classmethod
    def open(
        cls,
        source: str | Path | Mapping[str, Source],
        provider: str = "cpu",
        threads: int | None = None,
        context: int | None = None,
    ) -> Engine:
        """Open an engine folder (``prefill.onnx``, ``decode.onnx``), or these graphs as onnx-ir models or paths.

        The folder of an encoder (``engine.onnx``) gives a ``trtpass.encoder_engine.EncoderEngine``.

        Args:
            source: a folder, or ``{"prefill": ..., "decode": ...}``.
            provider: ``cpu``, ``cuda``, ...; it is an error if ONNX Runtime falls back to another.
            threads: threads of one operator; None leaves the choice to ONNX Runtime.
            context: most tokens of a row; None takes what the decode graph states.

        Raises:
            InputError: a missing file, a graph without a cache, or a provider that is not there.
        """
        if not isinstance(source, Mapping):
            folder = Path(source)
            source = {phase: folder / f"{phase}.onnx" for phase in (PREFILL, DECODE)}
            if any(folder.glob(f"{ENGINE}.*")):
                source = {ENGINE: folder / f"{ENGINE}.onnx"}
        if ENGINE in source:
            from trtpass.encoder_engine import EncoderEngine

            return EncoderEngine.open(source, provider, threads)
        missing = [phase for phase in (PREFILL, DECODE) if phase not in source]
        if missing:
            raise InputError(f"an engine without {' and '.join(missing)}", "a prefill and a decode graph")
        from trtpass.paged import PagedEngine, is_paged

        provider = provider_name(provider)
        decode = open_session(source[DECODE], provider, threads)
        kind = PagedEngine if is_paged(decode.get_modelmeta().custom_metadata_map) else Engine
        return kind(source, provider, threads, context, decode)

    @cached_property
    def whole_prompt(self) -> str:
        """The method that needs whole prompts, or an empty string."""
        from trtpass.passes import WHOLE_PROMPT_KEY

        return properties(self._sources[PREFILL]).get(WHOLE_PROMPT_KEY, "")

    def prefill(self, rows: Sequence[Sequence[int]], chunk: int | None = None, capacity: int | None = None) -> State:
        """Read the prompts (of different lengths) into a new cache.

        Args:
            rows: token ids of each row, at least one a row.
            chunk: read in pieces of at most this many tokens, row by row, with the decode graph; None reads all.
            capacity: slots of a row; None takes the graph's, else the context limit, else longest prompt + 256.

        Raises:
            InputError: an empty row, an id outside the vocabulary, a prompt beyond the context limit or capacity, or
                chunks where the engine's method is defined on whole prompts only. Nothing has been run then.
        """
        lengths = self._check_rows(rows)
        slots = self._capacity(int(lengths.max()), capacity)
        if chunk is not None:
            self._check_chunk(chunk)
        cache = self._new_cache(lengths, slots)
        state = State(cache, lengths, np.empty((len(rows), self.vocab), np.float32), slots)
        if chunk is None:
            names = () if self.shortened is None else (DROPPED,)
            outputs = self._run(PREFILL, padded(rows, lengths), {"lengths": lengths}, state, outputs=names)
            state.logits, state.dropped = last(outputs["logits"], lengths), outputs.get(DROPPED)
            return state
        state.lengths = np.zeros_like(lengths)
        self.append(state, rows, chunk)
        return state

    def read(self, state: State, row: int, prompt: Sequence[int]) -> np.ndarray:
        """Read a whole prompt into one row of a batch, whose slots are zeros; returns the logits ``[V]`` after it.

        Args:
            state: changed in place, at this row only.
            row: which one.
            prompt: token ids, at least one.

        Raises:
            InputError: as ``prefill``; the row's slots may have been written to then, and nothing else.
        """
        lengths = self._check_rows([prompt])
        self._check_fits(int(lengths[0]), state.capacity)
        names = () if self.shortened is None else (DROPPED,)
        outputs = self._run(PREFILL, padded([prompt], lengths), {"lengths": lengths}, state, row, outputs=names)
        state.lengths[row] = lengths[0]
        if state.dropped is not None:
            state.dropped[:, row] = outputs[DROPPED][:, 0]
        state.logits[row] = last(outputs["logits"], lengths)[0]
        answer: np.ndarray = state.logits[row]
        return answer

    def decode(self, state: State, tokens: Sequence[int], active: Sequence[bool] | None = None) -> np.ndarray:
        """Append one token to each row; returns (and keeps in ``state``) the logits ``[B, V]`` after it.

        Args:
            state: what ``prefill`` returned; changed in place.
            tokens: one id a row; that of a row which is not active is ignored.
            active: False for rows that have ended: they do not advance and must not be continued later.

        Raises:
            InputError: a row of tokens of the wrong size, an id outside the vocabulary, or no slot left.
        """
        ids, moving = self._check_step(state, tokens, active)
        batch = len(state.lengths)
        feeds = {
            "lengths": np.ones(batch, np.int32),
            "past_lengths": np.minimum(state.lengths, state.capacity - 1).astype(np.int32),
        }
        if state.dropped is not None:
            feeds[DROPPED] = state.dropped
        if self.provider == "CPUExecutionProvider":
            logits = self._step(state, {"input_ids": ids[:, None], **feeds})
        else:  # what lies on the host is copied when it is bound
            logits = self._run(DECODE, ids[:, None], feeds, state)["logits"]
        state.lengths = state.lengths + moving.astype(np.int32)
        state.logits = logits[:, -1].astype(np.float32)
        return state.logits

    def append(self, state: State, rows: Sequence[Sequence[int]], chunk: int | None = None) -> np.ndarray:
        """Append several tokens to each row, such as a later turn; returns the logits ``[B, V]`` after each row's last.

        Args:
            state: changed in place.
            rows: token ids of each row; a row without any is left as it is, its logits too.
            chunk: read in pieces of at most this many tokens; None reads a row at once.

        Raises:
            InputError: an id outside the vocabulary, or more tokens than the capacity.
        """
        counts = self._check_turn(state, rows)
        for row, ids in enumerate(rows):
            for start in range(0, len(ids), chunk or max(1, len(ids))):
                piece = np.asarray([ids[start : start + (chunk or len(ids))]], np.int64)
                past = np.array([state.lengths[row] + start], np.int32)
                feeds = {"lengths": np.array([piece.shape[1]], np.int32), "past_lengths": past}
                if state.dropped is not None:
                    feeds[DROPPED] = state.dropped[:, row : row + 1]
                outputs = self._run(DECODE, piece, feeds, state, row)
                state.logits[row] = last(outputs["logits"], feeds["lengths"])[0]
        state.lengths = state.lengths + counts
        return state.logits

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
        chunk: int | None = None,
        top_p: float = 1.0,
        ends: Callable[[int, int], bool] | None = None,
    ) -> Iterator[Step]:
        """Prefill, then one ``Step`` at a time until every row has stopped.

        Args:
            rows: prompts, as for ``prefill``.
            max_tokens: most new tokens of a row.
            stop_ids: tokens that end a row.
            temperature: 0 is greedy; else softmax(logits / temperature) is sampled.
            seed: each row has a random stream of its own, so that it does not depend on the rows beside it.
            chunk: as for ``prefill``.
            top_p: share of the probability that is sampled from (``trtpass.sampling.sample``).
            ends: called with a row and its new token, unless that is a stop token; whether it ends the row.

        Raises:
            InputError: as ``prefill``, and for a value out of its range, before anything is run.
        """
        wanted = int(self._check_rows(rows).max()) + max_tokens
        slots = self.fixed_capacity or (wanted if self.context is None else min(wanted, self.context))
        if chunk is not None:
            self._check_chunk(chunk)
        sampler = Sampler(len(rows), max_tokens, stop_ids, temperature, seed, top_p, ends)
        return self._steps(rows, sampler, chunk, slots)

    def _check_chunk(self, chunk: int) -> None:
        if chunk < 1:
            raise InputError(f"chunks of {chunk} tokens", "1 or more")
        if self.whole_prompt:
            raise InputError(
                f"prefill in chunks, with method '{self.whole_prompt}'",
                "whole prompts: the method selects by the last queries, which an early chunk does not have",
                "leave out chunk, or build a dense engine",
            )

    def _steps(self, rows: Sequence[Sequence[int]], sampler: Sampler, chunk: int | None, slots: int) -> Iterator[Step]:
        state = self.prefill(rows, chunk, slots)
        limit = slots if self.context is None else min(slots, self.context)
        while True:
            step = sampler.step(state.logits, state.lengths >= limit)
            yield step
            if not any(sampler.active):
                return
            self.decode(state, [token or 0 for token in step.tokens], sampler.active)

    def run_named(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Prefill, returning values inside the graph by name (say ``layer3.token_sparse.keep``) and ``logits``.

        A session with these as outputs is made the first time that they are asked for.

        Raises:
            InputError: as ``prefill``, and for a name that the graph does not have.
        """
        lengths = self._check_rows(rows)
        state = State(self._new_cache(lengths, self._capacity(int(lengths.max()), None)), lengths, np.empty(0), 0)
        return self._run(PREFILL, padded(rows, lengths), {"lengths": lengths}, state, None, tuple(names))


def padded(rows: Sequence[Sequence[int]], lengths: np.ndarray) -> np.ndarray:
    """Rows as int64 ``[B, S]``, padded with 0 to the right."""
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids


def last(logits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits of the last valid token ``[B, V]`` from ``[B, 1, V]`` or ``[B, T, V]``."""
    if logits.shape[1] == 1:
        return logits[:, 0].astype(np.float32)
    return logits[np.arange(len(lengths)), lengths - 1].astype(np.float32)
