"""What the span methods of decoders compute, in plain torch from the papers' definitions: the law for graphs.

One row at a time, float32, no operator of ``plugins``. Only the P tokens of the prompt are looked at; those behind
them, which were generated, are kept. Ties go to the lowest index everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtpass.reduction.decoder import Cut, Span
from trtpass.reduction.decoder_options import FicocoLOptions, SpanOptions
from trtpass.reduction.filters import FACTOR, MANTISSA, PRIME, hash_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SpanRow:
    """A row's stream.

    Args:
        tokens: `[S, E]`, those of the prompt first.
        prompt: P, how many of them are the prompt's.
        place: original position of each, `[S]`.
        owner: place in the stream of each original token, -1 where it has none, `[N]`.
        image: which tokens of the stream stand for an image, bool `[S]`; None: a span says which tokens may go.
    """

    tokens: Tensor
    prompt: int
    place: Tensor
    owner: Tensor
    image: Tensor | None = None


@dataclass
class SpanStep:
    """What a site chose by itself: ``score [P]``, ``keep [P]`` int32 and ``target [M, K]`` (None: no joins)."""

    score: Tensor
    keep: Tensor
    target: Tensor | None


def causal_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Head mean `[S, S]` of the causal softmax(scale q k^T) of q `[H, S, D]`, k `[Hkv, S, D]`."""
    import torch

    total = torch.zeros(q.shape[1], k.shape[1])
    group = q.shape[0] // k.shape[0]
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    for h, head in enumerate(q):  # head by head: S x S for each of them at once would be much
        total += torch.softmax((scale * head @ k[h // group].T).masked_fill(later, -torch.inf), -1)
    return total / q.shape[0]


def last_row(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Head mean `[S]` of the attention of the last query."""
    import torch

    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    return torch.softmax(scale * (q[:, -1:] @ k.transpose(1, 2)), -1).mean(0)[0]


def random_score(place: Tensor, seed: int) -> Tensor:
    """A hash of the original position `[S]` and the seed: whole numbers below 2^24."""
    import torch

    added = hash_seed(seed)
    first = torch.remainder(place.long() * FACTOR + added, PRIME)
    second = torch.remainder(first * first + added, PRIME)
    return (torch.remainder(second * second + first, PRIME) % MANTISSA).float()


def shorten(
    row: SpanRow,
    q: Tensor,
    k: Tensor,
    scale: float,
    options: SpanOptions,
    span: Span,
    cut: Cut,
    seed: int | None = None,
    forced: tuple[Tensor, Tensor | None] | None = None,
) -> SpanStep:
    """One site on one row, in place; q `[H, S, D]` and k `[Hkv, S, D]` are those of the layer that chooses.

    ``seed``: tokens go at random. ``forced``: keep `[P]` and target `[M, K]` that replace the site's own choice; an
    entry outside the kept tokens is none.
    """
    import torch

    count = row.prompt
    q, k, tokens = q[:, :count], k[:, :count], row.tokens
    if row.image is None:
        start, stop = span.of(count)
        inside = torch.zeros(count, dtype=torch.bool)
        inside[start:stop] = True
    else:
        inside = row.image[:count]
    prob = causal_map(q, k, scale) if isinstance(options, FicocoLOptions) else None
    if seed is not None:
        raw = random_score(row.place[:count], seed)
    elif prob is not None and isinstance(options, FicocoLOptions):
        raw = -redundancy(prob, inside, options)
    else:
        raw = last_row(q, k, scale)
    score = raw.masked_fill(~inside, torch.inf)
    keep = torch.zeros(count, dtype=torch.int32)
    keep[score.sort(descending=True, stable=True).indices[: cut.kept(count)]] = 1
    chosen = keep if forced is None else forced[0]
    index, rest = chosen.nonzero()[:, 0], (chosen == 0).nonzero()[:, 0]
    kept = tokens[index].clone()
    heirs = torch.clamp(rest - torch.arange(len(rest)) - 1, min=0)  # the kept token before each dropped one
    target = None
    if prob is not None and isinstance(options, FicocoLOptions):
        affinity = correlations(prob, inside, rest, options)[:, index]
        target, weight = joins(affinity, inside[index], options)
        used = target
        if forced is not None and forced[1] is not None:
            used, weight = forced[1], weights_of(forced[1], affinity)
        kept = mean_of(kept, tokens[rest], used, weight)
        heirs = used[:, 0] if used.shape[1] else torch.full((len(rest),), -1)
    moved = torch.full((len(tokens),), -1, dtype=torch.long)
    moved[index] = torch.arange(len(index))
    moved[rest] = torch.where((heirs >= 0) & (heirs < len(index)), heirs.long(), -1)
    moved[count:] = torch.arange(len(tokens) - count) + len(index)
    row.owner = torch.where(row.owner >= 0, moved[row.owner.clamp(min=0)], -1)
    row.tokens = torch.cat([kept, tokens[count:]])
    row.place = torch.cat([row.place[index], row.place[count:]])
    if row.image is not None:
        row.image = torch.cat([row.image[index], row.image[count:]])
    row.prompt = len(index)
    return SpanStep(score, keep, target)


def redundancy(prob: Tensor, inside: Tensor, options: FicocoLOptions) -> Tensor:
    """FiCoCo-L's filter `[P]`: attention that the span pays a token, less the attention that the text pays it."""
    beta = round(options.beta * 1000) / 1000
    span, text = prob[inside], prob[~inside]
    return beta * span.sum(0) / max(len(span), 1) - (1.0 - beta) * text.sum(0) / max(len(text), 1)


def correlations(prob: Tensor, inside: Tensor, rest: Tensor, options: FicocoLOptions) -> Tensor:
    """FiCoCo-L's correlation `[M, P]` of the dropped tokens: direct, and by way of the text that attends to both."""
    text = prob[~inside]
    return options.gam * prob[rest] + (1.0 - options.gam) * text[:, rest].T @ text / max(len(text), 1)


def members_of(columns: int, options: FicocoLOptions) -> int:
    """How many of so many affinities are at or above their linear quantile eps, where all differ."""
    return columns - ((columns - 1) * round(options.eps * 1000) + 999) // 1000


def joins(affinity: Tensor, candidate: Tensor, options: FicocoLOptions) -> tuple[Tensor, Tensor]:
    """``target [M, K]`` (kept tokens, heaviest first) and ``weight [M, K]``: those at or above the quantile eps of the
    affinities `[M, C]` to the candidates, in proportion."""
    import torch

    columns = candidate.nonzero()[:, 0]
    if not len(columns):
        return torch.zeros(len(affinity), 0, dtype=torch.long), torch.zeros(len(affinity), 0)
    members = members_of(len(columns), options)
    order = affinity[:, columns].sort(dim=1, descending=True, stable=True).indices[:, :members]
    target = columns[order]
    return target, weights_of(target, affinity)


def weights_of(target: Tensor, affinity: Tensor) -> Tensor:
    """Shares of the affinities `[M, C]` at ``target [M, K]``; 0 for an entry that is none."""
    import torch

    real = (target >= 0) & (target < affinity.shape[1])
    strength = affinity.gather(1, target.clamp(0, affinity.shape[1] - 1).long()) * real
    total = strength.sum(1, keepdim=True)
    return torch.where(total > 0, strength / total, real / real.sum(1, keepdim=True).clamp(min=1))


def mean_of(kept: Tensor, dropped: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """``(X_j + sum alpha_ij X_i) / (1 + sum alpha_ij)`` of kept `[C, E]` and dropped tokens `[M, E]`."""
    import torch

    total, by = kept.clone(), torch.ones(len(kept))
    for column in range(target.shape[1]):
        real = (target[:, column] >= 0) & (target[:, column] < len(kept))
        to, share = target[real, column].long(), weight[real, column]
        total.index_add_(0, to, share[:, None] * dropped[real])
        by.index_add_(0, to, share)
    return total / by[:, None]


def whole(row: SpanRow, tokens: Tensor) -> Tensor:
    """Rows `[N, E]` of all original tokens from the stream's `[S, E]`: of the token that each joined; 0 for none."""
    import torch

    return torch.where((row.owner >= 0)[:, None], tokens[row.owner.clamp(min=0)], 0.0)
