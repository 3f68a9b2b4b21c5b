"""``trtpass generate`` with a paged cache: what it says of it, and what it does when it is full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paged_proofs import save_surrogate
from tiny_engines import tiny_engine, tiny_model

from trtpass import cli
from trtpass.build import Request, build
from trtpass.generate import generate

PROMPT = "the quick brown fox jumps over the lazy dog, twice"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kvzap-generate")
    spec = f"kvzap:threshold=0,window=8,weights={save_surrogate(root / 'w.safetensors')}"
    return build(Request(str(tiny_model(tmp_path_factory)), [spec], out=root / "engines", page=8))[1]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["trtpass", "generate", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_rows_say_what_the_cache_held(engine: Path) -> None:
    said: list[str] = []
    rows = generate(engine, [PROMPT, "a short one"], max_tokens=12, say=said.append)
    assert [row["stopped"] for row in rows] == ["length", "length"]
    assert all(0 < row["cache"]["kept"] <= 1 and row["cache"]["bytes"] > 0 for row in rows)
    assert rows[0]["cache"]["kept"] < 0.95
    assert any("of the keys" in line and "MB at most" in line for line in said)
    alone = generate(engine, [PROMPT], max_tokens=12)
    assert alone[0]["tokens"] == rows[0]["tokens"], "rows do not touch each other"
    assert generate(engine, [PROMPT], max_tokens=12, chunk=9)[0]["tokens"] == rows[0]["tokens"]


def test_a_full_cache_keeps_what_was_generated(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = generate(engine, [PROMPT], max_tokens=40)[0]["tokens"]
    words = [str(engine), "--prompt", PROMPT, "--max-tokens", "40", "--cache-pages", "10"]
    code, out, err = run(monkeypatch, capsys, *words, "--json")
    (row,) = json.loads(out)
    assert code == 2 and row["stopped"] == "cache" and 0 < len(row["tokens"]) < 40
    assert row["tokens"] == whole[: len(row["tokens"])]
    assert "the KV cache is full" in err and "--cache-pages" in err
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and out.strip() and "the KV cache is full: layer" in err


def test_a_prompt_that_does_not_fit(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, str(engine), "--prompt", PROMPT, "--cache-pages", "2")
    assert code == 2 and not out.strip() and "layer 0 wants" in err


def test_pages_are_of_a_paged_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_engine(tmp_path_factory, "dense")
    code, _, err = run(monkeypatch, capsys, str(dense), "--prompt", PROMPT, "--cache-pages", "2")
    assert code == 2 and "2 pages for a dense cache" in err


def test_stop_texts_and_a_nucleus_on_the_command_line(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(engine), "--prompt", PROMPT, "--max-tokens", "12", "--temperature", "1.5", "--top-p", "0.9", "--json"]
    (whole,) = generate(engine, [PROMPT], max_tokens=12, temperature=1.5, top_p=0.9)
    stop = next(letter for letter in whole["text"] if letter.isprintable())
    code, out, _ = run(monkeypatch, capsys, *words, "--stop", "never in any answer", "--stop", stop)
    (row,) = json.loads(out)
    assert code == 0 and row["stopped"] == "stop" and row["text"] == whole["text"][: whole["text"].index(stop)]
    assert row["tokens"] == whole["tokens"][: len(row["tokens"])] and row["cache"]["bytes"] > 0
    for option, message in (("--top-p=2", "top_p=2"), ("--temperature=nan", "temperature=nan"), ("--stop=", "stop")):
        code, _, err = run(monkeypatch, capsys, *words, option)
        assert code == 2 and message in err
