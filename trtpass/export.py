"""Stateless export: a causal language model in PyTorch becomes ``input_ids -> logits`` at opset 24.

The graph depends on the configuration alone, never on the values of the weights: folding and merging happen while
parameters are only names and shapes, and the values are attached at the end, by name, as views. So nothing is copied,
two equal weights are never merged, and a model without weights (`export_on_meta`) gives the same graph.

The same model gives the same bytes: names come from the module tree (``model.layers.0.self_attn.q_proj.MatMul``) in
graph order, symbolic sizes are called ``batch`` and ``sequence``, and everything that names a machine is dropped.
"""

from __future__ import annotations

import ast
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes import common

import trtpass
from trtpass.errors import InputError
from trtpass.io import strip_metadata
from trtpass.quiet import quiet

if TYPE_CHECKING:
    import torch

OPSET = 24
IR_VERSION = 10
CONTEXT_KEY = "trtpass.context"
"""Metadata of an exported model: the most tokens a row may have, as text."""

ROOT = "model_to_export"
"""The name under which a module is traced."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLD_LIMIT = 4096  # elements: arithmetic on shapes is far smaller, weights and masks are larger
_PAGE = 4096  # bytes: weights start on a page, so that they can be mapped

log = logging.getLogger(__name__)


def export(module: torch.nn.Module, config: Any, *, context: int) -> ir.Model:
    """Export a transformers causal language model.

    Input ``input_ids`` int64 ``[batch, sequence]``, output ``logits`` float32 ``[batch, sequence, vocab]``.
    Initializers carry the names of the module's parameters; the weight of a linear layer is stored transposed,
    ``[in, out]``, as MatMul reads it, unless another node needs it as it is (tied embeddings), where a Transpose stays.
    They are views of the module's memory: keep the module unchanged until the model is saved.

    Args:
        module: in eval mode, float32, with scaled-dot-product attention.
        config: its transformers configuration.
        context: the most tokens a row may have; recorded in the metadata under `CONTEXT_KEY`.

    Raises:
        InputError: the module is in training mode, its sliding window is shorter than ``context``, its rotary
            frequencies depend on the length of the input, or PyTorch cannot trace it.
    """
    model = _graph(module, config, context)
    attach(model, module)
    return model


def export_on_meta(config: Any, weights: Path, *, context: int | None = None) -> ir.Model:
    """Export a configuration without weights: the graph of `export`, and a sparse file in place of its parameters.

    ``weights`` is created with the size that the parameters would have and holds nothing but zeros: it takes no room on
    a disk that keeps holes, and is not read here. Buffers (rotary frequencies) have their true values. Meant for
    measuring what passes cost on models that do not fit the machine.

    Args:
        config: a transformers configuration of a supported family; its ``dtype`` (float32 if it has none) decides the
            size of the weights.
        weights: the file to create; initializers refer to it by name, relative to its folder.
        context: the most tokens a row may have; the configuration's own limit if not given.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():  # tensors with a device, a shape and strides, and no memory
        module = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype or torch.float32, attn_implementation="sdpa"
        ).eval()
    model = _graph(module, config, context or config.max_position_embeddings)
    rotary: torch.nn.Module = type(module.model.rotary_emb)(config)  # a few kilobytes of real frequencies
    buffers = {f"model.rotary_emb.{name}": tensor for name, tensor in rotary.named_buffers()}
    offset = 0
    for value in _unset(model):
        if value.name in buffers:
            value.const_value = _attach(value, buffers)
            continue
        kind, shape = _described(value)
        size = math.prod(shape) * kind.itemsize
        value.const_value = ir.ExternalTensor(
            weights.name,
            offset,
            int(size),
            kind,
            shape=ir.Shape(shape),
            name=str(value.name),
            base_dir=weights.parent,
        )
        offset += -(-int(size) // _PAGE) * _PAGE
    with weights.open("wb") as file:
        file.truncate(offset)
    return model


def check_exportable(config: Any, context: int) -> None:
    """Refuse what would make the exported graph something else than causal attention over ``context`` tokens.

    A sliding window shorter than the context is another mask. Up to the window's own length the two are the same, so
    such a model is exact with a context no longer than its window. Rotary frequencies that depend on the length of the
    input (``dynamic``, ``longrope``) would be frozen at the length of the sample.
    """
    layers = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    if window is not None and window < context and (layers is None or "sliding_attention" in layers):
        raise InputError(
            f"the model attends through a sliding window of {window} tokens, shorter than the context of {context}",
            "causal attention over the whole context",
            f"limit the context to {window} tokens, within which the window hides nothing",
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(
            f"the model's rotary embedding is of type '{rope}': its frequencies depend on the length of the input",
            "a rotary embedding with fixed frequencies (default, linear, llama3, yarn)",
        )


def _graph(module: torch.nn.Module, config: Any, context: int) -> ir.Model:
    """The exported graph, whose parameters are initializers without a value."""
    if module.training:
        raise InputError("the module is in training mode", "eval mode", "call module.eval() before exporting")
    check_exportable(config, context)
    model = _trace(module)
    finish(model, module)
    model.metadata_props[CONTEXT_KEY] = str(context)
    return model


def finish(model: ir.Model, module: torch.nn.Module) -> None:
    """Bring what PyTorch exported into our form, in place: canonical names, folded shapes, nothing of the machine.

    ``module`` was traced as the child `ROOT` of another. Its parameters are initializers without a value afterwards;
    `attach` gives them their values.
    """
    canonical = _canonical_names(module)
    for name, value in list(model.graph.initializers.items()):
        parameter = name.removeprefix(f"{ROOT}.")
        if parameter in canonical:
            value.const_value = None
            value.name = canonical[parameter]
    _simplify(model)
    _fold_transposes(model)
    common.ShapeInferencePass()(model)
    _rename(model)
    strip_metadata(model)  # where and by whom it was traced
    model.graph.name = "main"
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "trtpass", trtpass.__version__


def attach(model: ir.Model, module: torch.nn.Module) -> None:
    """Give the initializers the module's parameters and buffers, as views of their memory."""
    state = _tensors(module)
    for value in _unset(model):
        value.const_value = _attach(value, state)


def _trace(module: torch.nn.Module) -> ir.Model:
    """PyTorch's own export, before any optimisation of the graph."""
    import torch

    class Stateless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(ROOT, module)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return getattr(self, ROOT)(input_ids=input_ids, use_cache=False).logits

    ids = torch.zeros((2, 17), dtype=torch.int64)  # any sizes but 0 and 1, which would become constants
    program = None
    with quiet() as said:
        try:
            program = torch.onnx.export(
                Stateless().eval(),
                (ids,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises anything; the cause is chained
            log.debug("torch.onnx.export said:\n%s", said.getvalue())
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"PyTorch cannot export {type(module).__name__}: {reason}",
                "a transformers causal language model of a supported family",
            ) from error
    if program is None:
        raise InputError(f"PyTorch returned no graph for {type(module).__name__}")
    return program.model


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have, in module order."""
    state: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    state.update(module.named_buffers(remove_duplicate=False))
    return state


def _canonical_names(module: torch.nn.Module) -> dict[str, str]:
    """Tied parameters have several names, of which the exporter picks any: map each to the first in module order."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(module).items()}


def _unset(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def _described(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]]:
    if value.dtype is None or value.shape is None:
        raise InputError(f"the exporter gave initializer '{value.name}' no type or shape")
    return value.dtype, tuple(value.shape.numpy())


def _attach(value: ir.Value, state: Mapping[str, torch.Tensor]) -> ir.TensorProtocol:
    """The tensor that an initializer is named after, as a view of its memory."""
    from onnx_ir.tensor_adapters import TorchTensor

    name = str(value.name)
    if name not in state:
        raise InputError(f"initializer '{name}' of the exported graph is neither a parameter nor a buffer")
    tensor = state[name].detach()
    return TorchTensor(tensor.mT if "transposed" in value.meta else tensor, name=name)


def _simplify(model: ir.Model) -> None:
    """Fold arithmetic on shapes and constants, drop slices of everything, casts to the same type and other leftovers.

    Parameters have no value here: nothing folds into them, and they are not compared with each other. The order
    matters: the rewriter's cost grows with the square of the graph, which the passes before it shrink to a third.
    """
    from onnxscript import optimizer, rewriter

    passes: list[Any] = [
        lambda graph: optimizer.fold_constants(graph, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ]
    with quiet():  # it warns about every initializer without a value
        for apply in passes:
            apply(model)
        rewriter.rewrite(model)
        for apply in passes:
            apply(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        common.TopologicalSortPass()(model)


def _fold_transposes(model: ir.Model) -> None:
    """``Transpose(parameter)`` becomes the parameter, stored transposed, where nothing else reads the parameter."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.attributes["perm"].as_ints() != (1, 0):
            continue
        weight, out = node.inputs[0], node.outputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is not None or len(weight.uses()) != 1:
            continue
        _, shape = _described(weight)
        out.replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        weight.shape = ir.Shape(shape[::-1])
        weight.meta["transposed"] = True


def _rename(model: ir.Model) -> None:
    """Name nodes after the module that they come from, values after their node, constants by their order of use."""
    graph = model.graph
    parameters = {value.name for value in _unset(model)}
    constants = [value for value in graph.initializers.values() if value.name not in parameters]
    ends = {value.name for value in [*graph.inputs, *graph.outputs]}
    for position, value in enumerate(constants):  # out of the way of the names given below
        value.name = f"unnamed_{position}"
    seen: Counter[str] = Counter()
    used: dict[ir.Value, None] = {}
    for node in graph:
        stem = ".".join(part for part in (_scope(node), node.op_type) if part)
        node.name = f"{stem}_{seen[stem]}" if seen[stem] else stem
        seen[stem] += 1
        for position, out in enumerate(node.outputs):
            if out.name not in ends:
                out.name = f"{node.name}:{position}" if position else node.name
        used.update((value, None) for value in node.inputs if value is not None and value.name not in parameters)
    for position, value in enumerate(value for value in used if value.is_initializer()):
        value.name = f"constant_{position}"
    ordered = sorted(graph.initializers.items(), key=lambda item: (item[0] not in parameters, _natural(item[0])))
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    parts = name.replace("_", ".").split(".")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _scope(node: ir.Node) -> str:
    """Path of the innermost module that a node was traced in, such as ``model.layers.0.self_attn``; "" if unknown."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.startswith(f"{ROOT}.")]  # the last one is the operation
    return modules[-1].removeprefix(f"{ROOT}.") if modules else ""
