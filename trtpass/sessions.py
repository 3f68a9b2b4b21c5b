"""ONNX Runtime sessions: the provider that was asked for or an error, never a silent fallback to the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.errors import InputError
from trtpass.native import register

if TYPE_CHECKING:
    import onnx_ir as ir

    Source = str | Path | ir.Model
else:
    Source = Any

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


def provider_name(provider: str) -> str:
    """``cpu`` to ``CPUExecutionProvider``; ONNX Runtime's own names are taken as they are.

    Raises:
        InputError: a name that is unknown, or a provider that this ONNX Runtime was built without.
    """
    import onnxruntime as ort

    name = PROVIDERS.get(provider, provider)
    there = ort.get_available_providers()
    if name not in there:
        short = {long: key for key, long in PROVIDERS.items()}
        raise InputError(
            f"provider '{provider}' is not in this ONNX Runtime",
            f"one of {', '.join(short.get(p, p) for p in there)}",
            "install the ONNX Runtime package that has it (onnxruntime-gpu for cuda), or choose another",
        )
    return name


def open_session(
    source: Source,
    provider: str,
    threads: int | None = None,
    extra_outputs: tuple[str, ...] = (),
    arena: bool = True,
) -> Any:
    """A session on exactly ``provider`` (ONNX Runtime's name).

    Args:
        source: an ONNX file, or an onnx-ir model (its weights stay where they are if they are external).
        provider: the execution provider; operators that it does not have run on the CPU, as ONNX Runtime defines.
        threads: threads of one operator; None leaves the choice to ONNX Runtime.
        extra_outputs: values inside the main graph to return as outputs too.
        arena: on the CPU, keep the memory of a run for the next; without, it goes back after each.

    Raises:
        InputError: a missing or broken file, an unknown value, or a provider that did not start.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 2
    register(options)
    options.enable_cpu_mem_arena = arena
    if threads is not None:
        options.intra_op_num_threads = threads
    model: str | bytes
    if isinstance(source, (str, Path)) and not extra_outputs:
        if not Path(source).is_file():
            raise InputError(f"{source} does not exist", "an ONNX file", "build the engine first")
        model = str(source)
    else:
        model = _in_memory(source, extra_outputs, options)
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a type of its own for every status
        label = source if isinstance(source, (str, Path)) else "the graph"
        raise InputError(f"ONNX Runtime cannot load {label}: {error}", "a graph lowered for this provider") from error
    got = session.get_providers()
    if not got or got[0] != provider:
        raise InputError(
            f"asked for {provider}, got {', '.join(got)}",
            f"a session on {provider}",
            "see ONNX Runtime's warning above: its libraries or its device are missing",
        )
    return session


def properties(source: Source) -> dict[str, str]:
    """The properties that passes left in a graph, read without a session (which would hold the weights once more)."""
    from trtpass.io import load

    return dict((load(source) if isinstance(source, (str, Path)) else source).metadata_props)


def give_back() -> None:
    """Return memory that the C library holds free to the system, where it can (glibc)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def dtype_of(onnx_type: str) -> type[np.generic]:
    """``tensor(float16)`` to numpy's type, for the two that a cache may have."""
    known: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if onnx_type not in known:
        raise InputError(f"a cache of {onnx_type}", " or ".join(known))
    return known[onnx_type]


def _in_memory(source: Source, extra_outputs: tuple[str, ...], options: Any) -> bytes:
    """The model as bytes, with more outputs; external weights are read from their own folder."""
    import onnx_ir as ir

    from trtpass.io import load

    model = load(source) if isinstance(source, (str, Path)) else source
    external = [t for v in model.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)]
    if external:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(external[0].base_dir).resolve())
        )
    values = {v.name: v for node in model.graph for v in node.outputs}
    unknown = [name for name in extra_outputs if name not in values]
    if unknown:
        ends = {str(name).rpartition(".")[2] for name in extra_outputs}
        near = [str(name) for name in values if str(name).rpartition(".")[2] in ends]
        raise InputError(f"the graph has no value '{unknown[0]}'", f"one of {', '.join(near[:20]) or 'its values'}")
    before = list(model.graph.outputs)
    have = {value.name for value in before}
    model.graph.outputs.extend(values[name] for name in extra_outputs if name not in have)
    try:
        return ir.to_proto(model).SerializeToString()
    finally:
        model.graph.outputs[:] = before
