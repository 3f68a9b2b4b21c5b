"""The runtime: generation equals the stateless graph, whatever the batch, the chunk, or the target."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny

from trtpass.errors import InputError
from trtpass.io import save_shared
from trtpass.passes import parse
from trtpass.passes.cache import insert_cache
from trtpass.passes.lower import lower
from trtpass.runtime import Engine, State
from trtpass.sampling import Sampler, sample
from trtpass.text import TextStream, Tokenizer

VOCAB = 64
ATOL = 1e-4  # fp32, two layers: chunks and batches only change the order of sums
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [46]]


def build(target: str, method: str = "", capacity: int | None = None, **options: object) -> dict[str, ir.Model]:
    stateless = tiny.decoder(**options)
    rewritten = stateless.clone()
    if method:
        parse(method)(rewritten)
    graphs = {"prefill": rewritten, "decode": stateless}
    return {phase: lower(insert_cache(g, phase, capacity=capacity), target).model for phase, g in graphs.items()}


@pytest.fixture(scope="module", params=["portable", "cpu"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.open(build(request.param), threads=1, context=96)


@pytest.fixture(scope="module")
def stateless() -> Callable[[list[int]], np.ndarray]:
    """Logits ``[V]`` after a row of tokens, by the graph without a cache."""
    proto = ir.to_proto(tiny.decoder()).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": np.array([ids])})[0][0, -1]


def greedy(stateless: Callable[[list[int]], np.ndarray], prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(stateless(ids).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rows", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_logits_at_every_step(
    engine: Engine, stateless: Callable[[list[int]], np.ndarray], rows: list[list[int]], chunk: int | None
) -> None:
    state = engine.prefill(rows, chunk)
    texts = [list(row) for row in rows]
    rng = np.random.default_rng(0)
    for _ in range(6):
        for row, ids in enumerate(texts):
            np.testing.assert_allclose(state.logits[row], stateless(ids), atol=ATOL, rtol=0)
        tokens = [int(t) for t in rng.integers(0, VOCAB, len(rows))]
        engine.decode(state, tokens)
        for ids, token in zip(texts, tokens, strict=True):
            ids.append(token)
    assert list(state.lengths) == [len(ids) for ids in texts]


@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_generation_of_a_ragged_batch(
    engine: Engine, stateless: Callable[[list[int]], np.ndarray], chunk: int | None
) -> None:
    steps = list(engine.generate(PROMPTS, 10, chunk=chunk))
    for row, prompt in enumerate(PROMPTS):
        assert [step.tokens[row] for step in steps] == greedy(stateless, prompt, 10)
    assert steps[-1].stopped == ("length",) * 3 and all(s.stopped == (None,) * 3 for s in steps[:-1])


def test_a_stop_token_ends_its_row_and_leaves_the_others(
    engine: Engine, stateless: Callable[[list[int]], np.ndarray]
) -> None:
    expected = [greedy(stateless, prompt, 8) for prompt in PROMPTS]
    stop = expected[1][2]
    steps = list(engine.generate(PROMPTS, 8, stop_ids=[stop]))
    ended = 0
    for row, tokens in enumerate(expected):
        kept = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert [s.tokens[row] for s in steps if s.tokens[row] is not None] == kept
        reasons = [s.stopped[row] for s in steps if s.stopped[row]]
        assert reasons == ["stop" if stop in tokens else "length"]
        ended += stop in tokens
    assert 1 <= ended < len(PROMPTS)


def test_sampling_depends_on_the_seed_and_the_row_alone(engine: Engine) -> None:
    def tokens(rows: list[list[int]], seed: int) -> list[int | None]:
        return [s.tokens[0] for s in engine.generate(rows, 12, temperature=1.5, seed=seed)]

    alone = tokens(PROMPTS[:1], 1)
    assert tokens(PROMPTS, 1) == alone == tokens(PROMPTS[:1], 1)
    assert tokens(PROMPTS[:1], 2) != alone


def test_the_context_limit(engine: Engine, stateless: Callable[[list[int]], np.ndarray]) -> None:
    long = [int(t) for t in np.random.default_rng(4).integers(0, VOCAB, 93)]
    steps = list(engine.generate([long, [5]], 10))
    # 93 tokens, 3 more fit into 96 slots, and the last of them still predicts one
    assert [s.tokens[0] for s in steps if s.tokens[0] is not None] == greedy(stateless, long, 4)
    assert [s.stopped[0] for s in steps if s.stopped[0]] == ["context"]
    assert [s.tokens[1] for s in steps] == greedy(stateless, [5], 10)  # the other row goes on, undisturbed
    for call in (lambda: engine.prefill([[1] * 97]), lambda: engine.generate([[1], [1] * 97], 4)):
        with pytest.raises(InputError, match="at most 96, the context limit"):
            call()


def test_a_full_cache_refuses_another_token(engine: Engine) -> None:
    state = engine.prefill([[1, 2, 3]], capacity=4)
    engine.decode(state, [4])
    with pytest.raises(InputError, match="no slot left"):
        engine.decode(state, [5])
    with pytest.raises(InputError, match="cache of 2 slots"):
        engine.prefill([[1, 2, 3]], capacity=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "without rows"), ([[1], []], "without tokens"), ([[1, VOCAB]], "token id 64"), ([[-1]], "token id -1")],
)
def test_bad_rows(engine: Engine, rows: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(rows, 4)


def test_bad_requests(engine: Engine) -> None:
    for options in ({"max_tokens": 0}, {"max_tokens": 4, "temperature": -1.0}, {"max_tokens": 4, "chunk": 0}):
        with pytest.raises(InputError):
            engine.generate([[1]], **options)
    with pytest.raises(InputError, match="2 tokens for 1 rows"):
        engine.decode(engine.prefill([[1]]), [1, 2])


def cache_arrays(state: State) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in state.cache.items()}


def test_decode_writes_one_slot_of_the_same_buffer(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    state = engine.prefill(PROMPTS, capacity=32)
    addresses, before = {n: v.data_ptr() for n, v in state.cache.items()}, cache_arrays(state)
    engine.decode(state, [1, 2, 3])
    assert {n: v.data_ptr() for n, v in state.cache.items()} == addresses
    for name, after in cache_arrays(state).items():
        for row, prompt in enumerate(PROMPTS):
            changed = np.flatnonzero((after[row] != before[name][row]).any(axis=(0, 2)))
            assert list(changed) == [len(prompt)]
    # ONNX Runtime warns where TensorScatter copies the cache; the next test shows that it would be seen
    assert "in-place optimization not activated" not in capfd.readouterr().err


def test_a_copy_of_the_cache_would_be_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    model = build("portable")["decode"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    cache = {i.name: np.zeros((1, 2, 8, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past.")}
    one = np.ones(1, np.int32)
    session.run(None, {"input_ids": np.array([[1]]), "lengths": one, "past_lengths": one, **cache})
    assert "in-place optimization not activated" in capfd.readouterr().err


def test_decode_time_does_not_grow_with_the_capacity() -> None:
    """A copy of the 64 MiB cache takes 10 ms or more, a step of this model under 1 ms."""
    engine = Engine.open(build("cpu"), threads=1)

    def fastest(capacity: int) -> float:
        state = engine.prefill([[1, 2, 3]], capacity=capacity)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            engine.decode(state, [4])
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = fastest(16), fastest(128 * 1024)
    assert large < small + 0.005


def test_a_method_that_needs_whole_prompts_refuses_chunks() -> None:
    engine = Engine.open(build("cpu", "token-sparse:coverage=0.3,window=4,min_tokens=8,layers=all"), context=64)
    assert engine.whole_prompt == "token-sparse"
    for call in (lambda: engine.prefill(PROMPTS, chunk=4), lambda: engine.generate(PROMPTS, 4, chunk=4)):
        with pytest.raises(InputError, match="token-sparse"):
            call()
    assert len(list(engine.generate(PROMPTS, 4))) == 4


def test_selections_can_be_read() -> None:
    method = "token-sparse:coverage=0.3,window=4,min_tokens=2,layers=1"
    engine = Engine.open(build("cpu", method), context=64)
    names = [f"layer1.token_sparse.{role}" for role in ("keep", "count", "index")]
    values = engine.run_named(PROMPTS, names)
    keep, counts, index = (values[name] for name in names)
    assert keep.shape == (3,) and 1 <= keep[1] < len(PROMPTS[1])  # the long row is pruned
    assert (counts == keep[:, None]).all()
    assert set(index[1, 0, : counts[1, 0]]) <= set(range(len(PROMPTS[1])))
    np.testing.assert_array_equal(values["logits"][:, 0], engine.prefill(PROMPTS).logits)
    with pytest.raises(InputError, match=r"layer1\.token_sparse\.keep"):
        engine.run_named(PROMPTS, ["layer9.token_sparse.keep"])


def test_a_folder_with_one_weights_file(tmp_path: Path, stateless: Callable[[list[int]], np.ndarray]) -> None:
    models = build("cpu", "token-sparse:coverage=0.3,window=4,min_tokens=2,layers=1")
    save_shared({f"{phase}.onnx": model for phase, model in models.items()}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"prefill.onnx", "decode.onnx", "weights.bin"}
    weights = sum(v.const_value.nbytes for v in models["decode"].graph.initializers.values())
    assert (tmp_path / "weights.bin").stat().st_size < 1.5 * weights + 64 * 4096  # once, each on a page of its own
    opened = Engine.open(tmp_path, context=64)
    assert opened.whole_prompt == "token-sparse" and opened.vocab == VOCAB and opened.context == 64
    np.testing.assert_allclose(opened.prefill([[7]]).logits[0], stateless([7]), atol=ATOL, rtol=0)
    assert opened.run_named(PROMPTS, ["layer1.token_sparse.keep"])["layer1.token_sparse.keep"].shape == (3,)


def test_graphs_with_all_logits_run_too(stateless: Callable[[list[int]], np.ndarray]) -> None:
    source = tiny.decoder()
    models = {phase: lower(insert_cache(source, phase, logits="all"), "cpu").model for phase in ("prefill", "decode")}
    engine = Engine.open(models, context=64)
    for chunk in (None, 4):
        logits = engine.prefill(PROMPTS, chunk).logits
        for row, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(logits[row], stateless(prompt), atol=ATOL, rtol=0)
    assert engine.run_named(PROMPTS, [])["logits"].shape == (3, 14, VOCAB)


def test_a_fixed_capacity_is_the_context() -> None:
    engine = Engine.open(build("cpu", capacity=16))
    assert engine.context == engine.fixed_capacity == 16
    assert engine.prefill([[1]]).capacity == 16
    with pytest.raises(InputError, match="at most 16"):
        engine.prefill([[1] * 17])


def test_a_stated_context_is_read_from_the_graph() -> None:
    stateless = tiny.decoder()
    models = {phase: lower(insert_cache(stateless, phase, context=24), "cpu").model for phase in ("prefill", "decode")}
    assert Engine.open(models).context == 24
    assert Engine.open(models, context=12).context == 12


def test_providers_are_checked() -> None:
    with pytest.raises(InputError, match="provider 'cuda' is not in this ONNX Runtime"):
        Engine.open(build("portable"), provider="cuda")
    assert Engine.open(build("portable")).provider == "CPUExecutionProvider"


def test_a_provider_that_falls_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists a provider that it then cannot start, warns, and runs on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning),
        pytest.raises(InputError, match="asked for CUDAExecutionProvider, got CPUExecutionProvider"),
    ):
        Engine.open(build("portable"), provider="cuda")


def test_broken_engines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Engine.open(tmp_path)
    (tmp_path / "decode.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot load"):
        Engine.open(tmp_path)
    with pytest.raises(InputError, match="without prefill"):
        Engine.open({"decode": tiny.decoder()})
    with pytest.raises(InputError, match="insert a cache"):
        Engine.open({"prefill": tiny.decoder(), "decode": tiny.decoder()})


def test_sampling_follows_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    stream = np.random.default_rng(0)
    draws = np.bincount([sample(logits, 1.0, stream) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(draws, [0.5, 0.3, 0.2], atol=0.03, rtol=0)  # four standard deviations
    cold = np.bincount([sample(logits, 0.1, stream) for _ in range(1000)], minlength=3) / 1000
    assert cold[0] > 0.97
    assert sample(np.array([1.0, 3.0, 3.0]), 0.0, stream) == 1


def test_a_sampler_stops_full_rows() -> None:
    sampler = Sampler(2, 5, [], 0.0, 0)
    step = sampler.step(np.eye(2), np.array([True, False]))
    assert step.tokens == (0, 1) and step.stopped == ("context", None) and sampler.active == [False, True]
    assert sampler.step(np.eye(2), np.array([True, False])).tokens == (None, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level tokens: a character outside ASCII is two to four tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 text", "a 🎉🎉 b", " leading", "é"])
def test_streams_never_show_half_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("ok 日")[:-1]]
    assert "".join(pieces) == "ok " and stream.finish() == "\ufffd"


def test_bytes_that_are_no_character_do_not_hold_the_stream(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.encode("日")[1]
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(continuation) for _ in range(12))
    assert len(shown) >= 8
    assert shown + stream.finish() == tokenizer.decode([continuation] * 12)


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer.open(tmp_path)
