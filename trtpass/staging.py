"""Outputs that are either whole or absent: a folder or a file is written under a temporary name and renamed.

A temporary folder holds an advisory lock (``flock``) for as long as its process lives, so that a later run can tell
what a killed run left behind from what a live one is writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from trtpass.errors import InputError


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield an empty sibling of ``folder``; on success it takes the name of ``folder``, on any failure it is removed.

    The old folder stays in place until the new one is complete, then it is removed. SIGTERM and SIGHUP, where nothing
    else handles them, become SystemExit inside the block, so that they clean up as Ctrl-C does. What a killed run left
    is removed by the next call for the same folder; if it was killed between the two renames of the swap, the old
    folder is put back.

    Raises:
        InputError: ``folder`` is not a folder, or the block met a full or read-only disk.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder} is a file", "a folder for the outputs", "give another name")
    with ExitStack() as stack:
        stack.enter_context(disk_errors(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        work, lock = _locked_folder(target)
        stack.callback(os.close, lock)
        stack.enter_context(_signals_raise())
        try:
            yield work
            old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
            replaced = target.exists()
            if replaced:
                target.rename(old)
            try:
                work.rename(target)
            except BaseException:
                if replaced:
                    old.rename(target)
                raise
            if replaced:
                shutil.rmtree(old, ignore_errors=True)  # the new folder is in place: leftovers go next time
        finally:
            shutil.rmtree(work, ignore_errors=True)  # absent after a success


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new temporary sibling and the descriptor that holds its lock."""
    while True:
        work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        work.mkdir()
        try:
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():
            return work, lock
        os.close(lock)  # another process took it for a leftover before it was locked


def _clean(target: Path) -> None:
    """Remove what killed runs left; put back an old folder whose successor never came."""
    for left in sorted(target.parent.glob(f".{_escaped(target.name)}.*.old")):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
    for left in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        try:
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not one of ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:  # a live process is writing it
            continue
        finally:
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the main thread where they would have killed the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of ``size`` bytes, written under a temporary name beside ``path`` and renamed to it on success."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path, size):
        try:
            with temporary.open("xb") as handle:
                yield handle
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """A full, read-only or forbidden disk becomes an InputError that names ``path``, bytes needed and bytes free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            try:
                free = f", {shutil.disk_usage(path.parent).free} bytes are free"
            except OSError:
                free = ""
            raise InputError(
                f"the disk is full while writing {path} ({error.strerror}{free})",
                f"{needed} free bytes" if needed is not None else "enough free space",
                "free some space, or write to another disk",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(
                f"{path} cannot be written: {error.strerror}", "a writable place", "choose another folder"
            ) from error
        raise
