"""The operator contract: one typed PyTorch function is the definition, everything else is derived or attached.

This module imports neither torch nor onnx, so that a machine which only serves can import every operator's schema.

An operator lives in ``plugins/<name>/__init__.py``::

    @op(name="ColumnMass", source="...", shape=lambda d, a: {"mass": (d.B, d.H, d.S)}, tolerance=Tolerance(...))
    def column_mass(
        q: Annotated[Tensor, Port("B H S D", FLOATS)],
        lengths: Annotated[Tensor, Port("B", INT32)],
        *,
        window: int = 128,
    ) -> Annotated[Tensor, Port("B H S", FLOAT32, name="mass")]:
        ...

Positional parameters are tensors, keyword-only parameters are scalar attributes (int, float or str) with a default.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from trtpass.errors import InputError

DOMAIN = "trtpass"
VERSION = 1

FLOATS = ("float32", "float16")
FLOAT32 = ("float32",)
INT32 = ("int32",)


@dataclass(frozen=True)
class Port:
    """A tensor of an operator: ``dims`` such as ``"B H S D"`` (one name, one size), the dtypes allowed, its name.

    Inputs take their name from the parameter; outputs must be given one. Floating inputs of one call share a dtype.
    """

    dims: str
    dtypes: tuple[str, ...]
    name: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.dims.split())


@dataclass(frozen=True)
class Attr:
    """A scalar attribute: its Python type is its ONNX type (int, float, str)."""

    name: str
    type: type
    default: int | float | str


@dataclass(frozen=True)
class Tolerance:
    """How far a body or kernel may be from the fp32 reference, per dtype, and the reason for the figure.

    ``atol``/``rtol`` map a floating dtype to a bound; integer outputs are always compared exactly.
    """

    atol: Mapping[str, float]
    rtol: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class Case:
    """Inputs for tests, golden files and benchmarks alike.

    ``make(seed)`` returns the positional inputs as numpy arrays in port order; ``attrs`` are the attributes.
    """

    name: str
    make: Callable[[int], Sequence[Any]]
    attrs: Mapping[str, int | float | str] = field(default_factory=dict)
    slow: bool = False


@dataclass(frozen=True)
class Launch:
    """How a kernel is started for given shapes.

    Args:
        grid: the number of programs along three axes, `(x, y, z)`; y and z at most 65535.
        extras: the values of ``Kernel.extras``.
        constexprs: what the kernel is compiled for, by parameter name; they depend on fixed dimensions only.
        warps: warps of a program, 32 threads each.
        stages: depth of software pipelining.
    """

    grid: tuple[Any, Any, Any]
    extras: tuple[Any, ...]
    constexprs: Mapping[str, int | float | str]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of an operator: one launch that writes every element of every output.

    The parameters of ``function`` are, in this order: input pointers, int32 extras, output pointers, constexprs;
    pointers are named as their ports. Tensors are contiguous and aligned to 16 bytes. There is no workspace.

    ``dims``, ``attrs`` and ``dtypes`` are namespaces: sizes by dimension name, completed attributes, dtypes by port
    name. Only the fixed dimensions are sure to be ints; grid and extras are plain integer arithmetic on the others,
    which may be symbols (write ``T * k``, never ``k * T``).

    Args:
        function: the ``@triton.jit`` function.
        fixed: names of the dimensions that the kernel is compiled for, such as head widths.
        extras: names of the int32 scalars.
        geometry: ``(dims, attrs, dtypes) -> Launch``.
        supports: ``(dims, attrs, dtypes, cc) -> True`` or the reason in words why this kernel does not apply, from
            fixed dimensions only; ``cc`` is a compute capability such as 89.
    """

    function: Any
    fixed: tuple[str, ...]
    extras: tuple[str, ...]
    geometry: Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace], Launch]
    supports: Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace, int], bool | str]


ShapeFn = Callable[[SimpleNamespace, SimpleNamespace], Mapping[str, Sequence[Any]]]


