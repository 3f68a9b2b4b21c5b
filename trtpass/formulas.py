"""Tensors as formulas: an abstract interpreter of the integer arithmetic that exporters put above masks and shapes.

Every tensor becomes a formula (sympy) of its own coordinates ``i0, i1, ...`` and of the symbolic sizes of the graph's
inputs: ``Range`` is ``i0``, ``Unsqueeze`` moves coordinates, ``LessOrEqual`` is a relation. What cannot be expressed
raises ``Unprovable`` with the node that stopped it.

Formulas are over exact integers, tensors are not: whatever could round, wrap around or count from the end (casts to
narrow or unsigned types, fractions, large offsets, indices that may be negative) stops the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy
from sympy.core.function import AppliedUndef

from trtpass.ir import const_array, int_attr, is_op

_LIMIT = 400  # nodes above one mask; a proof that needs more is not attempted
# Positions are computed in int32 or float32, exact up to 2^24: contexts up to 2^20 tokens, times 8, stay below it.
_MOST_OFFSET, _MOST_FACTOR = 2**20, 8
_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)
_TO_THE_END = 2**31 - 1  # Slice: exporters write such ends for "all the rest"
# What sympy raises on formulas that make no sense, such as a mask of garbage: then there is no proof.
NONSENSE = (RecursionError, ArithmeticError, TypeError, ValueError, AttributeError, IndexError)


class Unprovable(Exception):
    """The proof stopped; the message says at which node and why."""


@dataclass(frozen=True)
class Formula:
    """A tensor: sizes, and its element as a formula of ``i0 .. i{rank-1}``.

    ``stack`` is set for a short tensor known piece by piece along its last axis: one formula of the other coordinates
    for each piece.
    """

    shape: tuple[sympy.Expr, ...]
    element: sympy.Basic | None = None
    stack: tuple[sympy.Basic, ...] | None = None

    def at(self, coordinates: Sequence[sympy.Basic]) -> sympy.Basic:
        """The element at the given coordinates; an axis of size 1 broadcasts."""
        where = [sympy.Integer(0) if size == 1 else c for size, c in zip(self.shape, coordinates, strict=True)]
        if self.stack is not None:
            if not where[-1].is_Integer:
                raise Unprovable("a stacked tensor is indexed by a formula")
            return _substitute(self.stack[int(where[-1])], where[:-1])
        if self.element is None:
            raise Unprovable("a tensor without a formula")
        return _substitute(self.element, where)


def axis(index: int) -> sympy.Symbol:
    """The coordinate along an axis."""
    return sympy.Symbol(f"i{index}", integer=True, nonnegative=True)


def _substitute(expression: sympy.Basic, where: Sequence[sympy.Basic]) -> sympy.Basic:
    return expression.subs({axis(i): c for i, c in enumerate(where)}, simultaneous=True)


def shape_formula(value: ir.Value | None) -> list[sympy.Basic] | None:
    """The elements of a shape tensor as formulas of the graph's symbolic sizes (-1 stays -1), or None."""
    try:
        return Interpreter().vector(value)
    except (Unprovable, *NONSENSE):
        return None


def size_symbols(value: ir.Value) -> tuple[sympy.Expr, ...]:
    """The sizes of a tensor as formulas, in the symbols that ``shape_formula`` uses."""
    return _sizes(value)


def any_branch(choice: sympy.Piecewise, wanted: Callable[[sympy.Basic], bool]) -> sympy.Basic:
    """The condition under which a piecewise value comes from a branch that is ``wanted``."""
    found: list[sympy.Basic] = []
    earlier: sympy.Basic = sympy.true
    for value, condition in choice.args:
        if wanted(value):
            found.append(sympy.And(earlier, condition))
        earlier = sympy.And(earlier, sympy.Not(condition))
    return sympy.Or(*found)


def is_condition(element: sympy.Basic) -> bool:
    """Whether it is true or false. (To sympy a symbol may be either; here symbols are numbers.)"""
    return isinstance(element, sympy.logic.boolalg.Boolean) and not isinstance(element, sympy.Symbol)


