"""Runs mutated files through load and what follows it; started by tests/test_bad_input.py in a process of its own.

Prints ``start SEED`` before each file and ``done SEED OUTCOME`` after it, so that whoever watches knows which file
crashed or hung the process. OUTCOME is ``ok``, ``refused`` (a TrtpassError), or ``unguarded`` with the stage and error.
"""

from __future__ import annotations

import json
import resource
import sys
import traceback
from pathlib import Path

import onnx
import onnx_ir as ir
from bases import bases, write_data
from mutate import mutated

from trtpass import io
from trtpass.errors import TrtpassError
from trtpass.inspect import inspect

MEMORY = 6 << 30  # bytes of address space: a file of a few KB that needs more has blown up


def run(path: Path) -> tuple[str, str]:
    """(outcome, detail) of one file."""
    stage = "load"
    try:
        model = io.load(path)
        stage = "strip"
        io.strip_metadata(model)
        stage = "tensors"
        for tensor in io.tensors(model):
            tensor.numpy()
        stage = "save"
        io.save(model, path.with_name("saved.onnx"), weights="saved.bin")
        stage = "reload"
        io.load(path.with_name("saved.onnx"))
        stage = "check"  # whatever load accepts, onnx's own checker accepts once it is saved again
        try:
            onnx.checker.check_model(str(path.with_name("saved.onnx")))
        except onnx.checker.ValidationError as error:
            if "'shape' of 'type' is required" not in str(error):  # load lets outputs have no shape
                raise
        stage = "inspect"  # raises the graph, finds anchors, asks every pass whether it applies
        inspect(model)
        stage = "serialize"
        ir.serde.serialize_model(model)
    except TrtpassError as error:
        if stage in ("load", "inspect"):
            return "refused", f"{stage}: {error}"
        return "unguarded", f"{stage}: {error}"
    except Exception:  # noqa: BLE001 - the point of the test: report everything else
        return "unguarded", f"{stage}: {traceback.format_exc()}"
    return "ok", ""


def main() -> None:
    """``worker.py FOLDER FIRST END STEP``: seeds FIRST, FIRST + STEP, ... below END. -1, -2, ... are the models."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder, (first, end, step) = Path(sys.argv[1]), (int(text) for text in sys.argv[2:5])
    write_data(folder)
    models = bases()
    for seed in range(first, end, step):
        path = folder / "mutated.onnx"
        path.write_bytes(mutated(models, seed) if seed >= 0 else models[-1 - seed].SerializeToString())
        print(f"start {seed}", flush=True)
        outcome, detail = run(path)
        print(f"done {seed} {outcome} {json.dumps(detail)}", flush=True)


if __name__ == "__main__":
    main()
