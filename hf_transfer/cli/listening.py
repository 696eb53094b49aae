"""Sockets of the verbs that answer over HTTP, and what is said of their addresses."""

from __future__ import annotations

import errno
import os
import socket
import sys
from ipaddress import ip_address

from hf_transfer.errors import UserError


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Raises:
        UserError: it cannot be, because it is in use, is not this machine's, or needs other rights.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host: {host!r} is not an address of this machine.", "Leave it out for 127.0.0.1.") from error
    bound = socket.socket(family, kind)
    try:
        if os.name == "posix":  # a port that was in use a moment ago; elsewhere it would take one that is in use
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _not_bound(error, host, port) from error
    return bound


def _not_bound(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port: {port} is in use on {host}.", "Stop what uses it, or choose another: --port 0 takes a free one."
        )
    if error.errno == errno.EACCES:
        return UserError(f"port: {port} needs administrator rights.", "Choose one from 1024 on.")
    return UserError(
        f"host: {host!r} is not an address of this machine ({error.strerror}).", "Leave it out for 127.0.0.1."
    )


def url(host: str, bound: socket.socket) -> str:
    """Where a bound socket is reached. Says on standard error if from other machines too."""
    address, port = bound.getsockname()[:2]
    if not ip_address(address.partition("%")[0]).is_loopback:
        sys.stderr.write("Anyone who reaches this address can send requests: there is no password.\n")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
