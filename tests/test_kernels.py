"""Every Triton kernel equals its reference in the interpreter, and its geometry is arithmetic that TensorRT has."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are written in Triton")

from kernel_cases import Trial, kernels, outputs_of, stepped, tensors, trials  # noqa: E402
from test_operators import Expr  # noqa: E402

from plugins import all_ops, kernel_ops  # noqa: E402
from trtpass.errors import InputError  # noqa: E402
from trtpass.kernel import Kernel, Launch  # noqa: E402
from trtpass.launch import arguments, launch, run_steps  # noqa: E402
from trtpass.op import Case, Op  # noqa: E402
from trtpass.ptx import compile_ahead, supports, usage  # noqa: E402

WORKERS = 2


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What is wrong with every kernel on every case; empty where it equals its reference."""
    folder = tmp_path_factory.mktemp("interpreter")
    files = [folder / f"made.{number}-of-{WORKERS}" for number in range(WORKERS)]
    script = str(Path(__file__).parent / "kernel_worker.py")
    words = [(folder / f"words.{number}").open("w+") for number in range(WORKERS)]
    running = [
        subprocess.Popen([sys.executable, script, str(file)], stderr=said, stdout=said)
        for file, said in zip(files, words, strict=True)
    ]
    try:
        for worker, said in zip(running, words, strict=True):
            code = worker.wait(timeout=900)
            said.seek(0)
            assert code == 0, said.read()[-3000:]
    finally:
        for worker, said in zip(running, words, strict=True):
            worker.kill()
            said.close()
    return {name: wrong for file in files for name, wrong in json.loads(file.read_text()).items()}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_kernel_equals_reference_in_the_interpreter(trial: Trial, interpreted: Mapping[str, str]) -> None:
    assert interpreted[trial.name] == ""


@pytest.mark.parametrize("trial", trials(), ids=lambda trial: trial.name)
def test_geometry_on_symbols(trial: Trial) -> None:
    """Grid and extras are arithmetic that TensorRT's symbols have; constexprs come from the fixed dimensions."""
    op, kernel = trial.op, trial.kernel
    dims = op.bind([tuple(x.shape) for x in trial.make()])
    symbols = {name: size if name in kernel.fixed else Expr(size) for name, size in dims.items()}
    tactic = kernel.tactics[trial.tactic]
    ints, made = (kernel.geometry(*arguments(op, d, trial.attrs, trial.floating, tactic)) for d in (dims, symbols))

    def values(sizes: tuple[Any, ...]) -> list[int]:
        return [size.value if isinstance(size, Expr) else size for size in sizes]

    assert values(made.grid) == list(ints.grid)
    assert values(made.extras) == list(ints.extras)
    assert dataclasses.replace(made, grid=ints.grid, extras=ints.extras) == ints
    assert len(ints.grid) == 3
    assert len(ints.extras) == len(kernel.extras)
    arguments_of = [*(p.name for p in op.inputs), *kernel.extras, *(p.name for p in op.outputs), *ints.constexprs]
    assert kernel.function.arg_names == arguments_of


@pytest.mark.parametrize(("op", "kernel"), kernels())
def test_example_is_a_call_of_the_operator(op: Op, kernel: Kernel) -> None:
    small, large = kernel.example(8192), kernel.example(131072)
    for example in (small, large):
        shapes = [[example.sizes[axis] for axis in port.axes] for port in op.inputs]
        assert op.bind(shapes) == dict(example.sizes)
        op.complete(example.attrs)
        assert supports(op, kernel, example.sizes, example.attrs, "float16", 90) is True
        assert max(kernel.geometry(*arguments(op, example.sizes, example.attrs, "float16", t)).grid[1]
                   for t in kernel.tactics) <= 65535  # fmt: skip
        assert example.flops > 0 and example.bytes > 0
    assert large.bytes > small.bytes


def _stepped_cases() -> list[Any]:
    return [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in stepped() for case in op.case_list() or ()]  # type: ignore[misc]


@pytest.mark.parametrize(("op", "case"), _stepped_cases())
def test_steps_make_the_operator(op: Op, case: Case) -> None:
    inputs = tensors(op, case)
    floating = next((str(x.dtype).removeprefix("torch.") for x in inputs if x.is_floating_point()), "float32")
    made = run_steps(op, inputs, case.attrs, outputs_of)
    for port, actual, expected in zip(op.outputs, made, outputs_of(op, inputs, case.attrs), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, port.name
        limits = op.tolerance.of(floating) if expected.dtype.is_floating_point else {}
        np.testing.assert_allclose(actual.double().numpy(), expected.double().numpy(), **limits, err_msg=port.name)


def test_every_step_has_a_kernel_and_a_name_of_its_own() -> None:
    names = list(all_ops())
    for op in stepped():
        for step in op.step_list() or ():  # type: ignore[misc]
            assert step.op.kernel_list is not None, step.op.name
            assert step.op.folder == op.folder
        names += {step.op.name for step in op.step_list() or ()}  # type: ignore[misc]  # one may come several times
    assert len(set(names)) == len(names)
    assert set(kernel_ops()) <= set(names)


def _token_sparse() -> tuple[Op, Kernel]:
    op, kernel = next(p.values for p in kernels() if p.values[0].name == "TokenSparseAttention")
    return op, kernel


@pytest.mark.usefixtures("own_cache")
def test_spills_are_seen() -> None:
    op, kernel = _token_sparse()

    def on_one_warp(*given: Any) -> Launch:
        return dataclasses.replace(kernel.geometry(*given), warps=1)

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

    def by_length(d: Any, *others: Any) -> Launch:
        how = kernel.geometry(d, *others)
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
