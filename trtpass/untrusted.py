"""Whether an ONNX protobuf from an untrusted file may be handed to onnx-ir, ONNX Runtime and TensorRT.

Those libraries assume a well-formed model: given a broken one they ignore the fault (onnx-ir drops a duplicate name),
raise something unrelated, or crash the process. Everything they rely on is therefore checked here first, in Python, in
time and memory linear in the size of the protobuf: structure, names, scopes, operators, attributes, tensor sizes,
external data, functions. Weights are never read.

Not checked: dtype and shape agreement between nodes (shape inference and the target report these) and weight values.
"""

from __future__ import annotations

import graphlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto

from trtpass.errors import InputError

IR_VERSIONS = (3, 13)  # ONNX Runtime 1.31 reads no later one
MAX_OPSET = 26
EXTERNAL_SCHEMA_DOMAINS = ("trtpass", "com.microsoft")  # operators without an onnx schema that are known here
MAX_RANK = 32  # numpy 1's limit
MAX_ELEMENTS = 1 << 48
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
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_TYPED_FIELD = {
    "FLOAT": "float_data",
    "COMPLEX64": "float_data",
    "DOUBLE": "double_data",
    "COMPLEX128": "double_data",
    "INT64": "int64_data",
    "UINT32": "uint64_data",
    "UINT64": "uint64_data",
    "STRING": "string_data",
}  # every other type is stored in int32_data


def shown(name: object) -> str:
    """A name from the file as it may be printed: escaped, shortened."""
    text = repr(name)
    return text if len(text) <= 80 else text[:76] + "..." + text[-1]


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


