"""``model.py`` of a deployed text model whose steps a test can hold up: while the file ``hold`` is beside it, a batch
that is full does not step, and one that is not does so slowly. Runs in the server's process."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from trtpass.serving.static_batch import StaticBatch
from trtpass.serving.text_model import TritonPythonModel

__all__ = ["TritonPythonModel"]

HOLD = Path(__file__).with_name("hold")
step = StaticBatch.step


def held(self, tokens):
    if HOLD.exists():
        time.sleep(0.01)
    while HOLD.exists() and len(tokens) == self.rows:
        time.sleep(0.005)
    return step(self, tokens)


StaticBatch.step = held
