"""What an operator may change of a deployed model: the ``parameters`` of its ``config.pbtxt``, as strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtpass.errors import InputError
from trtpass.serving.request import Limits

AUTO = "auto"  # for pages and threads: what the engine or ONNX Runtime chooses
BYTES_A_TOKEN = 64  # a text of more bytes than this for each token of a prompt is not even tokenised
LARGEST = 1 << 24  # of a number here


@dataclass(frozen=True)
class Settings:
    """Limits of a text model, and what belongs to its service alone.

    Args:
        limits: what it takes on.
        default_max_tokens: of a request that does not say.
        drain_seconds: how long rows that run may go on when the model is unloaded.
    """

    limits: Limits = field(default_factory=Limits)
    default_max_tokens: int = 128
    drain_seconds: int = 25

    @property
    def text_bytes(self) -> int:
        """Most bytes of a prompt as text."""
        return self.limits.prompt_tokens * BYTES_A_TOKEN

    def parameters(self) -> dict[str, str]:
        """For ``config.pbtxt``."""
        limits = self.limits
        numbers = {
            "rows": limits.rows, "queue": limits.queue, "prompt_tokens": limits.prompt_tokens,
            "new_tokens": limits.new_tokens, "default_max_tokens": self.default_max_tokens,
            "pages": limits.pages, "threads": limits.threads, "drain_seconds": self.drain_seconds,
        }  # fmt: skip
        return {key: AUTO if number is None else str(number) for key, number in numbers.items()}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Settings:
        """From a model's configuration, as Triton hands it over; what is left out has its default.

        Raises:
            InputError: a parameter that is not a number, or out of range.
        """
        usual = cls()
        limits = Limits(
            rows=number(config, "rows", usual.limits.rows, 1),
            queue=number(config, "queue", usual.limits.queue, 0),
            prompt_tokens=number(config, "prompt_tokens", usual.limits.prompt_tokens, 1),
            new_tokens=number(config, "new_tokens", usual.limits.new_tokens, 1),
            pages=optional(config, "pages"),
            threads=optional(config, "threads"),
        )
        asked = number(config, "default_max_tokens", min(usual.default_max_tokens, limits.new_tokens), 1)
        if asked > limits.new_tokens:
            raise InputError(
                f"parameter 'default_max_tokens' is {asked}", f"at most new_tokens, {limits.new_tokens}",
                "change config.pbtxt and load the model again",
            )  # fmt: skip
        return cls(limits, asked, number(config, "drain_seconds", usual.drain_seconds, 0))


def number(config: Mapping[str, Any], key: str, default: int, least: int) -> int:
    """The parameter ``key``, ``default`` where it is left out.

    Raises:
        InputError: not an integer from ``least`` on.
    """
    text = _text(config, key)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) <= LARGEST):
        raise InputError(
            f"parameter '{key}' is {text[:40]!r}", f"a number from {least} to {LARGEST}",
            "change config.pbtxt and load the model again",
        )  # fmt: skip
    return int(text)


def optional(config: Mapping[str, Any], key: str) -> int | None:
    """A parameter of 1 or more, or None where it is ``auto`` or left out."""
    return None if _text(config, key) in (None, AUTO) else number(config, key, 1, 1)


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get("parameters", {}).get(key)
    return None if value is None else str(value.get("string_value", "")).strip()
