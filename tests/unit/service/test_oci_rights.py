"""Whoever pulls, sends or receives through the service has no more than his own rights."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfs.digest import Algorithm
from cfs.oci.splitdir import File, Inline, format_chunk
from cfs.repository.repository import init
from cfs.service.errors import MethodError
from cfs.service.handles import Handles
from cfs.service.oci_interface import OciMethods
from cfs.service.rights import as_peer
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.unit.service.direct import SOMEBODY, calling

TOP = make_tar({"usr": None, "usr/tool": b"tool" * 100})


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that belongs to somebody, and where he may go."""
    if os.geteuid() != 0:
        pytest.skip("needs root: only root may act as somebody else")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        own = Path(name) / "own"
        own.mkdir()
        os.chown(own, SOMEBODY.uid, SOMEBODY.gid)
        yield own


@pytest.fixture
def oci(handles: Handles) -> Iterator[OciMethods]:
    methods = OciMethods(handles)
    yield methods
    methods.close()


@pytest.fixture
def handle(home: Path, handles: Handles) -> int:
    store = str(home / "store")
    with as_peer(SOMEBODY):
        init(store, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with calling(SOMEBODY) as (call, _):
        return handles.open_store(call, store).handle


def pull(oci: OciMethods, handle: int, layout: Path, *, more: bool = False) -> Any:
    with calling(SOMEBODY, more=more) as (call, _):
        reply = oci.Pull(
            call, handle=handle, image=f"oci:{layout}:v1", name="v1", local_fetch="disabled",
            storage_root=None, bootable=False, xattrs=None, expected_digest=None,
        )  # fmt: skip
        return list(reply)


@pytest.mark.parametrize("more", [False, True])
def test_what_is_pulled_belongs_to_him(
    home: Path, oci: OciMethods, handle: int, *, more: bool
) -> None:
    layout = Layout(home / "layout")
    layout.add_image("v1", [TOP])
    pull(oci, handle, layout.path, more=more)
    owners = {path.lstat().st_uid for path in (home / "store").rglob("*")}
    assert owners == {SOMEBODY.uid}


@pytest.mark.parametrize("more", [False, True])
def test_only_what_he_may_read_is_pulled(
    home: Path, oci: OciMethods, handle: int, *, more: bool
) -> None:
    layout = Layout(home / "layout")
    manifest = layout.add_image("v1", [TOP])
    layout.blob(manifest["layers"][0]["digest"]).chmod(0o600)  # root's; read by another thread
    with pytest.raises(MethodError, match="Permission denied"):
        pull(oci, handle, layout.path, more=more)


def test_only_what_he_may_read_is_received(home: Path, oci: OciMethods, handle: int) -> None:
    (home / "secret").write_bytes(TOP)
    (home / "secret").chmod(0o600)
    assert (home / "secret").stat().st_uid == 0
    (home / "stream").write_bytes(format_chunk(File(len(TOP), 0, b"secret")))
    put: dict[str, Any] = {"handle": handle, "diff_id": digest_of(TOP), "zerocopy": False}
    fds = (os.open(home / "stream", os.O_RDONLY), os.open(home, os.O_PATH))
    with calling(SOMEBODY, fds=fds) as (call, _), pytest.raises(PermissionError):
        oci.PutLayer(call, **put)
    (home / "stream").write_bytes(format_chunk(Inline(TOP)))
    fds = (os.open(home / "stream", os.O_RDONLY), os.open(home, os.O_PATH))
    with calling(SOMEBODY, fds=fds) as (call, _):
        assert not oci.PutLayer(call, **put)["already_present"]
    owners = {path.lstat().st_uid for path in (home / "store").rglob("*")}
    assert owners == {SOMEBODY.uid}
