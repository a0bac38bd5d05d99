import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedError,
)
from cfs.objectdir import Verity, temporary, verity
from cfs.repository import creation, metafile, oldstores
from cfs.repository.metadata import Formats, Metadata
from cfs.repository.metafile import create_metadata
from cfs.repository.refs import set_link
from cfs.repository.repository import Outcome, Repository, default_path, init, probe_algorithm
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import register_stream
from tests.stores import ALGORITHMS, STORES, copy_store, list_paths, unpack_store

Case = dict[str, Any]

SHA256, SHA512 = Algorithm.SHA256, Algorithm.SHA512
INIT_CASES: list[Case] = json.loads((STORES / "init-cases.json").read_text())
# it asks for a secure store where an insecure one is; 0.9 says that all is well
REFUSED_BY_US = "--algorithm fsverity-sha256-12"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("golden")
    return {name: unpack_store(name, top / name) for name in ALGORITHMS}


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return make(tmp_path / "store")


def make(path: Path, **choices: Any) -> str:
    settings = {"algorithm": SHA256, "is_secure": False, "erofs_version": 1, **choices}
    init(str(path), **settings)
    return str(path)


def make_old(path: Path, *objects: str) -> str:
    for name in objects:
        (path / "objects" / name[:2]).mkdir(parents=True, exist_ok=True)
        (path / "objects" / name[:2] / name[2:]).touch()
    return str(path)


def test_open_store(store: str) -> None:
    with Repository.open(store) as repository:
        assert repository.algorithm is SHA256
        assert repository.formats == Formats(1)
        assert not repository.is_secure
        assert repository.objects.verity is Verity.NEVER
        assert repository.path == store
        digest = repository.objects.put_bytes(b"content")
        repository.sync()
        os.close(repository.objects.open_object(digest))
    with Repository.open(store, algorithm=SHA256, erofs_version=0) as repository:
        assert repository.formats == Formats(0)
        assert repository.metadata.formats == Formats(1)


def test_two_opens_share_the_lock(store: str) -> None:
    with Repository.open(store) as one:
        with Repository.open(store) as two:
            assert two.fd == one.fd
            with two.exclusive(wait=False):
                pass
        one.close()
        one.close()
    before = len(os.listdir("/proc/self/fd"))
    Repository.open(store).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_not_synced_is_discarded(store: str) -> None:
    with Repository.open(store) as repository:
        digest = repository.objects.put_bytes(bytes(1 << 20))
    with Repository.open(store) as repository, pytest.raises(NotFoundError):
        repository.objects.open_object(digest)


NO_METADATA = "no meta.json in PATH; tried to infer algorithm from objects: "
MUST_INIT = "meta.json not found in PATH; this repository must be initialized with `cfsctl init`"
OTHER_HASH = (
    "repository is configured for fsverity-sha256-12 (from meta.json) but "
    "--hash sha512 was specified"
)
NO_VERITY = "repository was not initialized with fs-verity (hint: "


@pytest.mark.parametrize(
    ("prepare", "choices", "kind", "message"),
    [
        (os.fspath, {}, NotFoundError, "opening repository PATH: No such file or directory"),
        (Path.touch, {}, NotFoundError, "opening repository PATH: Not a directory"),
        (Path.mkdir, {}, NotFoundError, NO_METADATA + "opening objects/ directory: No such"),
        (
            lambda path: (path / "objects/ab").mkdir(parents=True),
            {},
            NotFoundError,
            NO_METADATA + "no objects found in repository — cannot infer metadata",
        ),
        (Path.mkdir, {"upgrade": False}, NotFoundError, MUST_INIT),
        (make, {"algorithm": SHA512}, InvalidRequestError, OTHER_HASH),
        (make, {"require_verity": True}, UnsupportedError, NO_VERITY),
        (make, {"require_verity": True, "insecure": True}, UnsupportedError, NO_VERITY),
    ],
)
def test_errors_of_opening(
    tmp_path: Path,
    prepare: Callable[[Path], object],
    choices: Case,
    kind: type[Exception],
    message: str,
) -> None:
    path = tmp_path / "store"
    prepare(path)
    with pytest.raises(kind) as caught:
        Repository.open(str(path), **choices)
    assert str(caught.value).startswith(message.replace("PATH", str(path)))


