"""The process that builds one plan: ``python -m trtpass.plan_worker LIBRARY``, started by ``trtpass.plan_process``.

LIBRARY is ``tensorrt_rtx``, or ``tensorrt``, which alone has plugins; TensorRT-RTX ignores timing caches.

TensorRT can end its process (an assertion in its compiler), so it gets one of its own; that also makes its peak memory
measurable. The request comes as one JSON line on stdin, the plan goes to an open file descriptor, progress and the
result leave as JSON lines on standard output; whatever the library prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from trtpass.errors import InputError, TrtpassError
from trtpass.plan_process import NAMES
from trtpass.staging import replacing

LIBRARY = sys.argv[1] if __name__ == "__main__" else "tensorrt_rtx"
NAME = NAMES.get(LIBRARY, LIBRARY)
trt: Any = importlib.import_module(LIBRARY)

_ACTIVATION = "Total Activation Memory: "


class _Log(trt.ILogger):
    """Keeps what the parser and the builder say."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.activation_memory = 0

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)
        elif message.startswith(_ACTIVATION):
            self.activation_memory = int(message.removeprefix(_ACTIVATION).split()[0])


class _Progress(trt.IProgressMonitor):
    """Reports the outermost phases of a build."""

    def __init__(self, channel: TextIO) -> None:
        trt.IProgressMonitor.__init__(self)
        self.channel = channel
        self.steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if not parent_phase:
            self.steps[phase_name] = max(1, int(num_steps))
            _send(self.channel, {"phase": phase_name, "fraction": 0.0})

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name in self.steps:
            _send(self.channel, {"phase": phase_name, "fraction": (int(step) + 1) / self.steps[phase_name]})
        return True

    def phase_finish(self, phase_name: str) -> None:
        if self.steps.pop(phase_name, None) is not None:
            _send(self.channel, {"phase": phase_name, "fraction": 1.0})


class _Writer(trt.IStreamWriter):
    """Writes the plan as it is made: it is never held in memory whole by us."""

    def __init__(self, descriptor: int) -> None:
        trt.IStreamWriter.__init__(self)
        self.descriptor = descriptor
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        try:
            while view:
                done = os.write(self.descriptor, view)
                self.digest.update(view[:done])
                self.bytes += done
                view = view[done:]
        except OSError as error:
            self.failure = error
            return 0
        return len(data)


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _as(layer: Any, kind: str) -> Any:
    """The layer under its own class: the bindings hand out attention layers as plain layers."""
    layer.__class__ = getattr(trt, kind)
    return layer


def _parse(parser: Any, path: str, log: _Log) -> None:
    if parser.parse_from_file(path):
        return
    found = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        where = f"{error.node_operator()} '{error.node_name()}': " if error.node_operator() else ""
        found.append(where + " ".join(error.desc().split()))
    raise InputError(
        f"{NAME} cannot read {path}: {'; '.join(found or log.errors or ['no reason given'])}",
        "operators that its ONNX parser knows",
        f"lower the graph for the target {LIBRARY.replace('_', '-')}, or build for portable",
    )


def unused_inputs(network: Any) -> list[str]:
    """Network inputs that no output depends on (a shape counts as use), found by walking up from the outputs."""
    made: dict[str, Any] = {}
    live: list[str] = [network.get_output(i).name for i in range(network.num_outputs)]
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [t.name for t in (layer.get_input(j) for j in range(layer.num_inputs)) if t is not None]
        for j in range(layer.num_outputs):
            made[layer.get_output(j).name] = inputs
        if layer.type in (trt.LayerType.TRIP_LIMIT, trt.LayerType.CONDITION):
            live += inputs  # they steer a loop or a branch and have no output that is read
    seen: set[str] = set()
    while live:
        name = live.pop()
        if name not in seen:
            seen.add(name)
            live += made.get(name, [])
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    return [name for name in names if name not in seen]


