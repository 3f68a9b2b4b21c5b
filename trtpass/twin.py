"""The twin (D): a transformers causal LM with a method's edit applied, computing with the operators' own references.

The edit goes in through transformers' attention registry, so no model code is touched, and leaves when the call
returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins import all_ops
from trtpass.errors import InputError
from trtpass.interception import attention

if TYPE_CHECKING:
    from torch import Tensor

    from trtpass.passes.token_sparse import TokenSparseOptions


@dataclass
class TorchRun:
    """Outputs of a torch model.

    Args:
        hidden: ``[B, S, E]`` float32, the final norm's output; rows at or beyond a row's length are meaningless.
        logits: ``[B, 1, V]`` float32, of the last valid token of each row.
        selections: by layer: ``mass [B, H, S]``, ``keep [B]``, ``index [B, N, C]``, ``count [B, N]`` as numpy.
    """

    hidden: np.ndarray
    logits: np.ndarray
    selections: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


def run_dense(module: Any, input_ids: np.ndarray, lengths: np.ndarray) -> TorchRun:
    """The unedited model (A) on right-padded ``input_ids [B, S]``."""
    return TokenSparseTwin(module, None, ()).run(input_ids, lengths)


class TokenSparseTwin:
    """Token Sparse Attention on a torch model, in the given layers.

    Args:
        module: a transformers causal LM (Llama, Qwen2, Qwen3, Mistral) in eval mode, float32.
        options: the pass's options; None only without layers.
        layers: the sparse layers.
    """

    def __init__(self, module: Any, options: TokenSparseOptions | None, layers: tuple[int, ...]) -> None:
        self.module, self.options, self.layers = module, options, frozenset(layers)

    def run(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        forced: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> TorchRun:
        """Run on right-padded ``input_ids [B, S]`` int64 with ``lengths [B]`` int32.

        ``forced`` maps each sparse layer to ``(index [B, N, C], count [B, N])`` that replace its own selection; what it
        would have chosen itself is still recorded.
        """
        import torch

        if forced is not None and set(forced) != set(self.layers):
            raise InputError(f"selections are forced for layers {sorted(forced)}", f"layers {sorted(self.layers)}")
        selections: dict[int, dict[str, np.ndarray]] = {}
        rows = torch.from_numpy(np.ascontiguousarray(lengths, dtype=np.int32))

        def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any) -> Any:
            layer = int(block.layer_idx)
            if layer not in self.layers:
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling, enable_gqa=True
                )
            else:
                given = (
                    None if forced is None else tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in forced[layer])
                )
                out, selections[layer] = self._sparse(q, k, v, rows, scaling, given)
            return out.transpose(1, 2), None

        with attention(self.module.config, attend), torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64))
            positions = torch.arange(ids.shape[1])[None]
            hidden = self.module.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(rows)), rows.long() - 1][:, None]
            logits = self.module.lm_head(last)
        return TorchRun(hidden.numpy(), logits.numpy(), selections)

    def site(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        lengths: np.ndarray,
        scaling: float,
        forced: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One sparse site alone: ``q [B, H, S, D]``, k, v to ``out [B, H, S, Dv]`` and its own selection."""
        import torch

        q_, k_, v_, rows = (torch.from_numpy(np.ascontiguousarray(a)) for a in (q, k, v, lengths))
        given = None if forced is None else tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in forced)
        out, chosen = self._sparse(q_, k_, v_, rows, scaling, given)
        return out.numpy(), chosen

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scaling: float, given: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        options, ops = self.options, all_ops()
        if options is None:
            raise InputError("a sparse layer without options")
        mass = ops["ColumnMass"](
            q, k, lengths, window=options.window, pool=options.pool, prefix=options.prefix, scale=scaling
        )
        keep = ops["CoverageBudget"](
            mass, lengths, coverage_ppm=options.coverage_ppm, window=options.window,
            min_tokens=options.min_tokens, prefix=options.prefix,
        )  # fmt: skip
        score = mass
        if options.select == "group":
            score = mass.unflatten(1, (k.shape[1], -1)).sum(2)
        index, count = ops["SelectTokens"](
            score, keep, lengths, window=options.window if options.prefix else 0,
            max_keep_permille=options.max_keep_permille,
        )  # fmt: skip
        chosen = {"score": score, "keep": keep, "index": index, "count": count}
        if given is not None:
            index, count = given
        out = ops["TokenSparseAttention"](q, k, v, index, count, scale=scaling)
        return out, {name: tensor.numpy().copy() for name, tensor in chosen.items()}
