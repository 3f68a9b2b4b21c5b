"""Graphs of one attention layer, as the engine has them: dense, and token-sparse with the real operator nodes.

Both take and give what the projections around attention do, ``[B, S, H*D]``, and both write the layer's cache, so that
they do the same work: transposes are part of the sparse side where the engine has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from trtpass.errors import InputError

_HEADER = '<ir_version: 10, opset_import: ["" : 24, "trtpass" : 1, "trtpass.bshd" : 1, "com.microsoft" : 1]>\n'


@dataclass(frozen=True)
class Heads:
    """H query heads over Hkv key heads of D; SmolLM2's by default. W, pooling and coverage as the pass has them."""

    heads: int = 9
    kv_heads: int = 3
    width: int = 64
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    coverage_ppm: int = 5000

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def sets(self, select: str) -> int:
        """Sets of selected tokens: one a query head (``head``) or one a KV head (``group``)."""
        return self.heads if select == "head" else self.kv_heads

    def bytes_a_set(self, batch: int, tokens: int) -> int:
        """Of q, k, v, the output and the cache, float32."""
        return 4 * batch * tokens * self.width * (2 * self.heads + 4 * self.kv_heads)


def parse(text: str) -> ir.Model:
    """A graph from ONNX's textual form.

    Raises:
        InputError: the text is not valid.
    """
    try:
        return ir.from_proto(onnx.parser.parse_model(_HEADER + text))
    except onnx.parser.ParseError as error:
        raise InputError(f"a benchmark's graph does not parse: {error}") from error


def _ports(h: Heads, flat: bool) -> tuple[str, str]:
    """Inputs and outputs that all layers share; out is ``[B, S, H*D]`` or, the same memory, ``[B, S, H, D]``.

    The form that the last node makes is taken: a Reshape into a buffer of the caller would be a copy.
    """
    wide, narrow = h.heads * h.width, h.kv_heads * h.width
    cache = f"float[batch,{h.kv_heads},capacity,{h.width}]"
    inputs = (
        f"float[batch,tokens,{wide}] q_flat, float[batch,tokens,{narrow}] k_flat, float[batch,tokens,{narrow}] v_flat, "
        f"{cache} past_key, {cache} past_value"
    )
    merged = f"{wide}" if flat else f"{h.heads},{h.width}"
    return inputs, f"float[batch,tokens,{merged}] out, {cache} present_key, {cache} present_value"


def _around(h: Heads, body: str) -> str:
    """Split heads, write the cache, ``body`` from q, k, v ``[B, N, S, D]`` to ``attended``; out ``[B, S, H, D]``."""
    return f"""
    split_q = Constant<value_ints=[0,0,{h.heads},{h.width}]>()
    split_k = Constant<value_ints=[0,0,{h.kv_heads},{h.width}]>()
    q_split = Reshape(q_flat, split_q)
    k_split = Reshape(k_flat, split_k)
    v_split = Reshape(v_flat, split_k)
    q = Transpose<perm=[0,2,1,3]>(q_split)
    k = Transpose<perm=[0,2,1,3]>(k_split)
    v = Transpose<perm=[0,2,1,3]>(v_split)
    rows = Shape<start=0,end=1>(q_flat)
    start = ConstantOfShape<value=int64[1] {{0}}>(rows)
    present_key = TensorScatter<axis=2>(past_key, k, start)
    present_value = TensorScatter<axis=2>(past_value, v, start)
    {body}
    out = Transpose<perm=[0,2,1,3]>(attended)
    """


def dense(h: Heads) -> ir.Model:
    """Canonical causal attention."""
    inputs, outputs = _ports(h, flat=False)
    return parse(f"dense ({inputs}) => ({outputs}) {{{_around(h, 'attended = Attention<is_causal=1>(q, k, v)')}}}")


def contrib(h: Heads) -> ir.Model:
    """``com.microsoft::GroupQueryAttention``, past and present to be bound to one buffer: the dense baseline."""
    inputs, outputs = _ports(h, flat=True)
    body = f"com.microsoft.GroupQueryAttention<num_heads={h.heads},kv_num_heads={h.kv_heads}>"
    return parse(
        f"contrib ({inputs}, int32[batch] seqlens, int32 total) => ({outputs}) {{"
        f"out, present_key, present_value = {body}(q_flat, k_flat, v_flat, past_key, past_value, seqlens, total) }}"
    )


