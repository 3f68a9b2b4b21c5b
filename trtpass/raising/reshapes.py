"""Make each Reshape that copies leading sizes say so, so that the graph stays valid when a size changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtpass.ir import const_ints, constant, is_op
from trtpass.raising.size_rules import Size
from trtpass.raising.sizes import Sizes, infer_sizes, shape_of


def raise_reshapes(graph: ir.Graph) -> tuple[int, list[str]]:
    """Write 0 (copy) for the leading sizes that a Reshape repeats, and at most one -1, as a constant target.

    ``[B, 257, 384]`` to ``[B, 257, 6, 64]`` becomes target ``[0, 0, 6, 64]``, however the target was computed. A
    Reshape that keeps no leading size, and one with two sizes that only the run tells, stay as they are.
    """
    sizes = infer_sizes(graph)
    applied = 0
    for node in graph:
        if is_op(node, "Reshape") and len(node.inputs) == 2 and (target := _target(node, sizes)) is not None:
            name = "reshape_to_" + "_".join(str(t).replace("-1", "rest") for t in target)
            node.replace_input_with(1, constant(graph, name, np.array(target, np.int64)))
            node.attributes.pop("allowzero", None)
            applied += 1
    return applied, []


def _target(node: ir.Node, sizes: Sizes) -> list[int] | None:
    """The new target; None where it would be what stands there, or cannot be constant."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    wanted = sizes.contents(node.inputs[1])
    if before is None or after is None or len(after) < 2 or wanted is None or len(wanted) != len(after) or 0 in after:
        return None
    target: list[Size] = list(wanted)
    copied = 0
    for i in range(min(len(before), len(after))):
        if before[i] is None or before[i] != after[i]:
            break
        target[i], copied = 0, copied + 1
    for i in range(copied, len(after)):
        target[i] = after[i] if isinstance(after[i], int) else -1
    numbers = [t for t in target if isinstance(t, int)]
    if not copied or len(numbers) != len(target) or numbers.count(-1) > 1 or numbers == const_ints(node.inputs[1]):
        return None
    return numbers
