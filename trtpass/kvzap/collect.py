"""What a surrogate is fitted on: hidden states and log KVzip+ scores of contexts that are cut from a text.

Contexts lie in a work folder, one safetensors file each, written atomically: an interruption loses at most one. Of the
text, the first 70% is fitted on and the next 5% is held out; the rest is left alone, for evaluations of what was built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trtpass.errors import InputError
from trtpass.progress import Report

if TYPE_CHECKING:
    from trtpass.weights import Loaded

FITTED, HELD = (0.0, 0.70), (0.70, 0.75)  # shares of the text's characters
SHORTEST, LONGEST = 256, 3500  # tokens of a context
HELD_SHARE = 8  # one held-out context for so many that are fitted on, at least MIN_HELD
MIN_HELD = 4
_MANIFEST = "manifest.json"


class Context(NamedTuple):
    """Tokens that are scored, and those around them.

    Args:
        name: the name of its file in the work folder, such as ``fitted-0003``.
        held: whether it is kept out of the fit.
        prefix, ids, bridge: as in ``trtpass.kvzap.oracle.scores``.
    """

    name: str
    held: bool
    prefix: list[int]
    ids: list[int]
    bridge: list[int]


@dataclass(frozen=True)
class Fingerprint:
    """What a work folder belongs to."""

    model: str  # SHA-256 of its weights
    text: str  # SHA-256
    contexts: int
    seed: int
    version: int = 1  # of the way contexts are cut and scored


class Work:
    """A work folder and the contexts in it.

    Args:
        folder: it is made if it is not there.
        fingerprint: of the request; a folder of another request is refused.

    Raises:
        InputError: the folder belongs to another request, or holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.folder = folder
        wanted = asdict(fingerprint)
        manifest = folder / _MANIFEST
        if manifest.is_file():
            try:
                found = json.loads(manifest.read_text())
                differing = [key for key in wanted if found.get(key) != wanted[key]]
            except (ValueError, AttributeError, OSError) as error:
                raise InputError(f"{manifest} cannot be read", "contexts of an earlier fit", _OTHER) from error
            if differing:
                shown = ", ".join(f"{key} {_short(found.get(key))}, not {_short(wanted[key])}" for key in differing)
                raise InputError(f"{folder} holds contexts of another request: {shown}", "those of this one", _OTHER)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):
            raise InputError(f"{folder} is no work folder of a fit", "one, or none", _OTHER)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}", "a folder that can be written") from error
        _write(manifest, json.dumps(wanted, indent=1).encode())

    def file(self, context: Context) -> Path:
        return self.folder / f"{context.name}.safetensors"

    def add(self, context: Context, hidden: np.ndarray, score: np.ndarray) -> None:
        """Store hidden states `[L, T, E]` and log scores `[L, Hkv, T]`, both float32."""
        from safetensors.numpy import save

        _write(self.file(context), save({"hidden": hidden, "score": score}))

    def pairs(self, contexts: list[Context], layer: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each context, hidden states `[T, E]` and log scores `[T, Hkv]` of one layer; the rest is not read.

        Raises:
            InputError: a file is missing or broken.
        """
        from safetensors import SafetensorError, safe_open

        for context in contexts:
            try:
                with safe_open(self.file(context), framework="numpy") as handle:
                    hidden, score = (handle.get_slice(name)[layer] for name in ("hidden", "score"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self.file(context)} cannot be read: {error}", "a whole file", _OTHER) from error
            if hidden.shape[:1] != (len(context.ids),) or score.shape[1:] != hidden.shape[:1]:
                raise InputError(f"{self.file(context)} has other shapes than its context", "a file of fit", _OTHER)
            yield hidden, score.T

    def remove(self) -> None:
        """Remove what a fit writes here, and the folder if nothing else is in it."""
        patterns = ("fitted-*.safetensors", "held-*.safetensors", ".*.safetensors.*.tmp", _MANIFEST)
        for file in [file for pattern in patterns for file in self.folder.glob(pattern)]:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


_OTHER = "remove that folder, or give another one with --work"


def cut(loaded: Loaded, text: str, contexts: int, seed: int) -> list[Context]:
    """Contexts to score, those to fit on first, in an order in which the first few are like all.

    Lengths are log-uniform between ``SHORTEST`` and ``LONGEST`` (or what the model can hold twice): as many tokens from
    short contexts as from long ones. Every second context is in chat form (where the tokenizer has one), the others
    have nothing before them: an engine meets both. Places are spread over the text.

    Raises:
        InputError: the text is too short for so many contexts, or the model for any.
    """
    from trtpass.kvzap.oracle import prompt_parts

    tokenizer: Any = loaded.tokenizer
    around = [(before, after) for before, _, after in (prompt_parts(tokenizer, "x", chat) for chat in (True, False))]
    taken = max(len(before) + len(after) for before, after in around)
    limit = loaded.context or 2 * LONGEST + taken
    longest = min(LONGEST, (limit - taken) // 2)
    if longest < 16:
        raise InputError(f"a model of {limit} positions", "room for a context of 16 tokens twice, and an instruction")
    random = np.random.default_rng(seed)
    made: list[Context] = []
    for (low, high), count in ((FITTED, contexts), (HELD, max(MIN_HELD, contexts // HELD_SHARE))):
        region = text[int(low * len(text)) : int(high * len(text))]
        ids = tokenizer(region, add_special_tokens=False, verbose=False)["input_ids"]
        steps = (random.permutation(count) + random.random(count)) / count  # spread, in no order
        lengths = np.exp(math.log(min(SHORTEST, longest)) + steps * math.log(longest / min(SHORTEST, longest)))
        lengths = lengths.astype(int)
        if lengths.sum() > len(ids) or not len(ids):
            raise InputError(
                f"the text is too short: {count} contexts of {lengths.min()} to {lengths.max()} tokens take "
                f"{lengths.sum()}, and the {high - low:.0%} of it that they come from have {len(ids)}",
                "a text that holds them once",
                "give a longer text with --corpus, or fewer --contexts",
            )
        places = (random.permutation(count) + random.random(count)) / count
        for i, (length, place) in enumerate(zip(lengths, places, strict=True)):
            start = int(place * (len(ids) - length))
            name = f"{'held' if low else 'fitted'}-{i:05}"
            prefix, bridge = around[i % 2]
            made.append(Context(name, low > 0, prefix, ids[start : start + int(length)], bridge))
    return made


def collect(module: Any, contexts: list[Context], work: Work, report: Report) -> None:
    """Score every context that the work folder does not have yet, with ``module``.

    Raises:
        InputError: the disk is full, or scores that are not finite.
    """
    from trtpass.kvzap.oracle import scores

    whole, done = sum(len(context.ids) for context in contexts), 0
    for number, context in enumerate(contexts):
        report(f"context {number + 1} of {len(contexts)}", done / whole)
        if not work.file(context).is_file():
            made = scores(module, context.prefix, context.ids, context.bridge)
            work.add(context, made.hidden.numpy(), made.score.log().numpy())
        done += len(context.ids)


def fingerprint(module: Any, text: str, contexts: int, seed: int) -> Fingerprint:
    """What a request's contexts depend on."""
    weights = hashlib.sha256()
    for name, parameter in module.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}".encode())
        weights.update(parameter.detach().contiguous().numpy())
    return Fingerprint(weights.hexdigest(), hashlib.sha256(text.encode()).hexdigest(), contexts, seed)


def _write(file: Path, content: bytes) -> None:
    from trtpass.staging import replacing

    with replacing(file, len(content)) as handle:
        handle.write(content)


def _short(value: object) -> str:
    return str(value)[:12]
