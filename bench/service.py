"""The varlink service under load: ours beside composefs-rs, paced and saturated.

``python bench/service.py [WORK]``: ``CLIENTS`` clients make ``CALLS`` calls, half of them pairs of
OpenRepository and CloseRepository, the others short ones of all interfaces.  Meanwhile one client
streams Pulls, each into a new store, and one waits for the end of a FUSE mount (ours, as root).

- paced: calls come at random, ``RATE`` a second in all.  A call that is due while its client still
  waits for another one comes late; its time counts from when it was due.
- saturated: each client makes its next call as soon as it has the reply.

Each service in turn, ``ROUNDS`` times; all clients are this one process.  Prints quantiles of the
pairs and of all calls over all rounds, the median Pull beside that of the idle service, and the
service's processor time.  A call that is not answered ends it with an error.

``CFS_RUST_CFSCTL`` names the cfsctl of composefs-rs.
"""

import asyncio
import gc
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from pull import Layout

CLIENTS, CALLS, RATE = 100, 10_000, 500
ROUNDS = 3
PULLS_ALONE = 5
FILES, FILE_SIZE = 4_000, 32_768  # of the layer that is pulled
SECONDS = 120
OURS, RUST = "cfsctl", "composefs-rs"
REPOSITORY, OCI = "org.composefs.Repository", "org.composefs.Oci"
_TICKS = os.sysconf("SC_CLK_TCK")


class Client(asyncio.Protocol):
    """A connection; one call at a time."""

    def __init__(self) -> None:
        self._data = b""
        self._reply: asyncio.Future[bytes] | None = None

    @classmethod
    async def connect(cls, address: Path) -> Self:
        """Connect."""
        _, client = await asyncio.get_running_loop().create_unix_connection(cls, str(address))
        return client

    def connection_made(self, transport: Any) -> None:
        """Keep what to write to."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take the last reply of a call; replies of a stream before it only show progress."""
        *replies, self._data = (self._data + data).split(b"\0")
        if replies and b'"continues":true' not in replies[-1]:
            assert self._reply is not None
            self._reply.set_result(replies[-1])

    def connection_lost(self, error: Exception | None) -> None:
        """Have the call that waits fail."""
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error or EOFError("the service has closed a connection"))

    async def call(self, method: str, *, more: bool = False, **parameters: object) -> Any:
        """Return the parameters of the reply, with ``error`` if it is one."""
        self._reply = asyncio.get_running_loop().create_future()
        request: dict[str, object] = {"method": method, "more": more}
        if parameters:  # composefs-rs closes the connection if there are none to be
            request["parameters"] = parameters
        self.transport.write(json.dumps(request).encode() + b"\0")
        reply = json.loads(await self._reply)
        parameters = reply.get("parameters") or {}
        return {**parameters, "error": reply["error"]} if "error" in reply else parameters

    async def open(self, store: Path) -> int:
        """Return the handle of a store."""
        opened = await self.call(f"{REPOSITORY}.OpenRepository", path=str(store))
        return int(opened["handle"])


@dataclass
class Times:
    """Seconds that were measured.

    Attributes:
        pairs: from when OpenRepository was due until CloseRepository was answered.
        calls: each; of a pair both together.
        pulls: each beside the calls.
        alone: each of the idle service.
        elapsed: from the first call to the last reply, of all rounds.
        cpu: of the service meanwhile.
    """

    pairs: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    pulls: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    elapsed: float = 0
    cpu: float = 0


class Service(NamedTuple):
    """A service that runs."""

    name: str
    address: Path
    pid: int


async def make_pair(client: Client, store: Path) -> None:
    """Open the store and close it."""
    handle = await client.open(store)
    if failure := await client.call(f"{REPOSITORY}.CloseRepository", handle=handle):
        raise SystemExit(f"CloseRepository: {failure}")


async def make_other(client: Client, handle: int) -> None:
    """Make one short call; one in seven is an error."""
    method, parameters = random.choice(  # noqa: S311 - any will do
        (
            ("org.varlink.service.GetInfo", {}),
            (f"{OCI}.GetInfo", {}),
            (f"{OCI}.ListImages", {"handle": handle}),
            (f"{OCI}.HasLayer", {"handle": handle, "diff_id": "sha256:" + "0" * 64}),
            (f"{REPOSITORY}.ListImageRefs", {"handle": handle}),
            (f"{REPOSITORY}.ImageObjects", {"handle": handle, "name": "refs/image"}),
            (f"{REPOSITORY}.CloseRepository", {"handle": 0}),
        )
    )
    found = await client.call(method, **parameters)
    if ("error" in found) is not (parameters.get("handle") == 0):
        raise SystemExit(f"{method}: {found}")


