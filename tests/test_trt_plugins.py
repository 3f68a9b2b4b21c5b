"""NVIDIA's own plugin code accepts the functions derived from each kernel's declaration, and gets what was declared."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="kernels are written in Triton")

from nvidia_api import Expression, Instance, tensorrt  # noqa: E402

from plugins import kernel_ops  # noqa: E402
from trtpass.launch import arguments, dtypes_of  # noqa: E402
from trtpass.op import Op  # noqa: E402
from trtpass.ptx import compile_ahead  # noqa: E402
from trtpass.trt.plugins import bits, decode, derive, encode, from_bits, register, usable, ways  # noqa: E402

CC = 90
ENUM = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32"}
OPS = [pytest.param(op, id=name) for name, op in kernel_ops().items()]


@pytest.fixture(scope="module")
def trt() -> Iterator[Any]:
    with tensorrt() as module:
        register(list(kernel_ops().values()), module, CC)
        yield module


def of_example(op: Op, trt: Any, dtype: str) -> tuple[Instance, list[Any], list[list[int]], dict[str, Any]]:
    """A node of the operator, described to the builder: types and shapes of inputs and outputs."""
    kernel = (op.kernel_list() if op.kernel_list else ())[0]
    example = kernel.example(8192)
    node = Instance(trt, f"trtpass::{op.name}", encode(op, example.attrs))
    shapes = [[example.sizes[axis] for axis in port.axes] for port in op.inputs]
    made = op.output_shapes(shapes, example.attrs)
    types = vars(dtypes_of(op, dtype))
    kinds = [getattr(trt.DataType, ENUM[types[port.name]]) for port in (*op.inputs, *op.outputs)]
    count = len(op.inputs)
    assert node.output_types(kinds[:count], [len(s) for s in shapes]) == kinds[count:]
    symbols = [
        [Expression(size, axis in kernel.fixed) for axis, size in zip(port.axes, shape, strict=True)]
        for port, shape in zip(op.inputs, shapes, strict=True)
    ]
    assert node.output_shapes(symbols) == [list(made[port.name]) for port in op.outputs]
    return node, kinds, [*shapes, *(list(made[port.name]) for port in op.outputs)], dict(example.attrs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_a_builder_gets_what_the_declaration_says(op: Op, dtype: str, trt: Any) -> None:
    node, kinds, shapes, attrs = of_example(op, trt, dtype)
    count = len(op.inputs)
    dims = op.bind(shapes[:count])
    assert node.combinations(kinds, shapes, count) == kinds  # one combination, of the types that the network has
    tactics = node.tactics(kinds, shapes, count)
    assert tactics == usable(op, dims, attrs, dtype, CC)
    for source, output in ((s, o) for o, s in op.aliases.items()):
        position = [port.name for port in op.outputs].index(output)
        assert node.plugin.get_aliased_input(position) == [port.name for port in op.inputs].index(source)
    for number in tactics[: None if dtype == "float16" else 1]:
        launch, extras, name, ptx = node.kernel(number, kinds, shapes, count)
        kernel, tactic = ways(op)[number - 1]
        how = kernel.geometry(*arguments(op, dims, attrs, dtype, kernel.tactics[tactic]))
        made = compile_ahead(op, kernel, dims, attrs, dtype, CC, tactic)
        assert (launch.grid_x, launch.grid_y, launch.grid_z) == how.grid
        assert (launch.block_x, launch.block_y, launch.block_z) == (made.threads, 1, 1)
        assert launch.shared_mem == made.shared
        assert extras == list(how.extras)
        assert (name, ptx) == (made.name, made.ptx)
        assert not re.search(r"^\s*\.(file|loc)\b|\.debug", ptx, re.M), "a plan would carry paths of this machine"
        assert len(made.parameters) == count + len(extras) + len(op.outputs)


@pytest.mark.parametrize("op", OPS)
def test_signatures_say_what_the_schema_says(op: Op, trt: Any) -> None:
    plugin = derive(op, trt, CC)
    names = [*(port.name for port in op.inputs), *encode(op, {})]
    assert list(inspect.signature(plugin.describe).parameters) == names
    assert list(inspect.signature(plugin.autotune).parameters) == [*names, "outputs"]
    assert list(inspect.signature(plugin.aot_impl).parameters) == [*names, "outputs", "tactic"]


def test_the_validators_do_validate(trt: Any) -> None:
    """A signature that is not the schema's is refused, so the tests above can fail."""
    plugin = derive(kernel_ops()["TokenSparseAttention"], trt, CC)
    with pytest.raises(ValueError, match="already has a defin"):
        trt.plugin.register("trtpass::TokenSparseAttention")(plugin.describe)
    trt.plugin.register("trtpass_test::Other")(plugin.describe)
    with pytest.raises(ValueError, match="does not match the expected input arg schema"):
        trt.plugin.aot_impl("trtpass_test::Other")(plugin.autotune)
    with pytest.raises(ValueError, match="Unexpected attribute 'tactic'"):
        trt.plugin.autotune("trtpass_test::Other")(plugin.aot_impl)

    def untyped(q, k):  # type: ignore[no-untyped-def]
        return q

    with pytest.raises(ValueError, match="does not have a type annotation"):
        trt.plugin.register("trtpass_test::Untyped")(untyped)


def test_a_call_that_no_kernel_takes_says_why(trt: Any) -> None:
    op = kernel_ops()["TokenSparseAttention"]
    sizes = {**ways(op)[0][0].example(8192).sizes, "D": 512}
    assert usable(op, sizes, {}, "float16", CC) == "head width 512 is above 128"
    assert usable(op, sizes, {}, "float16", 75) == "compute capability 75 is below 80"


@pytest.mark.parametrize("value", [0.0, 0.125, -1.5, 3.4e38, 0.1])
def test_floats_travel_as_their_bits(value: float) -> None:
    assert from_bits(bits(value)) == pytest.approx(value, rel=1e-7)
    op = kernel_ops()["TokenSparseAttention"]
    assert decode(op, encode(op, {"scale": value}))["scale"] == from_bits(bits(value))
