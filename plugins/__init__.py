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


@cache
def kernel_ops() -> dict[str, Op]:
    """Every operator that has Triton kernels, steps of others included, by name. Needs triton."""
    found: dict[str, Op] = {}
    for op in all_ops().values():
        for made in (op, *(step.op for step in (op.step_list() if op.step_list else ()))):
            if made.kernel_list is not None:
                found[made.name] = made
    return found
