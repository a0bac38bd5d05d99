"""The service among peers that do all they can to break it, root's and another user's.

``CFS_VARLINK_FUZZ_SECONDS`` is the time of all fuzzers together (default 60), ``CFS_FUZZ_SEED``
where they begin (default 1).
"""

import hashlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.linux.framing import close_all
from cfs.service.idl import INTERFACE_NAMES, load_interfaces
from tests.command_line import command, environment, unpack_tree
from tests.integration.waiting import wait_until
from tests.varlink_client import SECONDS, Json, RawClient, Reply
from tests.varlink_fuzz import Draw, find_problem

FUZZ_SECONDS = float(os.environ.get("CFS_VARLINK_FUZZ_SECONDS", "60")) / 4  # a fuzzer
SEED = os.environ.get("CFS_FUZZ_SEED", "1")
NOBODY = 65534
REPOSITORY, OCI = INTERFACE_NAMES
METHODS = [
    (interface, name)
    for interface in map(load_interfaces().__getitem__, INTERFACE_NAMES)
    for name, member in interface.members.items()
    if type(member).__name__ == "_Method"
]
WAITING = ("FuseServe", "OciFuseMount", "WatchMount", "PutLayer")  # if they are asked to
WAIT_SECONDS = 0.3  # then it is left
SERVICE_ERRORS = ("InvalidParameter", "MethodNotFound", "PermissionDenied")
MAX_REPLY_SIZE = 16 << 20
IDLE_MIB = 250  # that it may keep
PEAK_MIB = 1500
SLACK = 3  # threads and descriptors that come and go
CONNECT = """
import os, socket, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[1])
with socket.socket(fileno=0) as back:
    socket.send_fds(back, [b"x"], [channel.fileno()])
"""


