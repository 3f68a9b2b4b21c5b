"""A plan on a GPU, with torch holding its memory: for tests and benchmarks. Serving does without Python."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtpass.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = "cuda"
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


class Runner:
    """One execution context of a plan.

    Args:
        plan: the file.
        library: ``tensorrt`` or ``tensorrt_rtx``, whichever built it.
        profile: which of its optimisation profiles to use.

    Raises:
        InputError: the plan does not load on this GPU.
    """

    def __init__(self, plan: Path, library: str = "tensorrt", profile: int = 0) -> None:
        import torch

        trt: Any = importlib.import_module(library)
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise InputError(
                f"'{plan}' does not load", "a plan of this library version and for this GPU", "build again"
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        if profile:
            self.context.set_optimization_profile_async(profile, self.stream.cuda_stream)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.kept: dict[str, Tensor] = {}

    def dtype(self, name: str) -> Any:
        """The torch dtype of an input or output."""
        import torch

        kind = str(self.engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]
        return getattr(torch, TYPES[kind])

    def bind(self, feeds: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """Set all addresses; returns the outputs, poisoned, or the input's own memory where ``aliases`` says so.

        Args:
            feeds: inputs by name, converted to the plan's dtype and copied to the GPU where they are not there.
            aliases: outputs that share memory with an input, by name.

        Raises:
            InputError: an input is missing, or a shape is outside the profile.
        """
        import torch

        if missing := [name for name in self.inputs if name not in feeds]:
            raise InputError(f"the plan's inputs {', '.join(missing)} are missing", ", ".join(self.inputs))
        for name in self.inputs:
            tensor = feeds[name].to(device=DEVICE, dtype=self.dtype(name)).contiguous()
            self.kept[name] = tensor
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(f"input '{name}' of shape {list(tensor.shape)}", "a shape of the profile")
            self.context.set_tensor_address(name, tensor.data_ptr())
        made = {}
        for name in self.outputs:
            if source := (aliases or {}).get(name):
                made[name] = self.kept[source]
            else:
                shape, dtype = tuple(self.context.get_tensor_shape(name)), self.dtype(name)
                poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
                made[name] = torch.full(shape, poison, dtype=dtype, device=DEVICE)
            self.context.set_tensor_address(name, made[name].data_ptr())
        self.kept.update(made)
        torch.cuda.synchronize()
        return made

    def run(self) -> None:
        """Enqueue once on ``stream``; the caller synchronises.

        Raises:
            InputError: TensorRT refuses to run.
        """
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise InputError("the plan did not start", "all addresses bound and shapes within the profile")


def execute(
    plan: Path, feeds: Mapping[str, Tensor], library: str = "tensorrt", aliases: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """One run of a plan: its outputs, on the CPU."""
    runner = Runner(plan, library)
    made = runner.bind(feeds, aliases)
    runner.run()
    runner.stream.synchronize()
    return {name: tensor.cpu() for name, tensor in made.items()}


def milliseconds(runners: Sequence[Runner], repeats: int, warmup: int = 10) -> list[list[float]]:
    """Times of bound plans in milliseconds, by CUDA events, the plans taking turns: one list for each."""
    import torch

    for runner in runners:
        for _ in range(warmup):
            runner.run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(repeats):
        for runner, mine in zip(runners, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(runner.stream)
            runner.run()
            end.record(runner.stream)
            end.synchronize()
            mine.append(start.elapsed_time(end))
    return times