class Checker:
    """Checks one model; ``check`` returns or raises InputError. Recursion is as deep as subgraphs are nested, which
    protobuf's own limit of 100 nested messages keeps below 35.

    Args:
        proto: the parsed model; its text fields may still be bytes (invalid UTF-8).
        file: where it came from; external data must lie in this file's folder.
    """

    def __init__(self, proto: onnx.ModelProto, file: Path) -> None:
        self.proto, self.file = proto, file
        self.folder = os.path.realpath(file.parent)
        self.functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
        self.unknown: list[str] = []
        self.data_sizes: dict[str, int] = {}

    def fail(self, found: str, expected: str = "", fix: str = "") -> NoReturn:
        raise InputError(f"{self.file}: {found}", expected, fix or "export the model again, or repair the file")

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
        imports = self.imports(proto.opset_import, "the model")
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
                        stack.extend([value] if isinstance(value, Message) else value)
                    elif field.type == field.TYPE_STRING:
                        values = [value] if isinstance(value, str | bytes) else value
                        strings.extend((field.name, one) for one in values)
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
            if opset.version < 1:
                self.fail(f"{owner} imports version {opset.version} of domain {shown(opset.domain)}", "1 or more")
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
            self.value_type(value, required=not outer)
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
            self.value_type(value, required=not outer)

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

    # values -------------------------------------------------------------------------------------------------------

    def value_type(self, value: onnx.ValueInfoProto, required: bool = False) -> None:
        what = f"value {shown(value.name)}"
        if value.HasField("type") and value.type.WhichOneof("value") is not None:
            self.type(value.type, what)
        elif required:
            self.fail(f"{what} has no type", "a type for every input and output of the graph")

    def type(self, proto: onnx.TypeProto, what: str) -> None:
        kind = proto.WhichOneof("value")
        if kind == "sequence_type":
            self.type(proto.sequence_type.elem_type, what)
        elif kind == "optional_type":
            self.type(proto.optional_type.elem_type, what)
        elif kind != "tensor_type":
            self.fail(f"{what} is of type {kind}", "a tensor, sequence or optional")
        else:
            self.element_type(proto.tensor_type.elem_type, what)
            if len(proto.tensor_type.shape.dim) > MAX_RANK:
                self.fail(f"{what} has {len(proto.tensor_type.shape.dim)} dimensions", f"at most {MAX_RANK}")
            for dim in proto.tensor_type.shape.dim:
                if not 0 <= dim.dim_value <= MAX_ELEMENTS:
                    self.fail(f"{what} has a dimension of {dim.dim_value}", f"0 to {MAX_ELEMENTS}, or a name")

    def element_type(self, number: int, what: str) -> ir.DataType:
        if number == TensorProto.UNDEFINED or number not in TensorProto.DataType.values():
            self.fail(f"{what} has element type {number}", "an element type of ONNX")
        return ir.DataType(number)

    def tensor(self, tensor: onnx.TensorProto, what: str) -> None:
        """The bytes present are those that dims and type ask for; external data lies inside the folder."""
        dtype = self.element_type(tensor.data_type, what)
        dims = list(tensor.dims)
        shape = f"{dtype.name} {dims[:8]}"
        if len(dims) > MAX_RANK or any(dim < 0 for dim in dims) or prod(max(dim, 1) for dim in dims) > MAX_ELEMENTS:
            self.fail(
                f"{what} has shape {shape}", f"at most {MAX_RANK} non-negative sizes, {MAX_ELEMENTS} elements in all"
            )
        if tensor.HasField("segment"):
            self.fail(f"{what} is stored in segments", "whole tensors")
        text = dtype == ir.DataType.STRING
        size = prod(dims)
        needed = 0 if text else (size * dtype.bitwidth + 7) // 8
        held = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
        held += ["raw_data"] if tensor.HasField("raw_data") else []
        if tensor.data_location == TensorProto.EXTERNAL:
            if held or text:
                self.fail(f"{what} is external but also holds {', '.join(held) or 'text'}", "one place for its data")
            self.external(tensor, needed, what)
            return
        if len(held) > 1 or tensor.external_data:
            self.fail(f"{what} holds data in several places ({', '.join(held)})", "one place for its data")
        if held == ["raw_data"] and not text:
            if len(tensor.raw_data) != needed:
                self.fail(f"{what} holds {len(tensor.raw_data)} bytes", f"{needed} bytes for {shape}")
            return
        field = _TYPED_FIELD.get(dtype.name, "int32_data")
        count = (size * dtype.bitwidth + 7) // 8 if not text and dtype.bitwidth in (2, 4) else size
        count *= 2 if dtype.name.startswith("COMPLEX") else 1
        if held not in ([], [field]) or len(getattr(tensor, field)) != count:
            amount = ", ".join(f"{len(getattr(tensor, name))} entries in {name}" for name in held) or "no data"
            self.fail(f"{what} holds {amount}", f"{count} entries in {field} for {shape}")

    # external data ------------------------------------------------------------------------------------------------

    def external(self, tensor: onnx.TensorProto, needed: int, what: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data) or not entries.get("location"):
            self.fail(f"{what} is external but does not say where, or says it twice", "one location")
        numbers = {}
        for key in ("offset", "length"):
            text = entries.get(key, "0" if key == "offset" else str(needed))
            if not (text.isascii() and text.isdigit() and len(text) <= 19):
                self.fail(f"{what} has {key} {shown(text)}", "a number of bytes, 0 or more")
            numbers[key] = int(text)
        if numbers["length"] != needed:
            self.fail(f"{what} has {numbers['length']} external bytes", f"{needed} for {list(tensor.dims)[:8]}")
        location = entries["location"]
        if location not in self.data_sizes:
            self.data_sizes[location] = self.data_size(location, what)
        size, end = self.data_sizes[location], numbers["offset"] + needed
        if end > size:
            self.fail(
                f"{what} ends at byte {end} of {shown(location)}, which has {size} bytes",
                "a data file that holds every tensor",
                "the data file is truncated or belongs to another model: copy it again",
            )

    def data_size(self, location: str, what: str) -> int:
        """Size in bytes of a data file that is a regular file inside the model's folder."""
        pure = PurePosixPath(location)
        inside = "a data file inside the model's folder"
        if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(location).anchor or "\0" in location:
            self.fail(f"{what} keeps its data in {shown(location)}", inside)
        path = os.path.realpath(f"{self.folder}/{location}")
        if os.path.commonpath([path, self.folder]) != self.folder:
            self.fail(
                f"{what} keeps its data in {shown(location)}, a link that leads out of the folder",
                inside,
                "copy the model with its data, following links (cp -rL)",
            )
        try:
            info = Path(path).stat()
        except OSError as error:
            self.fail(
                f"{what} keeps its data in {shown(location)}, which cannot be read ({error.strerror})",
                inside,
                "put the data file beside the model",
            )
        if not stat.S_ISREG(info.st_mode):
            self.fail(f"{what} keeps its data in {shown(location)}, which is not a file", inside)
        if info.st_nlink > 1:  # onnx-ir refuses to read these, later and less clearly
            self.fail(f"{what}: {shown(location)} has hard links elsewhere", inside, "copy the file (cp)")
        return info.st_size
