"""Plans of the full TensorRT, with our kernels embedded: what a build needs, and the build.

A build needs TensorRT, Triton and a GPU of the compute capability that the graph was lowered for; ``missing`` says what
of that is not there. Everything up to the build (``trtpass.trt.lower``, ``kernels_of``) runs without them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from plugins import all_ops, kernel_ops
from trtpass.doctor import gpus
from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.op import DOMAIN
from trtpass.plan_process import PlanReport, Profile, Progress, plain, run
from trtpass.ptx import Compiled, compile_ahead
from trtpass.rtx import precheck
from trtpass.staging import replacing
from trtpass.trt.lower import CC_KEY, DTYPE_KEY, faults, plugin_nodes
from trtpass.trt.plugins import decode, encode, usable, ways

LIBRARY = "tensorrt"
INSTEAD = "use TARGET=tensorrt-rtx (a plan without our kernels, built without a GPU) or TARGET=cpu"
OLDEST = (10, 15)  # 10.14 cannot build quick-deployable plugins ahead of time


def installed() -> str | None:
    """The version of TensorRT, or None; it is not imported."""
    if importlib.util.find_spec("tensorrt") is None:
        return None
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def missing(cc: int | None = None) -> list[str]:
    """What a build with plugins for compute capability ``cc`` (None: any) lacks on this machine, in words."""
    found = []
    version = installed()
    if version is None:
        found.append(f"TensorRT {OLDEST[0]}.{OLDEST[1]} or newer is not installed (pip install tensorrt)")
    elif version != "unknown" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        found.append(f"TensorRT {version} is older than {OLDEST[0]}.{OLDEST[1]}, the first that embeds these plugins")
    if importlib.util.find_spec("triton") is None:
        found.append("triton is not installed (pip install 'trtpass[kernels]')")
    devices = gpus()
    if isinstance(devices, str):
        found.append(devices)
    elif cc is not None and not any(sm == cc for _, sm in devices):
        found.append(f"no GPU here is SM{cc}: there is {', '.join(f'{name} (SM{sm})' for name, sm in devices)}")
    return found


def fingerprint() -> str:
    """A hash of everything that decides what machine code a kernel becomes.

    TensorRT asks a quick-deployable plugin for a timing-cache key and gets an empty one from NVIDIA's Python layer: two
    versions of a kernel would share timings. So a timing cache of ours is one file for each of these hashes.
    """
    root = Path(__file__).resolve().parent.parent
    folders = [root.parent / "plugins" / folder for folder in sorted({op.folder for op in all_ops().values()})]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    files += sorted((root.parent / "plugins").glob("_triton*.py"))
    files += [root / name for name in ("kernel.py", "launch.py", "op.py", "ptx.py", "trt/plugins.py")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(importlib.metadata.version("triton").encode())
    return digest.hexdigest()[:16]


def timing_cache(folder: Path, cc: int) -> Path:
    """The file of timings for this TensorRT, this GPU and these kernels, in ``folder``."""
    devices = gpus()
    name = "none" if isinstance(devices, str) else next((name for name, sm in devices if sm == cc), "none")
    key = f"{installed()}\0{name}\0{cc}\0{fingerprint()}"
    return folder / f"timing.{hashlib.sha256(key.encode()).hexdigest()[:16]}.cache"


def kernels_of(model: ir.Model) -> list[Compiled]:
    """The machine code of every plugin node of a lowered graph, each tactic once, compiled here.

    Raises:
        InputError: a node that is not as declared, or a kernel that does not compile.
    """
    if problems := faults(model):
        raise InputError(f"the graph is not fit for TensorRT: {'; '.join(problems)}", fix="lower it again")
    cc, dtype = int(model.metadata_props[CC_KEY]), model.metadata_props[DTYPE_KEY]
    made: dict[tuple[object, ...], Compiled] = {}
    for node in plugin_nodes(model):
        op = kernel_ops()[node.op_type]
        attrs = decode(op, {n: a.value for n, a in node.attributes.items() if n in encode(op, {})})
        sizes = op.bind([[s if isinstance(s, int) else str(s) for s in dims(v) or []] for v in node.inputs])
        for number in usable(op, sizes, attrs, dtype, cc):
            kernel, tactic = ways(op)[int(number) - 1]
            known = {name: sizes[name] for name in kernel.fixed}
            key = (op.name, number, *known.items(), *attrs.items())
            if key not in made:
                made[key] = compile_ahead(op, kernel, known, attrs, dtype, cc, tactic)
    return list(made.values())


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    *,
    profiles: Sequence[Profile],
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PlanReport:
    """Build one plan whose kernels are embedded, and write it whole or not at all.

    Args:
        onnx_path: a graph made by ``trtpass.trt.lower.lower`` and saved.
        plan_path: the file to write.
        profiles: ``(min, opt, max)`` shapes of each dynamic input; a plan may have several profiles.
        cache: folder of timing caches; None uses none.
        progress: called with a phase's name and the done fraction of it, 0 to 1.

    Raises:
        InputError: what ``missing`` says, an unreadable file, operators that the parser does not take, an input that
            it leaves unused, a profile that does not fit, a failed build, or a full disk.
    """
    model = ir.load(onnx_path)
    cc = int(model.metadata_props.get(CC_KEY, 0))
    if lacking := missing(cc):
        raise InputError(f"a TensorRT plan cannot be built here: {'; '.join(lacking)}", fix=INSTEAD)
    names = sorted({node.op_type for node in plugin_nodes(model)})
    size = precheck(onnx_path, frozenset((DOMAIN, name) for name in names))
    with replacing(plan_path, size) as handle:
        request = {
            "onnx": str(onnx_path.resolve()),
            "descriptor": handle.fileno(),
            "compute_capabilities": [],
            "profiles": [plain(profile) for profile in profiles],
            "decompose": False,
            "plugins": names,
            "cc": cc,
            "aliased": aliased(names),
            "timing_cache": str(timing_cache(cache, cc)) if cache is not None else "",
        }
        result = run(LIBRARY, request, progress)
    return PlanReport(path=str(plan_path), compute_capabilities=(f"SM{cc}",), decomposed=False, **result)


def aliased(names: Iterable[str]) -> bool:
    """Whether any of these operators writes into an input's memory, which TensorRT must be told."""
    return any(kernel_ops()[name].aliases for name in names)
