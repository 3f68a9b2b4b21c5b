"""Tiny seeded models of every supported family, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from trtpass.weights import Loaded

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
VOCAB, CONTEXT = 128, 512


class Exported(NamedTuple):
    """A model, its graph, and the file that the graph was saved to."""

    loaded: Loaded
    model: ir.Model
    path: Path


def save_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """Save a seeded two-layer model of ``family``: E 96, 6 heads over 2 KV heads, D 16, vocab 128, context 512.

    Weights are larger than at initialisation, so that logits and attention differ visibly between tokens; norms are
    not all ones and biases not zero. ``changes`` override the configuration.
    """
    import torch
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family in ("llama", "qwen3"),
        **({"sliding_window": None} if family == "mistral" else {}),
        **changes,
    }
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.12 if parameter.ndim > 1 else 0.2
                parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + scale * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    return folder
