"""Start supervisor or session: programs of their own, started with exec.

Without ``site`` and environment (``-I -S``) an interpreter starts in 10 ms; where modules are, its
starter tells it.
"""

import os
import socket
import subprocess
import sys

__all__ = ["spawn"]

_MAIN = """
import sys
sys.path += sys.argv[3:]
from cfs.fuse.{name} import main
sys.exit(main(int(sys.argv[1]), has_workers=sys.argv[2] == "workers"))
"""


def spawn(
    name: str, channel: socket.socket, *, has_workers: bool, background: bool = False
) -> "subprocess.Popen[bytes]":
    """Execute ``cfs.fuse.NAME`` with its end of a channel, away from the terminal.

    Args:
        name: module with a function ``main``.
        channel: its end; the caller closes his copy.
        has_workers: which modules it will need.
        background: give it no standard streams.
    """
    # cfs may be where a finder of the starter knows it; "" is not where we want modules from
    places = [os.path.dirname(__file__) + "/../..", *(path for path in sys.path if path)]
    paths = list(dict.fromkeys(os.path.abspath(path) for path in places))
    words = [str(channel.fileno()), "workers" if has_workers else "reference", *paths]
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-I", "-S", "-c", _MAIN.format(name=name), *words],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if background else None,
        cwd="/",
        start_new_session=True,
    )
