"""The first layers of a real model, teacher-forced: graph, inputs, torch's outputs, and how a plan's are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from trtpass import passes
from trtpass.anchors import find
from trtpass.canonicalize import canonicalize
from trtpass.export import export
from trtpass.passes.cache import insert_cache

LAYERS, LENGTH = 3, 160
METHOD = "token-sparse:layers=all,min_tokens=16,window=16,coverage={coverage}"


def first_layers(loaded: Any, coverage: float) -> tuple[Any, dict[str, np.ndarray], list[torch.Tensor]]:
    """The canonical prefill graph of a model's first layers, its inputs, and every layer's output from torch.

    Every layer computes the whole prompt from the given ids. With ``coverage`` 0 nothing is dropped, and torch's own
    dense model is what a plan must equal; the graph has an output ``hidden.{i}`` for each layer.
    """
    module = copy.deepcopy(loaded.module)
    del module.model.layers[LAYERS:]
    config = copy.deepcopy(loaded.config)
    config.num_hidden_layers = LAYERS
    module.config.num_hidden_layers = LAYERS
    model = export(module, config, context=512)
    canonicalize(model)
    expose_layers(model)
    passes.parse(METHOD.format(coverage=coverage))(model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH))
    cached = insert_cache(model, "prefill", capacity=LENGTH, logits="all")
    with torch.no_grad():
        states = module(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    given: dict[str, np.ndarray] = {"input_ids": ids, "lengths": np.array([LENGTH], np.int32)}
    for value in cached.graph.inputs:
        if str(value.name).startswith("past."):
            given[str(value.name)] = np.zeros([1, *(int(d) for d in list(value.shape or [])[1:])], np.float16)  # type: ignore[arg-type]
    return cached, given, list(states[1:LAYERS])  # the last one of torch has the final norm in it


def expose_layers(model: ir.Model) -> None:
    """Outputs ``hidden.{i}``: the residual stream ``[B, S, E]`` behind layer i, all but the last's."""
    for number, block in enumerate(find(model).blocks[1:]):
        stream = block.residual_in
        assert stream is not None, block.why_no_residual
        alias = ir.node("Identity", [stream], name=f"hidden.{number}")
        alias.outputs[0].name = f"hidden.{number}"
        alias.outputs[0].type, alias.outputs[0].shape = stream.type, stream.shape
        model.graph.append(alias)
        model.graph.outputs.append(alias.outputs[0])


def compare_layers(
    made: Mapping[str, Any], expected: list[torch.Tensor], dtype: str = "float16"
) -> list[tuple[float, float]]:
    """(cosine, largest error over the largest value) of each layer; raises where roundings cannot explain it."""
    found = []
    for number, theirs in enumerate(expected):
        ours = torch.as_tensor(np.asarray(made[f"hidden.{number}"])).double().flatten()
        flat = theirs.double().flatten()
        cosine = float(torch.nn.functional.cosine_similarity(ours, flat, dim=0))
        error = float((ours - flat).abs().max() / flat.abs().max())
        found.append((cosine, error))
    # float16 keeps 11 bits, and a layer adds a dozen roundings of its largest values; bfloat16 keeps 8 bits
    least, most = {"float16": (0.9995, 0.01), "bfloat16": (0.995, 0.08)}[dtype]
    assert all(cosine > least and error < most for cosine, error in found), found
    return found
