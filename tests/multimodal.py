"""Tiny multimodal models with seeded weights as one graph, pixels and token ids in, logits out: LLaVA and Qwen2-VL.

transformers puts the image features at the placeholders with ``masked_scatter``, which exports badly. ``Llava`` and
``Qwen2VL`` below do the same with a Gather: the n-th placeholder of the batch takes the n-th feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from encoders import spread

from trtpass.encoder_export import export_encoder

VOCAB, IMAGE_TOKEN = 96, 95
VISION_LAYERS, TEXT_LAYERS = 3, 3
SIDE, PATCH = 40, 8  # 5 x 5 patches


@dataclass(frozen=True)
class Multimodal:
    """A model, the module around it that is exported, and the arguments of an example of two rows.

    Args:
        model: transformers' model.
        module: ``module(**inputs)`` gives logits ``[B, S, vocab]``.
        inputs: of the graph, by name.
        tokens: image tokens of a row.
        dynamic: axes whose size is not fixed, for the export.
    """

    model: Any
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    tokens: int
    dynamic: dict[str, dict[int, str]]

    def export(self) -> ir.Model:
        """The canonical graph."""
        return export_encoder(self.module, self.inputs, outputs=("logits",), dynamic=self.dynamic)


def placed(ids: torch.Tensor, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """``embeds [B, S, E]`` with row n of ``features [N, E]`` at the n-th image token of the batch."""
    mask = ids == IMAGE_TOKEN
    which = (mask.flatten().to(torch.int64).cumsum(0) - 1).clamp(min=0).reshape(ids.shape)  # [B, S]
    return torch.where(mask[..., None], features[which], embeds)


class Llava(torch.nn.Module):
    """LlavaForConditionalGeneration as one function of ``pixel_values [B, 3, h, w]`` and ``input_ids [B, S]``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        model = self.inner.model
        config = self.inner.config
        seen = model.vision_tower(pixel_values, output_hidden_states=True)
        features = model.multi_modal_projector(seen.hidden_states[config.vision_feature_layer][:, 1:])
        embeds = placed(input_ids, model.get_input_embeddings()(input_ids), features.flatten(0, 1))
        hidden = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.inner.lm_head(hidden)


def tiny_llava(seed: int = 0) -> Multimodal:
    """CLIP tower, projector, Llama; 25 image tokens behind 3 of text and before 8."""
    import transformers as hf

    torch.manual_seed(seed)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=VISION_LAYERS, num_attention_heads=4, intermediate_size=64,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = hf.LlamaConfig(
        hidden_size=48, num_hidden_layers=TEXT_LAYERS, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=96, vocab_size=VOCAB, max_position_embeddings=256,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    config.vision_feature_layer = -2
    model: Any = hf.LlavaForConditionalGeneration(config).eval()
    spread(model)
    tokens = (SIDE // PATCH) ** 2
    ids = torch.randint(0, IMAGE_TOKEN, (2, 3 + tokens + 8))
    ids[:, 3 : 3 + tokens] = IMAGE_TOKEN
    inputs = {"pixel_values": torch.randn(2, 3, SIDE, SIDE), "input_ids": ids}
    dynamic = {"pixel_values": {0: "batch"}, "input_ids": {0: "batch", 1: "sequence"}}
    return Multimodal(model, Llava(model).eval(), inputs, tokens, dynamic)
