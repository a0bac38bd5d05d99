"""The typed border of the data plane, and its threads over a socket in place of the device."""

import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cfs.errors import MountError
from cfs.fuse import (
    _worker,
    dataplane,
    shared,
)
from cfs.fuse.dataplane import DataPlane, Event, LogReason, Opcode
from cfs.fuse.options import Passthrough, Verify
from cfs.tree import Directory, Regular
from tests.integration.vectors import make_vector
from tests.paths import CHECKOUT

FFI, LIB = _worker.ffi, _worker.lib
REQUEST = struct.Struct("<IIQQIIIHH")
REPLY = struct.Struct("<IiQ")
ALL_INIT_FLAGS = 0xFFFFFFFF
RESEND = 7
MAX_THREADS = 16
SECONDS = 20.0


def request(opcode: int, unique: int, argument: bytes = b"", nodeid: int = 1) -> bytes:
    size = REQUEST.size + len(argument)
    return REQUEST.pack(size, opcode, unique, nodeid, 0, 0, 1, 0, 0) + argument


INIT = request(
    Opcode.INIT,
    2,
    struct.pack("<IIIII", 7, 45, 1 << 20, ALL_INIT_FLAGS, ALL_INIT_FLAGS) + bytes(44),
)


@dataclass
class Bench:
    """A data plane, and the other ends of its descriptors."""

    table: int
    stack: ExitStack
    nr_threads: int = 1
    state: int = field(init=False)
    kernel: socket.socket = field(init=False)
    pyfuse3: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.state = os.memfd_create("state")
        self.stack.callback(os.close, self.state)
        self.kernel, self._device = self.pair()
        self.pyfuse3, self._relay = self.pair()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(SECONDS)
        theirs.settimeout(0)
        return self.stack.enter_context(ours), self.stack.enter_context(theirs)

    def plane(self, *, relay: bool = True, max_poll_us: int | None = None) -> DataPlane:
        """The threads share one socket, as clones of a device share one queue."""
        plane = DataPlane(
            table=self.table,
            state=self.state,
            relay=self._relay.fileno() if relay else -1,
            devices=[self._device.fileno()] * self.nr_threads,
            objects=[],
            max_poll_us=max_poll_us,
        )
        self.stack.callback(plane.close)
        return plane

    def ask(self, message: bytes) -> tuple[int, int, bytes]:
        """Error, unique number and rest of the reply."""
        self.kernel.send(message)
        return self.answer()

    def answer(self) -> tuple[int, int, bytes]:
        reply = self.kernel.recv(1 << 21)
        size, error, unique = REPLY.unpack_from(reply)
        assert size == len(reply)
        return error, unique, reply[REPLY.size :]


@pytest.fixture
def table() -> Iterator[int]:
    root = Directory(
        mode=0o40755, children={b"file": Regular(mode=0o100644, size=2, content=b"hi")}
    )
    fd = shared.publish(make_vector(root))
    yield fd
    os.close(fd)


