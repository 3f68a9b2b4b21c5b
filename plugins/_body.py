"""What ONNX bodies share: the opset they are written in, the domain they define, and the types of their values.

The types are for readers and onnxscript: shapes are stated beside each value instead, and one body serves both floats.
"""

from __future__ import annotations

from typing import Any, Union

from onnxscript import FLOAT, FLOAT16, INT32, INT64
from onnxscript.onnx_opset import opset24 as op
from onnxscript.values import Opset

from trtpass.op import DOMAIN, VERSION

TRTPASS = Opset(DOMAIN, VERSION)

Float32: Any = FLOAT[...]
Floats: Any = Union[FLOAT[...], FLOAT16[...]]  # noqa: UP007  (onnxscript does not read X | Y)
Int32: Any = INT32[...]
Int64: Any = INT64[...]

__all__ = ["TRTPASS", "Float32", "Floats", "Int32", "Int64", "op"]
