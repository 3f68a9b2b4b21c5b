"""The text of tiny graphs after each step, so that a diff shows what a change did; ``make golden`` rewrites it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from families import Exported
from proofs import raised

from trtpass import native, passes
from trtpass.ir import const_array
from trtpass.kvzap.surrogate import Surrogate
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower
from trtpass.passes.paged_cache import PagedCacheOptions, insert_paged_cache

Golden = Callable[[str, str], None]
SPARSE = "token-sparse:coverage=0.3,window=4,min_tokens=8,pool=3,layers=all"


def text(model: ir.Model) -> str:
    """A line for each input, node and output, with types and shapes; small constants by value, weights by name."""
    return "\n".join(lines(model)) + "\n"


def lines(model: ir.Model) -> Iterator[str]:
    graph = model.graph
    yield f"opset {dict(sorted(model.opset_imports.items()))}"
    yield from (f"metadata {key} = {value}" for key, value in sorted(model.metadata_props.items()))
    yield from (f"function {f.domain}::{f.name}" for f in sorted(model.functions.values(), key=lambda f: f.name))
    yield from (f"input {typed(value)}" for value in graph.inputs)
    for value in graph.initializers.values():
        array = const_array(value, limit=64)
        yield f"constant {typed(value)}" + ("" if array is None else f" = {array.tolist()}")
    for node in graph:
        outputs = ", ".join(typed(value) for value in node.outputs)
        inputs = ", ".join("-" if value is None else str(value.name) for value in node.inputs)
        attributes = ", ".join(f"{name}={shown(a)}" for name, a in sorted(node.attributes.items()))
        domain = f"{node.domain}::" if node.domain else ""
        yield f"{outputs} = {domain}{node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else "")
    yield from (f"output {typed(value)}" for value in graph.outputs)


def typed(value: ir.Value) -> str:
    kind = "?" if value.dtype is None else value.dtype.name.lower()
    shape = "[?]" if value.shape is None else "[" + ",".join(str(d) for d in value.shape) + "]"
    return f"{value.name} {kind}{shape}"


def shown(attribute: Any) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return str(attribute.value.numpy().tolist())
    if attribute.type == ir.AttributeType.GRAPH:
        return f"<graph of {attribute.value.num_nodes()} nodes>"
    return f"{attribute.value:.6g}" if attribute.type == ir.AttributeType.FLOAT else str(attribute.value)


def sparse(options: str = "") -> ir.Model:
    model = tiny.decoder(layers=1)
    passes.run(model, [passes.parse(SPARSE + options)])
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_raised(tiny_export: Callable[[str], Exported], golden: Golden, family: str) -> None:
    golden(f"raised.{family}", text(raised(tiny_export(family))))


@pytest.mark.parametrize("select", ["head", "group"])
def test_token_sparse(golden: Golden, select: str) -> None:
    golden(f"token_sparse.{select}", text(sparse(f",select={select}")))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cache(golden: Golden, phase: str) -> None:
    source = sparse() if phase == "prefill" else tiny.decoder(layers=1)
    golden(f"cache.{phase}", text(insert_cache(source, phase)))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_paged_cache(golden: Golden, tmp_path: Path, phase: str) -> None:
    layer = {"weight": np.zeros((2, 64), np.float32), "bias": np.zeros(2, np.float32)}
    Surrogate("linear", (layer,)).save(tmp_path / "w.safetensors")
    model = tiny.decoder(layers=1)
    passes.run(model, [passes.parse(f"kvzap:threshold=-3.5,window=8,weights={tmp_path / 'w.safetensors'}")])
    golden(f"paged.{phase}", text(insert_paged_cache(model, PagedCacheOptions(phase, page=16, window=8))))


@pytest.mark.parametrize("name", ["snapkv", "random-kv", "streaming-llm"])
def test_policies(golden: Golden, name: str) -> None:
    model = tiny.decoder(layers=1)
    passes.run(model, [passes.parse(f"{name}:window=8")])
    golden(name.replace("-", "_"), text(model))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_lowered_to_cpu(golden: Golden, phase: str) -> None:
    golden(f"cpu.{phase}", text(lower(insert_cache(tiny.decoder(layers=1), phase), "cpu", kernels=False).model))


def test_lowered_to_native_kernels(golden: Golden, library: native.Library) -> None:
    golden("native.prefill", text(lower(insert_cache(sparse(), "prefill"), "cpu").model))


def test_lowered_to_plugins(golden: Golden) -> None:
    pytest.importorskip("triton", reason="plugin nodes are those that Triton kernels serve")
    from trtpass.trt.lower import lower as lower_to_plugins

    golden("tensorrt.prefill", text(lower_to_plugins(insert_cache(sparse(), "prefill", capacity=64), 90).model))
