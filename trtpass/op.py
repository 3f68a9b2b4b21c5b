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
from trtpass.kernel import Kernel

DOMAIN = "trtpass"
VERSION = 1

FLOATS = ("float32", "float16")  # of bodies and CPU kernels; Triton kernels take bfloat16 at the same ports
KERNEL_FLOATS = ("float16", "bfloat16", "float32")
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

    @property
    def floating(self) -> bool:
        """Whether it follows the floating type of the call; the others have one type each."""
        return len(self.dtypes) > 1


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

    def of(self, dtype: str) -> dict[str, float]:
        """``atol`` and ``rtol`` for a dtype. bfloat16, of kernels alone, has 3 bits less than float16: 8 times."""
        times, known = (8, "float16") if dtype == "bfloat16" else (1, dtype)
        return {"atol": times * self.atol.get(known, 0.0), "rtol": times * self.rtol.get(known, 0.0)}


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
class Step:
    """One of several launches that together compute an operator on a GPU, each an operator of its own.

    ``inputs`` and ``outputs`` name tensors: ports of the whole operator, or what an earlier step made. Attributes of
    the same name carry over.
    """

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


ShapeFn = Callable[[SimpleNamespace, SimpleNamespace], Mapping[str, Sequence[Any]]]


@dataclass(eq=False)  # one is itself alone, and may be a key
class Op:
    """An operator: schema (from the reference's signature), shapes, bodies, cases, tolerance, source.

    ``aliases`` maps an output to the input whose memory it may share: a kernel then writes only what changes.
    """

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
    step_list: Callable[[], Sequence[Step]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

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

    def steps(self, make: Callable[[], Sequence[Step]]) -> Callable[[], Sequence[Step]]:
        """Decorator: attach the launches that compute this operator together, where one cannot (or not well).

        Step operators have a reference and kernels, no bodies and no cases: they exist only where kernels do, and are
        tested on what earlier steps make of this operator's cases.
        """
        self.step_list = make
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


def op(
    *, name: str, source: str, shape: ShapeFn, tolerance: Tolerance, aliases: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an operator from its reference function; see the module docstring.

    Args:
        name: the ONNX op_type, CamelCase.
        source: paper (arXiv id) and section that defines it.
        shape: ``(dims, attrs) -> {output: shape}`` in plain integer arithmetic; write ``T * k``, never ``k * T``.
        tolerance: how far bodies and kernels may be from this reference.
        aliases: for each output that may share memory with an input, that input; both have one shape and dtype.
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
        folder = reference.__module__.split(".")[1] if "." in reference.__module__ else reference.__module__
        return Op(
            name, reference, tuple(inputs), tuple(outputs), tuple(attrs), shape, source, tolerance, folder,
            aliases=dict(aliases or {}),
        )  # fmt: skip

    return declare
