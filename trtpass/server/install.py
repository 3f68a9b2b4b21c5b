"""Where the server is: the environment that ``make setup`` makes for it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trtpass.errors import InputError

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-serve"
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of this process: the models' Python is another one


@dataclass(frozen=True)
class Installation:
    """A tritonserver, its backends, and the Python of its model processes."""

    program: Path
    backends: Path
    python: Path

    def variables(self) -> dict[str, str]:
        """Environment variables that the server needs: its model processes find their Python by PATH, and that one's
        library by LD_LIBRARY_PATH."""
        asked = [str(self.python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
        libraries = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        return {
            **kept,
            "PATH": os.pathsep.join([str(self.python.parent), kept.get("PATH", os.defpath)]),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [libraries, kept.get("LD_LIBRARY_PATH", "")])),
        }


def installed() -> Installation:
    """The server of ``.venv-serve``.

    Raises:
        InputError: the environment is not there, or only half made.
    """
    found = sorted(ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if not found or not (ENVIRONMENT / ".installed").is_file():
        raise InputError(
            f"there is no Triton Inference Server in {ENVIRONMENT}",
            "the environment of the server, which exists for Linux on x86_64 and aarch64",
            "make setup; or copy the model repository to a machine with NVIDIA's container",
        )
    return Installation(found[0], found[0].parents[1] / "backends", ENVIRONMENT / "bin" / "python")


def finding() -> tuple[str, str, str]:
    """For ``trtpass doctor``: status, what it means, what to do."""
    try:
        program = installed().program
    except InputError as error:
        return "missing", f"{error.found}: no trtpass serve here; trtpass deploy works", error.fix
    return "ok", f"{program.name} with its python backend: trtpass serve", ""
