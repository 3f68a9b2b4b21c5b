"""The exported graph computes what the module computes, from the same names and bytes every time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from families import CONTEXT, FAMILIES, VOCAB, Exported, save_tiny

from graphs import resolve
from trtpass import io
from trtpass.errors import InputError
from trtpass.export import CONTEXT_KEY, IR_VERSION, OPSET, export, export_on_meta
from trtpass.weights import Loaded

# fp32 sums of at most 160 products in another order, through two layers; logits are up to about 20.
TOLERANCE = 5e-5
# 30 layers, sums of 1536 products; logits are up to about 30.
TOLERANCE_SMOLLM2 = 2e-3

LENGTHS = (1, 2, 17, 64, 300)


@pytest.fixture(params=FAMILIES)
def exported(request: pytest.FixtureRequest, tiny_export: Callable[[str], Exported]) -> Exported:
    """A tiny model of each family."""
    return tiny_export(request.param)


def logits(module: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_logits_equal_torch(exported: Exported) -> None:
    loaded, _, path = exported
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in (1, 2, 3):
        for tokens in LENGTHS:
            ids = rng.integers(0, VOCAB, (batch, tokens))
            wanted = logits(loaded.module, ids)
            (found,) = session.run(["logits"], {"input_ids": ids})
            assert found.shape == (batch, tokens, VOCAB)
            assert np.std(wanted) > 0.5, "logits that hardly differ prove nothing"
            np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)


def test_causal(exported: Exported) -> None:
    """A token changes the logits from its own position on, and none before."""
    session = ort.InferenceSession(exported[2], providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(1).integers(0, VOCAB, (1, 40))
    other = ids.copy()
    other[0, 25] = (other[0, 25] + 1) % VOCAB
    first, second = (session.run(None, {"input_ids": x})[0] for x in (ids, other))
    np.testing.assert_allclose(first[:, :25], second[:, :25], atol=TOLERANCE, rtol=0)
    assert np.abs(first[:, 25:] - second[:, 25:]).max(axis=-1).min() > 1e-3


def test_contract(exported: Exported) -> None:
    loaded, model, path = exported
    onnx.checker.check_model(path, full_check=True)
    assert (model.ir_version, dict(model.opset_imports)) == (IR_VERSION, {"": OPSET})
    assert not model.functions
    assert [(v.name, str(v.shape), v.dtype) for v in model.graph.inputs] == [
        ("input_ids", "[batch,sequence]", ir.DataType.INT64)
    ]
    assert [(v.name, str(v.shape), v.dtype) for v in model.graph.outputs] == [
        ("logits", f"[batch,sequence,{VOCAB}]", ir.DataType.FLOAT)
    ]
    assert model.metadata_props == {CONTEXT_KEY: str(CONTEXT)}
    untyped = [out.name for node in model.graph for out in node.outputs if out.shape is None or out.dtype is None]
    assert not untyped
    assert sum(node.op_type == "Attention" for node in model.graph) == loaded.config.num_hidden_layers


def test_names_and_values_are_those_of_the_module(exported: Exported) -> None:
    """Every parameter is there under its name; linear weights are stored ``[in, out]`` unless tied."""
    loaded, model, _ = exported
    state = {**dict(loaded.module.named_parameters()), **dict(loaded.module.named_buffers())}
    named = {name: v for name, v in model.graph.initializers.items() if not name.startswith("constant_")}
    assert set(loaded.module.state_dict()) - {"lm_head.weight"} <= named.keys() <= state.keys()
    for name, value in named.items():
        parameter = state[name].detach().numpy()
        linear = parameter.ndim == 2 and "embed_tokens" not in name
        np.testing.assert_array_equal(value.const_value.numpy(), parameter.T if linear else parameter)
    assert all(v.const_value.size <= 8 for name, v in model.graph.initializers.items() if name not in named)
    tied = loaded.config.tie_word_embeddings
    assert ("lm_head.weight" not in named) == tied
    transposed = [node for node in model.graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]
    assert [node.inputs[0].name for node in transposed] == (["model.embed_tokens.weight"] if tied else [])


def test_no_trace_of_the_machine(exported: Exported) -> None:
    content = exported[2].read_bytes()
    for needle in (
        b"site-packages",
        b"/home",
        b"/root",
        b"/tmp",
        b".py",
        b"File ",
        b"pkg.torch",
        str(Path.cwd()).encode(),
    ):
        assert needle not in content


SCRIPT = """
import sys
from graphs import resolve
from trtpass import io
from trtpass.export import export
loaded = resolve(sys.argv[1]).load()
for folder in sys.argv[2:]:
    io.save(export(loaded.module, loaded.config, context=loaded.context), folder + "/model.onnx")
