"""Causal Attention to ``com.microsoft::GroupQueryAttention``, the fastest on ONNX Runtime's CPU.

Three forms are recognised; whatever else is found stays as it is, with the reason:

* plain: ``Attention(q, k, v, is_causal=1)`` on fresh keys, in the main graph, in an If, in an inlined body;
* prefill: the same, whose k and v are also written to an empty cache: the operator writes the cache itself;
* decode: ``Attention(q, TensorScatter(past_k, k), TensorScatter(past_v, v), nonpad_kv_seqlen)``: past and present go
  straight to the operator, which writes in place where they share a buffer and reads only slots in use.

GroupQueryAttention takes ``[B, S, H*D]``, so a Transpose in front of it (and of its rotary embedding) disappears. It
refuses batch > 1 with several tokens and a past: the runtime runs such chunks row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trtpass.ir import const_ints, constant, dims, float_attr, int_attr, is_op, make_node
from trtpass.op import DOMAIN
from trtpass.passes.transposes import take_place

CONTRIB = "com.microsoft"
_TO_BSHD = [0, 2, 1, 3]
_ORIGIN = f"{DOMAIN}.op"
Choice = tuple[str, str, str]  # node, decision, reason


def attention_to_contrib(model: ir.Model) -> list[Choice]:
    """Replace what can be replaced, in place; returns ``(node, decision, reason)`` for every Attention of the model.

    Types and shapes must be there, as far as they can be known: ``infer``.
    """
    lengths = _Lengths(model.graph)
    choices: list[Choice] = []
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention")]:
        site = match(node)
        label = " / ".join(filter(None, (node.metadata_props.get(f"{DOMAIN}.site"), node.name)))
        if isinstance(site, str):
            choices.append((label, "Attention", site))
            continue
        _replace(node, site, lengths)
        choices.append((label, "GroupQueryAttention", site.why))
    if any(decision == "GroupQueryAttention" for _, decision, _ in choices):
        model.opset_imports[CONTRIB] = 1
    return choices


def infer(model: ir.Model) -> None:
    """Types and shapes of all values that ONNX can infer, in place: inlined bodies know their head counts only then."""
    _hint_slices(model.graph)
    # Not strict: a node that ONNX cannot infer must not hide the rest.
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _hint_slices(graph: ir.Graph) -> None:
    """A Slice keeps the sizes of other axes: ONNX's inference forgets all of them where an end is computed."""
    for node in graph.all_nodes():
        axes = const_ints(node.inputs[3]) if is_op(node, "Slice") and len(node.inputs) > 3 else None
        shape = dims(node.inputs[0]) if axes is not None else None
        if axes is not None and shape is not None and node.outputs[0].shape is None:
            cut = {axis % len(shape) for axis in axes}
            node.outputs[0].type = node.inputs[0].type  # type: ignore[union-attr]
            node.outputs[0].shape = ir.Shape([None if i in cut else size for i, size in enumerate(shape)])


