"""Plans with our kernels on the GPU of this machine: each plugin, a process without plugins, layers of a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")
import first_layers
import plugin_nodes
import torch
from kernel_cases import Trial

from trtpass import io
from trtpass.doctor import gpus
from trtpass.plans import _profile
from trtpass.trt import builder
from trtpass.trt import lower as trt
from trtpass.trt.runner import execute

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

# Loads TensorRT and torch, and nothing of ours: what serves a plan has no Python plugins.
SERVING = """
import sys, torch, tensorrt as trt
assert not any(name.split(".")[0] in ("trtpass", "plugins", "triton") for name in sys.modules)
plan, inputs, outputs = sys.argv[1:]
engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(open(plan, "rb").read())
assert engine is not None, "the plan does not load"
context = engine.create_execution_context()
feeds = {name: x.cuda() for name, x in torch.load(inputs).items()}
made = {}
for name, x in feeds.items():
    context.set_input_shape(name, tuple(x.shape))
    context.set_tensor_address(name, x.data_ptr())
kinds = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16, trt.DataType.FLOAT: torch.float32,
         trt.DataType.INT32: torch.int32}
for i in range(engine.num_io_tensors):
    name = engine.get_tensor_name(i)
    if name not in feeds:
        kind = kinds[engine.get_tensor_dtype(name)]
        made[name] = torch.zeros(tuple(context.get_tensor_shape(name)), dtype=kind, device="cuda")
        context.set_tensor_address(name, made[name].data_ptr())
stream = torch.cuda.Stream()
torch.cuda.synchronize()
assert context.execute_async_v3(stream.cuda_stream)
stream.synchronize()
torch.save({name: x.cpu() for name, x in made.items()}, outputs)
"""


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if lacking := builder.missing():
        pytest.skip("; ".join(lacking))
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA, and it holds the device buffers")


@pytest.fixture(scope="module")
def cc() -> Iterator[int]:
    devices = gpus()
    yield 90 if isinstance(devices, str) else int(devices[0][1])


def _plan(trial: Trial, cc: int, folder: Path) -> Path:
    io.save(plugin_nodes.graph(trial, cc), folder / "one.onnx")
    builder.build_plan(folder / "one.onnx", folder / "one.plan", profiles=[plugin_nodes.profile(trial)])
    return folder / "one.plan"


@pytest.mark.parametrize("trial", plugin_nodes.chosen(90), ids=lambda trial: trial.name)
def test_one_plugin_in_a_plan(trial: Trial, cc: int, tmp_path: Path) -> None:
    plan = _plan(trial, cc, tmp_path)
    plugin_nodes.compare(trial, execute(plan, plugin_nodes.feeds(trial), aliases=plugin_nodes.aliases(trial)))


def test_a_plan_runs_in_a_process_without_our_plugins(cc: int, tmp_path: Path) -> None:
    trial = next(t for t in plugin_nodes.chosen(cc) if t.op.name == "TokenSparseAttention" and t.floating == "float16")
    plan = _plan(trial, cc, tmp_path)
    torch.save(plugin_nodes.feeds(trial), tmp_path / "inputs.pt")
    words = [sys.executable, "-c", SERVING, str(plan), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plugin_nodes.compare(trial, torch.load(tmp_path / "outputs.pt"))


@pytest.mark.model
@pytest.mark.parametrize("dtype", list(trt.DTYPES))
def test_first_layers_of_smollm2(dtype: str, smollm2: Any, cc: int, tmp_path: Path) -> None:
    """Teacher-forced: cosine and largest error of each layer, where every token is kept and so torch is the law."""
    model, given, expected = first_layers.first_layers(smollm2, coverage=0)
    graph = trt.lower(model, cc, dtype).model
    io.save(graph, tmp_path / "layers.onnx", weights="weights.bin")
    shapes = _profile(graph, (1, first_layers.LENGTH, first_layers.LENGTH))
    builder.build_plan(tmp_path / "layers.onnx", tmp_path / "layers.plan", profiles=[shapes])
    made = execute(tmp_path / "layers.plan", {name: torch.from_numpy(x) for name, x in given.items()})
    values = {name: x.float().numpy() for name, x in made.items()}
    figures = first_layers.compare_layers(values, expected, dtype)
    for layer, (cosine, error) in enumerate(figures):
        print(f"{dtype} layer {layer}: cosine {cosine:.6f}, max error {error:.2e} of the largest value")


def test_the_benchmark_runs() -> None:
    """A short form of it: both sides equal PyTorch before anything is timed."""
    from trtpass.bench import gpu

    records = gpu.run(lengths=(4096,), repeats=3)
    assert len(records) == 2 * len(gpu.KEPT) and all(r.value > 0 for r in records)
