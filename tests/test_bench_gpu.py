"""The GPU benchmark without its GPU: graphs, inputs, the check of results, and what it says where it cannot run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU benchmark needs Triton kernels")

import reference_nodes

from trtpass import bench
from trtpass.bench import gpu
from trtpass.bench.layer import Heads
from trtpass.errors import CheckFailed, InputError
from trtpass.trt import builder
from trtpass.trt import lower as trt

SMALL = Heads(heads=4, kv_heads=2, width=16, window=8, pool=3, min_tokens=4)


@pytest.mark.parametrize("name", [gpu.DENSE, gpu.SCORED, gpu.GIVEN])
def test_each_side_computes_what_its_check_expects(name: str) -> None:
    given = gpu.feeds(SMALL, 40, 0.5)
    model = gpu.graphs(SMALL, 90)[name]
    assert trt.faults(model) == []
    assert bool(trt.plugin_nodes(model)) == (name != gpu.DENSE)
    made = reference_nodes.run(model, {str(v.name): given[str(v.name)] for v in model.graph.inputs})
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in {**given}.items()}
    results = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in made.items()}
    gpu.check(name, SMALL, tensors, results)
    index = (results if name == gpu.SCORED else tensors)["index"]
    row = 0 if name == gpu.DENSE else int(index[0, 0, 0])  # the first row of the first head is looked at
    results["out"] = results["out"].clone()
    results["out"][0, 0, row] += 0.1
    with pytest.raises(CheckFailed):
        gpu.check(name, SMALL, tensors, results)


def test_plans_are_for_exactly_one_length() -> None:
    given = gpu.feeds(SMALL, 40, 0.25)
    assert given["index"].shape == (1, 4, 10) and (np.diff(given["index"], axis=-1) > 0).all()
    for model in gpu.graphs(SMALL, 90).values():
        shapes = gpu.profile(model, given)
        assert set(shapes) == {str(v.name) for v in model.graph.inputs}
        assert all(low == mid == high == list(given[name].shape) for name, (low, mid, high) in shapes.items())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "missing", lambda cc=None: ["no GPU"])
    with pytest.raises(InputError, match=r"gpu.attention cannot run here: no GPU"):
        bench.run(["gpu.attention"])
    assert max(gpu.TOKENS) == 131072 and min(gpu.TOKENS) == 4096
