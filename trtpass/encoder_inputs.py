"""Inputs of a graph that is no decoder: their types, their open sizes, and arrays to check it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trtpass.errors import InputError
from trtpass.ir import dims

PROBE_ROWS = 2
LARGEST = 1 << 20  # of a size that a user gives


@dataclass(frozen=True)
class Port:
    """An input or output: its dtype, and its shape as sizes and symbols (a size without a name is ``?``)."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


def ports(values: Sequence[ir.Value]) -> dict[str, Port]:
    """Inputs or outputs of a graph, in order.

    Raises:
        InputError: a value without dtype or rank.
    """
    found = {}
    for value in values:
        shape = dims(value)
        if value.dtype is None or shape is None:
            raise InputError(f"'{value.name}' has no type or no rank", "typed inputs and outputs", "export it again")
        found[str(value.name)] = Port(value.dtype.numpy(), tuple("?" if d is None else d for d in shape))
    return found


def words(named: Mapping[str, Port]) -> str:
    """``x float32 [batch, 3, 224, 224]; ...``."""
    return "; ".join(f"{name} {port}" for name, port in named.items())


def checked(
    feed: Mapping[str, Any], wanted: Mapping[str, Port], where: str = "the inputs given"
) -> dict[str, np.ndarray]:
    """``feed`` as contiguous arrays, if they are what ``wanted`` asks for; a symbol is one size everywhere.

    Raises:
        InputError: a missing or unknown name, another dtype, a shape that does not fit, or an empty array.
    """
    if not isinstance(feed, Mapping) or set(feed) != set(wanted):
        given = ", ".join(map(str, feed)) if isinstance(feed, Mapping) else type(feed).__name__
        raise InputError(f"{where} are {given or 'none'}", words(wanted))
    arrays, sizes = {}, dict[str, tuple[int, str]]()
    for name, port in wanted.items():
        array = np.asarray(feed[name])
        if array.dtype != port.dtype:
            raise InputError(
                f"{where}: '{name}' is {array.dtype}", str(port), f"convert it with .astype('{port.dtype}')"
            )
        fixed = [want if isinstance(want, int) else have for have, want in zip(array.shape, port.shape, strict=False)]
        if len(array.shape) != len(port.shape) or list(array.shape) != fixed or 0 in array.shape:
            raise InputError(f"{where}: '{name}' has shape {list(array.shape)}", str(port))
        for have, want in zip(array.shape, port.shape, strict=True):
            size, owner = (
                sizes.setdefault(want, (have, name)) if isinstance(want, str) and want != "?" else (have, name)
            )
            if size != have:
                raise InputError(f"{where}: '{want}' is {size} in '{owner}' and {have} in '{name}'", "one size")
        arrays[name] = np.ascontiguousarray(array)
    return arrays


def name_sizes(model: ir.Model) -> None:
    """Give every unnamed size of an input a name, in place: ``batch`` on axis 0, else ``<input>.<axis>``."""
    for value in model.graph.inputs:
        shape = dims(value)
        if shape is not None:
            names = ["batch" if axis == 0 else f"{value.name}.{axis}" for axis in range(len(shape))]
            value.shape = ir.Shape([name if d is None else d for name, d in zip(names, shape, strict=True)])


def symbols(model: ir.Model) -> dict[str, bool]:
    """Names of the symbolic sizes of the inputs, in order, and whether each is that of a batch (axis 0)."""
    found: dict[str, bool] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(dims(value) or []):
            if not isinstance(size, int):
                found[str(size)] = found.get(str(size), False) or axis == 0
    return found


