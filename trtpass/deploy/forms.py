"""The forms in which an engine is served: our own models in Triton's Python backend, or bare graphs and plans.

**Bare decoders** (``onnxruntime``, ``tensorrt``) become two models of tensors, prefill and decode, with the cache as
inputs and outputs. Triton's implicit state cannot hold that cache: a state belongs to one sequence of one model, and
begins as zeros or a file, while ours is made by the prefill model and then goes into the decode model. So whoever calls
holds the cache, and makes the batch: ``max_batch_size`` is 0, and the first size of every tensor is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trtpass.deploy.pbtxt import Config, Enum
from trtpass.deploy.plan import LIBRARY_NAME, VERSION, Model, Source, graph, library, weights
from trtpass.deploy.python_files import model_source, put_engine, put_library
from trtpass.deploy.tensors import Spec, batches, declared, specs, warm_up
from trtpass.errors import InputError
from trtpass.generate import RUNNABLE
from trtpass.runtime import DECODE, ENGINE, PREFILL
from trtpass.serving.text_request import INPUTS, OUTPUTS

FORMS = ("python", "onnxruntime", "tensorrt")
DELAY_US = 500  # that a request of an encoder may wait for others
CPU = [{"kind": Enum("KIND_CPU"), "count": 1}]


def python(source: Source) -> list[Model]:
    """Our own model: text in and out for a decoder, arrays for an encoder.

    Raises:
        InputError: an engine that does not run on ONNX Runtime's CPU provider, or a decoder without a tokenizer.
    """
    if source.manifest.target not in RUNNABLE:
        raise InputError(
            f"the python form of an engine of target '{source.manifest.target}': its graphs are TensorRT's, with a "
            "cache of another layout",
            f"an engine of target {' or '.join(RUNNABLE)}",
            "build one with TARGET=cpu, or deploy a plan with --form tensorrt",
        )
    make = _python_arrays if source.manifest.kind == "encoder" else _python_text
    return [make(source)]


def _python_text(source: Source) -> Model:
    tokenizer = source.folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise InputError(
            f"{tokenizer} does not exist", "a tokenizer beside the engine: the model takes and gives text",
            "put one there, or deploy the graphs with --form onnxruntime",
        )  # fmt: skip
    graphs = {f"{phase}.onnx": graph(source, f"{phase}.onnx") for phase in (PREFILL, DECODE)}
    vocabulary = specs(graphs["decode.onnx"].graph.outputs)[0].shape[-1]
    outputs = {
        name: (vocabulary,) if name == "logits" and isinstance(vocabulary, int) else tensor.dims
        for name, tensor in OUTPUTS.items()
    }
    config: Config = {
        "name": source.name, "backend": "python", "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [
            {"name": n, "data_type": Enum(f"TYPE_{t.type}"), "dims": list(t.dims), "optional": True}
            for n, t in INPUTS.items()
        ],
        "output": [
            {"name": n, "data_type": Enum(f"TYPE_{OUTPUTS[n].type}"), "dims": list(dims)} for n, dims in outputs.items()
        ],
        "instance_group": CPU, "parameters": _parameters(source.settings.parameters()),
    }  # fmt: skip
    return _python_model(source, config, graphs, "text_model", {"tokenizer.json": tokenizer})


def _python_arrays(source: Source) -> Model:
    name = f"{ENGINE}.onnx"
    model = graph(source, name)
    config = _array_config(source, model, reshape=False)
    threads = {"threads": source.settings.parameters()["threads"]}
    config = {
        "name": source.name,
        "backend": "python",
        **config,
        "instance_group": CPU,
        "parameters": _parameters(threads),
    }
    return _python_model(source, config, {name: model}, "array_model", {})


def _python_model(
    source: Source, config: Config, graphs: dict[str, ir.Model], module: str, more: dict[str, Path]
) -> Model:
    files = {**{name: source.folder / name for name in graphs}, **more}
    for model in graphs.values():
        files |= weights(model, source)
        library(model)  # refused here rather than by the server

    def fill(version: Path) -> None:
        put_library(version / "lib")
        put_engine(version / "engine", files, source.manifest)

    return Model(source.name, config, texts={"model.py": model_source(module)}, fill=(fill,))


def onnxruntime(source: Source) -> list[Model]:
    """Bare graphs for Triton's ONNX Runtime backend.

    The backend opens the library of native kernels under the name that the configuration gives, as the system's loader
    does: a relative path is one from the server's working directory. So the server is started in the repository.

    Raises:
        InputError: a cache in pages, which only a host can move; or graphs of another target.
    """
    if source.manifest.target not in RUNNABLE:
        raise InputError(
            f"the onnxruntime form of an engine of target '{source.manifest.target}'",
            f"an engine of target {' or '.join(RUNNABLE)}",
            "build one with TARGET=cpu",
        )
    return _bare(source, _onnxruntime)


def _onnxruntime(source: Source, stem: str, name: str) -> Model:
    model = graph(source, f"{stem}.onnx")
    found = library(model)
    config: Config = {
        "name": name, "platform": "onnxruntime_onnx", "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        **_array_config(source, model, reshape=True, may_batch=stem == ENGINE), "instance_group": CPU,
    }  # fmt: skip
    files = {"model.onnx": source.folder / f"{stem}.onnx", **weights(model, source)}
    if found is not None:
        config["model_operations"] = {"op_library_filename": [f"{name}/{VERSION}/{LIBRARY_NAME}"]}
        files[LIBRARY_NAME] = found
    if source.settings.limits.threads is not None:
        config["parameters"] = _parameters({"intra_op_thread_count": str(source.settings.limits.threads)})
    return Model(name, config, files)


def tensorrt(source: Source) -> list[Model]:
    """Plans for Triton's TensorRT backend.

    A plan of decode has a profile for single tokens and one for chunks; an instance has both, and the backend takes the
    one that a request's shapes fit.

    Raises:
        InputError: another target, no plan, or a cache in pages.
    """
    target = source.manifest.target
    if target == "tensorrt-rtx":
        raise InputError(
            "the tensorrt form of a plan of TensorRT-RTX: the TensorRT backend of Triton does not read these plans",
            "an engine of target tensorrt",
            "build one with TARGET=tensorrt on the machine that serves it, or with TARGET=cpu for the python form",
        )
    if target != "tensorrt":
        raise InputError(
            f"the tensorrt form of an engine of target '{target}'", "an engine of target tensorrt", "use --form auto"
        )
    if source.manifest.unbuilt:
        raise InputError(
            f"this engine has no plan: {source.manifest.unbuilt}", "a plan", "build it on a machine with such a GPU"
        )
    return _bare(source, _tensorrt)


def _tensorrt(source: Source, stem: str, name: str) -> Model:
    plan = source.folder / f"{stem}.plan"
    if not plan.is_file():
        raise InputError(f"{plan} does not exist", "the engine's plan", "build it again")
    model = graph(source, f"{stem}.onnx")
    group: Config = {"kind": Enum("KIND_GPU"), "count": 1}
    if stem == DECODE:
        group["profile"] = ["0", "1"]
    config: Config = {
        "name": name, "platform": "tensorrt_plan", "backend": "tensorrt", "default_model_filename": "model.plan",
        **_array_config(source, model, reshape=True, may_batch=False), "instance_group": [group],
    }  # fmt: skip
    return Model(name, config, {"model.plan": plan})


def _bare(source: Source, make: Callable[[Source, str, str], Model]) -> list[Model]:
    """One model for an encoder or each choice of its sizes; prefill and decode for a decoder."""
    if source.manifest.page is not None:
        raise InputError(
            "a bare graph of an engine with a paged cache: the host moves its pages between steps",
            "the python form",
            "leave --form away, or deploy an engine without a cache policy",
        )
    if source.manifest.kind == "decoder":
        return [make(source, phase, f"{source.name}-{phase}") for phase in (PREFILL, DECODE)]
    stems = _stems(source)
    return [make(source, stem, source.name + stem.removeprefix(ENGINE).replace(".", "-")) for stem in stems]


def _stems(source: Source) -> Sequence[str]:
    """Of an encoder's files: one graph, or a plan for each choice of its sizes."""
    from trtpass.encoder_build import stem

    return [stem(sizes) for sizes in source.manifest.variants] or [ENGINE]


