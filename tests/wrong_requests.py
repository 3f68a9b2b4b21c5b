"""Requests that a text model of 96 tokens and 256 ids, or the server before it, refuses; and what the error says."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from tiny_engines import CONTEXT

Tensor = tuple[str, str, Sequence[int], bytes]  # name, type, shape, data


def texts(*words: bytes) -> bytes:
    """The data of a tensor of strings."""
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


TEXT: Tensor = ("text_input", "BYTES", [1], texts(b"hi"))
FEW: Tensor = ("max_tokens", "INT32", [1], struct.pack("<i", 3))


def number(name: str, kind: str, value: float) -> Tensor:
    form = {"INT32": "<i", "INT64": "<q", "FP32": "<f", "BOOL": "<?"}[kind]
    return name, kind, [1], struct.pack(form, value)


OURS: list[tuple[dict[str, Any], str]] = [  # refused by the model: fields, and words of the error
    ({}, "without a prompt. Expected: exactly one of text_input and input_ids"),
    ({"text_input": "a", "input_ids": [1]}, "both text_input and input_ids. Expected: exactly one"),
    ({"text_input": ""}, "a prompt without tokens. Expected: at least one token"),
    ({"input_ids": []}, "a prompt without tokens. Expected: at least one token"),
    ({"input_ids": [3, 256]}, "token id 256. Expected: 0 to 255"),
    ({"input_ids": [-1]}, "token id -1. Expected: 0 to 255"),
    ({"input_ids": [2**62]}, f"token id {2**62}. Expected: 0 to 255"),
    ({"input_ids": [1] * (CONTEXT + 1)}, "a prompt of 97 tokens. Expected: at most 96. To do: shorten the prompt"),
    ({"input_ids": [1] * 300_000}, "a prompt of 300000 tokens. Expected: at most 96"),
    ({"text_input": "a" * (CONTEXT + 1)}, "a prompt of 97 tokens. Expected: at most 96"),
    ({"text_input": "a" * 1_000_000}, "a text of 1000000 bytes. Expected: at most 6144. To do: shorten it"),
    ({"text_input": "hi", "max_tokens": 0}, "max_tokens=0. Expected: 1 or more"),
    ({"text_input": "hi", "max_tokens": -1}, "max_tokens=-1. Expected: 1 or more"),
    ({"text_input": "hi", "max_tokens": -(2**31)}, "max_tokens=-2147483648. Expected: 1 or more"),
    (
        {"text_input": "hi", "max_tokens": 2**31 - 1},
        "max_tokens=2147483647. Expected: at most 96. To do: ask for fewer",
    ),
    ({"text_input": "hi", "temperature": -0.5}, "temperature=-0.5. Expected: 0 (greedy) or more, and finite"),
    ({"text_input": "hi", "temperature": float("nan")}, "temperature=nan. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "temperature": float("inf")}, "temperature=inf. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "temperature": 1e39}, "temperature=inf. Expected: 0 (greedy) or more"),
    ({"text_input": "hi", "top_p": 0.0}, "top_p=0.0. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "top_p": 1.5}, "top_p=1.5. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "top_p": float("nan")}, "top_p=nan. Expected: above 0 and at most 1"),
    ({"text_input": "hi", "seed": -1}, "seed=-1. Expected: 0 or more"),
    ({"text_input": "hi", "stop": [""]}, "a stop text of 0 characters. Expected: 1 to 1024"),
    ({"text_input": "hi", "stop": ["a"] * 17}, "17 stop texts. Expected: at most 16"),
    ({"text_input": "hi", "stop": ["a"] * 100_000}, "100000 stop texts. Expected: at most 16"),
    ({"text_input": "hi", "stop": ["a" * 1025]}, "a stop text of 1025 characters. Expected: 1 to 1024"),
]
THEIRS: list[tuple[dict[str, Any], str]] = [  # refused by the server itself, which reads the JSON
    ({"text_input": "hi", "max_tokens": 1.5}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": "3"}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": None}, "non-signed-integer"),
    ({"text_input": "hi", "max_tokens": [3, 4]}, "'max_tokens' to tensor with proper shape"),
    ({"text_input": "hi", "max_tokens": []}, "'max_tokens' to tensor with proper shape"),
    ({"text_input": "hi", "temperature": "warm"}, "non-number"),
    ({"text_input": "hi", "stream": 1}, "non-boolean"),
    ({"text_input": "hi", "seed": 2**64}, "non-signed-integer"),
    ({"text_input": "hi", "stop": [1]}, "non-string"),
    ({"text_input": ["a", "b"]}, "'text_input' to tensor with proper shape"),
    ({"text_input": 5}, "non-string"),
    ({"text_input": {"a": 1}}, "non-string"),
    ({"text_input": "\ud800"}, "surrogate pair"),
    ({"input_ids": "abc"}, "non-signed-integer"),
    ({"input_ids": [[1, 2]]}, "true shape"),
]
GARBAGE: list[tuple[bytes, str]] = [
    (b"", "document is empty"),
    (b"{", "Missing a name"),
    (b"[]", "non-object"),
    (b"null", "non-object"),
    (b"\xff\xfe\x00", "Invalid value"),
    (b'{"text_input":' + b"[" * 1000, "Invalid value"),
    (b'{"text_input":"a","text_input":"b"}', "already exists"),
    (b'{"text_input":"\xff\xfe"}', "text_input is not UTF-8 (byte 0). Expected: a text in UTF-8"),
    (b'{"text_input":"hi\xc3"}', "text_input is not UTF-8 (byte 2). Expected: a text in UTF-8"),
    (b'{"text_input":"hi","stop":["ok","\xed\xa0\x80"]}', "stop is not UTF-8 (byte 0). Expected: a text in UTF-8"),
]
RAW: list[tuple[str, list[Tensor], str]] = [
    ("bytes that are no text", [("text_input", "BYTES", [1], texts(b"ab\xff")), FEW], "not UTF-8 (byte 2)"),
    ("a stop that is no text", [TEXT, FEW, ("stop", "BYTES", [2], texts(b"a", b"\xc3"))], "stop is not UTF-8"),
    ("a length beyond the data", [("text_input", "BYTES", [1], b"\xff\xff\xff\x7fab"), FEW], "incomplete string"),
    ("half a length", [("text_input", "BYTES", [1], b"\x01"), FEW], "incomplete string length"),
    ("no data", [("text_input", "BYTES", [1], b""), FEW], "expected 1 string elements"),
    ("one text too many", [("text_input", "BYTES", [1], texts(b"a", b"b")), FEW], "unexpected number of string"),
    ("two texts", [("text_input", "BYTES", [2], texts(b"a", b"b")), FEW], "unexpected shape for input 'text_input'"),
    ("a text in two dimensions", [("text_input", "BYTES", [1, 1], texts(b"a")), FEW], "unexpected shape"),
    ("no text", [("text_input", "BYTES", [0], b""), FEW], "unexpected shape"),
    ("a scalar", [("text_input", "BYTES", [], texts(b"a")), FEW], "unexpected shape"),
    ("a text of numbers", [("text_input", "INT32", [1], b"abcd"), FEW], "data-type is 'INT32'"),
    ("a type that does not exist", [("text_input", "WORDS", [1], texts(b"a")), FEW], "data-type is '<invalid>'"),
    ("an open size", [("text_input", "BYTES", [-1], texts(b"a")), FEW], "All input dimensions should be specified"),
    ("ids of 32 bits", [("input_ids", "INT32", [1], b"\x00" * 4), FEW], "data-type is 'INT32'"),
    ("ids in two dimensions", [("input_ids", "INT64", [1, 2], b"\x00" * 16), FEW], "unexpected shape"),
    ("too few bytes", [("input_ids", "INT64", [3], b"\x00" * 16), FEW], "Expected 24, got 16"),
    ("no ids", [("input_ids", "INT64", [0], b""), FEW], "a prompt without tokens. Expected: at least one"),
    ("an id out of range", [number("input_ids", "INT64", -5), FEW], "token id -5. Expected: 0 to 255"),
    ("both prompts", [TEXT, number("input_ids", "INT64", 1), FEW], "both text_input and input_ids"),
    ("no prompt", [FEW], "without a prompt"),
    ("an unknown input", [TEXT, FEW, number("bogus", "INT64", 1)], "unexpected inference input 'bogus'"),
    ("one input twice", [TEXT, TEXT, FEW], "already exists"),
    ("no number", [TEXT, ("max_tokens", "INT32", [0], b"")], "unexpected shape for input 'max_tokens'"),
    ("two numbers", [TEXT, ("max_tokens", "INT32", [2], b"\x01" * 8)], "unexpected shape for input 'max_tokens'"),
    ("a number of 64 bits", [TEXT, number("max_tokens", "INT64", 1)], "data-type is 'INT64'"),
    ("a negative number", [TEXT, number("max_tokens", "INT32", -1)], "max_tokens=-1. Expected: 1 or more"),
    ("NaN", [TEXT, FEW, number("temperature", "FP32", float("nan"))], "temperature=nan. Expected: 0 (greedy)"),
    ("infinity", [TEXT, FEW, number("top_p", "FP32", float("inf"))], "top_p=inf. Expected: above 0 and at most 1"),
    ("a negative seed", [TEXT, FEW, number("seed", "INT64", -(2**63))], f"seed={-(2**63)}. Expected: 0 or more"),
]
