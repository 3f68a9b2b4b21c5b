"""``gpu.attention``: one layer in a TensorRT plan, its own dense attention against ours, on the GPU of this machine.

Both sides are plans of one layer in float16, bound once, taking turns; times are CUDA events around an enqueue.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trtpass import io
from trtpass.bench import layer
from trtpass.bench.layer import Heads
from trtpass.bench.measure import require_close
from trtpass.bench.record import Record, attention_limit, timed
from trtpass.doctor import gpus
from trtpass.errors import InputError
from trtpass.plan_process import Profile
from trtpass.trt import builder
from trtpass.trt.lower import lower

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
KEPT = (0.67, 0.5, 0.25)
LLAMA = Heads(heads=32, kv_heads=8, width=128)  # of Llama-3.1-8B
REPEATS = 30
ATOL, RTOL = 4e-3, 4e-3  # float16, as TokenSparseAttention's own
DENSE, SCORED, GIVEN = "dense", "sparse with scoring", "sparse, selection given"
BASELINE = "TensorRT's own causal attention, float16"


def graphs(h: Heads, cc: int) -> dict[str, ir.Model]:
    """One layer from q, k, v ``[B, N, S, D]``: dense; sparse with scoring; sparse with the selection as input."""
    qkv = f"float[batch,{h.heads},tokens,{h.width}] q, " + ", ".join(
        f"float[batch,{h.kv_heads},tokens,{h.width}] {name}" for name in "kv"
    )
    out = f"float[batch,{h.heads},tokens,{h.width}] out"
    chosen = f"int32[batch,{h.heads},slots] index, int32[batch,{h.heads}] count"
    made = f"int32[batch,{h.heads},tokens] index, int32[batch,{h.heads}] count"
    attend = "out = trtpass.TokenSparseAttention<scale=0.0>(q, k, v, index, count)"
    texts = {
        DENSE: f"dense ({qkv}) => ({out}) {{out = Attention<is_causal=1>(q, k, v)}}",
        SCORED: f"scored ({qkv}, int32[batch] lengths, int32[batch] forced) => ({out}, {made}) "
        f"{{{layer.choosing(h, 'head')} {attend}}}",
        GIVEN: f"given ({qkv}, {chosen}) => ({out}) {{{attend}}}",
    }
    return {name: lower(layer.parse(text), cc).model for name, text in texts.items()}


def feeds(h: Heads, tokens: int, fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs of all graphs; each head's given selection is random, ascending."""
    rng = np.random.default_rng(seed)
    keep = max(1, round(fraction * tokens))
    index = np.stack([np.sort(rng.permutation(tokens)[:keep]) for _ in range(h.heads)])[None]
    return {
        "q": rng.standard_normal((1, h.heads, tokens, h.width), np.float32).astype(np.float16),
        "k": rng.standard_normal((1, h.kv_heads, tokens, h.width), np.float32).astype(np.float16),
        "v": rng.standard_normal((1, h.kv_heads, tokens, h.width), np.float32).astype(np.float16),
        "lengths": np.array([tokens], np.int32),
        "forced": np.array([keep], np.int32),
        "index": index.astype(np.int32),
        "count": np.full((1, h.heads), keep, np.int32),
    }


def profile(model: ir.Model, given: Mapping[str, np.ndarray]) -> Profile:
    """Exactly these shapes: a plan for one length, as both sides like it best."""
    shapes = {str(v.name): list(given[str(v.name)].shape) for v in model.graph.inputs}
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def run(
    lengths: Sequence[int] = TOKENS, h: Heads = LLAMA, repeats: int = REPEATS,
    note: Callable[[str], None] = lambda text: None,
) -> list[Record]:  # fmt: skip
    """Records at every length and kept fraction.

    Raises:
        InputError: TensorRT, Triton or a GPU is missing.
        CheckFailed: a plan's rows differ from PyTorch's.
    """
    devices = gpus()
    lacking = builder.missing()
    if lacking or isinstance(devices, str):
        raise InputError(f"gpu.attention cannot run here: {'; '.join(lacking)}", "TensorRT and a GPU")
    name, cc = devices[0]
    models = graphs(h, int(cc))
    records: list[Record] = []
    for tokens in lengths:
        for fraction in KEPT:
            note(f"gpu.attention: {tokens} tokens, {fraction:g} kept")
            with tempfile.TemporaryDirectory() as folder:
                records += _measure(models, h, tokens, fraction, repeats, {"gpu": name, "cc": int(cc)}, Path(folder))
    return records


