"""``config.pbtxt``: protobuf's text form, written from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


class Enum(str):
    """A name of an enumeration, which is written without quotes."""


def render(config: Mapping[str, Any]) -> str:
    """A message as text.

    Args:
        config: by field: a message as a mapping, a text, a number, a bool, an ``Enum``, or a list of one of these. A
            map field is a list of ``{"key": ..., "value": ...}``.
    """
    return "".join(f"{line}\n" for field, value in config.items() for line in _lines(field, value))


def _lines(field: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        inner = [line for name, item in value.items() for line in _lines(name, item)]
        flat = f"{field} {{ {' '.join(inner)} }}" if inner else f"{field} {{ }}"
        if len(flat) <= 100 and not any(line.startswith(" ") for line in inner):
            return [flat]
        return [f"{field} {{", *(f"  {line}" for line in inner), "}"]
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, (int, str)) for item in value):
            return [f"{field}: [{', '.join(map(_scalar, value))}]"]
        return [line for item in value for line in _lines(field, item)]
    return [f"{field}: {_scalar(value)}"]


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, Enum)):
        return str(value)
    return '"' + "".join(_escaped(byte) for byte in str(value).encode()) + '"'


def _escaped(byte: int) -> str:
    plain = 32 <= byte < 127 and chr(byte) not in '"\\'
    return chr(byte) if plain else f"\\{byte:03o}"
