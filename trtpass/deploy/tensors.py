"""The inputs and outputs of a graph as Triton declares them, and whether requests can share a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trtpass.deploy.pbtxt import Config, Enum
from trtpass.errors import InputError
from trtpass.ir import dims

ANY = "?"  # a size without a name: nothing is known about it
TYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "DOUBLE": "FP64", "BOOL": "BOOL", "STRING": "STRING",
    **{f"{sign}INT{bits}": f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor: its name, Triton's type without ``TYPE_``, and its sizes, numbers or names."""

    name: str
    type: str
    shape: tuple[int | str, ...]


def specs(values: Sequence[ir.Value]) -> list[Spec]:
    """Inputs or outputs of a graph, in order.

    Raises:
        InputError: a value without a rank, or of a type that Triton does not have.
    """
    found = []
    for value in values:
        shape = dims(value)
        kind = None if value.dtype is None else TYPES.get(value.dtype.name)
        if shape is None or kind is None:
            raise InputError(
                f"'{value.name}' is {value.dtype} {shape}", f"a tensor of {', '.join(TYPES)}, of known rank"
            )
        found.append(Spec(str(value.name), kind, tuple(_size(d) for d in shape)))
    return found


def _size(size: Any) -> int | str:
    return ANY if size is None else size if isinstance(size, int) else str(size)


def batches(inputs: Sequence[Spec], outputs: Sequence[Spec]) -> bool:
    """Whether requests can share one run: axis 0 has the same open size in every tensor, and no other size of an
    output is open that the inputs do not have. Such a size (how many tokens were kept) may depend on the other rows."""
    every = [*inputs, *outputs]
    first = {spec.shape[0] if spec.shape else ANY for spec in every}
    if len(first) != 1 or ANY in first or not isinstance(next(iter(first)), str):
        return False
    known = {d for spec in inputs for d in spec.shape}
    inner = [d for spec in every for d in spec.shape[1:]]
    return all(isinstance(d, int) or (d != ANY and d in known and d not in first) for d in inner)


def declared(tensors: Iterable[Spec], batched: bool, reshape: bool) -> list[Config]:
    """``input`` or ``output`` of a configuration.

    Triton has no tensor without sizes beside the batch: it gets the size 1.

    Args:
        tensors: of the graph.
        batched: axis 0 is Triton's batch, which is not declared.
        reshape: tell the server to leave that size out again for the backend.
    """
    made = []
    for spec in tensors:
        own = spec.shape[1:] if batched else spec.shape
        one: Config = {
            "name": spec.name, "data_type": Enum(f"TYPE_{spec.type}"),
            "dims": [d if isinstance(d, int) else -1 for d in own] or [1],
        }  # fmt: skip
        if not own and reshape:
            one["reshape"] = {"shape": []}
        made.append(one)
    return made


def warm_up(inputs: Sequence[Spec], batched: bool, sizes: dict[str, Any]) -> list[Config]:
    """``model_warmup``: one request, or none where a size is open. Zeros for integers, noise for the rest.

    Args:
        sizes: numbers for the open sizes.
    """
    tensors = []
    for spec in inputs:
        own = [d if isinstance(d, int) else sizes.get(d) for d in (spec.shape[1:] if batched else spec.shape)]
        if None in own or spec.type == "STRING":
            return []
        data = "random_data" if spec.type.startswith(("FP", "BF")) else "zero_data"
        value = {"data_type": Enum(f"TYPE_{spec.type}"), "dims": own or [1], data: True}
        tensors.append({"key": spec.name, "value": value})
    return [{"name": "first", "batch_size": 1, "inputs": tensors}]
