"""The native kernels of CoverageBudget and SelectTokens equal the reference, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_op import Array, in_torch, model_of

from plugins import all_ops
from plugins._cases import int32, mass
from trtpass import native
from trtpass.errors import InputError
from trtpass.native_build import isas
from trtpass.op import Case, Op

BUDGET, SELECT = all_ops()["CoverageBudget"], all_ops()["SelectTokens"]
POISON = -7777
THREADS = (1, 2)

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(params=list(isas()))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the library that this machine has, in force during the test."""
    try:
        native.force_isa(request.param)
    except InputError as error:
        pytest.skip(str(error))
    yield request.param
    native.force_isa(None)


def _run(
    op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any], threads: int, config: Mapping[str, str] | None = None
) -> list[Array]:
    """Outputs of the kernel, which the node prefers to its body, written over poison."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.LIBRARY))
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    model = model_of(op, "dynamic", inputs, attrs).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    made = op.output_shapes([x.shape for x in inputs], attrs)
    outputs = [np.full(made[port.name], POISON, np.int32) for port in op.outputs]
    binding = session.io_binding()
    for port, x in zip(op.inputs, inputs, strict=True):
        binding.bind_input(port.name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    for port, x in zip(op.outputs, outputs, strict=True):
        binding.bind_output(port.name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    session.run_with_iobinding(binding)
    return outputs


def _check(op: Op, inputs: Sequence[Array], attrs: Mapping[str, Any], **config: Any) -> None:
    inputs = [np.ascontiguousarray(x) for x in inputs]
    expected = in_torch(op, inputs, attrs)
    for threads in THREADS:
        made = _run(op, inputs, attrs, threads, **config)
        for port, mine, theirs in zip(op.outputs, made, expected, strict=True):
            where = f"{op.name}.{port.name}, {native.isa()}, {threads} threads"
            np.testing.assert_array_equal(mine, theirs, err_msg=where, strict=True)


def _every_isa(check: Callable[[], None]) -> None:
    """For drawn inputs, to which a fixture cannot be applied."""
    try:
        for name in isas():
            try:
                native.force_isa(name)
            except InputError:
                continue  # not on this machine: the cases above report it
            check()
    finally:
        native.force_isa(None)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in (BUDGET, SELECT)
        for case in (op.case_list() if op.case_list else ())
    ],
)
def test_every_case_equals_the_reference(op: Op, case: Case, isa: str) -> None:
    for seed in (0, 1):
        _check(op, case.make(seed), case.attrs)


LIMIT = np.float32(np.finfo(np.float32).max / 2)  # where scores are clipped
SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, LIMIT, -LIMIT, 3.4e38, -3.4e38, 0.5, 1.0],
    np.float32,
)


def _bits(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


def _special(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.choice(SPECIAL, shape)


def _few(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (rng.integers(-2, 3, shape) / 8).astype(np.float32)


def _heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.exp(rng.standard_normal(shape) * 4 - 4).astype(np.float32)


def _mostly_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.where(rng.random(shape) < 0.9, np.float32(0), _heavy(rng, shape)).astype(np.float32)


def _neighbours(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Floats whose bits differ in the last places, around 1 and around the limit."""
    centre = rng.choice(np.array([1.0, LIMIT], np.float32)).view(np.int32)
    return (centre + rng.integers(-40, 40, shape).astype(np.int32)).view(np.float32)


def _subnormal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    signs = rng.choice(np.array([-1, 1], np.float32), shape)
    return rng.integers(0, 200, shape).astype(np.uint32).view(np.float32) * signs


