"""The quality frontier: masks against eager attention, policies by hand, resumption, and what is written."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny
from test_quality import Characters, write_tokenizer

from graphs import resolve
from trtpass.corpus import text_corpus
from trtpass.errors import InputError
from trtpass.kvzap.frontier import __main__ as command
from trtpass.kvzap.frontier import frontier, policies
from trtpass.kvzap.frontier import run as running
from trtpass.kvzap.frontier.log import NAME, opened
from trtpass.kvzap.frontier.masked import RECENT, Read, ask, read
from trtpass.kvzap.frontier.output import BEGIN, END, RESULT, TABLES
from trtpass.kvzap.frontier.plan import FULL, SHORT, TEST, Plan, calibration, prompts
from trtpass.kvzap.frontier.summary import FIXED, summary
from trtpass.kvzap.surrogate import Surrogate

PLAN = Plan(
    cuts=(0.3, 0.75, 0.9), fixed=(0.3,), texts=((600, 2),), passkeys=((360, 2),), continuation=12, repeat=20,
    calibration=(200, 240),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("frontier") / "model", max_position_embeddings=1024)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def module(model: Path) -> Any:
    return resolve(str(model)).load().module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 9))) for _ in range(40)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(rng.choice(words) for _ in range(1000)))
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear surrogate of random weights: the tiny model has 2 layers, width 96 and 2 KV heads."""
    rng = np.random.default_rng(1)
    layers = tuple(
        {"weight": rng.normal(size=(2, 96)).astype(np.float32), "bias": np.zeros(2, np.float32)} for _ in range(2)
    )
    path = tmp_path_factory.mktemp("surrogate") / "made.safetensors"
    Surrogate("linear", layers).save(path)
    return path


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 100, count)]


