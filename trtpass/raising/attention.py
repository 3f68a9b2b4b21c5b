"""Raise attention: decomposed softmax(q k^T) v, expanded KV heads, and masks that are proved causal."""

from __future__ import annotations

import onnx_ir as ir

from trtpass.causality import hides_nothing, prove_causal
from trtpass.formulas import shape_formula, size_symbols
from trtpass.ir import const_ints, const_scalar, dims, int_attr, is_op, make_node


def raise_causal(graph: ir.Graph) -> tuple[int, list[str]]:
    """Drop each mask that is proved causal and set ``is_causal``; a mask shared by all layers is proved once."""
    applied, near, proofs = 0, [], dict[tuple[int, int | str], str]()
    for node in graph:
        if not is_op(node, "Attention") or len(node.inputs) < 4 or (mask := node.inputs[3]) is None:
            continue
        if any(v is not None for v in node.inputs[4:]):
            near.append(f"Attention '{node.name}': it reads a KV cache, so its mask is left as it is")
            continue
        if int_attr(node, "is_causal", 0):
            near.append(f"Attention '{node.name}': a mask beside is_causal is left as it is")
            continue
        lengths = [dims(v)[2] if (dims(v) or []) and len(dims(v) or []) == 4 else None for v in node.inputs[:2]]  # type: ignore[index]
        if lengths[0] is None or lengths[0] != lengths[1]:
            near.append(f"Attention '{node.name}': query and key lengths {lengths} are not known to be equal")
            continue
        length = lengths[0] if isinstance(lengths[0], int) else str(lengths[0].value)
        proof = (id(mask), length)
        if proof not in proofs:
            proofs[proof] = prove_causal(mask, length)
        if reason := proofs[proof]:
            near.append(f"Attention '{node.name}': {reason}")
            continue
        node.replace_input_with(3, None)
        node.resize_inputs(3)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        applied += 1
    return applied, near


def raise_unmasked(graph: ir.Graph) -> tuple[int, list[str]]:
    """Drop each mask that is proved to hide nothing, such as the one that exporters make for an encoder."""
    applied, proofs = 0, dict[int, bool]()
    for node in graph:
        if not is_op(node, "Attention") or len(node.inputs) < 4 or (mask := node.inputs[3]) is None:
            continue
        if any(v is not None for v in node.inputs[4:]) or int_attr(node, "is_causal", 0):
            continue
        if id(mask) not in proofs:
            proofs[id(mask)] = hides_nothing(mask)
        if proofs[id(mask)]:
            node.replace_input_with(3, None)
            node.resize_inputs(3)
            applied += 1
    return applied, []


def raise_grouped(graph: ir.Graph) -> tuple[int, list[str]]:
    """Feed K and V to attention in their own Hkv heads where they were expanded to H (head h read KV head h // G)."""
    applied, near = 0, []
    for node in graph:
        if not is_op(node, "Attention") or len(node.inputs) < 3:
            continue
        sources = [_unexpanded(v) for v in node.inputs[1:3]]
        if all(isinstance(s, ir.Value) for s in sources):
            node.replace_input_with(1, sources[0])  # type: ignore[arg-type]
            node.replace_input_with(2, sources[1])  # type: ignore[arg-type]
            applied += 1
        elif reasons := [s for s in sources if isinstance(s, str) and s]:
            near.append(f"Attention '{node.name}': {reasons[0]}")
    return applied, near


def _unexpanded(value: ir.Value | None) -> ir.Value | str:
    """``[B, Hkv, S, D]`` above Unsqueeze(2), Expand(G), Reshape to ``[B, H, S, D]``; "" if there is no expansion."""
    reshape = None if value is None else value.producer()
    if not is_op(reshape, "Reshape"):
        return ""
    expand = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
    if not is_op(expand, "Expand", "Tile"):
        return ""
    lift = expand.inputs[0].producer() if expand.inputs[0] is not None else None
    if not is_op(lift, "Unsqueeze") or const_ints(lift.inputs[1]) not in ([2], [-3]):
        return "KV heads are expanded, but not on an axis just after the head axis"
    source = lift.inputs[0]
    before, wide, after = dims(source), dims(expand.outputs[0]), dims(value)
    if (
        source is None
        or before is None
        or wide is None
        or after is None
        or (len(before), len(wide), len(after)) != (4, 5, 4)
    ):
        return "the shapes around the expansion of KV heads are not known"
    heads, groups = before[1], wide[2]
    if not (
        isinstance(heads, int) and isinstance(groups, int) and after[1] == heads * groups and after[3] == before[3]
    ):
        return f"KV heads {before} expand to {wide} and then {after}, which is not a repeat by head"
    return source


def raise_decomposed(graph: ir.Graph) -> tuple[int, list[str]]:
    """Replace ``Softmax(MatMul(q, k^T) * scale + mask) MatMul v`` over ``[B, H, S, D]`` by Attention."""
    applied, near = 0, []
    for node in list(graph):
        if is_op(node, "Softmax") and (shape := dims(node.outputs[0])) is not None and len(shape) == 4:
            reason = _fuse(graph, node)
            if reason:
                near.append(f"Softmax '{node.name}': {reason}")
            else:
                applied += 1
    return applied, near


