"""Building the library: what is said where nothing can build it, headers of one's own, and nothing half-made."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtpass import doctor, native, native_build
from trtpass.errors import TrtpassError


def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library has been built."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "lib" / "libtrtpass.so")
    monkeypatch.setattr(native, "ABOUT", tmp_path / "lib" / "libtrtpass.json")
    native.find.cache_clear()


@pytest.fixture(autouse=True)
def _found_again() -> object:
    yield
    native.find.cache_clear()


def test_no_compiler_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent(monkeypatch, tmp_path)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    native_build.main(None, None)  # returns: setup goes on
    said = capsys.readouterr().err
    assert "native kernels are not built" in said and "no C++ compiler (g++, clang++, c++)" in said
    assert not native.LIBRARY.parent.exists()


def test_no_headers_is_a_note_and_asking_for_them_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent(monkeypatch, tmp_path)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(native_build, "PLACES", (tmp_path / "nowhere",))
    native_build.main(None, None)
    assert "onnxruntime_c_api.h" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        native_build.main(tmp_path / "mine", None)
    assert stopped.value.code == 2 and str(tmp_path / "mine") in capsys.readouterr().err


def test_headers_of_ones_own_are_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / native_build.HEADER).write_text("")
    tools = native_build.toolchain(tmp_path, "clang++")
    assert tools == native_build.Toolchain("clang++", tmp_path.resolve())


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent(monkeypatch, tmp_path)
    native.LIBRARY.parent.mkdir()
    failing = tmp_path / "compiler"
    failing.write_text("#!/bin/sh\necho 'x.cc:1: error: this is not C++' >&2\nexit 1\n")
    failing.chmod(0o755)
    tools = native_build.Toolchain(str(failing), tmp_path)
    with pytest.raises(TrtpassError, match=r"error: this is not C\+\+"):
        native_build.build(tools)
    assert list(native.LIBRARY.parent.iterdir()) == []
    monkeypatch.setattr(native_build, "toolchain", lambda headers, compiler: tools)
    with pytest.raises(SystemExit) as stopped:
        native_build.main(None, None)
    assert stopped.value.code == 1 and "this is not C++" in capsys.readouterr().err


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent(monkeypatch, tmp_path)
    status, means, todo = doctor.PROBES["native kernels"]()
    assert status == doctor.MISSING and "has not been built: bodies of standard operators take their place" in means
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert "no C++ compiler" in doctor.PROBES["native kernels"]()[2]
    monkeypatch.setattr(
        native, "find", lambda: native.Library(tmp_path, ("A", "B"), ("avx2", "portable"), "a compiler")
    )
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    status, means, todo = doctor.PROBES["native kernels"]()
    assert (status, todo) == (doctor.OK, "")
    assert means == "2 operators, avx2 on this machine (compiled: avx2, portable)"


def test_the_registry_declares_what_the_operators_declare() -> None:
    text = native_build.registry(("avx2", "portable"))
    for op in native.operators().values():
        assert f'{{"{op.name}", {op.folder}_inputs, {len(op.inputs)}, {op.folder}_outputs, {len(op.outputs)}' in text
        assert f"{{trtpass_avx2_{op.folder}, trtpass_portable_{op.folder}}}" in text
    assert '{"window", true}' in text and '{"scale", false}' in text
