"""Calibration of a model, once, offline: what passes need to know and the graph does not say.

``drift``: inter-layer representation drift ``R_l = mean_t |h_{l+1,t} - h_{l,t}| / |h_{l,t}|`` (Token Sparse Attention,
arXiv 2602.03216): a layer that changes its tokens little can do without some of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trtpass.errors import InputError

TOKENS = 2048


def drift(module: Any, ids: np.ndarray) -> list[float]:
    """R_l of every layer of a transformers causal LM on ``ids [S]`` int64; norms are L2 over the hidden width.

    Raises:
        InputError: fewer than 16 tokens, or a drift that is not finite.
    """
    import torch

    if ids.size < 16:
        raise InputError(f"a calibration text of {ids.size} tokens", "16 or more", "give a longer text with --text")
    with torch.inference_mode():
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        hooks = []
        for layer in module.model.layers:
            hooks.append(layer.register_forward_hook(
                lambda _m, args, kwargs, out: (
                    inputs.append(args[0] if args else kwargs["hidden_states"]),
                    outputs.append(out[0] if isinstance(out, tuple) else out),
                )[2:], with_kwargs=True,
            ))  # fmt: skip
        try:
            module.model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        values = [
            float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)).mean())
            for before, after in zip(inputs, outputs, strict=True)
        ]
    if not all(np.isfinite(values)):
        raise InputError("the drift of a layer is not finite", fix="check the weights: they may hold NaN or infinity")
    return values
