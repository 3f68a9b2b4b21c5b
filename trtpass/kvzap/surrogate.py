"""KVzap's surrogate (arXiv 2601.07891): one small model a layer that predicts log KVzip+ scores from hidden states.

Files have the layout of the published checkpoints (safetensors), E the hidden width, Hkv the KV heads::

    linear   layers.{i}.weight [Hkv, E]      layers.{i}.bias [Hkv]
    mlp      layers.{i}.0.weight [N, E]      layers.{i}.0.bias [N]       exact (erf) GELU between, N = E / 8
             layers.{i}.2.weight [Hkv, N]    layers.{i}.2.bias [Hkv]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from trtpass.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.checkpoint import Header

Kind = Literal["linear", "mlp"]
KEYS: dict[Kind, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "mlp": ("0.weight", "0.bias", "2.weight", "2.bias"),
}
QUANTILES = "trtpass.quantiles"  # metadata of a file: see ``Surrogate.quantiles``
_KEY = re.compile(r"layers\.(0|[1-9]\d{0,4})\.((?:[02]\.)?(?:weight|bias))")
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPECTED = "a KVzap checkpoint: layers.{i}.weight and .bias (linear), or layers.{i}.0 and .2 of each (mlp)"


@dataclass(frozen=True)
class Surrogate:
    """Weights that predict natural-log KVzip+ scores from the tensor that feeds q, k and v.

    Args:
        kind: ``linear`` or ``mlp``.
        layers: of each layer the float32 arrays of ``KEYS[kind]``, in the shapes above, the same in every layer.
        quantiles: predicted scores of held-out text, of all layers and heads together, at 0%, 1% ... 100%, ascending;
            empty where the checkpoint does not say, as published ones do not.
    """

    kind: Kind
    layers: tuple[dict[str, np.ndarray], ...]
    quantiles: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """E, the width of the hidden states."""
        return int(self.layers[0][KEYS[self.kind][0]].shape[1])

    @property
    def kv_heads(self) -> int:
        """Hkv, the scores of a token in one layer."""
        return int(self.layers[0][KEYS[self.kind][-1]].shape[0])

    @property
    def hidden(self) -> int | None:
        """Width between the two layers of an MLP; None for ``linear``."""
        return int(self.layers[0]["0.bias"].shape[0]) if self.kind == "mlp" else None

    @classmethod
    def load(cls, path: str | Path) -> Surrogate:
        """Read a safetensors file, or a folder with ``model.safetensors``; half precision becomes float32.

        Raises:
            InputError: no such file, a key too many or too few, a type that is no float, shapes that do not fit each
                other, or a weight that is not finite.
        """
        from trtpass.checkpoint import headers, read

        path = Path(path)
        found = headers(path) if path.is_dir() else _headers(path)
        _check_shapes(path, found)
        arrays = {name: tensor.numpy() for name, tensor in read(found).items()}
        for name, array in sorted(arrays.items()):
            if not np.isfinite(array).all():
                raise InputError(
                    f"{path}: '{name}' holds NaN or infinity", "finite weights", "fit or download the checkpoint again"
                )
        made = cls.from_arrays(arrays)
        return cls(made.kind, made.layers, _quantiles(path / "model.safetensors" if path.is_dir() else path))

    def threshold(self, removed: float) -> float | None:
        """The score below which this share of the held-out keys lies; None where the checkpoint does not say."""
        if not self.quantiles:
            return None
        if removed >= 1.0:
            return math.inf
        at = np.linspace(0.0, 1.0, len(self.quantiles))
        return round(float(np.interp(removed, at, self.quantiles)), 4) if removed > 0.0 else -math.inf

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Surrogate:
        """From arrays by their full key, such as ``layers.0.weight``, all there and of the right shapes."""
        kind: Kind = "mlp" if "layers.0.0.weight" in arrays else "linear"
        count = len(arrays) // len(KEYS[kind])
        layers = tuple({key: arrays[f"layers.{i}.{key}"] for key in KEYS[kind]} for i in range(count))
        return cls(kind, layers)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their full key, as a file has them."""
        return {
            f"layers.{i}.{key}": np.ascontiguousarray(layer[key], np.float32)
            for i, layer in enumerate(self.layers)
            for key in KEYS[self.kind]
        }

    def save(self, path: str | Path) -> None:
        """Write ``path`` atomically: a ``.safetensors`` file, or else a folder that kvpress's ``KVzapModel`` loads.

        Raises:
            InputError: it cannot be written, or the folder holds files that trtpass did not write.
        """
        from safetensors.numpy import save

        from trtpass.staging import replacing, staged

        path = Path(path)
        stated = {QUANTILES: json.dumps([round(x, 4) for x in self.quantiles])} if self.quantiles else {}
        content = _ordered(save(self.arrays(), metadata={"format": "pt", **stated}))
        if path.suffix == ".safetensors":
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, len(content)) as file:
                file.write(content)
            return
        config = {
            "architectures": ["KVzapModel"],
            "model_type": "kvzap",
            "input_dim": self.width,
            "output_dim": self.kv_heads,
            "hidden_dim": self.hidden,
            "n_modules": len(self.layers),
        }
        with staged(path) as work:
            (work / "model.safetensors").write_bytes(content)
            (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @staticmethod
    def shipped(model: str) -> Path | None:
        """The linear weights that come with a known model, or None where there are none."""
        import graphs

        file = Path(graphs.__file__).parent / "data" / f"{model}.kvzap-linear.safetensors"
        return file if model in graphs.known() and file.is_file() else None

    def need(self, layers: int, width: int, kv_heads: int, what: str = "the model") -> None:
        """Check that these weights are for a model of so many layers, hidden width and KV heads; ``what`` names it.

        Raises:
            InputError: they are another model's.
        """
        pairs = {
            "layers": (len(self.layers), layers),
            "hidden width": (self.width, width),
            "KV heads": (self.kv_heads, kv_heads),
        }
        wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if wrong:
            raise InputError(
                "the KVzap checkpoint is another model's: "
                + ", ".join(f"{name} {mine}, {what} has {its}" for name, (mine, its) in wrong.items()),
                "weights that were fitted on this model",
                "give its own checkpoint, or make one with `trtpass fit kvzap`",
            )

    def predict(self, hidden: Tensor) -> Tensor:
        """Log scores, float32 `[layers, Hkv, T]`, of hidden states `[layers, T, E]`.

        Raises:
            InputError: hidden states of another model.
        """
        import torch

        self.need(hidden.shape[0], hidden.shape[-1], self.kv_heads, "what feeds q, k and v")
        made = []
        for states, layer in zip(hidden.float(), self.layers, strict=True):
            value = states  # [T, E], then [T, N], then [T, Hkv]
            weights = [torch.from_numpy(layer[key]) for key in KEYS[self.kind]]
            for number, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
                value = torch.nn.functional.linear(torch.nn.functional.gelu(value) if number else value, weight, bias)
            made.append(value.T)
        return torch.stack(made)


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its metadata in order of name; the library's own order changes from file to file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(size) + content[8 + size :]


def _headers(file: Path) -> dict[str, Header]:
    """Name -> header of every tensor of a safetensors file; no weight is read."""
    from safetensors import SafetensorError, safe_open

    from trtpass.checkpoint import Header, first_line

    if not file.is_file():
        raise InputError(f"there is no file {file}", _EXPECTED, "check the path, or fit one with `trtpass fit kvzap`")
    try:
        with safe_open(file, framework="pt") as handle:
            views = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
            return {key: Header(file, view.get_dtype(), tuple(view.get_shape())) for key, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}", "a whole safetensors file") from error


def _quantiles(file: Path) -> tuple[float, ...]:
    """What the file's metadata says of its scores.

    Raises:
        InputError: it is not a list of 101 ascending numbers.
    """
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as handle:
        text = (handle.metadata() or {}).get(QUANTILES)
    if text is None:
        return ()
    try:
        values = [float(x) for x in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: metadata '{QUANTILES}' is {text[:60]!r}", "a JSON list of numbers") from error
    if len(values) != 101 or not np.isfinite(values).all() or (np.diff(values) < 0).any():
        raise InputError(f"{file}: metadata '{QUANTILES}' is {text[:60]!r}", "101 finite numbers, ascending")
    return tuple(values)


def _check_shapes(path: Path, found: Mapping[str, Header]) -> None:
    """Every key of one kind in layers 0 .. n-1, and nothing else; shapes those of layer 0, which fit each other."""
    from trtpass.checkpoint import listed

    matches = {name: match for name in found if (match := _KEY.fullmatch(name))}
    kind: Kind = "mlp" if any(match[2] in KEYS["mlp"] for match in matches.values()) else "linear"
    count = 1 + max((int(match[1]) for match in matches.values()), default=-1)
    if not count or count > len(found):
        raise InputError(f"{path} holds no layers, or their numbers have holes", _EXPECTED)
    wanted = {f"layers.{i}.{key}" for i in range(count) for key in KEYS[kind]}
    for names, what in ((wanted - set(found), "lacks"), (set(found) - wanted, "also holds")):
        if names:
            raise InputError(f"{path} ({kind}, {count} layers) {what} {listed(names)}", _EXPECTED)
    first = {key: found[f"layers.0.{key}"].shape for key in KEYS[kind]}
    width, heads = first[KEYS[kind][0]][-1:], first[KEYS[kind][-1]]
    shapes = {"weight": heads + width, "bias": heads}
    if kind == "mlp":
        between = first["0.bias"]
        shapes = {"0.weight": between + width, "0.bias": between, "2.weight": heads + between, "2.bias": heads}
    for name in sorted(wanted):
        header, shape = found[name], shapes[name.split(".", 2)[2]]
        if header.dtype not in _FLOATS:
            raise InputError(f"{path}: '{name}' is {header.dtype}", f"one of {', '.join(_FLOATS)}")
        if header.shape != shape or 0 in header.shape or len(header.shape) != 1 + name.endswith("weight"):
            raise InputError(f"{path}: '{name}' has shape {list(header.shape)}", f"{list(shape)}, as its other tensors")
