"""Token Sparse Attention (arXiv 2602.03216): in chosen layers, each head attends only to the tokens that matter to it.

In each sparse layer, after rotary embedding and before o_proj::

    mass = ColumnMass(q, k, lengths)                     [B, H, S]   what the last W queries look at
    keep = CoverageBudget(mass, lengths)                 [B]         how many tokens the layer keeps, per row
    index, count = SelectTokens(mass, keep, lengths)     [B, N, C]   which ones, per head (or per KV head)
    out = TokenSparseAttention(q, k, v, index, count)    [B, H, S, Dv]   dropped rows are 0: the residual carries them

The selection uses queries of the future, so the method is defined on whole prompts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from plugins import all_ops
from plugins._library import function
from trtpass import layers
from trtpass.anchors import Anchors, AttentionBlock
from trtpass.errors import AnchorError, InputError
from trtpass.ir import add_input, constant, dims, make_node
from trtpass.op import DOMAIN, VERSION, Op
from trtpass.passes import WHOLE_PROMPT_KEY, Pass, PassResult, Site, need_blocks


@dataclass(frozen=True)
class TokenSparseOptions:
    """Options of ``token-sparse``; the defaults are the published ones for Llama-3.1-8B.

    Args:
        coverage: tau in [0, 1): the share of attention mass that a layer may drop. 0 keeps every token.
        mode: ``repo`` (the published code: window always kept, budget over the prefix) or ``paper`` (the equations).
        window: W, the last queries that vote, in tokens.
        pool: kernel of the average pooling over a head's mass, odd; 1 is none.
        min_tokens: rows of at most ``min_tokens + window`` tokens stay dense.
        layers: ``auto``, ``all``, ``drift:0.5``, or ``3+5+10-20``.
        select: ``head`` (the paper: each query head its own tokens) or ``group`` (one set per KV head, cheaper).
        max_keep: upper bound on the kept fraction, in (0, 1]; fixed-shape targets save only what this cuts.
    """

    coverage: float = 0.005
    mode: str = "repo"
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    layers: str = "auto"
    select: str = "head"
    max_keep: float = 1.0

    def __post_init__(self) -> None:
        def need(ok: bool, what: str, expected: str) -> None:
            if not ok:
                raise InputError(f"token-sparse: {what}", expected)

        need(0.0 <= self.coverage < 1.0, f"coverage={self.coverage}", "a share in [0, 1), for example 0.005")
        need(self.mode in ("repo", "paper"), f"mode={self.mode}", "repo or paper")
        need(1 <= self.window <= 4096, f"window={self.window}", "1 to 4096 queries")
        need(1 <= self.pool <= 255 and self.pool % 2 == 1, f"pool={self.pool}", "an odd kernel from 1 to 255")
        need(self.min_tokens >= 0, f"min_tokens={self.min_tokens}", "0 or more")
        need(self.select in ("head", "group"), f"select={self.select}", "head or group")
        need(0.0 < self.max_keep <= 1.0, f"max_keep={self.max_keep}", "a share in (0, 1]")

    @property
    def prefix(self) -> int:
        """1 in ``repo`` mode: mass and budget over the tokens before the window."""
        return int(self.mode == "repo")

    @property
    def coverage_ppm(self) -> int:
        """tau in parts per million; a nonzero tau is at least 1, and none is 1e6 (all the mass)."""
        return min(max(round(self.coverage * 1e6), int(self.coverage > 0)), 999_999)

    @property
    def max_keep_permille(self) -> int:
        return max(1, round(self.max_keep * 1000))


class TokenSparse(Pass):
    """Insert Token Sparse Attention into the chosen layers of a causal decoder."""

    name: ClassVar[str] = "token-sparse"
    summary: ClassVar[str] = "prefill attends only to the tokens that the last queries look at, per head"
    source: ClassVar[str] = "Token Sparse Attention, arXiv 2602.03216"
    whole_prompt: ClassVar[bool] = True
    Options: ClassVar[type] = TokenSparseOptions
    options: TokenSparseOptions

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        """At least one causal attention block among the chosen layers, and a token input to give rows a length."""
        need_blocks(anchors, self.name)
        if anchors.input_ids is None:
            raise AnchorError("pass 'token-sparse' found no token input", fix="see `trtpass inspect`")
        chosen = self._chosen(model, anchors)
        if not any(anchors.blocks[i].causal for i in chosen):
            block = anchors.blocks[chosen[0]]
            raise AnchorError(
                f"pass 'token-sparse': layer {block.layer} is not causal self-attention: {block.why_not_causal}",
                "causal attention over the whole prompt",
            )

    def _chosen(self, model: ir.Model, anchors: Anchors) -> tuple[int, ...]:
        return layers.resolve(self.options.layers, len(anchors.blocks), layers.carried_drift(model))

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        sites: list[Site] = []
        near: list[str] = []
        for layer in self._chosen(model, anchors):
            block = anchors.blocks[layer]
            if not block.causal:
                near.append(f"layer {layer}: {block.why_not_causal}")
            else:
                sites.append(self._rewrite(model, block))
        for op in _ops().values():
            body = function(op, "dynamic")
            model.functions[body.identifier()] = body
        model.opset_imports[DOMAIN] = VERSION
        model.metadata_props[WHOLE_PROMPT_KEY] = self.name
        return PassResult(self.name, bool(sites), tuple(sites), tuple(near), self.describe())

    def _rewrite(self, model: ir.Model, block: AttentionBlock) -> Site:
        graph, options, ops = model.graph, self.options, _ops()
        label = f"layer{block.layer}.token_sparse"
        batch, _, sequence, _ = dims(block.q)  # type: ignore[misc]
        lengths = add_input(graph, "lengths", ir.DataType.INT32, [batch])
        new: list[ir.Node] = []

        def call(op: Op, inputs: list[ir.Value], names: list[str], **attrs: Any) -> list[ir.Value]:
            shapes = op.output_shapes([list(v.shape) for v in inputs], attrs)  # type: ignore[arg-type]
            outputs = [
                (f"{label}.{name}", block.q.dtype if port.dtypes != ("int32",) and op.name == "TokenSparseAttention"
                 else ir.DataType[{"int32": "INT32", "float32": "FLOAT"}[port.dtypes[0]]], shapes[port.name])
                for name, port in zip(names, op.outputs, strict=True)
            ]  # fmt: skip
            new.append(make_node(op.name, inputs, outputs, attrs, domain=DOMAIN, name=f"{label}.{op.name}"))
            return list(new[-1].outputs)

        (mass,) = call(
            ops["ColumnMass"], [block.q, block.k, lengths], ["mass"],
            window=options.window, pool=options.pool, prefix=options.prefix, scale=float(block.scale),
        )  # fmt: skip
        (keep,) = call(
            ops["CoverageBudget"], [mass, lengths], ["keep"], coverage_ppm=options.coverage_ppm,
            window=options.window, min_tokens=options.min_tokens, prefix=options.prefix,
        )  # fmt: skip
        score = mass
        if options.select == "group":
            score = self._group_mass(graph, new, block, mass, label, batch, sequence)
        index, count = call(
            ops["SelectTokens"], [score, keep, lengths], ["index", "count"],
            window=options.window if options.prefix else 0, max_keep_permille=options.max_keep_permille,
        )  # fmt: skip
        (out,) = call(
            ops["TokenSparseAttention"], [block.q, block.k, block.v, index, count], ["out"], scale=float(block.scale)
        )
        ir.convenience.replace_nodes_and_values(graph, block.node, [block.node], new, [block.output], [out])
        roles = {"score": score, "keep": keep, "index": index, "count": count, "output": out}
        return Site(block.layer, {role: str(value.name) for role, value in roles.items()})

    def _group_mass(
        self,
        graph: ir.Graph,
        new: list[ir.Node],
        block: AttentionBlock,
        mass: ir.Value,
        label: str,
        batch: Any,
        sequence: Any,
    ) -> ir.Value:
        """Sum mass ``[B, H, S]`` over the G query heads of each KV head: ``[B, Hkv, S]``."""
        target = constant(graph, f"{label}.by_group", np.array([0, block.kv_heads, block.group, -1], np.int64))
        axis = constant(graph, f"{label}.group_axis", np.array([2], np.int64))
        f32 = ir.DataType.FLOAT
        split = make_node(
            "Reshape", [mass, target], [(f"{label}.mass_by_group", f32, [batch, block.kv_heads, block.group, sequence])]
        )
        total = make_node(
            "ReduceSum", [split.outputs[0], axis], [(f"{label}.group_mass", f32, [batch, block.kv_heads, sequence])],
            {"keepdims": 0},
        )  # fmt: skip
        new.extend([split, total])
        return total.outputs[0]

    def twin(self, module: Any, result: PassResult) -> Any:
        """The same edit on a transformers causal LM; see ``trtpass.twin.TokenSparseTwin``."""
        from trtpass.twin import TokenSparseTwin

        return TokenSparseTwin(module, self.options, tuple(site.layer for site in result.sites))


def _ops() -> dict[str, Op]:
    names = ("ColumnMass", "CoverageBudget", "SelectTokens", "TokenSparseAttention")
    return {name: all_ops()[name] for name in names}