def _fuse(graph: ir.Graph, softmax: ir.Node) -> str:
    if int_attr(softmax, "axis", -1) not in (-1, 3):
        return "it is not over the key axis"
    weighted = _after_nan_guard(softmax)
    if weighted is None or weighted.inputs[1] is None:
        return "its output is not used by exactly one MatMul with values"
    scores, mask, scale = softmax.inputs[0], None, 1.0
    node = scores.producer() if scores is not None else None
    if is_op(node, "Add"):
        side = next((i for i in (0, 1) if node.inputs[i] is not None and _is_scores(node.inputs[i])), None)
        if side is None:
            return "no MatMul below the mask"
        mask, node = node.inputs[1 - side], node.inputs[side].producer()  # type: ignore[union-attr]
    while is_op(node, "Mul", "Div"):
        factor = const_scalar(node.inputs[1])
        if factor is None or not factor or node.inputs[0] is None:
            return "scores are scaled by something that is not a constant"
        scale *= factor if node.op_type == "Mul" else 1.0 / factor
        node = node.inputs[0].producer()
    if not is_op(node, "MatMul"):
        return "its input is not a MatMul of queries and keys"
    q, factor_q = _unscaled(node.inputs[0])
    kt, factor_k = _unscaled(node.inputs[1])
    k = None if kt is None else _untransposed(graph, kt, q)
    if isinstance(k, str):
        return k
    v, out = weighted.inputs[1], weighted.outputs[0]
    scale *= factor_q * factor_k
    if q is None or k is None or any(dims(x) is None or len(dims(x) or []) != 4 for x in (q, k, v)):
        return "q, k or v is not known to be 4-D"
    inputs = [q, k, v] + ([mask] if mask is not None else [])
    attention = make_node(
        "Attention", inputs, [(f"{out.name}_attention", out.dtype, out.shape)], {"scale": float(scale)}
    )
    ir.convenience.replace_nodes_and_values(graph, weighted, [weighted], [attention], [out], [attention.outputs[0]])
    return ""


def _untransposed(graph: ir.Graph, kt: ir.Value, q: ir.Value | None) -> ir.Value | str:
    """k ``[B, H, S, D]`` above ``[B, H, D, S]``.

    Recognised: a Transpose, also of ``[B, S, H, D]``, and Reshape(Transpose(Reshape(k))) with B and H merged.
    """
    node = kt.producer()
    if is_op(node, "Transpose") and node.inputs[0] is not None:
        perm = list(node.attributes["perm"].value) if "perm" in node.attributes else []
        if perm == [0, 1, 3, 2]:
            return node.inputs[0]
        source, order = dims(node.inputs[0]), [0, 2, 1, 3]
        if perm != [0, 2, 3, 1] or source is None or (dims(q) or [None] * 2)[1] != source[2]:
            return f"keys are transposed by {perm}"
        shape = [source[i] for i in order]  # [B, S, H, D] to [B, H, S, D]
        again = make_node("Transpose", [node.inputs[0]], [(f"{kt.name}_keys", kt.dtype, shape)], {"perm": order})
        graph.insert_before(node, again)
        return again.outputs[0]
    inner = node.inputs[0].producer() if is_op(node, "Reshape") and node.inputs[0] is not None else None
    merge = inner.inputs[0].producer() if is_op(inner, "Transpose") and inner.inputs[0] is not None else None
    if not is_op(node, "Reshape") or not is_op(inner, "Transpose") or not is_op(merge, "Reshape"):
        return "keys are not transposed on their last two axes before the product"
    k = merge.inputs[0]
    if k is None or k.shape is None or len(k.shape) != 4 or list(inner.attributes["perm"].value) != [0, 2, 1]:
        return "keys are not transposed on their last two axes before the product"
    batch, heads, tokens, width = size_symbols(k)
    merged, split = shape_formula(merge.inputs[1]), shape_formula(node.inputs[1])
    if merged is None or split is None or len(merged) != 3 or merged[1:] != [tokens, width]:
        return f"keys are reshaped to {merged} before they are transposed"
    if len(split) != 4 or [*split[:2], split[3], split[2]] != [batch, heads, tokens, width]:
        return f"keys are reshaped to {split} after they are transposed"
    return k


def _after_nan_guard(softmax: ir.Node) -> ir.Node | None:
    """The MatMul with V, past ``Where(IsNaN(p), 0, p)`` and Cast, which exporters put behind softmax."""
    value = softmax.outputs[0]
    for _ in range(4):
        consumers = list(value.consumers())
        if len(consumers) == 1 and is_op(consumers[0], "MatMul") and consumers[0].inputs[0] is value:
            return consumers[0]
        tests = [c for c in consumers if is_op(c, "IsNaN")]
        guards = [
            c for c in consumers
            if is_op(c, "Where") and c.inputs[2] is value and const_scalar(c.inputs[1]) == 0
            and any(c.inputs[0] is test.outputs[0] for test in tests)
        ]  # fmt: skip
        if len(guards) == 1 and len(guards) + len(tests) == len(consumers):
            value = guards[0].outputs[0]
        elif len(consumers) == 1 and is_op(consumers[0], "Cast", "Identity"):
            value = consumers[0].outputs[0]
        else:
            return None
    return None


def _is_scores(value: ir.Value | None) -> bool:
    if value is None:
        return False
    node = value.producer()
    for _ in range(3):
        if is_op(node, "MatMul"):
            return True
        if not is_op(node, "Mul", "Div") or node.inputs[0] is None:
            return False
        node = node.inputs[0].producer()
    return False


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The tensor before a multiplication by a constant (exporters put sqrt(scale) on q and on k), and the constant."""
    node = None if value is None else value.producer()
    if is_op(node, "Mul", "Div") and (factor := const_scalar(node.inputs[1])):
        return node.inputs[0], float(factor) if node.op_type == "Mul" else 1.0 / float(factor)
    if is_op(node, "Mul") and (factor := const_scalar(node.inputs[0])) is not None:
        return node.inputs[1], float(factor)
    return value, 1.0
