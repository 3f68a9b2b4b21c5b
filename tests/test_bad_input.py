"""The parser edge: broken and hostile ONNX files give one InputError each; no crash, no hang, no read elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from trtpass import io
from trtpass.errors import InputError

FUZZ = Path(__file__).parent / "fuzz" / "worker.py"
SEEDS = 800
WORKERS = 2
LIMIT_S = 30  # without an outcome: the first file takes 3 s (imports), another some milliseconds


def _model(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24, "local" : 1]> g {text}')


def _simple() -> onnx.ModelProto:
    """y = Relu(x + w), with w [8, 8] in the file."""
    model = _model("(float[N, 8] x) => (float[N, 8] y) { z = MatMul (x, w) y = Relu (z) }")
    model.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"))
    return model


def _external(location: str, offset: object = 0, length: object = 256) -> onnx.ModelProto:
    model = _simple()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return model


def _write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializePartialToString())
    return path


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        io.load(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert caught.value.expected and caught.value.fix, message
    assert path.name in caught.value.found


# files ---------------------------------------------------------------------------------------------------------------


def test_not_a_model_file(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.onnx", "No such file")
    _refused(tmp_path, "a directory")
    (tmp_path / "empty.onnx").touch()
    _refused(tmp_path / "empty.onnx", "is empty")
    os.mkfifo(tmp_path / "pipe.onnx")  # opening it would block for ever
    _refused(tmp_path / "pipe.onnx", "not a regular file")
    (tmp_path / "text.onnx").write_text("hello, this is no model\n" * 100)
    _refused(tmp_path / "text.onnx", "not a protobuf")
    (tmp_path / "other.onnx").write_bytes(onnx.OperatorSetIdProto(domain="x", version=1).SerializeToString())
    _refused(tmp_path / "other.onnx")
    with pytest.raises(InputError, match="cannot be read"):
        io.load("nul\0.onnx")


def test_truncated(tmp_path: Path) -> None:
    data = _simple().SerializeToString()
    for size in range(1, len(data) - 1, 7):
        (tmp_path / "m.onnx").write_bytes(data[:size])
        _refused(tmp_path / "m.onnx")


def test_above_two_gib(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    with path.open("wb") as handle:
        handle.truncate(1 << 31)
    _refused(path, "2147483648 bytes", "external data")


def test_nested_too_deeply(tmp_path: Path) -> None:
    data = b""
    for _ in range(5000):  # graph.node.attribute.g.node. ..., by hand: protobuf cannot write what it cannot read
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size, number = len(data), b""
            while size > 127:
                number, size = number + bytes([size & 127 | 128]), size >> 7
            data = bytes([field << 3 | 2]) + number + bytes([size]) + data
    size, number = len(data), b""
    while size > 127:
        number, size = number + bytes([size & 127 | 128]), size >> 7
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a" + bytes([7 << 3 | 2]) + number + bytes([size]) + data)
    _refused(path, "nested too deeply")


# models --------------------------------------------------------------------------------------------------------------


def _edit(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = _simple()
    change(model)
    return model


def _functions(first: str, second: str) -> onnx.ModelProto:
    """g calls local.f; the bodies of f and h are given."""
    return parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 24, "local" : 1]> g (float[N] x) => (float[N] y) { y = local.f (x) }'
        f'<domain: "local", opset_import: ["" : 24, "local" : 1]> f (a) => (b) {{ {first} }}'
        f'<domain: "local", opset_import: ["" : 24, "local" : 1]> h (a) => (b) {{ {second} }}'
    )


def _edit_function(change: Callable[[onnx.FunctionProto], object]) -> onnx.ModelProto:
    model = _functions("b = Relu (a)", "b = Relu (a)")
    change(model.functions[0])
    return model


def _bomb() -> onnx.ModelProto:
    """40 functions, each of which calls the next one twice: 2^40 nodes when inlined."""
    text = '<ir_version: 10, opset_import: ["" : 24, "local" : 1]> g (float[N] x) => (float[N] y) { y = local.f0 (x) }'
    for index in range(40):
        call = f"local.f{index + 1}" if index < 39 else "Relu"
        text += (
            f'<domain: "local", opset_import: ["" : 24, "local" : 1]> f{index} (a) => (c) '
            f"{{ b = {call} (a)  c = {call} (b) }}"
        )
    return parser.parse_model(text)


def _dims(*dims: int) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


IF = """(float[N] x, bool c) => (float[N] y) {
  y = If (c) < then_branch = t () => (float[N] p) { %s }, else_branch = e () => (float[N] q) { q = Relu (x) } >
}"""
CASES: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "no graph": (_edit(lambda m: m.ClearField("graph")), ("no graph",)),
    "no nodes": (_edit(lambda m: m.graph.ClearField("node")), ("no nodes",)),
    "no IR version": (_edit(lambda m: m.ClearField("ir_version")), ("IR version",)),
    "late IR version": (_edit(lambda m: setattr(m, "ir_version", 14)), ("IR version 14", "3 to 13")),
    "no opset": (_edit(lambda m: m.ClearField("opset_import")), ("no operator set",)),
    "late opset": (_edit(lambda m: setattr(m.opset_import[0], "version", 27)), ("opset 27", "opset 26")),
    "opset of the standard domain missing": (
        _edit(lambda m: m.opset_import.pop(0)),
        ("MatMul node 'z'", "not imported"),
    ),
    "cycle": (
        _model("(float[N] x) => (float[N] y) { a = Add (x, c)  b = Relu (a)  c = Relu (b)  y = Relu (c) }"),
        ("cycle", "Add node 'a'", "Relu node 'b'"),
    ),
    "cycle of one": (_model("(float[N] x) => (float[N] y) { y = Add (x, y) }"), ("cycle",)),
    "wrong order": (
        _model("(float[N] x) => (float[N] y) { y = Relu (a)  a = Relu (x) }"),
        ("Relu node 'y'", "before Relu node 'a'"),
    ),
    "undefined": (_model("(float[N] x) => (float[N] y) { y = Relu (nothing) }"), ("'nothing'", "Relu node 'y'")),
    "undefined output": (_model("(float[N] x) => (float[N] y) { z = Relu (x) }"), ("output 'y'",)),
    "name twice": (_model("(float[N] x) => (float[N] y) { y = Relu (x)  y = Exp (x) }"), ("'y' is defined twice",)),
    "input twice": (_model("(float[N] x, float[N] x) => (float[N] y) { y = Relu (x) }"), ("'x' is defined twice",)),
    "initializer twice": (
        _edit(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        ("two initializers 'w'",),
    ),
    "unknown operators": (
        _model("(float[N] x) => (float[N] y) { a = Frob (x)  b = local.Nope (a)  y = LayerNorm (b) }"),
        ("Frob node 'a'", "local::Nope node 'b'", "LayerNorm node 'y'"),
    ),
    "too many inputs": (_model("(float[N] x) => (float[N] y) { y = Relu (x, x) }"), ("2 inputs", "1 to 1")),
    "unknown attribute": (_model("(float[N] x) => (float[N] y) { y = Relu <k = 1> (x) }"), ("'k'",)),
    "attribute of another type": (_model("(float[N] x) => (float[N] y) { y = Elu <alpha = 1> (x) }"), ("INT", "FLOAT")),
    "attribute missing": (_model("(float[N] x) => (float[N] y) { y = Cast (x) }"), ("'to'",)),
    "subgraph: undefined": (_model(IF % "p = Relu (nothing)"), ("'nothing'", "subgraph 't'")),
    "subgraph: cycle": (_model(IF % "a = Relu (p)  p = Relu (a)"), ("subgraph 't' has a cycle",)),
    "subgraph: hides an outer name": (_model(IF % "x = Relu (c)  p = Relu (x)"), ("'x' is defined twice",)),
    "subgraph: unknown operator": (_model(IF % "p = Frob (x)"), ("Frob node 'p'",)),
    "subgraph: output from outside": (_model(IF.replace("p)", "x)") % "p = Relu (x)"), ("output 'x'",)),
    "function calls itself": (_functions("b = local.f (a)", "b = Relu (a)"), ("call themselves", "local::f")),
    "functions call each other": (_functions("b = local.h (a)", "b = local.f (a)"), ("local::h", "local::f")),
    "function: undefined": (_functions("b = Relu (x)", "b = Relu (a)"), ("'x'", "function 'f'")),
    "function of another opset": (
        _edit_function(lambda f: setattr(f.opset_import[0], "version", 6)),
        ("Relu node 'b'", "version 6", "14"),
    ),
    "functions that explode": (_bomb(), ("a million nodes",)),
    "dims against data": (_edit(_dims(8, 9)), ("256 bytes", "288 bytes")),
    "dims overflow to the right size": (_edit(_dims(1 << 32, 1 << 32, 64)), ("shape",)),
    "huge dims of nothing": (_edit(_dims(0, 1 << 62, 1 << 62)), ("shape",)),
    "negative dims": (_edit(_dims(-8, -8)), ("shape",)),
    "rank 100": (_edit(_dims(*[1] * 100)), ("shape",)),
    "no such element type": (_edit(lambda m: setattr(m.graph.initializer[0], "data_type", 99)), ("element type 99",)),
    "typed data too short": (
        _edit(lambda m: m.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=1, dims=[8], float_data=[1]))),
        ("1 entries in float_data", "8 entries"),
    ),
    "a name that is not text": (
        onnx.ModelProto.FromString(_simple().SerializeToString().replace(b"\x12\x01z", b"\x12\x01\xff")),
        ("not text",),
    ),
    "external data missing": (_external("absent.bin"), ("'absent.bin'", "No such file")),
    "external data too short": (_external("weights.bin", offset=1), ("ends at byte 257", "256 bytes")),
    "external data of the wrong length": (_external("weights.bin", length=255), ("255 external bytes", "256")),
    "negative offset": (_external("weights.bin", offset=-4), ("offset '-4'",)),
    "offset that overflows": (_external("weights.bin", offset=2**64), ("offset",)),
    "location absolute": (_external("/etc/passwd"), ("'/etc/passwd'", "inside the model's folder")),
    "location above": (_external("../outside.bin"), ("'../outside.bin'", "inside the model's folder")),
    "location above, hidden": (_external("sub/../../outside.bin"), ("inside the model's folder",)),
    "location with a drive": (_external("C:\\weights.bin"), ("inside the model's folder",)),
    "location empty": (_external(""), ("does not say where",)),
    "location a directory": (_external("sub"), ("not a file",)),
    "location a link out": (_external("link.bin"), ("a link that leads out",)),
    "location in a linked folder": (_external("linked/outside.bin"), ("a link that leads out",)),
    "location a hard link": (_external("hard.bin"), ("hard links",)),
    "location a pipe": (_external("pipe"), ("not a file",)),
    "location in a loop of links": (_external("loop"), ("cannot be read",)),
    "location too long": (_external("n" * 5000), ("cannot be read",)),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.bin").write_bytes(bytes(256))
    (tmp_path / "outside2.bin").write_bytes(bytes(256))
    (folder / "weights.bin").write_bytes(bytes(256))
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "hard.bin").hardlink_to(tmp_path / "outside2.bin")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    model, words = CASES[name]
    _refused(_write(folder, model), *words)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(np.arange(64, dtype=np.float32).tobytes())
    (tmp_path / "link.bin").symlink_to("real.bin")
    model = io.load(_write(tmp_path, _external("link.bin")))
    assert model.graph.initializers["w"].const_value.numpy()[7, 7] == 63


@pytest.mark.parametrize("domain", ["trtpass", "com.microsoft"])
def test_known_domains_need_no_function(tmp_path: Path, domain: str) -> None:
    model = _edit(lambda m: m.opset_import.add(domain=domain, version=1))
    model.graph.node[1].domain, model.graph.node[1].op_type = domain, "Anything"
    assert io.load(_write(tmp_path, model)).graph[1].domain == domain


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    model = _model("(float[N] x) => (float[N] y) { y = Relu (x) }")
    model.graph.node[0].input[0] = "\x1b[31m" + "n" * 10_000
    with pytest.raises(InputError) as caught:
        io.load(_write(tmp_path, model))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


# fuzz ----------------------------------------------------------------------------------------------------------------


def _status(worker: subprocess.Popen[bytes], output: Path) -> str:
    """How the worker ended; it is killed when its output does not grow for LIMIT_S."""
    size, since = 0, time.monotonic()
    while worker.poll() is None:
        if output.stat().st_size > size:
            size, since = output.stat().st_size, time.monotonic()
        elif time.monotonic() - since > LIMIT_S:
            worker.kill()
            worker.wait()
            return f"hung for {LIMIT_S} s"
        time.sleep(0.1)
    return str(worker.returncode)


def test_mutated_files(tmp_path: Path) -> None:
    """SEEDS mutated files through load, save and inspect: a TrtpassError or success, in bounded time."""
    workers = []
    for index in range(WORKERS):
        folder = tmp_path / str(index)
        folder.mkdir()
        command = [sys.executable, str(FUZZ), str(folder), str(index - 4), str(SEEDS), str(WORKERS)]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            workers.append((folder, subprocess.Popen(command, stdout=out, stderr=err)))
    outcomes: Counter[str] = Counter()
    faults = []
    for folder, worker in workers:
        status = _status(worker, folder / "out")
        lines = (folder / "out").read_text().splitlines()
        for line in lines:
            if line.startswith("done"):
                _, seed, outcome, detail = line.split(" ", 3)
                outcomes[outcome] += 1
                assert int(seed) >= 0 or outcome == "ok", f"the unmutated model {seed}: {detail}"
                if outcome == "unguarded":
                    faults.append(f"seed {seed}: {json.loads(detail)}")
        if status != "0":
            faults.append(
                f"exit {status} at '{lines[-1] if lines else 'start'}': {(folder / 'err').read_text()[-2000:]}"
            )
    assert not faults, "\n".join(faults[:5])
    assert outcomes.total() == SEEDS + 4
    assert outcomes["ok"] > SEEDS / 10 and outcomes["refused"] > SEEDS / 10, outcomes  # neither side is vacuous
