"""Building the library of native kernels: a registry generated from the operators, and one compiler call a file.

Each kernel is compiled once for each instruction set, into names of its own; which one runs is decided at run time, so
that a library built on one machine runs on any other of the same architecture. Nothing is built for "this machine".
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trtpass import native
from trtpass.errors import InputError, TrtpassError
from trtpass.op import Op, Port

if TYPE_CHECKING:
    import typer  # a model process, which only asks for the fingerprint, does not have it

ISAS = {
    "x86_64": {
        "avx512": (
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mfma",
            "-mf16c",
            "-mprefer-vector-width=512",
        ),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "portable": (),
    },
}
ELSEWHERE: dict[str, tuple[str, ...]] = {"portable": ()}
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
    "-ffp-contract=fast",  # a * b + c is one instruction; the language's own default forbids it
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
COMPILERS = ("g++", "clang++", "c++")
HEADER = "onnxruntime_c_api.h"
FETCHED = native.SOURCES.parent.parent / ".cache" / "headers" / "usr" / "include" / "onnxruntime"
PLACES = (FETCHED, Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime"))
"""Where the headers are looked for: what ``make setup`` fetched, then the system's own."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler, and the folder that holds ``onnxruntime_c_api.h``."""

    compiler: str
    headers: Path


def isas() -> dict[str, tuple[str, ...]]:
    """Compiler options of each instruction set of this architecture, best first."""
    return ISAS.get(platform.machine(), ELSEWHERE)


def toolchain(headers: Path | None = None, compiler: str | None = None) -> Toolchain | str:
    """What builds the library here, or the reason in words why nothing does."""
    program = next((p for p in ([compiler] if compiler else COMPILERS) if shutil.which(p)), None)
    if program is None:
        return f"there is no C++ compiler ({compiler or ', '.join(COMPILERS)}) on PATH"
    for folder in [headers] if headers else PLACES:
        if (folder / HEADER).is_file():
            return Toolchain(program, folder.resolve())
    looked = headers or ", ".join(map(str, PLACES))
    return f"{HEADER} (ONNX Runtime's C headers, Debian's libonnxruntime-dev) is not in {looked}"


def build(tools: Toolchain) -> native.Library:
    """Compile the library into its place, all or nothing.

    Raises:
        TrtpassError: the compiler refuses something; its first error is in the message.
    """
    native.LIBRARY.parent.mkdir(exist_ok=True)
    mark = native.fingerprint()
    with tempfile.TemporaryDirectory(dir=native.LIBRARY.parent) as folder:
        made = Path(folder) / native.LIBRARY.name
        compile_into(
            made, tools, ["ort.cc"], ("-shared", "-Wl,--exclude-libs,ALL", "-static-libstdc++", "-static-libgcc"), mark
        )
        about = {
            "fingerprint": mark,
            "operators": list(native.operators()),
            "isas": list(isas()),
            "compiler": _version(tools.compiler),
        }
        text = Path(folder) / native.ABOUT.name
        text.write_text(json.dumps(about, indent=1) + "\n")
        made.replace(native.LIBRARY)  # a new file under the old name: a process that has the old one open keeps it
        text.replace(native.ABOUT)
    native.find.cache_clear()
    return native.need()


def compile_into(
    out: Path, tools: Toolchain, backend: Sequence[str], link: Sequence[str], mark: str, flags: Sequence[str] = FLAGS
) -> None:
    """Compile kernels, what they share and ``backend`` (of ``plugins/_native``), and link them into ``out``.

    Args:
        out: the library or program; objects are written beside it and stay there.
        tools: compiler and headers.
        backend: what calls the kernels: ``ort.cc``, or the driver of the tests.
        link: options of the linker.
        mark: what ``trtpass_fingerprint()`` returns.
        flags: options of every file.
    """
    registry_file = out.with_name("registry.cc")
    registry_file.write_text(registry(tuple(isas())))
    common = [*flags, f"-I{native.SOURCES}", f"-I{tools.headers}", f'-DTRTPASS_FINGERPRINT="{mark}"']
    jobs: list[tuple[Path, Path, list[str]]] = []
    for file in [registry_file, *(native.SOURCES / name for name in ("call.cc", "dispatch.cc", *backend))]:
        jobs.append((file, out.with_name(f"{file.stem}.o"), common))
    for op in native.operators().values():
        source = native.SOURCES.parent / op.folder / "kernel.cc"
        for isa, options in isas().items():
            target = out.with_name(f"{op.folder}.{isa}.o")
            jobs.append((source, target, [*common, *options, f"-DTRTPASS_ISA={isa}"]))
    with ThreadPoolExecutor(max(1, _cores())) as pool:
        list(pool.map(lambda job: _run([tools.compiler, "-c", str(job[0]), "-o", str(job[1]), *job[2]]), jobs))
    objects = [str(target) for _, target, _ in jobs]
    _run([tools.compiler, *objects, "-o", str(out), *link])