def replace(path: Path, create: Callable[[Path], object]) -> None:
    path.unlink()
    create(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(bytes(2 << 20)),
        lambda path: replace(path, os.mkfifo),
        lambda path: replace(path, Path.mkdir),
    ],
)
def test_broken_metadata(store: str, spoil: Callable[[Path], object]) -> None:
    spoil(Path(store, "meta.json"))
    with pytest.raises(FormatError, match=r"^Reading repository algorithm: .*meta\.json"):
        Repository.open(store)
    assert probe_algorithm(store) is None


def test_store_and_metadata_may_be_links(store: str, tmp_path: Path) -> None:
    Path(store, "meta.json").rename(tmp_path / "elsewhere")
    Path(store, "meta.json").symlink_to("../elsewhere")
    (tmp_path / "link").symlink_to("store")
    with Repository.open(str(tmp_path / "link")) as repository:
        repository.check_writable()


def test_security_is_that_of_the_metadata(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faked: few kernels have fs-verity; the virtual machine shows it for real."""
    monkeypatch.setattr(metafile, "measure", lambda _: _digest(SHA256))
    with Repository.open(store, require_verity=True) as repository:
        assert repository.is_secure
        assert repository.objects.verity is Verity.REQUIRE
    with Repository.open(store, insecure=True) as repository:
        assert not repository.is_secure
        assert repository.objects.verity is Verity.TRY
    monkeypatch.setattr(metafile, "measure", lambda _: _digest(SHA512))
    with pytest.raises(IntegrityError, match="fs-verity uses sha512, expected sha256"):
        Repository.open(store)


def _digest(algorithm: Algorithm) -> Digest:
    return Digest(bytes(algorithm.digest_size))


def test_writable(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.open(store) as repository:
        repository.check_writable()
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
        with pytest.raises(PermissionError) as caught:
            repository.check_writable()
        assert caught.value.strerror == "Repository is not writable: Permission denied"
        found = list(os.statvfs(store))
        found[8] |= os.ST_RDONLY
        monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(found))
        with pytest.raises(OSError, match="not writable: read-only file system") as refused:
            repository.check_writable()
        assert refused.value.errno == errno.EROFS


def test_unknown_features_may_forbid_opening(store: str) -> None:
    Path(store, "meta.json").write_text(
        '{"version": 1, "algorithm": "fsverity-sha256-12", "features": {"incompatible": ["new"]}}'
    )
    with pytest.raises(UnsupportedError, match="unknown incompatible"):
        Repository.open(store)


def test_unknown_features_forbid_writing(store: str) -> None:
    Path(store, "meta.json").write_text(
        '{"version": 1, "algorithm": "fsverity-sha256-12",'
        ' "features": {"read-only-compatible": ["new"]}}'
    )
    with Repository.open(store) as repository, pytest.raises(UnsupportedError, match="new"):
        repository.check_writable()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_old_store_is_converted(name: str, golden: dict[str, Path], tmp_path: Path) -> None:
    store = copy_store(golden[name], tmp_path / "store")
    written = (store / "meta.json").read_bytes()
    (store / "meta.json").unlink()
    assert probe_algorithm(str(store)) is Algorithm.parse(name)
    assert not (store / "meta.json").exists()
    with pytest.raises(InvalidRequestError, match="--hash"):
        Repository.open(str(store), algorithm=SHA512 if name == "sha256" else SHA256, upgrade=True)
    with Repository.open(str(store)) as repository:
        assert repository.algorithm is Algorithm.parse(name)
        assert not repository.is_secure
    assert (store / "meta.json").read_bytes() == written


def test_an_odd_old_store_is_converted(tmp_path: Path) -> None:
    store = Path(make_old(tmp_path / "store", "ab" * 32))
    (store / "objects/ac").touch()
    os.mkfifo(store / "objects/ab" / ("cd" * 31))
    (store / "objects/ab" / ("ef" * 31)).symlink_to("nowhere")
    (store / "streams").mkdir()
    (store / "streams/oci-config-file").touch()
    (store / "streams/oci-config-fifo").symlink_to(f"../objects/ab/{'cd' * 31}")
    with Repository.open(str(store)) as repository:
        assert repository.metadata == Metadata.create(SHA256, 1)


def test_require_verity_fails_after_the_conversion(tmp_path: Path) -> None:
    store = make_old(tmp_path / "store", "ab" * 32)
    with pytest.raises(UnsupportedError):
        Repository.open(store, require_verity=True)
    Repository.open(store, upgrade=False).close()


@pytest.mark.parametrize(
    ("keys", "default"),
    [
        (["composefs.image"], 2),
        (["sha256:layer", "composefs.image.boot"], 2),
        (["composefs.image.boot.xattrs=keep-user-xattrs"], 2),
        (["composefs.image.v1", "composefs.image.boot.v1"], 1),
        (["composefs.image.boot.v1.xattrs=keep-user-xattrs"], 1),
        (["sha256:layer"], 1),
    ],
)
def test_format_of_a_converted_store_is_that_of_its_images(
    store: str, keys: list[str], default: int
) -> None:
    with Repository.open(store) as repository:
        with SplitStreamWriter(repository, ContentType.CONFIG) as writer:
            for key in keys:
                writer.add_named(key, repository.objects.put_bytes(key.encode()))
            digest = writer.finish()
        register_stream(repository, "oci-config-sha256:ab", digest)
        with SplitStreamWriter(repository, ContentType.LAYER) as writer:
            writer.add_named("composefs.image", digest)
            register_stream(repository, "oci-layer-sha256:cd", writer.finish())
        set_link(repository.fd, b"streams/oci-config-sha256:broken", b"objects/00/11")
    Path(store, "meta.json").unlink()
    with Repository.open(store) as repository:
        assert repository.metadata == Metadata.create(SHA256, default)


def test_a_converted_store_is_secure_only_if_all_objects_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faked, as above."""
    store = make_old(tmp_path / "store", "ab" * 32, "cd" * 32)
    secure: list[bool] = []
    monkeypatch.setattr(
        oldstores, "create_metadata", lambda *_, is_secure: secure.append(is_secure)
    )
    found = iter([None, (None, True)] * 2)
    monkeypatch.setattr(oldstores, "read_metadata", lambda _: next(found))
    fd = os.open(store, os.O_RDONLY)
    for nr_secure in (1, 2):
        measured = iter([_digest(SHA256)] * nr_secure + [None] * 2)
        monkeypatch.setattr(oldstores, "measure", lambda _, found=measured: next(found))
        oldstores.convert(fd)
    os.close(fd)
    assert secure == [False, True]


def test_init_as_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cfs.cli.cfsctl import run  # noqa: PLC0415

    path = tmp_path / "store"
    for case in INIT_CASES:
        status = run(["init", *case["arguments"], str(path)])
        found = capsys.readouterr()
        assert (path / "meta.json").read_text() == case["meta.json"]
        if " ".join(case["arguments"]) == REFUSED_BY_US:
            assert status == 1
            assert "without fs-verity (insecure); cannot re-initialize" in found.err
            continue
        assert status == case["rc"]
        assert found.out == case.get("stdout", "").replace("PATH", str(path))
        if status:
            expected = f"Error: {case['error']}: {case['innermost']}\n"
            assert found.err == expected.replace("PATH", str(path))


@pytest.mark.parametrize("end", ["", "/", "/.", "//./"])
def test_init_makes_parents(tmp_path: Path, end: str) -> None:
    path = str(tmp_path / "a/b/store") + end
    before = os.umask(0o022)
    try:
        result = init(path, algorithm=SHA512, is_secure=False, erofs_version=2)
    finally:
        os.umask(before)
    assert result.outcome is Outcome.CREATED
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/b/store").stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "a/b/store") == ["meta.json"]
    assert (tmp_path / "a/b/store/meta.json").stat().st_mode & 0o777 == 0o644


def test_init_of_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("store"))
    assert os.listdir("store") == ["meta.json"]
    make(Path("new/../store-of-dots"))
    assert sorted(os.listdir()) == ["new", "store", "store-of-dots"]
    with pytest.raises(InvalidRequestError, match="empty"):
        init("", algorithm=SHA256, is_secure=False, erofs_version=1)


