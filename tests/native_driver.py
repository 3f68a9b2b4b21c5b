"""The native kernels in a process of their own: building ``plugins/_native/driver.cc``, and its protocol."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtpass import native
from trtpass.native_build import FLAGS, Toolchain, compile_into
from trtpass.op import Op

Array = np.ndarray[Any, Any]

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "native"
CAUGHT = "address,undefined,float-cast-overflow"
FLAVOURS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "sanitized": ("-O1", "-g1", f"-fsanitize={CAUGHT}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "threads": ("-O1", "-g1", "-fsanitize=thread"),
}
KEPT = 3  # builds of a flavour that stay in the cache, the one in use included

LIMIT = 300.0  # seconds after which a driver is killed, so that a kernel that never ends is a failing test

TYPES = (np.dtype("float32"), np.dtype("float16"), np.dtype("int32"))  # trtpass::Type


def built(flavour: str, tools: Toolchain) -> Path:
    """The driver of the sources that are here, with the objects that it was linked from beside it.

    Raises:
        TrtpassError: the compiler refuses something.
    """
    mark = native.fingerprint()
    folder = CACHE / f"{mark}-{flavour}"
    if not (folder / "driver").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".building-") as place:
            made = Path(place) / "built"
            made.mkdir()
            extra = FLAVOURS[flavour]
            link = [flag for flag in extra if flag.startswith("-fsanitize")]
            compile_into(made / "driver", tools, ["driver.cc"], [*link, "-pthread"], mark, [*FLAGS, *extra])
            if not folder.exists():  # else another process was quicker
                made.rename(folder)
        for old in sorted(CACHE.glob(f"*-{flavour}"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
    return folder / "driver"


class Refused(Exception):
    """The kernel says that something is wrong with its inputs, and what."""


class Driver:
    """A running driver. As a context manager: leaving it ends the process and checks that it ended well.

    ``requests`` counts what was answered.
    """

    def __init__(self, program: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._limit = threading.Timer(LIMIT, self._process.kill)
        self._limit.start()
        self.requests = 0

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        code = self._process.wait(timeout=60)
        self._limit.cancel()
        self._process.stdout.close()
        report = self._report()
        self._errors.close()
        if kind is None:
            assert code == 0, f"the driver ends with {code}:\n{report}"
            assert not report, report

    def run(
        self,
        op: Op,
        inputs: Sequence[Array],
        attrs: Mapping[str, Any],
        isa: str = "",
        threads: int = 1,
        swapped: bool = False,
    ) -> list[Array]:
        """Outputs of one call. ``swapped``: tensors of four axes lie as `[B, S, H, D]` in the driver, not here.

        Raises:
            Refused: the kernel or the driver returned an error.
        """
        outputs = _outputs(self.ask(encoded(op, inputs, attrs, isa, threads, swapped)))
        return [turned(x) for x in outputs] if swapped else outputs

    def ask(self, request: bytes) -> bytes:
        """Any bytes as a request: the rest of the response after its status.

        Raises:
            Refused: the response is an error.
        """
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in and pipe_out
        try:
            pipe_in.write(struct.pack("<Q", len(request)))
            pipe_in.write(request)
            pipe_in.flush()
            head = pipe_out.read(8)
        except BrokenPipeError:
            head = b""
        if len(head) < 8:
            self._process.wait(timeout=60)
            raise AssertionError(f"the driver died ({self._process.returncode}):\n{self._report()}")
        response = pipe_out.read(struct.unpack("<Q", head)[0])
        self.requests += 1
        if struct.unpack_from("<I", response)[0]:
            raise Refused(response[8:].decode(errors="replace"))
        return response[4:]

    def _report(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[:6000]


def turned(x: Array) -> Array:
    """Axes 1 and 2 of a tensor of four axes exchanged, contiguous; others as they are."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)) if x.ndim == 4 else x


def encoded(
    op: Op,
    inputs: Sequence[Array],
    attrs: Mapping[str, Any],
    isa: str = "",
    threads: int = 1,
    swapped: bool = False,
) -> bytes:
    """A request, without its length."""
    parts = [_text(op.name), _text(isa), struct.pack("<III", threads, swapped, len(op.attrs))]
    for name, value in op.complete(attrs).items():
        parts += [_text(name), struct.pack("<qd", value if isinstance(value, int) else 0, float(value))]
    parts.append(struct.pack("<I", len(inputs)))
    for x in inputs:
        laid = turned(x) if swapped else np.ascontiguousarray(x)
        head = struct.pack(f"<II{x.ndim}qQ", TYPES.index(x.dtype), x.ndim, *laid.shape, laid.nbytes)
        parts += [head, laid.tobytes()]
    return b"".join(parts)


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def _outputs(response: bytes) -> list[Array]:
    (count,), at = struct.unpack_from("<I", response), 4
    found = []
    for _ in range(count):
        kind, rank = struct.unpack_from("<II", response, at)
        *dims, size = struct.unpack_from(f"<{rank}qQ", response, at + 8)
        at += 16 + 8 * rank
        found.append(np.frombuffer(response, TYPES[kind], size // TYPES[kind].itemsize, at).reshape(dims).copy())
        at += size
    return found