def choices(model: ir.Model, asked: Mapping[str, Sequence[int]], batch: int = 1) -> list[dict[str, int]]:
    """Every choice of sizes that ``asked`` names, in its order; a batch that it does not name is ``batch``.

    Raises:
        InputError: a size that the graph does not have, that is not given, or that is out of range.
    """
    have = symbols(model)
    for name, numbers in asked.items():
        if name not in have:
            raise InputError(f"size {name}", f"one of the graph's symbolic sizes: {', '.join(have) or 'it has none'}")
        if not numbers or any(not 1 <= n <= LARGEST for n in numbers):
            raise InputError(f"size {name}={'+'.join(map(str, numbers))}", f"numbers from 1 to {LARGEST}")
    lacking = [name for name, first in have.items() if not first and name not in asked]
    if lacking:
        raise InputError(
            f"the graph leaves {', '.join(lacking)} open: {words(ports(model.graph.inputs))}",
            "a number for each size but the batch",
            f"give --size {lacking[0]}=64, or --inputs with arrays to check with",
        )
    numbered = {name: tuple(dict.fromkeys(asked.get(name, (batch,)))) for name in have}
    return [dict(zip(numbered, numbers, strict=True)) for numbers in product(*numbered.values())]


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy with numbers in place of symbolic sizes, in every shape that follows from them."""
    copy = model.clone()
    for value in [*copy.graph.inputs, *(v for node in copy.graph.all_nodes() for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(str(d), d) if not isinstance(d, int) else d for d in dims(value) or []])
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    return copy


@dataclass(frozen=True)
class Probe:
    """Arrays for every input, to check a graph with, and where they are from, in words."""

    feed: dict[str, np.ndarray]
    origin: str

    def words(self) -> str:
        """``2x3x224x224 of the recipe's examples``."""
        return " and ".join("x".join(map(str, a.shape)) or "one" for a in self.feed.values()) + f", {self.origin}"


def noise(model: ir.Model, sizes: Mapping[str, Sequence[int]]) -> Probe:
    """Seeded inputs of two rows: normal numbers; rows of the table that integers are looked up in; ones for the rest.

    Raises:
        InputError: a size that stays open.
    """
    open_sizes = {name: tuple(n)[:1] for name, n in sizes.items() if not symbols(model).get(name, False)}
    (chosen,) = choices(model, open_sizes, PROBE_ROWS)
    rng = np.random.default_rng(0)
    feed = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else chosen[str(d)] for d in dims(value) or []]
        dtype = ports([value])[str(value.name)].dtype
        rows = _table(value)
        if dtype.kind == "f":
            feed[str(value.name)] = rng.standard_normal(shape).astype(dtype)
        elif rows is not None:
            feed[str(value.name)] = rng.integers(0, rows, shape).astype(dtype)
        else:
            feed[str(value.name)] = np.ones(shape, dtype)
    return Probe(feed, "seeded noise")


def _table(value: ir.Value) -> int | None:
    """Rows of the embedding table that ``value`` is looked up in, if it is."""
    for node, index in value.uses():
        table = node.inputs[0] if node.op_type == "Gather" and index == 1 else None
        if table is not None and table.const_value is not None:
            return int(table.const_value.shape[0])  # type: ignore[arg-type]
    return None


def read_probe(path: Path, model: ir.Model) -> Probe:
    """The arrays of an ``.npz`` file.

    Raises:
        InputError: not such a file, or arrays that do not fit the graph.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise InputError(
            f"'{path}' cannot be read as arrays: {str(error)[:200]}", "an .npz file with an array for each input",
            "write one with numpy.savez",
        ) from error  # fmt: skip
    return Probe(checked(arrays, ports(model.graph.inputs), f"the arrays of '{path.name}'"), path.name)


def stored_probe(path: Path, model: ir.Model) -> Probe:
    """The arrays of an engine's ``inputs.json``, which is Polygraphy's own form.

    Raises:
        InputError: a file that is not in this form, or arrays that do not fit the graph.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            (feed,) = load_json(str(path))
    except (OSError, ValueError, TypeError, KeyError, PolygraphyException) as error:
        raise InputError(
            f"'{path}' cannot be read: {str(error)[:200]}", "Polygraphy's inputs", "build again"
        ) from error
    return Probe(checked(feed, ports(model.graph.inputs), f"the arrays of '{path.name}'"), "the inputs of the build")
