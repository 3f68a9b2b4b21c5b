"""Encoders and a LLaVA that we export: canonical, equal to PyTorch, and what is found around their token streams."""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import multimodal
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from encoders import CLS, FAMILIES, TOKENS, Tiny, tiny_encoder

from trtpass import ctranslate2
from trtpass.anchors import find
from trtpass.encoder_export import export_encoder
from trtpass.encoders import describe, streams
from trtpass.errors import InputError
from trtpass.inspect import inspect
from trtpass.ir import check, is_op, tidy


def run(model: ir.Model, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


@functools.cache
def exported(family: str) -> tuple[Tiny, ir.Model]:
    """Not to be changed."""
    tiny = tiny_encoder(family)
    return tiny, tiny.export()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "dinov2"])  # the same with registers, and real
def test_an_encoder_exports_to_canonical_form(family: str) -> None:
    tiny, model = exported(family)
    check(model, family)
    count = Counter(node.op_type for node in model.graph)
    assert (count["Attention"], count["LayerNormalization"], count["Softmax"]) == (3, 7, 0)
    anchors = find(model)
    assert anchors.missing == () and len(streams(anchors)) == 1
    found = describe(model, anchors)
    grid = None if family == "whisper" else (5, 5)
    assert (found.tokens, found.cls, found.grid, found.head) == (TOKENS[family], CLS[family], grid, "tokens")
    assert found.stream_in is anchors.blocks[0].residual_in and found.stream_out is anchors.blocks[-1].mlp_out
    assert "last_hidden_state" in found.why and ("over one axis" in found.why_no_grid) == (grid is None)
    assert not any(str(Path.cwd()) in text for node in model.graph for text in node.metadata_props.values())
    for rows in (1, 3):
        inputs = {name: torch.randn((rows, *tensor.shape[1:])) for name, tensor in tiny.inputs.items()}
        with torch.inference_mode():
            expected = tiny.module(**inputs).last_hidden_state.numpy()
        np.testing.assert_allclose(run(model, inputs), expected, atol=2e-5, rtol=0)


class Headed(torch.nn.Module):
    """A tiny ViT of 6 x 4 patches with several heads."""

    def __init__(self) -> None:
        super().__init__()
        import transformers as hf

        torch.manual_seed(0)
        config = hf.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=(48, 32),
            patch_size=8,
        )  # fmt: skip
        self.body = hf.ViTModel(config, add_pooling_layer=False).eval()

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        x = self.body(pixel_values).last_hidden_state
        patches = x[:, 1:]
        grid = patches.transpose(1, 2).reshape(-1, 16, 6, 4)
        return SimpleNamespace(cls=x[:, 0], pool=patches.mean(1), grid=grid, tokens=patches.cumsum(1))


@functools.cache
def headed() -> ir.Model:
    inputs = {"pixel_values": torch.randn(2, 3, 48, 32)}
    return export_encoder(Headed().eval(), inputs, outputs=("cls", "pool", "grid", "tokens"))


@pytest.mark.parametrize(
    ("head", "words"),
    [("cls", "takes token 0"), ("pool", "over the tokens"), ("grid", "6 x 4"), ("tokens", "reads all tokens")],
)
def test_the_head_of_an_encoder_and_a_grid_that_is_not_square(head: str, words: str) -> None:
    model = headed().clone()
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name == head]
    tidy(model)
    found = describe(model, find(model))
    assert found.head == head and words in found.why, found.why
    assert (found.tokens, found.cls, found.grid) == (25, 1, (6, 4))


def cut_mlp(model: ir.Model) -> None:
    """A block that adds its MLP to the stream from before attention, as parallel blocks do."""
    first = find(model).blocks[1]
    assert first.mlp_out is not None and first.residual_in is not None and first.residual_out is not None
    add = first.mlp_out.producer()
    norm = next(n for n in first.residual_out.consumers() if is_op(n, "LayerNormalization"))
    norm.replace_input_with(0, first.residual_in)
    assert add is not None


def post_norm(model: ir.Model) -> None:
    """The stream goes on behind the norm, as in BERT."""
    first = find(model).blocks[1]
    assert first.mlp_out is not None and first.residual_out is not None
    norm = next(n for n in first.residual_out.consumers() if is_op(n, "LayerNormalization"))
    add = first.mlp_out.producer()
    assert add is not None
    add.replace_input_with(next(i for i, v in enumerate(add.inputs) if v is first.residual_out), norm.outputs[0])


@pytest.mark.parametrize(("damage", "reason"), [(cut_mlp, "parallel"), (post_norm, "post-norm")])
def test_where_the_stream_ends_is_said(damage: Callable[[ir.Model], None], reason: str) -> None:
    model = exported("vit")[1].clone()
    damage(model)
    anchors = find(model)
    found = describe(model, anchors)
    assert anchors.blocks[1].mlp_out is None and reason in anchors.blocks[1].why_no_mlp
    assert found.stream_out is None and "block 1" in found.why and reason in found.why
    assert len(streams(anchors)) == 2


