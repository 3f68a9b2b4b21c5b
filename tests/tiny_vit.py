"""A tiny canonical vision transformer, built without torch: patches, a CLS token, blocks, and a head of choice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from tests.tiny import IR_VERSION, OPSET, _Ops

IMAGE, PATCH, HEAD_DIM = 24, 4, 8  # 6 x 6 patches


def vit(layers: int = 3, heads: int = 2, seed: int = 0, *, head: str = "tokens", batch: Any = "batch") -> ir.Model:
    """``image f32 [batch, 3, 24, 24]`` -> ``features [batch, 37, E]`` (``tokens``), ``logits [batch, 5]`` (``cls``).

    Pre-norm blocks with LayerNormalization, bidirectional Attention ``[B, H, S, D]`` and a Gelu MLP. Every Reshape
    copies its leading sizes, so that the blocks hold for any number of tokens.
    """
    rng = np.random.default_rng(seed)
    op = _Ops()
    width, side = heads * HEAD_DIM, IMAGE // PATCH

    def weight(name: str, *shape: int, scale: float | None = None) -> ir.Value:
        scale = 1 / math.sqrt(math.prod(shape[:-1])) if scale is None else scale
        return op.initializer(ir.tensor((scale * rng.standard_normal(shape)).astype(np.float32), name=name))

    def norm(x: ir.Value, name: str) -> ir.Value:
        gain = op.initializer(ir.tensor((1 + 0.1 * rng.standard_normal(width)).astype(np.float32), name=f"{name}.w"))
        return op.LayerNormalization(x, gain, weight(f"{name}.b", width, scale=0.1), axis=-1, epsilon=1e-6)

    def ints(name: str, *numbers: int) -> ir.Value:
        return op.initializer(ir.tensor(np.array(numbers, np.int64), name=name))

    def linear(x: ir.Value, name: str, given: int, made: int) -> ir.Value:
        return op.Add(op.MatMul(x, weight(f"{name}.w", given, made)), weight(f"{name}.b", made, scale=0.1))

    split, merge = ints("split", 0, 0, heads, HEAD_DIM), ints("merge", 0, 0, width)
    image = ir.val("image", ir.DataType.FLOAT, [batch, 3, IMAGE, IMAGE])
    patches = op.Conv(image, weight("patch", width, 3, PATCH, PATCH, scale=0.2), strides=[PATCH, PATCH])
    rows = op.Transpose(op.Reshape(patches, ints("flat", 0, 0, side * side)), perm=[0, 2, 1])
    size = op.Concat(op.Shape(image, start=0, end=1), ints("one_row", 1, width), axis=0)
    x = op.Concat(op.Expand(weight("cls", 1, 1, width, scale=1.0), size), rows, axis=1)
    x = op.Add(x, weight("positions", 1, side * side + 1, width, scale=0.3))
    for i in range(layers):
        h = norm(x, f"{i}.norm1")
        q, k, v = (
            op.Transpose(op.Reshape(linear(h, f"{i}.{r}", width, width), split), perm=[0, 2, 1, 3]) for r in "qkv"
        )
        attended = op.Attention(q, k, v, scale=1 / math.sqrt(HEAD_DIM))
        merged = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), merge)
        x = op.Add(x, linear(merged, f"{i}.o", width, width))
        x = op.Add(
            x,
            linear(op.Gelu(linear(norm(x, f"{i}.norm2"), f"{i}.up", width, 2 * width)), f"{i}.down", 2 * width, width),
        )
    x = norm(x, "norm")
    if head == "cls":
        first = op.Gather(x, op.initializer(ir.tensor(np.array(0, np.int64), name="first")), axis=1)
        output = op.MatMul(first, weight("head", width, 5), name="logits")
    else:
        output = op.MatMul(x, weight("head", width, width), name="features")
    graph = ir.Graph(
        [image], [output], nodes=op.nodes, initializers=op.initializers, opset_imports={"": OPSET}, name="vit"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="trtpass-tests")
    common.ShapeInferencePass(data_prop=True)(model)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([batch, 5] if head == "cls" else [batch, side * side + 1, width])
    return model
