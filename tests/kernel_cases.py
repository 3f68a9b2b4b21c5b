"""Every kernel, tactic and step with every case of its operator, and how one runs among guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from plugins import all_ops
from trtpass.kernel import Kernel
from trtpass.launch import dtypes_of, floating_of, launch, run_steps
from trtpass.op import Case, Op
from trtpass.ptx import supports

GUARD = 4096  # elements before and after every tensor; a multiple of 16 bytes
BFLOAT16 = 2  # cases of each operator that are tried in bfloat16 too


@dataclass(frozen=True)
class Trial:
    """One launch: a kernel with one of its tactics, on the inputs that ``make`` gives."""

    name: str
    op: Op
    kernel: Kernel
    tactic: int
    make: Callable[[], Sequence[torch.Tensor]]
    attrs: dict[str, Any]

    @property
    def applies(self) -> bool:
        """Whether the tactic does, on the GPU that takes most of them."""
        dims = self.op.bind([tuple(x.shape) for x in self.make()])
        return supports(self.op, self.kernel, dims, self.attrs, self.floating, 90, self.tactic) is True

    @property
    def floating(self) -> str:
        return floating_of(self.op, [str(x.dtype).removeprefix("torch.") for x in self.make()])


def outputs_of(op: Op, inputs: Sequence[torch.Tensor], attrs: Any) -> tuple[torch.Tensor, ...]:
    """The reference."""
    made = op(*inputs, **attrs)
    return made if isinstance(made, tuple) else (made,)


def tensors(op: Op, case: Case, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The inputs of a case, floating ports in ``dtype`` if that is given."""
    found = [torch.from_numpy(x) for x in case.make(0)]
    return [x.to(dtype) if dtype and port.floating else x for port, x in zip(op.inputs, found, strict=True)]


def kernels() -> list[Any]:
    """Each operator, steps included, with each of its kernels."""
    from plugins import kernel_ops

    return [
        pytest.param(op, kernel, id=f"{op.name}-{kernel.name}")
        for op in kernel_ops().values()
        for kernel in (op.kernel_list() if op.kernel_list else ())
    ]


def stepped() -> list[Op]:
    """Operators that several launches compute."""
    return [op for op in all_ops().values() if op.step_list]


@cache
def trials() -> tuple[Trial, ...]:
    """Every case with the first tactic of every kernel, every other tactic on a part of them, bfloat16 on a few."""
    found: list[Trial] = []
    for op in all_ops().values():
        parts = list(dict.fromkeys((op, *(step.op for step in (op.step_list() if op.step_list else ())))))
        ways = [(part, kernel) for part in parts for kernel in (part.kernel_list() if part.kernel_list else ())]
        for number, case in enumerate(op.case_list() if op.case_list else ()):
            for part, kernel in ways:
                made: list[tuple[int, str]] = [(0, "")]
                if (tactic := number % len(kernel.tactics)) > 0:
                    made.append((tactic, ""))
                if number < BFLOAT16 and any(port.floating for port in part.inputs):
                    made.append((0, "bfloat16"))
                found += [
                    trial
                    for trial in (_trial(op, part, kernel, case, *way) for way in made)
                    if trial.tactic == 0 or trial.applies
                ]
    return tuple(found)


def _trial(whole: Op, part: Op, kernel: Kernel, case: Case, tactic: int, dtype: str) -> Trial:
    def make() -> Sequence[torch.Tensor]:
        return given(whole.name, case.name, dtype)[part]

    own = {name: value for name, value in whole.complete(case.attrs).items() if name in {a.name for a in part.attrs}}
    extra = f"-tactic{tactic}" * (tactic > 0) + f"-{dtype}" * bool(dtype)
    return Trial(f"{part.name}-{kernel.name}-{case.name}{extra}", part, kernel, tactic, make, own)


@lru_cache(maxsize=8)  # trials of one case follow each other
def given(name: str, case_name: str, dtype: str) -> dict[Op, Sequence[torch.Tensor]]:
    """Inputs of an operator in one of its cases, and what reaches each of its steps where references compute them."""
    whole = all_ops()[name]
    case = next(case for case in (whole.case_list() if whole.case_list else ()) if case.name == case_name)
    inputs = tensors(whole, case, getattr(torch, dtype) if dtype else None)
    reached: dict[Op, Sequence[torch.Tensor]] = {whole: inputs}

    def run(op: Op, inputs: Sequence[Any], own: Any) -> Sequence[Any]:
        reached.setdefault(op, inputs)
        return outputs_of(op, inputs, own)

    if whole.step_list:
        run_steps(whole, inputs, case.attrs, run)
    return reached


def guarded(shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor within a poisoned buffer, and the buffer: NaN, or the most negative integer."""
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    size = int(np.prod(shape))
    buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + size].view(tuple(shape)), buffer


def run(trial: Trial, device: str) -> list[torch.Tensor]:
    """One launch on poisoned outputs: each whole buffer, guards included."""
    op, made = trial.op, trial.make()
    buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for port, x in zip(op.inputs, made, strict=True):
        buffers[port.name] = guarded(x.shape, x.dtype, device)
        buffers[port.name][0].copy_(x)
    inputs = [tensor for tensor, _ in buffers.values()]
    shapes, dtypes = op.output_shapes([tuple(x.shape) for x in made], trial.attrs), dtypes_of(op, trial.floating)
    outputs = []
    for port in op.outputs:
        fresh = shapes[port.name], getattr(torch, getattr(dtypes, port.name)), device
        outputs.append(buffers[op.aliases[port.name]] if port.name in op.aliases else guarded(*fresh))
    launch(op, trial.kernel, inputs, [tensor for tensor, _ in outputs], trial.attrs, trial.tactic)
    return [buffer.cpu() for _, buffer in outputs]


def check(trial: Trial, buffers: Sequence[torch.Tensor]) -> None:
    """Outputs equal the reference: integers exactly, floats within the tolerance, zeros exactly; guards are whole."""
    op = trial.op
    for port, buffer, expected in zip(op.outputs, buffers, outputs_of(op, trial.make(), trial.attrs), strict=True):
        assert buffer.dtype == expected.dtype, port.name
        guards = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        floating = expected.dtype.is_floating_point
        whole = guards.isnan() if floating else guards == torch.iinfo(guards.dtype).min
        assert bool(whole.all()), f"{port.name}: written outside"
        actual = buffer[GUARD:-GUARD].view(expected.shape)
        if not floating:
            np.testing.assert_array_equal(actual.numpy(), expected.numpy(), err_msg=port.name)
            continue
        assert bool((actual[expected == 0] == 0).all()), f"{port.name}: not 0 where the reference is"
        limits = op.tolerance.of(trial.floating)
        np.testing.assert_allclose(actual.double().numpy(), expected.double().numpy(), **limits, err_msg=port.name)
