"""What tests/gpu gives to a GPU, exercised without one: graphs, specifications, inputs, expected outputs, bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

pytest.importorskip("triton", reason="kernels are written in Triton")

import first_layers
import plugin_nodes
import reference_nodes
from kernel_cases import Trial, outputs_of

from plugins import kernel_ops
from trtpass import io, rtx
from trtpass.rtx import precheck
from trtpass.trt import builder
from trtpass.trt import lower as trt
from trtpass.trt.plugins import bits

CC = 90
TRIALS = plugin_nodes.chosen(CC)


def test_every_operator_is_tried_in_every_type() -> None:
    assert {trial.op.name for trial in TRIALS} == set(kernel_ops())
    for op in kernel_ops().values():
        floats = {trial.floating for trial in TRIALS if trial.op is op}
        assert floats >= ({"float16", "bfloat16"} if any(port.floating for port in op.inputs) else {"float32"}), op.name


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_one_plugin_in_a_graph(trial: Trial, tmp_path: Path) -> None:
    model = plugin_nodes.graph(trial, CC)
    if trial.floating != "float32":
        assert trt.faults(model) == []
    onnx.checker.check_model(ir.to_proto(model))
    io.save(model, tmp_path / "one.onnx")
    precheck(tmp_path / "one.onnx", frozenset({("trtpass", trial.op.name)}))
    given, shapes = plugin_nodes.feeds(trial), plugin_nodes.profile(trial)
    names = [str(v.name) for v in model.graph.inputs]
    assert list(given) == list(shapes) == names
    for value in model.graph.inputs:
        for known, size in zip(value.shape or [], shapes[str(value.name)][0], strict=True):
            assert not isinstance(known, int) or known == size
    expected = outputs_of(trial.op, trial.make(), trial.attrs)
    made = {str(v.name): x for v, x in zip(model.graph.outputs, expected, strict=True)}
    plugin_nodes.compare(trial, made)
    assert set(plugin_nodes.aliases(trial)) <= set(made)
    name, tensor = next(iter(made.items()))
    broken = tensor.clone()
    broken.view(-1)[-1] += 1
    with pytest.raises(AssertionError):
        plugin_nodes.compare(trial, {**made, name: broken})


@pytest.mark.model
def test_first_layers_of_smollm2(smollm2: Any) -> None:
    """The comparison that a plan must pass, passed by the same float16 graph on bodies; a wrong layer does not."""
    model, given, expected = first_layers.first_layers(smollm2, coverage=0)
    assert len(expected) == first_layers.LAYERS - 1
    graph = trt.lower(model, CC).model
    assert len(trt.plugin_nodes(graph)) >= first_layers.LAYERS
    assert builder.kernels_of(graph)
    assert {str(v.name) for v in graph.graph.inputs} <= set(given)
    bodies = rtx.lower(model)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(bodies).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    made = dict(zip(names, session.run(names, {i.name: given[i.name] for i in session.get_inputs()}), strict=True))
    figures = first_layers.compare_layers(made, expected)
    assert len(figures) == first_layers.LAYERS - 1
    made["hidden.1"] = np.roll(made["hidden.1"], 1, axis=1)
    with pytest.raises(AssertionError):
        first_layers.compare_layers(made, expected)


def test_reference_nodes_use_the_references() -> None:
    """The evaluator that stands in for plugins computes with them: a changed attribute changes the result."""
    trial = next(t for t in TRIALS if t.op.name == "TokenSparseAttention" and t.floating == "float16")
    model = plugin_nodes.graph(trial, CC)
    feeds = {name: x.numpy() for name, x in plugin_nodes.feeds(trial).items()}
    made = reference_nodes.run(model, feeds)
    plugin_nodes.compare(trial, {name: torch.from_numpy(x) for name, x in made.items()})
    node = next(iter(model.graph))
    node.attributes["scale_bits"] = ir.AttrInt64("scale_bits", bits(3.0))
    other = reference_nodes.run(model, feeds)
    assert any(not np.allclose(made[name], other[name], atol=1e-2) for name in made)