def test_with_every_key_it_is_the_plain_model(module: Any) -> None:
    context, after = ids(40), ids(9, 1)
    past = read(module, context)
    with torch.inference_mode():
        logits = module(input_ids=torch.tensor([[*context, *after]])).logits[0]
    expected = logits.log_softmax(-1)[len(context) + 2 : -1].gather(1, torch.tensor(after[3:])[:, None])[:, 0]
    for keep in (None, torch.ones(past.shape, dtype=torch.bool)):
        found, exact = ask(module, past, keep, after, 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert exact.tolist() == (logits[len(context) + 2 : -1].argmax(-1) == torch.tensor(after[3:])).tolist()


def test_a_mask_is_what_attention_in_loops_does_with_it(module: Any) -> None:
    """Independent: one forward over everything, plain loops, with -inf where a key was taken from a KV head."""
    from transformers import AttentionInterface

    context, after = ids(30), ids(8, 1)
    past = read(module, context)
    keep = torch.from_numpy(np.random.default_rng(3).random(past.shape) < 0.5)
    found, _ = ask(module, past, keep, after, 1)

    def loops(block: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            owner = head // (q.shape[1] // k.shape[1])
            for row in range(q.shape[2]):
                logits = k[0, owner] @ q[0, head, row] * scaling
                for key in range(len(logits)):
                    if key > row or (key < len(context) <= row and not keep[block.layer_idx, owner, key]):
                        logits[key] = -torch.inf
                out[0, head, row] = logits.softmax(-1) @ v[0, owner]
        return out.transpose(1, 2), None

    AttentionInterface.register("test_frontier", loops)
    before, module.config._attn_implementation = module.config._attn_implementation, "test_frontier"
    try:
        with torch.inference_mode():
            hidden = module.model(input_ids=torch.tensor([[*context, *after]]), use_cache=False).last_hidden_state
            expected = module.lm_head(hidden)[0].log_softmax(-1)[len(context) : -1]
    finally:
        module.config._attn_implementation = before
        AttentionInterface._global_mapping.pop("test_frontier")
    wanted = expected.gather(1, torch.tensor(after[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (ask(module, past, None, after, 1)[0] - found).abs().max() > 1e-2  # the mask mattered


def test_what_the_prefill_leaves_is_what_the_layers_see(module: Any) -> None:
    past = read(module, ids(40))
    assert past.shape == (2, 2, 40) and past.hidden.shape == (2, 40, 96)
    assert past.query[0].shape == (6, RECENT, 16)
    block = module.model.layers[1].self_attn
    value = block.v_proj(past.hidden[1]).unflatten(-1, (2, 16)).transpose(0, 1)
    torch.testing.assert_close(past.value[1], value, rtol=1e-4, atol=1e-5)
    assert not module.model.layers[0].self_attn._forward_pre_hooks


@pytest.mark.parametrize(("count", "first"), [(5, 0), (5, 5), (1200, 1)])
def test_what_cannot_be_asked(module: Any, count: int, first: int) -> None:
    past = read(module, ids(4))
    with pytest.raises(InputError):
        ask(module, past, None, ids(count), first)


def made_read(tokens: int) -> Read:
    generator = torch.Generator().manual_seed(0)

    def tensors(heads: int, rows: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(heads, rows, 8, generator=generator) for _ in range(3))

    return Read(tensors(2, tokens), tensors(2, tokens), tensors(6, min(tokens, RECENT)), torch.zeros(3, tokens, 4), 0.3)


def test_snapkv_is_the_definition_in_loops() -> None:
    tokens = 50
    past = made_read(tokens)
    score = policies.snapkv(past)
    for layer, owner in ((0, 0), (2, 1)):
        total = np.zeros(tokens)
        for head in range(3 * owner, 3 * owner + 3):
            mass = np.zeros(tokens)
            for row in range(RECENT):
                place = tokens - RECENT + row
                logits = (past.key[layer][owner] @ past.query[layer][head, row]).numpy()[: place + 1] * 0.3
                weights = np.exp(logits - logits.max())
                mass[: place + 1] += weights / weights.sum()
            mass[tokens - RECENT :] = 0
            total += [mass[max(i - 3, 0) : i + 4].max() for i in range(tokens)]
        np.testing.assert_allclose(score[layer, owner].numpy(), total, rtol=1e-4)


def test_the_plain_policies() -> None:
    past = made_read(40)
    assert policies.streaming(past)[1, 1].tolist() == list(range(40))
    assert float(policies.knorm(past)[2, 1, 7]) == pytest.approx(-float(past.key[2][1, 7].norm()))
    assert policies.random(past, (1, 2)).equal(policies.random(past, (1, 2)))
    assert not policies.random(past, (1, 2)).equal(policies.random(past, (1, 3)))
    mean = torch.tensor([[3.0, -1.0], [0.0, 5.0], [2.0, 1.0]])
    keep = policies.cut(policies.static(past, mean), 0.5, window=0, sinks=0)
    assert keep is not None and keep.float().mean(-1).tolist() == [[1, 0], [0, 1], [1, 0]]  # whole heads
    some = policies.cut(policies.static(past, mean), 1 / 24, window=0, sinks=0)
    assert some is not None and some[0, 1].tolist() == [False] * 10 + [True] * 30  # the oldest of the lowest head


def test_a_cut_is_exact_and_spares_the_protected() -> None:
    score = torch.from_numpy(np.random.default_rng(0).random((3, 2, 50)))
    keep = policies.cut(score, 0.4, window=10, sinks=4)
    assert keep is not None and int((~keep).sum()) == 120
    safe = policies.protected(50, 10, 4)
    assert keep[..., safe].all() and int(safe.sum()) == 14
    loose = score[..., ~safe]
    assert score[~keep].max() < loose[keep[..., ~safe]].min()
    assert policies.cut(score, 0.72, window=10, sinks=4) is not None  # 36 of 50 may go
    assert policies.cut(score, 0.73, window=10, sinks=4) is None
    ties = policies.cut(torch.zeros(1, 1, 10), 0.3, window=1, sinks=1)
    assert ties is not None and ties[0, 0].tolist() == [True, False, False, False] + [True] * 6


def test_a_threshold_removes_what_it_was_made_for_and_keeps_a_tie() -> None:
    rng = np.random.default_rng(0)
    scores = [torch.from_numpy(rng.random((3, 2, n))) for n in (50, 90)]
    found = policies.threshold(scores, 0.5, window=10, sinks=4)
    assert found is not None
    gone = [int((~policies.above(score, found, window=10, sinks=4)).sum()) for score in scores]
    assert sum(gone) == 420
    assert policies.above(torch.full((1, 1, 20), found), found, 1, 1).all()
    assert policies.threshold(scores, 0.9, window=10, sinks=4) is None


@pytest.mark.parametrize("call", [lambda s: policies.cut(s, 0.5), lambda s: policies.above(s, 0.0)])
def test_scores_that_are_not_finite_are_refused(call: Callable[[torch.Tensor], Any]) -> None:
    score = torch.zeros(1, 1, 200)
    score[0, 0, 150] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        call(score)


def test_prompts_come_from_the_last_quarter_and_ask_after_the_context() -> None:
    text = "".join(chr(33 + i * i % 90) for i in range(40_000))
    made = prompts(Characters(), text, PLAN)
    assert [p.key for p in made] == ["text/600/0", "passkey/360/0", "text/600/1", "passkey/360/1"]
    four = replace(PLAN, texts=((600, 4),), passkeys=((360, 1),))
    assert [p.key for p in prompts(Characters(), text, four)][2] == "passkey/360/0"  # half of each when half is done
    tail = text[int(TEST * len(text)) :]
    for prompt in made:
        words = "".join(map(chr, prompt.ids))
        if prompt.task == "text":
            again, after = prompt.probes
            assert words + "".join(map(chr, after.ids)) in tail and len(after.ids) == 12
            assert again.ids[again.first :] == prompt.ids[:20]
        else:
            (probe,) = prompt.probes
            key = "".join(map(chr, probe.ids[probe.first :])).strip()
            assert f"The pass key is {key}." in words and "What is the pass key?" not in words
            assert "".join(map(chr, probe.ids[: probe.first])) == "What is the pass key? The pass key is"
    found = calibration(Characters(), text, PLAN)
    assert [len(c) for c in found] == [200, 240] and all("".join(map(chr, c)) in text[:28_000] for c in found)


def test_a_plan_without_what_a_model_cannot_hold() -> None:
    fitted = FULL.fit(2048)
    assert [n for n, _ in fitted.texts] == [n for n, _ in fitted.passkeys] == [1000]
    assert FULL.fit(8192) == FULL
    with pytest.raises(InputError, match="a context of 461 tokens"):
        SHORT.fit(461)


@pytest.fixture(scope="module")
def done(model: Path, text: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("done")
    return folder, frontier(str(model), folder, surrogates={"made": checkpoint}, text=text, plan=PLAN)


def test_a_run_measures_every_policy_and_writes_it(done: tuple[Path, Any]) -> None:
    folder, result = done
    assert result == json.loads((folder / RESULT).read_text())
    names = {"made", "kvzip+ oracle", "snapkv", "static", "streaming-llm", "knorm", "random"}
    for task, length in (("text", "600"), ("passkey", "360")):
        rows = result["results"][task][length]
        assert set(rows) == names | {"dense", f"made{FIXED}"}
        for name in names:
            assert set(rows[name]) == ({"0.3", "0.75"} if task == "text" else {"0.3"})  # 132 keys are protected
            assert rows[name]["0.3"]["removed"] == pytest.approx(0.3, abs=1e-3) and rows[name]["0.3"]["samples"] == 2
        assert rows["dense"]["0"]["removed"] == 0
    text = result["results"]["text"]["600"]
    assert len({text[name]["0.3"]["continuation"]["mean"] for name in names}) == len(names)
    assert text["made"]["0.3"]["repeat"]["change"] == pytest.approx(
        text["made"]["0.3"]["repeat"]["mean"] - text["dense"]["0"]["repeat"]["mean"]
    )
    tables = (folder / TABLES).read_text()
    assert "**Repeated text, nats a token, after 600 tokens**" in tables and f"**made{FIXED}**" in tables
    assert "| made | " in tables and "- |" in tables  # what cannot be cut
    for name in ("frontier_passkey.png", "frontier_repeat.png", "frontier_continuation.png", "frontier_heads.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert {len(heads) for heads in result["heads"].values()} == {4}


def test_a_stopped_run_goes_on_and_ends_the_same(
    done: tuple[Path, Any], model: Path, text: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first run without the surrogate, a torn last line, then one with it: the numbers of one whole run."""
    frontier(str(model), tmp_path, surrogates={}, text=text, plan=PLAN)
    log = tmp_path / NAME
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:12]) + lines[12][:30])
    oracles: list[int] = []
    scores = running.oracle.scores
    monkeypatch.setattr(running.oracle, "scores", lambda *a, **k: oracles.append(len(a[2])) or scores(*a, **k))
    result = frontier(str(model), tmp_path, surrogates={"made": checkpoint}, text=text, plan=PLAN)
    assert len(oracles) == sum("kvzip+" in line for line in lines[12:]) > 0  # what was there is not done again
    assert result["results"] == done[1]["results"] and result["heads"] == done[1]["heads"]
    again = log.read_text()
    frontier(str(model), tmp_path, surrogates={"made": checkpoint}, text=text, plan=PLAN)
    assert log.read_text() == again


def test_a_run_that_is_out_of_time_writes_what_is_there(model: Path, text: Path, tmp_path: Path) -> None:
    result = frontier(str(model), tmp_path, surrogates={}, text=text, plan=PLAN, minutes=0)
    assert result["prompts"] == {"measured": 0, "planned": 4} and (tmp_path / RESULT).exists()


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, {"model": "a"}) as log:
        log.add({"prompt": "x"})
        with pytest.raises(InputError, match="another run"), opened(tmp_path, {"model": "a"}):
            pass
    with opened(tmp_path, {"model": "a"}) as log:
        assert log.find(prompt="x") is not None and log.find(prompt="y") is None
    with pytest.raises(InputError, match="another model"), opened(tmp_path, {"model": "b"}):
        pass
    (tmp_path / NAME).write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 is no object"), opened(tmp_path, {}):
        pass
    (tmp_path / NAME).write_text("{\n")
    with pytest.raises(InputError, match="line 1 is not JSON"), opened(tmp_path, {}):
        pass


def test_numbers_of_a_cell() -> None:
    def line(prompt: str, policy: str, values: list[float]) -> dict[str, Any]:
        probes = {"repeat": {"mean": values[0], "exact": False}, "continuation": {"mean": values[1], "exact": False}}
        point = {"cut": 0.0 if policy == "dense" else 0.5, "removed": 0.5, **probes}
        place = {"prompt": prompt, "task": "text", "length": 9, "policy": policy, "source": "", "seconds": 1.0}
        return {**place, "points": [point]}

    lines = [{"run": {}}, line("a", "dense", [-1, -3]), line("b", "dense", [-2, -3]), line("a", "p", [-2, -3]),
             line("b", "p", [-5, -3]), {**line("a", "learned", [-9, -9]), "source": "old"}]  # fmt: skip
    result = summary(lines, {}, 3)
    rows = result["results"]["text"]["9"]
    assert set(rows) == {"dense", "p"}  # the lines of an older checkpoint are left out
    assert result["prompts"] == {"measured": 2, "planned": 3}
    partly = [*lines, line("c", "dense", [-9, -9]), {**line("a", "learned", [-2, -2]), "source": "new"}]
    assert summary(partly, {}, 3)["results"] == result["results"]  # c has no p
    new = summary(partly, {"learned": {"file": "f", "sha256": "new"}}, 3)
    assert new["results"]["text"]["9"]["learned"]["0.5"]["samples"] == new["prompts"]["measured"] == 1  # b has it not
    expected = {"mean": -3.5, "error": 1.5, "change": -2.0, "change_error": 1.0}
    assert rows["p"]["0.5"]["repeat"] == pytest.approx(expected)


def test_the_command(done: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert command.main(["-o", str(done[0]), "--page", str(page)]) == 0
    made = page.read_text()
    assert made == f"before\n{BEGIN}\n\n{(done[0] / TABLES).read_text()}\n{END}\nafter\n"
    page.write_text("no marks")
    assert command.main(["-o", str(done[0]), "--page", str(page)]) == 2
    assert "lacks the marks" in capsys.readouterr().err and page.read_text() == "no marks"
    for arguments, words in (
        (["-o", str(tmp_path)], "no model was named"),
        (["nothing", "-o", str(tmp_path)], "there is no model 'nothing'"),
        (["nothing", "-o", str(tmp_path), "--surrogate", "x"], "NAME=FILE"),
        (["-o", str(tmp_path), "--page", str(page)], "cannot be put into"),
    ):
        assert command.main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    layers = ({"weight": np.zeros((3, 96), np.float32), "bias": np.zeros(3, np.float32)},) * 2
    Surrogate("linear", layers).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="KV heads"):
        frontier(str(model), tmp_path / "out", surrogates={"x": tmp_path / "other.safetensors"}, text=text, plan=PLAN)
    assert not (tmp_path / "out").exists()


@pytest.mark.model
@pytest.mark.slow
def test_the_short_form_on_a_real_model(tmp_path: Path) -> None:
    try:
        text_corpus()
    except InputError as error:
        pytest.skip(str(error))
    result = frontier("smollm2-135m", tmp_path, short=True, threads=1)
    text, keys = result["results"]["text"]["350"], result["results"]["passkey"]["350"]
    assert keys["dense"]["0"]["found"] == 1
    assert text["kvzip+ oracle"]["0.5"]["repeat"]["change"] > text["random"]["0.5"]["repeat"]["change"]
