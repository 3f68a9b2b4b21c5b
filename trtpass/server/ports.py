"""The addresses that a server listens on."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from trtpass.errors import InputError

LOOPBACK = "127.0.0.1"
KINDS = ("http", "grpc", "metrics")


class PortTaken(InputError):
    """A port is in use: ``kind`` says for what it was wanted."""

    def __init__(self, kind: str, port: int) -> None:
        self.kind = kind
        super().__init__(
            f"port {port} is in use", f"a free port for {kind}", f"give another --{kind}-port, or 0 for any"
        )


def address(host: str) -> ipaddress.IPv4Address:
    """The address in words as one that can be asked.

    Raises:
        InputError: a name, or something else.
    """
    try:
        return ipaddress.IPv4Address(host)
    except ValueError as error:
        raise InputError(f"host '{host}'", "an IPv4 address: 127.0.0.1, or 0.0.0.0 for all of this machine") from error


def choose(host: str, asked: Mapping[str, int]) -> dict[str, int]:
    """A port of each kind that is free now: the asked one, or any where that is 0.

    Raises:
        PortTaken: an asked one is in use.
        InputError: one that may not be used, or an address that is not this machine's.
    """
    with ExitStack() as stack:
        ports = {}
        for kind, port in asked.items():
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: old connections may linger
            try:
                probe.bind((host, port))
            except OverflowError as error:
                raise InputError(f"port {port} for {kind}", "0 to 65535") from error
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortTaken(kind, port) from error
                raise InputError(
                    f"{host}:{port} cannot be listened on: {error.strerror}",
                    "an address and a port that are free to use",
                ) from error
            ports[kind] = int(probe.getsockname()[1])
        return ports


def listens(pid: int, ports: Iterable[int]) -> bool:
    """Whether it is this process that listens on all the ports: another server there would answer, too."""
    import psutil

    try:
        connections = psutil.Process(pid).net_connections()
    except psutil.Error:
        return False
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN} >= set(ports)
