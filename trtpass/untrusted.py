"""Whether an ONNX protobuf from an untrusted file may be handed to onnx-ir, ONNX Runtime and TensorRT.

Those libraries assume a well-formed model: given a broken one they ignore the fault (onnx-ir drops a duplicate name),
raise something unrelated, or crash the process. Everything they rely on is therefore checked here first, in Python, in
time and memory linear in the size of the protobuf: structure, names, scopes, operators, attributes, tensor sizes,
external data, functions. Weights are never read.

Not checked: dtype and shape agreement between nodes (shape inference and the target report these) and weight values.
"""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto

from trtpass.untrusted_values import ValueChecker, shown

IR_VERSIONS = (3, 13)  # ONNX Runtime 1.31 reads no later one
MAX_OPSET = 26
EXTERNAL_SCHEMA_DOMAINS = ("trtpass", "com.microsoft")  # operators without an onnx schema that are known here
MAX_NODES = 1_000_000  # after every model-local function is inlined

_STANDARD = ("", "ai.onnx.ml")
_ATTRIBUTE_FIELD = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.TYPE_PROTOS: "type_protos",
}


@cache
def _schema(op_type: str, version: int, domain: str) -> Any:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _describe(node: onnx.NodeProto) -> str:
    kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{kind[:80]} node {shown(node.name or (node.output[0] if node.output else ''))}"


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _all_nodes(graph.node)


