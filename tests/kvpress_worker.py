"""What the tests ask of kvpress, in its own environment (``trtpass.bench.kvpress_worker``): arrays go through ``.npz``.

Attention is watched from inside: a function under the name ``watched`` sees what kvpress hands to attention, its fake
keys among them, and goes on to transformers' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trtpass.bench.kvpress_worker import load_model, pressed, serve

seen: dict[str, list[torch.Tensor]] = {"masked": [], "leak": []}  # of each layer of the forward that runs


def watched(module: Any, query: torch.Tensor, key: torch.Tensor, *others: Any, **options: Any) -> Any:
    """As sdpa; remembers which keys are masked `[Hkv, K]`, and the mass that a head's queries still give them `[H]`."""
    if query.shape[2] != key.shape[2]:
        hidden = torch.zeros(key.shape[1:3], dtype=torch.bool)
        if module.masked_key_indices is not None:
            _, heads, tokens = module.masked_key_indices
            hidden[heads, tokens] = True
        groups = module.num_key_value_groups
        logits = (query[0] @ key[0].repeat_interleave(groups, 0).mT) * options["scaling"]  # [H, S, K]
        rows = torch.arange(key.shape[2]) > torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        mass = logits.masked_fill(rows, -torch.inf).softmax(-1) * hidden.repeat_interleave(groups, 0)[:, None]
        seen["masked"].append(hidden)
        seen["leak"].append(mass.sum(-1).amax(-1))
    return sdpa_attention_forward(module, query, key, *others, **options)


AttentionInterface.register("watched", watched)  # before kvpress is imported: it wraps what is registered then
AttentionMaskInterface.register("watched", sdpa_mask)

from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel  # type: ignore[import-not-found] # noqa: E402


def save(folder: str, input_dim: int, output_dim: int, hidden_dim: int | None, n_modules: int) -> None:
    """A seeded checkpoint in ``folder`` as kvpress itself writes it, and its tensors in ``folder``.npz."""
    torch.manual_seed(0)
    sizes = {"input_dim": input_dim, "output_dim": output_dim, "hidden_dim": hidden_dim, "n_modules": n_modules}
    model = KVzapModel(KVzapConfig(**sizes))
    model.save_pretrained(folder)
    np.savez(f"{folder}.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})


def load(folder: str, out: str) -> dict[str, list[str]]:
    """The tensors of a checkpoint as kvpress loads it, in ``out``; what it found missing, unexpected or misshapen."""
    model, report = KVzapModel.from_pretrained(folder, output_loading_info=True)
    np.savez(out, **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return {name: sorted(map(str, found)) for name, found in report.items() if name != "error_msgs"}


def run(
    model: str, checkpoint: str, threshold: float, window: int, prompt: list[int], chunks: list[list[int]], out: str
) -> None:
    """Prefill, then one forward a chunk of given tokens, T tokens in all and N of them in chunks. In ``out``:

    score float32 `[L, Hkv, T]`; hidden `[L, T, E]`, what feeds q, k and v; masked bool `[chunks, L, Hkv, T]`, as each
    chunk's queries found it; leak `[chunks, L, H]`, the mass of softmax on masked keys; logits `[N, V]`.
    """
    network = load_model(model, "watched")
    total = len(prompt) + sum(map(len, chunks))
    made: dict[str, list[Any]] = {"masked": [], "leak": [], "logits": []}
    hidden: list[list[torch.Tensor]] = [[] for _ in network.model.layers]
    scores: list[list[torch.Tensor]] = [[] for _ in network.model.layers]
    with torch.inference_mode(), pressed(network, checkpoint, threshold, window) as press:
        scorer = press.press
        judge = scorer.score

        def listen(module: Any, states: torch.Tensor, *others: Any) -> torch.Tensor:
            score: torch.Tensor = judge(module, states, *others)
            hidden[module.layer_idx].append(states[0])
            scores[module.layer_idx].append(score[0])
            return score

        scorer.score = listen
        cache = DynamicCache()
        network(input_ids=torch.tensor([prompt]), past_key_values=cache)
        for chunk in chunks:
            for found in seen.values():
                found.clear()
            made["logits"].append(network(input_ids=torch.tensor([chunk]), past_key_values=cache).logits[0])
            masked = torch.stack(seen["masked"])
            made["masked"].append(torch.nn.functional.pad(masked, (0, total - masked.shape[-1])))
            made["leak"].append(torch.stack(seen["leak"]))
    np.savez(
        out,
        score=torch.stack([torch.cat(parts, -1) for parts in scores]).numpy(),
        hidden=torch.stack([torch.cat(parts) for parts in hidden]).numpy(),
        masked=torch.stack(made["masked"]).numpy(),
        leak=torch.stack(made["leak"]).numpy(),
        logits=torch.cat(made["logits"]).numpy(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    serve({"save": save, "load": load, "run": run})
