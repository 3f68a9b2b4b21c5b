"""``trtpass fit kvzap``: fit a surrogate to log KVzip+ scores, and measure it on text that it was not fitted on.

Linear: ridge regression from normal equations in float64, streamed over contexts, its strength chosen for each layer
by cross-validation over contexts. MLP: E / 8 hidden units, exact GELU, mean squared error, AdamW 5e-3, batch 512, 15
epochs, cosine (KVzap, arXiv 2601.07891), and a strong weight decay; inputs are standardised, which is folded into the
weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from trtpass.errors import InputError
from trtpass.kvzap.surrogate import Kind, Surrogate
from trtpass.progress import Report, silent

if TYPE_CHECKING:
    from rich.console import Group

CONTEXTS = 48
RIDGE = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 1.0)  # strengths to choose from, in units of the features' mean variance
FOLDS = 4
LEARNING_RATE, BATCH, EPOCHS = 5e-3, 512, 15
DECAY = 4.0  # of AdamW; at its usual 0.01 an MLP on 60 000 tokens predicts other text worse than a linear model does
PAIRS = 1 << 18  # tokens that an MLP is fitted on at most, drawn from all
_COLLECTING = 0.8  # share of the work, for the progress bar

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # of each context, hidden states [T, E] and log scores [T, Hkv]


@dataclass(frozen=True)
class Request:
    """What to fit, and on what.

    Args:
        model: a known name or a Hugging Face folder.
        kind: ``linear`` or ``mlp``.
        out: a ``.safetensors`` file, or a folder in the form of published checkpoints; None: a name of its own.
        corpus: a text file; None: the public-domain one.
        contexts: number of contexts to fit on.
        seed: of places, lengths and initial weights.
        work: the work folder; None: ``<out>.work``.
        keep_work: leave it after a success, for a fit of the other kind.
        threads: threads of PyTorch; None: all cores. The result may depend on it in the last bits.
    """

    model: str
    kind: str = "linear"
    out: Path | None = None
    corpus: Path | None = None
    contexts: int = CONTEXTS
    seed: int = 0
    work: Path | None = None
    keep_work: bool = False
    threads: int | None = None


def fit(request: Request, report: Report = silent) -> dict[str, Any]:
    """Collect, fit, measure on held-out text, save. What was collected before for the same request is used again.

    Returns the record that ``render`` shows: ``out``, ``r2`` (see ``r_squared``), ``tokens`` and ``seconds``, and the
    request.

    Raises:
        InputError: a model without a torch module or tokenizer, a text that is too short, a work folder of another
            request, scores that are not finite, a request out of range.
    """
    import torch

    from graphs import resolve
    from trtpass.corpus import text_corpus
    from trtpass.kvzap.collect import Work, collect, cut, fingerprint

    kind = _kind(request)
    started = time.monotonic()
    recipe = resolve(request.model)
    text = text_corpus(request.corpus)
    loaded = recipe.load()
    if loaded.module is None or loaded.tokenizer is None:
        raise InputError(
            f"'{request.model}' has no torch module or no tokenizer",
            "a known model or a Hugging Face folder with tokenizer.json",
        )
    out = request.out or Path(f"{recipe.name}.kvzap-{kind}.safetensors")
    module: Any = loaded.module
    threads = torch.get_num_threads()
    torch.set_num_threads(request.threads or threads)
    try:
        contexts = cut(loaded, text, request.contexts, request.seed)
        mark = fingerprint(module, text, request.contexts, request.seed)
        work = Work(request.work or out.with_name(out.name + ".work"), mark)
        collect(module, contexts, work, lambda what, share: report(what, _COLLECTING * share))
        collected = time.monotonic()
        layers: list[dict[str, np.ndarray]] = []
        found: list[tuple[np.ndarray, np.ndarray]] = []  # of each layer, true and predicted [T, Hkv] of held-out text
        depth = int(loaded.config.num_hidden_layers) if loaded.config is not None else len(module.model.layers)
        for number in range(depth):
            report(f"layer {number + 1} of {depth}", _COLLECTING + (1 - _COLLECTING) * number / depth)
            pairs = work.pairs([c for c in contexts if not c.held], number)
            layers.append(ridge(pairs) if kind == "linear" else perceptron(pairs, request.seed * depth + number))
            held = list(work.pairs([c for c in contexts if c.held], number))
            one = Surrogate(kind, (layers[-1],))
            guess = [one.predict(torch.from_numpy(x)[None])[0].T.numpy() for x, _ in held]
            found.append((np.concatenate([y for _, y in held]), np.concatenate(guess)))
    finally:
        torch.set_num_threads(threads)
    guesses = np.concatenate([guess.ravel() for _, guess in found])
    surrogate = Surrogate(kind, tuple(layers), tuple(np.quantile(guesses, np.linspace(0, 1, 101)).tolist()))
    surrogate.save(out)
    if not request.keep_work:
        work.remove()
    return {
        "out": str(out),
        "model": recipe.name,
        "kind": kind,
        "seed": request.seed,
        "contexts": {"fitted": request.contexts, "held": sum(c.held for c in contexts)},
        "tokens": {
            "fitted": sum(len(c.ids) for c in contexts if not c.held),
            "held": sum(len(c.ids) for c in contexts if c.held),
            "shortest": min(len(c.ids) for c in contexts),
            "longest": max(len(c.ids) for c in contexts),
        },
        "r2": r_squared(found),
        "seconds": {"collect": round(collected - started, 1), "fit": round(time.monotonic() - collected, 1)},
    }


def _kind(request: Request) -> Kind:
    for name, value, least in (("--contexts", request.contexts, 1), ("--seed", request.seed, 0)):
        if value < least:
            raise InputError(f"{name} {value}", f"{least} or more")
    if request.threads is not None and request.threads < 1:
        raise InputError(f"--threads {request.threads}", "1 or more")
    for kind in get_args(Kind):
        if kind == request.kind:
            return kind
    raise InputError(f"--kind {request.kind}", f"one of {', '.join(get_args(Kind))}")


def ridge(pairs: Pairs, strengths: Sequence[float] = RIDGE) -> dict[str, np.ndarray]:
    """Weights of one layer: ``weight [Hkv, E]``, ``bias [Hkv]``, float32. Sums are float64; no context is kept.

    Args:
        pairs: of each context; two neighbours belong to one fold.
        strengths: times the features' mean variance, added to the variances. The one with the least squared error over
            the folds, each predicted from the others, is taken; the first where there is only one fold.
    """
    folds: list[np.ndarray] = []  # second moments of (1, x, y), summed
    heads = 0
    for number, (hidden, score) in enumerate(pairs):
        heads = score.shape[1]
        z = np.concatenate([np.ones((len(hidden), 1)), hidden, score], 1, dtype=np.float64)  # [T, 1 + E + Hkv]
        fold = number // 2 % FOLDS
        if fold == len(folds):
            folds.append(np.zeros((z.shape[1], z.shape[1])))
        folds[fold] += z.T @ z
    if not folds:
        raise InputError("there is nothing to fit on", "one context or more")
    whole = np.sum(folds, 0)
    errors = [0.0] * len(strengths)
    for fold_moments in folds if len(folds) > 1 else []:
        for number, strength in enumerate(strengths):
            beta = _solved(whole - fold_moments, heads, strength)
            residual = np.concatenate([-beta, np.eye(heads)])  # y - (1, x) beta, from (1, x, y)
            errors[number] += float(np.einsum("ih,ij,jh->", residual, fold_moments, residual))
    beta = _solved(whole, heads, strengths[int(np.argmin(errors))])
    return {"weight": beta[1:].T.astype(np.float32), "bias": beta[0].astype(np.float32)}


def _solved(moments: np.ndarray, heads: int, strength: float) -> np.ndarray:
    """Coefficients `[1 + E, Hkv]` of (1, x) from the summed second moments of (1, x, y)."""
    moments = moments / moments[0, 0]
    centred = moments[1:, 1:] - np.outer(moments[0, 1:], moments[0, 1:])
    mean, level = moments[0, 1:-heads], moments[0, -heads:]
    covariance = centred[:-heads, :-heads]
    added = strength * covariance.diagonal().mean() + 1e-30  # where nothing varies, no weight
    weight = np.linalg.solve(covariance + added * np.eye(len(covariance)), centred[:-heads, -heads:])
    return np.concatenate([(level - mean @ weight)[None], weight])


def perceptron(pairs: Pairs, seed: int, decay: float = DECAY) -> dict[str, np.ndarray]:
    """Weights of one layer: ``0.weight [E / 8, E]``, ``0.bias``, ``2.weight [Hkv, E / 8]``, ``2.bias``, float32."""
    import torch

    x, y = (torch.from_numpy(part) for part in _drawn(pairs, seed))
    mean, spread = x.mean(0), x.std(0)
    spread[spread == 0] = 1.0
    level, size = y.mean(0), (y - y.mean(0)).std().clamp(min=1e-6)  # one size for all heads: the loss stays theirs
    x, y = (x - mean) / spread, (y - level) / size
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        hidden = max(1, x.shape[1] // 8)
        linear = torch.nn.Linear
        model = torch.nn.Sequential(linear(x.shape[1], hidden), torch.nn.GELU(), linear(hidden, y.shape[1]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=decay)
        steps = EPOCHS * -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    state = {key: value.double() for key, value in model.state_dict().items()}
    first = state["0.weight"] / spread
    folded = {
        "0.weight": first,
        "0.bias": state["0.bias"] - first @ mean.double(),
        "2.weight": state["2.weight"] * size,
        "2.bias": state["2.bias"] * size + level,
    }
    return {key: value.float().numpy() for key, value in folded.items()}


def _drawn(pairs: Pairs, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs, or ``PAIRS`` of them: hidden states `[N, E]` and log scores `[N, Hkv]`."""
    parts = list(pairs)
    hidden, score = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    if len(hidden) <= PAIRS:
        return hidden, score
    rows = np.sort(np.random.default_rng(seed).permutation(len(hidden))[:PAIRS])
    return hidden[rows], score[rows]


