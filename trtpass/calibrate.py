"""Calibration of a model, once, offline: what passes need to know and the graph does not say.

``drift``: inter-layer representation drift ``R_l = mean_t |h_{l+1,t} - h_{l,t}| / |h_{l,t}|`` (Token Sparse Attention,
arXiv 2602.03216): a layer that changes its tokens little can do without some of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass import layers
from trtpass.errors import InputError

if TYPE_CHECKING:
    from graphs import Recipe


def drift(module: Any, ids: np.ndarray) -> list[float]:
    """R_l of every layer of a transformers causal LM on ``ids [S]`` int64; norms are L2 over the hidden width.

    Raises:
        InputError: fewer than 16 tokens, or a drift that is not finite.
    """
    import torch

    if ids.size < 16:
        raise InputError(f"a calibration text of {ids.size} tokens", "16 or more", "give a longer text with --text")
    with torch.inference_mode():
        values: list[float] = []

        def measure(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # [1, S, E]
            after = out[0] if isinstance(out, tuple) else out
            moved = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
            values.append(float(moved.mean()))

        hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in module.model.layers]
        try:
            module.model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not all(np.isfinite(values)):
        raise InputError("the drift of a layer is not finite", fix="check the weights: they may hold NaN or infinity")
    return values


def read_drift(recipe: Recipe) -> list[float] | None:
    """The drift stored beside a recipe, or None where the model was never calibrated.

    Raises:
        InputError: the file is there and is not a calibration.
    """
    if not recipe.data.is_file():
        return None
    try:
        return [float(x) for x in json.loads(recipe.data.read_text())["drift"]["values"]]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(
            f"'{recipe.data}' is not a calibration file: {type(error).__name__}",
            fix="remove it, or run `trtpass calibrate drift` again",
        ) from error


def calibrate_drift(model: str, text: Path | None, tokens: int) -> dict[str, Any]:
    """Measure drift on ``tokens`` tokens of a text and store it beside the recipe.

    Returns what was stored: ``values`` (R_l), ``tokens``, ``text``, and for the reader ``half`` (layers at or below the
    median) and ``path``.

    Raises:
        InputError: no torch module or tokenizer for this model, or a text that is too short.
    """
    from graphs import resolve
    from trtpass.corpus import text_corpus

    recipe = resolve(model)
    loaded = recipe.load()
    if loaded.module is None or loaded.tokenizer is None:
        raise InputError(
            f"'{model}' has no torch module or no tokenizer",
            "a known model or a Hugging Face folder with tokenizer.json",
        )
    source = text_corpus(text)
    start = 20_000 if len(source) > 20_000 + 6 * tokens else 0  # past a preface, where there is one
    encoded = loaded.tokenizer(source[start : start + 12 * tokens], add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"][: min(tokens, loaded.context or tokens)]
    values = [round(r, 6) for r in drift(loaded.module, np.array(ids, np.int64))]
    entry = {"values": values, "tokens": len(ids), "text": text.name if text else "jargon-text"}
    stored = json.loads(recipe.data.read_text()) if recipe.data.is_file() else {}
    stored["drift"] = entry
    recipe.data.parent.mkdir(parents=True, exist_ok=True)
    temporary = recipe.data.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    temporary.replace(recipe.data)
    half = layers.resolve("drift:0.5", len(values), values)
    return {**entry, "half": "+".join(map(str, half)), "path": str(recipe.data)}
