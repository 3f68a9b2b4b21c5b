"""The target ``tensorrt-rtx``: strongly typed float16 plans, built ahead of time on a machine without a GPU.

``lower`` makes a graph that TensorRT-RTX reads rightly, ``build_plan`` builds it in a process of its own. A plan
runs only on a GPU of a compute capability that it was built for; nothing here executes one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from trtpass.doctor import gpus
from trtpass.errors import InputError
from trtpass.ir import check, drop_idle_inputs, tidy
from trtpass.op import DOMAIN
from trtpass.passes.explicit_masks import NONPAD, explicit_masks
from trtpass.passes.fresh_cache import concat_fresh_cache
from trtpass.passes.mask_types import mask_types
from trtpass.passes.turing import products_as_sums
from trtpass.plan_process import PlanReport, Profile, Progress, plain
from trtpass.plan_process import run as _run
from trtpass.staging import replacing

LIBRARY = "tensorrt_rtx"
SMS = ("SM75", "SM80", "SM86", "SM89", "SM120")
OFFERED = (*SMS, "SM121", "CURRENT")
INSTALL = "pip install 'trtpass[rtx]' (tensorrt-rtx-cu13, Linux x86-64 or Windows)"
_UNSUPPORTED = {
    "NonZero": "its length depends on data",
    "Scan": "use Loop",
}

__all__ = ["OFFERED", "SMS", "PlanReport", "Profile", "available", "build_plan", "explicit_masks", "lower"]


def available() -> bool:
    """Whether the package is installed (it is not imported)."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def lower(model: ir.Model, compute_capabilities: Sequence[str] = SMS, dtype: str = "float16") -> ir.Model:
    """A copy of a prefill, decode or stateless graph for TensorRT-RTX: static bodies, halves, explicit masks.

    Inputs that the graph does not use are dropped, and named in the metadata ``trtpass.dropped_inputs``.

    Args:
        model: canonical, with trtpass nodes or without; it is not changed, and the copy reads its weights lazily.
        compute_capabilities: those to build for; SM75 needs float32 products in another form.
        dtype: ``float16``, or ``bfloat16``, which SM75 does not have.

    Raises:
        InputError: an operator without a static body, a symbolic cache, types that cannot become float16, or bfloat16
            for SM75.
    """
    from plugins import all_ops
    from trtpass.passes.lower import inline_bodies
    from trtpass.passes.precision import to_half

    if dtype == "bfloat16" and _has_turing(compute_capabilities):
        raise InputError("bfloat16 for SM75, which does not have it", "SM80 or newer", "give SM=, or dtype float16")
    copy = model.clone()
    for identifier in [i for i in copy.functions if i[0] == DOMAIN and i[1] in all_ops()]:
        del copy.functions[identifier]  # a rewritten graph carries dynamic bodies; inlining attaches the static ones
    inline_bodies(copy, "static")
    to_half(copy, ir.DataType[dtype.upper()])
    mask_types(copy)
    explicit_masks(copy)
    concat_fresh_cache(copy)
    if _has_turing(compute_capabilities):
        products_as_sums(copy)
    tidy(copy)
    drop_idle_inputs(copy)
    copy.metadata_props["trtpass.target"] = "tensorrt-rtx"
    check(copy, "the graph lowered to 'tensorrt-rtx'")
    return copy


def _has_turing(compute_capabilities: Sequence[str]) -> bool:
    if "CURRENT" in compute_capabilities:
        found = gpus()
        return not isinstance(found, str) and any(sm == 75 for _, sm in found)
    return "SM75" in compute_capabilities