@dataclass
class Op:
    """An operator: schema (from the reference's signature), shapes, bodies, cases, tolerance, source."""

    name: str
    reference: Callable[..., Any]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attrs: tuple[Attr, ...]
    shape: ShapeFn
    source: str
    tolerance: Tolerance
    folder: str
    bodies: dict[str, Callable[[], Any]] = field(default_factory=dict)
    case_list: Callable[[], Sequence[Case]] | None = None
    kernel_list: Callable[[], Sequence[Kernel]] | None = None

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        """The reference itself."""
        return self.reference(*inputs, **attrs)

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.reference) or ""

    def body(self, kind: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Decorator: attach the builder of an ONNX body: ``dynamic`` (lengths may depend on data) or ``static``.

        The builder takes nothing and returns an ``onnxscript.OnnxFunction`` in domain ``trtpass`` whose parameters are
        this op's inputs and attributes; other such functions that it calls are inlined, and it is named as the op, by
        ``plugins._library.function``, which is where passes get it. An op whose two bodies are the same registers it
        twice.
        """
        if kind not in ("dynamic", "static"):
            raise ValueError(f"body kind {kind!r}: 'dynamic' or 'static'")

        def attach(build: Callable[[], Any]) -> Callable[[], Any]:
            self.bodies[kind] = build
            return build

        return attach

    def cases(self, make: Callable[[], Sequence[Case]]) -> Callable[[], Sequence[Case]]:
        """Decorator: attach the cases."""
        self.case_list = make
        return make

    def kernels(self, make: Callable[[], Sequence[Kernel]]) -> Callable[[], Sequence[Kernel]]:
        """Decorator: attach the Triton kernels, best first. Called only where triton is installed."""
        self.kernel_list = make
        return make

    def complete(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes with defaults filled in; an unknown name or a wrong type is an error."""
        known = {a.name: a for a in self.attrs}
        for name, value in attrs.items():
            if name not in known:
                raise InputError(f"{self.name} has no attribute '{name}'", f"one of {', '.join(known) or 'none'}")
            wanted = known[name].type
            fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
            if isinstance(value, bool) or not fits:
                raise InputError(f"{self.name}.{name} is {value!r}", f"a value of type {wanted.__name__}")
        return {a.name: attrs.get(a.name, a.default) for a in self.attrs}

    def bind(self, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Named dimensions from input shapes (ints or symbols); one name must have one size.

        Raises:
            InputError: rank mismatch, or two sizes for one name (ints only: symbols are taken from their first use).
        """
        if len(shapes) != len(self.inputs):
            raise InputError(f"{self.name} got {len(shapes)} inputs", f"{len(self.inputs)} inputs")
        dims: dict[str, Any] = {}
        for port, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(port.axes):
                raise InputError(f"{self.name}.{port.name} has shape {list(shape)}", f"[{', '.join(port.axes)}]")
            for axis, size in zip(port.axes, shape, strict=True):
                seen = dims.setdefault(axis, size)
                if isinstance(seen, int) and isinstance(size, int) and seen != size:
                    raise InputError(
                        f"{self.name}.{port.name} has {axis} = {size}, but {axis} = {seen} elsewhere",
                        "one size for one name",
                    )
        return dims

    def output_shapes(self, shapes: Sequence[Sequence[Any]], attrs: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Output shapes by name, in the arithmetic of the given sizes (ints, symbolic dims, TensorRT ShapeExpr)."""
        dims = SimpleNamespace(**self.bind(shapes))
        made = self.shape(dims, SimpleNamespace(**self.complete(attrs)))
        return {port.name: tuple(made[port.name]) for port in self.outputs}


def _ports_of_return(annotation: Any) -> list[Port]:
    if typing.get_origin(annotation) is tuple:
        return [_port(a) for a in typing.get_args(annotation)]
    return [_port(annotation)]


def _port(annotation: Any) -> Port:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Port):
            return extra
    raise TypeError(f"{annotation!r}: annotate tensors as Annotated[Tensor, Port(dims, dtypes)]")


def op(*, name: str, source: str, shape: ShapeFn, tolerance: Tolerance) -> Callable[[Callable[..., Any]], Op]:
    """Declare an operator from its reference function; see the module docstring.

    Args:
        name: the ONNX op_type, CamelCase.
        source: paper (arXiv id) and section that defines it.
        shape: ``(dims, attrs) -> {output: shape}`` in plain integer arithmetic; write ``T * k``, never ``k * T``.
        tolerance: how far bodies and kernels may be from this reference.
    """

    def declare(reference: Callable[..., Any]) -> Op:
        # Annotations name torch.Tensor, which is imported for type checkers only.
        hints = typing.get_type_hints(reference, globalns={**reference.__globals__, "Tensor": Any}, include_extras=True)
        inputs: list[Port] = []
        attrs: list[Attr] = []
        for parameter in inspect.signature(reference).parameters.values():
            hint = hints[parameter.name]
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.default is inspect.Parameter.empty or hint not in (int, float, str):
                    raise TypeError(f"{name}.{parameter.name}: attributes are int, float or str with a default")
                attrs.append(Attr(parameter.name, hint, parameter.default))
            else:
                port = _port(hint)
                inputs.append(Port(port.dims, port.dtypes, parameter.name))
        outputs = _ports_of_return(hints["return"])
        if not all(port.name for port in outputs):
            raise TypeError(f"{name}: every output Port needs a name")
        folder = reference.__module__.rsplit(".", 1)[-1]
        return Op(name, reference, tuple(inputs), tuple(outputs), tuple(attrs), shape, source, tolerance, folder)

    return declare