VALUES = (_bits, _special, _few, _heavy, _mostly_zero, _neighbours, _subnormal)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Batch, heads, tokens: often around the vectors, chunks and blocks that the kernels work in."""
    near = st.sampled_from([15, 16, 17, 64, 255, 256, 257, 512, 1023, 1024, 1025, 2048, 2900])
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.one_of(st.integers(1, 40), near))


@FUZZ
@given(shape=shapes(), values=st.sampled_from(VALUES), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_drawn_selections_equal_the_reference(
    shape: tuple[int, int, int], values: Callable[..., Array], seed: int, data: st.DataObject
) -> None:
    batch, _, tokens = shape
    rng = np.random.default_rng(seed)
    inputs = [
        values(rng, shape),
        int32(data.draw(st.lists(st.integers(-2, tokens + 2), min_size=batch, max_size=batch), label="keep")),
        int32(data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch), label="lengths")),
    ]
    attrs = {
        "window": data.draw(st.one_of(st.integers(0, tokens + 3), st.just(2**40)), label="window"),
        "max_keep_permille": data.draw(st.one_of(st.just(1000), st.integers(1, 1000)), label="permille"),
    }
    _every_isa(lambda: _check(SELECT, inputs, attrs))


@FUZZ
@given(shape=shapes(), values=st.sampled_from(VALUES), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_drawn_budgets_equal_the_reference(
    shape: tuple[int, int, int], values: Callable[..., Array], seed: int, data: st.DataObject
) -> None:
    batch, _, tokens = shape
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch), label="lengths")
    attrs = {
        "coverage_ppm": data.draw(st.one_of(st.integers(0, 999_999), st.sampled_from([0, 1, 999_999]))),
        "window": data.draw(st.one_of(st.integers(1, 20), st.integers(1, tokens + 3), st.just(2**31 + 1))),
        "min_tokens": data.draw(st.sampled_from([0, 0, 0, 5, tokens])),
        "prefix": data.draw(st.integers(0, 1)),
    }
    _every_isa(lambda: _check(BUDGET, [values(rng, shape), int32(lengths)], attrs))


@pytest.mark.parametrize("prefix", [0, 1])
def test_halves_of_the_fixed_point_are_rounded_to_even(prefix: int, isa: str) -> None:
    """With 2 heads and a window of 16 the unit is 2^25: these products are k + 1/2 exactly, also above 2^22."""
    rng = np.random.default_rng(0)
    for bits in (3, 12, 22, 23):  # k + 1/2 is a float up to k = 2^23
        doubled = 2 * rng.integers(0, 2**bits, (1, 2, 700)) + 1
        values = np.ldexp(doubled.astype(np.float32), -26)
        for coverage in (1, 20_000, 300_000, 500_000, 700_000):
            attrs = {"coverage_ppm": coverage, "window": 16, "min_tokens": 0, "prefix": prefix}
            _check(BUDGET, [values, int32([700])], attrs)


def test_a_long_row_of_a_real_mass_equals_the_reference(isa: str) -> None:
    values = mass(3, 9, 8192, [8192, 5000])
    lengths = int32([8192, 5000])
    for coverage in (5_000, 50_000):
        _check(BUDGET, [values, lengths], {"coverage_ppm": coverage})
    for keep in (129, 4096, 8000):
        _check(SELECT, [values, int32([keep, keep // 2]), lengths], {"window": 128})


def test_subnormal_scores_count_where_the_processor_flushes_them(isa: str) -> None:
    values = _subnormal(np.random.default_rng(5), (2, 3, 300))
    flush = {"session.set_denormal_as_zero": "1"}
    _check(SELECT, [values, int32([100, 20]), int32([300, 40])], {"window": 8}, config=flush)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (1, 1, 1)])
def test_nothing_to_select_from(shape: tuple[int, int, int], isa: str) -> None:
    lengths = int32([shape[2]] * shape[0])
    _check(SELECT, [np.zeros(shape, np.float32), lengths, lengths], {})
    _check(BUDGET, [np.zeros(shape, np.float32), lengths], {"window": 4, "min_tokens": 0})


VALUES_OF_ONE = np.ones((2, 3, 20), np.float32)


@pytest.mark.parametrize("length", [-1, 21, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("op", [BUDGET, SELECT], ids=lambda op: op.name)
def test_a_length_out_of_range_is_an_error(op: Op, length: int, isa: str) -> None:
    keep = [int32([5, 5])] if op is SELECT else []
    message = rf"{op.name}\.lengths holds {length}; expected 0 to S = 20"
    for threads in THREADS:
        with pytest.raises(RuntimeError, match=message):
            _run(op, [VALUES_OF_ONE, *keep, int32([20, length])], {}, threads)


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [
        (BUDGET, {"coverage_ppm": -1}, "CoverageBudget.coverage_ppm is -1; expected 0 to 999999"),
        (BUDGET, {"coverage_ppm": 10**6}, "CoverageBudget.coverage_ppm is 1000000; expected 0 to 999999"),
        (BUDGET, {"window": 0}, "window=0, min_tokens=1024; expected window >= 1"),
        (BUDGET, {"min_tokens": -1}, "window=128, min_tokens=-1; expected window >= 1, min_tokens >= 0"),
        (SELECT, {"max_keep_permille": 0}, "SelectTokens.max_keep_permille is 0; expected 1 to 1000"),
        (SELECT, {"max_keep_permille": 1001}, "SelectTokens.max_keep_permille is 1001; expected 1 to 1000"),
        (SELECT, {"window": -1}, "SelectTokens.window is -1; expected 0 or more"),
    ],
)
def test_an_attribute_that_the_reference_refuses_is_an_error(op: Op, attrs: dict[str, int], message: str) -> None:
    inputs = [VALUES_OF_ONE, *([int32([5, 5])] if op is SELECT else []), int32([20, 20])]
    with pytest.raises(InputError):
        in_torch(op, inputs, attrs)
    with pytest.raises(RuntimeError, match=message):
        _run(op, inputs, attrs, threads=1)
