"""Tiny engines on disk, each built once for all test processes, and a byte tokenizer for them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from families import save_tiny
from paged_proofs import save_surrogate
from proofs import SHORT

BYTES = 256  # vocabulary: one token a byte
CONTEXT = 96
PAGE = 8  # slots, of a paged cache
RECIPES: dict[str, list[str]] = {
    "dense": [],
    "sparse": [SHORT],
    "published": ["token-sparse:coverage=0.005"],
    "kvzap": ["kvzap:threshold=0,window=8,weights={weights}"],  # about half of the older keys stay
}


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


@contextmanager
def _once(root: Path, name: str) -> Iterator[Path]:
    """The folder ``root/name``, for one process at a time: whoever finds it empty fills it."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@cache
def _model(root: Path) -> Path:
    with _once(root, "model") as work:
        if not (work / "made").exists():
            folder = save_tiny(
                "llama", work / "with-text", vocab_size=BYTES, max_position_embeddings=CONTEXT, eos_token_id=None
            )
            save_byte_tokenizer(folder)
            save_surrogate(work / "w.safetensors")
            (work / "made").touch()
        return work / "with-text"


@cache
def _engine(root: Path, recipe: str, target: str) -> Path:
    from trtpass.build import Request, build

    model = _model(root)
    passes = [text.format(weights=model.with_name("w.safetensors")) for text in RECIPES[recipe]]
    with _once(root, f"{recipe}-{target}") as work:
        if not (work / "made").exists():
            manifest, folder = build(Request(str(model), passes, target, out=work, page=PAGE))
            assert not manifest.checks.failed, manifest.checks
            (work / "made").write_text(str(folder))
        return Path((work / "made").read_text())


def _root(factory: pytest.TempPathFactory) -> Path:
    """Where all processes of a session look: xdist gives each a folder in one."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def tiny_model(factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with a tokenizer: vocabulary 256, context 96."""
    return _model(_root(factory))


def tiny_engine(factory: pytest.TempPathFactory, recipe: str, target: str = "cpu") -> Path:
    """The engine folder of that model: ``dense``, ``sparse`` or ``kvzap``. Not to be changed: copy it first."""
    return _engine(_root(factory), recipe, target)
