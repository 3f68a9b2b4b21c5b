"""Operators: one folder each. ``all_ops()`` finds them; adding a folder is all that a new operator needs."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from trtpass.op import Op


@cache
def all_ops() -> dict[str, Op]:
    """Every operator by its ONNX name, found by looking at the folders beside this file."""
    found: dict[str, Op] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if module.ispkg:
            loaded = importlib.import_module(f"{__name__}.{module.name}")
            found[loaded.OP.name] = loaded.OP
    return found
