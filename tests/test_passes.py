"""The pass contract: textual options and their errors, registries, and ``ensures`` that catches a broken pass."""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import ClassVar

import onnx_ir as ir
import pytest
import tiny

import trtpass.passes
from trtpass import layers, passes
from trtpass.anchors import Anchors
from trtpass.errors import AnchorError, InputError
from trtpass.ir import is_op, make_node
from trtpass.passes import Pass, PassResult, Site, all_methods, parse


def test_a_pass_is_found_for_every_method_and_has_what_the_list_shows() -> None:
    methods = all_methods()
    assert "token-sparse" in methods
    for name, cls in methods.items():
        assert cls.name == name and name == name.lower() and " " not in name
        assert cls.summary and cls.source
        assert dataclasses.is_dataclass(cls.Options) and cls.Options.__dataclass_params__.frozen
        assert parse(name).options == cls.Options()


def test_every_file_of_the_folder_was_looked_into() -> None:
    """Each module that defines a pass is in the registry or is plumbing that says so."""
    for info in pkgutil.iter_modules(trtpass.passes.__path__):
        module = __import__(f"trtpass.passes.{info.name}", fromlist=["_"])
        for item in vars(module).values():
            own = isinstance(item, type) and issubclass(item, Pass) and item.__module__ == module.__name__
            if own and not item.__abstractmethods__:
                assert (item.name in all_methods()) == item.method


def test_options_are_read_by_their_type() -> None:
    step = parse("token-sparse:coverage=0.01, window=64,layers=3+5+10-20,max-keep=0.5,select=group")
    assert (step.options.coverage, step.options.window, step.options.layers) == (0.01, 64, "3+5+10-20")
    assert (step.options.max_keep, step.options.select, step.options.mode) == (0.5, "group", "repo")
    assert step.describe()["window"] == 64
    assert parse("token-sparse:").options == parse("token-sparse").options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token-spars", "use 'token-sparse'"),
        ("zebra", "trtpass passes"),
        ("", "unknown pass ''"),
        ("token-sparse:depth=3", "no option 'depth=3'"),
        ("token-sparse:coverage", "no option 'coverage'"),
        ("token-sparse:window=1.5", "type int"),
        ("token-sparse:window=many", "type int"),
        ("token-sparse:coverage=half", "type float"),
        ("token-sparse:coverage=1.0", "coverage=1.0"),
        ("token-sparse:coverage=-0.1", "coverage=-0.1"),
        ("token-sparse:coverage=nan", "coverage=nan"),
        ("token-sparse:coverage=0.1,coverage=0.2", "twice"),
    ],
)
def test_bad_text_is_refused_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", (0, 1, 2, 3)),
        ("auto", (0, 1, 2, 3)),
        ("0", (0,)),
        ("1-2", (1, 2)),
        ("3+0-1", (0, 1, 3)),
        ("2+2", (2,)),
    ],
)
def test_layers_are_resolved(text: str, chosen: tuple[int, ...]) -> None:
    assert layers.resolve(text, 4, None) == chosen


def test_drift_takes_the_layers_that_change_least() -> None:
    drift = [0.9, 0.1, 0.3, 0.2]
    assert layers.resolve("drift:0.5", 4, drift) == (1, 3)
    assert layers.resolve("auto", 4, drift) == (1, 3)
    assert layers.resolve("drift:1", 4, drift) == (0, 1, 2, 3)
    assert layers.resolve("drift:0.01", 4, drift) == (1,)


