"""Where a service listens: varlink addresses of unix sockets."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cfs.client.errors import ConnectionLostError
from cfs.errors import InvalidRequestError
from cfs.linux.sockets import short_name

__all__ = ["SYSTEM_ADDRESS", "default_addresses", "new_socket", "socket_name", "unreachable"]

SYSTEM_ADDRESS = "unix:/run/composefs/composefs.sock"
_PREFIX = "unix:"


def default_addresses() -> list[str]:
    """Return where the units of systemd listen: the user's own first, for root the system's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    own = [f"{_PREFIX}{runtime}/composefs/composefs.sock"] if os.path.isabs(runtime) else []
    return [SYSTEM_ADDRESS, *own] if os.geteuid() == 0 else [*own, SYSTEM_ADDRESS]


def new_socket() -> socket.socket:
    """Return a socket that is connected to nothing yet."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


@contextmanager
def socket_name(address: str) -> Iterator[str | bytes]:
    """Return the name to connect to, valid within the block.

    Args:
        address: ``unix:PATH``, ``unix:@NAME`` for an abstract name, or a path; what follows a
            semicolon is for the server.

    Raises:
        InvalidRequestError: it is of another kind.
        OSError: the directory of a long path cannot be opened.
    """
    scheme, colon, _ = address.partition(":")
    if colon and scheme.isalnum() and scheme != "unix":
        msg = f"address {address!r}: expected unix:PATH"
        raise InvalidRequestError(msg)
    path = address.removeprefix(_PREFIX).partition(";")[0]
    if path in ("", "@") or "\0" in path:
        msg = f"address {address!r}: expected unix:PATH"
        raise InvalidRequestError(msg)
    if path.startswith("@"):
        yield b"\0" + os.fsencode(path[1:])
        return
    with short_name(path) as name:
        yield name


def unreachable(address: str, error: OSError) -> ConnectionLostError:
    """Return the error that says that nobody answers there."""
    return ConnectionLostError(f"cannot connect to {address}: {error.strerror or error}")
