"""The batch that fits an engine's cache."""

from __future__ import annotations

from trtpass.encoder_engine import EncoderEngine
from trtpass.errors import InputError
from trtpass.paged import PagedEngine
from trtpass.runtime import Engine
from trtpass.serving.batch import Batch
from trtpass.serving.paged_batch import PagedBatch
from trtpass.serving.request import Limits
from trtpass.serving.static_batch import StaticBatch


def open_batch(engine: Engine, limits: Limits) -> Batch:
    """An empty batch.

    Raises:
        InputError: an encoder, another provider than the CPU's, or limits that this machine or engine cannot keep.
    """
    if isinstance(engine, EncoderEngine):
        raise InputError("an encoder, which has no rows to go on with", "the engine of a decoder")
    return PagedBatch(engine, limits) if isinstance(engine, PagedEngine) else StaticBatch(engine, limits)
