"""``python tests/kernel_worker.py OUT.json [SUBSTRING]``: kernels in Triton's interpreter, on every case.

A process of its own, because triton reads the variable when it is imported. ``OUT.json.K-of-N`` writes every Nth trial
from the Kth on: an empty string where the kernel equals its reference, else what was raised.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any


def widen_products() -> None:
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as integers: make them float32 first, as they are."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def wide(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
        return product(self, wide(a), wide(b), *others)

    InterpreterBuilder.create_dot = create_dot


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from kernel_cases import check, run, trials

    widen_products()
    torch.set_num_threads(1)  # each worker has one core
    out = sys.argv[1]
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    part = re.search(r"\.(\d+)-of-(\d+)$", out)
    first, step = (int(part[1]), int(part[2])) if part else (0, 1)
    made = {}
    for trial in trials()[first::step]:
        if wanted not in trial.name:
            continue
        started = time.monotonic()
        try:
            check(trial, run(trial, "cpu"))
            made[trial.name] = ""
        except Exception as error:  # noqa: BLE001 - whatever was raised is what the test reports
            made[trial.name] = f"{type(error).__name__}: {error}"
        print(f"{time.monotonic() - started:6.1f} s  {trial.name}", file=sys.stderr)
    Path(out).write_text(json.dumps(made))
