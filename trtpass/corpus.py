"""The public-domain English text that calibration and quality checks read: the Jargon File, of Debian's jargon-text."""

from __future__ import annotations

import gzip
from pathlib import Path

from trtpass.errors import InputError

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "corpus"
LOCATIONS = (
    _CACHE / "usr/share/doc/jargon-text/jargon.txt.gz",  # scripts/fetch_corpus.sh
    Path("/usr/share/doc/jargon-text/jargon.txt.gz"),  # apt install jargon-text
)


def text_corpus(path: Path | None = None) -> str:
    """A long English text: of ``path`` (UTF-8, ``.gz`` or plain) if given, else of the first of `LOCATIONS`.

    Raises:
        InputError: there is none, or it is not text.
    """
    file = path or next((candidate for candidate in LOCATIONS if candidate.is_file()), None)
    if file is None:
        raise InputError(
            "there is no text for calibration and quality checks",
            "the Jargon File of Debian's package jargon-text",
            "run make setup again, or apt install jargon-text, or give a text file of your own with --text",
        )
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "a text file in UTF-8, plain or .gz") from error
    if not text.strip():
        raise InputError(f"{file} is empty", "a text file in UTF-8, plain or .gz")
    return text
