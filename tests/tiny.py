"""A tiny canonical stateless decoder, built without torch: what the exporter and raising produce, at toy size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

OPSET = 24
IR_VERSION = 10


class _Ops(ir.tape.Tape):
    """``op.MatMul(a, b, name="y")``: a Tape that makes one-output nodes by operator name."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def make(*inputs: ir.Value, name: str | None = None, **attributes: Any) -> ir.Value:
            value = self.op(op_type, inputs, attributes)
            value.name = name or value.name
            return value

        return make


def decoder(
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 64,
    seed: int = 0,
    *,
    qk_norm: bool = False,
    causal: bool = True,
    dtype: type[np.floating] = np.float32,
) -> ir.Model:
    """``input_ids int64 [batch, sequence] -> logits [batch, sequence, vocab]`` in canonical form (docs/design.md).

    Embedding Gather, then per layer RMSNormalization, q/k/v MatMul, Reshape and Transpose to ``[B, H, S, D]``, with
    ``qk_norm`` a norm of each head of q and k, RotaryEmbedding, grouped causal Attention, o_proj, gated MLP; final norm
    and lm_head. Weights come from ``seed`` alone.
    """
    rng = np.random.default_rng(seed)
    op = _Ops()
    width, hidden = heads * head_dim, 2 * heads * head_dim
    float_type = ir.DataType.from_numpy(np.dtype(dtype))

    def weight(name: str, *shape: int) -> ir.Value:
        array = rng.standard_normal(shape) / math.sqrt(shape[0] if len(shape) > 1 else 1)
        return op.initializer(ir.tensor(array.astype(dtype), name=name))

    def gain(name: str, size: int) -> ir.Value:
        return op.initializer(ir.tensor((1 + 0.1 * rng.standard_normal(size)).astype(dtype), name=name))

    def ints(name: str, *numbers: int) -> ir.Value:
        return op.initializer(ir.tensor(np.array(numbers, np.int64), name=name))

    def scalar(name: str, number: int) -> ir.Value:
        return op.initializer(ir.tensor(np.array(number, np.int64), name=name))

    def split_heads(x: ir.Value, count: int, norm: str) -> ir.Value:
        x = op.Reshape(x, ints(f"{norm}.heads", 0, 0, count, head_dim))
        if qk_norm:
            x = op.RMSNormalization(x, gain(norm, head_dim), axis=-1, epsilon=1e-5)
        return op.Transpose(x, perm=[0, 2, 1, 3])

    input_ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])

    batch = op.Shape(input_ids, start=0, end=1)
    length = op.Squeeze(op.Shape(input_ids, start=1, end=2), ints("axis0", 0))
    row = op.Unsqueeze(op.Range(scalar("zero", 0), length, scalar("one", 1)), ints("axis0_", 0))
    positions = op.Expand(row, op.Concat(batch, op.Shape(input_ids, start=1, end=2), axis=0), name="positions")
    frequency = 1e4 ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    inverse = op.initializer(ir.tensor(frequency[None, None, :].astype(np.float32), name="inverse_frequency"))
    angle = op.Mul(op.Cast(op.Unsqueeze(positions, ints("axis2", 2)), to=int(ir.DataType.FLOAT)), inverse)
    cos, sin = (op.Cast(f, to=int(float_type)) for f in (op.Cos(angle), op.Sin(angle)))

    x = op.Gather(weight("embedding", vocab, width), input_ids, axis=0)
    for i in range(layers):
        h = op.RMSNormalization(x, gain(f"{i}.norm1", width), axis=-1, epsilon=1e-5)
        q = split_heads(op.MatMul(h, weight(f"{i}.q", width, width)), heads, f"{i}.q_norm")
        k = split_heads(op.MatMul(h, weight(f"{i}.k", width, kv_heads * head_dim)), kv_heads, f"{i}.k_norm")
        v = op.Reshape(
            op.MatMul(h, weight(f"{i}.v", width, kv_heads * head_dim)), ints(f"{i}.v.heads", 0, 0, kv_heads, head_dim)
        )
        attended = op.Attention(
            op.RotaryEmbedding(q, cos, sin),
            op.RotaryEmbedding(k, cos, sin),
            op.Transpose(v, perm=[0, 2, 1, 3]),
            is_causal=int(causal),
            scale=1 / math.sqrt(head_dim),
        )
        merged = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), ints(f"{i}.merge", 0, 0, width))
        x = op.Add(x, op.MatMul(merged, weight(f"{i}.o", width, width)))
        h = op.RMSNormalization(x, gain(f"{i}.norm2", width), axis=-1, epsilon=1e-5)
        gate = op.MatMul(h, weight(f"{i}.gate", width, hidden))
        gated = op.Mul(op.Mul(gate, op.Sigmoid(gate)), op.MatMul(h, weight(f"{i}.up", width, hidden)))
        x = op.Add(x, op.MatMul(gated, weight(f"{i}.down", hidden, width)))
    h = op.RMSNormalization(x, gain("norm", width), axis=-1, epsilon=1e-5)
    logits = op.MatMul(h, weight("lm_head", width, vocab), name="logits")

    graph = ir.Graph(
        [input_ids], [logits], nodes=op.nodes, initializers=op.initializers, opset_imports={"": OPSET}, name="decoder"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="trtpass-tests")
    common.ShapeInferencePass(data_prop=True)(model)
    logits.shape = ir.Shape(["batch", "sequence", vocab])
    return model
