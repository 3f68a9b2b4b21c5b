"""Anchors: what passes hold on to in a canonical graph, found by structure and never by name.

``find`` always returns; what it did not find is said in words, in ``Anchors.missing`` and in the ``why_*`` fields of a
block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from trtpass.ir import const_array, dims, float_attr, int_attr, is_op
from trtpass.residuals import ROWWISE, after_attention, after_mlp

_POSITIONAL = (
    "Cos",
    "Sin",
    "Mul",
    "MatMul",
    "Concat",
    "Unsqueeze",
    "Cast",
    "Transpose",
    "Reshape",
    "Slice",
    "Gather",
    "Expand",
    "Squeeze",
    "Identity",
    "Div",
    "Add",
    "Sub",
)


@dataclass(frozen=True)
class AttentionBlock:
    """One attention: its node and what surrounds it.

    Shapes: q ``[B, H, S, D]``, k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``, output ``[B, H, S, Dv]``;
    residuals ``[B, S, E]``: ``residual_in`` before attention, ``residual_out`` after it, ``mlp_out`` after the MLP.
    """

    layer: int
    node: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    output: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    causal: bool
    why_not_causal: str
    rope_q: ir.Node | None
    rope_k: ir.Node | None
    qkv_input: ir.Value | None
    why_no_qkv_input: str
    o_proj: ir.Node | None
    residual_in: ir.Value | None
    residual_out: ir.Value | None
    why_no_residual: str
    mlp_out: ir.Value | None = None
    why_no_mlp: str = ""

    @property
    def group(self) -> int:
        """Query heads per KV head (G)."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Anchors:
    """All anchors of a graph. ``missing`` holds one sentence for each thing that was looked for and not found."""

    blocks: tuple[AttentionBlock, ...]
    input_ids: ir.Value | None
    logits: ir.Value | None
    positions: ir.Value | None
    token_axes: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def find(model: ir.Model) -> Anchors:
    """Find attention blocks, residual streams, positions and token axes of the main graph, in graph order."""
    graph = model.graph
    missing: list[str] = []
    blocks: list[AttentionBlock] = []
    for node in graph:
        if is_op(node, "Attention"):
            block = _block(node, len(blocks))
            if isinstance(block, str):
                missing.append(block)
            else:
                blocks.append(block)
    if not blocks and not missing:
        softmaxes = sum(is_op(n, "Softmax") for n in graph)
        missing.append(
            "no Attention node"
            + (
                f" ({softmaxes} Softmax nodes: attention decomposed in a form that raising did not recognise)"
                if softmaxes
                else ""
            )
        )
    input_ids = _input_ids(graph)
    # A graph of bidirectional attention whose inputs are all images, sound or features is an encoder.
    integers = any(v.dtype is None or not v.dtype.is_floating_point() for v in graph.inputs)
    decoder = not blocks or integers or any(b.causal for b in blocks)
    if input_ids is None and decoder:
        missing.append(
            "no token input: no int64 [batch, sequence] graph input is looked up in an embedding table by Gather"
        )
    logits = _logits(graph)
    if logits is None and decoder:
        missing.append("no logits: no graph output [batch, sequence, vocabulary] is produced by a MatMul or Gemm")
    positions, why = _positions(blocks)
    if positions is None and decoder:
        missing.append(why)
    axes = {"input_ids": 1} if input_ids is not None else {}
    for block in blocks:
        axes[str(block.q.name)] = 2
        if block.residual_in is not None:
            axes[str(block.residual_in.name)] = 1
    return Anchors(tuple(blocks), input_ids, logits, positions, axes, tuple(missing))


def _block(node: ir.Node, layer: int) -> AttentionBlock | str:
    """The block around an Attention node, or the reason why it is not usable."""
    label = f"Attention node '{node.name}'"
    if len(node.inputs) < 3 or any(v is None for v in node.inputs[:3]) or not node.outputs:
        return f"{label}: fewer than three inputs"
    q, k, v = node.inputs[:3]
    if q is None or k is None or v is None:
        return f"{label}: q, k or v is absent"
    shapes = [dims(q), dims(k), dims(v)]
    for name, shape in zip("qkv", shapes, strict=True):
        if shape is None or len(shape) != 4:
            return f"{label}: {name} has shape {shape}, expected 4-D [B, H, S, D] with known head count and width"
        if not isinstance(shape[1], int) or not isinstance(shape[3], int) or shape[1] < 1 or shape[3] < 1:
            return f"{label}: {name} has no fixed head count and width (shape {shape})"
    heads, kv_heads = shapes[0][1], shapes[1][1]  # type: ignore[index]
    head_dim, v_head_dim = shapes[0][3], shapes[2][3]  # type: ignore[index]
    if heads % kv_heads or shapes[2][1] != kv_heads:  # type: ignore[index]
        return f"{label}: {heads} query heads cannot be grouped over {kv_heads} key and {shapes[2][1]} value heads"  # type: ignore[index]
    causal, why = _is_causal(node)
    qkv_input, why_qkv = _qkv_input(q, k, v)
    o_proj, residual_in, residual_out, why_residual = after_attention(node)
    mlp_out, why_mlp = (None, why_residual) if residual_out is None else after_mlp(residual_in, residual_out)
    return AttentionBlock(
        layer=layer, node=node, q=q, k=k, v=v, output=node.outputs[0],
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
        scale=float_attr(node, "scale", 1.0 / math.sqrt(head_dim)),
        causal=causal, why_not_causal=why,
        rope_q=_producer(q, "RotaryEmbedding"), rope_k=_producer(k, "RotaryEmbedding"),
        qkv_input=qkv_input, why_no_qkv_input=why_qkv,
        o_proj=o_proj, residual_in=residual_in, residual_out=residual_out, why_no_residual=why_residual,
        mlp_out=mlp_out, why_no_mlp=why_mlp,
    )  # fmt: skip


