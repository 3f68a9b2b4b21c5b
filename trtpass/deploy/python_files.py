"""Files of a model in the Python backend: the code that runs it, and what it needs of the engine's folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import plugins
import trtpass
from trtpass import native
from trtpass.manifest import Manifest

CODE = (".py", ".typed", ".cc", ".h", ".json")  # sources of kernels too: a library is used only if it is theirs


def model_source(module: str) -> str:
    """``model.py``, which Triton loads: the code beside it comes before whatever the server's Python has."""
    return (
        f'"""A model of Triton, written by trtpass deploy; the code is trtpass.serving.{module}."""\n\n'
        "import sys\n"
        "from pathlib import Path\n\n"
        'sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))\n\n'
        f"from trtpass.serving.{module} import TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n'
    )


def put_library(folder: Path) -> None:
    """Copy the packages that a model process imports, and the library of native kernels where there is one."""
    for package in (trtpass, plugins):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.suffix in CODE and path.is_file() and native.LIBRARY.parent not in path.parents:
                _copy(path, folder / root.name / inside)
    if isinstance(native.find(), native.Library):
        for path in (native.LIBRARY, native.ABOUT):
            _copy(path, folder / "plugins" / path.relative_to(Path(str(plugins.__file__)).parent))


def put_engine(folder: Path, files: Mapping[str, Path], manifest: Manifest) -> None:
    """Copy the engine's files, and a manifest of these alone, which names no place on this machine."""
    for name, path in files.items():
        _copy(path, folder / name)
    here = [item for item in manifest.artifacts if item.path in files]
    manifest.model_copy(update={"artifacts": here, "origin": manifest.model}).write(folder)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
