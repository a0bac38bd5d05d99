"""The methods of ``org.composefs.Oci``, called without a connection."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cfs.digest import Algorithm
from cfs.oci import SourceOptions
from cfs.oci.pull import Done, Event, Message, Progress, Pulled, Skipped, Started
from cfs.oci.sources import StoppedError
from cfs.oci.splitdir import Inline, format_chunk
from cfs.repository.repository import init
from cfs.service import oci_pull
from cfs.service.budget import Budget
from cfs.service.call import Disconnection, close_fds
from cfs.service.errors import MethodError
from cfs.service.handles import Handles, StoreOptions
from cfs.service.oci_interface import OciMethods
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.unit.service.direct import OWN, SOMEBODY, calling

SECONDS = 20
TOP = make_tar({"usr": None, "usr/tool": b"tool" * 100, "usr/lib": b"lib" * 40_000})
BIG = make_tar({f"file{number}": os.urandom(60) for number in range(5000)})


class Service:
    """The methods, and stores below a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.handles = Handles(StoreOptions())
        self.oci = OciMethods(self.handles)
        self.layout = Layout(directory / "layout")
        self.layout.add_image("v1", [TOP])

    def open(self, name: str, algorithm: Algorithm = Algorithm.SHA256) -> int:
        path = str(self.directory / name)
        init(path, algorithm=algorithm, is_secure=False, erofs_version=1)
        with calling() as (call, _):
            return self.handles.open_store(call, path).handle

    def call(self, method: str, fds: tuple[int, ...] = (), **parameters: Any) -> Any:
        with calling(fds=fds) as (call, _):
            return getattr(self.oci, method)(call, **parameters)

    def pull(self, handle: int, tag: str = "v1") -> Any:
        return self.call("Pull", **self.wish(handle, tag))["completed"]

    def wish(self, handle: int, tag: str = "v1", **more: Any) -> dict[str, Any]:
        wish = {
            "handle": handle, "image": f"oci:{self.layout.path}:{tag}", "name": tag,
            "local_fetch": "disabled", "storage_root": None, "bootable": False, "xattrs": None,
            "expected_digest": None,
        }  # fmt: skip
        return {**wish, **more}

    def get(self, handle: int, diff_id: str) -> list[int]:
        params = {"diff_id": diff_id, "storage": None, "consumer_has_cap_dac_override": None}
        with calling() as (call, _):
            reply = self.oci.GetLayer(call, handle=handle, params=params)
            fds = call.take_reply_fds()
        assert reply == {"dir_count": len(fds) - 2}
        return fds


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    threads, nr_fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    made = Service(tmp_path)
    yield made
    made.oci.close()
    made.handles.close_all()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == nr_fds


def error_of(function: Callable[[], object]) -> tuple[str, dict[str, Any]]:
    with pytest.raises(MethodError) as caught:
        function()
    return caught.value.name, caught.value.parameters


def wait_for_senders() -> None:
    for thread in threading.enumerate():
        if thread.name == "layer-sender":
            thread.join(SECONDS)
            assert not thread.is_alive()


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_layer_goes_to_another_store(service: Service, algorithm: Algorithm) -> None:
    source, target = service.open("source"), service.open("target", algorithm)
    pulled, diff_id = service.pull(source), digest_of(TOP)
    relayed = service.get(source, diff_id)
    put = service.call(
        "PutLayer", tuple(relayed[:2]), handle=target, diff_id=diff_id, zerocopy=False
    )
    close_fds(relayed[2:])
    wait_for_senders()
    assert not put.pop("already_present")
    verity = put.pop("layer_verity")
    assert sum(put.values()) == 2
    found = {"present": True, "layer_verity": verity}
    assert service.call("HasLayer", handle=target, diff_id=diff_id) == found
    relayed = service.get(source, diff_id)
    again = service.call(
        "PutLayer", tuple(relayed[:2]), handle=target, diff_id=diff_id, zerocopy=True
    )
    close_fds(relayed[2:])
    assert (again["already_present"], again["layer_verity"]) == (True, verity)
    documents = service.call("Inspect", handle=source, image="v1")
    final = service.call(
        "FinalizeImage", handle=target, name="x",
        manifest_json=documents["manifest"], config_json=documents["config"],
        layers=[{"diff_id": diff_id, "layer_verity": verity}],
    )  # fmt: skip
    assert final["manifest_digest"] == pulled["manifest_digest"]
    assert service.call("Check", handle=target, image=None)["ok"]
    wait_for_senders()


