"""Quality of encoders with fewer tokens: the metrics on known arrays, and the sweeps on real weights, kept small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import tiny_encoder

from trtpass import io
from trtpass.build import write_graph
from trtpass.errors import InputError
from trtpass.manifest import Check, Checks, Manifest, PassRecord, artifact
from trtpass.passes import parse
from trtpass.passes.lower import lower
from trtpass.quality import encoder, encoder_photos, encoder_plots, encoder_speech, measure, render
from trtpass.quality.encoder_metrics import correlation, edit_distance, iou, kept_fraction, word_difference, words
from trtpass.quality.encoder_plan import PHOTOS, SPEECH, Setting
from trtpass.quality.encoder_sides import Side, store
from trtpass.quality.encoder_tables import grids
from trtpass.quality.tables import markdown

PNG = b"\x89PNG"


def test_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 7)).astype(np.float32)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-9)
    assert correlation(a, 3 * a + 1) == pytest.approx(1.0)
    assert correlation(a, -a) == pytest.approx(-1.0)
    flat = np.ones_like(a)
    assert (correlation(flat, flat), correlation(flat, a)) == (1.0, 0.0)


def test_iou_counts_from_one_half() -> None:
    a = np.array([[0.5, 0.9], [0.4, 0.0]])
    b = np.array([[0.5, 0.1], [0.6, 0.0]])
    assert iou(a, b) == pytest.approx(1 / 3)
    assert iou(a, a) == 1.0
    assert iou(a, np.zeros_like(a)) == 0.0
    assert iou(np.zeros_like(a), np.zeros_like(a)) == 1.0


def test_words_and_their_distance() -> None:
    assert words("It's the BEST, of — times.") == ["it's", "the", "best", "of", "times"]
    assert words("it’s") == ["it's"]
    for left, right, edits in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)):
        assert edit_distance(list(left), list(right)) == edits
    assert word_difference("one two three four", "one too three four five") == 0.5
    assert word_difference("one, two!", "One two") == 0.0
    assert word_difference("one", "one two three") == 2.0
    assert (word_difference("", ""), word_difference("", "a")) == (0.0, 1.0)


def test_kept_fraction_counts_each_block_with_what_leaves_its_attention() -> None:
    assert kept_fraction(100, {}, 4) == 1.0
    assert kept_fraction(100, {1: 50, 3: 10}, 4) == pytest.approx((100 + 50 + 50 + 10) / 400)


def test_plans_hold_settings_that_parse_and_differ() -> None:
    for plan in (PHOTOS, SPEECH):
        every = [setting.passes for setting in plan]
        assert len(set(every)) == len(every)
        for texts in every:
            assert len(texts) in (1, 3)
            for text in texts:
                assert parse(text).name


def test_overlay_darkens_what_was_dropped_and_tints_what_merged() -> None:
    photo = np.full((40, 40, 3), 200, np.uint8)
    owner = np.array([[0, 1], [1, -1]])
    shown = encoder_plots.overlay(photo, owner).astype(int)
    assert (shown[5, 5] == 200).all()  # its own token: as it was
    assert (shown[30, 30] == 30).all()  # dropped
    assert (shown[5, 30] == shown[30, 5]).all() and (shown[5, 30] != 200).any()  # one token, one colour
    assert (shown[20, 5] == 255).all()  # an edge between groups


@pytest.fixture(scope="module")
def astronaut() -> dict[str, np.ndarray]:
    from graphs.dinov2_saliency import photos

    return {"astronaut": photos()["astronaut"]}


@pytest.fixture(scope="module")
def saliency(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    return store(encoder_photos.canonical(), tmp_path_factory.mktemp("saliency"))


@pytest.mark.model
def test_identity_settings_keep_the_heat_map_and_others_shorten(
    saliency: ir.Model, astronaut: Mapping[str, np.ndarray]
) -> None:
    plan = (
        Setting("scc", "identity", ("scc:tau=1.1",)),  # goes through the operators, and merges nothing
        Setting("scc", "random", ("random-tokens:r=60,layers=1,seed=0", "random-tokens:r=60,layers=1,seed=1")),
    )
    same, random = encoder_photos.sweep(saliency, astronaut, plan, threads=1)
    assert (same["kept"], same["last"], same["iou"], same["spread"]) == (1.0, 257.0, 1.0, None)
    assert same["correlation"] == pytest.approx(1.0, abs=1e-5)
    assert random["kept"] == pytest.approx((257 + 11 * 197) / (12 * 257), abs=1e-4)
    assert random["last"] == 197
    assert random["correlation"] != 1.0 and len(random["spread"]) == 2


@pytest.mark.model
def test_owners_of_a_side_name_every_token(saliency: ir.Model, astronaut: Mapping[str, np.ndarray]) -> None:
    side = Side(saliency, [parse("tome:r=60,layers=1")], 1)
    (feed,) = encoder_photos.feeds(astronaut).values()
    seen = side.run(feed)
    assert seen.owner is not None and seen.owner.shape == (1, 257)
    assert sorted(set(seen.owner[0].tolist())) == list(range(197))
    two = {name: np.repeat(array, 2, 0) for name, array in feed.items()}
    with pytest.raises(InputError, match="one row at a time"):
        side.run(two)


def test_unmerged_transcript_differs_in_nothing(tmp_path: Path) -> None:
    """A tiny encoder, and for a decoder the strongest channel of each state as a word."""
    tiny = tiny_encoder("whisper")
    windows = tiny.inputs["input_features"].numpy()

    def say(states: np.ndarray) -> str:
        return " ".join(f"channel{channel}" for channel in states[0].argmax(-1))

    plan = (
        Setting("one block", "identity", ("scc:tau=1.1,restore=none",)),
        Setting("one block", "tome", ("tome:r=6,layers=1,restore=none",)),
    )
    dense = store(tiny.export(), tmp_path)
    said, (same, shorter) = encoder_speech.sweep(dense, encoder_speech.Listener(say, windows), plan, threads=1)
    assert len(words(said)) == 48  # two windows of 24 tokens
    assert (same["difference"], same["kept"], same["keys"]) == (0.0, 1.0, 24.0)
    assert (shorter["last"], shorter["keys"]) == (18.0, 18.0)
    assert shorter["difference"] >= 12 / 48  # so many words are missing


def folder_of(dense: ir.Model, folder: Path, method: str) -> Path:
    """An engine's folder as ``trtpass build`` writes it, without its proof, which the build's own tests cover."""
    store(dense, folder)
    rewritten = io.load(folder / "dense.onnx")
    step = parse(method)
    result = step(rewritten)
    write_graph(lower(rewritten, "cpu").model, folder / "engine.onnx")
    none = Check.not_run("a test")
    layers = [site.layer for site in result.sites]
    Manifest(
        kind="encoder", model="dinov2-saliency", origin="dinov2-saliency", target="cpu", sm=[], context=0,
        passes=[PassRecord(name=step.name, options=step.describe(), sites=len(layers), layers=layers)],
        artifacts=[artifact(folder, folder / name) for name in ("dense.onnx", "engine.onnx", "weights.bin")],
        checks=Checks(export=none, rewrite=none, engine=none), versions={}, seconds=0.0, peak_memory_bytes=0,
    ).write(folder)  # fmt: skip
    return folder


@pytest.mark.model
def test_validate_measures_the_engine_of_an_encoder(saliency: ir.Model, tmp_path: Path) -> None:
    folder = folder_of(saliency, tmp_path, "tome:r=60,layers=1")
    result = measure(folder, short=True)
    assert set(result["samples"]) == {"astronaut"}
    cell = result["samples"]["astronaut"]
    quality = Manifest.read(folder).quality
    assert quality is not None and (quality.dense, quality.rewritten) == (1.0, cell["correlation"])
    assert cell["kept"] == pytest.approx((257 + 11 * 197) / (12 * 257), abs=1e-4)
    assert json.loads((folder / "quality" / "quality.json").read_text()) == result
    for name in ("heat_maps.png", "tokens.png"):
        assert (folder / "quality" / name).read_bytes().startswith(PNG)
    assert render(result).renderables
    assert "astronaut" in markdown(grids(result))
    with pytest.raises(InputError, match="an encoder"):
        measure(folder, text=tmp_path / "text.txt")
    other = Manifest.read(folder)
    other.model = "another"
    other.write(folder)
    with pytest.raises(InputError, match="no quality metric"):
        measure(folder)


def test_main_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encoder.main(["smells", "-o", "x"])
    assert "smells" in capsys.readouterr().err
