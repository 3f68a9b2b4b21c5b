"""``python -m trtpass.kvzap.frontier MODEL -o DIR [--short] [--surrogate NAME=FILE ...] [--text FILE]``, or, to put the
tables of a result into a page, ``python -m trtpass.kvzap.frontier --page PAGE -o DIR``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trtpass.errors import InputError, TrtpassError
from trtpass.kvzap.frontier.output import RESULT, TABLES, update_page
from trtpass.kvzap.frontier.run import frontier
from trtpass.progress import bar


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request was wrong."""
    parser = argparse.ArgumentParser(prog="trtpass.kvzap.frontier", description="quality frontier of KV policies")
    parser.add_argument("model", nargs="?", help="a known model or a Hugging Face folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the log and the results")
    parser.add_argument("--short", action="store_true", help="one text and one pass key, one cut")
    parser.add_argument("--surrogate", action="append", metavar="NAME=FILE", help="a KVzap checkpoint; repeatable")
    parser.add_argument("--text", type=Path, help="a text of your own, UTF-8")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--minutes", type=float, help="begin nothing more after so many; a later run goes on")
    parser.add_argument("--page", type=Path, help="put the tables of DIR/quality.json between the marks of this page")
    given = parser.parse_args(arguments)
    try:
        if given.page is not None:
            update_page(given.out / RESULT, given.page)
            return 0
        if given.model is None:
            raise InputError("no model was named", "a known model or a Hugging Face folder")
        surrogates = None if given.surrogate is None else dict(_pair(text) for text in given.surrogate)
        with bar("frontier") as report:
            frontier(
                given.model, given.out, given.short, surrogates, report, text=given.text, threads=given.threads,
                minutes=given.minutes,
            )  # fmt: skip
        print((given.out / TABLES).read_text(encoding="utf-8"))
    except TrtpassError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 2
    return 0


def _pair(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise InputError(f"--surrogate {text}", "NAME=FILE")
    return name, Path(file)


if __name__ == "__main__":
    sys.exit(main())
