"""What lies beside the models of a repository: README.md, requirements.txt and grafana.json."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

from trtpass.deploy.dashboard import dashboard
from trtpass.errors import InputError
from trtpass.staging import MARK, replacing

WRITTEN = "written by `trtpass deploy`"  # in the first lines of every paper: others are not replaced
NAMES = ("README.md", "requirements.txt", "grafana.json")
NUMPY = "1.26.4"  # with numpy 2, Triton's Python backend up to 2.51 hands over arrays of zeros
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "tokenizers", "pydantic")
FORM = re.compile(r'^(?:platform|backend): "([a-z_]+)"', re.MULTILINE)

_HEAD = f"""# Models of Triton Inference Server

This file was {WRITTEN}. Run the server in this folder: libraries of kernels are found from there.

```sh
tritonserver --model-repository . --model-control-mode explicit --load-model '*' \\
  --http-address 127.0.0.1 --grpc-address 127.0.0.1 --metrics-address 127.0.0.1
```

The server has no passwords: put a proxy before it if others reach it. `grafana.json` is a dashboard over its metrics
(port 8002, path /metrics). After a change of a model's `config.pbtxt` or files, load it again: `POST
/v2/repository/models/NAME/unload`, then `/load`.
"""
_PYTHON = """
## Models in the Python backend

Their code and their engine lie in the model's folder, so that it can be moved as it is. The Python of the server
needs the packages of `requirements.txt`:

```sh
pip install -r requirements.txt
```

Limits are `parameters` in `config.pbtxt`: `rows` that are decoded at once, `queue` that waits, `prompt_tokens`,
`new_tokens`, `default_max_tokens`, `pages` of a paged cache and `threads` (`auto` or a number), and `drain_seconds`
that running answers get when the model is unloaded.

A text model answers over HTTP at once, or piece by piece as it is made:

```sh
curl -s localhost:8000/v2/models/NAME/generate -d '{"text_input": "Once upon a time", "max_tokens": 32}'
curl -sN localhost:8000/v2/models/NAME/generate_stream \\
  -d '{"text_input": "Once upon a time", "max_tokens": 32, "stream": true}'
```

Inputs, of which exactly one prompt is needed: `text_input` or `input_ids`; `max_tokens`, `stop` (texts), `temperature`
(0 is greedy), `top_p`, `seed`, `stream`, `return_logits`. The last response has a `finish_reason`: `stop`, `length`,
`context` (the engine's limit) or `cache` (no page is left). `/generate` gives one response: use `/generate_stream` with
`stream`. An error that begins with "unavailable:" (the queue is full, or the server is shutting down) is one to repeat
later; in gRPC its code is UNAVAILABLE. In JSON, Triton writes a list of one element as the element.

The model of an encoder takes and gives arrays under `/v2/models/NAME/infer`, and in gRPC.
"""
_ONNX = """
## Models in the ONNX Runtime backend

Bare graphs, of opset 24: the server's ONNX Runtime must be as new as the one that they were checked with
(`requirements.txt`). A library of native kernels beside a graph is for the processor architecture of the machine that
built it; without one the graph's own functions run.
"""
_TENSORRT = """
## Models in the TensorRT backend

Plans load with the TensorRT version and on the GPU that they were built with; see the engine's manifest.
"""
_CACHE = """
**Who holds the cache.** NAME-prefill and NAME-decode are two halves of one decoder, and the KV cache goes through the
caller: `past.*` starts as zeros, `present.*` of the prefill is `past.*` of the first step of decode, and so on. The
server keeps nothing between requests. That moves the whole cache for every token, unless it lies in shared memory; to
serve text, use the python form, which keeps the cache where it is used.
"""


def check_papers(repository: Path) -> None:
    """Refuse a folder with papers of someone else.

    Raises:
        InputError: a file that ``trtpass deploy`` did not write would be replaced.
    """
    for name in NAMES:
        path = repository / name
        if path.exists() and not (path.is_file() and WRITTEN in path.read_text(errors="replace")[:400]):
            raise InputError(
                f"{path} is there, and not {WRITTEN}",
                "a folder for model repositories alone",
                "give another one with -o",
            )


def write_papers(repository: Path) -> None:
    """Write all papers for what the repository holds now, each whole or not at all."""
    check_papers(repository)
    texts = {
        "README.md": readme(models(repository)),
        "requirements.txt": requirements(),
        "grafana.json": json.dumps(dashboard(WRITTEN), indent=1) + "\n",
    }
    for name, text in texts.items():
        data = text.encode()
        with replacing(repository / name, len(data)) as stream:
            stream.write(data)


def models(repository: Path) -> dict[str, str]:
    """Backend of every model that ``trtpass deploy`` wrote, by name."""
    found = {}
    for config in sorted(repository.glob("*/config.pbtxt")):
        form = FORM.search(config.read_text(errors="replace"))
        if form and (config.parent / MARK).is_file():
            found[config.parent.name] = form[1]
    return found


def readme(backends: dict[str, str]) -> str:
    """The README of a repository with these models."""
    table = ["", "| model | backend |", "|---|---|", *(f"| {name} | {form} |" for name, form in backends.items()), ""]
    forms = set(backends.values())
    parts = [_HEAD, "\n".join(table)]
    parts += [_PYTHON] * ("python" in forms) + [_ONNX] * ("onnxruntime_onnx" in forms)
    parts += [_TENSORRT] * ("tensorrt_plan" in forms)
    if any(name.endswith("-decode") and form != "python" for name, form in backends.items()):
        parts.append(_CACHE)
    return "".join(parts)


def requirements() -> str:
    """Exact versions of what a model process of the Python backend imports: those that run here, but for numpy."""
    lines = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    return "\n".join([f"# {WRITTEN}: what a model in the Python backend needs", f"numpy=={NUMPY}", *lines]) + "\n"