class Service:
    """A service of its own process, with a store that all may write and an image in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "sock")
        self.log = directory / "log"
        work = directory / "a/b/c"  # relative paths stay below the test's directory
        work.mkdir(parents=True)
        words = [*command("cfsctl"), "varlink", "--address", self.path, "--socket-mode", "0666"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, cwd=work, stdout=log, stderr=log,
                env=environment(HOME=str(directory), PATH=str(work), XDG_RUNTIME_DIR=str(work)),
            )  # fmt: skip
        wait_until(lambda: Path(self.path).exists(), "the service does not listen")
        self.known: dict[str, list[Any]] = {}

    def connect(self, uid: int = 0) -> RawClient:
        if uid == 0:
            return RawClient.connect(self.path)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            script = [sys.executable, "-I", "-S", "-c", CONNECT, self.path, str(uid)]
            subprocess.run(script, stdin=theirs.fileno(), check=True)
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        channel = socket.socket(fileno=fds[0])
        channel.settimeout(SECONDS)
        return RawClient(channel)

    @property
    def layout(self) -> str:
        return f"oci:{self.directory}/layout:v1"

    def store(self, uid: int) -> Path:
        """Return the store of a user."""
        return self.directory / f"of-{uid}" / "store"

    def fill(self, client: RawClient, uid: int) -> int:
        """Open the store of a user, pull an image into it, and return the handle."""
        opened = client.call(f"{REPOSITORY}.OpenRepository", path=str(self.store(uid)))
        handle: int = opened["parameters"]["handle"]
        client.call(
            f"{OCI}.Pull", handle=handle, image=self.layout, name="app", local_fetch="",
            bootable=False,
        )  # fmt: skip
        return handle

    def memory_mib(self, line: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{line}:")[2].split()[0]) >> 10

    def counts(self) -> tuple[int, int]:
        """Return how many threads and descriptors it has."""
        process = Path(f"/proc/{self.process.pid}")
        return len(os.listdir(process / "task")), len(os.listdir(process / "fd"))

    def check_alive(self) -> None:
        with self.connect() as client:
            assert client.call("org.varlink.service.GetInfo")["parameters"]["product"] == "cfsctl"

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(SECONDS) == 0
        finally:
            self.process.kill()
            self.process.wait()
        log = self.log.read_text()
        assert "Traceback" not in log, log[-5000:]


@pytest.fixture
def service() -> Iterator[Service]:
    """Afterwards it is as it was before, but for what it may keep."""
    with tempfile.TemporaryDirectory(prefix="cfs-") as directory:  # others may look into this one
        os.chmod(directory, 0o755)
        yield from _serve(Path(directory))


def _serve(directory: Path) -> Iterator[Service]:
    service = Service(directory)
    try:
        service.known = _fill(service)
        before = service.counts()
        yield service
        service.check_alive()
        _close_all(service)
        wait_until(
            lambda: max(map(int.__sub__, service.counts(), before)) <= SLACK,
            "threads or descriptors are left",
        )
        assert service.memory_mib("RssAnon") < IDLE_MIB
        assert service.memory_mib("VmHWM") < PEAK_MIB
    finally:
        service.end()


def _fill(service: Service) -> dict[str, list[Any]]:
    """Make the stores; return what their clients may name."""
    unpack_tree(service.directory)
    (service.directory / "mnt").mkdir()
    shown: Json = {}
    for uid in _users():
        directory = service.store(uid).parent
        directory.mkdir()
        os.chown(directory, uid, uid)
        with service.connect(uid) as client:
            client.call(f"{REPOSITORY}.InitRepository", path=str(service.store(uid)), insecure=True)
            handle = service.fill(client, uid)
            reply = client.call(f"{OCI}.Inspect", handle=handle, image="app")
            shown.update(reply["parameters"])  # the same for all
    manifest = json.loads(shown["manifest"])
    diff_ids = json.loads(shown["config"])["rootfs"]["diff_ids"]
    digest = "sha256:" + hashlib.sha256(shown["manifest"].encode()).hexdigest()
    image = shown["composefs_erofs"]
    return {
        "image": ["app", "app", f"@{digest}", digest, service.layout, image],
        "name": ["app", "other", "refs/app", image],
        "insecure": [True],
        "path": [str(service.store(uid)) for uid in _users()] + ["new"],
        "mountpoint": [f"{service.directory}/mnt"],
        "mount_id": [1, 2, 3],
        "diff_id": diff_ids,
        "manifest_digest": [digest, manifest["config"]["digest"]],
        "manifest_json": [shown["manifest"]],
        "config_json": [shown["config"]],
        "expected_digest": [image],
        "storage_path": [str(service.directory)],
        "storage_root": [str(service.directory)],
        "params": [{"diff_id": diff_ids[0]}],
        "interface": [REPOSITORY],
    }


def _close_all(service: Service) -> None:
    with service.connect() as client:
        last = service.fill(client, 0)
    for uid in _users():
        with service.connect(uid) as client:
            mounts = client.call(f"{REPOSITORY}.ListMounts")["parameters"]["mounts"]
            for mount in mounts:
                client.call(f"{REPOSITORY}.Unmount", mount_id=mount["mount_id"], detach=True)
            for handle in range(last + 1):
                client.call(f"{REPOSITORY}.CloseRepository", handle=handle)


def _users() -> list[int]:
    return [0, NOBODY] if os.geteuid() == 0 else [0]


Fuzzer = Callable[[Service, Draw, int], None]


def _run_for(service: Service, name: str, fuzz: Fuzzer) -> None:
    """Run a fuzzer for its time; a failure tells how to have it again."""
    end = time.monotonic() + FUZZ_SECONDS
    number = 0
    while time.monotonic() < end:
        number += 1
        draw = Draw(f"{SEED} {name} {number}", service.known)
        try:
            fuzz(service, draw, draw.random.choice(_users()))
        except BaseException as error:
            error.add_note(f"CFS_FUZZ_SEED={SEED}, {name}: round {number}")
            raise
        assert service.process.poll() is None


def test_methods(service: Service) -> None:
    """Each method with parameters drawn from the IDL: a declared error, or a reply as declared."""
    _run_for(service, "methods", _call_methods)


def _call_methods(service: Service, draw: Draw, uid: int) -> None:
    with service.connect(uid) as client:
        draw.known["handle"] = [service.fill(client, uid)]
        for _ in range(100):
            interface, method = draw.random.choice(METHODS)
            flags = {flag: True for flag in ("more", "oneway") if draw.happens(0.1)}
            parameters = draw.members(interface, interface.members[method].in_type.fields)
            with draw.fds(str(service.directory)) as fds:
                client.send(f"{interface.name}.{method}", fds, parameters=parameters, **flags)
            may_wait = method in WAITING
            if "oneway" in flags:
                if may_wait:  # then the next call waits as well
                    return
                continue
            while (reply := _receive(client, may_wait=may_wait)) is not None:
                _check_reply(interface, method, reply)
                if "mount" in (found := reply.members.get("parameters", {})):
                    draw.known["mount_id"] = [found["mount"]["mount_id"]]
                if method == "CloseRepository" and "error" not in reply.members:
                    draw.known["handle"] = [service.fill(client, uid)]
                if not reply.members.get("continues"):
                    break
            else:
                assert may_wait, f"{method} {str(parameters)[:1000]}: closed"
                return


def _receive(client: RawClient, *, may_wait: bool) -> Reply | None:
    """Return a reply; None if the connection is closed, or the call waits."""
    if may_wait and not select.select([client.channel], [], [], WAIT_SECONDS)[0]:
        return None
    return client.receive()


def _check_reply(interface: Any, method: str, reply: Reply) -> None:
    close_all(reply.fds)
    members = reply.members
    assert len(json.dumps(members, ensure_ascii=False).encode()) < MAX_REPLY_SIZE
    found = members.get("parameters", {})
    if "error" not in members:
        kind = interface.members[method].out_type
        assert isinstance(members["continues"], bool)
        assert find_problem(interface, kind, found, method) is None
        return
    owner, _, name = members["error"].rpartition(".")
    if owner == "org.varlink.service":
        assert name in SERVICE_ERRORS
        return
    assert owner == interface.name
    assert find_problem(interface, interface.members[name].type, found, name) is None
    message = found.get("message", "")
    assert "in the service" not in message
    assert "\n" not in message


def test_bytes(service: Service) -> None:
    """Messages with damage: replies, or a closed connection."""
    _run_for(service, "bytes", _send_bytes)


def _send_bytes(service: Service, draw: Draw, uid: int) -> None:
    good = []
    for _ in range(draw.random.randrange(1, 5)):
        interface, method = draw.random.choice(METHODS)
        parameters = draw.members(interface, interface.members[method].in_type.fields)
        request = {"method": f"{interface.name}.{method}", "parameters": parameters}
        good.append(json.dumps(request).encode() + b"\0")
    with service.connect(uid) as client, suppress(BrokenPipeError, ConnectionResetError):
        client.channel.settimeout(1)
        for _ in range(3):
            data = draw.spoil(b"".join(good))
            pieces = draw.random.choice((1, 1, 2, 20))
            for at in range(0, len(data), max(1, len(data) // pieces)):
                with draw.fds(str(service.directory)) as fds, suppress(TimeoutError):
                    client.send_raw(data[at : at + len(data) // pieces], fds)
        client.channel.shutdown(draw.random.choice((socket.SHUT_WR, socket.SHUT_RDWR)))
        while (reply := _receive(client, may_wait=True)) is not None:
            close_all(reply.fds)  # what is damaged may be a call all the same


def test_manners(service: Service) -> None:
    """Floods, stalls and ends in the middle, by many connections at once."""
    _run_for(service, "manners", _misbehave)


def _misbehave(service: Service, draw: Draw, uid: int) -> None:
    good = b'{"method":"org.varlink.service.GetInfo"}\0'
    long = json.dumps(
        {"method": f"{REPOSITORY}.GetInterfaceDescription", "parameters": {"x": "y" * (8 << 20)}}
    ).encode()
    ways: list[Callable[[RawClient], None]] = [
        lambda each: each.send_raw(good * 5000),  # does not read
        lambda each: each.send_raw(long + b"\0"),
        lambda each: each.send_raw(long[: draw.random.randrange(len(long))]),  # never ends
        lambda each: each.send_raw(good[: draw.random.randrange(len(good))]),
        lambda each: each.send_raw(b"\0" * 10_000),
        lambda each: each.send_raw(b'{"a":' * 100_000),
        lambda each: each.send_raw(b"[]," * 1_000_000 + b"\0"),
        lambda each: each.channel.shutdown(socket.SHUT_WR),
        lambda each: each.channel.shutdown(socket.SHUT_RD),
        lambda each: _flood_with_fds(each, draw),
        lambda each: _read_byte_by_byte(each, good),
    ]
    with ExitStack() as stack:
        first = stack.enter_context(service.connect(uid))
        others = [stack.enter_context(service.connect()) for _ in range(draw.random.randrange(30))]
        for each in (first, *others):
            each.channel.settimeout(0.05)
            with suppress(OSError):
                draw.random.choice(ways)(each)
        service.check_alive()


def _flood_with_fds(client: RawClient, draw: Draw) -> None:
    with open(os.devnull) as file:
        for _ in range(draw.random.randrange(1, 10)):
            client.send_raw(b"{", [file.fileno()] * 250)


def _read_byte_by_byte(client: RawClient, data: bytes) -> None:
    client.send_raw(data * 100)
    for _ in range(100):
        client.channel.recv(1)


def test_connections_without_number(service: Service) -> None:
    """More than the service takes: the rest is closed, and none is left in the end."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(service.connect()) for _ in range(1500)]
            for client in clients:
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.send("org.varlink.service.GetInfo")
            nr_served = sum(client.receive() is not None for client in clients)
            assert 500 <= nr_served <= 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_descriptors_of_many_incomplete_messages(service: Service) -> None:
    """They are counted before the messages end."""
    before = service.counts()[1]
    with ExitStack() as stack, open(os.devnull) as file:
        for _ in range(100):
            client = stack.enter_context(service.connect())
            with suppress(OSError):  # ETOOMANYREFS: we may not have more under way
                client.send_raw(b"{", [file.fileno()] * 253)
        service.check_alive()
        assert service.counts()[1] - before < 3000


def test_a_peer_that_sends_his_own_connection(service: Service) -> None:
    """The service cannot notice that he leaves; it goes on, and can be ended."""
    with service.connect() as client:
        handle = service.fill(client, 0)
        diff_id = service.known["diff_id"][0]
        parameters: Json = {"handle": handle, "diff_id": diff_id, "zerocopy": False}
        with open(os.devnull) as file:
            fds = [client.channel.fileno(), file.fileno()]
            client.send(f"{OCI}.PutLayer", fds, parameters=parameters)
