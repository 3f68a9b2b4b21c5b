"""Weights from disk to a PyTorch module: Hugging Face folders with safetensors, and GGUF files that a recipe pins.

Folders are untrusted (``trtpass.checkpoint`` reads them): every tensor's name, shape and type is compared with the
architecture before memory is claimed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtpass.checkpoint import FAMILIES, Header, first_line, headers, inside, listed, read, read_config
from trtpass.errors import InputError
from trtpass.quiet import quiet

if TYPE_CHECKING:
    import torch

_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OBSOLETE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # saved by old versions; recomputed
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, or the ONNX file that takes its place.

    Args:
        module: a transformers causal language model, float32, eval mode, scaled-dot-product attention; None for ONNX.
        config: its transformers configuration; None for ONNX.
        context: the most tokens a row may have; None where nothing says so (ONNX).
        tokenizer: a transformers fast tokenizer (``save_pretrained`` writes ``tokenizer.json``), or None.
        onnx: the ONNX file; None where there is a module.
    """

    module: torch.nn.Module | None
    config: Any | None
    context: int | None
    tokenizer: Any | None
    onnx: Path | None = None


def load_folder(folder: Path, context: int | None = None) -> Loaded:
    """Load a Hugging Face folder: config.json, model.safetensors or its index and shards, tokenizer.json if there.

    Args:
        folder: the folder; nothing outside it is read, but for the blobs of a Hugging Face cache that it links to.
        context: the most tokens a row may have; the model's own limit if not given. With a context no longer than its
            sliding window a model is loaded with plain causal attention, which is the same there.

    Raises:
        InputError: whatever is wrong with the folder, with the file that it is about.
    """
    from trtpass.export import check_exportable

    raw = read_config(folder)
    tensors = headers(folder)
    config = _configuration(folder, raw, tensors)
    limit: int = config.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise InputError(f"context {context}", f"1 to {limit}, the limit of {folder}")
    chosen = context or limit
    check_exportable(config, chosen)
    if getattr(config, "sliding_window", None) is not None:
        raw = {**raw, "sliding_window": None, "use_sliding_window": False, "layer_types": None}
        config = _configuration(folder, raw, tensors)
    module = _skeleton(folder, config)
    _compare(folder, module, config, tensors)
    state = read(tensors)
    head, embeddings = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    if config.tie_word_embeddings and head is not None and not head.equal(embeddings):
        raise InputError(
            f"{folder / 'config.json'} ties lm_head to the embeddings (tie_word_embeddings), the weights differ",
            "one of the two",
            "set tie_word_embeddings to false, or remove lm_head.weight",
        )
    module = assemble(config, state, module=module)
    return Loaded(module, config, chosen, load_tokenizer(folder))


def load_gguf(file: Path, *, sha256: str) -> Loaded:
    """Load a GGUF file of the Llama family, dequantized to float32, with the tokenizer that is inside.

    The file must have the hash given: the reader of this format is not hardened against broken files.
    """
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{file} has SHA-256 {found}", sha256, "run make setup again after removing the file")
    import torch
    import transformers

    with quiet():
        arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        source = transformers.LlamaForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
    fields = source.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are plain float32 now
    config = transformers.LlamaConfig.from_dict(fields)
    tokenizer.model_max_length = config.max_position_embeddings
    return Loaded(assemble(config, source.state_dict()), config, config.max_position_embeddings, tokenizer)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of ``tokenizer.json``, exactly as that file has it; None if there is no such file."""
    if not (folder / "tokenizer.json").exists():
        return None
    for name in _TOKENIZER:
        if (folder / name).exists():
            inside(folder, name)
    from transformers import PreTrainedTokenizerFast

    try:
        with quiet():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise InputError(f"{folder / 'tokenizer.json'} cannot be read: {first_line(error)}", "a tokenizer") from error


def assemble(
    config: Any, state: Mapping[str, torch.Tensor], *, module: torch.nn.Module | None = None
) -> torch.nn.Module:
    """A causal language model in eval mode that holds the tensors of ``state`` themselves, without a copy.

    Tensors are expected in float32. ``lm_head.weight`` may be missing where the configuration ties it to the
    embeddings.
    """
    model: Any = module if module is not None else _skeleton(Path(), config)
    model.load_state_dict(dict(state), strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    return model.eval()


def _configuration(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Header]) -> Any:
    import transformers

    layers = 1 + max((int(match[1]) for match in map(_LAYER.match, tensors) if match), default=-1)
    if raw.get("num_hidden_layers") != layers or layers > len(tensors):
        found = raw.get("num_hidden_layers")
        raise InputError(f"{folder / 'config.json'} has num_hidden_layers {found!r}", f"{layers}, as the weights have")
    fields = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype", "transformers_weights")}
    try:
        with quiet():
            return getattr(transformers, FAMILIES[raw["model_type"]]).config_class.from_dict(fields)
    except Exception as error:  # validation raises its own types
        raise InputError(f"{folder / 'config.json'} is not valid: {first_line(error)}") from error


def _skeleton(folder: Path, config: Any) -> torch.nn.Module:
    """The architecture without memory."""
    import torch
    import transformers

    try:
        with quiet(), torch.device("meta"):
            cls = getattr(transformers, FAMILIES[config.model_type])
            return cls._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:  # sizes that do not fit together raise anything
        raise InputError(f"{folder / 'config.json'} does not describe a model: {first_line(error)}") from error


def _compare(folder: Path, module: torch.nn.Module, config: Any, tensors: dict[str, Header]) -> None:
    """Every parameter has a tensor of its shape and nothing is left over; the model fits into memory."""
    import psutil

    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
    for name in [name for name in tensors if _OBSOLETE.fullmatch(name)]:
        del tensors[name]
    missing = shapes.keys() - tensors.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing:
        raise InputError(f"the weights in {folder} lack {listed(missing)}")
    if extra := tensors.keys() - shapes.keys():
        raise InputError(f"the weights in {folder} have {listed(extra)}, which {type(module).__name__} does not")
    for name, header in tensors.items():
        if header.shape != shapes[name]:
            raise InputError(f"'{name}' in {header.file} has shape {list(header.shape)}", f"{list(shapes[name])}")
        if header.dtype not in _FLOATS:
            raise InputError(f"'{name}' in {header.file} has type {header.dtype}", f"one of {', '.join(_FLOATS)}")
    needed = 4 * sum(parameter.numel() for parameter in module.parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{folder} needs {needed / 2**30:.1f} GiB of memory in float32; {free / 2**30:.1f} GiB are free",
            "a model that fits",
            "close other programs or use a larger machine",
        )
