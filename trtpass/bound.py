"""Running an engine's graphs on ONNX Runtime, with the cache bound as past and present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtpass.engine_checks import Checks
from trtpass.errors import InputError
from trtpass.reserved import Reserved
from trtpass.sessions import Source, give_back, open_session

PREFILL, DECODE = "prefill", "decode"


@dataclass
class State:
    """A batch in progress.

    Attributes:
        cache: an OrtValue ``[B, Hkv, capacity, D]`` for every ``past.{i}.key`` and ``past.{i}.value``.
        lengths: int32 ``[B]``, tokens of each row in the cache.
        logits: float ``[B, V]`` after the last token of each row.
        capacity: tokens that a row may have.
        dropped: int32 ``[layers, B]``, tokens of each row that a layer's cache does not hold; None: it holds all.
    """

    cache: dict[str, Any]
    lengths: np.ndarray
    logits: np.ndarray
    capacity: int
    dropped: np.ndarray | None = field(default=None, kw_only=True)
    step: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)  # buffers of a decode step, bound once
    binding: Any = field(default=None, kw_only=True)


class Bound(Checks):
    """Of an engine, whose constructor sets these; see ``trtpass.runtime.Engine``."""

    provider: str
    _sources: dict[str, Source]
    _threads: int | None
    _sessions: dict[str, Any]
    _cache_shapes: dict[str, tuple[int, int]]  # heads and width of each cache
    _slots: dict[str, int | None]  # of a row, where the graph fixes them
    _cache_dtype: type[np.generic]
    _logits_dtype: type[np.generic]

    def _step(self, state: State, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one token of each row; returns the buffer of the logits ``[B, 1, V]``, which the next step overwrites."""
        if state.binding is None:
            state.step = {name: np.array(array, order="C") for name, array in feeds.items()}
            state.step["logits"] = np.zeros((len(state.lengths), 1, self.vocab), self._logits_dtype)
            self._bind_step(state, {name: state.step[name] for name in feeds}, {"logits": state.step["logits"]})
        for name, array in feeds.items():
            state.step[name][:] = array
        self._run_bound(DECODE, state.binding)
        return state.step["logits"]

    def _bind_step(self, state: State, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Bind a decode step once: these arrays and the cache stay where they are."""
        state.binding = self._session(DECODE).io_binding()
        self._bind_cache(state.binding, state)
        for bind, arrays in ((state.binding.bind_input, inputs), (state.binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _session(self, phase: str, names: tuple[str, ...] = ()) -> Any:
        name = key(phase, names)
        if name not in self._sessions:
            # A prefill's activations are large and rarely needed again: they must not stay beside the cache.
            arena = phase != PREFILL
            self._sessions[name] = open_session(self._sources[phase], self.provider, self._threads, names, arena)
        return self._sessions[name]

    def _run(
        self,
        phase: str,
        ids: np.ndarray,
        feeds: dict[str, np.ndarray],
        state: State,
        row: int | None = None,
        names: tuple[str, ...] = (),
        outputs: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """One call with the cache bound as past and present; ``row`` binds that row of it alone, as a batch of one.

        ``names`` are values inside the graph and ``outputs`` its own, wanted beside ``logits``."""
        session = self._session(phase, names)
        binding = session.io_binding()
        for name, array in {"input_ids": ids, **feeds}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._bind_cache(binding, state, row)
        wanted = tuple(dict.fromkeys(("logits", *outputs, *names)))
        for name in wanted:
            binding.bind_output(name, "cpu")
        self._run_bound(phase, binding, names)
        made = binding.get_outputs()[-len(wanted) :]  # in the order of binding
        return {name: np.array(value.numpy()) for name, value in zip(wanted, made, strict=True)}

    def _bind_cache(self, binding: Any, state: State, row: int | None = None) -> None:
        """As past and as present; ``row`` binds that row alone."""
        for name, value in state.cache.items():
            shape, address = list(value.shape()), value.data_ptr()
            if row is not None:
                address += row * int(np.prod(shape[1:])) * np.dtype(self._cache_dtype).itemsize
                shape[0] = 1
            where = (value.device_name(), 0, self._cache_dtype, shape, address)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past.", "present.", 1), *where)

    def _run_bound(self, phase: str, binding: Any, names: tuple[str, ...] = ()) -> None:
        """Run what is bound. After a prefill the memory of its activations goes back: decoding needs little of it."""
        try:
            self._session(phase, names).run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a type of its own for every status
            raise InputError(f"the {phase} graph failed: {error}") from error
        if phase == PREFILL:
            give_back()

    def reserve(self, rows: int, slots: int) -> dict[str, Reserved]:
        """Zeros ``[rows, Hkv, slots, D]`` on the CPU, by name, for rows that come and go: see ``state_of``."""
        return {
            name: Reserved((rows, heads, self._slots[name] or slots, width), self._cache_dtype)
            for name, (heads, width) in self._cache_shapes.items()
        }

    def state_of(
        self, cache: Mapping[str, Reserved], lengths: np.ndarray, dropped: np.ndarray | None, slots: int
    ) -> State:
        """The first rows of a reserved cache as a batch, of ``lengths [B]`` and at most ``slots`` tokens each."""
        import onnxruntime as ort

        values = {
            name: ort.OrtValue.ortvalue_from_numpy(area.array[: len(lengths)], "cpu", 0)  # shares the memory
            for name, area in cache.items()
            if len(lengths)
        }
        return State(values, lengths, np.zeros((len(lengths), self.vocab), np.float32), slots, dropped=dropped)

    def _new_cache(self, lengths: np.ndarray, slots: int) -> dict[str, Any]:
        """Zeros: a slot never written must not hold a NaN, which would pass through a masked product.

        A layer has fewer slots where every prompt, of ``lengths [B]``, leaves tokens out of it."""
        import onnxruntime as ort

        device = "cuda" if self.provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
        gone = () if self.shortened is None else self.shortened.spared(lengths)
        spared = {f"past.{i}.{role}": count for i, count in enumerate(gone) for role in ("key", "value")}
        made = {}
        for name, (heads, width) in self._cache_shapes.items():
            own = self._slots[name] or slots - spared.get(name, 0)
            zeros = np.zeros((len(lengths), heads, own, width), self._cache_dtype)
            made[name] = ort.OrtValue.ortvalue_from_numpy(zeros, device, 0)
        return made


def key(phase: str, names: tuple[str, ...] = ()) -> str:
    return f"{phase}:{','.join(names)}"
