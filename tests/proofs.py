"""A validation ladder over a tiny exported model, with any passes and row lengths; shared by several tests."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from families import VOCAB, Exported

from trtpass import io, passes
from trtpass.canonicalize import canonicalize
from trtpass.compare import Ladder, Probe

# Prunes 40-token prompts of a two-layer model: a window of 4, and no row too short to be pruned.
SHORT = "token-sparse:coverage=0.3,window=4,min_tokens=8,pool=3,layers=all"


def probe(lengths: list[int], seed: int = 0) -> Probe:
    """Random right-padded tokens; padding holds other random tokens, which must not matter."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(lengths), max(lengths)))
    return Probe(tokens, np.array(lengths, np.int32))


def raised(exported: Exported) -> ir.Model:
    """The canonical graph of an export; its weights lie beside ``exported.path``."""
    model = io.load(exported.path)
    canonicalize(model)
    return model


def ladder(exported: Exported, texts: list[str], lengths: list[int], seed: int = 0) -> Ladder:
    """The ladder of ``exported`` after the passes in ``texts``."""
    dense = raised(exported)
    rewritten = dense.clone()
    steps = [passes.parse(text) for text in texts]
    results = passes.run(rewritten, steps)
    return Ladder(exported.path.parent, dense, rewritten, steps, results, probe(lengths, seed), exported.loaded.module)


def edit(model: ir.Model, name: str, change: float) -> None:
    """Add ``change`` to the first entry of an initializer, in place; the file it came from is not touched."""
    value = model.graph.initializers[name]
    array = np.array(value.const_value.numpy())
    array.reshape(-1)[0] += change
    value.const_value = ir.tensor(array, name=name)
