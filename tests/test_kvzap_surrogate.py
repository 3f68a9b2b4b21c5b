"""Surrogate files: the published layout both ways by key, shape and value, and everything that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from trtpass.errors import InputError
from trtpass.kvzap.surrogate import KEYS, Kind, Surrogate

LAYERS, WIDTH, HEADS = 3, 32, 2


class KVzapConfig(PretrainedConfig):
    """The configuration of published checkpoints, by the facts of kvpress 0.5."""

    model_type = "kvzap"

    def __init__(
        self, input_dim: int = 1, output_dim: int = 1, n_modules: int = 1, hidden_dim: int | None = None, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.input_dim, self.output_dim, self.n_modules, self.hidden_dim = input_dim, output_dim, n_modules, hidden_dim


class KVzapModel(PreTrainedModel):
    """The module of published checkpoints: one Linear, or Linear, GELU, Linear, for each layer."""

    config_class = KVzapConfig

    def __init__(self, config: KVzapConfig) -> None:
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}

        def one() -> torch.nn.Module:
            if config.hidden_dim is None:
                return torch.nn.Linear(config.input_dim, config.output_dim)
            return torch.nn.Sequential(
                torch.nn.Linear(config.input_dim, config.hidden_dim),
                torch.nn.GELU(),
                torch.nn.Linear(config.hidden_dim, config.output_dim),
            )

        self.layers = torch.nn.ModuleList([one() for _ in range(config.n_modules)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, layers, E] -> [T, layers, Hkv]
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)], 1)


def made(kind: Kind, seed: int = 0) -> Surrogate:
    random = np.random.default_rng(seed)
    between = WIDTH // 8
    shapes = {
        "weight": (HEADS, WIDTH), "bias": (HEADS,),
        "0.weight": (between, WIDTH), "0.bias": (between,), "2.weight": (HEADS, between), "2.bias": (HEADS,),
    }  # fmt: skip
    return Surrogate(
        kind, tuple({k: random.normal(size=shapes[k]).astype(np.float32) for k in KEYS[kind]} for _ in range(LAYERS))
    )


@pytest.mark.parametrize("kind", KEYS)
def test_a_published_checkpoint_loads_here(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    between = WIDTH // 8 if kind == "mlp" else None
    published = KVzapModel(KVzapConfig(WIDTH, HEADS, LAYERS, between)).eval()
    published.save_pretrained(tmp_path / "published")
    loaded = Surrogate.load(tmp_path / "published")
    assert (loaded.kind, len(loaded.layers), loaded.width, loaded.kv_heads, loaded.hidden) == (
        kind, LAYERS, WIDTH, HEADS, between
    )  # fmt: skip
    hidden = torch.randn(LAYERS, 5, WIDTH)
    expected = published(hidden.transpose(0, 1)).permute(1, 2, 0)
    torch.testing.assert_close(loaded.predict(hidden), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KEYS)
def test_a_folder_that_is_saved_here_loads_there(kind: Kind, tmp_path: Path) -> None:
    surrogate = made(kind)
    surrogate.save(tmp_path / "ours")
    there, report = KVzapModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = there.state_dict()
    assert set(state) == set(surrogate.arrays())
    for key, array in surrogate.arrays().items():
        np.testing.assert_array_equal(state[key].numpy(), array)
    hidden = torch.randn(LAYERS, 5, WIDTH)
    with torch.no_grad():
        expected = there(hidden.transpose(0, 1)).permute(1, 2, 0)
    torch.testing.assert_close(surrogate.predict(hidden), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_every_float_type(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    surrogate = made(kind)
    rounded = {key: torch.from_numpy(array).to(dtype) for key, array in surrogate.arrays().items()}
    save_file(rounded, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        arrays = Surrogate.load(path).arrays()
        assert all(arrays[key].dtype == np.float32 for key in rounded)
        assert all(np.array_equal(arrays[key], rounded[key].float().numpy()) for key in rounded)
    Surrogate.load(tmp_path).save(tmp_path / "again.safetensors")
    again = Surrogate.load(tmp_path / "again.safetensors").arrays()
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_equal_surrogates_make_equal_files(tmp_path: Path) -> None:
    surrogate = replace(made("mlp"), quantiles=tuple(np.linspace(-9, 1, 101).tolist()))
    for i in range(8):  # the library's own order of metadata changes from file to file
        surrogate.save(tmp_path / f"{i}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    again = Surrogate.load(tmp_path / "0.safetensors")
    assert again.quantiles == pytest.approx(surrogate.quantiles, abs=1e-4)
    assert again.threshold(0.5) == pytest.approx(-4.0) and made("mlp").threshold(0.5) is None


def change(arrays: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {k: v for k, v in {**arrays, **named}.items() if v is not None}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("linear", {"layers__1__bias": None}, r"lacks 'layers.1.bias'"),
        ("linear", {"layers__1__weight": None, "layers__1__bias": None}, r"lacks 'layers.1.bias', 'layers.1.weight'"),
        ("linear", {"layers__90000__bias": np.zeros(2, np.float32)}, "their numbers have holes"),
        ("linear", {"extra": np.zeros(2, np.float32)}, "also holds 'extra'"),
        ("linear", {"layers__2__weight": np.zeros((HEADS, WIDTH + 1), np.float32)}, r"'layers.2.weight' has shape"),
        ("linear", {"layers__2__bias": np.zeros((HEADS, 1), np.float32)}, r"'layers.2.bias' has shape \[2, 1\]"),
        ("linear", {"layers__0__weight": np.zeros((), np.float32)}, r"'layers.0.weight' has shape \[\]"),
        ("linear", {"layers__0__weight": np.zeros((HEADS, WIDTH), np.int32)}, r"'layers.0.weight' is I32"),
        ("linear", {"layers__1__bias": np.array([1, np.nan], np.float32)}, r"'layers.1.bias' holds NaN"),
        ("mlp", {"layers__1__2__bias": np.array([1, np.inf], np.float32)}, r"'layers.1.2.bias' holds NaN or infinity"),
        ("mlp", {"layers__1__0__weight": np.zeros((5, WIDTH), np.float32)}, r"'layers.1.0.weight' has shape \[5, 32\]"),
        ("mlp", {"layers__0__2__bias": None}, r"lacks 'layers.0.2.bias'"),
    ],
)
def test_broken_files_are_refused(kind: Kind, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    arrays = change(made(kind).arrays(), **changes)
    save_file({key: torch.from_numpy(array) for key, array in arrays.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=words):
        Surrogate.load(tmp_path / "x.safetensors")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        Surrogate.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(InputError, match="cannot be read"):
        Surrogate.load(tmp_path / "text.safetensors")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no layers"):
        Surrogate.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no safetensors weights"):
        Surrogate.load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((36, WIDTH, HEADS), "layers 3, SmolLM2 has 36"),
        ((LAYERS, 576, HEADS), "hidden width 32, SmolLM2 has 576"),
        ((LAYERS, WIDTH, 8), "KV heads 2, SmolLM2 has 8"),
    ],
)
def test_a_checkpoint_of_another_model(sizes: tuple[int, int, int], words: str) -> None:
    made("mlp").need(LAYERS, WIDTH, HEADS)
    with pytest.raises(InputError, match=words):
        made("mlp").need(*sizes, "SmolLM2")


def test_hidden_states_of_another_model() -> None:
    with pytest.raises(InputError, match="hidden width 32"):
        made("linear").predict(torch.zeros(LAYERS, 4, WIDTH + 1))


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="did not write"):
        made("linear").save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_the_configuration_of_a_folder(tmp_path: Path) -> None:
    made("mlp").save(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert {k: config[k] for k in ("model_type", "input_dim", "output_dim", "hidden_dim", "n_modules")} == {
        "model_type": "kvzap", "input_dim": WIDTH, "output_dim": HEADS, "hidden_dim": WIDTH // 8, "n_modules": LAYERS
    }  # fmt: skip


def test_the_weights_that_come_with_smollm2() -> None:
    file = Surrogate.shipped("smollm2-135m")
    assert file is not None and file.stat().st_size < 1 << 20
    surrogate = Surrogate.load(file)
    assert surrogate.kind == "linear"
    surrogate.need(layers=30, width=576, kv_heads=3)


def test_only_known_models_have_shipped_weights() -> None:
    assert Surrogate.shipped("../data/smollm2-135m") is None
    assert Surrogate.shipped("no-such-model") is None
