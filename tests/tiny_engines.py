"""Tiny engines on disk, each built once a test session, and a byte tokenizer for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from families import save_tiny
from proofs import SHORT

BYTES = 256  # vocabulary: one token a byte
CONTEXT = 96
RECIPES: dict[str, list[str]] = {"dense": [], "sparse": [SHORT], "published": ["token-sparse:coverage=0.005"]}


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 tokens, one a byte, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@cache
def _model(root: Path) -> Path:
    folder = save_tiny(
        "llama", root / "with-text", vocab_size=BYTES, max_position_embeddings=CONTEXT, eos_token_id=None
    )
    save_byte_tokenizer(folder)
    return folder


@cache
def _engine(root: Path, recipe: str, target: str) -> Path:
    from trtpass.build import Request, build

    manifest, folder = build(Request(str(_model(root)), RECIPES[recipe], target, out=root / "engines"))
    assert not manifest.checks.failed, manifest.checks
    return folder


def tiny_model(factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with a tokenizer: vocabulary 256, context 96."""
    return _model(factory.getbasetemp())


def tiny_engine(factory: pytest.TempPathFactory, recipe: str, target: str = "cpu") -> Path:
    """The engine folder of that model: ``dense`` or ``sparse``. Not to be changed: copy it first."""
    return _engine(factory.getbasetemp(), recipe, target)