def test_a_receiver_who_leaves_ends_the_sender(service: Service) -> None:
    handle = service.open("store")
    service.layout.add_image("big", [TOP, BIG])
    service.pull(handle, "big")
    close_fds(service.get(handle, digest_of(BIG)))
    wait_for_senders()


def test_the_end_of_the_service_ends_senders(service: Service) -> None:
    handle = service.open("store")
    service.layout.add_image("big", [TOP, BIG])
    service.pull(handle, "big")
    kept = [service.get(handle, digest) for digest in (digest_of(BIG), digest_of(TOP))]
    service.oci.stop_sending()
    wait_for_senders()
    with os.fdopen(kept[0][0], "rb") as stream:  # broken off
        assert len(stream.read()) < len(BIG)
    for fds in kept:
        close_fds(fds)
    service.oci = OciMethods(service.handles)


def test_a_user_has_few_senders(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(per_uid=1, total=1, trusted=frozenset())
    monkeypatch.setattr(service.oci._senders, "_budget", budget)
    handle = service.open("store")
    service.pull(handle)
    fds = service.get(handle, digest_of(TOP))
    name, _ = error_of(lambda: service.get(handle, digest_of(TOP)))
    assert name == "InternalError"
    close_fds(fds)
    wait_for_senders()
    close_fds(service.get(handle, digest_of(TOP)))
    wait_for_senders()


def test_a_layer_that_cannot_be_sent(service: Service) -> None:
    handle, unknown = service.open("store"), f"sha256:{0:064}"
    assert error_of(lambda: service.get(handle, unknown)) == ("NoSuchLayer", {"diff_id": unknown})
    assert error_of(lambda: service.get(9, unknown)) == ("InvalidHandle", {"handle": 9})
    assert error_of(lambda: service.get(9, "zz"))[0] == "InvalidDigest"


@pytest.mark.parametrize(
    "begun", [b"", format_chunk(Inline(TOP[:512]))[:100]], ids=["none", "some"]
)
def test_a_sender_who_leaves_ends_the_receiver(service: Service, begun: bytes) -> None:
    handle = service.open("store")
    stream, sink = os.pipe()
    os.write(sink, begun)
    directory = os.open("/", os.O_PATH)
    with (
        ThreadPoolExecutor(1) as executor,
        calling(fds=(stream, directory)) as (call, client),
    ):
        receiving = executor.submit(
            service.oci.PutLayer, call, handle=handle, diff_id=digest_of(TOP), zerocopy=False
        )
        client.close()
        with pytest.raises(ConnectionResetError):
            receiving.result(SECONDS)
    os.close(sink)


def test_contents_of_another_layer_are_refused(service: Service, tmp_path: Path) -> None:
    handle, wrong = service.open("store"), digest_of(b"")
    (tmp_path / "stream").write_bytes(format_chunk(Inline(TOP)))  # no pipe is fine as well
    fds = (os.open(tmp_path / "stream", os.O_RDONLY), os.open("/", os.O_PATH))
    put = {"handle": handle, "diff_id": wrong, "zerocopy": False}
    name, parameters = error_of(lambda: service.call("PutLayer", fds, **put))
    assert name == "DiffIdMismatch"
    assert parameters == {"expected": wrong, "actual": digest_of(TOP)}
    missing = {"present": False, "layer_verity": None}
    assert service.call("HasLayer", handle=handle, diff_id=wrong) == missing


def test_a_pull_tells_what_happens(service: Service) -> None:
    handle = service.open("store")
    with calling(more=True) as (call, _):
        stream = service.oci.Pull(call, **service.wish(handle))
        assert isinstance(stream, Iterator)
        *replies, last = stream
    assert all(continues and len(reply) == 1 for reply, continues in replies)
    told = [name for reply, _ in replies for name in reply if name != "message"]
    assert told == ["started", "progress", "done"]
    assert list(last[0]) == ["completed"]
    assert last[1] is False
    done = next(reply["done"] for reply, _ in replies if "done" in reply)
    progress = next(reply["progress"] for reply, _ in replies if "progress" in reply)
    size = done["transferred"]
    assert done == {"id": digest_of(TOP), "transferred": size}
    assert progress == {"id": digest_of(TOP), "fetched": size, "total": size}


def hanging_pull(begun: threading.Event) -> Callable[..., Pulled]:
    """Return a pull from a registry that never answers."""

    def pull(
        _repository: object, _image: str, options: SourceOptions, *,
        report: Callable[[Event], None], **_: object,
    ) -> Pulled:  # fmt: skip
        stopped = threading.Event()
        with options.stopper.calling(stopped.set):
            report(Message("waiting"))
            begun.set()
            assert stopped.wait(SECONDS)
        options.stopper.check()
        raise AssertionError

    return pull


@pytest.mark.parametrize("how", ["disconnect", "close", "stop"])
def test_a_pull_ends_with_its_client(
    service: Service, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci_pull, "pull", hanging_pull(threading.Event()))
    handle, ending = service.open("store"), Disconnection()
    with calling(more=True, disconnection=ending) as (call, _):
        replies = service.oci.Pull(call, **service.wish(handle))
        assert isinstance(replies, Iterator)
        assert next(replies) == ({"message": "waiting"}, True)
        if how == "close":
            replies.close()  # type: ignore[attr-defined]
            return
        (ending.happen if how == "disconnect" else service.oci.stop_pulls)()
        with pytest.raises(StoppedError):
            list(replies)


def test_a_pull_without_progress_ends_with_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    monkeypatch.setattr(oci_pull, "pull", hanging_pull(begun))
    handle = service.open("store")
    with ThreadPoolExecutor(1) as executor, calling() as (call, _):
        pulling = executor.submit(service.oci.Pull, call, **service.wish(handle))
        assert begun.wait(SECONDS)
        service.oci.stop_pulls()
        with pytest.raises(StoppedError):
            pulling.result(SECONDS)


def test_pulls_at_the_same_time_are_bounded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, begun = service.open("store"), threading.Event()
    monkeypatch.setattr(service.oci, "_budget", Budget(per_uid=1, total=1, trusted=frozenset()))
    with calling(more=True) as (call, _), monkeypatch.context() as patch:
        patch.setattr(oci_pull, "pull", hanging_pull(begun))
        replies = service.oci.Pull(call, **service.wish(handle))
        assert isinstance(replies, Iterator)
        next(replies)
        found = error_of(lambda: service.pull(handle))
        assert found == ("InternalError", {"message": "too many images are being pulled"})
        replies.close()  # type: ignore[attr-defined]
    assert service.pull(handle)


def test_a_long_silence_is_broken(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_pull, "pull", hanging_pull(threading.Event()))
    monkeypatch.setattr(oci_pull, "_MAX_SILENCE", 0.01)
    handle = service.open("store")
    with calling(more=True) as (call, _):
        replies = service.oci.Pull(call, **service.wish(handle))
        assert isinstance(replies, Iterator)
        assert [next(replies)[0] for _ in range(3)] == [
            {"message": "waiting"}, *[{"message": "still working"}] * 2,
        ]  # fmt: skip
        replies.close()  # type: ignore[attr-defined]


def test_progress_waits_for_no_client() -> None:
    events = oci_pull.Events()
    events.put(Skipped("a"))
    events.put(Started("b", 1000))
    for size in range(1, 1001):
        events.put(Progress("b", size))
    events.put(Done("b"))
    events.end()
    assert list(events) == [
        {"skipped": {"id": "a"}},
        {"started": {"id": "b", "total": 1000, "unit": "Bytes"}},
        {"progress": {"id": "b", "fetched": 1000, "total": 1000}},
        {"done": {"id": "b", "transferred": 1000}},
    ]


def test_others_start_no_programs_and_mount_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = service.open("store")
    entry = service.handles._entries[handle]
    service.handles._entries[handle] = entry._replace(uid=SOMEBODY.uid)
    monkeypatch.setattr("cfs.service.handles.as_peer", lambda _: calling(OWN))  # no change
    with calling(SOMEBODY) as (call, _):
        for function in (
            lambda: service.oci.Pull(call, **service.wish(handle, image="docker://x/y")),
            lambda: service.oci.OciMount(
                call, handle=handle, image="v1", bootable=False, options={}
            ),
        ):
            assert error_of(function) == ("PermissionDenied", {})
    service.handles._entries[handle] = entry
