"""Proof that an attention mask is causal, from the graph alone.

The mask of attention, a formula (``trtpass.formulas``) of ``(i0, i1, i2, i3)`` = (batch, head, query, key), is causal
iff it means ``i3 <= i2``. This is a proof for all sizes, not a probe of a few; a mask that also depends on an input
(padding, documents) is reported as such.
"""

from __future__ import annotations

import onnx_ir as ir
import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from trtpass.formulas import NONSENSE, Interpreter, Unprovable, any_branch, axis, is_condition, size_symbol

_MASKED = -1e4  # an additive mask at or below this hides a key (float16's lowest is -65504)


def prove_causal(mask: ir.Value, length: int | str) -> str:
    """Empty if ``mask`` (boolean or additive) is exactly causal over ``length`` queries and as many keys, else why not.

    Args:
        mask: rank 2 to 4, broadcast to ``[B, H, S, S]``. Its last two axes must have S entries each: of a shorter mask
            Attention hides the keys beyond it, and one that is broadcast over queries or keys is not causal.
        length: S, as a number or a symbolic size of the graph.
    """
    try:
        formula = Interpreter().formula(mask)
        rank = len(formula.shape)
        if rank > 4 or rank < 2:
            return f"mask '{mask.name}' has rank {rank}"
        wanted = sympy.Integer(length) if isinstance(length, int) else size_symbol(length)
        if any(sympy.expand(size - wanted) != 0 for size in formula.shape[-2:]):
            sizes = ", ".join(map(str, formula.shape))
            return f"mask '{mask.name}' has shape [{sizes}], not [.., {length}, {length}]"
        seen = formula.at([axis(4 - rank + k) for k in range(rank)])
        return _judge(_visible(seen), str(mask.name))
    except Unprovable as stop:
        return f"mask '{mask.name}' was not proved causal: {stop}"
    except NONSENSE as error:
        return f"mask '{mask.name}' was not proved causal: {type(error).__name__} in its formula"


def hides_nothing(mask: ir.Value) -> bool:
    """Whether ``mask``, boolean or additive, is proved to leave every key visible to every query, for all sizes."""
    try:
        formula = Interpreter().formula(mask)
        seen = formula.at([axis(k) for k in range(len(formula.shape))])
        plain = not is_condition(seen) and not seen.has(sympy.Piecewise)
        return bool(seen.is_zero) if plain else _visible(seen) is sympy.true
    except (Unprovable, *NONSENSE):
        return False


def _visible(element: sympy.Basic) -> sympy.Basic:
    """The condition under which a key is visible, from a boolean mask or an additive one."""
    if is_condition(element):
        return element
    if element.has(sympy.Piecewise):
        element = sympy.piecewise_fold(element)  # (1 - mask) * lowest, mask + bias
    if isinstance(element, sympy.Piecewise):
        for value, _ in element.args:
            if not value.is_zero and not (value.is_number and value <= _MASKED):
                raise Unprovable(f"additive values other than 0 and -inf ({value})")
        return any_branch(element, lambda value: bool(value.is_zero))
    raise Unprovable("it is neither a condition nor a choice between 0 and -inf")


def _judge(condition: sympy.Basic, name: str) -> str:
    query, key = axis(2), axis(3)
    conjuncts = sympy.And.make_args(condition)
    causal = [c for c in conjuncts if _is_at_most(c, key, query)]
    rest = [c for c in conjuncts if c not in causal]
    if causal and not rest:
        return ""
    inputs = sorted({str(f.func) for c in rest for f in c.atoms(AppliedUndef)})
    if causal and inputs:
        return f"mask '{name}' is causal and also depends on the input {', '.join(inputs)}"
    if causal:
        return f"mask '{name}' is causal and also requires {sympy.And(*rest)} (a sliding window or blocks)"
    return f"mask '{name}' is {condition}, not key <= query"


def _is_at_most(condition: sympy.Basic, key: sympy.Symbol, query: sympy.Symbol) -> bool:
    """Whether a relation over integers is ``key <= query`` in any of its spellings."""
    if not isinstance(condition, Relational) or condition.atoms(AppliedUndef):
        return False
    over = condition.lhs - condition.rhs
    gaps = {sympy.Le: over, sympy.Ge: -over, sympy.Lt: over + 1, sympy.Gt: 1 - over}
    gap = gaps.get(condition.func)
    return gap is not None and sympy.expand(gap - (key - query)) == 0
