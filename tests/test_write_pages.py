"""WritePages on ONNX Runtime's CPU writes into a pool that is bound as input and output: nothing else is moved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from native_check import library
from one_op import in_torch, model_of

from plugins import all_ops

OP = all_ops()["WritePages"]
PAGES, SIZE, WIDTH = 700, 64, 64  # 11 MB of float32
TABLE = np.array([[[5, 690, 3], [0, 17, 1]], [[2, 8, -1], [699, 31, 700]]], np.int32)  # -1 and 700 are no pages


@pytest.mark.parametrize("native", [False, True], ids=["body", "kernel"])
@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_pool_is_written_in_place(native: bool, tokens: int, dtype: str, tmp_path: Path) -> None:
    """Equal to the reference; no node but the write takes or makes anything as large as the pool."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((PAGES, SIZE, WIDTH)).astype(dtype)
    new = rng.standard_normal((2, 2, tokens, WIDTH)).astype(dtype)
    slot = np.stack([rng.permutation(3 * SIZE + 9)[:tokens] for _ in range(4)]).reshape(2, 2, tokens).astype(np.int32)
    slot[1, 0, 0] = -1
    [expected] = in_torch(OP, [pool, new, slot, TABLE], {})
    assert (expected != pool).any()

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    if native:
        options.register_custom_ops_library(str(library().path))
    model = model_of(OP, "dynamic", [pool, new, slot, TABLE], {}).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    held = onnxruntime.OrtValue.ortvalue_from_numpy(pool)
    address = held.data_ptr()
    binding = session.io_binding()
    for name, x in {"new": new, "slot": slot, "page_table": TABLE}.items():
        binding.bind_cpu_input(name, x)
    binding.bind_ortvalue_input("pages", held)
    binding.bind_ortvalue_output("written", held)
    session.run_with_iobinding(binding)
    assert held.data_ptr() == address and binding.get_outputs()[0].data_ptr() == address
    np.testing.assert_array_equal(held.numpy(), expected)

    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"] for e in events if "output_size" in e.get("args", {})]
    large = {node["op_name"] for node in ran if int(node["output_size"]) >= pool.nbytes}
    assert large == {"WritePages" if native else "ScatterND"}, ran
