"""Lowering to a target: trtpass nodes to native kernels where they fit, else to their ONNX bodies; on the CPU,
attention to the fastest kernel that there is.

Every choice is reported, node by node, with its reason in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from plugins import all_ops
from plugins._library import function
from trtpass.errors import InputError
from trtpass.ir import check, is_op, tidy
from trtpass.op import DOMAIN, Op
from trtpass.passes.contrib import attention_to_contrib, infer
from trtpass.passes.encoder_attention import attention_to_encoder
from trtpass.passes.native import attention_to_native, fits, interleave, keep_body
from trtpass.passes.tables import fold_tables
from trtpass.passes.transposes import swap_in_branches, swap_indices

TARGETS = ("portable", "cpu")
TARGET_KEY = "trtpass.target"  # property of a lowered graph
STAYS = "native"  # overload of a node while others of its operator are inlined
ORIGIN, SITE = "trtpass.op", "trtpass.site"  # metadata of an inlined node: the operator and the node that it came from


@dataclass(frozen=True)
class Decision:
    """What a node became and why, in words."""

    node: str
    decision: str
    reason: str


@dataclass(frozen=True)
class Lowered:
    """A graph whose trtpass nodes, if any are left, are native kernels, and the decision taken for each node."""

    model: ir.Model
    decisions: tuple[Decision, ...]


def lower(model: ir.Model, target: str, kernels: bool = True) -> Lowered:
    """A copy of ``model`` (weights shared) for ``target``.

    Args:
        model: stateless, prefill or decode, with trtpass nodes or without.
        target: ``portable`` (standard operators only) or ``cpu`` (native kernels and ONNX Runtime's own for the CPU).
        kernels: False leaves native kernels out, for a machine that will not have their library.

    Raises:
        InputError: unknown target, an operator without a body, or a result that is not valid ONNX.
    """
    if target not in TARGETS:
        raise InputError(f"lowering to target '{target}'", f"one of {', '.join(TARGETS)}")
    copy = model.clone()
    kernels = kernels and target == "cpu"
    kept = native_nodes(copy) if kernels else {}
    decisions = [Decision(str(n.name), "native kernel", _served(n)) for n, reason in kept.items() if reason is True]
    decisions += inline_bodies(copy, "dynamic", kept)
    if target == "cpu":
        swap_in_branches(copy)
        infer(copy)
        fold_tables(copy)
        if kernels:
            decisions += [Decision(*choice) for choice in attention_to_native(copy) + attention_to_encoder(copy)]
        decisions += [Decision(*choice) for choice in attention_to_contrib(copy)]
        interleave(copy, [node for node in copy.graph.all_nodes() if node.domain == DOMAIN])
        swap_indices(copy)
    else:
        decisions += [
            Decision(str(n.name), "Attention", "portable: standard operators only")
            for n in copy.graph.all_nodes()
            if n.op_type == "Attention" and n.domain == ""
        ]
    _settle_casts(copy)
    tidy(copy)
    copy.metadata_props[TARGET_KEY] = target
    check(copy, f"the graph lowered to '{target}'")
    return Lowered(copy, tuple(decisions))


def counted(decisions: Iterable[tuple[str, Decision]]) -> list[str]:
    """Decisions in words, each with the phase it was taken in, equal ones once with their number."""
    lines: dict[str, int] = {}
    for phase, decision in decisions:
        text = f"{phase}: {decision.decision} ({decision.reason})"
        lines[text] = lines.get(text, 0) + 1
    return [f"{count} x {text}" for text, count in lines.items()]


def _settle_casts(model: ir.Model) -> None:
    """``CastLike(x, y)`` to ``Cast(x)`` where the type of y is known: ONNX Runtime warns at each constant CastLike."""
    casts = [(node, node.inputs[1]) for node in model.graph.all_nodes() if is_op(node, "CastLike")]
    if any(like is not None and like.dtype is None for _, like in casts):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for node, like in casts:
        if like is not None and like.dtype is not None:
            node.op_type = "Cast"
            node.resize_inputs(1)
            node.attributes["to"] = ir.AttrInt64("to", int(like.dtype))


def native_nodes(model: ir.Model) -> dict[ir.Node, bool | str]:
    """For each trtpass node of the main graph, whether a native kernel serves it, or the reason why none does."""
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN and node.op_type in all_ops()]
    if any(value is not None and value.dtype is None for node in nodes for value in node.inputs):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    found: dict[ir.Node, bool | str] = {}
    for node in nodes:  # in order, so that what one makes is known where the next reads it
        op = all_ops()[node.op_type]
        inputs = zip(node.inputs, op.inputs, strict=False)
        floating = next((x.dtype for x, port in inputs if x is not None and port.floating), None)
        for port, value in zip(op.outputs, node.outputs, strict=False):
            if value.dtype is None:
                known = None if port.floating else ir.DataType.from_numpy(np.dtype(port.dtypes[0]))
                value.type = None if (dtype := known or floating) is None else ir.TensorType(dtype)
        found[node] = fits(node, op)
    return found


def inline_bodies(model: ir.Model, kind: str, native: Mapping[ir.Node, bool | str] | None = None) -> list[Decision]:
    """Replace every trtpass node by its body, and inline every other model-local function, in place; says why for each.

    Inlined nodes carry the operator's name in their metadata, so that a profile can be read by operator.

    Args:
        kind: ``dynamic`` or ``static``, as in ``Op.body``.
        native: nodes that stay, for a kernel (True; the model gets their body as a function), or the reason in words
            why one does not.

    Raises:
        InputError: an operator that is unknown or has no body of this kind, or functions that call themselves.
    """
    decisions: list[Decision] = []
    native = native or {}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key[1] in all_ops()]:
        del model.functions[identifier]  # a file may carry another version's bodies; these are this version's
    todo = _own_nodes(model)
    stay: list[tuple[ir.Node, Op]] = []
    for node in todo:  # grows by the nodes of bodies that call other operators
        op = all_ops().get(node.op_type)
        if op is None and node.op_identifier() not in model.functions:
            raise InputError(
                f"node '{node.name}' is {DOMAIN}::{node.op_type}, which this version does not know",
                f"one of {', '.join(all_ops())}",
                "rewrite the model again with this version",
            )
        node.metadata_props.setdefault(ORIGIN, node.op_type)
        node.metadata_props.setdefault(SITE, str(node.name))
        if op is None:
            continue
        for name, value in op.complete({k: a.value for k, a in node.attributes.items() if not a.is_ref()}).items():
            node.attributes.setdefault(name, ir.convenience.convert_attribute(name, value))
        reason = native.get(node, "standard operators only" if kind == "static" else "no native kernels on this target")
        if reason is True:
            stay.append((node, op))
            node.overload = STAYS
            continue
        decisions.append(Decision(str(node.name), f"{kind} body", str(reason)))
        if node.op_identifier() not in model.functions:
            body = function(op, kind)
            model.functions[node.op_identifier()] = body
            todo += [inner for inner in body.graph.all_nodes() if inner.domain == DOMAIN]
    try:
        common.InlinePass()(model)
    except (ir.passes.PreconditionError, ValueError) as error:
        raise InputError(f"model-local functions cannot be inlined: {error}", "functions without cycles") from error
    model.opset_imports.pop(DOMAIN, None)
    for node, op in stay:
        node.overload = ""
        keep_body(model, node, op, kind)
    return decisions


def _own_nodes(model: ir.Model) -> list[ir.Node]:
    graphs = [model.graph, *(body.graph for body in model.functions.values())]
    return [node for graph in graphs for node in graph.all_nodes() if node.domain == DOMAIN]


def _served(node: ir.Node) -> str:
    op = all_ops()[node.op_type]
    found = [x.dtype for x, port in zip(node.inputs, op.inputs, strict=False) if x is not None and port.floating]
    return f"{op.name} in {found[0].numpy() if found and found[0] is not None else 'float32'}"
