"""Talk to the service manager: state, and descriptors to keep over a restart; sd_notify(3).

The descriptor store takes what it is sent without a word, so a service cannot know whether it has
one.  Any thread may call.
"""

import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["Notifier"]

_BARRIER_SECONDS = 5.0
_SEND_SECONDS = 5.0


class Notifier:
    """The socket of whoever started the service.

    Args:
        address: path, or ``@`` and an abstract name.

    Attributes:
        stores: the service manager says that it keeps descriptors.
    """

    def __init__(self, address: str, *, stores: bool = True) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.stores = stores

    @classmethod
    def from_environment(cls) -> "Notifier | None":
        """Return the one that ``NOTIFY_SOCKET`` tells, or None."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return None
        return cls(address, stores=os.environ.get("FDSTORE", "0") not in ("", "0"))

    def send(self, text: str, fds: Sequence[int] = ()) -> None:
        """Send assignments, one a line; sd_notify(3) recommends to ignore failure, and we do."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_SEND_SECONDS)
            channel.connect(self._address)
            socket.send_fds(channel, [text.encode()], fds)

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept under a name: a copy of it, until its other end hangs up."""
        self.send(f"FDSTORE=1\nFDNAME={name}", [fd])

    def drop(self, name: str) -> None:
        """Have what is kept under a name closed."""
        self.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def barrier(self) -> None:
        """Wait until everything sent so far was handled, but not for ever."""
        reader, writer = os.pipe()
        try:
            try:
                self.send("BARRIER=1", [writer])
            finally:
                os.close(writer)
            poll = select.poll()
            poll.register(reader, 0)
            poll.poll(_BARRIER_SECONDS * 1000)
        finally:
            os.close(reader)
