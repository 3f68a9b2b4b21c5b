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
        whole: the same example as the arguments of ``model``.
    """

    model: Any
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    tokens: int
    dynamic: dict[str, dict[int, str]]
    whole: dict[str, torch.Tensor]

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
    return Multimodal(model, Llava(model).eval(), inputs, tokens, dynamic, inputs)


class Qwen2VL(torch.nn.Module):
    """Qwen2VLForConditionalGeneration for images of one size, one a row.

    Takes ``pixel_values [B, P, C]`` (patches as its processor flattens them), ``input_ids [B, S]`` and ``position_ids
    [3, B, S]``. transformers joins the rows of a batch and splits attention again by lists of lengths; here the rows
    stay apart, which computes the same.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: Any, grid: torch.Tensor) -> None:
        super().__init__()
        from transformers.models.qwen2_vl.modeling_qwen2_vl import get_vision_position_ids

        self.inner = model
        visual = model.model.visual
        places = get_vision_position_ids(grid[:1], visual.spatial_merge_size)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), places)  # [P, D]
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def attend(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # [B, H, P, D]
        q, k = self.rotated(q), self.rotated(k)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        return attention.proj(out.transpose(1, 2).reshape(batch, tokens, -1))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        model = self.inner.model
        visual = model.visual
        batch, tokens, _ = pixel_values.shape
        x = visual.patch_embed(pixel_values.flatten(0, 1)).reshape(batch, tokens, -1)
        for block in visual.blocks:
            x = x + self.attend(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        embeds = placed(input_ids, model.get_input_embeddings()(input_ids), visual.merger(x.flatten(0, 1)))
        out = model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
        return self.inner.lm_head(out.last_hidden_state)


def tiny_qwen2vl(seed: int = 0) -> Multimodal:
    """Vision tower with rotary positions on 4 x 6 patches, merged to 6 image tokens; Qwen2 with three positions."""
    import transformers as hf

    torch.manual_seed(seed)
    vision = {
        "depth": VISION_LAYERS,
        "embed_dim": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "hidden_size": 48,
        "patch_size": 8,
    }
    text = {
        "hidden_size": 48, "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    config: Any = hf.Qwen2VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, video_token_id=94, vision_start_token_id=93,
        vision_end_token_id=92, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model: Any = hf.Qwen2VLForConditionalGeneration(config).eval()
    spread(model)
    grid = torch.tensor([[1, 4, 6]] * 2)
    tokens, patches = 6, 24
    ids = torch.randint(0, 92, (2, 4 + tokens + 8))
    ids[:, 3], ids[:, 4 : 4 + tokens], ids[:, 4 + tokens] = 93, IMAGE_TOKEN, 92
    kinds = (ids == IMAGE_TOKEN).long()
    positions = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
    pixels = torch.randn(2, patches, 3 * config.vision_config.temporal_patch_size * 8 * 8)
    inputs = {"pixel_values": pixels, "input_ids": ids, "position_ids": positions}
    dynamic = {
        "pixel_values": {0: "batch"}, "input_ids": {0: "batch", 1: "sequence"},
        "position_ids": {1: "batch", 2: "sequence"},
    }  # fmt: skip
    whole = {**inputs, "pixel_values": pixels.flatten(0, 1), "image_grid_thw": grid}
    return Multimodal(model, Qwen2VL(model, grid).eval(), inputs, tokens, dynamic, whole)
