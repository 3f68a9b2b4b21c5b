"""The pass contract: ``requires``, ``call``, ``ensures``; options in a frozen dataclass; a result that tells the truth.

A method is one file in this folder that defines a ``Pass`` subclass; ``all_methods()`` finds it. A pipeline is a flat,
named list of passes that reads top to bottom; its textual form is ``token-sparse:coverage=0.005,layers=15-29``.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import onnx_ir as ir

from trtpass.anchors import Anchors, find
from trtpass.errors import AnchorError, InputError
from trtpass.ir import check, tidy
from trtpass.reduction.decoder import SPAN_KEY

WHOLE_PROMPT_KEY = "trtpass.whole_prompt"  # model metadata: the method that is not defined on chunks of a prompt

REDUCED_KEY = "trtpass.reduced"  # model metadata: the pass that shortened an encoder's stream


@dataclass(frozen=True)
class Site:
    """One place that a pass changed: the layer and the values it produced, by role."""

    layer: int
    values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    """What a pass did. ``modified``: whether the graph changed; ``near_misses``: where it did not apply, and why;
    ``notes``: decisions that options left open; ``warnings``: options that are legal and probably not meant; ``plan``:
    what a twin needs beside the options."""

    name: str
    modified: bool
    sites: tuple[Site, ...] = ()
    near_misses: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    plan: Any = None


class Pass(abc.ABC):
    """A graph rewrite, with the same edit on a torch module where it is a method (``twin``)."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    method: ClassVar[bool] = True  # listed for users; False for plumbing such as lowering
    whole_prompt: ClassVar[bool] = False  # True: not defined on chunks of a prompt
    Options: ClassVar[type]

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @abc.abstractmethod
    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """Raise ``AnchorError`` if an anchor is missing (which, and why it was not found)."""

    @abc.abstractmethod
    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        """Edit ``model`` in place and report."""

    def ensures(self, model: ir.Model, result: PassResult) -> None:
        """The graph is checker-clean and sorted, and the values of all sites have a dtype and a rank."""
        check(model, f"the graph after pass '{self.name}'")
        values = {v.name: v for node in model.graph for v in node.outputs}
        for site in result.sites:
            for role, name in site.values.items():
                value = values.get(name)
                if value is None or value.dtype is None or value.shape is None:
                    raise InputError(
                        f"pass '{self.name}' left '{name}' ({role}, layer {site.layer}) without dtype or shape"
                    )

    def twin(self, module: Any, result: PassResult) -> Any:
        """A runner of ``module`` (torch, A) with the same edit at the sites of ``result`` (D)."""
        raise InputError(
            f"pass '{self.name}' has no torch twin", fix="compare the ONNX graphs before and after it instead"
        )

    def __call__(self, model: ir.Model) -> PassResult:
        anchors = find(model)
        if self.method and SPAN_KEY in model.metadata_props:
            before = model.metadata_props.get(WHOLE_PROMPT_KEY, "another method")
            raise InputError(
                f"pass '{self.name}' on a graph from which '{before}' drops tokens",
                "one of the two: later layers of that graph have other lengths",
            )
        self.requires(model, anchors)
        result = self.call(model, anchors)
        if result.modified:
            tidy(model)
        self.ensures(model, result)
        return result

    def describe(self) -> dict[str, Any]:
        """The options as plain values for a manifest; infinities, which JSON does not have, as text."""
        values = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)}
        return {name: plain(value) for name, value in values.items()}

    @classmethod
    def described(cls, values: dict[str, Any]) -> Pass:
        """The pass that ``describe`` described.

        Raises:
            InputError: options that it does not have.
        """
        hints = typing.get_type_hints(cls.Options)
        unknown = set(values) - set(hints)
        if unknown:
            raise InputError(f"options {', '.join(sorted(unknown))} of pass '{cls.name}'", ", ".join(hints))
        return cls(cls.Options(**{
            k: _convert(cls.name, k, v, hints[k]) if isinstance(v, str) else v for k, v in values.items()
        }))  # fmt: skip


def plain(value: Any) -> Any:
    """An option's value for JSON, which has no infinities: they become text, and ``Pass.described`` reads them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def need_blocks(anchors: Anchors, name: str) -> None:
    """Raise unless there is an attention block; for ``requires``."""
    if not anchors.blocks:
        raise AnchorError(
            f"pass '{name}' found no attention block: {'; '.join(anchors.missing)}",
            "a transformer whose attention raises to Attention nodes",
            "run `trtpass inspect` on the file to see what was recognised",
        )


@cache
def all_methods() -> dict[str, type[Pass]]:
    """Every user-facing pass by name, found in the files of this folder."""
    found: dict[str, type[Pass]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            if (
                isinstance(item, type)
                and issubclass(item, Pass)
                and item.__module__ == module.__name__
                and not getattr(item, "__abstractmethods__", None)
                and item.method
            ):
                found[item.name] = item
    return found


def parse(text: str) -> Pass:
    """``NAME[:key=value,...]`` to a pass with options.

    Raises:
        InputError: unknown name or option, or a value of the wrong type; what exists is listed.
    """
    name, _, rest = text.partition(":")
    methods = all_methods()
    if name not in methods:
        close = difflib.get_close_matches(name, methods, n=1)
        raise InputError(
            f"unknown pass '{name}'",
            f"one of: {', '.join(methods)}",
            f"use '{close[0]}'" if close else "see `trtpass passes`",
        )
    cls = methods[name]
    hints = typing.get_type_hints(cls.Options)
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in hints:
            raise InputError(
                f"pass '{name}' has no option '{part}'",
                f"key=value with keys {', '.join(hints)}",
                "separate options by commas, and join lists by '+' (layers=3+5+10-20)",
            )
        if key in given:
            raise InputError(f"option {key} of pass '{name}' is given twice", "each option once")
        given[key] = _convert(name, key, value.strip(), hints[key])
    return cls(cls.Options(**given))


def _convert(name: str, key: str, value: str, wanted: Any) -> Any:
    """One option value to its annotated type (int, float, bool, str, or one of these or None)."""
    choices = (
        [t for t in typing.get_args(wanted) if t is not types.NoneType]
        if isinstance(wanted, types.UnionType)
        else [wanted]
    )
    if len(choices) < len(typing.get_args(wanted)) and value.lower() == "none":
        return None
    for kind in choices:
        try:
            if kind is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            return kind(value)
        except (ValueError, KeyError):
            continue
    kinds = " or ".join(k.__name__ for k in choices)
    raise InputError(f"option {key}={value} of pass '{name}' cannot be read", f"a value of type {kinds}")


def run(model: ir.Model, pipeline: Sequence[Pass]) -> list[PassResult]:
    """Apply a pipeline in order, in place."""
    return [step(model) for step in pipeline]
