"""What goes into a repository: models, each with its configuration and the files of its version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from trtpass import io, native
from trtpass.deploy.pbtxt import Config
from trtpass.errors import InputError
from trtpass.manifest import Manifest
from trtpass.op import DOMAIN
from trtpass.serving.settings import Settings

VERSION = "1"
LIBRARY_NAME = native.LIBRARY.name


@dataclass(frozen=True)
class Source:
    """An engine that is deployed.

    Args:
        folder: of the engine.
        manifest: its own.
        name: of the model in the repository.
        settings: limits of a text model.
        rows: most rows of a batch of an encoder.
    """

    folder: Path
    manifest: Manifest
    name: str
    settings: Settings
    rows: int


@dataclass
class Model:
    """One model of the repository.

    Args:
        name: its folder's.
        config: its ``config.pbtxt``.
        files: what is copied, by the path inside the version's folder.
        texts: what is written there.
        fill: called with the version's folder, for the rest.
    """

    name: str
    config: Config
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    fill: Sequence[Callable[[Path], None]] = ()


def graph(source: Source, name: str) -> ir.Model:
    """A graph of the engine.

    Raises:
        InputError: it is not there or broken.
    """
    path = source.folder / name
    if not path.is_file():
        raise InputError(f"{path} does not exist", "a graph of the engine", "build it again")
    return io.load(path)


def weights(model: ir.Model, source: Source) -> dict[str, Path]:
    """Files of external weights of a graph, by the name under which it looks for them."""
    found = {}
    for tensor in io.tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            name = str(tensor.location)
            if Path(name).name != name:
                raise InputError(f"weights in '{name}'", "a file beside the graph", "build the engine again")
            found[name] = source.folder / name
    return found


def own_operators(model: ir.Model) -> set[str]:
    """Our operators that a graph calls, as ``domain::name``."""
    made = set()
    for node in model.graph.all_nodes():
        if node.domain.startswith(DOMAIN):
            made.add(f"{node.domain}::{node.op_type}")
    return made


def library(model: ir.Model) -> Path | None:
    """The library of native kernels, where a graph has a use for it; None where not, or where bodies do without it.

    Raises:
        InputError: the graph needs it, and it is not there.
    """
    operators = own_operators(model)
    if not operators:
        return None
    found = native.find()
    if isinstance(found, native.Library):
        return found.path
    bodies = {f"{function.domain}::{function.name}" for function in model.functions.values()}
    if lacking := sorted(operators - bodies):
        raise InputError(f"the engine calls {lacking[0]}, and {native.why(found)}", "the library", native.BUILD)
    return None
