"""SCC of image features (LLaVA-Scissor, arXiv 2506.21862): behind the projector, before the decoder.

The features `[B, N, E]` become the representatives of their components; each of them is put at the first of the image
tokens that it stands for, and the decoder does not see the others.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtpass.anchors import Anchors
from trtpass.ir import add_input, dims
from trtpass.multimodal import Multimodal, describe
from trtpass.passes import WHOLE_PROMPT_KEY, Site
from trtpass.passes.logits import lm_head
from trtpass.reduction.decoder import SPAN_KEY, Shortened
from trtpass.reduction.decoder_stream import insert_after, report, restore, rows_of
from trtpass.reduction.emit import F32, I32, I64, Emitter
from trtpass.reduction.multimodal_entry import enter, hidden_below
from trtpass.reduction.multimodal_twin import FEATURES, MultimodalPlan
from trtpass.reduction.scc import Connected, Merged, connect


def merge_features(
    model: ir.Model, anchors: Anchors, name: str, how: Connected
) -> tuple[tuple[Site, ...], tuple[str, ...], MultimodalPlan]:
    """Merge the image features of a multimodal graph: the site, notes, and the twin's plan.

    Raises:
        AnchorError: what is missing in the graph, and where the search stopped.
    """
    found = describe(anchors)
    hidden = hidden_below(lm_head(found.decoder))
    merged, rep = _merge(model, found, name, how)
    lengths = add_input(model.graph, "lengths", I32, [(dims(found.decoder.input_ids) or [None])[0]])
    stream, roles = enter(model, found, rep, lengths, hidden, name, None)
    emit = Emitter(model, name.replace("-", "_"))
    restore(emit, stream, hidden)
    report(emit, lengths, [stream.lengths] * len(found.decoder.blocks))
    model.metadata_props[SPAN_KEY] = Shortened.by_data(name)
    model.metadata_props[WHOLE_PROMPT_KEY] = name
    site = Site(FEATURES, {role: str(value.name) for role, value in {**roles, "target": merged.chosen}.items()})
    notes = (
        f"at the projector: {found.tokens} image tokens of each row become the representatives of their components",
        "below lm_head the stream is whole again: an image token has the row of the one that stands for it",
    )
    return (site,), notes, MultimodalPlan(connected=how)


def _merge(model: ir.Model, found: Multimodal, name: str, how: Connected) -> tuple[Merged, ir.Value]:
    """Give the decoder the representative of each feature; int32 `[B, N]`: the first that has the same one."""
    emit, flat, count = Emitter(model, f"features.{name}"), found.features, found.tokens
    batch, width = (dims(found.decoder.input_ids) or [None])[0], (dims(flat) or [None])[-1]
    x = emit.node("Reshape", [flat, emit.ints(-1, count, width)], "rows", flat.dtype, [batch, count, width])
    rows = emit.node("Shape", [x], "batch", I64, [1], start=0, end=1)
    lengths = emit.node("Expand", [emit.scalar(count, np.int32), rows], "lengths", I32, [batch])
    merged = connect(emit, x, lengths, how)
    spread = rows_of(emit, merged.tokens, merged.label, "of_each", count)
    back = emit.node("Reshape", [spread, emit.ints(-1, width)], "flat", flat.dtype, dims(flat) or [None, width])
    shape = [batch, count, count]
    column = emit.node("Unsqueeze", [merged.label, emit.ints(2)], "label_column", I32, [batch, count, 1])
    line = emit.node("Unsqueeze", [merged.label, emit.ints(1)], "label_row", I32, [batch, 1, count])
    same = emit.node("Equal", [column, line], "same", ir.DataType.BOOL, shape)
    one = emit.node("Cast", [same], "same_float", F32, shape, to=int(F32))
    first = emit.node("ArgMax", [one], "first64", I64, [batch, count], axis=2, keepdims=0)
    rep = emit.node("Cast", [first], "first", I32, [batch, count], to=int(I32))
    insert_after(model.graph, flat, emit.take())
    found.gather.replace_input_with(0, back)
    return merged, rep
