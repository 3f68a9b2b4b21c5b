"""``kvzap.bytes``: what a cache takes, as bytes of pages held and as memory of the process, against the dense cache.

Every figure is of a process of its own, which opens one engine, reads the prompt and decodes a few tokens, drops that
cache (all weights that the text needs have been touched now), and does it again: what it holds more is the cache.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trtpass.bench.measure import Machine
from trtpass.bench.record import Record
from trtpass.errors import InputError

STEPS = 4  # decode steps after the prompt
BASELINE = "the dense cache of the same model, over the prompt's tokens alone"


def run(
    folder: Path, machine: Machine, lengths: Sequence[int], note: Callable[[str], None], repeats: int = 2
) -> list[Record]:
    """Pages and process memory at each length, of the engine in ``folder`` against its dense engine.

    Raises:
        InputError: a process failed.
    """
    records = []
    for tokens in lengths:
        note(f"kvzap.bytes: {tokens} tokens, {repeats} processes a side")
        made = {side: [_ask(folder, side, tokens, machine.threads) for _ in range(repeats)] for side in SIDES}
        ours, theirs = made["paged"], made["dense"]
        kept = ours[0]["kept"]
        params = {**ours[0]["params"], "tokens": tokens, "kept": round(kept, 4), "threads": machine.threads}
        for what, key in (("pages", "bytes"), ("process", "grown")):
            values = sorted(run[key] for run in ours)
            others = sorted(run[key] for run in theirs)
            middle = len(values) // 2
            ratios = [o / max(1, v) for o, v in zip(others, values, strict=True)]
            records.append(Record(
                "kvzap.bytes", {**params, "bytes of": what}, BASELINE, "MB", round(values[middle] / 1e6, 3),
                round(others[middle] / 1e6, 3), round(others[middle] / max(1, values[middle]), 4),
                round(min(ratios), 4), round(max(ratios), 4), round(1 / kept, 4), machine.as_dict(),
            ))  # fmt: skip
    return records


SIDES = ("paged", "dense")


def _ask(folder: Path, side: str, tokens: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, str(folder), side, str(tokens), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the process of {side} at {tokens} tokens failed: {done.stderr.strip()[-400:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(folder: Path, side: str, tokens: int, threads: int) -> dict[str, Any]:
    """In this process: ``bytes`` of the cache (pages held, or the prompt's rows), by how much the process has
    ``grown``, and the share ``kept``."""
    from trtpass.bench.inputs import text_ids
    from trtpass.bench.kvzap import dense_bytes, open_sides
    from trtpass.paged import PagedState
    from trtpass.sessions import give_back

    sides = open_sides(folder, threads)
    engine = sides.ours if side == "paged" else sides.dense
    ids = text_ids(folder, tokens)[0].tolist()

    def read() -> Any:
        state = engine.prefill([ids], capacity=tokens + STEPS)
        for token in ids[:STEPS]:
            engine.decode(state, [token])
        return state

    read()
    gc.collect()
    give_back()
    before = resident()
    state = read()
    grown = resident() - before
    paged = isinstance(state, PagedState)
    held = state.bytes_held if paged else dense_bytes(sides.model, tokens + STEPS)
    kept = float(state.kept().mean()) if paged else 1.0
    return {"bytes": held, "grown": grown, "kept": kept, "params": sides.params}


def resident() -> int:
    """Bytes of this process that are in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
