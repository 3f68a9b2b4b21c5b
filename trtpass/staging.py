"""Outputs that are either whole or absent: a folder or a file is written under a temporary name and renamed.

What is being written holds an advisory lock (``flock``) for as long as its process lives, so that a later run can tell
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

MARK = ".trtpass"  # an empty file in every output folder: only folders that have it are replaced


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield a new sibling of ``folder``, empty but for ``MARK``.

    On success it takes the name of ``folder``; on any failure it is removed. The old folder stays in place until the
    new one is complete, then it is removed. SIGTERM and SIGHUP, where nothing else handles them, become SystemExit
    inside the block, so that they clean up as Ctrl-C does. What a killed run left is removed by the next call for the
    same folder; if it was killed between the two renames of the swap, the old folder is put back.

    Raises:
        InputError: ``folder`` is a file, or holds files that trtpass did not write, or it cannot be written, or
            the block met a full disk.
    """
    target = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        stack.enter_context(disk_errors(target))
        stack.enter_context(_signals_raise())
        work = _temporary(target)
        stack.callback(shutil.rmtree, work, ignore_errors=True)  # absent after a success
        with _path_errors(target):
            _refuse_foreign(target)
            target.parent.mkdir(parents=True, exist_ok=True)
        with _path_errors(target), _swapping(target):
            _clean(target)
            work.mkdir()
            (work / MARK).touch()
            stack.callback(os.close, _locked(work / MARK))
        yield work
        with _swapping(target):
            old = _swap(work, target)
        shutil.rmtree(old, ignore_errors=True)  # the new folder is in place: what is left goes next time


@contextmanager
def replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of ``size`` bytes, written under a temporary name beside ``path`` and renamed to it on success."""
    with ExitStack() as stack:
        stack.enter_context(disk_errors(path, size))
        work = _temporary(path)
        stack.callback(work.unlink, missing_ok=True)
        with _path_errors(path), _swapping(path):
            _clean(path)
            handle = stack.enter_context(work.open("xb"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
        handle.close()  # flushes, which may meet a full disk
        work.replace(path)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of ``path``.

    Raises:
        BlockingIOError: a live process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file", "a folder for the outputs", "give another name")
    if any(target.iterdir()) and not (target / MARK).is_file():
        raise InputError(
            f"{target} holds files that trtpass did not write (it has no {MARK} file)",
            "a new, an empty, or an earlier output folder: its content is replaced",
            "give another name, or remove the folder",
        )


def _swap(work: Path, target: Path) -> Path:
    """Give ``work`` the name ``target``; returns where the old folder is now (it may never have existed)."""
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
    return old


@contextmanager
def _swapping(target: Path) -> Iterator[None]:
    """One process at a time cleans, begins or swaps: held briefly, through a lock on the parent folder."""
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(parent)


def _clean(target: Path) -> None:
    """Remove what killed runs left; put back an old folder whose successor never came."""
    for left in sorted(target.parent.glob(f".{_escaped(target.name)}.*.old")):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
    for left in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        locked = left / MARK if left.is_dir() else left
        try:
            lock = _locked(locked) if locked.exists() else None
        except OSError:  # held by a live process, or gone meanwhile
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
        if lock is not None:
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
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """A full disk becomes an InputError that names ``path``, the bytes needed and the bytes free."""
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
        raise


@contextmanager
def _path_errors(path: Path) -> Iterator[None]:
    """Whatever keeps ``path`` from being begun is the caller's to mend, so it becomes an InputError."""
    with disk_errors(path):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{path} cannot be written ({error.filename or path.parent}: {error.strerror})",
                "a folder that can be written",
                "check the path",
            ) from error
