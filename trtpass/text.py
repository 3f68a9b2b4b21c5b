"""Text to tokens and back, from a Hugging Face ``tokenizer.json``; streams never show half of a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtpass.errors import InputError

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) UTF-8
_LONGEST = 4  # bytes of a UTF-8 character: more tokens than that cannot be one character in the making
MOST_STOPS, LONGEST_STOP = 16, 1024  # stop texts of an answer, characters of one: every piece is searched for them


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


class StopText:
    """Cuts a growing text before the first of some stop texts: the one whose place in the text is the earliest.

    Pieces in, pieces out; joined, they are the text up to there. Withheld is only what begins a stop text if the next
    characters go on like it, so how the text is split changes nothing.

    Args:
        stops: texts of 1 to 1024 characters, at most 16.

    Attributes:
        found: whether the text has ended; what is pushed then is ignored.

    Raises:
        InputError: too many stop texts, or one that is empty or too long.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if len(stops) > MOST_STOPS:
            raise InputError(f"{len(stops)} stop texts", f"at most {MOST_STOPS}")
        for stop in stops:
            if not 1 <= len(stop) <= LONGEST_STOP:
                raise InputError(f"a stop text of {len(stop)} characters", f"1 to {LONGEST_STOP} characters")
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is sure to be before any stop text (perhaps none)."""
        if self.found or not piece:
            return ""
        text, at = self._cut(piece)
        begun = next((i for i in range(min(at, len(text))) if self._begins(text[i:])), None)
        self.found = begun is None and at < len(text)
        shown = at if begun is None else begun
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text has ended: what was withheld, up to a stop text in it."""
        text, at = self._cut("")
        self.found, self._held = self.found or at < len(text), ""
        return text[:at]

    def _cut(self, piece: str) -> tuple[str, int]:
        """What was withheld and ``piece``, and where the first whole stop text in it begins; its length if none."""
        text = self._held + piece
        places = [at for at in map(text.find, self._stops) if at >= 0]
        return text, min(places, default=len(text))

    def _begins(self, rest: str) -> bool:
        return any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stops)


class AnswerText:
    """The text of one answer: tokens in, pieces out, cut before the first of the ``stops`` (see ``StopText``)."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer), StopText(stops)
        self._ready = ""

    def push(self, token: int) -> bool:
        """Add a token, which is not a stop token; returns whether a stop text has ended the answer."""
        self._ready += self._stop.push(self._stream.push(token))
        return self._stop.found

    def take(self) -> str:
        """The text that is complete now and was not taken yet."""
        made, self._ready = self._ready, ""
        return made

    def finish(self, reason: str) -> tuple[str, str]:
        """The last text, and why the answer ended: ``reason``, or ``stop`` if the last text held a stop text."""
        last = self._stop.push(self._stream.finish()) + self._stop.finish()
        return self.take() + last, "stop" if self._stop.found else reason