def _cores() -> int:
    import psutil

    return len(psutil.Process().cpu_affinity() or [0])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        )
        raise TrtpassError(
            f"{command[0]} fails: {lines[0][:400]}", "a C++17 compiler and ONNX Runtime's headers", "see docs/native.md"
        )


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [compiler])[0]


def registry(names: Sequence[str]) -> str:
    """C++ that declares every operator's schema and lists its kernels, from the operators' own declarations.

    Args:
        names: instruction sets, best first.
    """
    found = native.operators()
    parts = ['#include "call.h"\n#include "dispatch.h"\n', "// Generated from the operators' declarations.\n"]
    parts += [f'extern "C" void trtpass_{isa}_{op.folder}(trtpass::Call&);' for op in found.values() for isa in names]
    parts += ["\nnamespace trtpass {\nnamespace {\n", *(_schema(op, names) for op in found.values())]
    entries = ", ".join(f"{{&{op.folder}_schema, {op.folder}_runs}}" for op in found.values())
    isa_names = ", ".join(f'"{isa}"' for isa in names)
    parts += [
        f"const Entry kEntries[] = {{{entries}}};\n",
        "}  // namespace\n",
        f"const char* const kIsaNames[] = {{{isa_names}}};",
        f"const int kIsaCount = {len(names)};",
        "const Entry* entries() { return kEntries; }",
        f"int entry_count() {{ return {len(found)}; }}\n",
        "}  // namespace trtpass\n",
    ]
    return "\n".join(parts)


def _schema(op: Op, names: Sequence[str]) -> str:
    def ports(role: str, items: Sequence[Port]) -> str:
        return f"const Port {op.folder}_{role}[] = {{{', '.join(_port(p) for p in items)}}};"

    unknown = [a.name for a in op.attrs if a.type not in (int, float)]
    if unknown:
        raise InputError(
            f"{op.name}.{unknown[0]} is a string", "int or float attributes in an operator with a kernel.cc"
        )
    attributes = ", ".join(f'{{"{a.name}", {"true" if a.type is int else "false"}}}' for a in op.attrs)
    listed = f"const Attribute {op.folder}_attributes[] = {{{attributes}}};" if op.attrs else ""
    pointer = f"{op.folder}_attributes" if op.attrs else "nullptr"
    runs = ", ".join(f"trtpass_{isa}_{op.folder}" for isa in names)
    return "\n".join(
        [
            ports("inputs", op.inputs),
            ports("outputs", op.outputs),
            listed,
            f'const Schema {op.folder}_schema = {{"{op.name}", {op.folder}_inputs, {len(op.inputs)}, '
            f"{op.folder}_outputs, {len(op.outputs)}, {pointer}, {len(op.attrs)}}};",
            f"const Run {op.folder}_runs[] = {{{runs}}};\n",
        ]
    )


def _port(port: Port) -> str:
    axes = ", ".join(f'"{axis}"' for axis in port.axes)
    floating = "true" if port.floating else "false"
    return f'{{"{port.name}", {{{axes}}}, {len(port.axes)}, {floating}, Type::{port.dtypes[0]}}}'


def main(
    headers: Annotated[
        Path | None, typer.Option(help="folder that has onnxruntime_c_api.h; default: looked for")
    ] = None,
    compiler: Annotated[str | None, typer.Option(help=f"default: the first of {', '.join(COMPILERS)}")] = None,
) -> None:
    """Build the library of native kernels, unless it is up to date; without a compiler or headers, say so and go on."""
    found = native.find()
    if isinstance(found, native.Library):
        return
    tools = toolchain(headers, compiler)
    if isinstance(tools, str):
        print(
            f"note: native kernels are not built, bodies of standard operators take their place: {tools}",
            file=sys.stderr,
        )
        if headers or compiler:
            raise SystemExit(2)
        return
    print(f"building the library of native kernels with {tools.compiler}")
    try:
        build(tools)
    except TrtpassError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    print(f"native kernels: {', '.join(native.need().operators)} ({native.isa()} here)")


if __name__ == "__main__":
    import typer

    typer.run(main)
