"""The twin (D) of a shortened encoder: a transformers model whose layers run in two halves, with the method between.

A layer computes ``h = x + attention(norm(x))`` and ``y = h + mlp(norm(h))``. Its first half is the layer with an MLP
that gives 0, its second half the layer with an attention that gives 0: both are the model's own code, whatever its
norms, scales and biases are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trtpass.errors import InputError
from trtpass.interception import attention
from trtpass.reduction.definition import Row, Step, open_row, restore_row

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.passes.stream_pass import Plan, StreamOptions


FORCED = ("keep", "target")  # choices that another side may make


@dataclass
class EncoderRun:
    """Outputs of an encoder by name, and by layer what its sites chose: ``score``, ``keep`` `[B, S]`, ``target``
    `[B, M * K]` where tokens joined others."""

    outputs: dict[str, np.ndarray]
    selections: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Halves:
    """A model's blocks, and of each the modules whose output is 0 in the half that they are not part of."""

    blocks: Sequence[Any]
    attention: Callable[[Any], Any]
    mlp: Callable[[Any], Any]
    config: Any


def halves_of(module: Any) -> Halves:
    """Find the blocks of an encoder by its structure.

    Raises:
        InputError: no list of blocks with an attention and an MLP.
    """
    import torch

    for child in module.modules():
        if isinstance(child, torch.nn.ModuleList) and len(child):
            first = child[0]
            names = dict(first.named_children())
            attend = next((n for n in ("attention", "self_attn", "attn") if n in names), None)
            mlp = next((n for n in ("mlp", "fc2") if n in names), None)
            if attend and mlp:
                config = next(c for c in (getattr(m, "config", None) for m in first.modules()) if c is not None)
                return Halves(list(child), operator.attrgetter(attend), operator.attrgetter(mlp), config)
    raise InputError(
        f"the torch model {type(module).__name__} has no list of blocks with attention and MLP",
        "a transformers encoder such as ViTModel, CLIPVisionModel, Dinov2Model or WhisperEncoder",
    )


