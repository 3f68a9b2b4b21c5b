"""``python tests/kernel_worker.py OUT.npz``: every kernel in Triton's interpreter, on every case that is small enough.

A process of its own, because triton reads the variable when it is imported.
"""

from __future__ import annotations

import os
import sys

SMALL = 160  # tokens: the interpreter takes a second for a dozen programs of a few tiles

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    from kernel_cases import kernel_cases, run

    made = {}
    for parameters in kernel_cases():
        op, kernel, case = parameters.values
        if op.bind([x.shape for x in case.make(0)])["S"] <= SMALL:
            for number, buffer in enumerate(run(op, kernel, case, "cpu")):
                made[f"{parameters.id} {number}"] = buffer
    np.savez(sys.argv[1], **made)
