"""Every native kernel through ONNX Runtime: equal to its reference on any threads, layout and instruction set."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_check import OPERATORS, bound, cases, check, isas, layouts, library, made, same_bits, session
from native_driver import Array
from one_op import in_torch

from trtpass import native, native_build
from trtpass.errors import InputError
from trtpass.op import Case, Op


@pytest.fixture(autouse=True)
def _best_isa_afterwards() -> Iterator[None]:
    yield
    if not isinstance(native.find(), str):
        native.force_isa(None)


@pytest.mark.parametrize(("op", "case"), cases())
def test_kernel_equals_the_reference(op: Op, case: Case) -> None:
    """On every instruction set of this machine; the bits depend on neither the threads nor the layout."""
    inputs, expected = made(case), in_torch(op, made(case), case.attrs)
    variants = list(itertools.product(layouts(op), (1, 2)))
    sessions = [session(op, inputs, case.attrs, domain, threads) for domain, threads in variants]
    for isa in isas():
        native.force_isa(isa)
        first: list[Array] = []
        for (domain, threads), one in zip(variants, sessions, strict=True):
            actual = bound(one, op, inputs, case.attrs, domain == native.SWAPPED)
            if not first:
                check(op, inputs, actual, expected)
                first = actual
            assert same_bits(first, actual), f"{isa}: {domain} with {threads} threads differs from the first"


@pytest.mark.parametrize("op", OPERATORS)
def test_there_are_cases_in_every_floating_type(op: Op) -> None:
    assert op.case_list
    wanted = {dtype for port in op.inputs for dtype in port.dtypes if dtype.startswith("float")}
    assert {str(x.dtype) for case in op.case_list() for x in case.make(0) if x.dtype.kind == "f"} == wanted


@pytest.mark.parametrize("op", OPERATORS)
def test_kernel_takes_the_place_of_the_body_only_where_it_is_registered(op: Op, tmp_path: Path) -> None:
    assert op.case_list
    case = next(case for case in op.case_list() if not case.slow)
    inputs, expected = made(case), in_torch(op, made(case), case.attrs)
    for registered in (True, False):
        one = session(op, inputs, case.attrs, registered=registered, profile=str(tmp_path / str(registered)))
        names = {port.name: x for port, x in zip(op.inputs, inputs, strict=True)}
        actual = one.run(None, names)
        check(op, inputs, [_widened(a, e) for a, e in zip(actual, expected, strict=True)], expected)
        events = json.loads(Path(one.end_profiling()).read_text())
        ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
        assert (ran == {op.name}) if registered else (op.name not in ran), ran


def _widened(actual: Array, expected: Array) -> Array:
    """A body may cut C to the largest count: what it left out, as the reference fills it."""
    if actual.shape == expected.shape:
        return actual
    out = expected.copy()
    out[tuple(slice(0, n) for n in actual.shape)] = actual
    return out


@pytest.mark.parametrize("op", OPERATORS)
def test_two_sessions_at_once(op: Op) -> None:
    """Twenty rounds from two Python threads, each with a session and a case of its own."""
    assert op.case_list
    chosen = [case for case in op.case_list() if not case.slow][-2:]
    expected: list[list[Array]] = []
    found: list[list[list[Array]]] = [[], []]
    runs = []
    for case in chosen:
        inputs = made(case)
        one = session(op, inputs, case.attrs, threads=2)
        expected.append(bound(one, op, inputs, case.attrs))
        runs.append((one, inputs, case.attrs))
    start = threading.Barrier(2)

    def work(number: int) -> None:
        one, inputs, attrs = runs[number]
        start.wait()
        found[number].extend(bound(one, op, inputs, attrs) for _ in range(20))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, results in zip(expected, found, strict=True):
        assert len(results) == 20
        assert all(same_bits(outputs, result) for result in results)


@pytest.mark.parametrize("op", OPERATORS)
def test_an_error_of_a_kernel_says_what_was_expected(op: Op) -> None:
    """Two sizes for one name, which ONNX Runtime does not see, through the whole of the library."""
    assert op.case_list
    case = op.case_list()[0]
    wrong = made(case)
    at, axis = next(
        (at, axis)
        for at, port in enumerate(op.inputs)
        for axis, name in enumerate(port.axes)
        if any(name in earlier.axes for earlier in op.inputs[:at])
    )
    wrong[at] = np.repeat(wrong[at], 3, axis)
    one = session(op, wrong, case.attrs)
    names = {port.name: x for port, x in zip(op.inputs, wrong, strict=True)}
    with pytest.raises(Exception, match=rf"{op.name}\.{op.inputs[at].name} has .*; expected one size for one name"):
        one.run(None, names)


def test_instruction_sets() -> None:
    assert isas()[-1] == "portable"
    for name in isas():
        native.force_isa(name)
        assert native.isa() == name
    native.force_isa(None)
    assert native.isa() == isas()[0]
    with pytest.raises(InputError, match="instruction set 'mmx'"):
        native.force_isa("mmx")
    assert native.isa() == isas()[0]


def test_the_library_has_every_kernel() -> None:
    assert set(library().operators) == set(native.operators())
    assert library().isas == tuple(native_build.isas())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a library, empty."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libtrtpass.so")
    monkeypatch.setattr(native, "ABOUT", tmp_path / "libtrtpass.json")
    native.find.cache_clear()
    native._loaded.cache_clear()
    yield tmp_path
    native.find.cache_clear()
    native._loaded.cache_clear()


def _about(**changes: Any) -> str:
    about = {"fingerprint": native.fingerprint(), "operators": [], "isas": ["portable"], "compiler": "none"}
    return json.dumps({**about, **changes})


@pytest.mark.parametrize(
    ("library_file", "about", "reason"),
    [
        (None, None, "has not been built"),
        (b"", None, "has not been built"),
        (b"", "{", "is not readable"),
        (b"", "{}", "is not readable"),
        (b"", "[]", "is not readable"),
        (b"", "null", "is not readable"),
        (b"", '{"operators": 1, "isas": [], "compiler": ""}', "is not readable"),
        (b"", "stale", "was built from other sources"),
        (b"no library", "fresh", "does not load"),
    ],
)
def test_find_says_why_there_is_no_library(
    elsewhere: Path, library_file: bytes | None, about: str | None, reason: str
) -> None:
    texts = {"stale": _about(fingerprint="0" * 16), "fresh": _about()}
    if library_file is not None:
        native.LIBRARY.write_bytes(library_file)
    if about is not None:
        native.ABOUT.write_text(texts.get(about, about))
    found = native.find()
    assert isinstance(found, str)
    assert reason in found and native.BUILD in found
    assert native.fits(next(iter(native.operators().values())), {}) == found
    for use in (native.need, native.isa, lambda: native.force_isa(None)):
        with pytest.raises(InputError) as caught:
            use()
        assert caught.value.fix == native.BUILD and native.BUILD not in caught.value.found


def test_a_library_that_another_file_describes(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources changed, and only the description was written anew."""
    monkeypatch.undo()
    native.find.cache_clear()
    real = library().path.read_bytes()
    monkeypatch.setattr(native, "LIBRARY", elsewhere / "libtrtpass.so")
    monkeypatch.setattr(native, "ABOUT", elsewhere / "libtrtpass.json")
    monkeypatch.setattr(native, "fingerprint", lambda: "0" * 16)
    native.find.cache_clear()
    native._loaded.cache_clear()
    native.LIBRARY.write_bytes(real)
    native.ABOUT.write_text(_about())
    found = native.find()
    assert isinstance(found, str) and "is not the one that libtrtpass.json describes" in found


def test_a_toolchain_that_is_not_there(tmp_path: Path) -> None:
    assert "no C++ compiler (no-such-compiler)" in str(native_build.toolchain(compiler="no-such-compiler"))
    assert f"is not in {tmp_path}" in str(native_build.toolchain(headers=tmp_path))


def test_outputs_of_a_kernel_may_be_left_to_the_runtime() -> None:
    """Not bound by the caller: the same."""
    for op in native.operators().values():
        assert op.case_list
        case = op.case_list()[0]
        inputs = made(case)
        one = session(op, inputs, case.attrs)
        free = one.run(None, {port.name: x for port, x in zip(op.inputs, inputs, strict=True)})
        assert same_bits([np.asarray(x) for x in free], bound(one, op, inputs, case.attrs))