def build_plan(
    onnx_path: str | Path,
    plan_path: str | Path,
    *,
    compute_capabilities: Sequence[str] = SMS,
    profile: Profile,
    progress: Progress | None = None,
) -> PlanReport:
    """Build one plan for all given compute capabilities, and write it whole or not at all.

    Attention gets TensorRT's fused kernels; if the builder has none for a type or width, it is built once more with
    attention decomposed, and the report says so.

    Args:
        onnx_path: a graph made by ``lower`` and saved.
        plan_path: the file to write.
        compute_capabilities: of ``OFFERED``; CURRENT needs a GPU in this machine.
        profile: ``(min, opt, max)`` shapes of each dynamic input.
        progress: called with a phase's name and the done fraction of it, 0 to 1.

    Raises:
        InputError: package missing, unknown capability, unreadable file, operators that the parser does not take, an
            input that it leaves unused, a profile that does not fit, a failed build, or a full disk.
    """
    source, target = Path(onnx_path), Path(plan_path)
    if not available():
        raise InputError("the package tensorrt-rtx is not installed", "Python package tensorrt_rtx", INSTALL)
    unknown = [name for name in compute_capabilities if name not in OFFERED]
    if unknown or not compute_capabilities or len(set(compute_capabilities)) != len(compute_capabilities):
        raise InputError(
            f"compute capabilities {', '.join(compute_capabilities) or 'none'}",
            f"some of {', '.join(OFFERED)}, each once",
        )
    size = precheck(source)
    with replacing(target, size) as handle:
        request = {
            "onnx": str(source.resolve()),
            "descriptor": handle.fileno(),
            "compute_capabilities": list(compute_capabilities),
            "profiles": [plain(profile)],
            "decompose": False,
            "plugins": [],
            "aliased": False,
            "timing_cache": "",
        }
        try:
            result = _run(LIBRARY, request, progress)
        except InputError as error:
            if "is_decomposable" not in error.found:
                raise
            handle.seek(0)
            handle.truncate()
            request["decompose"] = True
            result = _run(LIBRARY, request, progress)
    return PlanReport(
        path=str(target),
        compute_capabilities=tuple(compute_capabilities),
        decomposed=bool(request["decompose"]),
        **result,
    )


def precheck(path: Path, plugins: frozenset[tuple[str, str]] = frozenset()) -> int:
    """Refuse what the parser would misread or abort on; returns the bytes of the model with its external weights.

    ``plugins`` are operators ``(domain, name)`` without a body that the builder has; TensorRT-RTX has none.

    Raises:
        InputError: not an ONNX file, nodes of a domain that is neither standard nor a function of the model, valid
            lengths inside Attention, or a cache of symbolic length; all findings in one message.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} cannot be read as ONNX: {error}", "an ONNX file") from error
    functions = {(f.domain, f.name) for f in model.functions} | plugins
    shapes = {v.name: v for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    found: dict[str, list[str]] = {}
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            reason = _refused(node, functions, shapes)
            if reason:
                found.setdefault(reason, []).append(node.name or node.output[0])
    if found:
        parts = [f"{reason}: {_some(names)}" for reason, names in found.items()]
        raise InputError(
            f"{'TensorRT' if plugins else 'TensorRT-RTX'} cannot build {path}: {'; '.join(parts)}",
            "standard operators over a cache of fixed capacity, with explicit masks",
            "lower the graph for this target before the build",
        )
    return path.stat().st_size + sum(f.stat().st_size for f in _external_files(model, path.parent) if f.exists())


def _refused(node: onnx.NodeProto, functions: set[tuple[str, str]], shapes: Mapping[str, Any]) -> str:
    """Why this node would be misread, or an empty string."""
    if (node.domain, node.op_type) in functions:
        return ""
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}::{node.op_type} is not standard, has no body, and is no plugin of this build"
    if node.op_type in _UNSUPPORTED:
        return f"{node.op_type} is not supported ({_UNSUPPORTED[node.op_type]})"
    inputs = [bool(name) for name in node.input]
    if node.op_type == "Attention" and len(inputs) > NONPAD and inputs[NONPAD]:
        return "Attention has nonpad_kv_seqlen, which the parser silently ignores"
    if node.op_type == "Attention" and any(inputs[4:NONPAD]):
        return "Attention reads past_key or past_value"
    if node.op_type == "TensorScatter" and (info := shapes.get(node.input[0])) is not None:
        axis = next((a.i for a in node.attribute if a.name == "axis"), -2)
        dimension = info.type.tensor_type.shape.dim[axis]
        if not dimension.HasField("dim_value"):
            return f"TensorScatter over a cache of symbolic length '{dimension.dim_param}'"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _external_files(model: onnx.ModelProto, folder: Path) -> Iterator[Path]:
    names = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return (folder / name for name in sorted(names))
