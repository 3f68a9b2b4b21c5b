"""Seeded mutations of ONNX models: of their bytes, and of their fields through protobuf's reflection."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import Message

_INTEGERS = [0, 1, 2, -1, 3, 7, 27, 64, 127, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan")]
_TEXT = [
    "", "x", "ai.onnx", "ai.onnx.ml", "trtpass", "com.microsoft", "local", "weights.bin", "../weights.bin",
    "/etc/passwd", ".", "a/../../b", "offset", "length", "location", "-1", "99999999999", "MatMul", "Attention",
    "RotaryEmbedding",    "Upsample", "If", "Loop", "Scan", "Constant", "Reshape", "TokenSparseAttention",
    "GroupQueryAttention",    "\0", "é\n\x1b[31m", "n" * 300,
]  # fmt: skip


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from _messages(child)


def _texts(model: Message) -> list[str]:
    found = []
    for message in _messages(model):
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                found.extend([value] if isinstance(value, str) else value)
    return found


def _scalar(field: Any, rng: random.Random, texts: list[str]) -> Any:
    if field.type == field.TYPE_STRING:
        return rng.choice(texts if rng.random() < 0.7 else _TEXT)
    if field.type == field.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 3, 4, 8, 64]))
    if field.type == field.TYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    number = rng.choice(_INTEGERS)
    bits = 32 if field.type == field.TYPE_INT32 else 64
    if field.type == field.TYPE_UINT64:
        return number % 2**64
    return (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def _mutate_field(model: Message, rng: random.Random) -> None:
    """Change one field of one message: set, clear, add, delete, repeat, swap, or replace by another of its type."""
    texts = _texts(model)
    everything = list(_messages(model))
    message: Any = rng.choice(everything)
    present = [field for field, _ in message.ListFields()]
    fields = present if present and rng.random() < 0.8 else list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    value = getattr(message, field.name)
    alike = [one for one in everything if one.DESCRIPTOR is field.message_type] if field.message_type else []
    if field.is_repeated:
        action = rng.choice(["delete", "repeat", "swap", "clear", "set", "set", "add"])
        if action in ("add", "set") and field.message_type is None:
            made = _scalar(field, rng, texts)
            if action == "set" and len(value):
                value[rng.randrange(len(value))] = made
            else:
                value.append(made)
        elif action == "add":
            value.add()
        elif action == "set" and len(value) and alike:
            value[rng.randrange(len(value))].CopyFrom(rng.choice(alike))
        elif action == "delete" and len(value):
            del value[rng.randrange(len(value))]
        elif action == "repeat" and len(value):
            value.append(value[rng.randrange(len(value))])
        elif action == "swap" and len(value) > 1:
            items = list(value)
            rng.shuffle(items)
            copies = [type(item).FromString(item.SerializeToString()) if field.message_type else item for item in items]
            del value[:]
            value.extend(copies)
        else:
            message.ClearField(field.name)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is None:
        setattr(message, field.name, _scalar(field, rng, texts))
    elif alike:
        copy = rng.choice(alike).SerializePartialToString()
        value.ParseFromString(copy)
    else:
        value.SetInParent()


def mutated(models: list[onnx.ModelProto], seed: int) -> bytes:
    """The bytes of the mutated file number ``seed``; seed 0, 1, ... is the same file on every machine."""
    rng = random.Random(seed)
    model = onnx.ModelProto()
    model.CopyFrom(models[seed % len(models)])
    kind = rng.choice(["fields"] * 6 + ["bits", "bits", "truncate", "splice", "delete", "noise"])
    if kind == "fields":
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            _mutate_field(model, rng)
        return model.SerializePartialToString()
    data = bytearray(model.SerializeToString())
    if kind == "bits":
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    else:
        other = rng.choice(models).SerializeToString()
        start, length = rng.randrange(len(other)), rng.choice([1, 4, 32, 256])
        chunk = {"splice": other[start : start + length], "delete": b"", "noise": rng.randbytes(length)}[kind]
        at = rng.randrange(len(data))
        data[at : at + (length if kind != "noise" or rng.random() < 0.5 else 0)] = chunk
    return bytes(data)
