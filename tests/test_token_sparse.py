"""Token Sparse Attention: the identity setting is dense, the twin is the graph, and rows do not see each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from families import Exported
from proofs import SHORT, ladder

from trtpass import passes
from trtpass.errors import AnchorError, InputError
from trtpass.ir import is_op
from trtpass.passes import WHOLE_PROMPT_KEY
from trtpass.passes.token_sparse import TokenSparseOptions
from trtpass.variants import expose_selections, sites_of

OPTIONS = "coverage=0.3,window=4,min_tokens=8,pool=3,layers=all"
ATOL = 1e-4  # float32, two layers: attention over gathered rows sums in another order


def rewritten(options: str = OPTIONS, **model: object) -> tuple[ir.Model, passes.PassResult]:
    graph = tiny.decoder(**model)
    (result,) = passes.run(graph, [passes.parse(f"token-sparse:{options}")])
    return graph, result


def run(model: ir.Model, ids: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    return outputs(session(model), ids, lengths)


def session(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def outputs(runner: ort.InferenceSession, ids: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    given = {"input_ids": ids, "lengths": np.array(lengths, np.int32)}
    names = [o.name for o in runner.get_outputs()]
    feed = {i.name: given[i.name] for i in runner.get_inputs()}
    return dict(zip(names, runner.run(None, feed), strict=True))


@cache
def exposed() -> tuple[ort.InferenceSession, tuple[passes.Site, ...]]:
    """A session of the rewritten decoder whose selections are outputs."""
    graph, result = rewritten()
    expose_selections(graph, sites_of([result]))
    return session(graph), result.sites


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, shape)


@pytest.mark.parametrize("options", ["coverage=0", "coverage=0.3,min_tokens=60", "coverage=0,mode=paper"])
@pytest.mark.parametrize("select", ["head", "group"])
def test_the_identity_setting_is_dense(options: str, select: str) -> None:
    lengths, ids = [40, 40, 40], tokens(3, 40)
    graph, result = rewritten(f"{options},window=4,layers=all,select={select}")
    assert len(result.sites) == 2
    dense = run(tiny.decoder(), ids, lengths)["logits"]
    np.testing.assert_array_equal(run(graph, ids, lengths)["logits"], dense)  # whole rows take the same Attention
    ragged = run(graph, ids, [40, 17, 1])["logits"]
    for row, n in enumerate([40, 17, 1]):
        np.testing.assert_allclose(ragged[row, :n], dense[row, :n], atol=ATOL, rtol=0)


def test_pruning_changes_the_result() -> None:
    """Otherwise nothing here would be a test."""
    ids = tokens(1, 40)
    difference = run(rewritten()[0], ids, [40])["logits"] - run(tiny.decoder(), ids, [40])["logits"]
    assert np.abs(difference).max() > 100 * ATOL


@pytest.mark.parametrize(("mode", "select"), itertools.product(["repo", "paper"], ["head", "group"]))
def test_the_twin_is_the_graph(tiny_export: Callable[[str], Exported], mode: str, select: str) -> None:
    """Three rows of different lengths and budgets; selections forced, then free; one row too short to be pruned."""
    checks = ladder(tiny_export("llama"), [f"{SHORT},mode={mode},select={select}"], [48, 33, 11], seed=3)
    check = checks.rewrite()
    assert check.status == "passed", check
    assert check.max_abs is not None and check.max_abs < 1e-3 and check.flipped is not None and check.flipped < 0.01
    assert checks.saved is not None
    for chosen in checks.saved.selections.values():
        assert chosen["count"].shape == (3, 6 if select == "head" else 2)
        share = chosen["count"][:, 0] / [48, 33, 11]
        assert share[0] < 1 and share[1] < 1 and share[2] == 1 and share[0] != share[1]
    assert checks.engine("cpu").status == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_the_twin_is_the_graph_in_every_family(tiny_export: Callable[[str], Exported], family: str) -> None:
    check = ladder(tiny_export(family), [f"{SHORT},max_keep=0.5"], [48, 33, 20]).rewrite()
    assert check.status == "passed", check


def test_one_sparse_layer_of_two(tiny_export: Callable[[str], Exported]) -> None:
    checks = ladder(tiny_export("llama"), [SHORT.replace("layers=all", "layers=1")], [40, 31])
    assert checks.rewrite().status == "passed" and list(checks.kept) == [1]


@pytest.mark.parametrize("padding", [0, 63])
def test_padding_does_not_matter(padding: int) -> None:
    """What lies beyond a row's length, and how much of it, changes neither the selection nor the result."""
    runner, sites = exposed()
    ids = tokens(2, 40)
    lengths = [40, 23]
    expected = outputs(runner, ids, lengths)
    other = ids.copy()
    other[1, 23:] = padding
    wider = np.concatenate([other, np.full((2, 9), padding)], axis=1)
    for given in (other, wider):
        got = outputs(runner, given, lengths)
        assert_same_rows(got, expected, lengths, sites)


