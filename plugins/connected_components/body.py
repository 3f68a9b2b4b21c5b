"""ConnectedComponents in standard operators: the lowest index spreads over each component, doubling its reach.

A node points at a root, at first itself. In a round each node looks for the lowest root among its neighbours' roots;
what the nodes of one root found lowers the root itself (hooking), and pointers jump to the root's root. Without hooking
a chain whose lowest index is at one end could take a round for each node.

One function without helpers: what onnx-ir inlines may take a name that a value inside the Loop has already.
"""

from __future__ import annotations

from onnxscript import script

from plugins._body import TRTPASS, Floats, Int32, op
from plugins._rows import LARGEST, SMALLEST


@script(TRTPASS, default_opset=op)
def ConnectedComponents(x: Floats, lengths: Int32, tau: float = 0.9) -> tuple[Int32, Int32]:
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    flat = op.Constant(value_ints=[-1])
    minus_one = op.Cast(flat, to=7)
    batch = op.Squeeze(op.Shape(x, start=0, end=1))
    tokens = op.Squeeze(op.Shape(x, start=1, end=2))  # S
    tokens32 = op.Cast(tokens, to=6)
    wide_position = op.Range(zero, tokens, one)  # [S] int64
    position = op.Cast(wide_position, to=6)  # [S] int32
    first = op.Unsqueeze(op.Cast(op.Range(zero, batch, one) * tokens, to=6), axis1)  # [B, 1]: of each row, flat
    real = position < op.Unsqueeze(lengths, axis1)  # [B, S]

    # Unit vectors as in plugins._rows.unit_rows.
    wide = op.Cast(x, to=1)
    square = op.ReduceSum(wide * wide, axis2)  # [B, S, 1]
    directed = op.And(square >= SMALLEST, square <= LARGEST)
    unit = op.Where(directed, wide, 0.0) / op.Sqrt(op.Where(directed, square, 1.0))
    cosine = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))
    node = op.And(real, op.Squeeze(directed, axis2))  # [B, S]
    pairs = op.And(op.Unsqueeze(node, axis2), op.Unsqueeze(node, axis1))
    # One triangle decides for both: a product may round differently below the diagonal.
    upper = op.Unsqueeze(position, axis1) < op.Unsqueeze(position, axis0)  # [S, S]
    above = op.And(op.And(cosine > tau, pairs), upper)
    similar = op.Or(above, op.Transpose(above, perm=[0, 2, 1]))  # [B, S, S]

    # A root is never above its node: every value is an index to gather with. S rounds are more than any graph needs.
    root = op.Expand(position, op.Shape(real))  # [B, S]
    for _ in range(tokens):
        near = op.ReduceMin(op.Where(similar, op.Unsqueeze(root, axis1), tokens32), axis2, keepdims=0)
        found = op.Min(root, near)
        tree = op.Unsqueeze(root, axis1) == op.Unsqueeze(position, axis1)  # [B, S, S]: root, node
        lowest = op.ReduceMin(op.Where(tree, op.Unsqueeze(found, axis1), tokens32), axis2, keepdims=0)
        parent = op.Gather(op.Reshape(lowest, flat), first + root)
        jumped = op.Gather(op.Reshape(parent, flat), first + parent)
        settled = op.ReduceMax(root - jumped, keepdims=0) <= op.Cast(zero, to=6)
        root = op.Identity(jumped)
        if settled:
            break

    # The head of a component has the largest (degree, -index), which is one integer.
    degree = op.ReduceSum(op.Cast(similar, to=7), axis2, keepdims=0)  # [B, S]
    base = op.Max(tokens, one)  # without tokens a divisor still
    rank = degree * base + (tokens - one - wide_position)
    same = op.Unsqueeze(root, axis2) == op.Unsqueeze(root, axis1)  # [B, S, S]
    best = op.ReduceMax(op.Where(same, op.Unsqueeze(rank, axis1), minus_one), axis2, keepdims=0)  # [B, S]
    head = op.Cast(tokens - one - (best - best / base * base), to=6)  # [B, S]
    is_head = op.Cast(op.And(real, rank == best), to=6)
    number = op.CumSum(is_head, op.Constant(value_int=1), exclusive=1)
    label = op.Gather(op.Reshape(number, flat), first + head)
    return op.Where(real, label, tokens32), op.ReduceSum(is_head, axis1, keepdims=0)
