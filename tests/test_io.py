"""Writing models: the same bytes each time, weights once, never in memory as a whole."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
from onnx import TensorProto, parser

from trtpass import io
from trtpass.errors import InputError


def _arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {str(name): value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def _same_weights(one: ir.Model, other: ir.Model) -> None:
    mine, theirs = _arrays(one), _arrays(other)
    assert mine.keys() == theirs.keys() and mine
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])


# save ----------------------------------------------------------------------------------------------------------------


def test_saved_model_is_the_model(tmp_path: Path) -> None:
    model = tiny.decoder(seed=3)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    io.save(model, tmp_path / "m.onnx")
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in before.items())
    again = io.load(tmp_path / "m.onnx")
    _same_weights(model, again)
    assert [node.op_type for node in again.graph] == [node.op_type for node in model.graph]
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "weights.bin"]


def test_layout_of_weights(tmp_path: Path) -> None:
    io.save(tiny.decoder(), tmp_path / "m.onnx", weights="w.bin")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    placed = []
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        size = np.prod(tensor.dims) * (8 if tensor.data_type == TensorProto.INT64 else 4)
        assert (tensor.data_location == TensorProto.EXTERNAL) == (size > 1024), tensor.name
        if entries:
            assert entries["location"] == "w.bin" and int(entries["length"]) == size
            placed.append((int(entries["offset"]), int(entries["length"]), tensor.name))
    placed.sort()
    assert len(placed) > 5
    assert [name for _, _, name in placed] == sorted(name for _, _, name in placed)
    assert all(offset % 4096 == 0 for offset, _, _ in placed)
    ends = [offset + length for offset, length, _ in placed]
    assert all(end <= start for end, (start, _, _) in zip(ends, placed[1:], strict=False))
    assert (tmp_path / "w.bin").stat().st_size == ends[-1]


def test_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    io.save(tiny.decoder(), tmp_path / "a" / "m.onnx")
    io.save(tiny.decoder(), tmp_path / "b" / "m.onnx")
    io.save(io.load(tmp_path / "a" / "m.onnx"), tmp_path / "c" / "m.onnx")  # from external tensors too
    for other in ("b", "c"):
        for file in ("m.onnx", "weights.bin"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / other / file).read_bytes(), (other, file)


def test_types_and_nested_initializers_survive(tmp_path: Path) -> None:
    """Every element type of at least 8 bits as a large initializer, and one in a subgraph."""
    model = parser.parse_model(
        """<ir_version: 13, opset_import: ["" : 26]> g (float[2, 600] x, bool c) => (float[2, 600] y) {
          y = If (c) < then_branch = t () => (float[2, 600] p) { p = Add (x, inner) },
                       else_branch = e () => (float[2, 600] q) { q = Relu (x) } > }"""
    )
    inner = onnx.numpy_helper.from_array(np.random.default_rng(0).random(600, np.float32), "inner")
    model.graph.node[0].attribute[0].g.initializer.append(inner)
    rng = np.random.default_rng(1)
    for name, number in TensorProto.DataType.items():
        if name not in ("UNDEFINED", "STRING", "FLOAT6E2M3", "FLOAT6E3M2"):
            values = rng.integers(0, 2, (3, 2000))
            model.graph.initializer.append(onnx.helper.make_tensor(name, number, values.shape, values.reshape(-1)))
    model.graph.initializer.append(onnx.helper.make_tensor("STRING", TensorProto.STRING, [2], [b"a" * 2000, b"\xff"]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = io.load(tmp_path / "m.onnx")
    io.save(loaded, tmp_path / "n.onnx")
    again = io.load(tmp_path / "n.onnx")
    _same_weights(loaded, again)
    external = {tensor.name for tensor in io.tensors(again) if isinstance(tensor, ir.ExternalTensor)}
    assert {"inner", "FLOAT", "BFLOAT16", "INT4", "BOOL", "COMPLEX128"} <= external and "STRING" not in external


def test_renamed_value_is_saved_under_its_name(tmp_path: Path) -> None:
    model = tiny.decoder()
    value = next(value for value in model.graph.initializers.values() if value.const_value.nbytes > 1024)
    value.name = "renamed"
    io.save(model, tmp_path / "m.onnx")
    again = io.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(_arrays(again)["renamed"], value.const_value.numpy())


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    one, two = tiny.decoder(seed=0), tiny.decoder(seed=0)
    io.save_shared({"a.onnx": one, "b.onnx": two}, tmp_path)
    io.save(one, tmp_path / "alone.onnx", weights="alone.bin")
    assert (tmp_path / "weights.bin").read_bytes() == (tmp_path / "alone.bin").read_bytes()
    _same_weights(io.load(tmp_path / "a.onnx"), one)
    _same_weights(io.load(tmp_path / "b.onnx"), two)


def test_shared_names_with_other_content_are_kept_apart(tmp_path: Path) -> None:
    one, two = tiny.decoder(seed=0), tiny.decoder(seed=1)
    io.save_shared({"a.onnx": one, "b.onnx": two}, tmp_path)
    _same_weights(io.load(tmp_path / "a.onnx"), one)
    _same_weights(io.load(tmp_path / "b.onnx"), two)


def test_one_tensor_under_two_names_is_stored_once(tmp_path: Path) -> None:
    one, two = tiny.decoder(seed=0), tiny.decoder(seed=0)
    for name, value in two.graph.initializers.items():
        value.const_value = one.graph.initializers[name].const_value
    value = next(value for value in two.graph.initializers.values() if value.const_value.nbytes > 1024)
    value.name = "another_name"
    io.save_shared({"a.onnx": one, "b.onnx": two}, tmp_path)
    io.save(one, tmp_path / "alone.onnx", weights="alone.bin")
    assert (tmp_path / "weights.bin").stat().st_size == (tmp_path / "alone.bin").stat().st_size
    assert "another_name" in _arrays(io.load(tmp_path / "b.onnx"))


def test_refuses_to_overwrite_the_weights_it_reads(tmp_path: Path) -> None:
    io.save(tiny.decoder(), tmp_path / "m.onnx")
    model = io.load(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="still reads its weights"):
        io.save(model, tmp_path / "m.onnx")
    io.save(model, tmp_path / "n.onnx", weights="other.bin")
    _same_weights(io.load(tmp_path / "m.onnx"), io.load(tmp_path / "n.onnx"))


@pytest.mark.parametrize("name", ["../w.bin", "/w.bin", "a/w.bin", "", ".."])
def test_weights_stay_beside_the_model(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="output name"):
        io.save(tiny.decoder(), tmp_path / "m.onnx", weights=name)
    assert not list(tmp_path.iterdir())


def test_protobuf_above_two_gib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "MAX_PROTO", 1000)
    with pytest.raises(InputError, match="the limit of protobuf"):
        io.save(tiny.decoder(), tmp_path / "m.onnx")
    model = tiny.decoder()
    node = ir.node("Constant", [], {"value": ir.tensor(np.zeros(1000, np.float32))}, name="large")
    model.graph.append(node)
    with pytest.raises(InputError, match="constants inside the graph have 4000 bytes"):
        io.save(model, tmp_path / "n.onnx")


def test_strip_metadata(tmp_path: Path) -> None:
    text = b"/home/somebody/model.py"
    proto = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 24, "local" : 1]> g
        (float[N] x, bool c) => (float[N] y) <float[1] w = {1}> {
          y = If (c) < then_branch = t () => (float[N] p) { p = local.f (x) },
                       else_branch = e () => (float[N] q) { k = Constant <value = float[1] {2}> ()  q = Add (k, w) } > }
        <domain: "local", opset_import: ["" : 24]> f (a) => (b) { b = Relu (a) }"""
    )
    branch = proto.graph.node[0].attribute[1].g
    owners: list[Any] = [proto, proto.graph, branch, branch.node[0], proto.graph.node[0], proto.functions[0]]
    owners += [proto.functions[0].node[0], proto.graph.initializer[0], branch.node[0].attribute[0].t]
    owners += [proto.graph.input[0], proto.graph.output[0], branch.output[0]]
    for owner in owners:
        owner.doc_string = text.decode()
        owner.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=text.decode())
    proto.metadata_props.add(key="trtpass.kept", value="yes")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = io.load(tmp_path / "m.onnx")
    io.strip_metadata(model)
    io.save(model, tmp_path / "n.onnx")
    assert text in (tmp_path / "m.onnx").read_bytes()
    assert text not in (tmp_path / "n.onnx").read_bytes()
    assert io.load(tmp_path / "n.onnx").metadata_props == {"trtpass.kept": "yes"}


