"""Another attention in a transformers model, for as long as a block lasts: through its registry, so no model code is
touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_serial = itertools.count()


@contextmanager
def attention(config: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Let models of ``config`` compute attention with ``attend``, of the registry's form: ``(block, q [B, H, S, D],
    k [B, Hkv, S, D], v, mask, scaling=...) -> (out [B, S, H, Dv], None)``. As before after the block."""
    from transformers import AttentionInterface

    before, key = config._attn_implementation, f"trtpass_{next(_serial)}"
    AttentionInterface.register(key, attend)
    try:
        config._attn_implementation = key
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(key)


@contextmanager
def hidden_states(blocks: Sequence[Any], see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with what feeds q, k and v of each attention block `[B, S, E]`, before it runs."""

    def look(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
