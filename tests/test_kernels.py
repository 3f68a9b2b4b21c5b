"""Every Triton kernel equals its reference in the interpreter, and compiles for each GPU ahead of time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are written in Triton")

from kernel_cases import check, kernel_cases, kernels  # noqa: E402
from kernel_worker import SMALL  # noqa: E402
from test_operators import Expr  # noqa: E402

from trtpass.errors import InputError  # noqa: E402
from trtpass.kernels import COMPUTE_CAPABILITIES, SCRATCH, compile_ahead, dtypes_of, launch, supports, usage  # noqa: E402
from trtpass.op import FLOATS, Case, Kernel, Launch, Op  # noqa: E402

WIDTHS = [64, pytest.param(24, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What every kernel wrote on every small case."""
    file = tmp_path_factory.mktemp("interpreter") / "made.npz"
    worker = [sys.executable, str(Path(__file__).parent / "kernel_worker.py"), str(file)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


@pytest.mark.parametrize(("op", "kernel", "case"), kernel_cases())
def test_kernel_equals_reference_in_the_interpreter(
    op: Op, kernel: Kernel, case: Case, interpreted: dict[str, np.ndarray], request: pytest.FixtureRequest
) -> None:
    tokens = op.bind([x.shape for x in case.make(0)])["S"]
    if tokens > SMALL:
        pytest.skip(f"S = {tokens} is above {SMALL}: too slow in Triton's interpreter")
    name = request.node.callspec.id
    check(op, case, [interpreted[f"{name} {number}"] for number in range(len(op.outputs))])


@pytest.mark.parametrize(("op", "kernel", "case"), kernel_cases())
def test_geometry_on_symbols(op: Op, kernel: Kernel, case: Case) -> None:
    """Grid and extras are arithmetic that TensorRT's symbols have; constexprs come from the fixed dimensions."""
    inputs = case.make(0)
    dims = op.bind([x.shape for x in inputs])
    dtypes = dtypes_of(op, next(str(x.dtype) for x in inputs if x.dtype.kind == "f"))
    attrs = type(dtypes)(**op.complete(case.attrs))
    symbols = {name: size if name in kernel.fixed else Expr(size) for name, size in dims.items()}
    ints, made = (kernel.geometry(type(dtypes)(**d), attrs, dtypes) for d in (dims, symbols))

    def values(sizes: tuple[Any, ...]) -> list[int]:
        return [size.value if isinstance(size, Expr) else size for size in sizes]

    assert values(made.grid) == list(ints.grid)
    assert values(made.extras) == list(ints.extras)
    assert dataclasses.replace(made, grid=ints.grid, extras=ints.extras) == ints
    assert len(ints.grid) == 3
    assert len(ints.extras) == len(kernel.extras)
    arguments = [*(p.name for p in op.inputs), *kernel.extras, *(p.name for p in op.outputs), *ints.constexprs]
    assert kernel.function.arg_names == arguments


@pytest.mark.parametrize("floating", FLOATS)
@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("op", "kernel"), kernels())
def test_kernel_compiles_without_spills(op: Op, kernel: Kernel, width: int, cc: int, floating: str) -> None:
    sizes = dict.fromkeys(kernel.fixed, width)
    if (reason := supports(op, kernel, sizes, {}, floating, cc)) is not True:
        pytest.skip(str(reason))
    made = compile_ahead(op, kernel, sizes, {}, floating, cc)
    assert re.search(rf"^\.target sm_{cc}a?$", made.ptx, re.M)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.shared <= 99 * 1024, "the most that SM86, 89 and 120 give a program"

    pointers = ["ptr"] * len(op.inputs), ["ptr"] * len(op.outputs)
    declared = [*pointers[0], *["u32"] * len(kernel.extras), *pointers[1]]
    assert [kind for kind, _ in made.parameters] == [*declared, *["ptr"] * SCRATCH]
    *own, _, _ = (made.references(symbol) for _, symbol in made.parameters)
    assert all(own), "a declared parameter is not used"
    assert [made.references(symbol) for _, symbol in made.parameters[-SCRATCH:]] == [0] * SCRATCH

    used = usage(made)
    assert (used.spill_stores, used.spill_loads) == (0, 0), used


def _token_sparse() -> tuple[Op, Kernel]:
    op, kernel = next(p.values for p in kernels() if p.values[0].name == "TokenSparseAttention")
    return op, kernel


def test_spills_are_seen() -> None:
    op, kernel = _token_sparse()

    def on_one_warp(d: Any, a: Any, dtypes: Any) -> Launch:
        return dataclasses.replace(kernel.geometry(d, a, dtypes), warps=1)

    greedy = dataclasses.replace(kernel, geometry=on_one_warp)
    assert usage(compile_ahead(op, greedy, {"D": 64, "Dv": 64}, {}, "float16", 80)).spill_stores > 0


def test_a_kernel_that_does_not_apply_says_why() -> None:
    op, kernel = _token_sparse()
    assert supports(op, kernel, {"D": 64, "Dv": 256}, {}, "float16", 89) == "head width 256 is above 128"
    assert supports(op, kernel, {"D": 64}, {}, "float16", 89) == "the size of Dv is not known"
    with pytest.raises(InputError, match="does not apply: compute capability 75 is below 80"):
        compile_ahead(op, kernel, {"D": 64, "Dv": 64}, {}, "float16", 75)


def test_constexprs_of_changing_dimensions_are_refused() -> None:
    op, kernel = _token_sparse()

    def by_length(d: Any, a: Any, dtypes: Any) -> Launch:
        how = kernel.geometry(d, a, dtypes)
        return dataclasses.replace(how, constexprs={**how.constexprs, "BLOCK": d.S})

    with pytest.raises(InputError, match=r"attend_selected\.BLOCK is SymbolicDim"):
        compile_ahead(op, dataclasses.replace(kernel, geometry=by_length), {"D": 64, "Dv": 64}, {}, "float16", 80)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, out: (q.transpose(2, 3).contiguous().transpose(2, 3), out), "q is not contiguous"),
        (lambda q, out: (q, out[:, :, 1:].contiguous()), r"out is torch.float32 \[1, 2, 0, 16\]"),
        (lambda q, out: (q, out.half()), r"out is torch.float16 \[1, 2, 1, 16\]"),
        (lambda q, out: (q.double(), out), r"q is torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, words: str) -> None:
    op, kernel = _token_sparse()
    case = op.case_list()[0] if op.case_list else None
    assert case is not None
    q, *others = (torch.from_numpy(x) for x in case.make(0))
    if "contiguous" in words:
        q, others = (q.repeat(1, 1, 2, 1), [*(x.repeat(1, 1, 2, 1) for x in others[:2]), *others[2:]])
    q, out = change(q, torch.empty_like(q))
    with pytest.raises(InputError, match=words):
        launch(op, kernel, [q, *others], [out], {})


def test_operators_are_found_without_triton() -> None:
    code = "import sys, plugins; plugins.all_ops(); sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