def _measure(
    models: Mapping[str, ir.Model], h: Heads, tokens: int, fraction: float, repeats: int, machine: dict[str, Any],
    folder: Path,
) -> list[Record]:  # fmt: skip
    import torch

    from trtpass.trt.runner import Runner, milliseconds

    given = feeds(h, tokens, fraction)
    tensors = {key: torch.from_numpy(value) for key, value in given.items()}
    runners: dict[str, Runner] = {}
    for number, (name, model) in enumerate(models.items()):
        io.save(model, folder / f"{number}.onnx")
        plan = folder / f"{number}.plan"
        builder.build_plan(folder / f"{number}.onnx", plan, profiles=[profile(model, given)])
        runners[name] = Runner(plan)
        made = runners[name].bind(tensors)
        runners[name].run()
        runners[name].stream.synchronize()
        check(name, h, tensors, {key: value.cpu() for key, value in made.items()})
    times = [np.array(mine) / 1e3 for mine in milliseconds(list(runners.values()), repeats)]
    keep = int(given["forced"][0])
    records = []
    for name, mine in list(zip(runners, times, strict=True))[1:]:
        scoring = name == SCORED
        params = {
            "tokens": tokens, "batch": 1, "keep": fraction, "kept": round(keep / tokens, 4), "scoring": scoring,
            "select": "head", "window": h.window, "heads": h.heads, "key_heads": h.kv_heads, "width": h.width,
        }  # fmt: skip
        limit = attention_limit(tokens, [keep], h.window if scoring else None)
        records.append(timed("gpu.attention", params, BASELINE, mine, times[0], limit, machine))
    return records


def check(name: str, h: Heads, given: Mapping[str, Tensor], made: Mapping[str, Tensor], heads: int = 2) -> None:
    """The rows of a few heads against PyTorch in float32, and zeros where nothing was selected.

    Raises:
        CheckFailed: they differ.
    """
    import torch

    tokens = given["q"].shape[2]
    for head in np.unique(np.linspace(0, h.heads - 1, heads).astype(int)).tolist():
        index, count = (made if name == SCORED else given)["index"], (made if name == SCORED else given)["count"]
        chosen = torch.arange(tokens) if name == DENSE else index[0, head, : int(count[0, head])].long()
        if name == SCORED:
            require_close(f"{name}, kept", count[0, head].numpy().astype(float), given["forced"][0].numpy(), 0.0, 0.0)
        rows = torch.from_numpy(np.unique(np.linspace(0, len(chosen) - 1, 64).astype(int)))
        q, k, v = (given[x][0, g].float() for x, g in (("q", head), ("k", head // h.group), ("v", head // h.group)))
        scores = q[chosen[rows]] @ k[chosen].T * h.width**-0.5
        scores.masked_fill_(torch.arange(len(chosen)) > rows[:, None], -torch.inf)
        expected = scores.softmax(-1) @ v[chosen]
        got = made["out"][0, head].float()
        require_close(f"{name}, head {head}", got[chosen[rows]].numpy(), expected.numpy(), ATOL, RTOL)
        dropped = torch.ones(tokens, dtype=torch.bool)
        dropped[chosen] = False
        require_close(f"{name}, dropped rows", got[dropped].numpy(), np.zeros(got[dropped].shape), 0.0, 0.0)
