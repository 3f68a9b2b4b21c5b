"""Measuring in one process: graphs bound to buffers of their own, sides interleaved, and the machine described.

Each side has several sets of buffers, together larger than the last-level cache, and visits them in turn; two sides
are never at the same set one after the other. Threads of ONNX Runtime stop spinning when a run ends, so that an idle
side does not take a core from the other.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass import native
from trtpass.errors import CheckFailed, InputError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]
Call = Callable[[], None]
CACHE_FACTOR = 3  # buffers in rotation hold at least this many times the last-level cache
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEFAULT_CACHE = 32 << 20  # bytes, where the machine does not say


@dataclass(frozen=True)
class Machine:
    """``matmul_gflops``: float32 ``[2048, 2048] @ [2048, 2048]`` in this process, the best of several.

    ``clock``: ``wall``, or ``cpu``: time that this process computed, which other processes do not lengthen much.
    ``load``: the machine's load average over the last minute, before anything was measured: what else ran.
    """

    cpu: str
    cores: int
    threads: int
    onnxruntime: str
    matmul_gflops: float
    load: float
    clock: str = "wall"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(threads: int, clock: str = "wall") -> Machine:
    """This machine, with the matmul rate of ``threads`` threads, measured now.

    Raises:
        InputError: an unknown clock, or ``cpu`` with several threads, whose waiting would count as work.
    """
    import onnxruntime

    if clock not in CLOCKS or (clock == "cpu" and threads != 1):
        raise InputError(f"clock '{clock}' with {threads} threads", "wall, or cpu with one thread")
    load = round(os.getloadavg()[0], 2)
    return Machine(
        _cpu(), cores(), threads, onnxruntime.__version__, round(matmul_peak(threads, clock), 1), load, clock
    )


def cores() -> int:
    """Cores that this process may use."""
    import psutil

    return len(psutil.Process().cpu_affinity() or [0])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the last-level cache."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=DEFAULT_CACHE)


def sets_for(bytes_a_set: int, least: int = 2, most: int = 32) -> int:
    """How many sets of buffers defeat the cache."""
    return int(np.clip(-(-CACHE_FACTOR * cache_bytes() // bytes_a_set), least, most))


def matmul_peak(threads: int, clock: str = "wall", size: int = 2048, repeats: int = 8) -> float:
    """GFLOP/s of a float32 product of square matrices in ONNX Runtime."""
    from trtpass.bench.layer import parse

    text = f"matmul (float[{size},{size}] a, float[{size},{size}] b) => (float[{size},{size}] c) {{ c = MatMul(a, b) }}"
    a, b, c = (np.random.default_rng(i).standard_normal((size, size), np.float32) for i in range(3))
    call = Graph(parse(text), threads).bind({"a": a, "b": b}, {"c": c})
    seconds = interleave([[call]], repeats, clock)
    return 2 * size**3 / float(seconds.min()) / 1e9


class Graph:
    """A lowered graph in a session of its own; ``bind`` ties it to buffers.

    Args:
        model: standard and contrib operators only; large initializers may be external.
        threads: threads of one operator.
        profile: prefix of a profile's path, where the time of each node is wanted (it slows the run a little).

    Raises:
        InputError: ONNX Runtime refuses the graph.
    """

    def __init__(self, model: ir.Model, threads: int, profile: Path | None = None) -> None:
        import onnx_ir as ir
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        native.register(options)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        external = [t for v in model.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)]
        if external:
            folder = str(Path(external[0].base_dir).resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        data = ir.to_proto(model).SerializeToString()
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises a dozen private classes
            raise InputError(f"ONNX Runtime cannot load a benchmark's graph: {str(error)[:300]}") from error
        self._inputs = {item.name for item in self.session.get_inputs()}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """A call that reads ``inputs`` and writes ``outputs`` in place; one array under two names is one buffer."""
        held = {**{f"in {k}": v for k, v in inputs.items()}, **{f"out {k}": v for k, v in outputs.items()}}
        for name, array in held.items():
            if not array.flags.c_contiguous:
                raise InputError(f"the buffer of '{name}' is not contiguous", "a C-contiguous array")
        binding = self.session.io_binding()
        for name, array in inputs.items():
            if name in self._inputs:
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        session = self.session

        def call(_held: Mapping[str, Array] = held) -> None:  # the arrays must live as long as the binding
            session.run_with_iobinding(binding)

        return call


def interleave(
    sides: Sequence[Sequence[Call]], repeats: int, clock: str = "wall", warm: int = 1, settle: float = 0.0
) -> Array:
    """Seconds ``[side, repeat]``: the mean over the sets of buffers of each side, sides in turn (A B A B).

    Args:
        sides: for each side, its calls, one for each set of buffers; all sides have equally many.
        repeats: rounds over all sets.
        clock: of ``CLOCKS``.
        warm: rounds before, not counted.
        settle: seconds to wait before each call. OpenBLAS's threads spin for some 30 ms after their last product, on
            the cores that the other side is measured on.
    """
    count, now = len(sides[0]), CLOCKS[clock]
    if any(len(calls) != count for calls in sides):
        raise InputError(f"sides with {[len(calls) for calls in sides]} sets of buffers", "equally many")
    seconds = np.zeros((len(sides), repeats))
    for round_ in range(-warm, repeats):
        for step in range(count):
            for side, calls in enumerate(sides):
                call = calls[(step + side * max(1, count // len(sides))) % count]
                time.sleep(settle)
                start = now()
                call()
                if round_ >= 0:
                    seconds[side, round_] += now() - start
    return seconds / count


def poisoned(shape: Sequence[int], dtype: type[np.generic] = np.float32) -> Array:
    """An output buffer that shows what was not written: NaN, or the smallest integer."""
    bad = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min  # type: ignore[type-var]
    return np.full(shape, bad, dtype)


def require_close(what: str, got: Array, expected: Array, atol: float, rtol: float) -> None:
    """Raises CheckFailed unless ``|got - expected| <= atol + rtol |expected|`` everywhere; NaN never passes."""
    gap = np.abs(got.astype(np.float64) - expected)
    bad = ~(gap <= atol + rtol * np.abs(expected))
    if bad.any():
        raise CheckFailed(
            f"{what}: {int(bad.sum())} of {bad.size} values differ, by up to {float(np.nanmax(gap, initial=0.0)):.3g}",
            f"within {atol} + {rtol} of the expected value",
            "no speed is reported for wrong results; run the tests of the operators",
        )