@dataclass(frozen=True)
class _Site:
    """q ``[B, H, S, D]``; k, v fresh ``[B, Hkv, S, D]``; writes to the cache; valid slots ``[B]`` in decode."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    writes: tuple[ir.Node, ir.Node] | None
    visible: ir.Value | None
    why: str


def match(node: ir.Node) -> _Site | str:
    """The site, or the reason in words why the node stays an Attention."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    q, k, v, mask, past_key, past_value, visible = inputs[:7]
    if q is None or k is None or v is None:
        return "q, k or v is absent"
    if mask is not None:
        return f"it has a mask ('{mask.name}')"
    if not int_attr(node, "is_causal", 0):
        return "it is not causal"
    if past_key is not None or past_value is not None:
        return "its cache grows by concatenation"
    if float_attr(node, "softcap", 0.0):
        return "its logits are soft-capped"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "more than its first output is used"
    if q.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"its dtype is {q.dtype}, not float32 or float16"
    if visible is not None:
        writes = (k.producer(), v.producer())
        if not all(is_op(w, "TensorScatter") and _same_step(w, visible) for w in writes):
            return "its lengths differ by row, and it does not read a cache that this step writes"
        k, v = (w.inputs[1] for w in writes)  # type: ignore[union-attr]
    else:
        writes = (_prompt_write(k), _prompt_write(v))
    shapes = [dims(value) for value in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return f"the ranks of q, k and v are not all 4 ({shapes})"
    (_, heads, q_len, width), (_, kv_heads, kv_len, _), (_, _, _, v_width) = shapes  # type: ignore[misc]
    if not all(isinstance(size, int) for size in (heads, kv_heads, width, v_width)):
        return f"head counts or widths are not fixed: q {shapes[0]}, k {shapes[1]}"
    if width != v_width:
        return f"values are {v_width} wide and keys {width}: GroupQueryAttention has one width"
    if width % 8:
        return f"heads are {width} wide, and GroupQueryAttention takes multiples of 8"
    in_body = _ORIGIN in node.metadata_props  # an operator's body attends among the tokens that it selected
    fixed = isinstance(q_len, int) and isinstance(kv_len, int)
    if (q_len is None or q_len != kv_len) and (fixed or not in_body):
        return f"q has {q_len} tokens and k {kv_len}: not known to be the same"
    both = writes if all(writes) else None
    why = (
        "fresh keys"
        if both is None
        else ("cache of this step" if visible is not None else "fresh keys, writes the cache")
    )
    return _Site(q, k, v, heads, kv_heads, width, both, visible, why)  # type: ignore[arg-type]


def _same_step(write: ir.Node | None, visible: ir.Value) -> bool:
    """Whether ``visible`` is the write position plus the number of tokens: the cache up to and with this step."""
    total = visible.producer()
    return (
        write is not None
        and int_attr(write, "axis", 0) == 2
        and len(write.inputs) > 2
        and is_op(total, "Add")
        and any(value is write.inputs[2] for value in total.inputs)
        and any(value is not None and is_op(value.producer(), "Shape") for value in total.inputs)
    )


def _prompt_write(fresh: ir.Value) -> ir.Node | None:
    """The TensorScatter that writes a whole prompt's keys or values at slot 0, if there is one."""
    for node in fresh.consumers():
        if is_op(node, "TensorScatter") and node.inputs[1] is fresh and int_attr(node, "axis", 0) == 2:
            start = node.inputs[2] if len(node.inputs) > 2 else None
            filled = None if start is None else start.producer()
            if start is None or (is_op(filled, "ConstantOfShape") and _fills_zero(filled)):
                return node
    return None


def _fills_zero(node: ir.Node | None) -> bool:
    value = None if node is None else node.attributes.get("value")
    return value is None or not value.as_tensor().numpy().any()


class _Lengths:
    """``seqlens_k`` (int32 ``[B]``, keys visible to the last query, less one) and ``total_sequence_length`` (int32)."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.one = constant(graph, "gqa.one", np.array(1, np.int32))
        self.axis = constant(graph, "gqa.axis", np.array([0], np.int64))

    def of_cache(self, visible: ir.Value) -> tuple[ir.Value, ir.Value]:
        """From ``visible [B]`` int64, once for all layers."""
        if visible not in self.made:
            name, rows = f"{visible.name}.gqa", dims(visible)
            cast = make_node("Cast", [visible], [(f"{name}.keys", ir.DataType.INT32, rows)], {"to": 6})
            last = make_node("Sub", [cast.outputs[0], self.one], [(f"{name}.seqlens", ir.DataType.INT32, rows)])
            total = make_node("ReduceMax", cast.outputs, [(f"{name}.total", ir.DataType.INT32, [])], {"keepdims": 0})
            producer = visible.producer()
            if producer is None or producer.graph is None:
                raise ValueError(f"'{visible.name}' is an input")  # excluded by _same_step
            producer.graph.insert_after(producer, [cast, last, total])
            self.made[visible] = last.outputs[0], total.outputs[0]
        return self.made[visible]

    def of_fresh(self, flat: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """From fresh keys ``[B, S, *]``: every row attends to all S (right-padded: causal needs no length)."""
        shape = dims(flat) or [None, None, None]
        shared = before.graph is self.graph and all(isinstance(d, ir.SymbolicDim) for d in shape[:2])
        key = next((v for v in self.made if (dims(v) or [])[:2] == shape[:2]), None) if shared else None
        if key is not None:
            return self.made[key]
        name = f"{before.name}.gqa"
        batch = make_node("Shape", [flat], [(f"{name}.batch", ir.DataType.INT64, [1])], {"start": 0, "end": 1})
        size = make_node("Shape", [flat], [(f"{name}.tokens", ir.DataType.INT64, [1])], {"start": 1, "end": 2})
        cast = make_node("Cast", size.outputs, [(f"{name}.keys", ir.DataType.INT32, [1])], {"to": 6})
        last = make_node("Sub", [cast.outputs[0], self.one], [(f"{name}.last", ir.DataType.INT32, [1])])
        rows = make_node(
            "Expand", [last.outputs[0], batch.outputs[0]], [(f"{name}.seqlens", ir.DataType.INT32, shape[:1])]
        )
        total = make_node("Squeeze", [cast.outputs[0], self.axis], [(f"{name}.total", ir.DataType.INT32, [])])
        graph_of(before).insert_before(before, [batch, size, cast, last, rows, total])
        if shared:
            self.made[flat] = rows.outputs[0], total.outputs[0]
        return rows.outputs[0], total.outputs[0]


def graph_of(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"node '{node.name}' is not in a graph")
    return node.graph


def _replace(node: ir.Node, site: _Site, lengths: _Lengths) -> None:
    q, k, v = (
        _flat(value, count, site.head_dim, node, role, lengths.graph)
        for role, value, count in (
            ("q", site.q, site.heads),
            ("k", site.k, site.kv_heads),
            ("v", site.v, site.kv_heads),
        )
    )
    seqlens, total = lengths.of_fresh(k, node) if site.visible is None else lengths.of_cache(site.visible)
    shape = dims(site.q) or [None] * 4
    outputs: list[tuple[str, ir.DataType | None, list[Any] | None]] = [
        (f"{node.name}.gqa", site.q.dtype, [shape[0], shape[2], site.heads * site.head_dim])
    ]
    past = [None, None] if site.writes is None else [write.inputs[0] for write in site.writes]
    # Present outputs are asked for even where nothing reads them: without them the kernel takes a path that holds S x S
    # scores and, at 4096 tokens, takes 1.7 times as long.
    fresh = [shape[0], site.kv_heads, shape[2], site.head_dim]
    presents = [fresh, fresh] if site.writes is None else [dims(write.outputs[0]) for write in site.writes]
    outputs += [(f"{node.name}.gqa.{role}", site.k.dtype, present)
                for role, present in zip(("key", "value"), presents, strict=True)]  # fmt: skip
    attributes = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": float_attr(node, "scale", site.head_dim**-0.5),
    }
    made = make_node(
        "GroupQueryAttention", [q, k, v, *past, seqlens, total], outputs, attributes, domain=CONTRIB, name=node.name
    )  # fmt: skip
    made.metadata_props.update(node.metadata_props)
    graph = graph_of(node)
    graph.insert_before(node, made)
    _unflatten(node, made.outputs[0], site, lengths.graph)
    for write, present in zip(site.writes or (), made.outputs[1:], strict=False):
        # GroupQueryAttention comes later than the write did, so nothing between them may read the present cache.
        name = write.outputs[0].name
        ir.convenience.replace_all_uses_with(write.outputs[0], present, replace_graph_outputs=True)
        write.outputs[0].name, present.name = f"{name}.replaced", name
    graph.remove(node, safe=True)
    for write in site.writes or ():
        graph.remove(write, safe=True)


def _flat(value: ir.Value, count: int, width: int, before: ir.Node, role: str, main: ir.Graph) -> ir.Value:
    """``[B, N, S, D]`` to ``[B, S, N*D]``, without moving data where the value was transposed from ``[B, S, N, D]``."""
    name, graph, shape = f"{before.name}.{role}", graph_of(before), dims(value) or [None] * 4
    merged = [shape[0], shape[2], count * width]
    rope = value.producer()
    inner = rope.inputs[0] if rope is not None and is_op(rope, "RotaryEmbedding") and len(rope.inputs) == 3 else None
    only_here = all(use.node is before or is_op(use.node, "TensorScatter") for use in value.uses())
    source = _untransposed(value if inner is None or not only_here else inner)
    if source is None:
        move = make_node(
            "Transpose",
            [value],
            [(f"{name}.bshd", value.dtype, [shape[0], shape[2], count, width])],
            {"perm": _TO_BSHD},
        )
        graph.insert_before(before, move)
        source, inner = move.outputs[0], None
    elif not only_here:
        inner = None
    target = constant(main, f"gqa.flat{count * width}", np.array([0, 0, count * width], np.int64))
    flat = make_node("Reshape", [source, target], [(f"{name}.flat", value.dtype, merged)])
    graph.insert_before(before, flat)
    if inner is None or rope is None:
        return flat.outputs[0]
    turned = make_node(
        "RotaryEmbedding", [flat.outputs[0], *rope.inputs[1:]], [(f"{name}.rotated", value.dtype, merged)],
        {**{k: a.value for k, a in rope.attributes.items()}, "num_heads": count},
    )  # fmt: skip
    graph.insert_before(before, turned)
    return turned.outputs[0]


def _untransposed(value: ir.Value) -> ir.Value | None:
    """The ``[B, S, N, D]`` value that ``value [B, N, S, D]`` is the transpose of."""
    node = value.producer()
    perm = None if node is None or not is_op(node, "Transpose") else node.attributes.get("perm")
    return node.inputs[0] if node is not None and perm is not None and list(perm.as_ints()) == _TO_BSHD else None


def _unflatten(node: ir.Node, flat: ir.Value, site: _Site, main: ir.Graph) -> None:
    """Give the consumers of ``node``'s output ``[B, H, S, D]`` theirs from ``flat [B, S, H*D]``."""
    old, graph, shape = node.outputs[0], graph_of(node), dims(flat) or [None] * 3
    target = constant(
        main, f"gqa.heads{site.heads}x{site.head_dim}", np.array([0, 0, site.heads, site.head_dim], np.int64)
    )
    split_shape = [shape[0], shape[1], site.heads, site.head_dim]
    split = make_node("Reshape", [flat, target], [(f"{node.name}.split", flat.dtype, split_shape)])
    graph.insert_before(node, split)
    for user in list(old.consumers()):
        if _untransposed(user.outputs[0]) is old:  # the next Reshape to [B, S, H*D] moves nothing either
            take_place(user.outputs[0], split.outputs[0])
    back = make_node(
        "Transpose", [split.outputs[0]],
        [(f"{node.name}.bhsd", flat.dtype, [shape[0], site.heads, shape[1], site.head_dim])], {"perm": _TO_BSHD},
    )  # fmt: skip
    graph.insert_before(node, back)
    ir.convenience.replace_all_uses_with(old, back.outputs[0], replace_graph_outputs=True)
