"""Every module imports without the extras, and the command line starts quickly."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphs
import plugins
import trtpass

EXTRAS = ("torch", "transformers", "tensorrt_rtx", "triton", "matplotlib", "safetensors", "gguf", "accelerate")
PROGRAMS = ("trtpass.plan_worker",)  # run in a process of its own, only where the extra is installed


def modules() -> list[str]:
    """All modules of the three packages, but for the files that belong to an extra: Triton kernels and programs."""
    return [
        info.name
        for package in (trtpass, plugins, graphs)
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if info.name not in PROGRAMS and not is_triton(info)
    ]


def is_triton(info: pkgutil.ModuleInfo) -> bool:
    """Whether a module of the operators is written in Triton; all others load such a one where it is asked for."""
    spec = info.module_finder.find_spec(info.name, None)  # type: ignore[call-arg]
    source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    return info.name.startswith("plugins.") and (info.name.endswith(".kernel") or "\nimport triton\n" in source)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_its_extra() -> None:
    found = python(
        "import importlib, json, sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        "failed = {}\n"
        f"for name in {modules()!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        failed[name] = str(error)\n"
        "print(json.dumps(failed))\n"
    )
    assert json.loads(found) == {}
    assert len(modules()) > 40


def test_the_command_line_starts_quickly_and_lightly() -> None:
    found = json.loads(
        python(
            "import json, sys, time\n"
            "start = time.process_time()\n"
            "import trtpass.cli\n"
            "print(json.dumps([time.process_time() - start, sorted(m.partition('.')[0] for m in sys.modules)]))\n"
        )
    )
    seconds, loaded = found
    assert not {*EXTRAS, "onnxruntime", "onnx", "onnx_ir", "numpy", "pydantic", "polygraphy", "sympy"} & set(loaded)
    assert seconds < 1.0  # of processor time: the machine may be busy


@pytest.mark.parametrize("name", ["trtpass.errors", "trtpass.progress", "trtpass.layers", "trtpass.op"])
def test_contracts_do_not_load_runtimes(name: str) -> None:
    loaded = python(f"import sys, {name}\nprint('\\n'.join(m.partition('.')[0] for m in sys.modules))").split()
    assert not {"torch", "transformers", "onnxruntime", "matplotlib", "tensorrt_rtx"} & set(loaded)
