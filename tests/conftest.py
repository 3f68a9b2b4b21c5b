"""Fixtures that every test may use: tiny models of each family on disk, golden texts, the real SmolLM2."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import native_check
import pytest
from families import FAMILIES, Exported, save_tiny

from trtpass import native

if TYPE_CHECKING:
    from tests.served import Served

GOLDEN = Path(__file__).resolve().parent.parent / "graphs" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    """In one of several test processes: one thread each, for more only get in each other's way."""
    if hasattr(config, "workerinput"):
        import onnxruntime
        import torch

        class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
            """Threads of two processes that wait for work in a loop take each other's cores."""

            def __init__(self) -> None:
                super().__init__()
                self.intra_op_num_threads = 1

        torch.set_num_threads(1)
        onnxruntime.SessionOptions = OneThread


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes take a file at a time: first those that load the real SmolLM2, for which none should wait."""
    if hasattr(config, "workerinput"):
        heavy = {item.path for item in items if {"smollm2", "smollm2_onnx"} & set(getattr(item, "fixturenames", ()))}
        items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> Hugging Face folder of its tiny model."""
    root = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(family, root / f"tiny-{family}") for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny_export(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """``tiny_export(family)``: its tiny model and plain export, made once a session. Not to be changed."""

    @functools.cache
    def make(family: str) -> Exported:
        from graphs import resolve
        from trtpass import io
        from trtpass.export import export

        loaded = resolve(str(tiny_folders[family])).load()
        model = export(loaded.module, loaded.config, context=loaded.context)
        path = tmp_path_factory.mktemp(f"export-{family}") / "model.onnx"
        io.save(model, path)
        return Exported(loaded, model, path)

    return make


@pytest.fixture(scope="session")
def library() -> native.Library:
    """The library of native kernels, built if it is missing or old; skips where nothing can build it."""
    return native_check.library()


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real SmolLM2-135M-Instruct as ``trtpass.weights.Loaded``; tests that use it are marked ``model``."""
    from graphs import resolve
    from trtpass.errors import InputError

    try:
        return resolve("smollm2-135m").load()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain export of the real SmolLM2-135M-Instruct, ``model.onnx`` beside ``weights.bin`` (540 MB)."""
    from trtpass import io
    from trtpass.export import export

    path = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    io.save(export(smollm2.module, smollm2.config, context=smollm2.context), path)
    return path


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Triton Inference Server with tiny engines; tests that use it are marked ``server``. Leave its models alive."""
    from tests.served import serve_tiny

    with serve_tiny(tmp_path_factory) as running:
        yield running


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` equals ``graphs/golden/<name>.txt``; ``make golden`` writes the file instead."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.write_text(text, encoding="utf-8")
            return
        assert file.exists(), f"{file} does not exist: run make golden and read the diff"
        before, after = file.read_text(encoding="utf-8").splitlines(), text.splitlines()
        diff = "\n".join(difflib.unified_diff(before, after, f"graphs/golden/{name}.txt", "now", n=1, lineterm=""))
        assert text == file.read_text(encoding="utf-8"), f"run make golden if this is intended:\n{diff}"

    return compare
