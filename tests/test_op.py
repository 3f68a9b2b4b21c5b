"""The operator contract itself."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import pytest

from trtpass.errors import InputError
from trtpass.op import FLOAT32, FLOATS, INT32, Attr, Op, Port, Tolerance, op

Tensor = Any
EXACT = Tolerance({"float32": 0.0}, {"float32": 0.0}, "a copy of the input")


def _declare() -> Op:
    @op(name="Repeat", source="none", shape=lambda d, a: {"y": (d.B, d.T * a.times), "n": (d.B,)}, tolerance=EXACT)
    def repeat(
        x: Annotated[Tensor, Port("B T", FLOATS)],
        lengths: Annotated[Tensor, Port("B", INT32)],
        *,
        times: int = 2,
        gain: float = 1.0,
        mode: str = "tile",
    ) -> tuple[Annotated[Tensor, Port("B U", FLOAT32, name="y")], Annotated[Tensor, Port("B", INT32, name="n")]]:
        """Doc."""
        return x * gain, lengths

    return repeat


def test_signature_is_the_schema() -> None:
    declared = _declare()
    assert declared.name == "Repeat"
    assert declared.doc == "Doc."
    assert declared.inputs == (Port("B T", FLOATS, "x"), Port("B", INT32, "lengths"))
    assert declared.outputs == (Port("B U", FLOAT32, "y"), Port("B", INT32, "n"))
    assert declared.attrs == (Attr("times", int, 2), Attr("gain", float, 1.0), Attr("mode", str, "tile"))
    assert declared(3.0, 4, gain=2.0) == (6.0, 4)


def test_attributes_are_completed_and_checked() -> None:
    declared = _declare()
    assert declared.complete({"times": 3}) == {"times": 3, "gain": 1.0, "mode": "tile"}
    assert declared.complete({"gain": 2})["gain"] == 2
    with pytest.raises(InputError, match="no attribute 'tims'"):
        declared.complete({"tims": 3})
    with pytest.raises(InputError, match="a value of type int"):
        declared.complete({"times": 0.5})
    with pytest.raises(InputError, match="a value of type int"):
        declared.complete({"times": True})


def test_one_name_has_one_size() -> None:
    declared = _declare()
    assert declared.bind([(2, 5), (2,)]) == {"B": 2, "T": 5}
    with pytest.raises(InputError, match="B = 3, but B = 2 elsewhere"):
        declared.bind([(2, 5), (3,)])
    with pytest.raises(InputError, match=r"has shape \[2, 5, 1\]"):
        declared.bind([(2, 5, 1), (2,)])
    with pytest.raises(InputError, match="got 1 inputs"):
        declared.bind([(2, 5)])


def test_output_shapes_follow_ports_and_attributes() -> None:
    declared = _declare()
    assert declared.output_shapes([(2, 5), (2,)], {}) == {"y": (2, 10), "n": (2,)}
    assert declared.output_shapes([(2, 5), (2,)], {"times": 3})["y"] == (2, 15)


def test_bad_declarations_are_refused() -> None:
    def declare(reference: Any) -> Op:
        return op(name="Bad", source="none", shape=lambda d, a: {}, tolerance=EXACT)(reference)

    def no_default(x: Annotated[Tensor, Port("B", INT32)], *, times: int) -> Annotated[Tensor, Port("B", INT32, "y")]:
        return x

    def list_attribute(
        x: Annotated[Tensor, Port("B", INT32)],
        *,
        times: list[int] = [],  # noqa: B006
    ) -> Annotated[Tensor, Port("B", INT32, "y")]:
        return x

    def unnamed_output(x: Annotated[Tensor, Port("B", INT32)]) -> Annotated[Tensor, Port("B", INT32)]:
        return x

    def bare_tensor(x: Any) -> Annotated[Tensor, Port("B", INT32, "y")]:
        return x

    for reference, words in (
        (no_default, "with a default"),
        (list_attribute, "int, float or str"),
        (unnamed_output, "needs a name"),
        (bare_tensor, "annotate tensors"),
    ):
        with pytest.raises(TypeError, match=words):
            declare(reference)
    with pytest.raises(ValueError, match="'dynamic' or 'static'"):
        _declare().body("quick")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import trtpass.op", "torch onnx onnx_ir onnxscript numpy"),
        ("import plugins; plugins.all_ops()", "torch onnx onnx_ir onnxscript onnxruntime"),
        ("import plugins; [o.case_list() for o in plugins.all_ops().values()]", "torch onnx onnx_ir onnxscript"),
        ("import plugins; from plugins._library import function; [function(o, 'static') for o in "
         "plugins.all_ops().values()]", "torch"),
    ],
)  # fmt: skip
def test_imports_stay_light(statement: str, absent: str) -> None:
    """A serving machine has no torch; schemas must be readable without onnx."""
    script = f"import sys; {statement}; print([m for m in '{absent}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
