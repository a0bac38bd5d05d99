"""Clients that we did not write, with our service and with that of composefs-rs.

systemd's ``varlinkctl``, command line and library of PyPI ``varlink``, ``asyncvarlink``.  What
fails with composefs-rs 0.9 is in ``LOST``: those are its defects (spec cli-and-varlink b.2, b.5).
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import asyncvarlink
import pytest
import varlink.scanner  # type: ignore[import-untyped]

from cfs import __version__
from cfs.linux.framing import close_all
from cfs.service.handles import StoreOptions
from tests.foreign_clients import (
    Asyncvarlink,
    ForeignClient,
    Lost,
    OnewayClient,
    Refused,
    Varlinkctl,
    foreign_client,
    varlinkctl_words,
)
from tests.integration.rust_service import serving_rust
from tests.integration.varlink_replay import read_layer, whole_service
from tests.integration.waiting import wait_until
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.paths import CHECKOUT
from tests.varlink_client import SECONDS, Json, serving
from tests.vm.cache import Unavailable

REPOSITORY, OCI, SERVICE = "org.composefs.Repository", "org.composefs.Oci", "org.varlink.service"
TAR = make_tar({"usr": None, "usr/tool": b"tool" * 100, "usr/lib": b"lib" * 40_000})
PROGRESS = {"started", "progress", "skipped", "done", "message"}
# clients that send empty parameters, wrong ones, or none where there are only optional ones
LOST = {
    ("varlinkctl", "info"),
    ("varlinkctl", "features"),
    ("pypi command", "features"),
    ("pypi library", "no selector"),
    ("asyncvarlink", "no selector"),
    ("varlinkctl", "unknown method"),
    ("varlinkctl", "unknown interface"),
    ("varlinkctl", "wrong kind"),
    ("asyncvarlink", "unknown method"),
    ("asyncvarlink", "unknown interface"),
    ("asyncvarlink", "wrong kind"),
}
CLIENTS = ["varlinkctl", "pypi command", "pypi library", "asyncvarlink"]
with_clients = pytest.mark.parametrize("client", CLIENTS, indirect=True)
with_oneway = pytest.mark.parametrize(
    "client", ["varlinkctl", "pypi library", "asyncvarlink"], indirect=True
)
with_asyncvarlink = pytest.mark.parametrize("client", ["asyncvarlink"], indirect=True)


class Service(NamedTuple):
    """A service that runs during the test."""

    is_ours: bool
    path: Path

    @contextmanager
    def losing(self, client: ForeignClient, cell: str) -> Iterator[None]:
        """Expect 0.9 to close the connection where it is known to."""
        if self.is_ours or (client.name, cell) not in LOST:
            yield
            return
        with pytest.raises(Lost):
            yield


@pytest.fixture(scope="session")
def varlinkctl() -> list[str]:
    try:
        return varlinkctl_words()
    except Unavailable as error:
        pytest.skip(f"no varlinkctl: {error}")


@pytest.fixture(params=["ours", "composefs-rs"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    path = tmp_path / "sock"
    is_ours = request.param == "ours"
    with ExitStack() as stack:
        if is_ours:
            dispatcher = stack.enter_context(whole_service(StoreOptions(insecure=True)))
            stack.enter_context(serving(dispatcher, path))
        else:
            words = request.getfixturevalue("rust_words")
            stack.enter_context(serving_rust(words, path, "--insecure"))
        yield Service(is_ours, path)


@pytest.fixture
def client(request: pytest.FixtureRequest, service: Service) -> Iterator[Any]:
    is_varlinkctl = request.param == "varlinkctl"
    words = request.getfixturevalue("varlinkctl") if is_varlinkctl else []
    with foreign_client(request.param, service.path, words) as made:
        yield made


def open_store(client: ForeignClient, path: Path) -> int:
    """Make a store and return its handle."""
    assert client.call(f"{REPOSITORY}.InitRepository", path=str(path)) == {"created": True}
    opened = client.call(f"{REPOSITORY}.OpenRepository", path=str(path))
    assert opened.keys() == {"handle", "hash_algorithm", "objects_device_id"}
    handle: int = opened["handle"]
    return handle


def image_of(directory: Path) -> Json:
    """Make a layout with an image; return the parameters that pull it."""
    Layout(directory / "layout").add_image("v1", [TAR])
    return {"image": f"oci:{directory}/layout:v1", "name": "v1",
            "local_fetch": "disabled", "bootable": False}  # fmt: skip


def expand(interface: Any, kind: Any) -> Any:
    """Return a type of the IDL with the named types in it written out."""
    scanner = varlink.scanner
    match kind:
        case scanner._CustomType():
            return expand(interface, interface.members[kind.name].type)
        case scanner._Maybe() | scanner._Array():
            return type(kind).__name__, expand(interface, kind.element_type)
        case scanner._Struct():
            return [(name, expand(interface, member)) for name, member in kind.fields.items()]
        case scanner._Enum():
            return list(kind.fields)
    return type(kind).__name__


def members_of(text: str) -> dict[str, Any]:
    """Return methods and errors of an interface, with their types written out."""
    interface = varlink.scanner.Interface(text)
    found = {}
    for name, member in interface.members.items():
        if isinstance(member, varlink.scanner._Method):
            found[name] = [expand(interface, kind) for kind in (member.in_type, member.out_type)]
        elif isinstance(member, varlink.scanner._Error):
            found[name] = [expand(interface, member.type)]
    return found


@with_clients
def test_introspection(client: ForeignClient, service: Service) -> None:
    with service.losing(client, "info"):
        found = client.info()
        assert (found["vendor"], found["product"]) == ("org.composefs", "cfsctl")
        assert found["version"] == (__version__ if service.is_ours else "0.9.0")
        assert sorted(found["interfaces"]) == sorted([REPOSITORY, OCI, SERVICE])
    for name in (REPOSITORY, OCI):
        written = (CHECKOUT / "varlink" / f"{name}.varlink").read_text()
        told, ours = members_of(client.describe(name)), members_of(written)
        if service.is_ours:
            assert told == ours
            continue
        if name == OCI:  # 0.9 describes a member that may be missing as one that may not
            ((params, fields),) = [told["GetLayer"][0][1]]
            told["GetLayer"][0][1] = params, [*fields[:-1], (fields[-1][0], ("_Maybe", "bool"))]
        assert told.items() <= ours.items() or told == {key: ours[key] for key in told}


@with_clients
def test_call(client: ForeignClient, service: Service, tmp_path: Path) -> None:
    handle = open_store(client, tmp_path / "store")
    assert handle == 1
    assert client.call(f"{OCI}.ListImages", handle=handle) == {"images": []}
    with service.losing(client, "features"):
        assert "splitdirfdstream-v0" in client.call(f"{OCI}.GetInfo")["features"]
    assert client.call(f"{REPOSITORY}.CloseRepository", handle=handle) == {}


@with_clients
def test_more(client: ForeignClient, tmp_path: Path) -> None:
    handle = open_store(client, tmp_path / "store")
    asked = {"handle": handle, **image_of(tmp_path)}
    *progress, last = client.more(f"{OCI}.Pull", **asked)
    assert progress
    for reply in progress:
        assert len({name for name in reply if reply[name] is not None} & PROGRESS) == 1
    again = client.call(f"{OCI}.Pull", **asked)
    for reply in (last, again):
        assert {name for name in reply if reply[name] is not None} == {"completed"}
    digest = again["completed"]["manifest_digest"]
    (listed,) = client.more(f"{OCI}.ListImages", handle=handle)  # more does no harm there
    assert [image["manifest_digest"] for image in listed["images"]] == [digest]
    with pytest.raises(Refused) as caught:
        client.more(f"{OCI}.Pull", **{**asked, "image": f"oci:{tmp_path}/layout:v2"})
    assert caught.value.name == f"{OCI}.InternalError"


@with_oneway
def test_oneway(client: OnewayClient, service: Service, tmp_path: Path) -> None:
    """Nothing is answered; what was asked for is done, though some have gone before."""
    client.oneway(f"{REPOSITORY}.InitRepository", path=str(tmp_path / "oneway"))
    client.oneway(f"{REPOSITORY}.CloseRepository", handle=99)
    handle = open_store(client, tmp_path / "store")
    wait_until((tmp_path / "oneway" / "meta.json").exists, "no store")
    if not service.is_ours:  # 0.9 answers Pull and GetLayer all the same
        return
    client.oneway(f"{OCI}.Pull", handle=handle, **image_of(tmp_path))
    client.oneway(f"{OCI}.GetLayer", handle=handle, params={"diff_id": digest_of(TAR)})
    assert client.call(f"{OCI}.GetInfo").keys() == {"features"}

    def is_tagged() -> bool:
        return bool(client.call(f"{OCI}.ListImages", handle=handle)["images"])

    wait_until(is_tagged, "no image")


ERRORS: dict[str, tuple[str, Json, str, Json | None]] = {
    "handle": (f"{REPOSITORY}.CloseRepository", {"handle": 99}, f"{REPOSITORY}.InvalidHandle",
               {"handle": 99}),
    "large handle": (f"{OCI}.ListImages", {"handle": (1 << 64) - 1}, f"{OCI}.InvalidHandle",
                     {"handle": (1 << 64) - 1}),
    "digest": (f"{OCI}.HasLayer", {"handle": 1, "diff_id": "ä"}, f"{OCI}.InvalidDigest", None),
    "no selector": (f"{REPOSITORY}.OpenRepository", {}, f"{REPOSITORY}.InvalidSpec", None),
}  # fmt: skip
# the PyPI package asks the service for its methods first, and says itself what is wrong
UNCHECKED_ERRORS: dict[str, tuple[str, Json, str, Json]] = {
    "unknown method": (f"{OCI}.Mount", {"x": 1}, f"{SERVICE}.MethodNotFound",
                       {"method": f"{OCI}.Mount"}),
    "unknown interface": ("org.nope.X", {"x": 1}, f"{SERVICE}.MethodNotFound",
                          {"method": "org.nope.X"}),
    "wrong kind": (f"{OCI}.ListImages", {"handle": "1"}, f"{SERVICE}.InvalidParameter",
                   {"parameter": "handle"}),
}  # fmt: skip


@with_clients
def test_errors(client: ForeignClient, service: Service) -> None:
    errors = dict(ERRORS)
    if isinstance(client, Varlinkctl | Asyncvarlink):
        errors |= UNCHECKED_ERRORS
    for cell, (method, asked, name, parameters) in errors.items():
        with service.losing(client, cell):
            with pytest.raises(Refused) as caught:
                client.call(method, **asked)
            assert caught.value.name == name
            if parameters is None:
                assert caught.value.parameters.keys() == {"message"}
            else:
                assert caught.value.parameters == parameters
    if client.name != "pypi command":  # which dies of it
        with pytest.raises(Refused) as caught:
            client.describe("org.nope")
        assert caught.value.name == f"{SERVICE}.InterfaceNotFound"


@pytest.mark.parametrize("client", ["varlinkctl", "pypi command", "pypi library"], indirect=True)
def test_descriptors_that_nobody_takes(client: ForeignClient, tmp_path: Path) -> None:
    handle = open_store(client, tmp_path / "store")
    client.call(f"{OCI}.Pull", handle=handle, **image_of(tmp_path))
    asked = {"handle": handle, "params": {"diff_id": digest_of(TAR)}}
    told = [client.call(f"{OCI}.GetLayer", **asked), *client.more(f"{OCI}.GetLayer", **asked)]
    assert len({reply["dir_count"] for reply in told}) == 1
    assert client.call(f"{OCI}.Check", handle=handle)["ok"] is True


@with_asyncvarlink
def test_descriptors(client: Asyncvarlink, tmp_path: Path) -> None:
    """A layer goes from one store to another through the client."""
    source = open_store(client, tmp_path / "source")
    target = open_store(client, tmp_path / "target")
    client.call(f"{OCI}.Pull", handle=source, **image_of(tmp_path))
    asked = {"handle": source, "params": {"diff_id": digest_of(TAR)}}
    replies = client.more_with_fds(f"{OCI}.GetLayer", **asked)
    fds = [fd for _, received in replies for fd in received]
    with os.fdopen(os.dup(fds[0]), "rb") as pipe:
        assert b"".join(read_layer(pipe, fds[1:])) == TAR
    close_all(fds)
    reply, fds = client.call_with([], f"{OCI}.GetLayer", asked)
    layer = {"handle": target, "diff_id": digest_of(TAR), "zerocopy": False}
    sent = fds[: 1 + reply["dir_count"]]
    put, none = client.call_with(sent, f"{OCI}.PutLayer", layer)
    close_all(fds)
    assert none == []
    assert put["already_present"] is False
    for few in ([], sent[:1]):
        with pytest.raises(Refused) as caught, open(os.devnull) as file:
            client.call_with([file.fileno() for _ in few], f"{OCI}.PutLayer", layer)
        assert caught.value.name == f"{OCI}.InvalidRequest"


@dataclass
class MountParams:
    """Of ``OciMount``."""

    overlay: bool | None = None
    read_write: bool | None = None


class Layer(TypedDict):
    """Reply of ``HasLayer``."""

    present: bool
    layer_verity: str | None


class OciInterface(asyncvarlink.VarlinkInterface, name=OCI):
    """Methods with types, as asyncvarlink wants them: no other member may be in a reply."""

    @asyncvarlink.varlinkmethod
    def HasLayer(self, *, handle: int, diff_id: str) -> Layer:  # noqa: N802
        raise NotImplementedError

    @asyncvarlink.varlinkmethod(return_parameter="fd_index")
    def OciMount(  # noqa: N802
        self, *, handle: int, image: str, bootable: bool, options: MountParams
    ) -> asyncvarlink.FileDescriptor:
        raise NotImplementedError


@with_asyncvarlink
@pytest.mark.usefixtures("overlay")
def test_typed_calls(client: Asyncvarlink, tmp_path: Path) -> None:
    """Optional members are null or missing in both directions, a descriptor is an object."""
    handle = open_store(client, tmp_path / "store")
    client.call(f"{OCI}.Pull", handle=handle, **image_of(tmp_path))

    async def ask(oci: Any) -> None:
        verities = []
        for digest in (digest_of(TAR), digest_of(b"")):
            layer = await oci.HasLayer(handle=handle, diff_id=digest)
            assert layer["present"] == (layer["layer_verity"] is not None)
            verities.append(layer["layer_verity"])
        assert [verity is None for verity in verities] == [False, True]
        asked = {"handle": handle, "image": "v1", "bootable": False, "options": MountParams()}
        with await oci.OciMount(**asked) as reply:
            assert os.listdir(f"/proc/self/fd/{reply['fd_index'].fileno()}") == ["usr"]

    client.use(OciInterface, ask)


@with_asyncvarlink
@pytest.mark.parametrize("service", ["ours"], indirect=True)
@pytest.mark.usefixtures("root", "fuse")
def test_detached_fuse_mount(client: Asyncvarlink, tmp_path: Path) -> None:
    handle = open_store(client, tmp_path / "store")
    client.call(f"{OCI}.Pull", handle=handle, **image_of(tmp_path))
    asked = {"handle": handle, "image": "v1", "bootable": False, "wait": False}
    reply, fds = client.call_with([], f"{OCI}.OciFuseMount", asked)
    try:
        (fd,) = fds
        assert (reply["fd_index"], reply["mount"]["state"]) == (0, "Serving")
        assert os.listdir(f"/proc/self/fd/{fd}") == ["usr"]
    finally:
        close_all(fds)
    asked = {"mount_id": reply["mount"]["mount_id"]}
    told = client.more(f"{REPOSITORY}.WatchMount", **asked)  # until it has ended
    assert told[-1]["mount"]["state"] == "Ended"


@pytest.mark.parametrize("client", ["varlinkctl"], indirect=True)
@pytest.mark.parametrize("service", ["ours"], indirect=True)
@pytest.mark.usefixtures("fuse")
def test_fuse_mount_for_as_long_as_varlinkctl_runs(
    client: Varlinkctl, tmp_path: Path, mnt: Path
) -> None:
    handle = open_store(client, tmp_path / "store")
    client.call(f"{OCI}.Pull", handle=handle, **image_of(tmp_path))
    asked = {"handle": handle, "image": "v1", "mountpoint": str(mnt), "bootable": False,
             "wait": True}  # fmt: skip
    with client.start(f"{OCI}.OciFuseMount", **asked) as replies:
        mount = next(replies)["mount"]
        assert (mount["state"], os.listdir(mnt)) == ("Serving", ["usr"])
        assert client.call(f"{REPOSITORY}.ListMounts")["mounts"][0]["state"] == "Serving"
    wait_until(lambda: not mnt.is_mount(), "it stays")


@with_asyncvarlink
def test_upgrade_is_not_taken(client: Asyncvarlink) -> None:
    """The reply is that of an ordinary call, and the connection goes on with varlink."""
    with pytest.raises(Refused) as caught:
        client.call_with([], f"{OCI}.ListImages", {"handle": 9}, upgrade=True)
    assert caught.value.name == f"{OCI}.InvalidHandle"
    assert "interfaces" in client.call_with([], f"{SERVICE}.GetInfo", {}, upgrade=True)[0]
    assert client.call(f"{OCI}.GetInfo").keys() == {"features"}


@pytest.fixture
def bare_program(tmp_path: Path) -> Path:
    """``cfsctl`` as a path without arguments, which is all that ``exec:`` takes."""
    program = tmp_path / "cfsctl"
    words = [sys.executable, "-P", "-m", "cfs.cli.main"]
    lines = [f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}", f'exec {shlex.join(words)} "$@"']
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o755)
    return program


def test_varlinkctl_starts_the_service(
    bare_program: Path, varlinkctl: list[str], tmp_path: Path
) -> None:
    client = Varlinkctl(f"exec:{bare_program}", varlinkctl)
    assert client.info()["version"] == __version__
    assert client.call(f"{REPOSITORY}.OpenRepository", path=str(make_store(client, tmp_path)))
    with pytest.raises(Refused) as caught:
        client.call(f"{REPOSITORY}.CloseRepository", handle=1)  # each has a service of its own
    assert (caught.value.name, caught.value.parameters) == (
        f"{REPOSITORY}.InvalidHandle", {"handle": 1},
    )  # fmt: skip


def make_store(client: ForeignClient, directory: Path) -> Path:
    path = directory / "store"
    asked = {"path": str(path), "insecure": True}
    assert client.call(f"{REPOSITORY}.InitRepository", **asked) == {"created": True}
    return path


@pytest.mark.parametrize("arguments", [[], ["varlink"], ["oci", "varlink"]])
def test_pypi_command_starts_the_service(bare_program: Path, arguments: list[str]) -> None:
    """It leaves the service behind."""
    words = shlex.join([str(bare_program), *arguments])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "varlink.cli", "-A", words, "info"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.wait(SECONDS) == 0
        finally:
            os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=SECONDS)  # to the end of the service
    assert "Product: cfsctl\n" in said


def test_varlinkctl_itself(varlinkctl: list[str], tmp_path: Path) -> None:
    """What only it does: listings and validation."""
    path, options = tmp_path / "sock", StoreOptions(insecure=True)
    with whole_service(options) as dispatcher, serving(dispatcher, path):
        client = Varlinkctl(str(path), varlinkctl)
        listed = client.run("list-interfaces", f"unix:{path}").split()
        assert sorted(listed) == sorted([REPOSITORY, OCI, SERVICE])
        methods = client.run("list-methods", str(path)).split()
        texts = {name: client.describe(name) for name in listed}
    assert sorted(methods) == sorted(
        f"{name}.{method}" for name, text in texts.items()
        for method, kinds in members_of(text).items() if len(kinds) > 1
    )  # fmt: skip
    for name in (REPOSITORY, OCI):
        assert client.run("validate-idl", str(CHECKOUT / "varlink" / f"{name}.varlink"))
