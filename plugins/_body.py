"""What ONNX bodies share: the opset they are written in, the domain they define, and the one way to declare them."""

from __future__ import annotations

from onnxscript.onnx_opset import opset24 as op
from onnxscript.values import Opset

from trtpass.op import DOMAIN, VERSION

TRTPASS = Opset(DOMAIN, VERSION)
FLOAT32_MAX = 3.4028234663852886e38

__all__ = ["FLOAT32_MAX", "TRTPASS", "op"]