def multi_head(h: Heads) -> ir.Model:
    """``com.microsoft::MultiHeadAttention``; it has no groups, so K and V are expanded to H heads first (no cache)."""
    inputs, outputs = _ports(h, flat=True)
    body = f"""
    split_k = Constant<value_ints=[0,0,{h.kv_heads},1,{h.width}]>()
    grouped = Constant<value_ints=[1,1,1,{h.group},1]>()
    merge = Constant<value_ints=[0,0,{h.heads * h.width}]>()
    k_split = Reshape(k_flat, split_k)
    v_split = Reshape(v_flat, split_k)
    k_wide = Expand(k_split, grouped)
    v_wide = Expand(v_split, grouped)
    k = Reshape(k_wide, merge)
    v = Reshape(v_wide, merge)
    out = com.microsoft.MultiHeadAttention<num_heads={h.heads},unidirectional=1>(q_flat, k, v)
    """
    return parse(f"multi_head ({inputs}) => ({outputs.split(', float')[0]}) {{{body}}}")


def sparse(h: Heads, select: str, scoring: bool = True) -> ir.Model:
    """Token-sparse attention of one layer.

    With scoring: inputs ``lengths [B]`` and ``forced [B]`` (tokens to keep; 0 leaves it to the budget); outputs also
    ``keep``, ``index``, ``count``. Without: ``index [B, N, C]`` and ``count [B, N]`` are inputs.
    """
    inputs, outputs = _ports(h, flat=False)
    sets = h.sets(select)
    attend = "attended = trtpass.TokenSparseAttention<scale=0.0>(q, k, v, index, count)"
    if not scoring:
        chosen = f"int32[batch,{sets},slots] index, int32[batch,{sets}] count"
        return parse(f"sparse ({inputs}, {chosen}) => ({outputs}) {{{_around(h, attend)}}}")
    text = _around(h, choosing(h, select) + attend)
    return parse(
        f"sparse ({inputs}, int32[batch] lengths, int32[batch] forced) => "
        f"({outputs}, float[batch,{h.heads},tokens] mass, "
        f"int32[batch] keep, int32[batch,{sets},tokens] index, int32[batch,{sets}] count) {{{text}}}"
    )


def overhead(h: Heads, select: str) -> ir.Model:
    """Scoring, budget and selection alone, on q and k ``[B, N, S, D]`` as the engine has them there."""
    heads = f"float[batch,{h.heads},tokens,{h.width}] q, float[batch,{h.kv_heads},tokens,{h.width}] k"
    sets = h.sets(select)
    return parse(
        f"overhead ({heads}, int32[batch] lengths, int32[batch] forced) => "
        f"(int32[batch] keep, int32[batch,{sets},tokens] index, int32[batch,{sets}] count) {{{choosing(h, select)}}}"
    )


def choosing(h: Heads, select: str) -> str:
    """From q, k, lengths and forced to mass, keep, index and count, with the nodes that the pass inserts."""
    score, regroup = "mass", ""
    if select == "group":
        score = "group_mass"
        regroup = f"""
    by_group = Constant<value_ints=[0,{h.kv_heads},{h.group},-1]>()
    group_axis = Constant<value_ints=[2]>()
    mass_by_group = Reshape(mass, by_group)
    group_mass = ReduceSum<keepdims=0>(mass_by_group, group_axis)"""
    return f"""
    mass = trtpass.ColumnMass<window={h.window},pool={h.pool},prefix=1,scale=0.0>(q, k, lengths)
    own = trtpass.CoverageBudget<coverage_ppm={h.coverage_ppm},window={h.window},min_tokens={h.min_tokens},prefix=1>(
        mass, lengths)
    nought = Constant<value=int32[1] {{0}}>()
    is_forced = Greater(forced, nought)
    keep = Where(is_forced, forced, own){regroup}
    index, count = trtpass.SelectTokens<window={h.window},max_keep_permille=1000>({score}, keep, lengths)
    """
