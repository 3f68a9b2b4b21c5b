"""Machine code of every kernel, tactic and architecture: no spills, the ABI of the golden file, and what is a fault."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="kernels are written in Triton")

from kernel_cases import kernels  # noqa: E402

from trtpass import kernels_report  # noqa: E402
from trtpass.errors import InputError  # noqa: E402
from trtpass.kernel import Kernel  # noqa: E402
from trtpass.kernels_page import page, seconds  # noqa: E402
from trtpass.kernels_report import Row, abi, examine, faults, pairs, read_abi, rows  # noqa: E402
from trtpass.op import KERNEL_FLOATS, Op  # noqa: E402
from trtpass.ptx import COMPUTE_CAPABILITIES, Compiled, compile_ahead, supports, usage, without_scratch  # noqa: E402

WIDTHS = (24, 128)


@pytest.fixture(scope="module")
def found() -> Sequence[Row]:
    return rows()


def test_every_kernel_compiles_as_its_golden_file_says(found: Sequence[Row]) -> None:
    assert faults(found, read_abi()) == []
    assert len(found) == len(pairs()) * len(COMPUTE_CAPABILITIES)


def test_products_are_those_of_the_architecture(found: Sequence[Row]) -> None:
    """Matrix products run on tensor cores, and somewhere on those that Hopper and Blackwell brought."""
    kinds = {row.cc: set() for row in found}  # type: ignore[var-annotated]
    for row in found:
        kinds[row.cc] |= set(row.products or {})
    assert "wgmma" in kinds[90]
    assert kinds[100] & {"tcgen05", "mma"}
    assert all("mma" in kinds[cc] for cc in (80, 86, 89, 120))
    tensor = {op.name for op, kernel, _ in pairs() if kernel.example(8192).tensor}
    for row in found:
        if row.op in tensor and not row.reason:
            assert row.products, f"{row.key} has no tensor-core instruction"


def applies(op: Op, kernel: Kernel, sizes: dict[str, int], floating: str, tactic: int) -> bool:
    return supports(op, kernel, sizes, kernel.example(8192).attrs, floating, 89, tactic) is True


@pytest.mark.parametrize(("op", "kernel"), kernels())
@pytest.mark.parametrize("width", WIDTHS)
def test_other_types_and_widths_compile_without_spills(op: Op, kernel: Kernel, width: int) -> None:
    """What the report leaves out, on one architecture: every type, and a narrow width, with the first tactic."""
    example = kernel.example(8192)
    narrow = {"D", "Dv"} & set(kernel.fixed)
    if not narrow and width != WIDTHS[0]:
        pytest.skip("no head width is compiled in")
    sizes = {name: width if name in narrow else size for name, size in example.sizes.items()}
    floats = KERNEL_FLOATS[1:] if any(port.floating for port in op.inputs) else ()  # float16 is in the report
    for floating in floats:
        fits = (t for t in range(len(kernel.tactics)) if applies(op, kernel, sizes, floating, t))
        tactic = next(fits)
        used = usage(compile_ahead(op, kernel, sizes, example.attrs, floating, 89, tactic))
        assert used.spill_stores == used.spill_loads == 0, (floating, tactic, used)
        assert used.cubin.startswith(b"\x7fELF")


# ---- what is a fault -------------------------------------------------------------------------------------------------


def _row(**changes: object) -> Row:
    golden = read_abi()
    key = next(k for k, v in golden.items() if isinstance(v, dict))
    op, kernel, _, tactic, sm = key.split()
    good = Row(op, kernel, int(tactic), int(sm.removeprefix("SM")), abi=golden[key], threads=128)  # type: ignore[arg-type]
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"unused": ("x_param_3",)}, "does not use x_param_3"),
        ({"shared": 300 << 10}, "wants 307200 bytes of shared memory"),
        ({"reason": "FAILED: no"}, "FAILED: no"),
        ({"abi": {"entry": "other"}}, "has another ABI than abi.json"),
    ],
)
def test_a_fault_is_said(changes: dict[str, object], words: str) -> None:
    good, bad = _row(), _row(**changes)
    assert not any(good.key in line and "has no row" not in line for line in faults([good], {good.key: good.abi}))
    assert any(words in line for line in faults([bad], {good.key: good.abi}))


def test_missing_rows_and_rows_too_many_are_said() -> None:
    good = _row()
    lines = faults([good], {**abi([good]), "Gone entry tactic 0 SM80": {}})
    assert sum("has no row" in line for line in lines) == len(pairs()) * len(COMPUTE_CAPABILITIES) - 1
    assert "Gone entry tactic 0 SM80 is in abi.json and does not exist" in lines


def test_the_report_ends_with_its_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels_report, "ROOT", tmp_path)
    monkeypatch.setattr(kernels_report, "PAGE", tmp_path / "kernels.md")
    monkeypatch.setattr(kernels_report, "rows", lambda: [_row(spills=8)])
    assert kernels_report.main([]) == 1
    assert (tmp_path / "kernels.md").is_file()


def test_the_page_has_every_row_and_an_estimate_for_every_kernel(found: Sequence[Row]) -> None:
    text = page(found)
    assert len(re.findall(r"^\| .* \| (?:80|86|89|90|100|120) \|", text, re.M)) == len(found)
    for op, kernel, _ in pairs():
        assert f"| {op.name} | " in text and f"`{kernel.name}`" in text
    small, large = (seconds(pairs()[0][1].example(tokens))[0] for tokens in (8192, 131072))
    assert 0 < small < large


def test_occupancy_is_that_of_the_calculator() -> None:
    """Two figures of NVIDIA's occupancy calculator: bound by registers, and by shared memory."""
    assert _row(cc=90, registers=128, threads=128, shared=0).occupancy == 0.25
    assert _row(cc=80, registers=32, threads=256, shared=48 << 10).occupancy == 3 * 8 / 64


def test_scratch_that_is_used_is_refused() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 .ptr .global .align 1 a,\n\t.param .u64 .ptr .global .align 1 b,\n"
    ptx += "\t.param .u64 .ptr .global .align 1 c\n)\n{ld.param.b64 %rd1, [a];}"
    assert without_scratch(Compiled("f", 90, ptx, 0, 32)).parameters == (("ptr", "a"),)
    with pytest.raises(InputError, match="uses c, memory that only Triton's launcher provides"):
        without_scratch(Compiled("f", 90, ptx.replace("[a]", "[c]"), 0, 32))


def test_examine_says_why_there_is_no_code() -> None:
    assert "below 80" in examine("TokenSparseAttention", "attend_selected", 0, 75).reason
