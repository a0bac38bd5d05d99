"""The socket file of ``--address``."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cfs.errors import BusyError, InvalidRequestError
from cfs.linux.address import parse_address
from cfs.linux.sockets import short_name

__all__ = ["DEFAULT_MODE", "listening"]

DEFAULT_MODE = 0o600
_BACKLOG = 1024


@contextmanager
def listening(address: str, mode: int = DEFAULT_MODE) -> Iterator[socket.socket]:
    """Listen for a block; the file is removed afterwards, if it is still this one.

    A file that a service left behind, so that nobody answers there, is replaced.

    Args:
        address: path, or ``unix:`` and a path; no abstract name, no options.
        mode: of the file.

    Raises:
        InvalidRequestError: the address is none.
        BusyError: somebody serves there, or the file is no socket.
        OSError: as bind(2).
    """
    path, is_abstract, options = parse_address(address)
    if is_abstract or options:  # whoever likes may connect to abstract ones
        msg = f"address {address!r}: expected unix:PATH and nothing else"
        raise InvalidRequestError(msg)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        _bind(channel, path, mode)
        bound = os.lstat(path)
        try:
            channel.listen(_BACKLOG)
            yield channel
        finally:
            with suppress(FileNotFoundError):
                if os.path.samestat(bound, os.lstat(path)):
                    os.unlink(path)


def _bind(channel: socket.socket, path: str, mode: int) -> None:
    """Bind a socket file, in the place of one that nobody serves."""
    umask = os.umask(0)
    try:
        with short_name(path) as name:
            os.fchmod(channel.fileno(), mode)  # bind gives the file the mode of the socket
            try:
                channel.bind(name)
            except OSError as error:
                if not _is_stale(path, name):
                    msg = f"binding varlink socket at {path}: {error.strerror}"
                    raise BusyError(msg) from None
                os.unlink(path)
                channel.bind(name)
    finally:
        os.umask(umask)


def _is_stale(path: str, name: str) -> bool:
    """Tell whether a file is the socket of a service that has ended."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