async def work(address: Path, store: Path, due: Sequence[float | None], times: Times) -> None:
    """Be a client that makes calls when they are due; None: at once.

    A third of the turns are pairs, so that half of the calls are in pairs.
    """
    client = await Client.connect(address)
    handle = await client.open(store)
    for when in due:
        if when is not None:
            await asyncio.sleep(max(0, when - time.perf_counter()))
        start = time.perf_counter() if when is None else when
        if is_pair := random.random() < 1 / 3:  # noqa: S311 - any will do
            await make_pair(client, store)
        else:
            await make_other(client, handle)
        seconds = time.perf_counter() - start
        times.calls.append(seconds)
        if is_pair:
            times.pairs.append(seconds)
    client.transport.close()


class Puller:
    """A client that pulls an image again and again, each time into a new store."""

    def __init__(self, client: Client, ground: Path) -> None:
        self._client = client
        self._image = f"oci:{ground / 'layout'}:v1"
        self._stores = ground / "pulled"
        self._stores.mkdir()

    async def pull(self) -> float:
        """Pull once; return the seconds."""
        store = self._stores / str(len(list(self._stores.iterdir())))
        algorithm = "fsverity-sha256-12"
        await self._client.call(
            f"{REPOSITORY}.InitRepository", path=str(store), algorithm=algorithm, insecure=True
        )
        handle = await self._client.open(store)
        start = time.perf_counter()
        done = await self._client.call(
            f"{OCI}.Pull", more=True, handle=handle, image=self._image, name="v1",
            local_fetch="disabled", bootable=False,
        )  # fmt: skip
        if "completed" not in done:
            raise SystemExit(f"Pull: {done}")
        seconds = time.perf_counter() - start
        await self._client.call(f"{REPOSITORY}.CloseRepository", handle=handle)
        return seconds

    async def go_on(self, times: Times, ended: asyncio.Event) -> None:
        """Pull at least once, and until the load has ended."""
        while not ended.is_set():
            times.pulls.append(await self.pull())


@asynccontextmanager
async def waiting(address: Path, ground: Path) -> AsyncIterator[None]:
    """Have a client wait for the end of a FUSE mount during the block."""
    client, other = await Client.connect(address), await Client.connect(address)
    mountpoint = ground / "mnt"
    mountpoint.mkdir(exist_ok=True)
    handle = await client.open(ground / "store")
    waits = asyncio.create_task(
        client.call(
            f"{REPOSITORY}.FuseServe",
            handle=handle, image="refs/image", mountpoint=str(mountpoint), wait=True,
        )
    )  # fmt: skip
    mounts: Any = None
    while not mounts or not mounts["mounts"] or mounts["mounts"][0]["state"] != "Serving":
        await asyncio.sleep(0.05)
        mounts = await other.call(f"{REPOSITORY}.ListMounts")
        assert not waits.done(), waits.result()
    yield
    assert not waits.done()
    await other.call(f"{REPOSITORY}.Unmount", mount_id=mounts["mounts"][0]["mount_id"])
    assert "error" not in await waits


@asynccontextmanager
async def nothing() -> AsyncIterator[None]:
    """Do nothing else."""
    yield


