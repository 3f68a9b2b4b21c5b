"""Tiny real graphs that the fuzzer mutates: between them every kind of field that ``trtpass.io.load`` looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

_CONTROL = """
<ir_version: 10, opset_import: ["" : 24, "local" : 1]>
control (float[N, 4] x, bool c, int64 trips) => (float[N, 4] y, float[N, 4] looped, float[N, 4] scanned) {
  doubled = local.twice <factor = 2.0> (x)
  y = If (c) <
    then_branch = yes () => (float[N, 4] p) { p = Relu (doubled) },
    else_branch = no () => (float[N, 4] q) { b = Constant <value = float {2.0}> ()  q = Mul (x, b) }
  >
  looped = Loop (trips, c, x) <
    body = step (int64 i, bool go, float[N, 4] state) => (bool on, float[N, 4] next) {
      on = Identity (go)
      next = Add (state, doubled)
    }
  >
  zero = Constant <value = float[4] {0.0, 0.0, 0.0, 0.0}> ()
  last, scanned = Scan <num_scan_inputs = 1, body = row (float[4] sum, float[4] one) => (float[4] total, float[4] out) {
      total = Add (sum, one)
      out = Identity (total)
    }
  > (zero, x)
}
<domain : "local", opset_import : ["" : 24, "local" : 1]>
twice <factor> (a) => (b) { f = Constant <value_float : float = @factor> ()  g = local.times (a, f)  b = Identity (g) }
<domain : "local", opset_import : ["" : 24]>
times (a, f) => (b) { b = Mul (a, f) }
"""

_ATTENTION = """
<ir_version : 10, opset_import : ["" : 24]>
attention (int64[batch, sequence] input_ids) => (float[batch, sequence, 32] logits) {
  h = Gather (embed, input_ids)
  n = RMSNormalization <axis = -1, epsilon = 0.000001> (h, gain)
  q2 = MatMul (n, wq)
  k2 = MatMul (n, wk)
  v2 = MatMul (n, wv)
  q3 = Reshape (q2, q_shape)
  k3 = Reshape (k2, kv_shape)
  v3 = Reshape (v2, kv_shape)
  q = Transpose <perm = [0, 2, 1, 3]> (q3)
  k = Transpose <perm = [0, 2, 1, 3]> (k3)
  v = Transpose <perm = [0, 2, 1, 3]> (v3)
  a = Attention <is_causal = 1, scale = 0.5> (q, k, v)
  t = Transpose <perm = [0, 2, 1, 3]> (a)
  o = Reshape (t, o_shape)
  p = MatMul (o, wo)
  r = Add (h, p)
  logits = MatMul (r, head)
}
"""

# softmax(q k^T + mask) v, as exporters of older opsets write it
_DECOMPOSED = """
<ir_version : 8, opset_import : ["" : 17]>
decomposed (float[B, 2, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v) => (float[B, 2, S, 4] out) {
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  s = MatMul (q, kt)
  half = Constant <value = float {0.5}> ()
  m = Mul (s, half)
  shape = Shape (m)
  low = Constant <value = float {-10000.0}> ()
  ones = ConstantOfShape <value = float[1] {1.0}> (shape)
  upper = Trilu <upper = 1> (ones, one)
  mask = Mul (upper, low)
  sum = Add (m, mask)
  p = Softmax <axis = -1> (sum)
  out = MatMul (p, v)
}
"""


def _attention() -> tuple[onnx.ModelProto, bytes]:
    """Grouped attention whose weights are external."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(_ATTENTION)
    data = b""
    sizes = {"embed": (32, 8), "gain": (8,), "wq": (8, 8), "wk": (8, 4), "wv": (8, 4), "wo": (8, 8), "head": (8, 32)}
    for name, shape in sizes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "weights.bin"), ("offset", len(data)), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        data += array.tobytes()
        model.graph.initializer.append(tensor)
    for name, shape in (("q_shape", [0, 0, 2, 4]), ("kv_shape", [0, 0, 1, 4]), ("o_shape", [0, 0, 8])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return model, data


def _types() -> onnx.ModelProto:
    """One constant of each element type and of each way to store it."""
    nodes, outputs = [], []
    for number in TensorProto.DataType.values():
        if number == TensorProto.UNDEFINED:
            continue
        name = TensorProto.DataType.Name(number).lower()
        if number == TensorProto.STRING:
            tensors = {name: helper.make_tensor(name, number, [3], [b"a", b"", b"\xff"])}
        else:
            typed = helper.make_tensor(name, number, [2, 2], [1, 0, 1, 1])
            raw = numpy_helper.from_array(numpy_helper.to_array(typed), name) if number < TensorProto.UINT4 else typed
            tensors = {name: typed, f"{name}_raw": raw}
        for key, tensor in tensors.items():
            nodes.append(helper.make_node("Constant", [], [key], value=tensor))
            outputs.append(helper.make_tensor_value_info(key, number, list(tensor.dims)))
    graph = helper.make_graph(nodes, "types", [], outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)


def bases() -> list[onnx.ModelProto]:
    """The models; their external data is what ``write_data`` writes."""
    decomposed = parser.parse_model(_DECOMPOSED)
    decomposed.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    return [_attention()[0], parser.parse_model(_CONTROL), decomposed, _types()]


def write_data(folder: Path) -> None:
    """The external data of the models, beside which each mutated file is put."""
    (folder / "weights.bin").write_bytes(_attention()[1])
