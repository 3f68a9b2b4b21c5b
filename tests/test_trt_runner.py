"""The runner of plans without a GPU: the calls that it makes exist in TensorRT's API, and are made in a right order."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from trtpass.errors import InputError
from trtpass.trt import runner

CALLS = {
    "ICudaEngine": [
        "get_tensor_name",
        "num_io_tensors",
        "get_tensor_mode",
        "get_tensor_dtype",
        "create_execution_context",
    ],
    "IExecutionContext": [
        "set_input_shape",
        "set_tensor_address",
        "get_tensor_shape",
        "execute_async_v3",
        "set_optimization_profile_async",
    ],
    "Runtime": ["deserialize_cuda_engine"],
}


class Engine:
    """An engine of one operation: ``y = 2 x`` and, in the memory of ``pool``, ``pool + 1``."""

    num_io_tensors = 4
    tensors = ("x", "pool", "y", "written")

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("x", "pool") else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.HALF"

    def create_execution_context(self) -> Context:
        return Context()


class Context:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] < 9

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        return set(self.addresses) == set(Engine.tensors)


class Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        """Nothing runs."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> str:
    class Runtime:
        def __init__(self, logger: object) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            return Engine() if data else None

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            self.level = level

    module: Any = types.ModuleType("pretended_tensorrt")
    module.Logger, module.Runtime = Logger, Runtime
    module.TensorIOMode = types.SimpleNamespace(INPUT="in")
    monkeypatch.setitem(sys.modules, "pretended_tensorrt", module)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runner, "DEVICE", "cpu")
    return "pretended_tensorrt"


def test_binding_and_running(library: str, tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(b"plan")
    made = runner.Runner(tmp_path / "a.plan", library, profile=1)
    assert made.context.profile == 1 and (made.inputs, made.outputs) == (["x", "pool"], ["y", "written"])
    with pytest.raises(InputError, match="the plan did not start"):
        made.run()
    pool = torch.zeros(4, 2, dtype=torch.float16)
    outputs = made.bind({"x": torch.ones(3, 2), "pool": pool}, {"written": "pool"})
    assert outputs["written"] is pool and made.context.addresses["written"] == pool.data_ptr()
    assert outputs["y"].shape == (3, 2) and outputs["y"].isnan().all() and outputs["y"].dtype == torch.float16
    assert made.context.addresses["x"] == made.kept["x"].data_ptr()
    made.run()
    assert set(runner.execute(tmp_path / "a.plan", {"x": torch.ones(3, 2), "pool": pool}, library)) == {"y", "written"}


def test_what_does_not_fit_is_said(library: str, tmp_path: Path) -> None:
    (tmp_path / "empty.plan").write_bytes(b"")
    with pytest.raises(InputError, match="does not load"):
        runner.Runner(tmp_path / "empty.plan", library)
    (tmp_path / "a.plan").write_bytes(b"plan")
    made = runner.Runner(tmp_path / "a.plan", library)
    with pytest.raises(InputError, match="inputs pool are missing"):
        made.bind({"x": torch.ones(3, 2)})
    with pytest.raises(InputError, match="a shape of the profile"):
        made.bind({"x": torch.ones(9, 2), "pool": torch.ones(1)})


def test_the_api_has_what_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has the classes of TensorRT")
    for name, members in CALLS.items():
        assert [m for m in members if not hasattr(getattr(trt, name), m)] == [], name
    text = Path(runner.__file__).read_text()
    for members in CALLS.values():
        assert all(f".{member}" in text for member in members)
    assert set(runner.TYPES) <= set(dir(trt.DataType))


def test_the_process_that_serves_compiles() -> None:
    import ast

    text = (Path(__file__).parent / "gpu" / "test_plugin_run.py").read_text()
    values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    scripts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    script = next(words for words in scripts if "deserialize" in words)
    names = {node.attr for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Attribute)}
    assert {"deserialize_cuda_engine", "execute_async_v3", "set_input_shape"} <= names
    assert "trtpass" not in {a.name for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Import) for a in n.names}
