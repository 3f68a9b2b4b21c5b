"""What a graph is made of, as passes see it: anchors found, methods that apply, and for the rest why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trtpass.anchors import Anchors, find
from trtpass.canonicalize import canonicalize
from trtpass.encoders import describe, streams
from trtpass.errors import TrtpassError
from trtpass.passes import all_methods

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Inspection:
    """Anchors of a raised graph. ``methods``: pass name -> "" where it applies, else the reason why it does not.

    ``encoders``: one for each token stream, in graphs that are no plain decoder.
    """

    nodes: int
    opset: int
    raised: dict[str, int]
    near_misses: tuple[str, ...]
    blocks: tuple[dict[str, Any], ...]
    positions: str | None
    input_ids: str | None
    logits: str | None
    token_axes: dict[str, int]
    missing: tuple[str, ...]
    methods: dict[str, str]
    encoders: tuple[dict[str, Any], ...] = ()


def inspect(model: ir.Model) -> Inspection:
    """Raise ``model`` in place and describe it.

    Raises:
        InputError: the model cannot be raised at all (an opset that does not convert).
    """
    nodes, opset = model.graph.num_nodes(), model.opset_imports.get("", 0)
    raised = canonicalize(model)
    anchors = find(model)
    blocks = tuple(
        {
            "layer": b.layer, "node": str(b.node.name),
            "heads": b.heads, "kv_heads": b.kv_heads, "head_dim": b.head_dim,
            "scale": round(b.scale, 6), "causal": b.causal, "why_not_causal": b.why_not_causal,
            "rope": b.rope_q is not None and b.rope_k is not None,
            "qkv_input": None if b.qkv_input is None else str(b.qkv_input.name), "why_no_qkv_input": b.why_no_qkv_input,
            "residual": None if b.residual_in is None else [str(b.residual_in.name), str(b.residual_out.name)],  # type: ignore[union-attr]
            "why_no_residual": b.why_no_residual,
        }
        for b in anchors.blocks
    )  # fmt: skip
    methods = {}
    for name, cls in all_methods().items():
        try:
            cls().requires(model, anchors)
            methods[name] = ""
        except TrtpassError as error:
            methods[name] = error.found

    def named(value: ir.Value | None) -> str | None:
        return None if value is None else f"{value.name} {value.dtype} {value.shape}"

    return Inspection(
        nodes, opset, dict(raised.counts), raised.near_misses, blocks,
        named(anchors.positions), named(anchors.input_ids), named(anchors.logits),
        anchors.token_axes, anchors.missing, methods, _encoders(model, anchors),
    )  # fmt: skip


def _encoders(model: ir.Model, anchors: Anchors) -> tuple[dict[str, Any], ...]:
    """What ``trtpass.encoders`` finds, where an input of the graph is not made of integers."""
    if all(v.dtype is None or not v.dtype.is_floating_point() for v in model.graph.inputs):
        return ()
    described = []
    for stream in streams(anchors) if anchors.blocks else ():
        found = describe(model, stream)
        described.append(
            {
                "blocks": [stream.blocks[0].layer, stream.blocks[-1].layer],
                "stream_in": None if found.stream_in is None else str(found.stream_in.name),
                "stream_out": None if found.stream_out is None else str(found.stream_out.name),
                "tokens": found.tokens, "cls": found.cls, "grid": found.grid, "why_no_grid": found.why_no_grid,
                "head": found.head, "why": found.why,
            }
        )  # fmt: skip
    return tuple(described)


def _encoder_lines(encoder: dict[str, Any]) -> list[str]:
    first, last = encoder["blocks"]
    grid = "x".join(map(str, encoder["grid"])) if encoder["grid"] else f"not known: {encoder['why_no_grid']}"
    return [
        f"token stream of blocks {first} to {last}: {encoder['stream_in'] or 'not found'} -> "
        f"{encoder['stream_out'] or 'not found'}",
        f"tokens: {encoder['tokens'] or 'known at run time'}, {encoder['cls']} special in front; grid: {grid}",
        f"head: {encoder['head']}: {encoder['why']}",
    ]


def render(found: Inspection, title: str) -> Group:
    """Tables for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "layer", "heads", "KV heads", "D", "scale", "causal", "RoPE", "feeds q, k, v", "residual", title="attention"
    )
    for b in found.blocks:
        table.add_row(
            str(b["layer"]), str(b["heads"]), str(b["kv_heads"]), str(b["head_dim"]), f"{b['scale']:g}",
            "yes" if b["causal"] else escape(f"no: {b['why_not_causal']}"), "yes" if b["rope"] else "no",
            escape(b["qkv_input"] or f"not found: {b['why_no_qkv_input']}"),
            escape(" -> ".join(b["residual"]) if b["residual"] else f"not found: {b['why_no_residual']}"),
        )  # fmt: skip
    lines = [
        f"{title}: {found.nodes} nodes, opset {found.opset}",
        "raised: "
        + (
            ", ".join(f"{n} {name}" for name, n in found.raised.items() if n)
            or "nothing (already canonical, or not recognised)"
        ),
        f"tokens in: {found.input_ids or 'not found'}",
        f"logits out: {found.logits or 'not found'}",
        f"positions: {found.positions or 'not found'}",
        f"token axes: {len(found.token_axes)} tensors carry tokens, for example "
        + ", ".join(f"{k} on axis {v}" for k, v in list(found.token_axes.items())[:3]),
    ]
    if found.encoders:
        lines[2 : 2 if found.input_ids else 5] = [
            line for encoder in found.encoders for line in _encoder_lines(encoder)
        ]
    lines += [f"not found: {reason}" for reason in found.missing]
    lines += [f"nearly: {reason}" for reason in found.near_misses]
    for name, reason in found.methods.items():
        lines.append(f"method {name}: " + (f"does not apply: {reason}" if reason else "applies"))
    text = Text("\n".join(lines))  # plain: a shape such as [B, S] is not markup
    return Group(text, table) if found.blocks else Group(text)
