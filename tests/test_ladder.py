"""The ladder passes on a good engine and fails on every kind of wrong one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from families import Exported
from proofs import SHORT, edit, ladder

from trtpass import compare
from trtpass.compare import MARGIN, Ladder, difference, disagreement
from trtpass.errors import InputError
from trtpass.passes.lower import Lowered, lower

LENGTHS = [40, 29, 40]


@pytest.fixture(scope="module")
def exported(tiny_export: Callable[[str], Exported]) -> Exported:
    return tiny_export("llama")


@pytest.fixture
def sparse(exported: Exported) -> Ladder:
    return ladder(exported, [SHORT], LENGTHS)


def test_a_good_engine_passes(sparse: Ladder) -> None:
    for check in (sparse.export(), sparse.rewrite(), sparse.engine("cpu"), sparse.engine("portable")):
        assert check.status == "passed", check
        assert check.max_abs is not None and check.max_abs < 1e-3 and "3x40 tokens" in check.tolerance
    assert all(0.2 < kept < 0.95 for kept in sparse.kept.values()) and set(sparse.kept) == {0, 1}


def test_a_dense_engine_passes_and_has_no_twin(exported: Exported) -> None:
    dense = ladder(exported, [], [40])
    assert dense.export().status == "passed"
    assert dense.rewrite().status == "not_run"
    assert dense.engine("cpu").status == "passed"


def test_without_torch_the_given_file_and_the_operators_take_its_place(sparse: Ladder, exported: Exported) -> None:
    sparse.module, sparse.original = None, exported.path
    for check in (sparse.export(), sparse.rewrite(), sparse.engine("cpu")):
        assert check.status == "passed", check
    attribute(sparse.rewritten, "TokenSparseAttention", "scale", 0.2)
    assert sparse.rewrite().status == "failed"
    edit(sparse.dense, "model.layers.0.input_layernorm.weight", 1.0)
    assert sparse.export().status == "failed"
    sparse.original = None
    assert sparse.export().status == "not_run"


@pytest.mark.parametrize("texts", [[SHORT.replace("0.3", "0")], [SHORT.replace("min_tokens=8", "min_tokens=64")]])
def test_a_check_that_pruned_nothing_does_not_count(exported: Exported, texts: list[str]) -> None:
    checks = ladder(exported, texts, LENGTHS)
    for check in (checks.rewrite(), checks.engine("cpu")):
        assert check.status == "not_run" and "nothing was pruned" in check.reason


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_one_wrong_weight_of_the_torch_model_fails(sparse: Ladder, name: str) -> None:
    sparse.module = copy.deepcopy(sparse.module)
    sparse.module.get_parameter(name).data.view(-1)[0] += 1.0
    assert sparse.export().status == "failed"
    rewrite = sparse.rewrite()
    assert rewrite.status == "failed" and "differ" in rewrite.reason


def test_one_wrong_weight_of_the_graph_fails(sparse: Ladder) -> None:
    edit(sparse.dense, "model.layers.0.input_layernorm.weight", 1.0)
    assert sparse.export().status == "failed"
    assert sparse.rewrite().status == "passed"
    edit(sparse.rewritten, "model.layers.0.input_layernorm.weight", 1.0)
    assert sparse.rewrite().status == "failed"


def attribute(model: ir.Model, op_type: str, name: str, value: float) -> None:
    for node in model.graph:
        if node.op_type == op_type:
            kind = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
            node.attributes[name] = kind(name, value)


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [("CoverageBudget", "coverage_ppm", 500_000), ("ColumnMass", "pool", 1), ("SelectTokens", "window", 0)],
)
def test_another_selection_than_the_twin_s_fails(sparse: Ladder, op_type: str, name: str, value: int) -> None:
    """The numbers agree, as the graph's selection is forced on the twin; the free choices do not."""
    attribute(sparse.rewritten, op_type, name, value)
    check = sparse.rewrite()
    assert check.status == "failed" and "from the cut" in check.reason
    assert check.flipped is not None and check.flipped > 0.01
    assert check.max_abs is not None and check.max_abs < 1e-3


def test_another_attention_than_the_twin_s_fails(sparse: Ladder) -> None:
    attribute(sparse.rewritten, "TokenSparseAttention", "scale", 0.2)
    check = sparse.rewrite()
    assert check.status == "failed" and "outputs differ" in check.reason


