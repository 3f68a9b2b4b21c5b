"""What the encoder methods compute, in plain torch from the papers' definitions: the law for graphs and operators.

One row of a batch at a time, float32, no operator of ``plugins``. Ties go to the lowest index everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtpass.reduction.filters import FACTOR, MANTISSA, PRIME, hash_seed
from trtpass.reduction.options import Budget, ReductionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.reduction.scc import Connected


@dataclass
class Row:
    """One row's stream.

    Args:
        tokens: `[S, E]`.
        size: original tokens in each, float32 `[S]`.
        place: original index of each, -1 for a fused one, `[S]`.
        owner: place in the stream of each original token, -1 where it has none, `[N]`.
    """

    tokens: Tensor
    size: Tensor
    place: Tensor
    owner: Tensor


@dataclass
class Step:
    """What a site did to a row: the row after it, ``score [S]``, ``keep [S]``, ``target [M, K]`` or None."""

    row: Row
    score: Tensor
    keep: Tensor
    target: Tensor | None


def open_row(tokens: Tensor) -> Row:
    """A row before its first site."""
    import torch

    count = len(tokens)
    return Row(tokens, torch.ones(count), torch.arange(count), torch.arange(count))


def attention_map(q: Tensor, k: Tensor, scale: float, size: Tensor | None) -> Tensor:
    """Head mean `[S, S]` of softmax(scale q k^T + log size) of q `[H, S, D]`, k `[Hkv, S, D]`."""
    import torch

    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = scale * q @ k.transpose(1, 2)
    return torch.softmax(logits if size is None else logits + size.log(), -1).mean(0)


def reduce_row(
    row: Row,
    q: Tensor,
    k: Tensor,
    scale: float,
    options: ReductionOptions,
    budget: Budget,
    cls: int,
    columns: int,
    forced: tuple[Tensor, Tensor | None] | None = None,
) -> Step:
    """One site on one row: q `[H, S, D]`, k `[Hkv, S, D]` of the block. ``forced``: keep `[S]` and target `[M, K]`."""
    import torch

    count = len(row.tokens)
    key = k.mean(0)
    probs = attention_map(q, k, scale, row.size if options.weighs_keys else None)
    free = torch.arange(count) >= cls
    candidate = free & (torch.arange(count) % 2 == 1) if options.filter == "tome" else free
    score = scores(row, key, probs, options, cls, columns).masked_fill(~free, torch.inf)
    kept = budget.kept(count)
    order = sorted(range(count), key=lambda i: (-float(score[i]), i))
    keep = torch.zeros(count, dtype=torch.int32)
    keep[order[:kept]] = 1
    chosen = keep if forced is None else forced[0]
    index = [i for i in range(count) if chosen[i]]
    rest = [i for i in range(count) if not chosen[i]]
    target, weight = joins(key, probs, options, index, rest, candidate)
    own = target
    if forced is not None and forced[1] is not None:
        target, weight = forced[1], _weights_of(forced[1], target, weight, probs, options, index, rest)
    return Step(_joined(row, options, index, rest, target, weight, probs), score, keep, own)


def scores(row: Row, key: Tensor, probs: Tensor, options: ReductionOptions, cls: int, columns: int) -> Tensor:
    """The filter: `[S]`, highest kept first; protected tokens are the caller's."""
    import torch

    count = len(row.tokens)
    if options.filter == "random":
        value, prime, seed = row.place.long(), PRIME, hash_seed(options.seed)
        first = (
            torch.fmod(value * FACTOR + seed, prime)
            if (value >= 0).all()
            else torch.remainder(value * FACTOR + seed, prime)
        )
        second = torch.remainder(first * first + seed, prime)
        return (torch.remainder(second * second + first, prime) % MANTISSA).float()
    if options.filter == "evit":
        return probs[0]
    if options.filter == "tome":
        unit = torch.nn.functional.normalize(key, dim=-1)
        similar = unit @ unit.T
        score = torch.full((count,), torch.inf)
        partners = [j for j in range(count) if j % 2 == 1 and j >= cls]
        for i in range(0, count, 2):
            if i >= cls and partners:
                score[i] = -similar[i, partners].max()
        return score
    received = probs[cls:].mean(0)  # [S]: of the visual queries
    mean = key[cls:].mean(0) if cls else key.mean(0)
    cue = probs[0] if cls else -torch.nn.functional.cosine_similarity(mean[None], key)
    s = options.lam * received - (1.0 - options.lam) * cue
    if columns:
        windows: dict[tuple[int, int], int] = {}
        for i in range(cls, count):
            at = int(row.place[i]) - cls
            if at < 0:
                continue
            window = (at // columns // 2, at % columns // 2)
            if window not in windows or s[i] > s[windows[window]]:
                windows[window] = i
        best = list(windows.values())
        s[best] = torch.where(s[best] > 0, s[best] * 2, s[best] / 2)
    return -s


def joins(
    key: Tensor, probs: Tensor, options: ReductionOptions, index: list[int], rest: list[int], candidate: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The correlation: ``target [M, K]`` (places in ``index``, heaviest first) and ``weight [M, K]``."""
    import torch

    if options.correlate == "none":
        return None, None
    columns = [c for c, i in enumerate(index) if candidate[i]]
    if options.correlate == "tome":
        unit = torch.nn.functional.normalize(key, dim=-1)
        affinity, members = unit @ unit.T, 1
    else:
        affinity, eps = probs, round(options.eps * 1000)
        members = len(columns) - ((len(columns) - 1) * eps + 999) // 1000
    target = torch.zeros(len(rest), members, dtype=torch.long)
    weight = torch.ones(len(rest), members)
    for m, i in enumerate(rest):
        best = sorted(columns, key=lambda c: (-float(affinity[i, index[c]]), c))[:members]
        target[m] = torch.tensor(best)
        if options.correlate == "ficoco-v":
            strength = affinity[i, [index[c] for c in best]]
            weight[m] = strength / strength.sum() if strength.sum() > 0 else 1.0 / members
    return target, weight


def _weights_of(
    given: Tensor,
    own: Tensor | None,
    weight: Tensor | None,
    probs: Tensor,
    options: ReductionOptions,
    index: list[int],
    rest: list[int],
) -> Tensor:
    """Weights of targets that another side chose: their own affinities."""
    import torch

    made = torch.ones(given.shape)
    if options.correlate == "ficoco-v":
        for m, i in enumerate(rest):
            strength = probs[i, [index[int(c)] for c in given[m]]]
            made[m] = strength / strength.sum() if strength.sum() > 0 else 1.0 / given.shape[1]
    return made


def _joined(
    row: Row,
    options: ReductionOptions,
    index: list[int],
    rest: list[int],
    target: Tensor | None,
    weight: Tensor | None,
    probs: Tensor,
) -> Row:
    """The compression, and what becomes of owners."""
    import torch

    tokens, size, place = row.tokens[index].clone(), row.size[index].clone(), row.place[index].clone()
    slot = {i: c for c, i in enumerate(index)}
    if target is not None and weight is not None:
        scale = row.size if options.compress == "size" else torch.ones(len(row.size))
        total = tokens * scale[index, None]
        by = scale[index].clone()
        for m, i in enumerate(rest):
            for c, w in zip(target[m].tolist(), weight[m].tolist(), strict=True):
                total[c] += w * scale[i] * row.tokens[i]
                by[c] += w * scale[i]
                size[c] += w * row.size[i]
            slot[i] = int(target[m, 0])
        tokens = total / by[:, None]
    elif options.compress == "fuse":
        by = probs[0] if options.filter == "evit" else row.size
        tokens = torch.cat([tokens, (by[rest, None] * row.tokens[rest]).sum(0, keepdim=True)])
        size = torch.cat([size, row.size[rest].sum()[None]])
        place = torch.cat([place, torch.tensor([-1])])
    owner = torch.tensor([slot.get(int(o), -1) if o >= 0 else -1 for o in row.owner])
    return Row(tokens, size, place, owner)


def restore_row(row: Row, cls: int, columns: int) -> Tensor:
    """Rows `[N, E]` of all original tokens: those they joined, or of the nearest original token that has one."""
    import torch

    count = len(row.owner)
    sources = [n for n in range(cls, count) if row.owner[n] >= 0]

    def at(n: int) -> tuple[int, int]:
        return divmod(n - cls, columns) if columns else (0, n - cls)

    out = torch.zeros(count, row.tokens.shape[1])
    for n in range(count):
        if row.owner[n] >= 0:
            out[n] = row.tokens[row.owner[n]]
        elif n >= cls and sources:
            y, x = at(n)
            nearest = min(sources, key=lambda m: ((at(m)[0] - y) ** 2 + (at(m)[1] - x) ** 2, m))
            out[n] = row.tokens[row.owner[nearest]]
    return out


def components(x: Tensor, tau: float) -> list[list[int]]:
    """Connected components of ``cos > tau`` of x `[n, E]`, by their member of highest degree, ties to the lowest."""
    import torch

    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    near = unit @ unit.T > tau
    near = near.triu(1) | near.triu(1).T
    near &= (x != 0).any(1)[:, None] & (x != 0).any(1)[None]  # a zero vector is similar to nothing
    degree, seen = near.sum(1).tolist(), set[int]()
    found = []
    for start in range(len(x)):
        if start in seen:
            continue
        members, frontier = {start}, [start]
        while frontier:
            new = set(near[frontier.pop()].nonzero()[:, 0].tolist()) - members
            members |= new
            frontier += new
        seen |= members
        found.append((max(members, key=lambda i: (degree[i], -i)), sorted(members)))
    return [members for _, members in sorted(found)]


def connect_row(row: Row, how: Connected, cls: int, forced: Tensor | None) -> Step:
    """SCC on one row; ``forced``: the label of each unprotected token `[n]`, which takes the place of its own."""
    import torch

    x = row.tokens[cls:]
    room = (len(x) * how.permille + 999) // 1000

    def means(of: Tensor, groups: list[list[int]]) -> Tensor:
        return torch.stack([of[members].mean(0) for members in groups])

    def best(of: Tensor, among: Tensor) -> Tensor:
        unit, other = (torch.nn.functional.normalize(t, dim=-1) for t in (of, among))
        return (unit @ other.T).argmax(1)

    if how.group:
        spans = [list(range(start, min(start + how.group, len(x)))) for start in range(0, len(x), how.group)]
        first = [[span[i] for i in members] for span in spans for members in components(x[span], how.tau)]
        reps = means(x, first)
        tokens = means(reps, components(reps, how.tau))[:room]
        label = best(x, tokens)
        own = label
        label = label if forced is None else forced.long()
        total = tokens.clone().index_add_(0, label, x)
        size = torch.zeros(len(tokens)).index_add_(0, label, torch.ones(len(x)))
        tokens = total / (1 + size)[:, None]
    else:
        parts = components(x, how.tau)
        label = torch.empty(len(x), dtype=torch.long)
        for number, members in enumerate(parts):
            label[members] = number
        own = label
        label = label if forced is None else forced.long()
        parts = [(label == number).nonzero()[:, 0].tolist() for number in range(int(label.max()) + 1)]
        tokens = means(x, parts[:room])
        size = torch.tensor([float(len(members)) for members in parts[:room]])
        late = (label >= room).nonzero()[:, 0]
        if len(late):
            label = label.clone()
            label[late] = best(x[late], tokens)
            total = (tokens * size[:, None]).index_add_(0, label[late], x[late])
            size = size.index_add_(0, label[late], torch.ones(len(late)))
            tokens = total / size[:, None]
    owner = torch.cat([torch.arange(cls), label + cls])
    made = Row(
        torch.cat([row.tokens[:cls], tokens]), torch.cat([torch.ones(cls), size]), torch.zeros(len(tokens) + cls), owner
    )
    none = torch.zeros(len(row.tokens))
    return Step(made, none, none, own[:, None])
