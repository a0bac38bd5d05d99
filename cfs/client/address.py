"""Where a service listens: varlink addresses of unix sockets."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cfs.client.errors import ConnectionLostError
from cfs.linux.address import SCHEME, parse_address
from cfs.linux.sockets import short_name

__all__ = ["SYSTEM_ADDRESS", "default_addresses", "new_socket", "socket_name", "unreachable"]

SYSTEM_ADDRESS = f"{SCHEME}/run/composefs/composefs.sock"


def default_addresses() -> list[str]:
    """Return where the units of systemd listen: the user's own first, for root the system's.

    A directory of somebody else, which su(1) leaves in the environment, is not ours to trust.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    own = [f"{SCHEME}{runtime}/composefs/composefs.sock"] if _is_our_directory(runtime) else []
    return [SYSTEM_ADDRESS, *own] if os.geteuid() == 0 else [*own, SYSTEM_ADDRESS]


def _is_our_directory(path: str) -> bool:
    try:
        return os.path.isabs(path) and os.stat(path).st_uid == os.geteuid()
    except (OSError, ValueError):
        return False


def new_socket() -> socket.socket:
    """Return a socket that is connected to nothing yet."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


@contextmanager
def socket_name(address: str) -> Iterator[str | bytes]:
    """Return the name to connect to, valid within the block.

    Args:
        address: as for :func:`cfs.linux.address.parse_address`.

    Raises:
        InvalidRequestError: it is none.
        OSError: the directory of a long path cannot be opened.
    """
    where = parse_address(address)
    if where.is_abstract:
        yield b"\0" + os.fsencode(where.name)
        return
    with short_name(where.name) as name:
        yield name


def unreachable(address: str, error: OSError) -> ConnectionLostError:
    """Return the error that says that nobody answers there."""
    return ConnectionLostError(f"cannot connect to {address}: {error.strerror or error}")
