"""Running the engine of an encoder, and requests that are refused: arrays, sizes, passes, text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tiny import decoder
from tests.tiny_vit import vit
from tests.vit_engines import TOME, images, vit_engine, vit_file
from trtpass import cli, io
from trtpass.build import Request, build
from trtpass.encoder_engine import EncoderEngine
from trtpass.encoder_inputs import choices, fix_sizes, noise, symbols
from trtpass.errors import InputError
from trtpass.generate import generate
from trtpass.manifest import Manifest
from trtpass.runtime import Engine

Build = Callable[..., tuple[Manifest, Path]]


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``built(*passes)``: see ``vit_engine``."""
    return partial(vit_engine, tmp_path_factory)


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_file(tmp_path_factory)


# ---- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("feed", "message"), [
    ({}, r"are none"),
    ({"picture": 1}, r"are picture"),
    ({"image": np.zeros((1, 3, 24, 24))}, r"is float64[^$]*astype\('float32'\)"),
    ({"image": np.zeros((3, 24, 24), np.float32)}, r"has shape \[3, 24, 24\]"),
    ({"image": np.zeros((1, 3, 24, 28), np.float32)}, r"has shape \[1, 3, 24, 28\]"),
    ({"image": np.zeros((0, 3, 24, 24), np.float32)}, r"has shape \[0, 3, 24, 24\]"),
    ("image", r"are str"),
])  # fmt: skip
def test_wrong_inputs_are_refused(built: Build, feed: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        EncoderEngine.open(built()[1]).run(feed)
    assert "float32 [batch, 3, 24, 24]" in str(caught.value)


def test_values_inside_the_graph_can_be_read(built: Build) -> None:
    engine = EncoderEngine.open(built(TOME)[1])
    (layer,) = [name for name in _values(built(TOME)[1]) if name.endswith("tome.keep")]
    keep = engine.run(images(2), [layer])[layer]
    assert keep.shape == (2, 37) and (keep.sum(1) == 33).all()
    with pytest.raises(InputError, match="no value 'absent'"):
        engine.run(images(2), ["absent"])


def _values(folder: Path) -> list[str]:
    return [
        name for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node for name in node.output
    ]


def test_an_encoder_generates_no_text(built: Build) -> None:
    folder = built()[1]
    with pytest.raises(InputError, match="generates no text"):
        generate(folder, ["hello"], max_tokens=1)
    with pytest.raises(InputError, match="generates no text"):
        Engine.open(folder).prefill([[1, 2]])


def test_a_decoder_stays_a_decoder(tmp_path: Path) -> None:
    io.save(decoder(1), tmp_path / "decoder.onnx")
    request = Request(str(tmp_path / "decoder.onnx"), [], "portable", out=tmp_path / "engines")
    manifest, folder = build(request)
    assert manifest.kind == "decoder" and not manifest.checks.failed and manifest.inputs == {}
    assert not isinstance(Engine.open(folder), EncoderEngine)
    with pytest.raises(InputError, match=r"no .*engine\.onnx"):
        EncoderEngine.open(folder)
    with pytest.raises(InputError, match="a decoder"):
        build(replace(request, sizes={"batch": (1,)}))


# ---- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "message"), [
    (["streaming-llm"], "cache policy streaming-llm .* an encoder"),
    (["token-sparse"], "no token input"),
    (["tome:r=30"], "at most half"),
])  # fmt: skip
def test_passes_that_do_not_fit_are_refused(file: Path, tmp_path: Path, passes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(Request(str(file), passes, out=tmp_path / "engines"))
    assert not list((tmp_path / "engines").rglob("*.onnx"))


def test_sizes_must_be_in_the_graph(file: Path, tmp_path: Path) -> None:
    for sizes, message in (
        ({"height": (3,)}, "size height"), ({"batch": (0,)}, "size batch=0"), ({"batch": ()}, "size batch="),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            build(Request(str(file), [], out=tmp_path, sizes=sizes))
    assert not list(tmp_path.rglob("*.onnx"))


def test_arrays_of_a_file_take_the_place_of_noise(file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **images(1))
    manifest, _ = build(Request(str(file), [], out=tmp_path / "engines", inputs=tmp_path / "x.npz"))
    assert "1x3x24x24, x.npz" in manifest.checks.engine.tolerance
    np.savez(tmp_path / "y.npz", image=np.zeros((1, 3, 24, 25), np.float32))
    (tmp_path / "z.npz").write_text("no arrays")
    np.savez(tmp_path / "w.npz", image=np.array([object()], dtype=object))
    for name, message in (
        ("y", r"\[1, 3, 24, 25\]"),
        ("z", "cannot be read"),
        ("w", "cannot be read"),
        ("v", "cannot"),
    ):
        with pytest.raises(InputError, match=message):
            build(Request(str(file), [], out=tmp_path / "engines", inputs=tmp_path / f"{name}.npz"))


def test_open_sizes_need_numbers() -> None:
    model = vit(1)
    model.graph.inputs[0].shape = ir.Shape(["batch", 3, "height", 24])
    assert symbols(model) == {"batch": True, "height": False}
    with pytest.raises(InputError, match="leaves height open") as caught:
        noise(model, {})
    assert "--size height=64" in caught.value.fix
    assert noise(model, {"height": (24,), "batch": (7,)}).feed["image"].shape == (2, 3, 24, 24)
    assert choices(model, {"height": (24, 48)}) == [{"batch": 1, "height": 24}, {"batch": 1, "height": 48}]
    fixed = fix_sizes(vit(1), {"batch": 3})
    assert [list(v.shape or []) for v in fixed.graph.outputs] == [[3, 37, 16]]
    assert all(isinstance(d, int) for node in fixed.graph for v in node.outputs for d in v.shape or [])


def test_graphs_that_cannot_become_an_engine(file: Path, tmp_path: Path) -> None:
    model = io.load(file)
    model.graph.inputs[0].shape = None
    io.save(model, tmp_path / "rankless.onnx")
    with pytest.raises(InputError, match="'image' has no shape"):
        build(Request(str(tmp_path / "rankless.onnx"), [], out=tmp_path / "engines"))
    plain = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[N] x) => (float[N] y) {y = Relu(x)}'
    )
    onnx.save(plain, tmp_path / "plain.onnx")
    with pytest.raises(InputError, match="'plain' is not a decoder that is understood, and no encoder"):
        build(Request(str(tmp_path / "plain.onnx"), out=tmp_path / "engines"))
    assert not list((tmp_path / "engines").rglob("*.onnx"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", "batch"], "--size batch"),
    (["--size", "batch=2+x"], "NAME=N"),
    (["--size", "batch=1", "--size", "batch=2"], "each name once"),
    (["--inputs", "absent.npz"], "cannot be read as arrays"),
])  # fmt: skip
def test_command_line(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["trtpass", "build", str(file), "--out", str(tmp_path), "--json", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and message in json.loads(capsys.readouterr().err)["error"]
    assert not list(tmp_path.rglob("*.onnx"))
