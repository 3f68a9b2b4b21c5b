"""Policies as scores of keys `[L, Hkv, T]`: the lowest are evicted, one global cut over all layers and KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtpass.errors import InputError
from trtpass.kvzap.frontier.masked import Read

if TYPE_CHECKING:
    from torch import Tensor

WINDOW, SINKS = 128, 4  # keys that no policy may evict: the last ones and the first ones
POOL = 7


def streaming(past: Read) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the most recent keys; sinks are protected for every policy anyway."""
    import torch

    return torch.arange(past.tokens, dtype=torch.float32).expand(past.shape)


def knorm(past: Read) -> Tensor:
    """Keys of a small norm are kept (arXiv 2406.11430)."""
    import torch

    return -torch.stack([key.norm(dim=-1) for key in past.key])


def snapkv(past: Read) -> Tensor:
    """SnapKV (arXiv 2404.14469): softmax mass of the last 32 queries, max-pooled over 7 keys, summed over the group."""
    import torch

    made = []
    for key, query in zip(past.key, past.query, strict=True):
        rows, tokens = query.shape[1], past.tokens
        logits = query.unflatten(0, (len(key), -1)) @ key[:, None].transpose(-1, -2) * past.scaling  # [Hkv, G, R, T]
        ahead = torch.arange(tokens) > torch.arange(tokens - rows, tokens)[:, None]
        mass = logits.masked_fill(ahead, -torch.inf).softmax(-1).sum(2)  # [Hkv, G, T]
        mass[..., tokens - rows :] = 0  # the prefix alone is scored; the window protects the rest
        made.append(torch.nn.functional.max_pool1d(mass, POOL, stride=1, padding=POOL // 2).sum(1))
    return torch.stack(made)


def random(past: Read, seed: Sequence[int]) -> Tensor:
    """The control: uniform scores of a seed."""
    import numpy as np
    import torch

    return torch.from_numpy(np.random.default_rng(list(seed)).random(past.shape, dtype=np.float32))


def static(past: Read, mean: Tensor) -> Tensor:
    """What a learned scorer must beat: ``mean [L, Hkv]``, each head's mean score on other text, and no hidden state.

    Heads are emptied whole, the lowest mean first, inside a head the oldest key first.
    """
    import torch

    rank = mean.flatten().argsort(stable=True).argsort().reshape(mean.shape)
    return (rank[..., None] * past.tokens + torch.arange(past.tokens)).double()


def protected(tokens: int, window: int = WINDOW, sinks: int = SINKS) -> Tensor:
    """Which of T keys stay in any case: bool `[T]`."""
    import torch

    place = torch.arange(tokens)
    return (place < sinks) | (place >= tokens - window)


def cut(score: Tensor, removed: float, window: int = WINDOW, sinks: int = SINKS) -> Tensor | None:
    """Mask `[L, Hkv, T]` of what stays when exactly this fraction of all keys is removed, the lowest scores first.

    The protected keys are counted too. Of equal scores the first in order of layer, head, token goes first.

    Returns:
        The mask, or None where the protected keys alone are more than may stay.
    """
    import torch

    _finite(score)
    safe = protected(score.shape[-1], window, sinks)
    count = round(removed * score.numel())
    if count > (~safe).sum() * score[..., 0].numel():
        return None
    order = score.double().masked_fill(safe, torch.inf).flatten().argsort(stable=True)
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[order[:count]] = False
    return keep.reshape(score.shape)


def above(score: Tensor, threshold: float, window: int = WINDOW, sinks: int = SINKS) -> Tensor:
    """Mask `[L, Hkv, T]` of an engine with a fixed threshold: an unprotected key whose score is below it goes."""
    _finite(score)
    return (score >= threshold) | protected(score.shape[-1], window, sinks)


def threshold(scores: Sequence[Tensor], removed: float, window: int = WINDOW, sinks: int = SINKS) -> float | None:
    """The threshold that removes this fraction of all keys of several contexts together, protected keys counted.

    Returns:
        The lowest score that stays, or None where the protected keys alone are more than may stay.
    """
    import torch

    loose = []
    for score in scores:
        _finite(score)
        loose.append(score[..., ~protected(score.shape[-1], window, sinks)].flatten())
    count = round(removed * sum(score.numel() for score in scores))
    ascending = torch.cat(loose).sort().values
    return float(ascending[count]) if count < len(ascending) else None


def _finite(score: Tensor) -> None:
    if not bool(score.isfinite().all()):
        raise InputError("scores that are not finite", "a number for every key", "check the model and the checkpoint")