class Interpreter:
    """Formulas of values, memoised. One instance a proof."""

    def __init__(self) -> None:
        self.known: dict[int, Formula] = {}

    def formula(self, value: ir.Value | None) -> Formula:
        if value is None:
            raise Unprovable("an absent input")
        if id(value) not in self.known:
            if len(self.known) > _LIMIT:
                raise Unprovable(f"more than {_LIMIT} nodes above the mask")
            self.known[id(value)] = self._make(value)
        return self.known[id(value)]

    def _make(self, value: ir.Value) -> Formula:
        array = const_array(value, limit=4096)
        if array is not None:
            return _constant(array)
        node = value.producer()
        if node is None:
            if value.is_graph_input() and value.shape is not None:
                if value.dtype is None or value.dtype.is_floating_point():
                    raise Unprovable(f"it depends on the input {value.name}, which is not an integer or boolean tensor")
                shape = _sizes(value)
                given = sympy.Function(str(value.name))(*[axis(k) for k in range(len(shape))])
                return Formula(shape, sympy.Ne(given, 0) if value.dtype == ir.DataType.BOOL else given)
            raise Unprovable(f"'{value.name}' is a large constant or unknown")
        rule = _RULES.get(node.op_type) if is_op(node, node.op_type) else None
        if rule is None:
            raise Unprovable(f"it needs {node.op_type} '{node.name}', which is not interpreted")
        return rule(self, node)

    def vector(self, value: ir.Value | None) -> list[sympy.Basic]:
        """A 0-D or 1-D integer tensor as a list of formulas."""
        formula = self.formula(value)
        if formula.stack is not None and len(formula.shape) == 1:
            return list(formula.stack)
        if not formula.shape or formula.shape == (1,):
            return [formula.at([sympy.Integer(0)] * len(formula.shape))]
        raise Unprovable(f"'{value.name if value else None}' is not a short vector")

    def integers(self, value: ir.Value | None) -> list[int]:
        items = self.vector(value)
        if not all(x.is_Integer for x in items):
            raise Unprovable(f"'{value.name if value else None}' is not constant")
        return [int(x) for x in items]


def _sizes(value: ir.Value) -> tuple[sympy.Expr, ...]:
    return tuple(
        sympy.Integer(d) if isinstance(d, int) else size_symbol(str(d.value or f"{value.name}_{k}"))
        for k, d in enumerate(value.shape or ())
    )


def size_symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _moves(element: sympy.Basic) -> bool:
    """Whether the value (not only a condition inside it) depends on coordinates, sizes or inputs: a position."""
    if isinstance(element, sympy.Piecewise):
        return any(_moves(value) for value, _ in element.args)
    if is_condition(element):
        return False
    return isinstance(element, (sympy.Symbol, AppliedUndef)) or any(_moves(part) for part in element.args)


def _exact(element: sympy.Basic) -> sympy.Basic:
    """``element`` if tensors of at least 24 bits compute it exactly; else the proof stops."""
    if not is_condition(element) and _moves(element):
        for part in sympy.preorder_traversal(element):
            if not part.is_number:
                continue
            if not part.is_Integer:
                raise Unprovable(f"positions are computed with {part}")
            if abs(part) > _MOST_OFFSET:
                raise Unprovable(f"positions are moved by {part}, beyond what is exact")
        for part in element.atoms(sympy.Mul):
            if abs(part.as_coeff_Mul()[0]) > _MOST_FACTOR and _moves(part):
                raise Unprovable(f"positions are scaled in {part}, beyond what is exact")
    return element


def _constant(array) -> Formula:  # type: ignore[no-untyped-def]
    def literal(x) -> sympy.Basic:  # type: ignore[no-untyped-def]
        if array.dtype.kind == "b":
            return sympy.true if x else sympy.false
        number = x.item()
        return sympy.Integer(int(number)) if number == number // 1 else sympy.sympify(number)

    shape = tuple(sympy.Integer(n) for n in array.shape)
    flat = array.reshape(-1)
    if array.size and (flat == flat[0]).all() and not (array.ndim == 1 and array.size > 1):
        return Formula(shape, literal(flat[0]))
    if array.ndim == 1 and 0 < array.size <= 8:
        return Formula(shape, stack=tuple(literal(x) for x in flat))
    raise Unprovable("a constant table")


def _broadcast(*formulas: Formula) -> tuple[tuple[sympy.Expr, ...], list[sympy.Basic]]:
    """The common shape and each operand's element over its coordinates."""
    rank = max(len(f.shape) for f in formulas)
    padded = [(sympy.Integer(1),) * (rank - len(f.shape)) + f.shape for f in formulas]
    shape = []
    for sizes in zip(*padded, strict=True):
        wide = [s for s in sizes if s != 1]
        if any(s != wide[0] for s in wide):
            raise Unprovable(f"sizes {wide} meet in a broadcast")
        shape.append(wide[0] if wide else sympy.Integer(1))
    return tuple(shape), [f.at([axis(rank - len(f.shape) + k) for k in range(len(f.shape))]) for f in formulas]


