"""One plugin in a graph of its own, its inputs and what it must make: all that can be done without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from kernel_cases import Trial, outputs_of, trials

from trtpass.ir import make_node
from trtpass.op import DOMAIN, VERSION
from trtpass.plan_process import Profile
from trtpass.ptx import supports
from trtpass.trt.lower import CC_KEY, DTYPE_KEY
from trtpass.trt.plugins import NAMESPACE, encode
from trtpass.trt.plugins import VERSION as PLUGIN_VERSION

TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int32: "INT32"}


def chosen(cc: int) -> list[Trial]:
    """For each operator some trials that its kernels take on ``cc``: the largest of each floating type."""
    best: dict[tuple[str, str], Trial] = {}
    for trial in trials():
        inputs = trial.make()
        if trial.tactic or not all(x.numel() for x in inputs):
            continue
        dims = trial.op.bind([tuple(x.shape) for x in inputs])
        if supports(trial.op, trial.kernel, dims, trial.attrs, trial.floating, cc) is not True:
            continue
        key = (trial.op.name, trial.floating)
        if key not in best or _size(trial) > _size(best[key]):
            best[key] = trial
    return list(best.values())


def _size(trial: Trial) -> int:
    return sum(x.numel() for x in trial.make())


def graph(trial: Trial, cc: int) -> ir.Model:
    """A model of this one node; sizes that the kernel is not compiled for are symbols."""
    inputs, fixed = trial.make(), trial.kernel.fixed
    given = []
    for port, x in zip(trial.op.inputs, inputs, strict=True):
        shape = [size if axis in fixed else axis for axis, size in zip(port.axes, x.shape, strict=True)]
        given.append(ir.val(port.name, ir.DataType[TYPES[x.dtype]], shape))
    symbols: list[Any] = [[s if isinstance(s, int) else ir.SymbolicDim(str(s)) for s in v.shape or []] for v in given]
    shapes = trial.op.output_shapes(symbols, trial.attrs)
    outputs = []
    for port, x in zip(trial.op.outputs, outputs_of(trial.op, inputs, trial.attrs), strict=True):
        known = [size if isinstance(size, int) else None for size in shapes[port.name]]
        outputs.append((f"{port.name}_made", ir.DataType[TYPES[x.dtype]], known))
    attrs = {**encode(trial.op, trial.attrs), "plugin_namespace": NAMESPACE, "plugin_version": PLUGIN_VERSION, "aot": 1}
    node = make_node(trial.op.name, given, outputs, attrs, domain=DOMAIN, name=trial.op.name)
    made = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": 24, DOMAIN: VERSION}, name=trial.op.name)
    model = ir.Model(made, ir_version=10)
    model.metadata_props.update(
        {CC_KEY: str(cc), DTYPE_KEY: trial.floating if trial.floating != "float32" else "float16"}
    )
    return model


def profile(trial: Trial) -> Profile:
    """Exactly the shapes of the trial."""
    shapes = {port.name: list(x.shape) for port, x in zip(trial.op.inputs, trial.make(), strict=True)}
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def feeds(trial: Trial) -> dict[str, torch.Tensor]:
    return {port.name: x for port, x in zip(trial.op.inputs, trial.make(), strict=True)}


def aliases(trial: Trial) -> dict[str, str]:
    """Outputs that share memory with an input, by their names in ``graph``."""
    return {f"{output}_made": source for output, source in trial.op.aliases.items()}


def compare(trial: Trial, made: Mapping[str, torch.Tensor]) -> None:
    """Integers exactly, floats within the operator's tolerance, zeros exactly."""
    expected = outputs_of(trial.op, trial.make(), trial.attrs)
    for port, theirs in zip(trial.op.outputs, expected, strict=True):
        ours = made[f"{port.name}_made"]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, port.name
        if not theirs.dtype.is_floating_point:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=port.name)
            continue
        assert bool((ours[theirs == 0] == 0).all()), f"{port.name}: not 0 where the reference is"
        limits = trial.op.tolerance.of(trial.floating)
        np.testing.assert_allclose(ours.double().numpy(), theirs.double().numpy(), **limits, err_msg=port.name)