@pytest.mark.parametrize("has_unnamed_files", [True, False])
def test_failed_init_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_unnamed_files: bool,  # noqa: FBT001 - a case
) -> None:
    if not has_unnamed_files:
        monkeypatch.setattr(temporary, "open_unnamed", _refuse_unnamed)
    monkeypatch.setattr(verity, "enable", _refuse_verity)
    with pytest.raises(UnsupportedError, match=r"^Initializing repository at .*not supported"):
        init(str(tmp_path / "a/store"), algorithm=SHA256, is_secure=True, erofs_version=1)
    assert os.listdir(tmp_path) == []
    (tmp_path / "store").mkdir()
    with pytest.raises(UnsupportedError):
        init(str(tmp_path / "store"), algorithm=SHA256, is_secure=True, erofs_version=1)
    assert os.listdir(tmp_path / "store") == []


def test_failed_init_leaves_what_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        (tmp_path / "a/store/theirs").touch()
        _refuse_verity()

    monkeypatch.setattr(verity, "enable", refuse)
    with pytest.raises(UnsupportedError):
        init(str(tmp_path / "a/store"), algorithm=SHA256, is_secure=True, erofs_version=1)
    assert os.listdir(tmp_path / "a/store") == ["theirs"]


def _refuse_verity(*_: object) -> None:
    msg = "fs-verity is not supported"
    raise UnsupportedError(msg)


