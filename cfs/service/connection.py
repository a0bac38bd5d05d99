"""A connected socket: messages with their descriptors in, replies with theirs out.

How a message is found, and which descriptors are its own, is in :mod:`cfs.linux.framing`;
here is how long it is waited for, and what it may cost.
"""

import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cfs.errors import FormatError
from cfs.linux.framing import EndOfMessages, Message, MessageReader, MessageWriter, close_all
from cfs.linux.sockets import peer_credentials, peer_groups
from cfs.messages import decoding_cost
from cfs.service.budget import Budget
from cfs.service.call import Disconnection, Peer
from cfs.service.errors import ProtocolError
from cfs.service.request import MAX_VALUES
from cfs.service.watcher import Watcher

__all__ = ["MAX_RECEIVED_SIZE", "Budgets", "Connection"]

MAX_RECEIVED_SIZE = (100 << 20) - 1  # bytes with NUL, as in zlink
_FREE_SIZE = 1 << 16  # bytes of a message that no budget counts: connections are counted
_PIECE_SECONDS = 60  # for the next piece of a message, in either direction
_MESSAGE_SECONDS = 600  # for all of it
_BUDGET_SECONDS = 30  # for others to give back memory


@dataclass(frozen=True, slots=True)
class Budgets:
    """What connections share.

    Attributes:
        connections: number of connections.
        memory: bytes of long messages, and what they decode to.
        fds: received descriptors of messages that are not answered yet.
    """

    connections: Budget
    memory: Budget
    fds: Budget


class Connection:
    """A connection, for the thread that serves it; only :meth:`shut_down` is for any thread.

    Attributes:
        peer: who connected.
        disconnection: what to do once he has gone.
        is_slow: the last call took long.
    """

    def __init__(
        self,
        channel: socket.socket,
        budgets: Budgets,
        watcher: Watcher,
        before_waiting: Callable[[], None],
    ) -> None:
        """Take over a connected socket.

        Args:
            channel: the socket.
            budgets: shared by all connections.
            watcher: of hang-ups.
            before_waiting: called before the thread waits for the peer or handles a long message.

        Raises:
            OSError: as getsockopt(2).
        """
        self.peer = Peer(*peer_credentials(channel), peer_groups(channel))
        self.disconnection = Disconnection(self._watch)
        self.is_slow = False
        self._before_waiting = before_waiting
        self._channel = channel
        self._budgets = budgets
        self._watcher = watcher
        self._reader = MessageReader(channel, MAX_RECEIVED_SIZE, self._reserve)
        self._writer = MessageWriter(channel)
        self._charged_memory = 0
        self._charged_fds = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._channel.fileno()

    def receive(self) -> Message | None:
        """Return the next message; None: no more come.

        What the message costs is given back when the next one is asked for.

        Raises:
            ProtocolError: the message is too long, too slow, incomplete, or has too many
                descriptors; or there are too many like it.
            OSError: as recvmsg(2).
        """
        self._give_back()
        try:
            message = self._await_message()
            self._charge(message)
        except EndOfMessages as end:
            if end.is_within:
                raise ProtocolError(str(end)) from None
            return None
        except FormatError as error:
            raise ProtocolError(str(error)) from None
        return message

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message; descriptors go with its first byte.

        Raises:
            ProtocolError: the peer does not read, or many like it hold up too much.
            OSError: as sendmsg(2).
        """
        size = len(message)
        if size <= _FREE_SIZE:
            self._write(message, fds)
            return
        # twice: a copy has the NUL; nobody waits for room, for he would hold the reply meanwhile
        with self._budgets.memory.lend(self.peer.uid, 2 * size) as has_room:
            if not has_room:
                msg = "too many replies wait for their readers"
                raise ProtocolError(msg)
            self._write(message, fds)

    def shut_down(self) -> None:
        """End the connection for whoever reads or writes; :meth:`close` is still needed."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, give everything back and tell all that want to know."""
        self.shut_down()
        self._reader.close()
        self._watcher.forget(self.fileno())
        self._channel.close()
        self._give_back()
        self.disconnection.happen()

    def _write(self, message: bytes, fds: Sequence[int]) -> None:
        self._writer.start(message, fds)
        deadline = time.monotonic() + _MESSAGE_SECONDS
        while not self._writer.send():
            self._await(select.POLLOUT, deadline)

    def _watch(self) -> None:
        self._watcher.watch(self.fileno(), self.disconnection.happen)

    def _await_message(self) -> Message:
        """Wait for a message, as long as it takes to begin, but not within it."""
        deadline = None
        while True:
            message = self._reader.read()
            if message is not None:
                return message
            self._charge_fds(self._reader.nr_fds)
            if deadline is None and self._reader.size:
                deadline = time.monotonic() + _MESSAGE_SECONDS
            self._await(select.POLLIN, deadline)

    def _await(self, event: int, deadline: float | None) -> None:
        """Wait until the socket can be read or written.

        Raises:
            ProtocolError: the peer is too slow.
        """
        self._before_waiting()
        poll = select.poll()
        poll.register(self._channel, event)
        timeout = None
        if deadline is not None:
            timeout = max(0, min(_PIECE_SECONDS, deadline - time.monotonic()))
        if not poll.poll(timeout if timeout is None else timeout * 1000):
            msg = "the peer is too slow"
            raise ProtocolError(msg)

    def _charge(self, message: Message) -> None:
        """Charge what decoding and answering a message will take; if that fails, it is dropped."""
        try:
            self._charge_memory(decoding_cost(message.data, MAX_VALUES))
            self._charge_fds(len(message.fds))
        except BaseException:
            close_all(message.fds)
            raise

    def _reserve(self, size: int) -> None:
        """Charge a message that grows to ``size`` bytes; short ones are free."""
        if size > _FREE_SIZE:
            self._before_waiting()
            self._charge_memory(size - self._charged_memory)

    def _charge_memory(self, amount: int) -> None:
        if not amount:
            return
        if not self._budgets.memory.take(self.peer.uid, amount, timeout=_BUDGET_SECONDS):
            msg = "too many long messages at once"
            raise ProtocolError(msg)
        self._charged_memory += amount

    def _charge_fds(self, count: int) -> None:
        """Charge a message that has ``count`` descriptors by now."""
        if count == self._charged_fds:
            return
        if not self._budgets.fds.take(self.peer.uid, count - self._charged_fds):
            msg = "too many descriptors at once"
            raise ProtocolError(msg)
        self._charged_fds = count

    def _give_back(self) -> None:
        if self._charged_memory:
            self._budgets.memory.give_back(self.peer.uid, self._charged_memory)
        if self._charged_fds:
            self._budgets.fds.give_back(self.peer.uid, self._charged_fds)
        self._charged_memory = self._charged_fds = 0
