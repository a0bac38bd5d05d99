"""Start supervisor or session: programs of their own, started with exec.

At their end nothing is worth the time to take it apart: somebody waits for that.
"""

import os
import socket
import subprocess
from typing import NamedTuple

from cfs.linux.interpreter import command

__all__ = ["User", "spawn"]

_MAIN = """
from cfs.fuse.{name} import main
os._exit(main(int(sys.argv[1]), sys.argv[3], has_workers=sys.argv[2] == "workers"))
"""


class User(NamedTuple):
    """In whose name a session reads objects.

    Attributes:
        uid: user id.
        gid: group id.
        groups: supplementary groups.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "User | None":
        """Return whom :meth:`encode` wrote down; empty: nobody else."""
        if not text:
            return None
        uid, gid, *groups = map(int, text.split(","))
        return cls(uid, gid, tuple(groups))

    def become(self) -> None:
        """Give up all rights but this user's, for good.

        Raises:
            OSError: the process may not.
        """
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)

    def encode(self) -> str:
        """Return a word for a command line."""
        return ",".join(map(str, (self.uid, self.gid, *self.groups)))


def spawn(
    name: str,
    channel: socket.socket,
    *,
    has_workers: bool,
    background: bool = False,
    user: User | None = None,
) -> "subprocess.Popen[bytes]":
    """Execute ``cfs.fuse.NAME`` with its end of a channel, away from the terminal.

    Args:
        name: module with a function ``main``.
        channel: its end; the caller closes his copy.
        has_workers: which modules it will need.
        background: give it no standard streams.
        user: in whose name objects are read: a session becomes that user when it has loaded its
            modules, a supervisor tells its sessions.
    """
    words = [str(channel.fileno()), "workers" if has_workers else "reference"]
    words.append("" if user is None else user.encode())
    return subprocess.Popen(  # noqa: S603 - our own program
        command(_MAIN.format(name=name), *words),
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if background else None,
        cwd="/",
        start_new_session=True,
    )
