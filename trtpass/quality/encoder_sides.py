"""An encoder before and after passes, ready to run on ONNX Runtime's CPU provider, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trtpass import io, passes
from trtpass.anchors import find
from trtpass.encoder_checks import reducing
from trtpass.encoder_engine import EncoderEngine
from trtpass.errors import InputError
from trtpass.ir import dims
from trtpass.passes import Pass
from trtpass.quality.encoder_metrics import kept_fraction
from trtpass.runtime import ENGINE
from trtpass.variants import expose

_DENSE = "dense.onnx"


@dataclass(frozen=True)
class Seen:
    """One run.

    Args:
        outputs: of the graph, by name.
        kept: tokens carried, mean over the blocks, as a share of all.
        last: tokens after the last site.
        owner: int32 `[B, N]`, place of each original token in the stream after the last site, -1 where it was dropped;
            None where nothing was reduced.
    """

    outputs: dict[str, np.ndarray]
    kept: float
    last: int
    owner: np.ndarray | None


class Side:
    """A graph after passes, as rewritten: the ONNX bodies of its operators, which an engine equals (check ``engine``).

    Args:
        dense: canonical, its weights in a file; it is not changed.
        steps: passes, at most one of them a reduction; none for the dense side.
        threads: of one operator; None leaves the choice to ONNX Runtime.

    Raises:
        InputError, AnchorError: a pass does not fit the graph.
    """

    def __init__(self, dense: ir.Model, steps: Sequence[Pass], threads: int | None = None) -> None:
        graph = dense.clone()
        blocks = find(graph).blocks
        self.layers, self.width = len(blocks), _tokens(blocks[0].residual_in if blocks else None)
        self.names = [str(value.name) for value in graph.graph.outputs]
        self.sites = reducing(passes.run(graph, steps))
        expose(graph, [site.values[role] for site in self.sites for role in ("tokens", "owner")])
        self._engine = EncoderEngine.open({ENGINE: graph}, threads=threads)

    def run(self, feed: Mapping[str, np.ndarray]) -> Seen:
        """Run one row: ``feed`` has a batch of 1, so that no token is counted that only pads a shorter row.

        Raises:
            InputError: inputs that do not fit the graph, or more than one row.
        """
        wide = [name for name, array in feed.items() if len(array) != 1]
        if wide:
            raise InputError(f"'{wide[0]}' has {len(feed[wide[0]])} rows", "one row at a time")
        made = self._engine.run(feed)
        outputs = {name: made[name] for name in self.names}
        if not self.sites:
            return Seen(outputs, 1.0, self.width, None)
        after = {site.layer: made[site.values["tokens"]].shape[1] for site in self.sites}
        last = self.sites[-1]
        return Seen(
            outputs, kept_fraction(self.width, after, self.layers), after[last.layer], made[last.values["owner"]]
        )


def store(model: ir.Model, folder: Path) -> ir.Model:
    """The model with its weights in a file of ``folder``, which every side of it then shares."""
    io.save(model, folder / _DENSE, weights="weights.bin")
    return io.load(folder / _DENSE)


def _tokens(stream: ir.Value | None) -> int:
    shape = dims(stream)
    if shape is None or len(shape) != 3 or not isinstance(shape[1], int):
        raise InputError("an encoder whose number of tokens is not fixed", "a fixed number of tokens")
    return shape[1]
