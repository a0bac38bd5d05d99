"""Supervisor process: keeps a mount while sessions come and go (spec fuse-data-plane 8).

It holds the descriptors of everything (vector, state, device and clones, objects directories)
and reads none of them.  When a session dies, it starts another on the same descriptors, which
asks the kernel to send the unanswered requests again.  It gives up, and takes the mount down with
one clear line, if that does not help, if the kernel cannot resend, or without workers: then
nothing survives a session.

A session killed while it pushes contents may be stuck: a push waits in the kernel for the answer to
a request, which nobody gives any more, and its process does not end.  So a thread that never pushes
is watched as well; the next session gives that answer, and then the old process goes.

If the supervisor itself is killed, the session serves on until the mount ends.  Status as of a
session.  One thread with one poll; unmounting uses another one, since fusermount3 may need the
mount to answer.
"""

import importlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from cfs.errors import CfsError
from cfs.fuse.deaths import Deaths, describe_status
from cfs.fuse.handover import MESSAGE_SIZE, SIGNALS, Handover, channel_pair, receive, send
from cfs.fuse.program import User, spawn
from cfs.fuse.unservable import print_line
from cfs.linux.traces import remove_traces

__all__ = ["main"]

_PIDFD_THREAD = os.O_EXCL  # Linux 6.9, as resending
_EXIT_SECONDS = 0.05  # between the end of a thread and that of its process
_KILL_SECONDS = 0.3
_RELEASE_SECONDS = 0.5


def main(channel_fd: int, user: str, *, has_workers: bool) -> int:
    """Keep a mount until it ends; return the exit status.

    Args:
        channel_fd: to the starter.
        user: whose name sessions have, as :meth:`User.encode` wrote it.
        has_workers: False: pyfuse3 alone.
    """
    with socket.socket(fileno=channel_fd) as starter, ExitStack() as stack:
        signals = _signal_pipe(stack)
        session = _Session(
            User.parse(user), has_workers=has_workers
        )  # it loads its modules while we wait
        importlib.import_module("cfs.mount")  # and ours only now, to let it start soon
        handover = receive(starter)
        if handover is None:
            session.kill()
            session.reap()
            return 0
        return _Supervisor(handover, starter, session).run(signals)


def _signal_pipe(stack: ExitStack) -> socket.socket:
    """Make signals readable, each as one byte."""
    reader, writer = socket.socketpair()
    stack.enter_context(reader)
    stack.enter_context(writer)
    writer.settimeout(0)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    return reader


class _Session:
    """A session process and our end of its channel.

    Attributes:
        user: in whose name it runs; None: our own.
        pidfd: readable when the process has ended; -1 then.
        is_talking: its channel has not ended.
        witness: pidfd of a thread that ends with it, or -1.
        has_lost_witness: that was gone before we could watch it.
    """

    def __init__(self, user: User | None, *, has_workers: bool) -> None:
        self.user = user
        self.channel, theirs = channel_pair()
        with theirs:
            self._process = spawn("session", theirs, has_workers=has_workers, user=user)
        self.pidfd = os.pidfd_open(self._process.pid)
        self.is_talking = True
        self.witness = -1
        self.has_lost_witness = False

    def watch(self, tid: int) -> None:
        """Watch its witness."""
        try:
            self.witness = os.pidfd_open(tid, _PIDFD_THREAD)
        except ProcessLookupError:
            self.has_lost_witness = True
        except OSError:  # before Linux 6.9, where nothing is pushed
            pass

    def kill(self) -> None:
        """Kill it; it may take its time."""
        self._process.kill()

    def reap(self) -> int:
        """Wait until it has ended and return its status."""
        status = self._process.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.channel.close()
            if self.witness >= 0:
                os.close(self.witness)
        self.pidfd = self.witness = -1
        return status