def _array_config(source: Source, model: ir.Model, reshape: bool, may_batch: bool = True) -> Config:
    """Batching, inputs, outputs and the first request of a model of tensors."""
    inputs, outputs = specs(model.graph.inputs), specs(model.graph.outputs)
    batched = may_batch and batches(inputs, outputs)
    config: Config = {
        "max_batch_size": source.rows if batched else 0,
        "input": declared(inputs, batched, reshape), "output": declared(outputs, batched, reshape),
    }  # fmt: skip
    queue: Config = {
        "default_queue_policy": {"max_queue_size": source.settings.limits.queue}
    }  # bounded, batches or not
    config["dynamic_batching"] = {"max_queue_delay_microseconds": DELAY_US, **queue} if batched else queue
    if source.manifest.kind == "encoder":
        config["model_warmup"] = warm_up(inputs, batched, _sizes(source, model, inputs))
    return config


def _sizes(source: Source, model: ir.Model, inputs: Sequence[Spec]) -> dict[str, Any]:
    """Numbers for open sizes: those of the inputs that the engine was checked with."""
    from trtpass.encoder_inputs import stored_probe

    if all(isinstance(d, int) for spec in inputs for d in spec.shape) or not (source.folder / "inputs.json").is_file():
        return {}
    feed = stored_probe(source.folder / "inputs.json", model).feed
    return {str(d): n for spec in inputs for d, n in zip(spec.shape, feed[spec.name].shape, strict=True)}


def _parameters(values: dict[str, str]) -> list[Config]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]