def lowered_with(change: Callable[[ir.Model], None], phase: str) -> Callable[[ir.Model, str, bool], Lowered]:
    """``lower`` with a defect in one of the two graphs."""

    def broken(model: ir.Model, target: str, kernels: bool) -> Lowered:
        result = lower(model, target, kernels)
        if result.model.metadata_props["trtpass.phase"] == phase:
            change(result.model)
        return result

    return broken


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_wrong_weight_in_either_engine_graph_fails(
    sparse: Ladder, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    change = lowered_with(lambda m: edit(m, "model.norm.weight", 1.0), phase)
    monkeypatch.setattr(compare, "lower", change)
    check = sparse.engine("cpu")
    assert check.status == "failed"
    assert ("decode graph" in check.reason) == (phase == "decode")


def test_a_wrong_cache_fails(sparse: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is compared for itself: prefill alone would not notice what it wrote wrongly."""
    original = compare.run_onnx

    def broken(model: ir.Model, folder: object, feed: dict, threads: int | None = None) -> dict[str, np.ndarray]:
        outputs = original(model, folder, feed, threads)
        if "present.1.value" in outputs:
            outputs["present.1.value"][0, 0, 3] += 0.1
        return outputs

    monkeypatch.setattr(compare, "run_onnx", broken)
    assert sparse.engine("cpu").status == "failed"


def test_nan_fails(sparse: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = compare.run_onnx

    def poisoned(*args: object, **more: object) -> dict[str, np.ndarray]:
        outputs = original(*args, **more)
        outputs["logits"][0, 0, 0] = np.nan
        return outputs

    monkeypatch.setattr(compare, "run_onnx", poisoned)
    for check in (sparse.export(), sparse.rewrite(), sparse.engine("cpu")):
        assert check.status == "failed" and "NaN" in check.reason and check.max_abs is None


# ---------------------------------------------------------------------------------------------------------------------


def selection(score: list[float], kept: list[int]) -> dict[int, dict[str, np.ndarray]]:
    """Layer 0 of a batch of one, one set of ``kept`` tokens."""
    index = np.array(kept + [len(score)] * (len(score) - len(kept)), np.int32)
    return {0: {"score": np.array(score, np.float32)[None, None], "keep": np.array([len(kept)], np.int32),
                "index": index[None, None], "count": np.array([[len(kept)]], np.int32)}}  # fmt: skip


SCORE = [0.5, 0.4, 0.3, 0.299, 0.01, 9.0]


def test_the_same_selection_does_not_disagree() -> None:
    same = selection(SCORE, [0, 1, 2, 5])
    found = disagreement(same, same, np.array([6]), protected=1)
    assert (found.decisions, found.flipped, found.worst, found.share) == (6, 0, 0.0, 0.0)
    assert found.kept[0] == pytest.approx(4 / 6)


def test_a_flip_is_measured_from_the_cut() -> None:
    near = disagreement(selection(SCORE, [0, 1, 3, 5]), selection(SCORE, [0, 1, 2, 5]), np.array([6]), protected=1)
    assert near.flipped == 2 and near.worst == pytest.approx(0.001 / 0.3, rel=1e-3) and near.worst < MARGIN
    far = disagreement(selection(SCORE, [0, 1, 4, 5]), selection(SCORE, [0, 1, 2, 5]), np.array([6]), protected=1)
    assert far.worst == pytest.approx(0.29 / 0.3) and far.share == pytest.approx(2 / 6)


def test_one_token_more_is_a_flip() -> None:
    found = disagreement(selection(SCORE, [0, 1, 2, 3]), selection(SCORE, [0, 1, 2]), np.array([6]), protected=0)
    assert found.flipped == 1 and found.worst < MARGIN


def test_a_missing_protected_token_is_far_from_the_cut() -> None:
    found = disagreement(selection(SCORE, [0, 1, 2]), selection(SCORE, [0, 1, 2, 5]), np.array([6]), protected=1)
    assert found.worst > 1.0


def test_nothing_chosen_freely_or_no_number_is_as_far_as_can_be() -> None:
    empty = disagreement(selection(SCORE, [0]), selection(SCORE, [5]), np.array([6]), protected=1)
    assert empty.worst == np.inf
    bad = [np.nan, *SCORE[1:]]
    nan = disagreement(selection(bad, [0, 1]), selection(bad, [1, 2]), np.array([6]), protected=0)
    assert nan.worst == np.inf


def test_differences_are_elementwise_and_bounded_on_both_sides() -> None:
    right = {"y": np.array([1000.0, 1.0], np.float32)}
    close = difference({"y": np.array([1000.5, 1.0], np.float32)}, right, atol=1e-3, rtol=1e-3)
    assert close.ok and close.max_abs == pytest.approx(0.5) and close.max_rel == pytest.approx(5e-4)
    small = difference({"y": np.array([1000.0, 1.5], np.float32)}, right, atol=1e-3, rtol=1e-3)
    assert not small.ok  # the same distance, but of a small element: the largest magnitude does not excuse it


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_equal_nan_or_infinity_is_no_equality(value: float) -> None:
    side = {"y": np.array([value, 1.0], np.float32)}
    assert not difference(side, side, atol=1.0, rtol=1.0).ok


def test_other_outputs_or_shapes_are_refused() -> None:
    y = np.zeros(3, np.float32)
    with pytest.raises(InputError, match="outputs"):
        difference({"y": y}, {"z": y}, atol=0, rtol=0)
    with pytest.raises(InputError, match="shape"):
        difference({"y": y}, {"y": np.zeros(4, np.float32)}, atol=0, rtol=0)
