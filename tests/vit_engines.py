"""Engines of tiny vision transformers on disk, each built once a test session."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_vit import vit
from trtpass import io
from trtpass.build import Request, build
from trtpass.manifest import Manifest

TOME = "tome:r=4,layers=0"


@cache
def _file(root: Path, head: str) -> Path:
    root.joinpath(head).mkdir(parents=True)
    io.save(vit(2, head=head), root / head / "vit.onnx")
    return root / head / "vit.onnx"


@cache
def _engine(root: Path, passes: tuple[str, ...] | None, target: str, head: str) -> tuple[Manifest, Path]:
    return build(Request(str(_file(root / "vit", head)), passes, target, out=root / "vit-engines" / head))


def vit_file(factory: pytest.TempPathFactory) -> Path:
    """Two blocks, 37 tokens, all of them in the output ``features``."""
    return _file(factory.getbasetemp() / "vit", "tokens")


def vit_engine(
    factory: pytest.TempPathFactory, *passes: str, target: str = "cpu", head: str = "tokens", own: bool = False
) -> tuple[Manifest, Path]:
    """Its engine. Not to be changed: copy it first. ``own``: with the passes that a build without any names has."""
    return _engine(factory.getbasetemp(), None if own else passes, target, head)


def images(rows: int) -> dict[str, np.ndarray]:
    """Input of the model."""
    return {"image": np.random.default_rng(5).standard_normal((rows, 3, 24, 24)).astype(np.float32)}
