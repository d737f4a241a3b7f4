"""Refuse every socket that is neither local to the machine's files nor loopback."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any


class NetworkRefusedError(RuntimeError):
    """A test, or what it runs, tried to reach the network."""


def build() -> None:
    """Replace the ways out of this process."""
    connect, connect_ex, send_to, look_up = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.socket.sendto,
        socket.getaddrinfo,
    )

    def check(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(host, str | bytes) and isinstance(address, tuple) and not _is_loopback(host):
            raise NetworkRefusedError(f"tests may not reach {host!r}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_send_to(self: socket.socket, data: Any, *rest: Any) -> int:
        check(rest[-1])
        return send_to(self, data, *rest)

    def guarded_look_up(host: Any, *rest: Any, **named: Any) -> Any:
        if host is not None and not _is_loopback(host):
            raise NetworkRefusedError(f"tests may not look up {host!r}")
        return look_up(host, *rest, **named)

    socket.socket.connect = guarded_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = guarded_connect_ex  # type: ignore[method-assign]
    socket.socket.sendto = guarded_send_to  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = guarded_look_up


def _is_loopback(host: str | bytes) -> bool:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
