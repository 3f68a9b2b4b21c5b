"""Helpers over onnx-ir: checks read no weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.tiny import decoder
from trtpass.ir import check, skeleton


@pytest.mark.parametrize("size", [4, 4096])
def test_external_initializers_are_not_read(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size: the checker would look for their file in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = decoder(layers=1)
    gain = ir.ExternalTensor("absent.bin", 0, size * 4, ir.DataType.FLOAT, shape=ir.Shape([size]), name="gain")
    value = ir.Value(name="gain", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([size]), const_value=gain)
    model.graph.register_initializer(value)
    check(model, "a graph whose weights are elsewhere")
    proto = skeleton(model)
    assert "gain" in {v.name for v in proto.graph.input}
    assert model.graph.initializers["gain"].const_value is gain
    assert [v.name for v in model.graph.inputs] == ["input_ids"]


def test_small_constants_stay() -> None:
    model = decoder(layers=1)
    small = {
        k for k, v in model.graph.initializers.items() if v.const_value is not None and v.const_value.nbytes <= 1024
    }
    assert small and small <= {t.name for t in skeleton(model).graph.initializer}
    assert all(
        isinstance(v.const_value.numpy(), np.ndarray) for v in model.graph.initializers.values() if v.const_value
    )