def _refuse_unnamed(*_: object) -> int:
    msg = "no unnamed files"
    raise UnsupportedError(msg)


def test_init_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "open_unnamed", _refuse_unnamed)
    store = make(tmp_path / "store")
    assert os.listdir(store) == ["meta.json"]
    with Repository.open(store) as repository:
        assert repository.metadata == Metadata.create(SHA256, 1)
    fd = os.open(store, os.O_RDONLY)
    with pytest.raises(FileExistsError):
        create_metadata(fd, Metadata.create(SHA512, 1), is_secure=False)
    os.close(fd)
    assert os.listdir(store) == ["meta.json"]
    assert probe_algorithm(store) is SHA256


@pytest.mark.parametrize("has_unnamed_files", [True, False])
def test_metadata_appear_when_they_are_complete(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_unnamed_files: bool,  # noqa: FBT001 - a case
) -> None:
    store = tmp_path / "store"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def look(fd: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        synced.append((kind, (store / "meta.json").exists()))
        fsync(fd)

    if not has_unnamed_files:
        monkeypatch.setattr(temporary, "open_unnamed", _refuse_unnamed)
    monkeypatch.setattr(os, "fsync", look)
    before = os.listdir("/proc/self/fd")
    make(store)
    assert synced == [("file", False), ("directory", True)]
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_metadata_that_are_a_link_to_nothing(store: str) -> None:
    replace(Path(store, "meta.json"), lambda path: path.symlink_to("nowhere"))
    for attempt in (Repository.open, lambda path: make(Path(path))):
        with pytest.raises(FormatError, match="link that leads nowhere"):
            attempt(store)


def test_metadata_that_cannot_be_read_are_named(store: str) -> None:
    replace(Path(store, "meta.json"), lambda path: path.symlink_to("/proc/self/mem"))
    with pytest.raises(OSError, match="Input/output") as caught:
        Repository.open(store)
    assert caught.value.filename == "meta.json"


@pytest.mark.parametrize("module", [creation, oldstores])
def test_somebody_else_writes_the_metadata_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    store = Path(make_old(tmp_path / "store", "ab" * 32))

    def come_second(*arguments: Any, **choices: Any) -> None:
        for _ in range(2):
            create_metadata(*arguments, **choices)

    monkeypatch.setattr(module, "create_metadata", come_second)
    if module is creation:
        result = init(str(store), algorithm=SHA256, is_secure=False, erofs_version=1)
        assert result.outcome is Outcome.EXISTED
    else:
        Repository.open(str(store)).close()


def test_init_of_a_secure_store_as_insecure(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creation, "read_metadata", lambda _: (Metadata.create(SHA256, 1), True))
    with pytest.raises(ConflictError, match="cannot re-initialize as insecure"):
        make(Path(store))
    result = init(store, algorithm=SHA256, is_secure=True, erofs_version=1)
    assert (result.outcome, result.is_secure) == (Outcome.EXISTED, True)


def test_ensure_converts_and_checks(tmp_path: Path) -> None:
    choices: Case = {"is_secure": False, "erofs_version": 1, "ensure": True}
    store = make_old(tmp_path / "store", "ab" * 32)
    with pytest.raises(ConflictError, match="inferred algorithm fsverity-sha256-12 is not compat"):
        init(store, algorithm=SHA512, **choices)
    assert init(store, algorithm=SHA256, **choices).outcome is Outcome.UPGRADED
    assert init(store, algorithm=SHA256, **choices).outcome is Outcome.PRESERVED


def test_init_does_not_make_objects_foreign(tmp_path: Path) -> None:
    store = make_old(tmp_path / "store", "ab" * 32)
    with pytest.raises(ConflictError, match="inferred algorithm fsverity-sha256-12"):
        make(Path(store), algorithm=SHA512)
    assert make(Path(store), algorithm=SHA256)


def test_init_does_not_make_objects_unusable(tmp_path: Path) -> None:
    store = make_old(tmp_path / "store", "ab" * 32)
    with pytest.raises(ConflictError, match="have no fs-verity"):
        init(store, algorithm=SHA256, is_secure=True, erofs_version=1)
    assert not Path(store, "meta.json").exists()


def test_reset_keeps_objects_only(golden: dict[str, Path], tmp_path: Path) -> None:
    store = copy_store(golden["sha256"], tmp_path / "store")
    shutil.rmtree(store / "images")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (store / "images").symlink_to("../elsewhere")
    make(store, algorithm=SHA512, reset=True)
    assert sorted(os.listdir(store)) == ["meta.json", "objects"]
    assert os.listdir(tmp_path / "elsewhere") == ["file"]
    assert probe_algorithm(str(store)) is SHA512
    assert make(store, algorithm=SHA256, reset=True, ensure=True)
    assert probe_algorithm(str(store)) is SHA256


def test_a_reset_that_fails_loses_nothing(
    golden: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_store(golden["sha256"], tmp_path / "store")
    before = list_paths(store)
    with pytest.raises(ConflictError, match="inferred algorithm fsverity-sha256-12"):
        make(store, algorithm=SHA512, reset=True, ensure=True)
    monkeypatch.setattr(verity, "enable", _refuse_verity)
    with pytest.raises(UnsupportedError):
        make(store, algorithm=SHA512, reset=True, is_secure=True)
    assert list_paths(store) == before
    assert probe_algorithm(str(store)) is SHA256


def test_a_shared_store_outlasts_the_first_use(store: str) -> None:
    with Repository.open(store, erofs_version=2) as first:
        second = first.share()
        first.objects.put_bytes(b"never flushed" * 10)
    with second:
        assert (second.formats, second.is_secure) == (Formats(2), False)
        digest = second.objects.put_bytes(b"flushed" * 20)
        second.sync()
        assert second.objects.has(digest)
        fd = os.open(store, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    objects = [path for path in Path(store, "objects").rglob("*") if path.is_file()]
    assert len(objects) == 1


def test_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/somebody")
    user, system = "/users/somebody/.var/lib/composefs", "/sysroot/composefs"
    assert default_path(user=True) == user
    assert default_path(system=True) == system
    for uid, path in ((0, system), (1000, user)):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        assert default_path() == path
    for home in ("", None):
        if home is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(InvalidRequestError, match=re.escape("HOME is not set")):
            default_path()


def test_probing_never_fails(tmp_path: Path) -> None:
    assert probe_algorithm(str(tmp_path / "none")) is None
    assert probe_algorithm(str(tmp_path)) is None
    (tmp_path / "file").touch()
    assert probe_algorithm(str(tmp_path / "file")) is None
