"""Who is foreign, and what a foreign user may mount on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.errors import InvalidRequestError
from cfs.linux.capabilities import Capability, has_capability
from cfs.linux.credentials import Credentials
from cfs.repository.repository import init
from cfs.service import rights
from cfs.service.call import Peer
from cfs.service.errors import PermissionDenied
from cfs.service.handles import Handles, StoreOptions
from cfs.service.repository_interface import RepositoryMethods
from cfs.service.rights import (
    as_peer,
    as_service,
    is_foreign,
    open_mountpoint,
    refuse_foreign,
    store_path,
)
from tests.paths import CHECKOUT
from tests.unit.service.direct import OWN, SOMEBODY, calling

ROOT = Peer(1, 0, 0, ())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    place = tmp_path / "place"
    place.mkdir()
    return place


def test_root_and_the_own_user_are_not_foreign() -> None:
    before = Credentials.current()
    for peer in (OWN, ROOT):
        assert not is_foreign(peer)
        refuse_foreign(peer)
        with as_peer(peer):
            assert Credentials.current() == before
    assert is_foreign(SOMEBODY)
    with pytest.raises(PermissionDenied):
        refuse_foreign(SOMEBODY)


@pytest.mark.usefixtures("root")
def test_a_foreign_user_has_his_own_rights_only() -> None:
    before = Credentials.current()
    with as_peer(SOMEBODY):
        assert Credentials.current().uid == SOMEBODY.uid
        assert not has_capability(Capability.SYS_ADMIN)
        with as_peer(SOMEBODY, may_mount=True):
            assert has_capability(Capability.SYS_ADMIN)
            assert not has_capability(Capability.DAC_READ_SEARCH)
            assert Credentials.current().uid == SOMEBODY.uid
        with as_service():
            assert Credentials.current() == before
        assert not has_capability(Capability.SYS_ADMIN)
    assert Credentials.current() == before


def test_a_service_that_is_not_root_refuses_others() -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setresuid(54399, 54399, 54399)
            try:
                with as_peer(SOMEBODY):
                    pass
            except PermissionDenied:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_own_user_mounts_on_any_directory(place: Path) -> None:
    fd = open_mountpoint(OWN, str(place))
    assert os.path.samestat(os.fstat(fd), place.stat())
    os.close(fd)
    with pytest.raises(NotADirectoryError):
        open_mountpoint(OWN, "/proc/version")


@pytest.mark.usefixtures("root")
def test_a_foreign_user_mounts_on_his_own_directory(place: Path) -> None:
    os.chown(place, SOMEBODY.uid, -1)
    place.chmod(0o700)
    fd = open_mountpoint(SOMEBODY, str(place))
    assert os.path.samestat(os.fstat(fd), place.stat())
    os.close(fd)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("owner", "mode"), [(SOMEBODY.uid, 0o500), (0, 0o777)])
def test_a_foreign_user_mounts_on_no_other_directory(place: Path, owner: int, mode: int) -> None:
    os.chown(place, owner, -1)
    place.chmod(mode)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionDenied):
        open_mountpoint(SOMEBODY, str(place))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("root")
def test_a_foreign_user_covers_no_control_group(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(place, SOMEBODY.uid, -1)
    monkeypatch.setattr(rights, "file_system", lambda _fd: 0x63677270)
    with pytest.raises(PermissionDenied):
        open_mountpoint(SOMEBODY, str(place))


@pytest.mark.usefixtures("root")
def test_a_foreign_user_is_not_led_where_he_may_not_go(place: Path) -> None:
    hidden = place / "hidden"
    inner = hidden / "inner"
    inner.mkdir(parents=True)
    os.chown(inner, SOMEBODY.uid, -1)
    hidden.chmod(0o700)
    with pytest.raises(PermissionError):
        open_mountpoint(SOMEBODY, str(inner))


def test_stores_are_those_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    assert store_path(OWN, user=False) == "/sysroot/composefs"
    assert store_path(OWN, user=True) == "/nowhere/.var/lib/composefs"
    with pytest.raises(InvalidRequestError):
        store_path(SOMEBODY, user=True)
    monkeypatch.delenv("HOME")
    with pytest.raises(InvalidRequestError):
        store_path(OWN, user=True)


@pytest.mark.usefixtures("root")
def test_modules_are_there_before_somebody_acts_who_cannot_read_them() -> None:
    code = (
        "import sys; from cfs.service.call import Peer; from cfs.service.rights import as_peer\n"
        "late = {'cfs.erofs.writer', 'cfs.mounting.kernel', 'cfs.oci.sources.archives'}\n"
        "assert not late & set(sys.modules)\n"
        "with as_peer(Peer(1, 54321, 54321, ())): assert late <= set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


def test_names_of_others_stay_in_their_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init(str(tmp_path / "store"), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    names = tmp_path / "store/images/refs"
    names.mkdir(parents=True)
    (names / "a\ncfsctl: a lie").symlink_to("../gone")
    handles = Handles(StoreOptions(insecure=True))
    methods = RepositoryMethods(handles)
    with calling() as (call, _):
        handle = handles.open_store(call, str(tmp_path / "store")).handle
        methods.Gc(call, handle=handle, dry_run=True, roots=[])
    handles.close_all()
    (message,) = caplog.messages
    assert message.startswith("collection: images/refs/a\\ncfsctl: a lie: ")