def _have_ended(sessions: Sequence[_Session], seconds: float) -> bool:
    """Wait until the processes have ended, at most so long."""
    deadline = time.monotonic() + seconds
    for session in sessions:
        poll = select.poll()
        poll.register(session.pidfd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
    return True


class _Supervisor:
    """The loop; it ends when ``_status`` is set, or at ``_deadline`` when told to end."""

    def __init__(self, handover: Handover, starter: socket.socket, session: _Session) -> None:
        self._handover = handover
        self._starter: socket.socket | None = starter
        self._session = session
        self._stuck: list[_Session] = []  # have a successor, and end soon
        self._deaths = Deaths()
        self._may_stay = self._is_serving = self._is_told_to_end = False
        self._detaching: threading.Thread | None = None
        self._is_detached = False
        self._deadline: float | None = None
        self._status: int | None = None

    def run(self, signals: socket.socket) -> int:
        """Keep the mount until it ends; return the exit status."""
        self._brief(self._session)
        while self._status is None:
            self._handle(self._wait(signals), signals)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._status = 0
        self._end_sessions()
        # without descriptors the connection is aborted, so nobody hangs and nothing blocks us
        for fd in self._handover.devices:
            os.close(fd)
        if self._detaching is not None:
            self._detaching.join()
        self._detach()
        remove_traces(self._handover.traces)
        if self._status == 0:
            self._tell(b"ended")
        return self._status

    def _wait(self, signals: socket.socket) -> set[int]:
        """Return the descriptors that have something to tell."""
        session = self._session
        poll = select.poll()
        pidfds = [session.pidfd, *(stuck.pidfd for stuck in self._stuck)]
        if session.witness >= 0:
            pidfds.append(session.witness)
        for fd in (signals.fileno(), *pidfds):
            poll.register(fd, select.POLLIN)
        if session.is_talking:
            poll.register(session.channel, select.POLLIN)
        if self._starter is not None:
            poll.register(self._starter, select.POLLIN)
        timeout = None
        if self._deadline is not None:
            timeout = max(0.0, self._deadline - time.monotonic()) * 1000
        return {fd for fd, _ in poll.poll(timeout)}

    def _handle(self, ready: set[int], signals: socket.socket) -> None:
        """Handle what came; what the session says comes before its death."""
        session = self._session
        if session.channel.fileno() in ready:
            self._hear_session()
        for stuck in [stuck for stuck in self._stuck if stuck.pidfd in ready]:
            self._stuck.remove(stuck)
            self._bury(stuck)
        if session.pidfd in ready:
            self._bury(session)
        elif session.has_lost_witness or session.witness in ready:
            self._part_with(session)
        if self._starter is not None and self._starter.fileno() in ready:
            self._hear_starter(self._starter)
        if signals.fileno() in ready:
            self._obey(signals.recv(MESSAGE_SIZE))

    def _brief(self, session: _Session, *, is_supervised: bool = True) -> None:
        """Tell a session what it serves."""
        with suppress(OSError):  # dead already: its pidfd tells
            send(session.channel, self._handover._replace(is_supervised=is_supervised))

    def _hear_session(self) -> None:
        session = self._session
        while session.is_talking:
            try:
                message = session.channel.recv(MESSAGE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            session.is_talking = bool(message)
            self._heed(message)

    def _heed(self, message: bytes) -> None:
        """Do what follows from a word of the session."""
        if message.startswith(b"witness "):
            self._session.watch(int(message.split()[1]))
        elif message == b"serving":
            if not self._is_serving:
                self._tell(message)
            self._is_serving = True
        elif message.startswith(b"failed: "):
            if self._is_serving:
                print_line(f"session: {message.decode(errors='replace').removeprefix('failed: ')}")
            else:
                self._tell(message)
                self._status = 1

    def _tell(self, message: bytes) -> None:
        if self._starter is not None:
            with suppress(OSError):
                self._starter.send(message[:MESSAGE_SIZE])

    def _hear_starter(self, starter: socket.socket) -> None:
        try:
            message = starter.recv(MESSAGE_SIZE)
        except ConnectionResetError:
            message = b""
        if message.startswith(b"mounted "):
            self._handover = self._handover._replace(device=int(message.split()[1]))
            with suppress(OSError):
                self._session.channel.send(message)
            if self._is_told_to_end:
                self._end()
        elif message == b"stay":
            self._may_stay = True
        elif message == b"end":
            self._status = 0
        elif not message:
            self._starter = None
            if not self._may_stay:
                self._end()

    def _obey(self, numbers: bytes) -> None:
        for number in numbers:
            if number != signal.SIGUSR1:
                self._is_told_to_end = True
                if self._handover.device is not None or self._starter is None:
                    self._end()  # else when the starter has made the mount visible
            elif self._handover.has_workers:
                from cfs.fuse.statistics import describe_state  # noqa: PLC0415 - rarely

                print_line(describe_state(self._handover.state))

    def _end(self) -> None:
        """Take the mount down; after the grace period end, which aborts what still uses it."""
        if self._deadline is not None:
            return
        is_visible = self._handover.device is not None
        self._deadline = time.monotonic() + (self._handover.grace if is_visible else 0)
        if is_visible:
            self._detaching = threading.Thread(target=self._detach, daemon=True)
            self._detaching.start()

    def _detach(self) -> None:
        """Take the mount out of the tree, once: its device number is soon somebody else's."""
        from cfs.mount import detach  # noqa: PLC0415 - see main

        if self._handover.device is None or self._is_detached:
            return
        try:
            detach(self._handover.mountpoint, self._handover.device)
            self._is_detached = True
        except CfsError as error:
            print_line(f"supervisor: {error}")

    def _part_with(self, session: _Session) -> None:
        """Go on without a session whose witness has ended."""
        if _have_ended([session], _EXIT_SECONDS):
            self._bury(session)
        elif self._deadline is not None:
            self._status = 0
        else:
            self._stuck.append(session)
            self._start_session()

    def _start_session(self) -> None:
        try:
            self._session = _Session(self._session.user, has_workers=True)
        except OSError as error:
            mountpoint = self._handover.mountpoint
            reason = f"session of {mountpoint} died, cannot start another: {error.strerror}"
            print_line(f"supervisor: {reason}")
            self._tell(f"failed: {reason}".encode(errors="replace"))
            self._status = 1
            return
        self._brief(self._session)

    def _bury(self, session: _Session) -> None:
        """Start another session after one that died, or end with it."""
        status = session.reap()
        if self._status is not None:
            return
        if status == 0 or self._deadline is not None:
            self._status = 0
            if self._deadline is None:  # unmounted by others, or aborted
                from cfs.mount import is_dead  # noqa: PLC0415 - see main

                self._is_detached = not is_dead(self._handover.mountpoint)
            return
        reason = self._find_reason(status)
        if reason is None:
            if session is self._session:
                self._start_session()
            return
        text = f"session of {self._handover.mountpoint} {describe_status(status)}: {reason}"
        if self._is_serving:
            print_line(f"supervisor: {text}")
        self._tell(f"failed: {text}".encode(errors="replace"))
        self._status = 1

    def _end_sessions(self) -> None:
        """Kill the sessions; one that is stuck gets the answer it waits for from another one."""
        sessions = [session for session in (self._session, *self._stuck) if session.pidfd >= 0]
        for session in sessions:
            session.kill()
        if not _have_ended(sessions, _KILL_SECONDS) and self._handover.has_workers:
            with suppress(OSError):
                last = _Session(self._session.user, has_workers=True)
                self._brief(last, is_supervised=False)  # so it never pushes
                _have_ended(sessions, _RELEASE_SECONDS)
                last.kill()
                last.reap()

    def _find_reason(self, status: int) -> str | None:
        """Return why there shall not be another session, or None."""
        if not self._handover.has_workers:
            return "without workers the mount ends with it"
        from cfs.fuse.dataplane import read_statistics  # noqa: PLC0415 - workers=0 needs none

        statistics = read_statistics(self._handover.state)
        if statistics.is_negotiated and not statistics.can_resend:
            return "the kernel cannot resend its requests (Linux 6.9 or later can)"
        nr_answered = statistics.counters["replies"]
        if self._deaths.is_hopeless(status, nr_answered, time.monotonic()):
            return "it died too often, giving up"
        return None