class Checker(ValueChecker):
    """Checks one model; ``check`` returns or raises InputError. Recursion is as deep as subgraphs are nested, which
    protobuf's own limit of 100 nested messages keeps below 35.

    Args:
        proto: the parsed model; its text fields may still be bytes (invalid UTF-8).
        file: where it came from; external data must lie in this file's folder.
    """

    def __init__(self, proto: onnx.ModelProto, file: Path) -> None:
        super().__init__(file)
        self.proto = proto
        self.functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
        self.versions: dict[str, int] = {}
        self.unknown: list[str] = []

    def check(self) -> None:
        """Raise InputError at the first fault (unknown operators: after all of them are known)."""
        proto = self.proto
        if not proto.HasField("graph") or not proto.HasField("ir_version"):
            missing = "graph" if proto.HasField("ir_version") else "IR version"
            self.fail(f"holds no {missing}: it is not an ONNX model", "an ONNX ModelProto")
        self.text(proto)
        low, high = IR_VERSIONS
        if not low <= proto.ir_version <= high:
            self.fail(f"IR version {proto.ir_version}", f"IR version {low} to {high}", "export for an older IR version")
        if not proto.graph.node:
            self.fail("the graph has no nodes", "a graph that computes something")
        imports = self.versions = self.imports(proto.opset_import, "the model")
        for function in proto.functions:
            key = (_domain(function.domain), function.name, function.overload)
            if key in self.functions:
                self.fail(f"function {shown(function.name)} is defined twice", "one definition of each function")
            if key[0] in _STANDARD or not key[1]:
                self.fail(
                    f"function {shown(function.name)} in domain {shown(function.domain)}",
                    "functions have a name and a domain of their own",
                )
            self.functions[key] = function
        self.graph(proto.graph, [], imports)
        for function in proto.functions:
            self.function(function)
        if self.unknown:
            listed = "; ".join(self.unknown[:5]) + (f"; and {len(self.unknown) - 5} more" if self.unknown[5:] else "")
            self.fail(
                f"unknown operators: {listed}",
                f"operators of ONNX up to opset {MAX_OPSET}, of {' or '.join(EXTERNAL_SCHEMA_DOMAINS)}, or model-local "
                "functions",
                "export with the standard operators, or add a model-local function for each",
            )
        self.expansion()

    # text, versions -----------------------------------------------------------------------------------------------

    def text(self, proto: Message) -> None:
        """Every string is UTF-8: protobuf hands over bytes where it is not."""
        stack: list[Message] = [proto]
        while stack:
            message = stack.pop()
            if isinstance(message, TensorProto):  # ListFields would copy its data
                strings: list[tuple[str, Any]] = [("name", message.name), ("doc_string", message.doc_string)]
                stack.extend(message.external_data)
                stack.extend(message.metadata_props)
            else:
                strings = []
                for field, value in message.ListFields():
                    if field.type == field.TYPE_MESSAGE:
                        stack.extend(value if field.is_repeated else [value])
                    elif field.type == field.TYPE_STRING:
                        strings.extend((field.name, one) for one in (value if field.is_repeated else [value]))
            for name, one in strings:
                if isinstance(one, bytes):
                    kind = message.DESCRIPTOR.name
                    self.fail(f"{kind}.{name} is not text: {shown(one)}", "UTF-8", "the file is damaged: copy it again")

    def imports(self, opsets: Iterable[onnx.OperatorSetIdProto], owner: str) -> dict[str, int]:
        versions: dict[str, int] = {}
        for opset in opsets:
            domain = _domain(opset.domain)
            if versions.setdefault(domain, opset.version) != opset.version:
                self.fail(f"{owner} imports domain {shown(opset.domain)} twice", "one version of each domain")
            if not 1 <= opset.version < 1 << 31:
                self.fail(f"{owner} imports version {opset.version} of domain {shown(opset.domain)}", "1 to 2**31")
        if not versions:
            self.fail(f"{owner} imports no operator set", f"an opset_import of at most {MAX_OPSET}")
        if versions.get("", 1) > MAX_OPSET:
            self.fail(f"{owner} uses opset {versions['']}", f"opset {MAX_OPSET} or lower", "export for an older opset")
        return versions

    # graphs -------------------------------------------------------------------------------------------------------

    def graph(
        self,
        graph: onnx.GraphProto,
        outer: list[set[str]],
        imports: dict[str, int],
        parameters: frozenset[str] | None = None,
    ) -> None:
        """One graph or subgraph. ``outer``: names visible from enclosing graphs; ``parameters``: of the function."""
        where = f"subgraph {shown(graph.name)}" if outer else "the graph"
        local: set[str] = set()
        for value in graph.input:
            self.define(value.name, local, outer, f"an input of {where}")
            self.value_type(value, typed=not outer, ranked=not outer)
        initialized: set[str] = set()
        for tensor in graph.initializer:
            if tensor.name in initialized:
                self.fail(f"{where} has two initializers {shown(tensor.name)}", "one value for each name")
            initialized.add(tensor.name)
            if tensor.name not in local:
                self.define(tensor.name, local, outer, f"an initializer of {where}")
            self.tensor(tensor, f"initializer {shown(tensor.name)}")
        if graph.sparse_initializer:
            self.fail(f"{where} has sparse initializers", "dense initializers", "export dense weights")
        for value in graph.value_info:
            self.value_type(value)
        self.nodes(graph.node, local, outer, imports, parameters, where)
        if not graph.output:
            self.fail(f"{where} has no outputs", "at least one output")
        self.outputs([value.name for value in graph.output], local, where)
        for value in graph.output:
            self.value_type(value, typed=not outer)

    def function(self, function: onnx.FunctionProto) -> None:
        where = f"function {shown(function.name)}"
        imports = self.imports(function.opset_import, where)
        names = [*function.attribute, *(attribute.name for attribute in function.attribute_proto)]
        self.unique(names, f"attributes of {where}")
        for attribute in function.attribute_proto:
            self.attribute(attribute, [], imports, None, where)
        local: set[str] = set()
        for name in function.input:
            self.define(name, local, [], f"an input of {where}")
        for value in function.value_info:
            self.value_type(value)
        self.nodes(function.node, local, [], imports, frozenset(names), where)
        self.outputs(function.output, local, where)

    def outputs(self, names: Sequence[str], local: set[str], where: str) -> None:
        self.unique(names, f"outputs of {where}")
        for name in names:
            if name not in local:
                self.fail(f"output {shown(name)} of {where} is computed by none of its nodes", "a defined value")

    def unique(self, names: Sequence[str], what: str) -> None:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or "" in names:
            self.fail(f"the {what} have the name {shown(twice[0] if twice else '')} twice or empty", "unique names")

    def define(self, name: str, local: set[str], outer: list[set[str]], what: str) -> None:
        if not name:
            self.fail(f"{what} has no name", "a name for every value")
        if name in local or any(name in names for names in outer):
            self.fail(f"the value name {shown(name)} is defined twice, the second time as {what}", "unique value names")
        local.add(name)

    def nodes(
        self,
        nodes: Sequence[onnx.NodeProto],
        local: set[str],
        outer: list[set[str]],
        imports: dict[str, int],
        parameters: frozenset[str] | None,
        where: str,
    ) -> None:
        for node in nodes:
            for name in node.input:
                if name and name not in local and not any(name in names for names in outer):
                    self.undefined(node, name, nodes, where)
            self.node(node, [*outer, local], imports, parameters)
            for name in node.output:
                if name:
                    self.define(name, local, outer, f"an output of {_describe(node)}")

    def undefined(self, node: onnx.NodeProto, name: str, nodes: Sequence[onnx.NodeProto], where: str) -> NoReturn:
        """Say which it is: a cycle, the wrong order, or a value that nothing defines."""
        producer = {output: index for index, one in enumerate(nodes) for output in one.output if output}
        found = f"{_describe(node)} uses {shown(name)}"
        if name not in producer:
            self.fail(f"{found}, which nothing in {where} defines", "every value defined before it is used")
        sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
        for index, one in enumerate(nodes):
            used = {value for inner in _all_nodes([one]) for value in inner.input}
            sorter.add(index, *(producer[value] for value in used if value in producer))
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            path = [_describe(nodes[index]) for index in error.args[1][:6]]
            self.fail(f"{where} has a cycle: {' -> '.join(path)}", "a graph without cycles")
        self.fail(f"{found} before {_describe(nodes[producer[name]])} defines it", "nodes in topological order")

    # nodes --------------------------------------------------------------------------------------------------------

    def node(
        self,
        node: onnx.NodeProto,
        scopes: list[set[str]],
        imports: dict[str, int],
        parameters: frozenset[str] | None,
    ) -> None:
        if not node.op_type:
            self.fail(f"{_describe(node)} has no operator", "an op_type for every node")
        self.unique([attribute.name for attribute in node.attribute], f"attributes of {_describe(node)}")
        for attribute in node.attribute:
            self.attribute(attribute, scopes, imports, parameters, _describe(node))
        domain = _domain(node.domain)
        called = self.functions.get((domain, node.op_type, node.overload))
        if called is None and domain not in (*_STANDARD, *EXTERNAL_SCHEMA_DOMAINS):
            self.unknown.append(_describe(node))
            return
        if domain not in imports:
            self.fail(
                f"{_describe(node)}: domain {shown(node.domain)} is not imported", "an opset_import of its domain"
            )
        if called is not None:
            if len(node.input) > len(called.input) or len(node.output) > len(called.output):
                self.fail(f"{_describe(node)} has more inputs or outputs than its function", "as the function declares")
        elif domain in _STANDARD:
            schema = _schema(node.op_type, imports[domain], domain)
            inlined = _schema(node.op_type, self.versions.get(domain, imports[domain]), domain)
            if schema and inlined and schema.since_version != inlined.since_version:
                self.fail(
                    f"{_describe(node)} means version {schema.since_version} in its function, but version "
                    f"{inlined.since_version} in the model",
                    "functions whose opset agrees with the model's",
                )
            if schema is None or schema.deprecated:
                self.unknown.append(f"{_describe(node)} (not in version {imports[domain]})")
            else:
                self.signature(node, schema)

    def signature(self, node: onnx.NodeProto, schema: Any) -> None:
        """Inputs, outputs and attributes of a standard operator, as its schema has them."""
        for kind, names, formal, low, high in (
            ("inputs", node.input, schema.inputs, schema.min_input, schema.max_input),
            ("outputs", node.output, schema.outputs, schema.min_output, schema.max_output),
        ):
            if not low <= len(names) <= high:
                self.fail(f"{_describe(node)} has {len(names)} {kind}", f"{low} to {high} {kind}")
            for name, parameter in zip(names, formal, strict=False):
                if not name and parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                    self.fail(f"{_describe(node)} lacks '{parameter.name}' among its {kind}", "a required value")
        for attribute in node.attribute:
            declared = schema.attributes.get(attribute.name)
            if declared is None:
                self.fail(f"{_describe(node)} has an unknown attribute {shown(attribute.name)}", "as ONNX declares")
            if int(declared.type.value) != attribute.type:
                self.fail(
                    f"{_describe(node)}: attribute {shown(attribute.name)} is of type "
                    f"{AttributeProto.AttributeType.Name(attribute.type)}",
                    declared.type.name,
                )
        present = {attribute.name for attribute in node.attribute}
        for name, declared in schema.attributes.items():
            if declared.required and name not in present:
                self.fail(f"{_describe(node)} lacks its attribute '{name}'", "a required attribute")

    def attribute(
        self,
        attribute: onnx.AttributeProto,
        scopes: list[set[str]],
        imports: dict[str, int],
        parameters: frozenset[str] | None,
        where: str,
    ) -> None:
        what = f"attribute {shown(attribute.name)} of {where}"
        wanted = _ATTRIBUTE_FIELD.get(attribute.type)
        if wanted is None:
            kind = AttributeProto.AttributeType.Name(attribute.type)
            self.fail(f"{what} is of type {kind}", "a scalar, list, dense tensor, graph or type")
        others = {field.name for field, _ in attribute.ListFields()}
        others -= {"name", "type", "doc_string", "ref_attr_name", wanted}
        if others:
            self.fail(f"{what} also holds {', '.join(sorted(others))}", "one value, of the declared type")
        if attribute.ref_attr_name:
            if parameters is None or attribute.ref_attr_name not in parameters:
                self.fail(
                    f"{what} refers to the unknown {shown(attribute.ref_attr_name)}", "an attribute of a function"
                )
            return
        if wanted in ("f", "i", "s", "t", "g", "tp") and not attribute.HasField(wanted):
            self.fail(f"{what} has no value", f"a value in field '{wanted}'")
        for tensor in [attribute.t] if wanted == "t" else attribute.tensors:
            self.tensor(tensor, what)
        for graph in [attribute.g] if wanted == "g" else attribute.graphs:
            self.graph(graph, scopes, imports, parameters)
        for one in [attribute.tp] if wanted == "tp" else attribute.type_protos:
            self.type(one, what)

    def expansion(self) -> None:
        """No function calls itself, and inlining all of them stays below MAX_NODES."""
        calls: dict[object, Counter[object]] = {}
        sizes: dict[object, int] = {}
        bodies: list[tuple[object, Sequence[onnx.NodeProto]]] = [(None, self.proto.graph.node)]
        bodies += [(key, function.node) for key, function in self.functions.items()]
        for key, nodes in bodies:
            names = [(_domain(node.domain), node.op_type, node.overload) for node in _all_nodes(nodes)]
            calls[key] = Counter(name for name in names if name in self.functions)
            sizes[key] = len(names)
        try:
            order = list(graphlib.TopologicalSorter(calls).static_order())
        except graphlib.CycleError as error:
            path = [f"{key[0]}::{key[1]}" for key in error.args[1][:6]]
            self.fail(f"functions call themselves: {' -> '.join(path)}", "functions without recursion")
        for key in order:
            sizes[key] += sum(count * sizes[called] for called, count in calls[key].items())
            if sizes[key] > MAX_NODES:
                self.fail("inlining the functions gives more than a million nodes", f"at most {MAX_NODES} nodes")
