"""Outputs are whole or absent: failures, signals, killed runs, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny

from trtpass import io, staging
from trtpass.errors import InputError


def _temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != staging.MARK)


def test_staged_replaces_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "engine"
    with io.staged(target) as work:
        (work / "old").touch()
        assert not target.exists() and work.parent == target.parent
    with io.staged(target) as work:
        (work / "new").touch()
        assert (target / "old").exists()
    assert sorted(path.name for path in target.iterdir()) == [staging.MARK, "new"]
    assert not _temporaries(target.parent)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_staged_keeps_the_old_folder_on_failure(tmp_path: Path, error: BaseException) -> None:
    with io.staged(tmp_path / "engine") as work:
        (work / "old").touch()
    with pytest.raises(type(error)), io.staged(tmp_path / "engine") as work:
        (work / "half").touch()
        raise error
    assert (tmp_path / "engine" / "old").exists() and not (tmp_path / "engine" / "half").exists()
    assert not _temporaries(tmp_path)


def test_staged_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="did not write"), io.staged(tmp_path / "home"):
        pass
    with pytest.raises(InputError, match="is a file"), io.staged(tmp_path / "file"):
        pass
    with io.staged(tmp_path / "empty"):
        pass
    assert (tmp_path / "home" / "thesis.txt").exists() and (tmp_path / "empty" / staging.MARK).exists()


CHILD = """
import sys, time
from pathlib import Path
from trtpass import io
with io.staged(sys.argv[1]) as work:
    (work / "half").write_text("x")
    print("inside", flush=True)
    time.sleep(60)
"""


def _inside(target: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "inside\n"
    return child


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -2), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals, status: int) -> None:
    child = _inside(tmp_path / "engine")
    assert len(_temporaries(tmp_path)) == 1
    child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode == status
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleaned_but_not_a_live_one(tmp_path: Path) -> None:
    live, dead = _inside(tmp_path / "engine"), _inside(tmp_path / "engine")
    dead.kill()
    dead.communicate(timeout=20)
    assert len(_temporaries(tmp_path)) == 2
    with io.staged(tmp_path / "engine"):
        assert len(_temporaries(tmp_path)) == 2  # the live one and this one
    live.terminate()
    live.communicate(timeout=20)
    assert not _temporaries(tmp_path)


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    with io.staged(tmp_path / "engine") as work:
        (work / "old").touch()
    (tmp_path / "engine").rename(tmp_path / ".engine.00000000.old")
    with pytest.raises(ValueError, match="x"), io.staged(tmp_path / "engine"):
        raise ValueError("x")
    assert (tmp_path / "engine" / "old").exists() and not _temporaries(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io.save(tiny.decoder(seed=0), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes(), (tmp_path / "weights.bin").read_bytes()

    def full(self: Any) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = tiny.decoder(seed=1)
    monkeypatch.setattr(ir.Tensor, "tobytes", full)
    with pytest.raises(InputError, match="disk is full") as caught:
        io.save(model, tmp_path / "m.onnx")
    assert f"{len(before[1])} free bytes" in caught.value.expected and "bytes are free" in caught.value.found
    assert ((tmp_path / "m.onnx").read_bytes(), (tmp_path / "weights.bin").read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
import tiny
from trtpass import io
from trtpass.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with io.staged(sys.argv[1]) as work:
        io.save(tiny.decoder(), work / "m.onnx")
except InputError as error:
    print(error)
"""


def test_writes_that_the_system_refuses(tmp_path: Path) -> None:
    """A real failing write (a limit on file size stands for the full disk) in the middle of the weights."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "engine"), str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "the disk is full while writing" in done.stdout and "weights.bin" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), io.staged(tmp_path / "file" / "engine"):
        pass
    with pytest.raises(InputError, match=r"cannot be written .*No such file"):
        io.save(tiny.decoder(), tmp_path / "absent" / "m.onnx")