def test_inspect_describes_an_encoder() -> None:
    found = inspect(exported("vit")[1].clone())
    assert found.missing == () and found.input_ids is None
    (encoder,) = found.encoders
    assert (encoder["tokens"], encoder["cls"], encoder["grid"], encoder["blocks"]) == (26, 1, (5, 5), [0, 2])


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_a_multimodal_model_is_one_graph_with_two_streams(name: str) -> None:
    tiny = multimodal.tiny_llava() if name == "llava" else multimodal.tiny_qwen2vl()
    model = tiny.export()
    anchors = find(model)
    tower, decoder = streams(anchors)
    assert [b.causal for b in anchors.blocks] == [False] * len(tower.blocks) + [True] * multimodal.TEXT_LAYERS
    assert all(b.rope_q is not None and b.rope_k is not None for b in decoder.blocks)
    found = describe(model, tower)
    if name == "llava":
        assert anchors.missing == () and anchors.positions is not None
        assert (found.tokens, found.cls, found.grid) == (tiny.tokens + 1, 1, (5, 5))
    else:  # three kinds of positions, and patches that come without a grid
        assert anchors.positions is None and "[B, S] positions" in anchors.missing[0]
        assert (found.tokens, found.cls, found.grid) == (4 * tiny.tokens, 0, None)
    assert describe(model, decoder).stream_out is decoder.blocks[-1].mlp_out
    with torch.inference_mode():
        expected = tiny.model(**tiny.whole).logits.numpy()
        np.testing.assert_allclose(run(model, tiny.inputs), expected, atol=5e-5, rtol=0)
        brighter = tiny.inputs | {"pixel_values": tiny.inputs["pixel_values"] + 1}
        assert np.abs(run(model, brighter) - expected).max() > 0.1
        if name == "llava":  # another batch, other places
            longer = {
                "pixel_values": torch.randn(3, 3, multimodal.SIDE, multimodal.SIDE),
                "input_ids": torch.cat([torch.full((3, 5), 7), tiny.inputs["input_ids"][:1].repeat(3, 1)], 1),
            }
            np.testing.assert_allclose(run(model, longer), tiny.model(**longer).logits.numpy(), atol=5e-5, rtol=0)


def test_a_module_that_trains_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        export_encoder(torch.nn.Linear(2, 2).train(), {"input": torch.zeros(2, 2)})


def model_bin(**changes: bytes) -> bytes:
    """A model.bin of one array [2, 3] and one alias; ``changes`` replace parts by name."""
    parts = {
        "version": struct.pack("<I", 6),
        "spec": struct.pack("<H", 5) + b"Spec\0",
        "revision": struct.pack("<I", 3),
        "count": struct.pack("<I", 1),
        "name": struct.pack("<H", 2) + b"w\0",
        "shape": struct.pack("<BII", 2, 2, 3),
        "type": struct.pack("<BI", 4, 12),
        "data": np.arange(6, dtype=np.float16).tobytes(),
        "aliases": struct.pack("<I", 1) + struct.pack("<H", 2) + b"v\0" + struct.pack("<H", 2) + b"w\0",
    }
    return b"".join((parts | changes).values())


def test_model_bin_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(model_bin())
    archive = ctranslate2.read(file)
    assert (archive.spec, archive.revision, sorted(archive.variables)) == ("Spec", 3, ["v", "w"])
    np.testing.assert_array_equal(archive.variables["v"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": struct.pack("<I", 99)}, "version 99"),
        ({"count": struct.pack("<I", 2**31)}, "33584640 bytes"),
        ({"shape": struct.pack("<BII", 2, 2**31, 2**31)}, "12 bytes"),
        ({"shape": struct.pack("<BII", 200, 2, 3)}, "200 axes"),
        ({"type": struct.pack("<BI", 9, 12)}, "type 9"),
        ({"name": struct.pack("<H", 2) + b"\xff\0"}, "no text"),
        ({"data": b""}, "ends within"),
        (
            {"aliases": struct.pack("<I", 1) + struct.pack("<H", 2) + b"v\0" + struct.pack("<H", 2) + b"x\0"},
            "stands for",
        ),
        ({"aliases": struct.pack("<I", 0) + b"more"}, "4 bytes behind"),
    ],
)
def test_a_broken_model_bin_is_refused(tmp_path: Path, changes: dict[str, bytes], reason: str) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(model_bin(**changes))
    with pytest.raises(InputError, match=reason):
        ctranslate2.read(file)


def test_every_truncation_of_a_model_bin_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    whole = model_bin()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError):
            ctranslate2.read(file)


@pytest.mark.model
def test_whisper_exports_and_transcribes() -> None:
    from graphs import whisper_tiny_en

    try:
        features = whisper_tiny_en.examples()["input_features"]
        module = whisper_tiny_en.torch_module()
    except InputError as error:
        pytest.skip(str(error))
    encoder = module.get_encoder()  # type: ignore[operator]
    model = export_encoder(encoder, {"input_features": torch.from_numpy(features)})
    found = describe(model, find(model))
    assert (found.tokens, found.cls, found.grid, found.head) == (1500, 0, None, "tokens")
    hidden = run(model, {"input_features": torch.from_numpy(features[:1])})
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(features[:1])).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden, expected, atol=1e-3, rtol=0)  # values up to 14
    text = whisper_tiny_en.text(whisper_tiny_en.transcribe(module, hidden, most=40))
    assert "best of times" in text and "age of wisdom" in text


def test_sound_is_brought_to_16_khz() -> None:
    """A tone below the new limit keeps its size, one above it goes away."""
    from graphs.whisper_tiny_en import RATE, slower

    seconds = np.arange(3 * RATE) / (3 * RATE)
    for pitch, size in ((1000, 1.0), (12000, 0.0)):
        tone = slower(np.sin(2 * np.pi * pitch * seconds).astype(np.float32), 3)
        assert len(tone) == RATE and abs(np.abs(tone[1000:-1000]).max() - size) < 0.02
