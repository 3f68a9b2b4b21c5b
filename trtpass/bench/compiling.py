"""``compile.passes``: what all passes cost on a 36-layer, 8B-shaped graph whose weights are never read.

Two processes: one exports the graph (PyTorch; not measured) over a file of weights that is all holes; the other reads
it and does what a build does to a graph: raise, rewrite, insert the cache for prefill and decode, lower both. Its time
is taken step by step, and its memory is the process's peak, also against the peak before the first step.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trtpass.bench.measure import Machine
from trtpass.bench.record import Record
from trtpass.errors import InputError

AIM_SECONDS, AIM_GB = 10.0, 1.0
LAYERS = 36
STEPS = ("read", "raise", "token-sparse", "cache", "lower")


class NotHere(InputError):
    """This machine lacks what the benchmark needs."""


def config(layers: int = LAYERS) -> Any:
    """Shaped as Qwen3-8B: 36 layers, E 4096, 32 heads over 8 KV heads, D 128, MLP 12288, vocabulary 151936."""
    from transformers import Qwen3Config

    return Qwen3Config(
        num_hidden_layers=layers, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip


def run(machine: Machine, repeats: int = 3, layers: int = LAYERS) -> list[Record]:
    """Time and peak memory over all steps, against the aims (there is no baseline that does the same).

    Raises:
        NotHere: PyTorch or transformers is not installed.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(
            f"{' and '.join(missing)} not installed", "both, to export the graph", "pip install trtpass[export]"
        )
    with tempfile.TemporaryDirectory(prefix="trtpass-bench-") as folder:
        _python("export", folder, str(layers))
        taken = [json.loads(_python("passes", folder)) for _ in range(repeats)]
        size = (Path(folder) / "weights.bin").stat().st_size
    seconds = np.array([t["total"] for t in taken])
    gigabytes = np.array([t["peak_bytes"] for t in taken]) / 1e9
    extra = np.array([t["extra_bytes"] for t in taken]) / 1e9
    steps = {name: round(float(np.median([t["steps"][name] for t in taken])), 3) for name in STEPS}
    cpu = round(float(np.median([t["cpu"] for t in taken])), 3)
    params = {"layers": layers, "nodes": taken[0]["nodes"], "weights_gb": round(size / 1e9, 2)}
    return [
        _record(
            {**params, "of": "time", "cpu_s": cpu, **{f"{k}_s": v for k, v in steps.items()}},
            "s",
            seconds,
            AIM_SECONDS,
            machine,
        ),
        _record({**params, "of": "memory added by the passes"}, "GB", extra, AIM_GB, machine),
        _record({**params, "of": "peak memory of the process"}, "GB", gigabytes, AIM_GB, machine),
    ]


def _record(params: dict[str, Any], unit: str, values: np.ndarray, aim: float, machine: Machine) -> Record:
    ratios = aim / np.maximum(values, 1e-3)  # memory added may be below what can be measured
    return Record(
        "compile.passes",
        params,
        "the aim; above 1 is better than it",
        unit,
        round(float(np.median(values)), 3),
        aim,
        round(float(np.median(ratios)), 3),
        round(float(ratios.min()), 3),
        round(float(ratios.max()), 3),
        None,
        machine.as_dict(),
    )


def _python(*arguments: str) -> str:
    """The last line that this module prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "trtpass.bench.compiling", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = " ".join(done.stderr.strip().splitlines()[-3:])
        raise InputError(f"compile.passes: step '{arguments[0]}' failed: {tail}", "a graph of this family compiles")
    return (done.stdout.strip().splitlines() or [""])[-1]


def export_graph(folder: Path, layers: int) -> None:
    """``raw.onnx``, as the exporter gives it, and ``weights.bin``, a file of holes."""
    import onnx
    import onnx_ir as ir

    from trtpass.export import export_on_meta

    model = export_on_meta(config(layers), folder / "weights.bin")
    onnx.save_model(ir.to_proto(model), str(folder / "raw.onnx"))


def peak() -> int:
    """Most bytes that this process has held. ru_maxrss also counts the process that started it, so VmHWM goes first."""
    import resource

    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_passes(folder: Path) -> dict[str, Any]:
    """Seconds of each step and the process's memory; imports are done before, the graph's modules among them."""
    import time

    from plugins import all_ops
    from plugins._library import function
    from trtpass import io, passes
    from trtpass.canonicalize import canonicalize
    from trtpass.passes.cache import insert_cache
    from trtpass.passes.lower import lower

    for op in all_ops().values():
        function(op, "dynamic")  # compiled once a process, whatever the model
    pipeline = [passes.parse("token-sparse")]

    before, cpu, steps = peak(), time.process_time(), {}

    def timed(name: str, start: float) -> None:
        steps[name] = time.perf_counter() - start

    start = time.perf_counter()
    model = io.load(folder / "raw.onnx")
    timed("read", start)
    start = time.perf_counter()
    canonicalize(model)
    timed("raise", start)
    start = time.perf_counter()
    rewritten = model.clone()
    passes.run(rewritten, pipeline)
    timed("token-sparse", start)
    start = time.perf_counter()
    cached = [insert_cache(source, phase) for source, phase in ((rewritten, "prefill"), (model, "decode"))]
    timed("cache", start)
    start = time.perf_counter()
    lowered = [lower(graph, "cpu").model for graph in cached]
    timed("lower", start)
    return {
        "cpu": time.process_time() - cpu,
        "steps": steps,
        "total": sum(steps.values()),
        "peak_bytes": peak(),
        "extra_bytes": peak() - before,
        "nodes": sum(len(list(graph.graph.all_nodes())) for graph in lowered),
    }


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export_graph(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(measure_passes(Path(sys.argv[2]))))
