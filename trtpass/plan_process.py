"""One plan, built in a process of its own: what is asked of it, what it answers, and how it dies.

TensorRT and TensorRT-RTX are started alike; ``trtpass.plan_worker`` is the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtpass.errors import InputError

NAMES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PlanReport:
    """A plan that was built. Memory and sizes in bytes, time in seconds.

    ``peak_memory`` is of the build, ``activation_memory`` what a run takes on the GPU at the profile's maximum, beside
    weights and cache, as the builder says it.

    ``layers`` counts the parsed network's layers, before fusion, ``profiles`` the ranges of shapes; ``decomposed`` says
    that attentions without a fused kernel (float32, or a head width such as 8) were allowed to become matrix products
    and softmax.
    """

    path: str
    bytes: int
    sha256: str
    compute_capabilities: tuple[str, ...]
    layers: int
    attentions: int
    profiles: int
    decomposed: bool
    inputs: dict[str, str]
    seconds: float
    peak_memory: int
    activation_memory: int
    warnings: tuple[str, ...]
    version: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)


def plain(profile: Profile) -> dict[str, list[list[int]]]:
    """A profile as JSON has it."""
    return {name: [list(map(int, sizes)) for sizes in shapes] for name, shapes in profile.items()}


def _is_noise(warning: str) -> bool:
    """Parser chatter: int64 reminders, and names of nodes in a function that is called more than once."""
    return "Int64 binding" in warning or "will not be queryable" in warning


def run(library: str, request: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """One request to a process that builds with ``library``; raises its errors, and an InputError if it dies."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as words, tempfile.TemporaryFile("w+") as asked:
        asked.write(json.dumps(request) + "\n")
        asked.seek(0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "trtpass.plan_worker", library],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[request["descriptor"]],
        )
        try:
            answer = _listen(worker.stdout or (), progress)
            code = worker.wait()
        finally:
            if worker.poll() is None:  # Ctrl-C, or an error in `progress`
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        if answer is None:
            words.seek(0)
            last = " ".join(words.read().split())[-600:]
            raise InputError(
                f"the {NAMES[library]} process ended (exit code {code}) on {request['onnx']}: {last or 'no words'}",
                "a build that ends",
                "run `trtpass doctor`; a code of -9 means that memory ran out",
            )
    if "error" in answer:
        raise InputError(*answer["error"])
    if "oserror" in answer:
        raise OSError(*answer["oserror"])
    result = dict(answer["result"])
    result["warnings"] = tuple(w for w in result["warnings"] if not _is_noise(w))
    return result


def _listen(lines: Iterable[str], progress: Progress | None) -> dict[str, Any] | None:
    answer = None
    for line in lines:
        message = json.loads(line)
        if "phase" not in message:
            answer = message
        elif progress is not None:
            progress(message["phase"], message["fraction"])
    return answer
