"""Unit vectors for the references that compare tokens by cosine: what counts as a vector without a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `[..., E]` divided by their norms, in float32, and which rows have a direction, bool `[...]`.

    A row has none where its float32 sum of squares is not a finite normal number: zero vectors, vectors with NaN or
    infinity in them, and norms below about 1e-19 or above 1.8e19. Such a row comes back as zeros.
    """
    import torch

    wide = x.float()
    square = wide.square().sum(-1)
    limits = torch.finfo(torch.float32)
    directed = (square >= limits.tiny) & (square <= limits.max)  # False for NaN
    return torch.where(directed[..., None], wide / square.sqrt()[..., None], 0.0), directed


def inverse_norms(x: Tensor, lengths: Tensor) -> Tensor:
    """1 / norm of the rows of `[B, S, E]`, float32 `[B, S]`; 0 for rows without a direction and from ``lengths`` on."""
    import torch

    _, directed = unit_rows(x)
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(directed & real, 1 / x.float().square().sum(-1).sqrt(), 0.0)
