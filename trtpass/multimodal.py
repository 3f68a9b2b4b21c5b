"""What a multimodal graph is made of: a vision tower, a decoder, and the place where image features meet the text.

Found by structure: the features ``[B * N, E]`` of all images are gathered by their number to the tokens of ``input_ids
[B, S]`` that equal one id, in place of these tokens' embeddings. What was not found is said in words.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import onnx_ir as ir

from trtpass.anchors import Anchors, AttentionBlock
from trtpass.encoders import streams
from trtpass.errors import AnchorError
from trtpass.ir import const_array, dims, is_op

_SAME_ROWS = ("Unsqueeze", "Expand", "Cast", "Identity")
HINT = "say which tokens of the decoder may go, such as span=4:600 or span=4:-32, or a block of the vision tower"
_LONGEST = 16  # nodes that a search goes through


@dataclass(frozen=True)
class Multimodal:
    """Anchors of a multimodal graph.

    Args:
        tower: the blocks of the vision tower that the decoder depends on, counted from 0.
        decoder: the blocks of the language model, counted from 0, with ``input_ids`` and ``logits``.
        visual: which tokens stand for an image, bool `[B, S]`.
        features: what they are replaced by, `[B * N, E]`, row by row of the batch.
        gather: the node that puts ``features`` at their tokens.
        tokens: N, image tokens of each row: every prompt has this many, or its features are those of another row.
        embeds: the decoder's stream before its first block `[B, S, E]`.
    """

    tower: Anchors
    decoder: Anchors
    visual: ir.Value
    features: ir.Value
    gather: ir.Node
    tokens: int
    embeds: ir.Value


def parts(anchors: Anchors) -> tuple[Anchors, Anchors] | None:
    """The vision tower and the decoder that reads what it made; None where a graph has only one of them.

    Blocks are counted from 0 in each; those of the tower that nothing reads are left out.
    """
    runs = streams(anchors)
    for decoder in (run.blocks for run in runs if all(block.causal for block in run.blocks)):
        before = _upstream(decoder[0].residual_in)
        towers = [tuple(b for b in run.blocks if b.output in before and not b.causal) for run in runs]
        tower = max(towers, key=len)
        if tower:
            return _numbered(anchors, tower), _numbered(anchors, decoder)
    return None


def tower_of(anchors: Anchors) -> Anchors:
    """The vision tower of a multimodal graph; of any other graph all blocks."""
    found = parts(anchors)
    return anchors if found is None else found[0]


def decoder_of(anchors: Anchors) -> Anchors:
    """The language model of a multimodal graph; of any other graph all blocks."""
    found = parts(anchors)
    return anchors if found is None else found[1]


def describe(anchors: Anchors) -> Multimodal:
    """Find the place where image features meet the text.

    Raises:
        AnchorError: what is missing, and where the search stopped.
    """
    found = parts(anchors)
    if found is None:
        kinds = ", ".join(
            f"{len(run.blocks)} {'causal' if run.blocks[0].causal else 'bidirectional'} blocks"
            for run in streams(anchors)
        )
        raise AnchorError(
            f"no tokens of an image were found in the graph: it has {kinds or 'no attention block'}, and no decoder "
            "that reads a vision tower",
            "a multimodal graph from pixels and token ids to logits",
            HINT,
        )
    tower, decoder = found
    embeds = decoder.blocks[0].residual_in
    if embeds is None:  # excluded by parts
        raise AnchorError("the decoder has no residual stream")
    where = embeds.producer()
    if not is_op(where, "Where"):
        raise _not_found(f"the decoder's stream '{embeds.name}' comes from {_words(where)}, not from Where")
    visual = _mask(where.inputs[0], decoder.input_ids)
    if isinstance(visual, str):
        raise _not_found(visual)
    gather = _through(where.inputs[1])
    if not is_op(gather, "Gather", "GatherND") or gather.inputs[0] is None:
        raise _not_found(f"'{where.name}' puts what {_words(gather)} makes at the image's tokens, not a Gather")
    features = gather.inputs[0]
    if tower.blocks[-1].output not in _upstream(features):
        raise _not_found(f"the rows of '{features.name}' do not come from the blocks of the vision tower")
    tokens = _per_row(features, (dims(decoder.input_ids) or [None])[0])
    if tokens is None:
        raise _not_found(
            f"'{features.name}' of shape {dims(features)} has no known number of rows for each row of the batch"
        )
    return Multimodal(tower, decoder, visual, features, gather, tokens, embeds)


def _not_found(what: str) -> AnchorError:
    return AnchorError(
        f"no tokens of an image were found in the graph: {what}",
        "Where(input_ids == image token, features gathered by their number, embeddings)",
        HINT,
    )


def _words(node: ir.Node | None) -> str:
    return "a graph input" if node is None else f"{node.op_type} '{node.name}'"


def _numbered(anchors: Anchors, blocks: tuple[AttentionBlock, ...]) -> Anchors:
    return dataclasses.replace(anchors, blocks=tuple(dataclasses.replace(b, layer=i) for i, b in enumerate(blocks)))


def _upstream(value: ir.Value | None) -> set[ir.Value | None]:
    """Everything that ``value`` is computed from, itself included."""
    seen, frontier = set[ir.Value | None](), [value]
    while frontier:
        now = frontier.pop()
        if now is None or now in seen:
            continue
        seen.add(now)
        node = now.producer()
        if node is not None:
            frontier.extend(node.inputs)
    return seen


def _through(value: ir.Value | None) -> ir.Node | None:
    """The producer above nodes that leave rows as they are."""
    node = None if value is None else value.producer()
    for _ in range(_LONGEST):
        if not is_op(node, *_SAME_ROWS) or node.inputs[0] is None:
            break
        node = node.inputs[0].producer()
    return node


def _mask(value: ir.Value | None, input_ids: ir.Value | None) -> ir.Value | str:
    """The comparison `[B, S]` of token ids with a constant above the condition of a Where, or why there is none."""
    node = _through(value)
    if not is_op(node, "Equal"):
        return f"its condition comes from {_words(node)}, not from Equal"
    sides = [v for v in node.inputs if v is not None and const_array(v) is None]
    if input_ids is None or sides != [input_ids]:
        return f"'{node.name}' compares {[v.name for v in sides]}, not the token ids with one id"
    return node.outputs[0]


def _per_row(features: ir.Value, batch: object) -> int | None:
    """N of features `[B * N, E]`: from the rows that were flattened, or from the name of the size."""
    node, shape = features.producer(), dims(features)
    before = dims(node.inputs[0]) if is_op(node, "Reshape", "Flatten") else None
    if before is not None and shape is not None and len(before) == 3 and before[0] == batch and before[2] == shape[-1]:
        return before[1] if isinstance(before[1], int) else None
    if shape is None or len(shape) != 2:
        return None
    if isinstance(shape[0], int):
        return shape[0] // batch if isinstance(batch, int) and batch and shape[0] % batch == 0 else None
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+)(?:\*(\d+))?", str(getattr(shape[0], "value", "")).replace(" ", ""))
    if match is None or match[2] != getattr(batch, "value", None):
        return None
    return int(match[1] or 1) * int(match[3] or 1)
