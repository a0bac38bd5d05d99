"""Calls without a connection to serve: a socket, whose other end is the client."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cfs.service.call import Call, Disconnection, Peer

OWN = Peer(os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))
SOMEBODY = Peer(1, 54321, 54322, (54323,))
SOMEBODY_ELSE = Peer(1, 54331, 54332, ())


@contextmanager
def calling(
    peer: Peer = OWN,
    *,
    more: bool = False,
    fds: Iterable[int] = (),
    disconnection: Disconnection | None = None,
) -> Iterator[tuple[Call, socket.socket]]:
    """Yield a call of a peer, and the client's end; the descriptors become the call's."""
    server, client = socket.socketpair()
    with server, client:
        ending = disconnection or Disconnection()
        call = Call(server.fileno(), peer, ending, more=more, fds=fds)
        try:
            yield call, client
        finally:
            call.close()
