"""float32 arrays to float16 or bfloat16, with the failures that a silent cast would hide."""

from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtpass.errors import InputError
from trtpass.ir import SMALL

HALF_MAX = float(np.finfo(np.float16).max)
SINGLE_MAX = float(np.finfo(np.float32).max)
_LAZY: weakref.WeakValueDictionary[tuple[int, ir.DataType], ir.LazyTensor] = weakref.WeakValueDictionary()
_CHUNK = 1 << 24  # elements converted at a time: bounds the temporaries of the range check to 100 MB


def half_array(array: np.ndarray, name: str, low: ir.DataType = ir.DataType.FLOAT16) -> np.ndarray:
    """``array`` (float32) rounded to float16; the lowest and highest float32 (mask fillers) become float16's.

    To BFLOAT16, which has float32's range, mask fillers become its own lowest and highest, and nothing is refused.

    Raises:
        InputError: another finite value beyond +-65504, or a nonzero scalar (an epsilon) that would become zero.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if low == ir.DataType.BFLOAT16:
        most = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)  # rounding would make infinity of what is above it
        kept = np.where(np.isfinite(flat), np.clip(flat, -most, most), flat)
        return kept.astype(ml_dtypes.bfloat16).reshape(array.shape)
    out = np.empty(flat.shape, np.float16)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            half = part.astype(np.float16)
        over = np.isinf(half) & np.isfinite(part)
        if over.any():
            filler = over & (np.abs(part) == SINGLE_MAX)
            half[filler] = np.copysign(np.float16(HALF_MAX), half[filler])
            over &= ~filler
            if over.any():
                worst = float(part[over][np.argmax(np.abs(part[over]))])
                raise InputError(
                    f"weight '{name}' holds {worst:.6g}, beyond the range of float16",
                    f"finite values within +-{HALF_MAX:.0f}",
                    "build for a float32 target (portable or cpu), or rescale that weight",
                )
        out[start : start + _CHUNK] = half
    if flat.size == 1 and flat[0] != 0 and out[0] == 0:
        raise InputError(
            f"constant '{name}' = {flat[0]:.3g} becomes 0 in float16",
            "an epsilon of at least 6e-8",
            "raise the normalisation to RMSNormalization or LayerNormalization, whose epsilon stays float32",
        )
    return out.reshape(array.shape)


def lazy_half(tensor: ir.TensorProtocol, name: str, low: ir.DataType = ir.DataType.FLOAT16) -> ir.TensorProtocol:
    """A float16 (or ``low``) edition of a float32 tensor that reads it only when it is written, and holds it once.

    Tensors small enough to stay inside a protobuf are converted now. The same large tensor gives the same object, so
    that prefill and decode graphs go on sharing their weights.
    """
    if 2 * tensor.size <= SMALL:
        return ir.tensor(half_array(tensor.numpy(), name, low), name=name)
    known = _LAZY.get((id(tensor), low))
    if known is None:
        known = _LAZY[id(tensor), low] = ir.LazyTensor(
            lambda: ir.tensor(half_array(tensor.numpy(), name, low), name=name),  # keeps `tensor` alive, and so its id
            dtype=low,
            shape=ir.Shape(tensor.shape),  # type: ignore[arg-type]
            name=name,
        )
    return known
