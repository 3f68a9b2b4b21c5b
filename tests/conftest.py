"""Fixtures that every test may use: tiny models of each family on disk, golden texts, the real SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "graphs" / "golden"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
VOCAB, CONTEXT = 128, 512


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def save_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """Save a seeded two-layer model of ``family``: E 96, 6 heads over 2 KV heads, D 16, vocab 128, context 512.

    Weights are larger than at initialisation, so that logits and attention differ visibly between tokens; norms are
    not all ones and biases not zero. ``changes`` override the configuration.
    """
    import torch
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family in ("llama", "qwen3"),
        **({"sliding_window": None} if family == "mistral" else {}),
        **changes,
    }
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.12 if parameter.ndim > 1 else 0.2
                parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + scale * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> Hugging Face folder of its tiny model."""
    root = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(family, root / f"tiny-{family}") for family in FAMILIES}


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real SmolLM2-135M-Instruct as ``trtpass.weights.Loaded``; tests that use it are marked ``model``."""
    from graphs import resolve
    from trtpass.errors import InputError

    try:
        return resolve("smollm2-135m").load()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain export of the real SmolLM2-135M-Instruct, ``model.onnx`` beside ``weights.bin`` (540 MB)."""
    from trtpass import io
    from trtpass.export import export

    path = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    io.save(export(smollm2.module, smollm2.config, context=smollm2.context), path)
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` equals ``graphs/golden/<name>.txt``; ``make golden`` writes the file instead."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.write_text(text, encoding="utf-8")
            return
        assert file.exists(), f"{file} does not exist: run make golden and read the diff"
        assert text == file.read_text(encoding="utf-8"), f"{file} differs: run make golden and read the diff"

    return compare
