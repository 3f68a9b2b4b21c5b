"""``python -m trtpass.quality.encoder photos|speech -o DIR [--short] [--threads N]``: the sweeps behind
docs/reduction_quality.md.

``photos``: heat maps of DINOv2 saliency. ``speech``: transcripts of Whisper tiny.en. Each writes NAME.json, NAME.md and
pictures into DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtpass import passes
from trtpass.errors import TrtpassError
from trtpass.manifest import versions
from trtpass.progress import Report, bar, silent
from trtpass.quality import encoder_photos, encoder_plots, encoder_speech, plots
from trtpass.quality.encoder_folder import patches
from trtpass.quality.encoder_plan import MIX, PHOTOS, SPEECH, Setting
from trtpass.quality.encoder_sides import Side, store
from trtpass.quality.encoder_tables import grids
from trtpass.quality.tables import markdown
from trtpass.staging import replacing

SHORT = 2  # settings of the short form
PICTURED = (  # about 0.6 kept
    ("tome", "tome:r=16"),
    ("evit", "evit:keep=0.653"),
    ("ficoco-v", "ficoco-v:keep=0.543"),
    ("evit + ficoco-v", MIX + ",keep=0.661"),
    ("scc", "scc:layer=1,tau=0.7"),
    ("random", "random-tokens:r=16"),
)


def photos(
    settings: Sequence[Setting] = PHOTOS, report: Report = silent, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The sweep over photos: what ``photos.json`` holds, and the pictures by file name."""
    from graphs import dinov2_saliency

    pictures = dinov2_saliency.photos()
    with tempfile.TemporaryDirectory() as folder:
        dense = store(encoder_photos.canonical(), Path(folder))
        rows = encoder_photos.sweep(dense, pictures, settings, report, threads)
        report("pictures", 0.95)
        columns = []
        for title, text in PICTURED if len(settings) > SHORT else PICTURED[:1]:
            seen = encoder_photos.look(Side(dense, [passes.parse(text)], threads), encoder_photos.feeds(pictures))
            columns.append((title, patches({n: one.owner for n, one in seen.items() if one.owner is not None})))
    made = {"photos.png": encoder_plots.photos(rows)}
    made["tokens.png"] = encoder_plots.tokens(pictures, columns, encoder_photos.GRID)
    return {"encoder": "photos", "model": encoder_photos.RECIPE, "rows": rows}, made


def speech(
    settings: Sequence[Setting] = SPEECH, report: Report = silent, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The sweep over speech: what ``speech.json`` holds, and the picture."""
    from graphs import whisper_tiny_en

    decoder = whisper_tiny_en.torch_module()
    listener = encoder_speech.Listener(
        encoder_speech.voice(decoder), whisper_tiny_en.features(whisper_tiny_en.speech())
    )
    with tempfile.TemporaryDirectory() as folder:
        dense = store(encoder_speech.canonical(decoder), Path(folder))
        reference, rows = encoder_speech.sweep(dense, listener, settings, report, threads)
        width = Side(dense, [], threads).width
    result = {"encoder": "speech", "model": encoder_speech.RECIPE, "transcript": reference, "rows": rows}
    return result, {"speech.png": encoder_plots.speech(rows, width)}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request was wrong."""
    parser = argparse.ArgumentParser(prog="trtpass.quality.encoder", description="quality of reduced encoders")
    parser.add_argument("what", choices=("photos", "speech"))
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--short", action="store_true", help=f"the first {SHORT} settings")
    parser.add_argument("--threads", type=int, help="of one operator in ONNX Runtime, and of torch")
    given = parser.parse_args(arguments)
    try:
        plots.need()
        if given.threads is not None:
            import torch

            torch.set_num_threads(given.threads)
        run, plan = (photos, PHOTOS) if given.what == "photos" else (speech, SPEECH)
        started = time.monotonic()
        with bar(given.what) as report:
            result, pictures = run(plan[:SHORT] if given.short else plan, report, given.threads)
        result |= {"versions": versions(), "seconds": round(time.monotonic() - started, 1)}
        write(given.out, given.what, result, pictures)
        print((given.out / f"{given.what}.md").read_text(encoding="utf-8"))
    except TrtpassError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2
    return 0


def write(folder: Path, name: str, result: dict[str, Any], pictures: dict[str, bytes]) -> None:
    """Write the result, its tables and its pictures, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(pictures)
    files[f"{name}.md"] = markdown(grids(result)).encode()
    files[f"{name}.json"] = (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()
    for file, data in files.items():
        with replacing(folder / file, len(data)) as handle:
            handle.write(data)


if __name__ == "__main__":
    sys.exit(main())