def _elementwise(combine: Callable[..., sympy.Basic]) -> Callable[[Interpreter, ir.Node], Formula]:
    def rule(interpreter: Interpreter, node: ir.Node) -> Formula:
        formulas = [interpreter.formula(v) for v in node.inputs]
        if all(f.stack is not None or not f.shape or f.shape == (1,) for f in formulas) and any(
            f.stack for f in formulas
        ):
            length = max(len(f.stack or ()) for f in formulas)
            columns = [f.stack or (f.at([sympy.Integer(0)] * len(f.shape)),) * length for f in formulas]
            return Formula(
                (sympy.Integer(length),), stack=tuple(_exact(combine(*row)) for row in zip(*columns, strict=True))
            )
        shape, elements = _broadcast(*formulas)
        return Formula(shape, _exact(combine(*elements)))

    return rule


def _shape(interpreter: Interpreter, node: ir.Node) -> Formula:
    source = node.inputs[0]
    try:
        sizes = interpreter.formula(source).shape
    except Unprovable:
        if (
            source is None
            or source.shape is None
            or any(not isinstance(d, int) and d.value is None for d in source.shape)
        ):
            raise
        sizes = _sizes(source)
    sizes = sizes[int_attr(node, "start", 0) : int_attr(node, "end", len(sizes))]
    return Formula((sympy.Integer(len(sizes)),), stack=tuple(sizes))


def _range(interpreter: Interpreter, node: ir.Node) -> Formula:
    start, limit, delta = (interpreter.vector(v)[0] for v in node.inputs)
    if delta != 1:
        raise Unprovable("a Range with a step other than 1")
    return Formula((sympy.expand(limit - start),), start + axis(0))


def _unsqueeze(interpreter: Interpreter, node: ir.Node) -> Formula:
    source, axes = interpreter.formula(node.inputs[0]), interpreter.integers(node.inputs[1])
    rank = len(source.shape) + len(axes)
    new = {a % rank for a in axes}
    kept = [k for k in range(rank) if k not in new]
    sizes = iter(source.shape)
    shape = tuple(sympy.Integer(1) if k in new else next(sizes) for k in range(rank))
    return _with_shape(source, shape, kept)


def _with_shape(source: Formula, shape: tuple[sympy.Expr, ...], kept: Sequence[int]) -> Formula:
    """The same elements where old axis ``n`` is new axis ``kept[n]`` and all other new axes have size 1."""
    if source.stack is not None and (not kept or kept[-1] == len(shape) - 1):
        return Formula(shape, stack=tuple(_substitute(piece, [axis(k) for k in kept[:-1]]) for piece in source.stack))
    return Formula(shape, source.at([axis(k) for k in kept]))


def _squeeze(interpreter: Interpreter, node: ir.Node) -> Formula:
    source = interpreter.formula(node.inputs[0])
    rank = len(source.shape)
    given = interpreter.integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    gone = {a % rank for a in given} if given is not None else {k for k, s in enumerate(source.shape) if s == 1}
    order = iter(range(rank))
    where = [sympy.Integer(0) if k in gone else axis(next(order)) for k in range(rank)]
    return Formula(tuple(s for k, s in enumerate(source.shape) if k not in gone), source.at(where))


def _expand(interpreter: Interpreter, node: ir.Node) -> Formula:
    source, target = interpreter.formula(node.inputs[0]), interpreter.vector(node.inputs[1])
    return _expanded(source, target)


def _expanded(source: Formula, target: Sequence[sympy.Basic]) -> Formula:
    rank = max(len(target), len(source.shape))
    sizes = [sympy.Integer(1)] * (rank - len(target)) + list(target)
    old = [sympy.Integer(1)] * (rank - len(source.shape)) + list(source.shape)
    shape = tuple(o if o != 1 else t for o, t in zip(old, sizes, strict=True))
    return Formula(shape, source.at([axis(rank - len(source.shape) + k) for k in range(len(source.shape))]))


def _reshape(interpreter: Interpreter, node: ir.Node) -> Formula:
    """Only reshapes that insert or drop axes of size 1."""
    source, target = interpreter.formula(node.inputs[0]), interpreter.vector(node.inputs[1])
    wide = [(k, s) for k, s in enumerate(source.shape) if s != 1]
    sizes, remaining, where = [], list(wide), [sympy.Integer(0)] * len(source.shape)
    for k, size in enumerate(target):
        if size == 1:
            sizes.append(sympy.Integer(1))
        elif remaining and size in (remaining[0][1], -1):
            old, actual = remaining.pop(0)
            sizes.append(actual)
            where[old] = axis(k)
        elif size == -1 and not remaining:
            sizes.append(sympy.Integer(1))
        else:
            raise Unprovable(f"Reshape '{node.name}' mixes axes")
    if remaining:
        raise Unprovable(f"Reshape '{node.name}' mixes axes")
    return Formula(tuple(sizes), source.at(where))