@pytest.mark.parametrize(
    ("text", "drift", "message"),
    [
        ("4", None, "layer 4"), ("0-9", None, "layer 4"), ("-1", None, "layers=-1"), ("x", None, "layers=x"),
        ("", None, "layers="), ("1,2", None, "layers=1,2"), ("3-1", None, "empty range"), ("2-", None, "layers=2-"),
        ("drift:0.5", None, "calibrate drift"), ("drift:0", [1.0] * 4, "0 < Q"),
        ("drift:1.5", [1.0] * 4, "0 < Q"), ("drift:nan", [1.0] * 4, "0 < Q"),
        ("drift:x", [1.0] * 4, "0 < Q"), ("drift:0.5", [1.0] * 3, "3 layers"), ("99999999999", None, "layer"),
        ("0-99999999999", None, "layer"), ("²", None, "layers=²"),
    ],
)  # fmt: skip
def test_bad_layers_are_refused(text: str, drift: list[float] | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        layers.resolve(text, 4, drift)
    assert message in str(caught.value)


def test_a_layer_out_of_range_is_refused_by_the_pass() -> None:
    with pytest.raises(InputError, match="layer 2"):
        passes.run(tiny.decoder(layers=2), [parse("token-sparse:layers=2")])
    with pytest.raises(InputError, match="no drift calibration"):
        passes.run(tiny.decoder(layers=2), [parse("token-sparse:layers=drift:0.5")])


def test_carried_drift_is_used_and_checked() -> None:
    model = tiny.decoder(layers=2)
    layers.carry_drift(model, [0.5, 0.25])
    assert layers.carried_drift(model) == [0.5, 0.25]
    (result,) = passes.run(model, [parse("token-sparse")])
    assert [s.layer for s in result.sites] == [1]
    for bad in ("nonsense", '{"a": 1}', '["x"]', "3"):
        model.metadata_props[layers.DRIFT_KEY] = bad
        with pytest.raises(InputError, match="JSON list"):
            layers.carried_drift(model)


# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoOptions:
    pass


class Broken(Pass):
    """Applies ``edit`` and claims whatever ``result`` says."""

    name, summary, source = "broken", "breaks", "a test"
    Options: ClassVar[type] = NoOptions

    def __init__(self, edit: object, result: PassResult | None = None) -> None:
        super().__init__()
        self.edit, self.result = edit, result or PassResult("broken", True)

    def requires(self, model: ir.Model, anchors: Anchors) -> None:
        passes.need_blocks(anchors, self.name)

    def call(self, model: ir.Model, anchors: Anchors) -> PassResult:
        self.edit(model)
        return self.result


def wrong_operator(model: ir.Model) -> None:
    next(n for n in model.graph if is_op(n, "Attention")).op_type = "Atention"


def missing_attribute(model: ir.Model) -> None:
    value = next(n for n in model.graph if is_op(n, "MatMul")).outputs[0]
    node = make_node("Cast", [value], [("casted", ir.DataType.FLOAT, value.shape)])
    model.graph.insert_after(value.producer(), node)
    for user, index in list(value.uses()):
        if user is not node:
            user.replace_input_with(index, node.outputs[0])


def duplicate_name(model: ir.Model) -> None:
    matmuls = [n for n in model.graph if is_op(n, "MatMul")]
    matmuls[0].outputs[0].name = matmuls[1].outputs[0].name


@pytest.mark.parametrize("edit", [wrong_operator, missing_attribute, duplicate_name])
def test_ensures_catches_a_graph_that_is_not_valid(edit: object) -> None:
    with pytest.raises(InputError, match="after pass 'broken' is not valid ONNX"):
        passes.run(tiny.decoder(), [Broken(edit)])


def test_ensures_catches_sites_without_values_or_types() -> None:
    ghost = PassResult("broken", False, (Site(0, {"index": "no.such.value"}),))
    with pytest.raises(InputError, match=r"no\.such\.value"):
        passes.run(tiny.decoder(), [Broken(lambda model: None, ghost)])

    def untyped(model: ir.Model) -> None:
        next(n for n in model.graph if is_op(n, "Attention")).outputs[0].shape = None

    model = tiny.decoder()
    name = str(next(n for n in model.graph if is_op(n, "Attention")).outputs[0].name)
    with pytest.raises(InputError, match="without dtype or shape"):
        passes.run(model, [Broken(untyped, PassResult("broken", False, (Site(0, {"output": name}),)))])


def test_an_edit_out_of_order_is_sorted_and_leftovers_go() -> None:
    def edit(model: ir.Model) -> None:
        value = next(n for n in model.graph if is_op(n, "Attention")).inputs[0]
        model.graph.append(make_node("Neg", [value], [("unused", ir.DataType.FLOAT, value.shape)]))
        first = next(iter(model.graph))
        model.graph.remove(first)
        model.graph.append(first)

    model = tiny.decoder()
    before = model.graph.num_nodes()
    passes.run(model, [Broken(edit)])
    assert model.graph.num_nodes() == before and not any(is_op(n, "Neg") for n in model.graph)


def test_requires_names_the_missing_anchor() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["n"])
    node = ir.node("Relu", [x], outputs=[ir.val("y", ir.DataType.FLOAT, ["n"])])
    plain = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    with pytest.raises(AnchorError, match=r"no attention block: no Attention node"):
        passes.run(plain, [parse("token-sparse")])


def test_a_pass_without_a_twin_says_so() -> None:
    with pytest.raises(InputError, match="no torch twin"):
        Broken(lambda model: None).twin(None, PassResult("broken", False))
