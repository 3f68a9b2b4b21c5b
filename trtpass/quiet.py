"""Keep what libraries print and warn about off the user's terminal, and at hand for a failure."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_NOISY = ("torch", "torch.onnx", "transformers", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Collect Python-level output, warnings and log records of the noisy libraries in the buffer that is yielded.

    Output of native code and log records of everything else pass. Not for use in several threads at once.
    """
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    kept: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
    for name in _NOISY:
        logger = logging.getLogger(name)
        kept.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers[:], logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, handlers, propagate in kept:
            logger.handlers[:], logger.propagate = handlers, propagate
