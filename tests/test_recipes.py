"""Where models come from: what resolves, what loads to the numbers of transformers, and what is refused and how."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, FAMILIES, VOCAB, save_tiny
from safetensors.torch import load_file, save_file

import graphs
from graphs import Profile, known, resolve
from trtpass import corpus
from trtpass.corpus import text_corpus
from trtpass.errors import InputError
from trtpass.export import check_exportable, export


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes a field."""
    file = folder / "config.json"
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors in two with an index; returns its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index(folder, weight_map)
    return weight_map


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Qwen3 that a test may spoil."""
    return Path(shutil.copytree(tiny_folders["qwen3"], tmp_path / "model"))


# ---------------------------------------------------------------------------------------------------------- registry


def test_known_recipes_are_complete() -> None:
    recipes = known()
    modules = {file.stem for file in Path(graphs.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules
    assert {name.replace("-", "_") for name in recipes} == modules
    for name, recipe in recipes.items():
        assert recipe.name == name
        assert recipe.summary
        assert recipe.data.parent == Path(graphs.__file__).parent / "data"
        assert all("==" in package for package in recipe.packages)
        for profile in recipe.profiles:
            assert list(profile.batch) == sorted(profile.batch)
            assert list(profile.sequence) == sorted(profile.sequence)


@pytest.mark.parametrize("text", ["", "smollm3", "no/such/folder"])
def test_unknown_model_lists_the_known_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(text)
    for name in [*known(), "llama", "mistral", "qwen2", "qwen3", "ONNX"]:
        assert name in str(caught.value)


def test_resolving_a_folder(tiny_folders: dict[str, Path]) -> None:
    recipe = resolve(str(tiny_folders["qwen2"]))
    assert recipe.name == "tiny-qwen2"
    assert recipe.quality is None, "without a tokenizer there is nothing to measure quality with"
    assert recipe.profiles == (Profile((1, 1, 8), (1, CONTEXT, CONTEXT)),)
    assert recipe.data == tiny_folders["qwen2"] / "trtpass.json"


def test_a_folder_does_not_take_a_known_name(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folders["llama"], tmp_path / "SmolLM2-135M")
    assert resolve(str(copy)).name == "smollm2-135m-local"


def test_resolving_an_onnx_file(tmp_path: Path) -> None:
    file = tmp_path / "Some Model.onnx"
    file.write_bytes(b"read later")
    recipe = resolve(str(file))
    loaded = recipe.load()
    assert (recipe.name, recipe.onnx, loaded.onnx, loaded.module) == ("some-model", file, file, None)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"\.onnx"):
        resolve(str(file))


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_transformers_loads(tiny_folders: dict[str, Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    loaded = resolve(str(tiny_folders[family])).load()
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_folders[family], dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 50)))
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids).logits, reference.eval()(input_ids=ids).logits)
    assert not loaded.module.training
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    assert (loaded.context, loaded.config.model_type) == (CONTEXT, family)


def test_half_precision_loads_as_float32(folder: Path) -> None:
    reweigh(folder, lambda tensors: tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()}))
    rewrite(folder, dtype="bfloat16")
    loaded = resolve(str(folder)).load()
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_shards_load_as_one(folder: Path, tiny_folders: dict[str, Path]) -> None:
    shard(folder)
    loaded, whole = (resolve(str(path)).load().module for path in (folder, tiny_folders["qwen3"]))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


def test_hugging_face_cache_layout(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """In a cache the files of a snapshot are links to blobs beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(tiny_folders["qwen3"], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert resolve(str(snapshot)).load().context == CONTEXT


def test_tokenizer_as_its_file_has_it(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    recipe = resolve(str(folder))
    assert recipe.quality == "continuation"
    assert recipe.load().tokenizer("b a c")["input_ids"] == [2, 1, 0]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        recipe.load()


def test_context(folder: Path) -> None:
    recipe = resolve(str(folder))
    assert recipe.load(100).context == 100
    for context in (0, CONTEXT + 1):
        with pytest.raises(InputError, match=f"1 to {CONTEXT}"):
            recipe.load(context)


def test_sliding_window(tmp_path: Path) -> None:
    """A window shorter than the context is refused; with the context inside the window the model is plain causal."""
    from transformers import AutoModelForCausalLM

    path = save_tiny("mistral", tmp_path / "model", sliding_window=64)
    recipe = resolve(str(path))
    with pytest.raises(InputError, match=r"sliding window of 64[\s\S]*To do: limit the context to 64"):
        recipe.load()
    with pytest.raises(InputError, match="sliding window"):
        recipe.load(65)
    loaded = recipe.load(64)
    assert loaded.config.sliding_window is None
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (1, 200)))
    with torch.no_grad():
        found, wanted = loaded.module(input_ids=ids).logits, reference(input_ids=ids).logits
    # masked and causal kernels of PyTorch add in another order
    torch.testing.assert_close(found[:, :64], wanted[:, :64], atol=5e-5, rtol=0)
    assert (found[:, 64:] - wanted[:, 64:]).abs().max() > 1e-2, "the window would have hidden something"
    with pytest.raises(InputError, match="sliding window"):
        export(reference, reference.config, context=65)