def _producer(value: ir.Value, op_type: str) -> ir.Node | None:
    node = value.producer()
    return node if is_op(node, op_type) else None


def _is_causal(node: ir.Node) -> tuple[bool, str]:
    if float_attr(node, "softcap", 0.0) != 0.0:
        return False, "logits are soft-capped"
    if any(v is not None for v in node.inputs[4:]):
        return False, "it already reads a KV cache"
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return False, f"mask '{node.inputs[3].name}' was not proved causal"
    if not int_attr(node, "is_causal", 0):
        return False, "attention is bidirectional"
    return True, ""


def _projection(value: ir.Value) -> ir.Node | None:
    """Walk up from q, k or v to the MatMul or Gemm with a constant weight that made it."""
    seen = 0
    while (node := value.producer()) is not None and seen < 64:
        seen += 1
        if is_op(node, "MatMul", "Gemm"):
            return node
        if is_op(node, *ROWWISE, "Split", "Slice", "Squeeze", "Unsqueeze"):
            candidate = node.inputs[0]
        elif is_op(node, "Add", "Mul"):  # bias or a scale: exactly one side is constant
            sides = [v for v in node.inputs if v is not None and v.const_value is None]
            candidate = sides[0] if len(sides) == 1 else None
        else:
            return None
        if candidate is None:
            return None
        value = candidate
    return None


def _qkv_input(q: ir.Value, k: ir.Value, v: ir.Value) -> tuple[ir.Value | None, str]:
    sources: list[ir.Value] = []
    for name, value in (("q", q), ("k", k), ("v", v)):
        node = _projection(value)
        source = None if node is None else node.inputs[0]
        if source is None:
            return None, f"no projection MatMul found above {name} ('{value.name}')"
        sources.append(source)
    if any(s is not sources[0] for s in sources):
        names = ", ".join(str(s.name) for s in sources)
        return None, f"q, k and v are projected from different tensors ({names}): cross attention?"
    return sources[0], ""


def _input_ids(graph: ir.Graph) -> ir.Value | None:
    for value in graph.inputs:
        shape = dims(value)
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and shape is not None and len(shape) == 2:
            for node in value.consumers():
                table = node.inputs[0] if is_op(node, "Gather") else None
                if (
                    table is not None
                    and table.const_value is not None
                    and table.shape is not None
                    and len(table.shape) == 2
                ):
                    return value
    return None


def _logits(graph: ir.Graph) -> ir.Value | None:
    for value in graph.outputs:
        shape, node = dims(value), value.producer()
        while is_op(node, "Add", "Cast", "Identity", "Mul", "Div", "Tanh"):  # bias, dtype, soft-cap
            upper = next((v for v in node.inputs if v is not None and v.const_value is None), None)
            node = None if upper is None else upper.producer()
        if shape is not None and len(shape) == 3 and is_op(node, "MatMul", "Gemm"):
            return value
    return None


def _positions(blocks: list[AttentionBlock]) -> tuple[ir.Value | None, str]:
    """The one int64 ``[B, S]`` (or ``[1, S]``) value that cos and sin of every rotary embedding derive from."""
    ropes = [r for b in blocks for r in (b.rope_q, b.rope_k) if r is not None]
    if not ropes:
        return None, "no RotaryEmbedding feeds attention: positions unknown"
    found: dict[int, ir.Value] = {}
    for rope in ropes:
        position_ids = rope.inputs[3] if len(rope.inputs) > 3 else None
        candidates = [position_ids] if position_ids is not None else list(rope.inputs[1:3])
        for value in candidates:
            root = None if value is None else _climb(value)
            if root is None:
                return (
                    None,
                    f"RotaryEmbedding '{rope.name}': no integer [B, S] positions above '{value and value.name}'",
                )
            found[id(root)] = root
    if len(found) != 1:
        return None, f"rotary embeddings derive from {len(found)} position tensors, expected one"
    return next(iter(found.values())), ""


def _climb(value: ir.Value) -> ir.Value | None:
    """From cos or sin up to the first integer rank-2 value; constants (inverse frequencies) are not followed."""
    frontier, seen = [value], set()
    while frontier:
        value = frontier.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and value.shape is not None and len(value.shape) == 2:
            return value
        node = value.producer()
        if node is not None and is_op(node, *_POSITIONAL) and len(seen) < 256:
            data = node.inputs if is_op(node, "Mul", "MatMul", "Concat", "Add", "Sub", "Div") else node.inputs[:1]
            frontier.extend(v for v in data if v is not None and const_array(v) is None and v.const_value is None)
    return None
