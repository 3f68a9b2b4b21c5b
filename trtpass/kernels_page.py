"""docs/kernels.md: what ``trtpass.kernels_report`` found, and the roofline of every kernel."""

from __future__ import annotations

from collections.abc import Sequence

from trtpass.kernel import Example
from trtpass.kernels_report import TOKENS, Row, pairs

# NVIDIA's data sheet of the H100 SXM, dense: what a kernel could reach at most.
TENSOR_FLOPS, FLOPS, BANDWIDTH = 989e12, 67e12, 3.35e12

HEAD = """# Triton kernels: machine code and rooflines

Written by `make kernels-report`; do not edit. Compiled, not run: registers, spills, shared memory and products are read
from the code that Triton and `ptxas` make on a machine without a GPU, in float16 where the operator allows it. A
tactic is one of the ways in which TensorRT may run the kernel. *Occupancy* is resident warps over the most that a
multiprocessor holds, *products* the number of tensor-core instructions in the PTX. How to write a kernel:
[triton.md](triton.md).

## Estimates for one H100, not measured

The least time that the counted operations (989 TFLOP/s on tensor cores, 67 elsewhere) or the counted bytes (3.35 TB/s)
need. A kernel is slower than that. Nothing here was timed on a GPU.
"""


def seconds(example: Example) -> tuple[float, str]:
    """The roofline of one H100 for this call, and what bounds it."""
    compute = example.flops / (TENSOR_FLOPS if example.tensor else FLOPS)
    memory = example.bytes / BANDWIDTH
    return max(compute, memory), "compute" if compute > memory else "memory"


def page(found: Sequence[Row]) -> str:
    """docs/kernels.md."""
    lines = [
        *HEAD.splitlines(),
        "",
        "| operator | " + " | ".join(f"{tokens // 1024}K tokens" for tokens in TOKENS) + " | bound by | assumes |",
        "|---|" + "---:|" * len(TOKENS) + "---|---|",
    ]
    for op, kernel, tactic in pairs():
        if tactic == 0:
            examples = [kernel.example(tokens) for tokens in TOKENS]
            times = [seconds(example) for example in examples]
            bounds = " / ".join(dict.fromkeys(bound for _, bound in times))
            shown = " | ".join(_time(value) for value, _ in times)
            notes = [examples[0].note] if examples[0].note else []
            if examples[1].sizes == examples[2].sizes:  # nobody merges more than a video of that length
                notes.append(f"at most {max(examples[2].sizes.values())} tokens")
            lines.append(f"| {op.name} | {shown} | {bounds} | {'; '.join(notes)} |")
    lines += ["", "## Code", ""]
    for op, kernel, tactic in pairs():
        mine = [r for r in found if (r.op, r.kernel, r.tactic) == (op.name, kernel.name, tactic)]
        if tactic == 0:
            lines += [
                f"### {op.name}: `{kernel.name}`",
                "",
                "| tactic | SM | registers | spills | stack | shared KiB | threads | occupancy | products |",
                "|---|---:|---:|---:|---:|---:|---:|---:|---|",
            ]
        name = ", ".join(f"{k} {v}" for k, v in kernel.tactics[tactic].items()) or "only one"
        for row in mine:
            if row.reason:
                lines.append(f"| {name} | {row.cc} | | | | | | | {row.reason} |")
                continue
            products = ", ".join(f"{n} {k}" for k, n in (row.products or {}).items()) or "none"
            code = (row.cc, row.registers, row.spills, row.stack, f"{row.shared / 1024:.1f}", row.threads)
            cells = [name, *map(str, code), f"{row.occupancy:.0%}", products]
            lines.append(f"| {' | '.join(cells)} |")
        if tactic == len(kernel.tactics) - 1:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _time(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
