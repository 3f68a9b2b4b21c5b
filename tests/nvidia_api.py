"""NVIDIA's own Python code of quick-deployable plugins, on a machine without TensorRT: what calls our functions there.

The package ``tensorrt-cu13-bindings`` holds ``tensorrt.plugin`` as Python source. It needs the classes of TensorRT's
library; TensorRT-RTX has most of them, and stand-ins are made here for the others. The plugin object through which a
builder would ask for shapes, tactics and kernels is NVIDIA's; the builder's symbolic arithmetic is ours, on integers.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Expression:
    """``IDimensionExpr``: an integer that may be declared a symbol."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        if not self.constant:
            raise RuntimeError("the value of a symbol was asked for")
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class ExpressionBuilder:
    """``IExprBuilder``."""

    def __init__(self, trt: Any) -> None:
        o = trt.DimensionOperation
        self.operations = {
            o.SUM: lambda a, b: a + b,
            o.SUB: lambda a, b: a - b,
            o.PROD: lambda a, b: a * b,
            o.FLOOR_DIV: lambda a, b: a // b,
            o.CEIL_DIV: lambda a, b: -(-a // b),
            o.MAX: max,
            o.MIN: min,
        }

    def constant(self, value: int) -> Expression:
        return Expression(value, True)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        made = self.operations[operation](first.value, second.value)
        return Expression(made, first.constant and second.constant)


class SymbolicArgument:
    """``ISymExpr``: what a launch parameter or an extra becomes."""

    type: Any = None
    dtype: Any = None
    expr: Any = None


class Preference(enum.Enum):
    """``QuickPluginCreationRequest``."""

    UNKNOWN = 0
    PREFER_JIT = 1
    PREFER_AOT = 2
    STRICT_JIT = 3
    STRICT_AOT = 4


class _Aot:
    """``IPluginV3QuickAOTBuild``."""


class _Launch(types.SimpleNamespace):
    """What the builder gives to be filled with launch parameters."""


class _Arguments(list):  # type: ignore[type-arg]
    """What the builder gives to be filled with extras."""

    nbSymExprs = 0

    def __setitem__(self, index: Any, value: Any) -> None:
        self.extend([None] * (index + 1 - len(self)))
        super().__setitem__(index, value)


@contextmanager
def tensorrt() -> Iterator[Any]:
    """The module ``tensorrt`` with NVIDIA's ``plugin`` in it; skips with its reason where a package is missing."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has the classes that NVIDIA's plugin code needs")
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tensorrt-cu13-bindings is not installed: it holds NVIDIA's plugin code; run make setup")
    folder = Path(found.submodule_search_locations[0]) / "plugin"
    module = types.ModuleType("tensorrt")
    module.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    module.__dict__.update(
        ISymExpr=SymbolicArgument, QuickPluginCreationRequest=Preference, IPluginV3QuickAOTBuild=_Aot,
        IDimensionExpr=Expression, DimsExprs=lambda count: [None] * count,
        PluginArgType=rtx.PluginArgType, PluginArgDataType=rtx.PluginArgDataType,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    before = {name: value for name, value in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    sys.modules["tensorrt"], sys.modules["tensorrt.plugin"] = module, plugin
    module.plugin = plugin  # type: ignore[attr-defined]
    try:
        spec.loader.exec_module(plugin)
        yield module
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


class Instance:
    """One plugin node as a builder treats it: types, shapes, formats, tactics, then the kernel of a tactic."""

    def __init__(self, trt: Any, name: str, attrs: dict[str, int]) -> None:
        lib = sys.modules["tensorrt.plugin._lib"]
        classes = sys.modules["tensorrt.plugin._plugin_class"]
        definition = lib.QDP_REGISTRY[name]
        namespace, short = name.split("::")
        self.trt, self.definition = trt, definition
        self.plugin = classes._TemplateAOTPlugin(short, namespace, definition.num_outputs)
        self.plugin.init(
            definition.register_func, attrs, definition.aot_impl_attr_names, definition.aot_impl_func,
            definition.autotune_attr_names, definition.autotune_func,
        )  # fmt: skip
        self.builder = ExpressionBuilder(trt)

    def output_types(self, types_in: Sequence[Any], ranks: Sequence[int]) -> list[Any]:
        return list(self.plugin.get_output_data_types(list(types_in), list(ranks)))

    def output_shapes(self, shapes: Sequence[Sequence[Expression]]) -> list[list[int]]:
        made = self.plugin.get_output_shapes([list(s) for s in shapes], [], self.builder)
        return [[size.value for size in shape] for shape in made]

    def _described(self, types_of: Sequence[Any], shapes: Sequence[Sequence[int]]) -> list[Any]:
        found = []
        for kind, shape in zip(types_of, shapes, strict=True):
            desc = self.trt.DynamicPluginTensorDesc()
            inner = self.trt.PluginTensorDesc()
            inner.dims, inner.type, inner.format = self.trt.Dims(list(shape)), kind, self.trt.TensorFormat.LINEAR
            desc.desc = inner
            found.append(desc)
        return found

    def combinations(self, types_of: Sequence[Any], shapes: Sequence[Sequence[int]], inputs: int) -> list[Any]:
        """Types of every supported combination, one after the other."""
        made = self.plugin.get_supported_format_combinations(self._described(types_of, shapes), inputs)
        return [desc.type for desc in made]

    def tactics(self, types_of: Sequence[Any], shapes: Sequence[Sequence[int]], inputs: int) -> list[int]:
        described = self._described(types_of, shapes)
        self.plugin.configure_plugin(described[:inputs], described[inputs:])
        return list(self.plugin.get_valid_tactics())

    def kernel(
        self, tactic: int, types_of: Sequence[Any], shapes: Sequence[Sequence[int]], inputs: int
    ) -> tuple[_Launch, list[int], str, str]:
        """Launch parameters, values of the extras, entry name and PTX of one tactic."""
        self.plugin.set_tactic(tactic)
        described = self._described(types_of, shapes)
        launch, extras = _Launch(), _Arguments()
        self.plugin.get_launch_params(None, described, inputs, launch, extras, self.builder)
        name, ptx = self.plugin.get_kernel([d.desc for d in described[:inputs]], [d.desc for d in described[inputs:]])
        values = _Launch(**{key: argument.expr.value for key, argument in vars(launch).items()})
        assert extras.nbSymExprs == len(extras)
        return values, [argument.expr.value for argument in extras], name, ptx.decode()
