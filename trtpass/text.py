"""Text to tokens and back, from a Hugging Face ``tokenizer.json``; streams never show half of a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtpass.errors import InputError

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) UTF-8
_LONGEST = 4  # bytes of a UTF-8 character: more tokens than that cannot be one character in the making


class Tokenizer:
    """A tokenizer of an engine's folder."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, or the one in a folder.

        Raises:
            InputError: it is not there, or is not a tokenizer; or the package ``tokenizers`` is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError("the package 'tokenizers' is not installed", fix="pip install tokenizers") from error
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"{file} does not exist", "a tokenizer.json beside the engine", "give token ids instead")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # tokenizers raises bare Exception on a file that it cannot read
            raise InputError(f"{file} is not a tokenizer: {error}", "a Hugging Face tokenizer.json") from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a text (a start token)."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Text of a growing row of tokens, in pieces that end between characters.

    The pieces joined are the text of all tokens. Each is the difference of two decodings: a token's text may depend on
    the one before it (leading spaces), and a character may be spread over several tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the tokens of the last piece, then those not shown yet
        self._shown = 0  # how many of them are shown

    def push(self, token: int) -> str:
        """Add a token; returns the text that is complete now (perhaps none)."""
        self._ids.append(token)
        before, text = self._texts()
        unfinished = text.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _LONGEST
        if unfinished or len(text) <= len(before):
            return ""
        return self._show(before, text)

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that never became one."""
        before, text = self._texts()
        return self._show(before, text) if len(text) > len(before) else ""

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._ids[: self._shown]), self._tokenizer.decode(self._ids)

    def _show(self, before: str, text: str) -> str:
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]