"""


def test_same_bytes(tiny_export: Callable[[str], Exported], tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Twice in another process with another hash seed, and once in this one; nothing is printed on the way."""
    path = tiny_export("qwen3").path
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_folders["qwen3"], *folders],
        env={"PYTHONHASHSEED": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")
    assert len(hashes(path.parent)) == 2
    assert all(hashes(folder) == hashes(path.parent) for folder in folders)


def test_equal_weights_stay_apart(tmp_path: Path) -> None:
    """Norms that are all ones in every layer are not merged into one initializer."""
    loaded = resolve(str(save_tiny("llama", tmp_path))).load()
    with torch.no_grad():
        for name, parameter in loaded.module.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    model = export(loaded.module, loaded.config, context=8)
    assert sum("norm" in name for name in model.graph.initializers) == 5


def test_graph_without_weights_is_the_same(tiny_export: Callable[[str], Exported], tmp_path: Path) -> None:
    loaded, real, _ = tiny_export("qwen3")
    meta = export_on_meta(loaded.config, tmp_path / "sparse.bin")
    assert [(n.name, n.op_type, [v and v.name for v in n.inputs]) for n in real.graph] == [
        (n.name, n.op_type, [v and v.name for v in n.inputs]) for n in meta.graph
    ]
    assert meta.metadata_props == real.metadata_props
    assert list(meta.graph.initializers) == list(real.graph.initializers)
    ends = [0]
    for name, value in meta.graph.initializers.items():
        tensor, wanted = value.const_value, real.graph.initializers[name].const_value
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        if isinstance(tensor, ir.ExternalTensor):
            assert tensor.offset % 4096 == 0
            assert tensor.offset >= ends[-1]
            ends.append(tensor.offset + tensor.length)
        else:
            np.testing.assert_array_equal(tensor.numpy(), wanted.numpy())
    assert len(ends) == 1 + sum(1 for _ in loaded.module.parameters())
    size = (tmp_path / "sparse.bin").stat()
    assert size.st_size >= ends[-1]
    assert size.st_blocks * 512 < 4096 + size.st_size // 2, "the file is not sparse"


def test_training_mode_is_refused(tiny_folders: dict[str, Path]) -> None:
    loaded = resolve(str(tiny_folders["llama"])).load()
    with pytest.raises(InputError, match="training mode"):
        export(loaded.module.train(), loaded.config, context=CONTEXT)


def test_rope_that_depends_on_length_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_tiny("llama", tmp_path, rope_parameters=scaling)
    with pytest.raises(InputError, match="'dynamic'"):
        resolve(str(folder)).load()


def test_scaled_rope_keeps_its_frequencies(tmp_path: Path) -> None:
    """Llama 3's scaling: the frequencies in the graph are the scaled ones."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    folder = save_tiny("llama", tmp_path / "scaled", rope_parameters=scaling)
    reference = transformers_model(folder)
    loaded = resolve(str(folder)).load()
    io.save(export(loaded.module, loaded.config, context=CONTEXT), tmp_path / "model.onnx")
    ids = np.random.default_rng(2).integers(0, VOCAB, (2, 200))
    (found,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": ids})
    np.testing.assert_allclose(found, logits(reference, ids), atol=TOLERANCE, rtol=0)
    plain = transformers_model(save_tiny("llama", tmp_path / "plain"))
    assert np.abs(found - logits(plain, ids)).max() > 100 * TOLERANCE


def transformers_model(folder: Path) -> Any:
    """The model as transformers itself loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.model
@pytest.mark.slow
def test_smollm2(smollm2: Loaded, smollm2_onnx: Path) -> None:
    prompt = "The capital of France is Paris and the capital of Italy is"
    ids = smollm2.tokenizer(prompt, return_tensors="np")["input_ids"]
    (found,) = ort.InferenceSession(smollm2_onnx).run(None, {"input_ids": ids})
    np.testing.assert_allclose(found, logits(smollm2.module, ids), atol=TOLERANCE_SMOLLM2, rtol=0)
    assert smollm2.tokenizer.decode(found[0, -1].argmax()) == " Rome"
