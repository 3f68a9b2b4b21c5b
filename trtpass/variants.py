"""Variants of a rewritten graph for its proof: selections exposed as outputs, or forced through inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from trtpass.anchors import find
from trtpass.errors import AnchorError, InputError
from trtpass.passes import PassResult, Site
from trtpass.passes.logits import lm_head

SELECTION = ("score", "keep", "index", "count")  # roles of a site's values that a check looks at
FORCED = ("index", "count")  # roles that can be forced


def sites_of(results: Iterable[PassResult]) -> tuple[Site, ...]:
    """The sites of all passes that select tokens of an attention; where a stream becomes shorter is another matter
    (``trtpass.encoder_checks.reducing``)."""
    every = (site for result in results for site in result.sites)
    return tuple(site for site in every if "index" in site.values and "tokens" not in site.values)


def expose(model: ir.Model, names: Sequence[str]) -> None:
    """Make the named values graph outputs, in place."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    for name in names:
        value = values.get(name)
        if value is None:
            raise InputError(f"the graph has no value '{name}' to expose")
        if not value.is_graph_output():
            model.graph.outputs.append(value)


def expose_selections(model: ir.Model, sites: Sequence[Site]) -> None:
    """Expose score, keep, index and count of every site."""
    expose(model, [site.values[role] for site in sites for role in SELECTION])


def expose_hidden(model: ir.Model) -> str:
    """Expose the hidden state ``[B, S, E]`` below lm_head; returns its name. Call it before ``LastLogits``."""
    hidden = lm_head(find(model)).inputs[0]
    if hidden is None or hidden.name is None:
        raise AnchorError("lm_head has no named input")
    expose(model, [hidden.name])
    return hidden.name


def force_selections(model: ir.Model, sites: Sequence[Site]) -> dict[tuple[int, str], str]:
    """Feed each site's ``index`` and ``count`` to attention from new graph inputs, in place.

    The graph still computes its own selection, so that it can be exposed. Returns (layer, role) -> input name.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    names: dict[tuple[int, str], str] = {}
    for site in sites:
        for role in FORCED:
            own = values[site.values[role]]
            shape = [*list(own.shape or [])[:2], f"forced{site.layer}"] if role == "index" else list(own.shape or [])
            given = ir.Value(
                name=f"forced.{site.layer}.{role}", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(shape)
            )
            model.graph.inputs.append(given)
            for node, index in list(own.uses()):
                node.replace_input_with(index, given)
            names[site.layer, role] = str(given.name)
    return names


def feeds(
    names: Mapping[tuple[int, str], str], sites: Sequence[Site], outputs: Mapping[str, object]
) -> dict[str, object]:
    """Inputs for a forced graph from the outputs of an exposed one."""
    roles = {site.layer: site.values for site in sites}
    return {given: outputs[roles[layer][role]] for (layer, role), given in names.items()}