@pytest.fixture
def bench(table: int) -> Iterator[Bench]:
    before = set(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        yield Bench(table, stack)
    assert set(os.listdir("/proc/self/fd")) == before


def wait_for(plane: DataPlane, expected: Event) -> Event:
    seen = Event(0)
    while expected not in seen:
        assert select.select([plane.event_fd], [], [], SECONDS)[0], seen
        seen |= plane.events()
    return seen


# ---- layouts ----


def test_columns_are_those_of_the_header() -> None:
    columns = FFI.typeof("enum cfs_column").relements
    names = [f"CFS_{name.upper()}" for name, _ in shared.COLUMNS]
    assert columns == {**{name: i for i, name in enumerate(names)}, "CFS_NR_COLUMNS": len(names)}
    widths = [LIB.cfs_column_width(columns[name]) for name in names]
    assert widths == [int(dtype[-1]) for _, dtype in shared.COLUMNS]


def test_header_of_the_table_has_the_layout_of_c() -> None:
    assert shared._HEADER.size == FFI.sizeof("struct cfs_table_header")
    assert shared._RANGE.size == FFI.sizeof("struct cfs_column_range")
    fields = ["magic", "version", "has_acl", "nr_blocks", "nr_columns"]
    assert [name for name, _ in FFI.typeof("struct cfs_table_header").fields] == fields
    offs = [FFI.offsetof("struct cfs_table_header", name) for name in fields]
    assert offs == [0, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("name", "prefix", "values"),
    [
        ("cfs_event", "CFS_EVENT_", Event),
        ("cfs_log_reason", "CFS_LOG_", LogReason),
        ("cfs_passthrough", "CFS_PASSTHROUGH_", Passthrough),
        ("cfs_verify", "CFS_VERIFY_", Verify),
    ],
)
def test_enums_have_the_values_of_c(
    name: str, prefix: str, values: type[Event | LogReason | Passthrough | Verify]
) -> None:
    ours = {prefix + member: value.value for member, value in values.__members__.items()}
    assert FFI.typeof(f"enum {name}").relements == ours


def test_importing_it_is_light() -> None:
    code = """
import sys
import cfs.fuse.dataplane
print(sorted({'numpy', 'pyfuse3', 'trio', 'click', 'cffi'} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, check=True
    )
    assert done.stdout == b"[]\n"


# ---- errors ----


def test_table_that_is_not_sealed_is_refused(bench: Bench) -> None:
    bench.table = os.memfd_create("table", os.MFD_ALLOW_SEALING)
    bench.stack.callback(os.close, bench.table)
    with pytest.raises(MountError, match=r"^[a-z].*seal"):
        bench.plane()


def test_state_of_another_image_is_refused(bench: Bench) -> None:
    bench.plane().close()
    bench.table = shared.publish(make_vector(Directory(mode=0o40755)))
    bench.stack.callback(os.close, bench.table)
    with pytest.raises(MountError, match=r"^state memfd: belongs to another image$"):
        bench.plane()


@pytest.mark.parametrize("nr_threads", [0, MAX_THREADS + 1])
def test_number_of_threads_is_bounded(bench: Bench, nr_threads: int) -> None:
    bench.nr_threads = nr_threads
    with pytest.raises(MountError, match=r"^devices: expected 1 to 16"):
        bench.plane()


# ---- threads ----


def test_init_is_answered_and_told(bench: Bench) -> None:
    plane = bench.plane()
    assert not dataplane.read_statistics(bench.state).is_negotiated
    plane.start()
    error, unique, data = bench.ask(INIT)
    assert (error, unique, len(data)) == (0, 2, 64)
    assert wait_for(plane, Event.SERVING) == Event.SERVING
    assert (plane.failure(), list(plane.log_entries())) == ("", [])
    statistics = dataplane.read_statistics(bench.state)
    assert statistics.is_negotiated
    assert (statistics.sessions, statistics.session_pid) == (1, os.getpid())
    assert statistics.requests == {"init": 1}
    assert (statistics.counters["relayed"], statistics.counters["errors"]) == (0, 0)


def test_statistics_of_a_state_nobody_used_are_zero(bench: Bench) -> None:
    statistics = dataplane.read_statistics(bench.state)
    assert (statistics.sessions, statistics.requests) == (0, {})
    assert set(statistics.counters.values()) == {0}


def test_end_of_the_device_ends_all_threads(bench: Bench) -> None:
    bench.nr_threads = MAX_THREADS
    plane = bench.plane()
    plane.start()
    bench.kernel.close()
    assert wait_for(plane, Event.ENDED) == Event.ENDED
    plane.stop()


def test_sleeping_threads_can_be_stopped(bench: Bench) -> None:
    bench.nr_threads = MAX_THREADS
    plane = bench.plane()
    plane.start()
    plane.stop()
    plane.stop()
    plane.close()
    plane.close()
    bench.kernel.send(request(Opcode.GETATTR, 4))  # waits for the next session
    assert bench._device.recv(100)


def thread_states(own: set[str]) -> set[str]:
    tasks = {name: Path(f"/proc/self/task/{name}/stat") for name in os.listdir("/proc/self/task")}
    stats = [path.read_text() for name, path in tasks.items() if name not in own]
    return {text.rpartition(")")[2].split()[0] for text in stats}


@pytest.mark.parametrize("max_poll_us", [0, None])
def test_idle_threads_sleep(bench: Bench, max_poll_us: int | None) -> None:
    bench.nr_threads = 4
    plane = bench.plane(max_poll_us=max_poll_us)
    before = set(os.listdir("/proc/self/task"))
    plane.start()
    bench.ask(INIT)
    for unique in range(4, 2004, 2):
        assert bench.ask(request(Opcode.GETATTR, unique, bytes(16)))[:2] == (0, unique)
    deadline = time.monotonic() + SECONDS
    while thread_states(before) != {"S"}:
        assert time.monotonic() < deadline
        os.sched_yield()
    counters = dataplane.read_statistics(bench.state).counters
    assert counters["sleeps"] > 0
    assert max_poll_us is None or counters["polls"] == 0
    assert dataplane.read_statistics(bench.state).requests == {"init": 1, "getattr": 1000}


def test_message_with_a_wrong_length_is_answered_with_eio(bench: Bench) -> None:
    bench.plane().start()
    bench.kernel.send(b"short")
    assert bench.ask(request(Opcode.GETATTR, 4) + b"more") == (-errno.EIO, 4, b"")
    bench.kernel.send(request(Opcode.FORGET, 6) + b"more")
    assert bench.ask(INIT)[:2] == (0, 2)


def test_next_session_asks_for_unanswered_requests(bench: Bench) -> None:
    plane = bench.plane()
    plane.start()
    bench.ask(INIT)
    plane.close()
    plane = bench.plane()
    plane.start()
    assert bench.answer() == (RESEND, 0, b"")
    assert wait_for(plane, Event.SERVING) == Event.SERVING
    error, unique, _ = bench.ask(request(Opcode.GETATTR, 4 | 1 << 63, bytes(16)))
    assert (error, unique) == (0, 4 | 1 << 63)
    statistics = dataplane.read_statistics(bench.state)
    assert (statistics.sessions, statistics.requests) == (2, {"init": 1, "getattr": 1})


# ---- relay ----

COLD = request(Opcode.BMAP, 10, bytes(16))


def test_without_relay_cold_requests_are_unknown(bench: Bench) -> None:
    bench.plane(relay=False).start()
    bench.ask(INIT)
    assert bench.ask(COLD) == (-errno.ENOSYS, 10, b"")


def test_cold_requests_go_to_pyfuse3_and_back(bench: Bench) -> None:
    bench.plane().start()
    own_init = bench.pyfuse3.recv(1 << 16)
    size, opcode, own_unique, *_ = REQUEST.unpack_from(own_init)
    assert (size, opcode) == (len(own_init), Opcode.INIT)
    bench.pyfuse3.send(REPLY.pack(REPLY.size, 0, own_unique))  # is dropped
    bench.ask(INIT)
    bench.kernel.send(COLD)
    assert bench.pyfuse3.recv(1 << 16) == COLD
    data = os.urandom(1000)
    bench.pyfuse3.send(REPLY.pack(REPLY.size + len(data), 0, 10) + data)
    assert bench.answer() == (0, 10, data)
    bench.pyfuse3.send(REPLY.pack(REPLY.size, 0, 10))  # nobody waits for a second one
    bench.pyfuse3.send(REPLY.pack(REPLY.size + 4, 3, 0) + b"note")  # a notification
    assert bench.answer() == (3, 0, b"note")
    assert dataplane.read_statistics(bench.state).counters["relayed"] == 1


def test_cold_requests_wait_for_pyfuse3_while_hot_ones_are_served(bench: Bench) -> None:
    bench.plane().start()
    bench.ask(INIT)
    cold = [request(Opcode.BMAP, unique, bytes(16)) for unique in range(10, 1010, 2)]
    for message in cold:
        bench.kernel.send(message)
        assert bench.ask(request(Opcode.GETATTR, 2000, bytes(16)))[:2] == (0, 2000)
    bench.pyfuse3.recv(1 << 16)
    for message in cold:
        assert bench.pyfuse3.recv(1 << 16) == message
    for unique in range(1008, 8, -2):
        bench.pyfuse3.send(REPLY.pack(REPLY.size, -errno.ENOTTY, unique))
        assert bench.answer() == (-errno.ENOTTY, unique, b"")


def test_when_nobody_takes_cold_requests_they_fail_at_last(bench: Bench) -> None:
    bench.plane().start()
    bench.ask(INIT)
    nr_lost = 10_000
    for unique in range(10, 10 + 2 * nr_lost, 2):
        bench.kernel.send(request(Opcode.BMAP, unique, bytes(16)))
        if select.select([bench.kernel], [], [], 0)[0]:
            break
    assert bench.answer()[0] == -errno.EAGAIN


def test_cold_requests_fail_when_pyfuse3_goes(bench: Bench) -> None:
    bench.plane().start()
    bench.ask(INIT)
    bench.kernel.send(COLD)
    bench.pyfuse3.recv(1 << 16)
    assert bench.pyfuse3.recv(1 << 16) == COLD
    bench.pyfuse3.close()
    assert bench.answer() == (-errno.EIO, 10, b"")
    assert bench.ask(request(Opcode.BMAP, 12, bytes(16))) == (-errno.EIO, 12, b"")
    assert bench.ask(request(Opcode.GETATTR, 14, bytes(16)))[:2] == (0, 14)
