"""Raise: exporter dialects to canonical form (docs/design.md), by structure and never by node names.

Each rule starts at one distinctive node, looks around it, and either rewrites or says why not. What is not recognised
stays as it is: the graph computes the same before and after, whatever was raised.

==================  ==========================================================  ==============================
rule                recognises                                                  becomes
==================  ==========================================================  ==============================
``layer_norm``      ``(x - mean(x)) / sqrt(var + eps) * w + b``                 ``LayerNormalization``
``rms_norm``        ``x * 1/sqrt(mean(x^2) + eps) * w``                         ``RMSNormalization``
``gelu``            ``x/2 * (1 + erf(x/sqrt(2)))``, or its tanh approximation   ``Gelu``
``rotary``          ``x * cos + concat(-x2, x1) * sin``, positions to ``[B,S]`` ``RotaryEmbedding``
``attention``       ``softmax(q k^T * scale + mask) v``                         ``Attention``
``grouped``         K, V expanded from Hkv to H heads before attention          grouped K, V
``causal``          a mask that is proved causal                                ``is_causal=1``, no mask
``reshapes``        a Reshape that repeats leading sizes of its input           a target with 0 for these
==================  ==========================================================  ==============================
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from trtpass.errors import InputError
from trtpass.ir import IR_VERSION, OPSET, tidy
from trtpass.quiet import quiet
from trtpass.raising import attention, gelu, norms, reshapes, rotary
from trtpass.raising.sizes import infer_sizes


@dataclass(frozen=True)
class RaiseReport:
    """How often each rule applied, and for each place where one nearly did, why it did not."""

    counts: dict[str, int]
    near_misses: tuple[str, ...]

    @property
    def modified(self) -> bool:
        return any(self.counts.values())


def canonicalize(model: ir.Model) -> RaiseReport:
    """Raise ``model`` in place.

    Raises:
        InputError: the opset is older than 13 or cannot be converted to 24.
    """
    _to_opset(model)
    # Exporters write shared weights behind Identity, and constants as nodes: rules see initializers alone.
    try:
        common.IdentityEliminationPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except (ValueError, TypeError, KeyError) as error:  # shapes or types on both sides of an Identity that do not fit
        raise InputError(f"the graph contradicts itself: {error}", "a valid ONNX file", "export it again") from error
    counts: Counter[str] = Counter()
    near: list[str] = []
    graph = model.graph
    infer_sizes(graph)
    # Norms and attention first: rotary's cos and sin are shared, so it wants to see every attention input at once.
    for name, rule in (
        ("layer_norm", norms.raise_layer_norm),
        ("rms_norm", norms.raise_rms_norm),
        ("gelu", gelu.raise_gelu),
        ("attention", attention.raise_decomposed),
        ("grouped", attention.raise_grouped),
        ("rotary", rotary.raise_rotary),
        ("unmasked", attention.raise_unmasked),
        ("causal", attention.raise_causal),
        ("reshapes", reshapes.raise_reshapes),
    ):
        applied, reasons = rule(graph)
        counts[name] += applied
        near.extend(reasons)
    tidy(model)
    return RaiseReport(dict(counts), tuple(near))


def _to_opset(model: ir.Model) -> None:
    have = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if have is None or have < 13:
        raise InputError(f"the model uses opset {have}", "opset 13 or newer", "export it again with opset_version=24")
    if have < OPSET:
        from onnxscript import version_converter

        try:
            with quiet():
                version_converter.convert_version(model, OPSET, fallback=True)
        except Exception as error:
            raise InputError(
                f"opset {have} could not be converted to {OPSET}: {type(error).__name__}: {str(error)[:200]}",
                fix="export the model again with opset_version=24",
            ) from error
        now = model.opset_imports.get("")
        if now != OPSET:
            raise InputError(
                f"opset {have} could only be converted to {now}", fix="export the model with opset_version=24"
            )
    # A newer opset stays: nothing that passes emit changed between 24 and 26, the newest that the runtime loads.
    model.ir_version = max(model.ir_version, IR_VERSION)
