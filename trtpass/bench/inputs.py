"""What benchmarks are fed: q, k, v of a real model's layers where an engine is there, else noise; and an oracle.

Attention is causal, so the first S tokens of a capture are the capture of those S tokens: one run serves all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtpass.bench.layer import Heads
from trtpass.bench.measure import Array, Graph, poisoned
from trtpass.errors import CheckFailed, InputError

CAPTURED = 8  # layers of a capture at most; rotation repeats them where more sets of buffers are needed


@dataclass(frozen=True)
class Layers:
    """q ``[B, S, H*D]``, k and v ``[B, S, Hkv*D]`` of several layers, after rotary embedding.

    ``source`` says in words where they come from; ``real`` is False for noise.
    """

    qkv: tuple[tuple[Array, Array, Array], ...]
    source: str
    real: bool

    def take(self, number: int, tokens: int) -> tuple[Array, Array, Array]:
        """The first ``tokens`` tokens of layer ``number`` (modulo their number), in memory of their own."""
        q, k, v = (np.array(x[:, :tokens], order="C") for x in self.qkv[number % len(self.qkv)])
        return q, k, v


def seeded(h: Heads, tokens: int, batch: int = 1, count: int = 2) -> Layers:
    """Normal noise; scores have a standard deviation near 1, so attention is spread out: it prunes little by itself."""
    made = []
    for layer in range(count):
        rng = np.random.default_rng(layer)
        wide, narrow = (batch, tokens, h.heads * h.width), (batch, tokens, h.kv_heads * h.width)
        made.append(tuple(rng.standard_normal(shape, np.float32) for shape in (wide, narrow, narrow)))
    return Layers(tuple(made), "seeded noise", False)  # type: ignore[arg-type]


def text_ids(folder: Path, tokens: int) -> Array:
    """``[1, tokens]`` ids of the public-domain text by the tokenizer of an engine folder.

    Raises:
        InputError: no tokenizer library, no tokenizer in the folder, or a text that is too short.
    """
    from trtpass.corpus import text_corpus

    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("the package tokenizers is not installed", "it, to read text", "run make setup") from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json", "the folder of an engine of a language model")
    text = text_corpus()[20_000 : 20_000 + 12 * tokens]
    ids = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids[:tokens]
    if len(ids) < tokens:
        raise InputError(f"the text has {len(ids)} tokens", f"at least {tokens}")
    return np.array([ids], np.int64)


def sparse_layers(folder: Path) -> tuple[int, ...]:
    """The layers that ``token-sparse`` takes by default in the model of an engine folder."""
    from trtpass import io
    from trtpass.anchors import find
    from trtpass.layers import carried_drift, resolve

    model = io.load(folder / "dense.onnx")
    return resolve("auto", len(find(model).blocks), carried_drift(model))


def captured(folder: Path, layers: Sequence[int], tokens: int, threads: int) -> tuple[Layers, Heads]:
    """q, k, v of ``layers`` of the dense model of an engine folder, on the public-domain text.

    Raises:
        InputError: the folder has no ``dense.onnx``, or the text is too short.
    """
    from trtpass import io
    from trtpass.anchors import find
    from trtpass.ir import tidy
    from trtpass.passes.lower import lower

    model = io.load(folder / "dense.onnx")
    blocks = find(model).blocks
    chosen = [
        layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(CAPTURED, len(layers))).round().astype(int))
    ]
    values = [value for layer in chosen for value in (blocks[layer].q, blocks[layer].k, blocks[layer].v)]
    model.graph.outputs[:] = values
    tidy(model)
    graph = Graph(lower(model, "cpu").model, threads)
    first = blocks[chosen[0]]
    h = Heads(first.heads, first.kv_heads, first.head_dim)
    sizes = [h.heads, h.kv_heads, h.kv_heads] * len(chosen)
    outputs = {str(v.name): poisoned((1, n, tokens, h.width)) for v, n in zip(values, sizes, strict=True)}
    graph.bind({"input_ids": text_ids(folder, tokens)}, outputs)()
    flat = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, tokens, -1) for x in outputs.values()]
    qkv = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3))
    return Layers(qkv, f"{folder.parent.name} on text, layers {'+'.join(map(str, chosen))}", True), h


def check_selection(mass: Array, keep: Array, index: Array, count: Array, h: Heads, protected: int, what: str) -> None:
    """Every set holds ``keep`` tokens, ascending, the last ``protected`` among them, and no other token outscores them.

    Args:
        mass: ``[B, H, S]``; a set of a group is scored by the sum over its heads.
        keep: ``[B]``. index: ``[B, N, C]``. count: ``[B, N]``.

    Raises:
        CheckFailed: one of these is not so.
    """
    batch, _, tokens = mass.shape
    sets = index.shape[1]
    score = mass.reshape(batch, sets, -1, tokens).astype(np.float64).sum(2)
    for b, n in np.ndindex(batch, sets):
        number = int(keep[b])
        chosen = index[b, n, : int(count[b, n])]
        inside = np.zeros(tokens, bool)
        inside[chosen] = True
        free = np.arange(tokens) < tokens - protected
        kept, dropped = score[b, n][inside & free], score[b, n][~inside]
        ascending = bool((np.diff(chosen) > 0).all())
        fair = not len(kept) or not len(dropped) or kept.min() >= dropped.max() * (1 - 1e-5) - 1e-9
        if len(chosen) != number or not ascending or not inside[tokens - min(protected, number) :].all() or not fair:
            raise CheckFailed(
                f"{what}: set {n} of row {b} is not the {number} highest-scoring tokens in ascending order",
                fix="no speed is reported for wrong results; run the tests of the operators",
            )


def attention_rows(
    q: Array, k: Array, v: Array, head: int, rows: Array, h: Heads, chosen: Array | None = None
) -> Array:
    """Causal attention of some rows of one head in float64 ``[len(rows), D]``: an oracle that shares no code.

    Args:
        q: ``[S, H*D]``. k, v: ``[S, Hkv*D]``.
        rows: token positions; with ``chosen`` they must be among them.
        chosen: tokens that take part, ascending; None for all.
    """
    kv = head // h.group
    queries = q[rows, head * h.width : (head + 1) * h.width].astype(np.float64)
    tokens = np.arange(len(k)) if chosen is None else chosen
    keys, values = (x[tokens, kv * h.width : (kv + 1) * h.width].astype(np.float64) for x in (k, v))
    scores = queries @ keys.T / np.sqrt(h.width)
    scores[tokens[None, :] > rows[:, None]] = -np.inf
    weight = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(weight @ values / weight.sum(1, keepdims=True))
