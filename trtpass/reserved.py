"""Arrays whose memory is taken as they are written, and given back when a part of them is cleared."""

from __future__ import annotations

import mmap
import sys

import numpy as np

from trtpass.errors import InputError


class Reserved:
    """Zeros whose memory is taken page by page as they are written; in small pages, or each touch would take 2 MiB.

    Attributes:
        array: of the shape and dtype asked for; it keeps the memory alive by itself.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        count = int(np.prod(shape, dtype=np.int64))
        size = max(1, count * np.dtype(dtype).itemsize)
        try:
            self._area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(
                f"{size} bytes of memory cannot be reserved ({error})", "a cache that this machine can hold",
                "ask for fewer rows, fewer tokens or fewer pages",
            ) from error  # fmt: skip
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._area.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._area, dtype, count).reshape(shape)
        self._bytes = np.frombuffer(self._area, np.uint8)

    def clear(self, first: int, last: int) -> None:
        """Entries ``first`` to ``last - 1`` of the first axis become zeros, and whole pages of memory go back."""
        entry = self.array[:1].nbytes
        start, end = first * entry, last * entry
        inner = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        outer = end // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform == "linux" and inner < outer:  # elsewhere, what is not needed need not become zero
            self._area.madvise(mmap.MADV_DONTNEED, inner, outer - inner)
            self._bytes[start:inner] = 0
            start = outer
        self._bytes[start:end] = 0