def r_squared(found: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """R^2 of log scores on held-out tokens, 1 - (squared error) / (squared distance from a mean).

    Args:
        found: of each layer, true and predicted log scores `[T, Hkv]`.

    Returns ``head [layers][Hkv]``: centred per head, the mean being that head's own; ``head_mean``: their mean;
    ``layer [layers]``: pooled over a layer's heads, with one mean for them; ``all``: pooled over all layers and heads,
    with one mean. Pooled values are higher: to know a head's level is part of them. None where nothing varies.
    """
    true, guess = (np.stack([pair[i] for pair in found]).astype(np.float64) for i in (0, 1))  # [L, T, Hkv]
    error = (true - guess) ** 2
    heads = _share(error.sum(1), ((true - true.mean(1, keepdims=True)) ** 2).sum(1))
    layers = _share(error.sum((1, 2)), ((true - true.mean((1, 2), keepdims=True)) ** 2).sum((1, 2)))
    whole = _share(error.sum(), ((true - true.mean()) ** 2).sum())
    known = heads[np.isfinite(heads)]
    return {
        "head": [[_number(value) for value in row] for row in heads],
        "head_mean": _number(known.mean() if known.size else np.nan),
        "layer": [_number(value) for value in layers],
        "all": _number(whole),
    }


def _share(error: Any, spread: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, 1 - error / spread, np.nan)


def _number(value: Any) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def render(record: dict[str, Any]) -> Group:
    """The record as a table for a terminal."""
    from rich.console import Group
    from rich.table import Table

    r2, tokens, contexts = record["r2"], record["tokens"], record["contexts"]

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    heads = len(r2["head"][0])
    table = Table("layer", *(f"head {i}" for i in range(heads)), "pooled", pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for number, (row, pooled) in enumerate(zip(r2["head"], r2["layer"], strict=True)):
        table.add_row(str(number), *map(shown, row), shown(pooled))
    return Group(
        f"KVzap {record['kind']} for {record['model']}: fitted on {contexts['fitted']} contexts of "
        f"{tokens['shortest']} to {tokens['longest']} tokens ({tokens['fitted']}), seed {record['seed']}",
        f"R^2 of log KVzip+ on held-out text ({contexts['held']} contexts, {tokens['held']} tokens)",
        table,
        f"head: centred per head, mean {shown(r2['head_mean'])}. pooled: over the layer's heads around one mean. "
        f"Over all layers and heads around one mean: {shown(r2['all'])}.",
        f"collected in {record['seconds']['collect']:.0f} s, fitted in {record['seconds']['fit']:.0f} s",
        f"wrote {record['out']}",
    )
