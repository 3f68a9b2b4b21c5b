"""The residual stream of a block: where attention and the MLP are added to it."""

from __future__ import annotations

import onnx_ir as ir

from trtpass.ir import is_op

# Between a projection's MatMul and attention, these change the layout or the scale of a token's row, never its token.
ROWWISE = ("Transpose", "Reshape", "RotaryEmbedding", "RMSNormalization", "LayerNormalization", "Cast", "Identity")
_LONGEST = 64  # nodes of an MLP


def _sole_consumer(value: ir.Value) -> ir.Node | None:
    consumers = list(value.consumers())
    return consumers[0] if len(consumers) == 1 else None


def after_attention(node: ir.Node) -> tuple[ir.Node | None, ir.Value | None, ir.Value | None, str]:
    """Walk down: Transpose, Reshape, o_proj, optional bias, residual Add."""
    value: ir.Value = node.outputs[0]
    o_proj: ir.Node | None = None
    for _ in range(12):
        step = _sole_consumer(value)
        if step is None:
            return o_proj, None, None, f"'{value.name}' after attention has {len(list(value.consumers()))} consumers"
        if is_op(step, "MatMul", "Gemm") and o_proj is None:
            o_proj = step
        elif is_op(step, "Add") and o_proj is not None:
            other = next((v for v in step.inputs if v is not value), None)
            if other is not None and other.const_value is None:
                return o_proj, other, step.outputs[0], ""
        elif not is_op(step, *ROWWISE, "Mul"):
            return o_proj, None, None, f"{step.op_type} '{step.name}' between attention and the residual Add"
        value = step.outputs[0]
    return o_proj, None, None, "no residual Add within 12 nodes of attention"


def after_mlp(residual_in: ir.Value | None, residual_out: ir.Value) -> tuple[ir.Value | None, str]:
    """The output of the second residual Add, ``residual_out + mlp(norm(residual_out))``; or None, and why.

    Nothing but ``residual_out`` may feed the MLP: where it reads the stream from before attention (parallel blocks),
    or anything else that is not constant, no token can be dropped between the two.
    """
    adds = [n for n in residual_out.consumers() if is_op(n, "Add")]
    stopped = f"'{residual_out.name}' after attention is added to nothing: is the norm behind the Add (post-norm)?"
    for add in adds:
        other = next((v for v in add.inputs if v is not residual_out), None)
        if other is None or other.const_value is not None:
            continue
        stopped = _foreign(other, residual_in, residual_out)
        if not stopped:
            return add.outputs[0], ""
    return None, stopped


def _foreign(value: ir.Value, residual_in: ir.Value | None, residual_out: ir.Value) -> str:
    """What else than ``residual_out`` and constants ``value`` is computed from; "" if nothing."""
    frontier, seen = [value], {residual_out}
    projections = 0
    while frontier:
        now = frontier.pop()
        if now in seen or now.const_value is not None:
            continue
        seen.add(now)
        node = now.producer()
        if now is residual_in:
            return f"the MLP reads '{now.name}' from before attention (parallel attention and MLP)"
        if node is None:
            return f"the MLP reads the graph input '{now.name}'"
        if len(seen) > _LONGEST:
            return f"no end of the MLP within {_LONGEST} nodes above '{value.name}'"
        projections += is_op(node, "MatMul", "Gemm", "Conv")
        frontier.extend(v for v in node.inputs if v is not None)
    return "" if projections else f"no MatMul of an MLP above '{value.name}'"
