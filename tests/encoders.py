"""Tiny encoders with seeded weights: ViT, CLIP, DINOv2 and Whisper as transformers builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from trtpass.encoder_export import export_encoder

LAYERS, HEADS, WIDTH = 3, 4, 32
IMAGE, PATCH = 40, 8  # 5 x 5 patches
FAMILIES = ("vit", "clip", "dinov2", "dinov2-registers", "whisper")
TOKENS = {"vit": 26, "clip": 26, "dinov2": 26, "dinov2-registers": 30, "whisper": 24}
CLS = {"vit": 1, "clip": 1, "dinov2": 1, "dinov2-registers": 5, "whisper": 0}


@dataclass(frozen=True)
class Tiny:
    """A module in eval mode and the arguments of an example of two rows."""

    family: str
    module: Any
    inputs: dict[str, torch.Tensor]

    def export(self) -> ir.Model:
        """The canonical graph."""
        return export_encoder(self.module, self.inputs)


def tiny_encoder(family: str, seed: int = 0) -> Tiny:
    """A tiny encoder of one of `FAMILIES`: 3 layers, 4 heads, width 32, weights wide enough to tell tokens apart."""
    import transformers as hf

    common: Any = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    image: Any = {"image_size": IMAGE, "patch_size": PATCH, "num_channels": 3}
    torch.manual_seed(seed)
    name, shape = "pixel_values", (2, 3, IMAGE, IMAGE)
    module: Any
    if family == "vit":
        module = hf.ViTModel(hf.ViTConfig(**common, **image, intermediate_size=64), add_pooling_layer=False)
    elif family == "clip":
        module = hf.CLIPVisionModel(hf.CLIPVisionConfig(**common, **image, intermediate_size=64))
    elif family == "dinov2":
        module = hf.Dinov2Model(hf.Dinov2Config(**common, **image, mlp_ratio=2))
    elif family == "dinov2-registers":
        config = hf.Dinov2WithRegistersConfig(**common, **image, mlp_ratio=2, num_register_tokens=4)
        module = hf.Dinov2WithRegistersModel(config)
    else:
        audio = hf.WhisperConfig(
            d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=64, num_mel_bins=8,
            max_source_positions=TOKENS["whisper"], decoder_layers=1, decoder_attention_heads=HEADS, vocab_size=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )  # fmt: skip
        module = hf.WhisperModel(audio).get_encoder()
        name, shape = "input_features", (2, 8, 2 * TOKENS["whisper"])
    module = module.eval()
    spread(module)
    return Tiny(family, module, {name: torch.randn(shape)})


def spread(module: Any, deviation: float = 0.15) -> None:
    """Widen matrices and embeddings: with the 0.02 that transformers draws, all attention is even."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2 and parameter.std() > 0:
                parameter.mul_(deviation / parameter.std())
