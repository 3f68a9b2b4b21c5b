"""The server's calls for operators, over HTTP: readiness, which models there are, loading and unloading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from trtpass.errors import InputError

CALL_SECONDS = 10.0
LOAD_SECONDS = 300.0
READY, UNAVAILABLE = "READY", "UNAVAILABLE"  # states of a model


class Control:
    """Calls to one server.

    Args:
        url: ``http://host:port``.
        headers: what the server asks operators for.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url, self.headers = url, dict(headers)

    def ready(self) -> bool:
        """Whether the server takes requests and every model is ready."""
        try:
            return self._call("GET", "/v2/health/ready")[0] == 200
        except InputError:
            return False

    def states(self) -> dict[str, str]:
        """Model -> ``READY``, ``LOADING``, ``UNLOADING`` or ``UNAVAILABLE``.

        Raises:
            InputError: the server does not answer.
        """
        index = self._checked("POST", "/v2/repository/index")
        return {str(item["name"]): str(item.get("state", UNAVAILABLE)) for item in index}

    def config(self, model: str) -> dict[str, Any]:
        """A model's configuration, as Triton completed it.

        Raises:
            InputError: no such model is ready.
        """
        return dict(self._checked("GET", f"/v2/models/{quote(model, safe='')}/config"))

    def load(self, model: str) -> None:
        """Load, or load again; returns when it is ready.

        Raises:
            InputError: it does not load, in the server's words.
        """
        self._checked("POST", f"/v2/repository/models/{quote(model, safe='')}/load", LOAD_SECONDS)

    def unload(self, model: str) -> None:
        """Unload; requests in flight end first, which this does not wait for.

        Raises:
            InputError: no such model.
        """
        self._checked("POST", f"/v2/repository/models/{quote(model, safe='')}/unload")

    def _checked(self, method: str, path: str, seconds: float = CALL_SECONDS) -> Any:
        status, body = self._call(method, path, seconds)
        try:
            value = json.loads(body) if body else {}
        except ValueError:
            value = {"error": body[:300].decode(errors="replace")}
        if status != 200:
            words = value.get("error", "") if isinstance(value, dict) else ""
            raise InputError(f"the server at {self.url} answers {status} to {path}: {words or 'no words'}")
        return value

    def _call(self, method: str, path: str, seconds: float = CALL_SECONDS) -> tuple[int, bytes]:
        where = urlsplit(self.url)
        with closing(HTTPConnection(where.hostname or "", where.port or 80, timeout=seconds)) as connection:
            try:
                connection.request(method, path, headers=self.headers)
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, HTTPException) as error:
                raise InputError(
                    f"the server at {self.url} does not answer: {error}", "a running server", "trtpass serve REPO"
                ) from error
