"""Every native kernel under sanitizers, with its cases and with random inputs, right and wrong; and what is linked."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from native_check import OPERATORS, cases, check, isas, layouts, made, same_bits, tools
from native_driver import Driver, Refused, built, encoded
from native_fuzz import GENERATORS, request
from one_op import in_torch

from trtpass import native, native_build
from trtpass.op import Case, Op

TOTAL = 10_000  # random requests over all operators, at least
EACH = max(500, -(-TOTAL // max(1, len(OPERATORS))))


@functools.cache
def program(flavour: str) -> Path:
    """A driver of the sources as they were when it was first asked for."""
    return built(flavour, tools())


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_cases_are_clean_under_address_and_undefined(op: Op) -> None:
    assert op.case_list
    with Driver(program("sanitized")) as driver:
        for case in op.case_list():
            expected = in_torch(op, made(case), case.attrs)
            for isa in isas():
                for swapped in range(len(layouts(op))):
                    one, three = (driver.run(op, made(case), case.attrs, isa, n, bool(swapped)) for n in (1, 3))
                    check(op, made(case), one, expected)
                    assert same_bits(one, three), f"{case.name} on {isa} depends on the number of threads"


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), cases(slow=False))
def test_cases_are_clean_under_thread(op: Op, case: Case) -> None:
    with Driver(program("threads")) as driver:
        check(op, made(case), driver.run(op, made(case), case.attrs, threads=3), in_torch(op, made(case), case.attrs))


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """Small references are several times slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_there_are_enough_random_requests() -> None:
    assert EACH * len(OPERATORS) >= TOTAL


@pytest.mark.parametrize("op", OPERATORS)
def test_there_is_a_generator(op: Op) -> None:
    assert op.name in GENERATORS, f"{op.folder}/kernel.cc has no random inputs: add a pair to native_fuzz.GENERATORS"


@pytest.mark.slow
@pytest.mark.usefixtures("_one_torch_thread")
@pytest.mark.parametrize("op", OPERATORS)
def test_random_requests(op: Op) -> None:
    """Each under sanitizers and as it is shipped: the reference's result, or an error that says what was expected.

    To see one again: ``native_fuzz.request(op, number)``.
    """
    names, both = isas(), len(layouts(op))
    with Driver(program("sanitized")) as sanitized, Driver(program("plain")) as plain:
        for number in range(EACH):
            asked = request(op, number)
            isa, swapped = names[number % len(names)], bool(number // 3 % both)
            where = f"{op.name} request {number} ({asked.wrong or 'valid'}), {isa}, {[x.shape for x in asked.inputs]}"
            try:
                found = [
                    driver.run(op, asked.inputs, asked.attrs, isa, threads, swapped)
                    for driver, threads in ((sanitized, 1 + number % 3), (plain, 1 + number % 2))
                ]
            except Refused as error:
                assert asked.wrong, f"{where} is refused: {error}"
                assert "expected" in str(error), f"{where}: {error}"
                with pytest.raises(Refused, match=re.escape(str(error))):
                    plain.run(op, asked.inputs, asked.attrs, isa, 1, swapped)
                continue
            except AssertionError as error:
                raise AssertionError(f"{where}, {dict(asked.attrs)}: {error}") from error
            assert not asked.misshapen, f"{where}: accepted"
            try:
                expected = in_torch(op, asked.inputs, asked.attrs)
            except Exception as error:
                raise AssertionError(f"{where}: accepted, but the reference has no result: {error}") from error
            for outputs in found:
                try:
                    check(op, asked.inputs, outputs, expected, asked.unreal)
                except AssertionError as error:
                    raise AssertionError(f"{where}, {dict(asked.attrs)}: {error}") from error
        assert sanitized.requests == plain.requests == EACH


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_damaged_requests(op: Op) -> None:
    """Bytes of a request changed, cut off or added: any answer, but the process lives and answers the next one."""
    assert op.case_list
    case = op.case_list()[0]
    whole = encoded(op, made(case), case.attrs)
    expected = in_torch(op, made(case), case.attrs)
    rng = np.random.default_rng(0)
    with Driver(program("sanitized")) as driver:
        for _ in range(300):
            damaged = bytearray(whole)
            for at in rng.integers(min(len(whole), 400), size=rng.integers(1, 4)):
                damaged[at] = rng.integers(256)
            if rng.random() < 0.2:
                damaged = damaged[: rng.integers(len(damaged))]
            with contextlib.suppress(Refused):
                driver.ask(bytes(damaged))
        check(op, made(case), driver.run(op, made(case), case.attrs), expected)


def test_the_driver_refuses_what_makes_no_sense() -> None:
    op = next(iter(native.operators().values()))
    assert op.case_list
    case = op.case_list()[0]
    good = encoded(op, made(case), case.attrs)
    with Driver(program("sanitized")) as driver:
        for wrong, message in (
            (b"", "ends too early"),
            (good[:-1], "expected"),
            (good + b"x", "goes on for 1 bytes"),
            (good.replace(op.name.encode(), b"x" * len(op.name)), "is no operator"),
            (encoded(op, made(case), case.attrs, isa="mmx"), "no instruction set of this machine"),
            (encoded(op, made(case), case.attrs, threads=0), "expected 1 to"),
            (encoded(op, made(case)[:-1], case.attrs), "inputs; expected"),
        ):
            with pytest.raises(Refused, match=message):
                driver.ask(wrong)
        huge = made(case)
        huge[0] = np.broadcast_to(huge[0][:1], (2**25, *huge[0].shape[1:]))[:, :0] if huge[0].ndim > 1 else huge[0]
        with pytest.raises(Refused, match="an axis has 33554432 places; expected"):
            driver.run(op, huge, case.attrs)


def test_code_of_an_instruction_set_is_in_names_of_its_own() -> None:
    """A function that two files share is linked once, from either: of one set's objects none may be shared with others.

    Only symbols that may come from several objects count (nm: weak and unique); the others are the file's own.
    """
    folder = program("plain").parent
    for op in native.operators().values():
        for isa in native_build.isas():
            listed = subprocess.run(
                ["nm", "--defined-only", str(folder / f"{op.folder}.{isa}.o")],
                capture_output=True,
                text=True,
                check=True,
            )
            symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
            assert ["T", f"trtpass_{isa}_{op.folder}"] in symbols
            own = f"7trtpass{len(isa)}{isa}"  # mangled: namespace trtpass, then the set's
            shared = [name for kind, name in symbols if kind in "WwVvu" and own not in name]
            assert not shared, (
                f"{op.folder}/kernel.cc for {isa} shares {shared}: inline them or move them into the namespace"
            )
            public = [name for kind, name in symbols if kind == "T" and name != f"trtpass_{isa}_{op.folder}"]
            assert not public, f"{op.folder}/kernel.cc for {isa} defines {public}: put them into an anonymous namespace"