def _slice(interpreter: Interpreter, node: ir.Node) -> Formula:
    source = interpreter.formula(node.inputs[0])
    starts, ends = interpreter.vector(node.inputs[1]), interpreter.vector(node.inputs[2])
    rank = len(source.shape)
    axes = interpreter.integers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = interpreter.integers(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
    if any(s != 1 for s in steps):
        raise Unprovable("a Slice with steps")
    if source.stack is not None and rank == 1 and starts[0].is_Integer and ends[0].is_Integer:
        piece = source.stack[int(starts[0]) : int(ends[0])]
        return Formula((sympy.Integer(len(piece)),), stack=piece)
    shape, where = list(source.shape), [axis(k) for k in range(rank)]
    for a, start, end in zip((x % rank for x in axes), starts, ends, strict=True):
        size = shape[a]
        first = size + start if start.is_negative else start
        last = size + end if end.is_negative else end
        beyond = last.is_Integer and last >= _TO_THE_END
        stop = size if beyond or _at_least(last, size) else last
        if not (_at_least(first, sympy.Integer(0)) and _at_least(stop, first) and _at_least(size, stop)):
            raise Unprovable(f"Slice '{node.name}' takes {first} to {last} of {size}")
        shape[a] = sympy.expand(stop - first)
        where[a] = where[a] + first
    return Formula(tuple(shape), source.at(where))


def _at_least(a: sympy.Basic, b: sympy.Basic) -> bool:
    return bool(sympy.expand(a - b).is_nonnegative)


def _concat(interpreter: Interpreter, node: ir.Node) -> Formula:
    parts = [interpreter.formula(v) for v in node.inputs]
    rank = len(parts[0].shape)
    along = int_attr(node, "axis", 0) % rank
    short = all(p.stack is not None or p.shape[along] == 1 for p in parts)
    if along == rank - 1 and short:
        pieces: list[sympy.Basic] = []
        wide = [axis(k) for k in range(rank - 1)]
        for part in parts:
            count = len(part.stack) if part.stack is not None else 1
            pieces.extend(part.at([*wide, sympy.Integer(n)]) for n in range(count))
        shape = tuple(max((p.shape[k] for p in parts), key=lambda s: s != 1) for k in range(rank - 1))
        return Formula((*shape, sympy.Integer(len(pieces))), stack=tuple(pieces))
    if len(parts) == 2 and parts[0].shape[along] == 1:
        # one row before the rest, as in torch.diff(prepend=...): one formula if the second part continues to index -1
        first, rest = parts
        where = [axis(k) for k in range(rank)]
        moved = rest.at([c - 1 if k == along else c for k, c in enumerate(where)])
        at_zero = moved.subs(axis(along), 0)
        if sympy.expand(at_zero - first.at([sympy.Integer(0) if k == along else c for k, c in enumerate(where)])) == 0:
            sizes = [s if f == 1 else f for f, s in zip(first.shape, rest.shape, strict=True)]
            sizes[along] = sympy.expand(rest.shape[along] + 1)
            return Formula(tuple(sizes), moved)
    raise Unprovable(f"Concat '{node.name}' joins different formulas")


def _gather_nd(interpreter: Interpreter, node: ir.Node) -> Formula:
    data, indices = interpreter.formula(node.inputs[0]), interpreter.formula(node.inputs[1])
    if int_attr(node, "batch_dims", 0) or indices.stack is None or len(indices.stack) != len(data.shape):
        raise Unprovable(f"GatherND '{node.name}' is not a full index")
    if not all(where.is_nonnegative for where in indices.stack):
        raise Unprovable(f"GatherND '{node.name}' may count from the end")
    return Formula(indices.shape[:-1], data.at(indices.stack))


def _gather(interpreter: Interpreter, node: ir.Node) -> Formula:
    data = interpreter.formula(node.inputs[0])
    if data.stack is None or len(data.shape) != 1:
        raise Unprovable(f"Gather '{node.name}' from a tensor that is not a short vector")
    where = interpreter.formula(node.inputs[1])
    picked = tuple(data.stack[i] for i in interpreter.integers(node.inputs[1]))
    return Formula(where.shape, picked[0]) if not where.shape else Formula(where.shape, stack=picked)


def _cum_sum(interpreter: Interpreter, node: ir.Node) -> Formula:
    source, along = interpreter.formula(node.inputs[0]), interpreter.integers(node.inputs[1])[0]
    k = along % len(source.shape)
    element = source.at([axis(n) for n in range(len(source.shape))])
    if element.has(axis(k)) or int_attr(node, "exclusive", 0) or int_attr(node, "reverse", 0):
        raise Unprovable(f"CumSum '{node.name}' of a varying tensor")
    return Formula(source.shape, _exact(element * (axis(k) + 1)))


def _cast(interpreter: Interpreter, node: ir.Node) -> Formula:
    source = interpreter.formula(node.inputs[0])
    to = ir.DataType(int_attr(node, "to", 1))

    def convert(x: sympy.Basic) -> sympy.Basic:
        boolean = is_condition(x)
        if to == ir.DataType.BOOL:
            if isinstance(x, sympy.Piecewise) and not _moves(x):  # a condition was cast to numbers before
                return any_branch(x, lambda value: not value.is_zero)
            return x if boolean else sympy.Ne(x, 0)
        if to.name.startswith("UINT") or (_moves(x) and to not in _WIDE):
            raise Unprovable(f"Cast '{node.name}' to {to.name}, which may wrap around or round")
        if not boolean and not _whole(x) and not to.is_floating_point():
            raise Unprovable(f"Cast '{node.name}' to {to.name} cuts a fraction")
        return sympy.Piecewise((1, x), (0, True)) if boolean else x

    if source.stack is not None:
        return Formula(source.shape, stack=tuple(convert(x) for x in source.stack))
    return Formula(source.shape, convert(source.at([axis(k) for k in range(len(source.shape))])))


def _whole(element: sympy.Basic) -> bool:
    """Whether a value is known to be an integer; inputs of the graph are (others stop the proof)."""
    if isinstance(element, sympy.Piecewise):
        return all(_whole(value) for value, _ in element.args)
    return bool(element.is_integer) or isinstance(element, AppliedUndef)


def _constant_of_shape(interpreter: Interpreter, node: ir.Node) -> Formula:
    attr = node.attributes.get("value")
    fill = _constant(attr.value.numpy().reshape(())) if attr is not None else Formula((), sympy.Integer(0))
    return _expanded(fill, interpreter.vector(node.inputs[0]))


def _trilu(interpreter: Interpreter, node: ir.Node) -> Formula:
    source = interpreter.formula(node.inputs[0])
    k = (
        interpreter.vector(node.inputs[1])[0]
        if len(node.inputs) > 1 and node.inputs[1] is not None
        else sympy.Integer(0)
    )
    rank = len(source.shape)
    row, column = axis(rank - 2), axis(rank - 1)
    inside = column - row >= k if int_attr(node, "upper", 1) else column - row <= k
    element = source.at([axis(n) for n in range(rank)])
    if is_condition(element):
        return Formula(source.shape, sympy.And(element, inside))
    return Formula(source.shape, sympy.Piecewise((element, inside), (0, True)))


def _where(condition: sympy.Basic, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if is_condition(a) and is_condition(b):
        return sympy.ITE(condition, a, b)
    return sympy.Piecewise((a, condition), (b, True))


def _identity(interpreter: Interpreter, node: ir.Node) -> Formula:
    return interpreter.formula(node.inputs[0])


_RULES: dict[str, Callable[[Interpreter, ir.Node], Formula]] = {
    "Shape": _shape,
    "Range": _range,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Reshape": _reshape,
    "Slice": _slice,
    "Concat": _concat,
    "GatherND": _gather_nd,
    "Gather": _gather,
    "CumSum": _cum_sum,
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "Trilu": _trilu,
    "Identity": _identity,
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Max": _elementwise(lambda *xs: sympy.Max(*xs)),
    "Min": _elementwise(lambda *xs: sympy.Min(*xs)),
    "Equal": _elementwise(sympy.Eq),
    "Not": _elementwise(sympy.Not),
    "And": _elementwise(sympy.And),
    "Or": _elementwise(sympy.Or),
    "Less": _elementwise(sympy.Lt),
    "LessOrEqual": _elementwise(sympy.Le),
    "Greater": _elementwise(sympy.Gt),
    "GreaterOrEqual": _elementwise(sympy.Ge),
    "Where": _elementwise(_where),
}