@contextmanager
def _silent(module: Any, as_tuple: bool) -> Iterator[None]:
    """Let a module give 0 in the shape of its first argument."""
    import torch

    before = module.forward

    def nothing(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        width = module.out_features if hasattr(module, "out_features") else x.shape[-1]
        zero = torch.zeros(*x.shape[:-1], width)
        return (zero, None) if as_tuple else zero

    module.forward = nothing
    try:
        yield
    finally:
        module.forward = before


class EncoderTwin:
    """A reduction on a torch encoder, in the given blocks.

    Args:
        module: a transformers encoder in eval mode, float32, or a module around one.
        options: the pass's options.
        plan: what the pass decided on the graph: blocks, budgets, protected tokens, grid, restore.
        step: one site on one row: ``StreamPass.step``.

    After a run that restored all rows, ``rows`` are those of the batch at the end of the stream.
    """

    rows: list[Row]

    def __init__(self, module: Any, options: StreamOptions, plan: Plan, step: Callable[..., Step]) -> None:
        self.module, self.options, self.plan, self.step = module, options, plan, step
        self.cls, self.columns, self.restore = plan.cls, plan.columns, plan.restore
        self.budgets = dict(zip(plan.blocks, plan.budgets, strict=True))

    def run(
        self, inputs: Mapping[str, np.ndarray], forced: Mapping[int, Mapping[str, np.ndarray]] | None = None
    ) -> EncoderRun:
        """Run the model on ``inputs`` by name; outputs get the graph's names, in its order.

        ``forced`` maps each site to ``keep`` `[B, S]` and, where tokens join others, ``target`` `[B, M * K]`.
        """
        import torch

        halves = halves_of(self.module)
        seen: dict[str, Tensor] = {}
        state: dict[str, list[Row]] = {}
        selections: dict[int, dict[str, np.ndarray]] = {}

        def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **__: Any) -> Any:
            bias = self._bias(state["rows"], k.shape[2]) if state else None
            seen.update(q=q, k=k, scale=torch.tensor(scaling))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None

        def split(layer: int, block: Any, before: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if layer not in self.budgets:
                    out = before(hidden_states, *args, **_placed(kwargs, state))
                else:
                    with _silent(halves.mlp(block), False):
                        h = _tensor(before(hidden_states, *args, **_placed(kwargs, state)))
                    h = self._site(layer, h, seen, state, selections, forced)
                    with _silent(halves.attention(block), True):
                        out = before(h, *args, **_placed(kwargs, state))
                if layer == self.plan.depth - 1 and self.restore and state:
                    rows = state.pop("rows")
                    for row, tokens in zip(rows, _tensor(out), strict=True):
                        row.tokens = tokens
                    self.rows = rows
                    return torch.stack([restore_row(row, self.cls, self.columns) for row in rows])
                return out

            return forward

        with ExitStack() as stack, torch.inference_mode():
            stack.enter_context(attention(halves.config, attend))
            for layer, block in enumerate(halves.blocks):
                stack.enter_context(_replaced(block, split(layer, block, block.forward)))
            made = self.module(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()})
        return EncoderRun(_named(made, self.plan.outputs), selections)

    def _site(
        self,
        layer: int,
        h: Tensor,
        seen: Mapping[str, Tensor],
        state: dict[str, list[Row]],
        selections: dict[int, dict[str, np.ndarray]],
        forced: Mapping[int, Mapping[str, np.ndarray]] | None,
    ) -> Tensor:
        import torch

        rows = state.setdefault("rows", [open_row(x) for x in h])
        steps = []
        for b, (row, tokens) in enumerate(zip(rows, h, strict=True)):
            row.tokens = tokens
            given = None
            if forced is not None:
                chosen = {r: torch.from_numpy(np.array(a[b])) for r, a in forced[layer].items() if r in FORCED}
                keep, target = chosen.get("keep"), chosen.get("target")
                if keep is not None and target is not None:
                    target = target.long().reshape(int((keep == 0).sum()), -1)
                given = (keep, target)
            steps.append(
                self.step(row, seen["q"][b], seen["k"][b], float(seen["scale"]), self.budgets[layer], self.plan, given)
            )
        state["rows"] = [step.row for step in steps]
        selections[layer] = {
            "score": torch.stack([s.score for s in steps]).numpy(),
            "keep": torch.stack([s.keep for s in steps]).numpy(),
        }
        if steps[0].target is not None:
            selections[layer]["target"] = torch.stack(
                [s.target.reshape(-1) for s in steps if s.target is not None]
            ).numpy()
        return torch.nn.utils.rnn.pad_sequence([step.row.tokens for step in steps], batch_first=True)

    def _bias(self, rows: Sequence[Row], length: int) -> Tensor | None:
        """A mask `[B, 1, 1, S]` on keys: sizes where they count, and the padding of shorter rows."""
        import torch

        counts = [len(row.size) for row in rows]
        if not self.options.weighs_keys and min(counts) == length:
            return None
        bias = torch.full((len(rows), length), -1e30)
        for b, row in enumerate(rows):
            bias[b, : counts[b]] = row.size.log() if self.options.weighs_keys else 0.0
        return bias[:, None, None, :]


def _placed(kwargs: dict[str, Any], state: Mapping[str, list[Row]]) -> dict[str, Any]:
    """``position_embeddings``, cos and sin `[S, D]`, as rows `[B, C, D]` of the tokens that are left."""
    import torch

    if "position_embeddings" not in kwargs or "rows" not in state:
        return kwargs
    tables = tuple(torch.stack([table[row.place] for row in state["rows"]]) for table in kwargs["position_embeddings"])
    return {**kwargs, "position_embeddings": tables}


def _named(made: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """A model's outputs by the names of the graph's, in order."""
    values = list(made.values()) if isinstance(made, Mapping) else made if isinstance(made, tuple) else [made]
    return {name: v.numpy() for name, v in zip(names, (v for v in values if v is not None), strict=False)}


def _tensor(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = before