def test_sliding_layers_that_are_off(tmp_path: Path) -> None:
    """Qwen configurations name a window and do not use it."""
    path = save_tiny("qwen2", tmp_path / "model", sliding_window=64, use_sliding_window=False)
    assert resolve(str(path)).load().context == CONTEXT
    sliding = save_tiny("qwen2", tmp_path / "other", sliding_window=64, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(InputError, match="sliding window of 64"):
        resolve(str(sliding)).load()
    assert resolve(str(sliding)).load(64).config.layer_types == ["full_attention"] * 2


def test_window_as_long_as_the_context_is_no_obstacle(tmp_path: Path) -> None:
    path = save_tiny("mistral", tmp_path / "model", sliding_window=CONTEXT)
    loaded = resolve(str(path)).load()
    check_exportable(loaded.config, CONTEXT)
    assert loaded.context == CONTEXT


# --------------------------------------------------------------------------------------------------- refused folders


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def spoil_outside(folder: Path) -> None:
    weight_map = shard(folder)
    (folder / "b.safetensors").rename(folder.parent / "b.safetensors")
    index(folder, {name: f"../{file}" if file[0] == "b" else file for name, file in weight_map.items()})


def spoil_link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def spoil_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def spoil_index(folder: Path) -> None:
    weight_map = shard(folder)
    index(folder, {**weight_map, "model.norm.weight": "a.safetensors", "model.ghost": "a.safetensors"})


def spoil_tie(folder: Path) -> None:
    reweigh(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**6), "is not JSON"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "architecture": (lambda f: rewrite(f, model_type="gpt2"), r"model_type 'gpt2'[\s\S]*llama[\s\S]*qwen3"),
    "no model type": (lambda f: rewrite(f, model_type=None), "model_type None"),
    "head": (lambda f: rewrite(f, architectures=["Qwen3ForSequenceClassification"]), "SequenceClassification"),
    "custom code": (lambda f: rewrite(f, auto_map={"AutoModel": "evil.py"}), "custom code"),
    "quantized": (lambda f: rewrite(f, quantization_config={"quant_method": "gptq"}), "quantized"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "negative context": (lambda f: rewrite(f, max_position_embeddings=-1), "max_position_embeddings -1"),
    "text context": (lambda f: rewrite(f, max_position_embeddings="many"), "max_position_embeddings 'many'"),
    "more layers": (lambda f: rewrite(f, num_hidden_layers=10**9, layer_types=None), "num_hidden_layers 1000000000"),
    "heads of no size": (lambda f: rewrite(f, head_dim=-3), "config.json"),
    "wider": (lambda f: rewrite(f, hidden_size=192), r"has shape \[.*96"),
    "huge": (lambda f: rewrite(f, vocab_size=10**15), "config.json|has shape"),
    "text for a size": (lambda f: rewrite(f, hidden_size="big"), r"config\.json"),
    "pickle": (spoil_pickle, r"pytorch_model\.bin \(pickle\)[\s\S]*save_pretrained"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "truncated": (spoil_truncated, "cannot be read"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
    "header": (spoil_header, "cannot be read"),
    "outside": (spoil_outside, "outside the model's folder"),
    "link": (spoil_link, "outside the model's folder"),
    "shard gone": (spoil_shard, r"no b\.safetensors"),
    "index lies": (spoil_index, "lacks"),
    "index of pickles": (lambda f: index(f, {"model.norm.weight": "pytorch_model.bin"}), r"a \.safetensors file"),
    "index of nothing": (lambda f: index(f, {}), "no weight_map"),
    "missing": (lambda f: reweigh(f, lambda t: t.pop("model.norm.weight")), r"lack 'model\.norm\.weight'"),
    "left over": (lambda f: reweigh(f, lambda t: t.update({"model.extra": torch.ones(3)})), r"have 'model\.extra'"),
    "integers": (
        lambda f: reweigh(f, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int32)})),
        "type I32",
    ),
    "tied and not": (spoil_tie, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_folder(folder: Path, case: str) -> None:
    """One clear error each, in trtpass's own words, never an exception of a library."""
    spoil, wanted = SPOILED[case]
    spoil(folder)
    with pytest.raises(InputError, match=wanted):
        resolve(str(folder)).load()


def test_more_memory_than_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(InputError, match="GiB are free"):
        resolve(str(folder)).load()


# -------------------------------------------------------------------------------------------------- SmolLM2 and text


def test_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make setup"):
        resolve("smollm2-135m").load()


def test_another_file_than_the_pinned_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF and something else")
    monkeypatch.setattr("graphs.smollm2_135m.gguf", lambda: file)
    with pytest.raises(InputError, match="SHA-256"):
        resolve("smollm2-135m").load()


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_loads(smollm2: Any) -> None:
    config = smollm2.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (smollm2.context, config.rope_parameters["rope_theta"]) == (8192, 100000.0)
    assert smollm2.module.lm_head.weight is smollm2.module.model.embed_tokens.weight
    text = "Rule 1: don't panic.\n\tÜnïcode, too — 数"
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text)["input_ids"]) == text


def test_text_of_the_user(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("ångström", encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert text_corpus(plain) == text_corpus(packed) == "ångström"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\xff"])
def test_text_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match="UTF-8"):
        text_corpus(file)


def test_broken_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"words " * 1000)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        text_corpus(file)


def test_no_text_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LOCATIONS", ())
    with pytest.raises(InputError, match="--text"):
        text_corpus()