def draw_times(rate: float | None) -> list[list[float | None]]:
    """Return when each client's turns are due: 4/3 calls each; a rate a second, or at once."""
    due: list[list[float | None]] = [[] for _ in range(CLIENTS)]
    when = time.perf_counter() + 0.5
    for number in range(CALLS * 3 // 4):
        if rate is None:
            due[number % CLIENTS].append(None)
        else:
            when += random.expovariate(rate * 3 / 4)
            due[random.randrange(CLIENTS)].append(when)  # noqa: S311 - any will do
    return due


async def measure(service: Service, ground: Path, rate: float | None, times: Times) -> None:
    """Measure one service once."""
    address = service.address
    puller = Puller(await Client.connect(address), ground)
    await puller.pull()  # everything is imported and in memory
    for _ in range(PULLS_ALONE):
        times.alone.append(await puller.pull())
    can_wait = service.name == OURS and os.geteuid() == 0
    async with waiting(address, ground) if can_wait else nothing():
        ended = asyncio.Event()
        pulls = asyncio.create_task(puller.go_on(times, ended))
        before, start = cpu_seconds(service.pid), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for due in draw_times(rate):
                group.create_task(work(address, ground / "store", due, times))
        times.elapsed += time.perf_counter() - start
        times.cpu += cpu_seconds(service.pid) - before
        ended.set()
        await pulls


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far, of its children when they have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


@contextmanager
def serving(name: str, command: Sequence[str], address: Path) -> Iterator[Service]:
    """Run a service for the block."""
    with subprocess.Popen([*command, "varlink", "--address", str(address)]) as process:  # noqa: S603
        try:
            deadline = time.monotonic() + SECONDS
            while not address.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            yield Service(name, address, process.pid)
        finally:
            process.terminate()
            process.wait(SECONDS)
            address.unlink(missing_ok=True)


def make_layer() -> Iterator[bytes]:
    """Yield a tar with files of random size and contents that pack to half."""
    chance = random.Random(7)  # noqa: S311 - the same each time
    directory = tarfile.TarInfo("usr")
    directory.type, directory.mode = tarfile.DIRTYPE, 0o755
    yield directory.tobuf()
    for number in range(FILES):
        buffer = io.BytesIO()
        entry = tarfile.TarInfo(f"usr/file{number}")
        entry.size = chance.randrange(2 * FILE_SIZE)
        half = chance.randbytes(entry.size // 2)
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(entry, io.BytesIO(half + bytes(entry.size - len(half))))
            size = tar.offset
        yield buffer.getvalue()[:size]
    yield bytes(1024)


def prepare(ground: Path, ours: Sequence[str]) -> None:
    """Make a layout to pull and a small store with an image."""
    Layout(ground / "layout").write(make_layer())
    tree = ground / "tree"
    tree.mkdir()
    for number in range(20):
        (tree / f"file{number}").write_text(f"{number}" * 200)
    store = str(ground / "store")
    for words in (
        ["init", "--insecure", "--algorithm", "fsverity-sha256-12", store],
        ["--repo", store, "create-image", "--no-propagate-usr-to-root", str(tree), "image"],
    ):
        subprocess.run([*ours, *words], check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def show(load: str, results: dict[str, Times]) -> None:
    """Print a table."""
    heading = "pairs: 50%,99%,max,calls: 50%,99%,a second,CPU,Pull alone,beside,ratio"
    rows: list[tuple[str, ...]] = [("", *heading.split(","))]
    for name, times in results.items():
        pairs = [quantile(times.pairs, part) for part in (0.5, 0.99, 1)]
        calls = [quantile(times.calls, part) for part in (0.5, 0.99)]
        alone, beside = statistics.median(times.alone), statistics.median(times.pulls)
        rate, cpu = CALLS * ROUNDS / times.elapsed, times.cpu / times.elapsed
        pull = (f"{alone:.2f} s", f"{beside:.2f} s", f"{beside / alone:.2f}")
        rows.append((name, *pairs, *calls, f"{rate:.0f}", f"{cpu:.2f}", *pull))
    sys.stdout.write(f"\n{load}: {CLIENTS} clients, {CALLS} calls, {ROUNDS} rounds\n")
    for row in rows:
        sys.stdout.write(f"{row[0]:12}" + "".join(f"{cell:>11}" for cell in row[1:]) + "\n")
    sys.stdout.flush()


def quantile(seconds: Sequence[float], part: float) -> str:
    """Return a quantile in milliseconds."""
    found = sorted(seconds)[min(int(len(seconds) * part), len(seconds) - 1)]
    return f"{found * 1000:.1f} ms"


def main() -> None:
    """Measure and print."""
    commands = {OURS: [sys.executable, "-m", "cfs.cli.main"]}
    if rust := os.environ.get("CFS_RUST_CFSCTL"):
        commands[RUST] = [rust]
    random.seed(7)
    gc.disable()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory:
        ground = Path(directory)
        prepare(ground, commands[OURS])
        for load, rate in (("paced", float(RATE)), ("saturated", None)):
            results = {name: Times() for name in commands}
            for _ in range(ROUNDS):
                for name, command in commands.items():
                    with serving(name, command, ground / "socket") as service:
                        asyncio.run(measure(service, ground, rate, results[name]))
                    shutil.rmtree(ground / "pulled")
            show(load, results)


if __name__ == "__main__":
    main()
