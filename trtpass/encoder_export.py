"""Export of encoders and of multimodal models: any PyTorch module with tensors in and tensors out, batch dynamic."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from trtpass.canonicalize import canonicalize
from trtpass.errors import InputError
from trtpass.export import OPSET, ROOT, attach, finish
from trtpass.quiet import quiet

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def export_encoder(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    outputs: Sequence[str] = ("last_hidden_state",),
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> ir.Model:
    """Export a module and raise it to canonical form, opset 24.

    Initializers carry the names of the module's parameters and are views of its memory: keep the module unchanged until
    the model is saved.

    Args:
        module: in eval mode, float32, with scaled-dot-product attention.
        inputs: examples by the names of the arguments of ``module.forward``, of sizes other than 0 and 1 where they are
            dynamic.
        outputs: names of the graph's outputs, which are fields of what the module returns; a module that returns a
            tensor has one output.
        dynamic: for each input, axis -> name of its size; the first axis of each, ``batch``, where not given.

    Raises:
        InputError: the module is in training mode, or PyTorch cannot trace it.
    """
    if module.training:
        raise InputError("the module is in training mode", "eval mode", "call module.eval() before exporting")
    model = _trace(module, inputs, outputs, dynamic or {name: {0: "batch"} for name in inputs})
    finish(model, module)
    attach(model, module)
    canonicalize(model)
    return model


def _trace(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> ir.Model:
    import torch

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(ROOT, module)

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result: Any = getattr(self, ROOT)(**dict(zip(inputs, tensors, strict=True)))
            if isinstance(result, torch.Tensor):
                return (result,)
            return tuple(getattr(result, name) for name in outputs)

    program = None
    with quiet() as said:
        try:
            program = torch.onnx.export(
                Traced().eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes={"tensors": tuple(dict(dynamic.get(name, {})) for name in inputs)},
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises anything; the cause is chained
            log.debug("torch.onnx.export said:\n%s", said.getvalue())
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"PyTorch cannot export {type(module).__name__}: {reason}", "a module that torch.export can trace"
            ) from error
    if program is None:
        raise InputError(f"PyTorch returned no graph for {type(module).__name__}")
    return program.model