def _add_profile(builder: Any, config: Any, network: Any, profile: dict[str, list[list[int]]]) -> None:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    unknown = sorted(set(profile) - set(inputs))
    missing = [name for name, shape in inputs.items() if -1 in shape and name not in profile]
    if unknown or missing:
        raise InputError(
            f"the profile lacks {', '.join(missing) or 'nothing'} and names {', '.join(unknown) or 'nothing'} in vain",
            f"(min, opt, max) shapes for each dynamic input: {', '.join(n for n, s in inputs.items() if -1 in s)}",
        )
    made = builder.create_optimization_profile()
    for name, shapes in profile.items():
        wanted = inputs[name]
        for shape in shapes:
            if len(shape) != len(wanted) or any(w not in (-1, s) for w, s in zip(wanted, shape, strict=True)):
                raise InputError(f"the profile gives '{name}' the shape {shape}", f"a shape like {list(wanted)}")
        if any(not low <= mid <= high for low, mid, high in zip(*shapes, strict=True)):
            raise InputError(f"the profile of '{name}' is {shapes}", "min <= opt <= max in every dimension")
        made.set_shape(name, *shapes)
    if profile and config.add_optimization_profile(made) < 0:
        raise InputError(f"{NAME} does not accept the profile {profile}")


def build(request: dict[str, Any], channel: TextIO) -> dict[str, Any]:
    """Parse, check, build and write one plan; see ``trtpass.rtx.build_plan`` and ``trtpass.trt.builder.build_plan``."""
    started, log = time.monotonic(), _Log()
    builder = trt.Builder(log)
    if request["plugins"]:
        from plugins import kernel_ops
        from trtpass.trt.plugins import register

        register([kernel_ops()[name] for name in request["plugins"]], trt, request["cc"])
    wanted = ("STRONGLY_TYPED", *(["PREFER_AOT_PYTHON_PLUGINS"] if request["plugins"] else []))
    flags = (getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in wanted)  # versions differ
    network = builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))
    parser = trt.OnnxParser(network, log)
    _send(channel, {"phase": "Parsing", "fraction": 0.0})
    _parse(parser, request["onnx"], log)
    _send(channel, {"phase": "Parsing", "fraction": 1.0})
    unused = unused_inputs(network)
    if unused:
        raise InputError(
            f"{NAME}'s parser leaves {len(unused)} network inputs unused: {', '.join(unused)}",
            "every input to reach an output, or the plan would compute something else",
            f"lower the graph for the target {LIBRARY.replace('_', '-')} (explicit masks), or drop the inputs",
        )
    attentions = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            attentions += 1
            if request["decompose"]:
                _as(layer, "IAttentionInputLayer").attention.decomposable = True
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what the graph keeps in float32 is meant to be float32
    if LIBRARY == "tensorrt_rtx":
        config.num_compute_capabilities = len(request["compute_capabilities"])
        for i, name in enumerate(request["compute_capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if request["aliased"]:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    cache = Path(request["timing_cache"]) if request["timing_cache"] else None
    if cache is not None:
        known = cache.read_bytes() if cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    monitor = _Progress(channel)
    config.progress_monitor = monitor
    for profile in request["profiles"]:
        _add_profile(builder, config, network, profile)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    layers, types = network.num_layers, {t.name: str(t.dtype).rsplit(".", 1)[-1] for t in inputs}
    writer = _Writer(request["descriptor"])
    done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.failure is not None:
        raise writer.failure
    if not done or writer.bytes == 0:
        raise InputError(f"{NAME} cannot build {request['onnx']}: {'; '.join(log.errors) or 'no reason given'}")
    if cache is not None:
        _keep(cache, bytes(config.get_timing_cache().serialize()))
    return {
        "bytes": writer.bytes,
        "sha256": writer.digest.hexdigest(),
        "layers": layers,
        "attentions": attentions,
        "profiles": config.num_optimization_profiles,
        "inputs": types,
        "seconds": time.monotonic() - started,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "activation_memory": log.activation_memory,
        "warnings": sorted(set(log.warnings)),
        "version": trt.__version__,
    }


def _keep(path: Path, data: bytes) -> None:
    """Write a timing cache whole, or leave the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(data)) as handle:
        handle.write(data)


def main() -> int:
    """Serve one request."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    try:
        _send(channel, {"result": build(request, channel)})
    except TrtpassError as error:
        _send(channel, {"error": [error.found, error.expected, error.fix]})
    except OSError as error:
        _send(channel, {"oserror": [error.errno, error.strerror]})
    with contextlib.suppress(OSError):
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
