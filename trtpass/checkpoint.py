"""A Hugging Face model folder as untrusted data: JSON and safetensors headers, read only inside the folder.

Nothing is downloaded, no pickle is opened, no code of the folder runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trtpass.errors import InputError

if TYPE_CHECKING:
    import torch

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` in config.json -> the one architecture of it that is supported."""

_MAX_JSON = 64 << 20  # bytes


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, checked to describe a model that is supported.

    Raises:
        InputError: no or broken config, another architecture, custom code, quantized weights, an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json)",
            "a whole model",
            "merge the adapter into its base model and save that",
        )
    config = read_json(folder, "config.json")
    kind, supported = config.get("model_type"), ", ".join(f"{k} ({v})" for k, v in FAMILIES.items())
    if "auto_map" in config:
        raise InputError(
            f"{folder / 'config.json'} names custom code (auto_map)", f"a model without code of its own: {supported}"
        )
    if kind not in FAMILIES:
        raise InputError(f"{folder / 'config.json'} has model_type {kind!r}", f"one of {supported}")
    architectures = config.get("architectures") or [FAMILIES[kind]]
    if architectures != [FAMILIES[kind]]:
        raise InputError(f"{folder / 'config.json'} has architectures {architectures!r}", f"['{FAMILIES[kind]}']")
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{folder / 'config.json'} says that the weights are quantized (quantization_config)",
            "weights in float32, float16 or bfloat16",
            "save a dequantized copy of the model",
        )
    limit = config.get("max_position_embeddings")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(
            f"{folder / 'config.json'} has max_position_embeddings {limit!r}", "a positive number of tokens"
        )
    return config


@dataclass(frozen=True)
class Header:
    """Where a tensor is, and what the file says about it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def headers(folder: Path) -> dict[str, Header]:
    """Name -> header of every tensor of the model; no weight is read."""
    if (folder / "model.safetensors.index.json").exists():
        wanted = _weight_map(folder)
    elif (folder / "model.safetensors").exists():
        wanted = {"model.safetensors": None}
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        raise InputError(
            f"{folder} has no safetensors weights" + (f", only {', '.join(pickled)} (pickle)" if pickled else ""),
            "model.safetensors, or model.safetensors.index.json and its shards",
            "load it where you trust it and save it with save_pretrained(safe_serialization=True)" if pickled else "",
        )
    from safetensors import SafetensorError, safe_open

    headers: dict[str, Header] = {}
    for name, expected in wanted.items():
        file = inside(folder, name)
        try:
            with safe_open(file, framework="pt") as handle:
                keys = set(handle.keys())
                for key in sorted(keys if expected is None else expected & keys):
                    view = handle.get_slice(key)
                    headers[key] = Header(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} cannot be read: {first_line(error)}", "a whole safetensors file", "copy or download it again"
            ) from error
        if expected is not None and expected - keys:
            raise InputError(f"{file} lacks {listed(expected - keys)}, which the index says it has")
    return headers


def _weight_map(folder: Path) -> dict[str, set[str] | None]:
    """File -> tensors, from the index."""
    index = folder / "model.safetensors.index.json"
    entries = read_json(folder, index.name).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise InputError(f"{index} has no weight_map", "an object from tensor name to file name")
    files: dict[str, set[str] | None] = {}
    for tensor, name in sorted(entries.items()):
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} stores '{tensor}' in '{name}'", "a .safetensors file")
        known = files.setdefault(name, set())
        if known is not None:
            known.add(tensor)
    return files


def read(tensors: Mapping[str, Header]) -> dict[str, torch.Tensor]:
    """All tensors in float32."""
    import torch
    from safetensors import SafetensorError, safe_open

    state: dict[str, torch.Tensor] = {}
    for file in sorted({header.file for header in tensors.values()}):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in sorted(name for name, header in tensors.items() if header.file == file):
                    state[name] = handle.get_tensor(name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    return state


def read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise InputError(
            f"{folder} has no {name}", "a Hugging Face model folder", "give the folder that has config.json in it"
        )
    inside(folder, name)

    def reject(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number that JSON knows")

    try:
        if file.stat().st_size > _MAX_JSON:
            raise ValueError(f"larger than {_MAX_JSON >> 20} MiB")
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=reject)
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{file} is not JSON: {first_line(error)}", "a JSON object") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}", "a JSON object")
    return content


def inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder; of links to the outside only those to a Hugging Face cache are followed."""
    root, file = folder.resolve(), (folder / name).resolve()
    blobs = root.parent.parent / "blobs"
    cached = root.parent.name == "snapshots" and file.parent == blobs
    if Path(name).name != name or not (file.parent == root or cached):
        raise InputError(f"'{name}' of {folder} lies outside the model's folder", "a file in that folder")
    if not file.is_file():
        raise InputError(f"{folder} has no {name}", "every file of the model", "copy or download it again")
    return file


def listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"'{name}'" for name in shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: its first, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
