"""Fewer tokens in real encoders: twin = rewritten graph on DINOv2-S with its saliency head and Whisper tiny.en."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from graphs import dinov2_saliency, whisper_tiny_en
from trtpass import io
from trtpass.canonicalize import canonicalize
from trtpass.errors import InputError
from trtpass.passes import parse
from trtpass.variants import expose

pytestmark = pytest.mark.model
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def dinov2() -> tuple[Any, ir.Model, Arrays]:
    try:
        model, module = io.load(dinov2_saliency.onnx_file()), dinov2_saliency.torch_module()
        photo = {name: value[:2] for name, value in dinov2_saliency.examples().items()}
    except InputError as error:
        pytest.skip(str(error))
    canonicalize(model)
    return module, model, photo


@pytest.fixture(scope="module")
def whisper() -> tuple[Any, ir.Model, Arrays]:
    try:
        loaded = whisper_tiny_en.load(None)
        speech = {name: value[:1] for name, value in whisper_tiny_en.examples().items()}
    except InputError as error:
        pytest.skip(str(error))
    return loaded.module, whisper_tiny_en.export(loaded), speech


def session(model: ir.Model) -> Callable[[Arrays], Arrays]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    opened = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in opened.get_outputs()]
    return lambda inputs: dict(zip(names, opened.run(None, inputs), strict=True))


def check(module: Any, dense: ir.Model, inputs: Arrays, text: str, atol: float) -> None:
    """Own choices: the same but for tokens at the cut. Forced choices: the same numbers."""
    step, model = parse(text), dense.clone()
    result = step(model)
    roles = ("score", "keep", "target", "owner")
    expose(model, [s.values[r] for s in result.sites for r in roles if r in s.values])
    outputs = session(model)(inputs)
    forced = {s.layer: {r: outputs[s.values[r]] for r in ("keep", "target") if r in s.values} for s in result.sites}
    torch.set_num_threads(2)
    made = step.twin(module, result).run(inputs, forced)
    for name, value in made.outputs.items():
        np.testing.assert_allclose(outputs[name], value, atol=atol, rtol=1e-3)
    for site in result.sites:
        if "keep" not in site.values:
            continue
        score, keep = outputs[site.values["score"]], outputs[site.values["keep"]]
        for b, row in enumerate(keep):
            differ = np.flatnonzero(made.selections[site.layer]["keep"][b] != row)
            cut = score[b][(row != 0) & np.isfinite(score[b])].min(initial=np.inf)
            assert np.all(np.abs(score[b][differ] - cut) < 1e-4)
    first, last = outputs[result.sites[0].values["owner"]], outputs[result.sites[-1].values["owner"]]
    assert last.max() + 1 < first.shape[1]


@pytest.mark.parametrize(
    "text", ["tome:r=16", "evit", "ficoco-v", "scc:tau=0.8", "scc-two-step:tau=0.8,group=64", "random-tokens:r=16"]
)
def test_dinov2(dinov2: tuple[Any, ir.Model, Arrays], text: str) -> None:
    check(*dinov2, text, 2e-4)


@pytest.mark.parametrize(
    "text", ["tome:r=200", "scc-two-step:tau=0.8,group=50,layer=1", "ficoco-v:grid=1x1500,keep=0.9,layers=2"]
)
def test_whisper(whisper: tuple[Any, ir.Model, Arrays], text: str) -> None:
    check(*whisper, text, 2e-3)
