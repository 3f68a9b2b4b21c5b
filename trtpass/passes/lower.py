"""Lowering to a target: trtpass nodes to their ONNX bodies, and on the CPU causal attention to the contrib operator.

Every choice is reported, node by node, with its reason in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from plugins import all_ops
from trtpass.errors import InputError
from trtpass.ir import check, tidy
from trtpass.op import DOMAIN
from trtpass.passes.contrib import attention_to_contrib

TARGETS = ("portable", "cpu")
ORIGIN = "trtpass.op"  # metadata of an inlined node: the operator whose body it belongs to


@dataclass(frozen=True)
class Decision:
    """What a node became and why, in words."""

    node: str
    decision: str
    reason: str


@dataclass(frozen=True)
class Lowered:
    """A graph without trtpass nodes, and the decision taken for each node that had a choice."""

    model: ir.Model
    decisions: tuple[Decision, ...]


def lower(model: ir.Model, target: str) -> Lowered:
    """A copy of ``model`` (weights shared) for ``target``.

    Args:
        model: stateless, prefill or decode, with trtpass nodes or without.
        target: ``portable`` (standard operators only) or ``cpu`` (ONNX Runtime's CPU kernels).

    Raises:
        InputError: unknown target, an operator without a body, or a result that is not valid ONNX.
    """
    if target not in TARGETS:
        raise InputError(f"lowering to target '{target}'", f"one of {', '.join(TARGETS)}")
    copy = model.clone()
    decisions = inline_bodies(copy, "dynamic")
    if target == "cpu":
        decisions += [Decision(*choice) for choice in attention_to_contrib(copy)]
    else:
        decisions += [
            Decision(str(n.name), "Attention", "portable: standard operators only")
            for n in copy.graph.all_nodes()
            if n.op_type == "Attention" and n.domain == ""
        ]
    tidy(copy)
    copy.metadata_props["trtpass.target"] = target
    check(copy, f"the graph lowered to '{target}'")
    return Lowered(copy, tuple(decisions))


def inline_bodies(model: ir.Model, kind: str) -> list[Decision]:
    """Replace every trtpass node by its body, and inline every other model-local function, in place.

    Inlined nodes carry the operator's name in their metadata, so that a profile can be read by operator.

    Args:
        kind: ``dynamic`` or ``static``, as in ``Op.body``.

    Raises:
        InputError: an operator that is unknown or has no body of this kind, or functions that call themselves.
    """
    decisions: list[Decision] = []
    todo: list[ir.Node] = list(_own_nodes(model))
    while todo:
        node = todo.pop(0)
        op = all_ops().get(node.op_type)
        identifier = node.op_identifier()
        if op is None and identifier not in model.functions:
            raise InputError(
                f"node '{node.name}' is {DOMAIN}::{node.op_type}, which this version does not know",
                f"one of {', '.join(all_ops())}",
                "rewrite the model again with this version",
            )
        node.metadata_props.setdefault(ORIGIN, node.op_type)
        if op is None:
            continue
        for name, value in op.complete({k: a.value for k, a in node.attributes.items()}).items():
            node.attributes.setdefault(name, ir.convenience.convert_attribute(name, value))
        decisions.append(Decision(str(node.name), f"{kind} body", "no native kernel for this operator here"))
        if identifier in model.functions:
            continue
        if kind not in op.bodies:
            raise InputError(f"operator {op.name} has no {kind} body", f"one of {', '.join(op.bodies) or 'none'}")
        function = ir.serde.deserialize_function(op.bodies[kind]().to_function_proto())
        model.functions[identifier] = function
        todo += [n for n in function.all_nodes() if n.domain == DOMAIN]
    try:
        common.InlinePass()(model)
    except (ir.passes.PreconditionError, ValueError) as error:
        raise InputError(f"model-local functions cannot be inlined: {error}", "functions without cycles") from error
    model.opset_imports.pop(DOMAIN, None)
    return decisions


def _own_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from (node for node in graph.all_nodes() if node.domain == DOMAIN)