def test_rows_do_not_see_each_other() -> None:
    runner, sites = exposed()
    ids, lengths = tokens(3, 40), [40, 12, 31]
    together = outputs(runner, ids, lengths)
    for row, length in enumerate(lengths):
        alone = outputs(runner, ids[row : row + 1, :length], [length])
        assert_same_rows(alone, {name: value[row : row + 1] for name, value in together.items()}, [length], sites)


def assert_same_rows(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], lengths: list[int], sites: tuple[passes.Site, ...]
) -> None:
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got["logits"][row, :length], expected["logits"][row, :length], atol=ATOL, rtol=0)
        for site in sites:
            count, index = site.values["count"], site.values["index"]
            np.testing.assert_array_equal(got[count][row], expected[count][row])
            for head, n in enumerate(expected[count][row]):
                np.testing.assert_array_equal(got[index][row, head, :n], expected[index][row, head, :n])


def test_budgets_differ_by_row_and_sets_by_head() -> None:
    runner, sites = exposed()
    got = outputs(runner, tokens(3, 64), [64, 40, 10])
    keep = got[sites[0].values["keep"]]
    assert len(set(keep.tolist())) == 3 and keep[2] == 10
    index = got[sites[0].values["index"]][0]
    assert len({tuple(row) for row in index}) > 1


def test_max_keep_bounds_what_is_kept() -> None:
    graph, result = rewritten(OPTIONS + ",max_keep=0.25")
    expose_selections(graph, result.sites)
    got = run(graph, tokens(2, 40), [40, 40])
    for site in result.sites:
        assert got[site.values["count"]].max() <= 10 < got[site.values["keep"]].max()


def test_layers_that_are_not_causal_are_near_misses() -> None:
    graph = tiny.decoder()
    first = next(n for n in graph.graph if is_op(n, "Attention"))
    first.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    (result,) = passes.run(graph, [passes.parse(f"token-sparse:{OPTIONS}")])
    assert [s.layer for s in result.sites] == [1] and result.modified
    assert result.near_misses == ("layer 0: attention is bidirectional",)
    assert sum(is_op(n, "Attention") for n in graph.graph) == 1


def test_no_causal_layer_at_all_is_an_error() -> None:
    with pytest.raises(AnchorError, match="bidirectional"):
        rewritten(causal=False)


def test_what_the_graph_says_about_itself() -> None:
    graph, result = rewritten()
    assert graph.metadata_props[WHOLE_PROMPT_KEY] == "token-sparse"
    assert [v.name for v in graph.graph.inputs] == ["input_ids", "lengths"]
    assert {f.name for f in graph.functions.values()} == {
        "ColumnMass", "CoverageBudget", "SelectTokens", "TokenSparseAttention",
    }  # fmt: skip
    assert result.options["coverage"] == 0.3 and result.near_misses == ()
    shapes = {v.name: [str(d) for d in v.shape] for n in graph.graph for v in n.outputs if v.shape is not None}
    for site in result.sites:
        assert shapes[site.values["count"]] == ["batch", "4"]
        assert shapes[site.values["output"]] == ["batch", "4", "sequence", "16"]


def test_applying_it_twice_finds_no_attention_left() -> None:
    graph, _ = rewritten()
    with pytest.raises(AnchorError, match="no attention block"):
        passes.run(graph, [passes.parse(f"token-sparse:{OPTIONS}")])


@pytest.mark.parametrize(
    "bad",
    [
        {"coverage": 1.0}, {"coverage": -0.1}, {"coverage": float("nan")}, {"coverage": float("inf")},
        {"mode": "both"}, {"window": 0}, {"window": 5000}, {"pool": 2}, {"pool": 0}, {"pool": 257}, {"min_tokens": -1},
        {"select": "token"}, {"max_keep": 0.0}, {"max_keep": 1.1}, {"max_keep": float("nan")},
    ],
)  # fmt: skip
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"token-sparse: {next(iter(bad))}="):
        TokenSparseOptions(**bad)


def test_tiny_shares_are_not_rounded_to_none() -> None:
    assert TokenSparseOptions(coverage=1e-9).coverage_ppm == 1 and TokenSparseOptions(coverage=0.0).coverage_ppm == 0
    assert TokenSparseOptions(max_keep=1e-6).max_keep_permille == 1


def test_a_share_that_rounds_up_to_everything_is_still_below_it() -> None:
    assert TokenSparseOptions(coverage=0.99999999).coverage_ppm < 1_000_000