# size ----------------------------------------------------------------------------------------------------------------

LARGE = """
import resource, sys, time
from trtpass import io
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
model = io.load(sys.argv[1])
seconds = time.perf_counter() - start
assert model.graph.initializers["layer.35.down"].const_value.numpy()[-1, -1] == 0
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_an_8b_shaped_model_loads_without_its_weights(tmp_path: Path) -> None:
    """36 layers, 16 GB of (sparse) fp16 weights: under 2 s and 300 MB."""
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 12288), "up": (4096, 12288), "down": (12288, 4096)}
    graph = onnx.GraphProto(name="large")
    graph.input.append(onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 4096]))
    graph.output.append(onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT16, None))
    end = 0
    for layer in range(36):
        for name, shape in {
            **shapes,
            **({"embed": (151936, 4096), "head": (4096, 151936)} if layer == 0 else {}),
        }.items():
            tensor = graph.initializer.add(name=f"layer.{layer}.{name}", data_type=TensorProto.FLOAT16, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            length = 2 * shape[0] * shape[1]
            for key, value in (("location", "w.bin"), ("offset", end), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            end += length
            graph.node.add(op_type="MatMul", input=["x", tensor.name], output=[f"{tensor.name}.out"])
    graph.node.add(op_type="Relu", input=["x"], output=["y"])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as handle:
        handle.truncate(end)
    assert end > 15e9
    command = [sys.executable, "-c", LARGE, str(tmp_path / "m.onnx")]
    seconds, megabytes = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert seconds < 2 and megabytes < 300, (seconds, megabytes)


STREAMED = """
import resource, sys
from pathlib import Path
from trtpass import io
folder = Path(sys.argv[1])
model = io.load(folder / "m.onnx")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
io.save(model, folder / "n.onnx")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_weights_are_streamed(tmp_path: Path) -> None:
    """Saving 256 MB of mapped weights takes less than 80 MB."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[1] x) => (float[1] y) { y = Relu (x) }'
    )
    for index in range(4):
        tensor = TensorProto(name=f"w{index}", data_type=TensorProto.UINT8, dims=[1 << 26])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", index << 26), ("length", 1 << 26)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as handle:
        handle.truncate(1 << 28)
    command = [sys.executable, "-c", STREAMED, str(tmp_path)]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert megabytes < 80
    assert (tmp_path / "weights.bin").stat().st_size == 1 << 28


def test_importing_is_quick() -> None:
    """No torch, no ONNX Runtime."""
    code = "import sys, trtpass.io; print([m for m in ('torch', 'onnxruntime', 'transformers') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5
