"""Running the engine of an encoder on ONNX Runtime: one graph, named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trtpass.encoder_inputs import Port, checked, words
from trtpass.errors import InputError
from trtpass.runtime import ENGINE, Engine
from trtpass.sessions import Source, open_session, provider_name


class EncoderEngine(Engine):
    """The one graph of an encoder, opened on one provider.

    Attributes:
        ports: of each input, by name and in the order of the graph.
        made: of each output.
        provider: ONNX Runtime's name of it.
    """

    def __init__(self, source: Source, provider: str, threads: int | None = None) -> None:
        self.provider = provider
        self._source, self._threads = source, threads
        session = open_session(source, provider, threads)
        self._by_names: dict[tuple[str, ...], Any] = {(): session}
        self.ports = {item.name: _port(item) for item in session.get_inputs()}
        self.made = {item.name: _port(item) for item in session.get_outputs()}

    @classmethod
    def open(
        cls,
        source: str | Path | Mapping[str, Source],
        provider: str = "cpu",
        threads: int | None = None,
        context: int | None = None,
    ) -> EncoderEngine:
        """Open an engine folder (``engine.onnx``), or ``{"engine": graph or path}``.

        Args:
            source: a folder, or the graph by its name.
            provider: ``cpu``, ``cuda``, ...; it is an error if ONNX Runtime falls back to another.
            threads: threads of one operator; None leaves the choice to ONNX Runtime.
            context: of no meaning here; None.

        Raises:
            InputError: no such graph, or a provider that is not there.
        """
        graphs = source if isinstance(source, Mapping) else {ENGINE: Path(source) / f"{ENGINE}.onnx"}
        graph = graphs.get(ENGINE)
        if graph is None or (isinstance(graph, Path) and not graph.is_file()):
            raise InputError(
                f"there is no {graph or ENGINE + '.onnx'}",
                "the folder of an encoder's engine for ONNX Runtime",
                "build one with TARGET=cpu; a decoder is opened with Engine.open",
            )
        return cls(graph, provider_name(provider), threads)

    def run(self, feed: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Run the graph once.

        Args:
            feed: an array for every input, of its dtype and shape; symbolic sizes are free, but the same everywhere.
            names: values inside the graph to return too (such as ``layer3.tome.keep``).

        Returns:
            The outputs by name, and what ``names`` asked for.

        Raises:
            InputError: an input that is missing, unknown, or of another dtype or shape (nothing has been run then), a
                name that the graph does not have, or a failure of the runtime.
        """
        arrays = checked(feed, self.ports)
        session = self._opened(tuple(names))
        wanted = [item.name for item in session.get_outputs()]
        try:
            return dict(zip(wanted, session.run(wanted, arrays), strict=True))
        except Exception as error:  # onnxruntime raises a type of its own for every status
            raise InputError(f"the engine's graph failed: {str(error)[:300]}") from error

    def _opened(self, names: tuple[str, ...]) -> Any:
        if names not in self._by_names:
            self._by_names[names] = open_session(self._source, self.provider, self._threads, names)
        return self._by_names[names]

    def _no_text(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError(
            "this engine is an encoder: it takes and gives arrays, and generates no text",
            f"run({{input: array}}), with {words(self.ports)}",
        )

    prefill = decode = append = generate = run_named = _no_text


_NUMPY = {"float": "float32", "double": "float64"}  # ONNX Runtime's names that are not numpy's


def _port(item: Any) -> Port:
    name = item.type.removeprefix("tensor(").removesuffix(")")
    try:
        dtype = np.dtype(_NUMPY.get(name, name))
    except TypeError as error:
        raise InputError(f"'{item.name}' is {item.type}", "a tensor of a type that numpy has") from error
    return Port(dtype, tuple(d if isinstance(d, int) else str(d) if d else "?" for d in item.shape))
