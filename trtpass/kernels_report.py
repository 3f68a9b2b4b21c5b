"""``make kernels-report``: the machine code of every kernel, tactic and architecture, on a machine without a GPU.

Everything here is read from PTX and from what the assembler says; times are the roofline's, counted, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from plugins import kernel_ops
from trtpass.errors import InputError, TrtpassError
from trtpass.kernel import Kernel
from trtpass.op import Op
from trtpass.ptx import COMPUTE_CAPABILITIES, compile_ahead, supports, usage

ROOT = Path(__file__).resolve().parent.parent
ABI = ROOT / "plugins" / "abi.json"
PAGE = ROOT / "docs" / "kernels.md"
DTYPE = "float16"
TOKENS = (8192, 32768, 131072)

# Of one multiprocessor: threads, programs, and KiB of shared memory, of which the runtime keeps one for each program
# (CUDA C++ Programming Guide, technical specifications per compute capability). Registers: 65536 on all.
LIMITS = {80: (2048, 32, 164), 86: (1536, 16, 100), 89: (1536, 24, 100), 90: (2048, 32, 228), 100: (2048, 32, 228),
          120: (1536, 24, 100)}  # fmt: skip
REGISTERS = 65536
WARP_REGISTERS = 256  # are given to a warp at a time
PROGRAM_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB, the most that one program gets


@dataclass(frozen=True)
class Row:
    """One kernel with one tactic on one architecture; ``reason`` is why there is no code."""

    op: str
    kernel: str
    tactic: int
    cc: int
    reason: str = ""
    abi: dict[str, object] | None = None
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    products: dict[str, int] | None = None
    unused: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.op} {self.kernel} tactic {self.tactic} SM{self.cc}"

    @property
    def occupancy(self) -> float:
        """Resident warps over the most that a multiprocessor holds, by threads, programs, registers and memory."""
        threads, programs, shared = LIMITS[self.cc]
        warps = self.threads // 32
        of_warp = -(-self.registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
        fitting = min(
            threads // self.threads,
            programs,
            REGISTERS // max(of_warp * warps, 1),
            shared * 1024 // (self.shared + 1024),
        )
        return fitting * warps * 32 / threads


def pairs() -> list[tuple[Op, Kernel, int]]:
    """Every kernel with every tactic."""
    return [
        (op, kernel, tactic)
        for op in kernel_ops().values()
        for kernel in (op.kernel_list() if op.kernel_list else ())
        for tactic in range(len(kernel.tactics))
    ]


def examine(name: str, kernel_name: str, tactic: int, cc: int, dtype: str = DTYPE) -> Row:
    """Compile one kernel and read its code.

    Raises:
        InputError: it does not compile or assemble, or needs memory that TensorRT does not give.
    """
    op = kernel_ops()[name]
    kernel = next(k for k in (op.kernel_list() if op.kernel_list else ()) if k.name == kernel_name)
    example = kernel.example(TOKENS[0])
    reason = supports(op, kernel, example.sizes, example.attrs, dtype, cc, tactic)
    if reason is not True:
        return Row(name, kernel_name, tactic, cc, reason=str(reason))
    made = compile_ahead(op, kernel, example.sizes, example.attrs, dtype, cc, tactic)
    used = usage(made)
    kinds = " ".join(kind for kind, _ in made.parameters)
    abi = {"entry": made.name, "parameters": kinds, "shared": made.shared, "ptx": made.version, "target": made.target}
    # an input whose memory an output shares is read, if at all, through the output
    shared_with = {list(p.name for p in op.inputs).index(source) for source in op.aliases.values()}
    idle = [s for i, (_, s) in enumerate(made.parameters) if not made.references(s) and i not in shared_with]
    return Row(
        name, kernel_name, tactic, cc, "", abi, used.registers, used.spill_stores + used.spill_loads, used.stack,
        made.shared, made.threads, made.products(), tuple(idle),
    )  # fmt: skip


def rows(jobs: int | None = None) -> list[Row]:
    """A row for each kernel, tactic and architecture."""
    tasks = [(op.name, kernel.name, tactic, cc) for op, kernel, tactic in pairs() for cc in COMPUTE_CAPABILITIES]
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(_examine, tasks))


def _examine(task: tuple[str, str, int, int]) -> Row:
    try:
        return examine(*task)
    except TrtpassError as error:
        return Row(*task, reason=f"FAILED: {error.found}")


def faults(found: Sequence[Row], golden: dict[str, object]) -> list[str]:
    """What is wrong, in words: a spill, an unused parameter, too much shared memory, a missing row, a changed ABI."""
    wrong = []
    for row in found:
        if row.reason.startswith("FAILED"):
            wrong.append(f"{row.key}: {row.reason}")
        if row.spills:
            wrong.append(f"{row.key} spills {row.spills} bytes")
        if row.unused:
            wrong.append(f"{row.key} does not use {', '.join(row.unused)}")
        if row.shared > PROGRAM_SHARED[row.cc] * 1024:
            wrong.append(f"{row.key} wants {row.shared} bytes of shared memory, of {PROGRAM_SHARED[row.cc]} KiB")
    present = {row.key: row for row in found}
    expected = {f"{op.name} {k.name} tactic {t} SM{cc}" for op, k, t in pairs() for cc in COMPUTE_CAPABILITIES}
    wrong += [f"{key} has no row" for key in sorted(expected - set(present))]
    wrong += [f"{op.name} {k.name} has no tactic that applies on SM{cc}"
              for op, k, t in pairs() if t == 0 for cc in COMPUTE_CAPABILITIES
              if all(r.reason for r in found if (r.op, r.kernel, r.cc) == (op.name, k.name, cc))]  # fmt: skip
    wrong += [f"{key} is in {ABI.name} and does not exist" for key in sorted(set(golden) - set(present))]
    wrong += [
        f"{row.key} has another ABI than {ABI.name}: {row.abi or row.reason}, not {golden.get(row.key, 'nothing')}"
        for row in found
        if golden.get(row.key) != (row.abi or row.reason)
    ]
    return wrong


def abi(found: Iterable[Row]) -> dict[str, object]:
    """What the golden file holds: for each row how the kernel is called, or why there is none."""
    return {row.key: row.abi or row.reason for row in found}


def read_abi() -> dict[str, object]:
    """The golden file.

    Raises:
        InputError: it is not there or not JSON.
    """
    try:
        return dict(json.loads(ABI.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{ABI} cannot be read: {error}", fix="make kernels-report UPDATE=1") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; exit 1 on a spill, a missing row or a changed ABI."""
    parser = argparse.ArgumentParser(prog="python -m trtpass.kernels_report", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the ABI golden file too, after an intended change")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    from trtpass.kernels_page import page

    found = rows()
    if options.update:
        ABI.write_text(json.dumps(abi(found), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    if options.json:
        print(json.dumps([{**asdict(row), "occupancy": row.occupancy if not row.reason else None} for row in found]))
    wrong = faults(found, read_abi())
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{PAGE.relative_to(ROOT)}: {len(found)} rows, {len(wrong)} faults", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrtpassError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
