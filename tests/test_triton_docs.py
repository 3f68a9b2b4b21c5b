"""The kernel in docs/triton.md is one: it equals its definition in the interpreter, and compiles."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "triton.md"
HEAD = """
from __future__ import annotations
from typing import Annotated
import torch, triton
import triton.language as tl
from trtpass.kernel import Example, Kernel, Launch
from trtpass.launch import launch
from trtpass.op import FLOATS, Port, Tolerance, op
from trtpass.ptx import compile_ahead, usage
"""
TAIL = """
@op(name="KeepPositive", source="none", shape=lambda d, a: {"out": (d.B, d.S)}, tolerance=Tolerance({}, {}, "exact"))
def keep_positive_(
    x: Annotated[torch.Tensor, Port("B S", FLOATS)]
) -> Annotated[torch.Tensor, Port("B S", FLOATS, name="out")]:
    return x.clamp(min=0)

if __name__ == "__main__":
    import sys
    if sys.argv[1] == "numbers":
        x = torch.randn(3, 2500)
        for tactic in range(2):
            out = torch.full_like(x, float("nan"))
            launch(keep_positive_, KERNEL, [x], [out], {}, tactic)
            assert torch.equal(out, keep_positive_(x))
    else:
        made = compile_ahead(keep_positive_, KERNEL, {}, {}, "float16", 90)
        assert usage(made).spill_stores == 0 and len(made.parameters) == 3
        assert KERNEL.example(8192).sizes == {"B": 1, "S": 8192}
"""


@pytest.mark.parametrize("what", ["numbers", "code"])
def test_the_kernel_of_the_page(what: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    text = HEAD + blocks[0] + TAIL
    (tmp_path / "page.py").write_text(text.replace("from __future__ import annotations\n", ""))
    root = str(PAGE.parent.parent)
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    if what == "numbers":
        environment["TRITON_INTERPRET"] = "1"
    words = [sys.executable, str(tmp_path / "page.py"), what]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
