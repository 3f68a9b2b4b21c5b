"""The tensors of a text model: what they are, and reading a request from them. Nothing here needs a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trtpass.errors import InputError
from trtpass.serving.request import OverLimit, Request
from trtpass.serving.settings import Settings


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: Triton's type without ``TYPE_``, and the sizes (-1: any)."""

    type: str
    dims: tuple[int, ...] = (1,)


INPUTS: dict[str, Tensor] = {  # every one may be left out
    "text_input": Tensor("STRING"),
    "input_ids": Tensor("INT64", (-1,)),
    "max_tokens": Tensor("INT32"),
    "stop": Tensor("STRING", (-1,)),
    "temperature": Tensor("FP32"),
    "top_p": Tensor("FP32"),
    "seed": Tensor("INT64"),
    "stream": Tensor("BOOL"),
    "return_logits": Tensor("BOOL"),
}
OUTPUTS: dict[str, Tensor] = {
    "text_output": Tensor("STRING"),
    "token_ids": Tensor("INT32", (-1,)),
    "finish_reason": Tensor("STRING"),
    "prompt_tokens": Tensor("INT32"),
    "completion_tokens": Tensor("INT32"),
    "kept": Tensor("FP32"),
    "logits": Tensor("FP32", (-1,)),
}
DTYPES = {"STRING": np.object_, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}

Read = Callable[[str], np.ndarray | None]


@dataclass(frozen=True)
class Asked:
    """A request, and whether its answer is wanted piece by piece."""

    request: Request
    stream: bool


def parse(read: Read, encode: Callable[[str], list[int]], settings: Settings) -> Asked:
    """Read one request. Ranges of its numbers are the scheduler's to check.

    Args:
        read: the array of an input by its name, None where it was left out.
        encode: a text to token ids.
        settings: defaults and limits.

    Raises:
        OverLimit: a text that is too long for any prompt; it has not been tokenised then.
        InputError: a tensor of another type or shape, a text that is not UTF-8, or not exactly one prompt.
    """
    request = Request(
        prompt=(),
        max_tokens=int(_one(read, "max_tokens", settings.default_max_tokens)),
        stop=tuple(_text(value, "stop") for value in _list(read, "stop")),
        temperature=float(_one(read, "temperature", 0.0)),
        top_p=float(_one(read, "top_p", 1.0)),
        seed=int(_one(read, "seed", 0)),
        logits=bool(_one(read, "return_logits", False)),
    )
    stream = bool(_one(read, "stream", False))
    return Asked(replace(request, prompt=_prompt(read, encode, settings)), stream)


def _prompt(read: Read, encode: Callable[[str], list[int]], settings: Settings) -> tuple[int, ...]:
    text, ids = _array(read, "text_input"), _array(read, "input_ids")
    if (text is None) == (ids is None):
        raise InputError(
            "a request without a prompt" if ids is None else "a request with both text_input and input_ids",
            "exactly one of text_input and input_ids",
        )
    if text is None:
        return tuple(_list(read, "input_ids"))
    if len(text[0]) > settings.text_bytes:
        raise OverLimit(f"a text of {len(text[0])} bytes", f"at most {settings.text_bytes}", "shorten it")
    return tuple(encode(_text(text[0], "text_input")))


def _text(value: Any, name: str) -> str:
    try:
        return bytes(value).decode("utf-8")  # strict: half of a surrogate pair is no character
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start})", "a text in UTF-8") from error


def _one(read: Read, name: str, default: float) -> Any:
    return next(iter(_list(read, name)), default)


def _list(read: Read, name: str) -> list[Any]:
    array = _array(read, name)
    return [] if array is None else array.tolist()


def _array(read: Read, name: str) -> np.ndarray | None:
    """The array of an input, of its own dtype and shape; None where it was left out."""
    array = read(name)
    if array is None:
        return None
    want = INPUTS[name]
    if array.dtype != DTYPES[want.type]:
        raise InputError(f"{name} is {array.dtype}", want.type)
    if array.ndim != 1 or want.dims[0] not in (-1, len(array)):
        raise InputError(f"{name} has shape {list(array.shape)}", f"{list(want.dims)}")
    return array
