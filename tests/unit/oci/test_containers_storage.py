"""``containers-storage:`` without skopeo (spec repository 5.8)."""

import errno
import fcntl
import gzip
import io
import json
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.digest import Algorithm
from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError, UnsupportedError
from cfs.linux.files import Resolve, openat2
from cfs.objectdir import Method
from cfs.oci.layers import find_layer, import_layer
from cfs.oci.manifest import Compression, Manifest
from cfs.oci.reference import digest_of
from cfs.oci.sources import (
    ImportingSource,
    LocalFetch,
    SourceOptions,
    StoppedError,
    Stopper,
    containers_storage,
    open_source,
    storage_files,
)
from cfs.oci.sources.tar_split import Member, compute_checksum, read_tar_split
from cfs.repository.repository import Repository, init
from tests.container_storage import Storage
from tests.oci_layouts import make_tar

BIG = bytes(range(256)) * 300
FIRST = make_tar({"usr": None, "usr/file": BIG, "usr/small": b"x" * 64, "./usr//odd": BIG[1:]})
SECOND = make_tar({"usr/file": b"z" * 65, "usr/.wh.small": b"", "top": BIG[:100]})
AUTO = SourceOptions(local_fetch=LocalFetch.AUTO)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    made = Storage(tmp_path / "storage")
    for name in ("XDG_DATA_HOME", "STORAGE_OPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONTAINERS_STORAGE_ROOT", str(made.path))
    return made


def open_store(path: Path) -> Repository:
    init(str(path), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    return Repository.open(str(path))


def import_all(
    repository: Repository, name: str, options: SourceOptions = AUTO
) -> dict[str, Method | None]:
    """Import the layers of an image; return their diff ids, and how their last object came."""
    ways: dict[str, Method | None] = {}
    with open_source(f"containers-storage:{name}", options) as source:
        assert isinstance(source, ImportingSource)
        digest, data = source.read_manifest()
        assert digest_of(data) == digest
        manifest = Manifest.parse(data)
        assert manifest.is_container
        assert digest_of(source.read_config(manifest)) == manifest.config.digest
        for index, layer in enumerate(source.layers(manifest)):
            imported = source.import_layer(repository, index, layer.digest)
            assert find_layer(repository, layer.digest) == imported.stream
            ways[layer.digest] = next(iter(imported.statistics.counts), None)
    return ways


def test_layers_are_the_same_as_from_blobs(
    storage: Storage, repository: Repository, tmp_path: Path
) -> None:
    odd = make_tar({"usr": None, "a\udcff": BIG, "b" * 150: BIG[2:], "empty": b""})
    tars = [FIRST, SECOND, odd, bytes(1024)]
    storage.add_image("localhost/im:x", tars)
    diff_ids = list(import_all(repository, "im:x"))
    assert diff_ids == [digest_of(tar) for tar in tars]
    with open_store(tmp_path / "other") as other:
        for tar, diff_id in zip(tars, diff_ids, strict=True):
            expected = import_layer(
                other, io.BytesIO(tar), compression=Compression.NONE, diff_id=diff_id
            )
            assert find_layer(repository, diff_id) == expected.stream


def test_names_of_images(storage: Storage) -> None:
    first = storage.add_image("localhost/im:x", [FIRST])
    second = storage.add_image("docker.io/library/im:latest", [SECOND])
    found = {
        "im:x": first,
        "localhost/im:x": first,
        first: first,
        f"sha256:{second}": second,
        "im": second,
        "library/im": second,
        "docker.io/library/im:latest": second,
    }
    for name, identifier in found.items():
        with open_source(f"containers-storage:{name}", AUTO) as source:
            manifest = Manifest.parse(source.read_manifest()[1])
        assert manifest.config.digest == f"sha256:{identifier}", name
    for name in ("m:x", "localhost/im", first[:12], f"sha512:{first}", "../overlay-images", ""):
        with pytest.raises(NotFoundError, match="Failed to find image"):
            open_and_close(name)


def open_and_close(name: str) -> None:
    with open_source(f"containers-storage:{name}", AUTO):
        pass


def test_places_of_storages(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "root": tmp_path / "root",
        "data": tmp_path / "xdg/containers/storage",
        "home": tmp_path / ".local/share/containers/storage",
        "one": tmp_path / "one",
        "two": tmp_path / "two",
    }
    for name, path in places.items():
        Storage(path).add_image(f"localhost/{name}", [])
    monkeypatch.setenv("CONTAINERS_STORAGE_ROOT", str(places["root"]))
    options = (
        f"a=b,additionalimagestore={places['one']},overlay.additionalimagestore={tmp_path}/two"
    )
    monkeypatch.setenv("STORAGE_OPTS", options)
    for name in ("root", "home", "one", "two"):
        open_and_close(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    open_and_close("data")
    # in place of that one
    with pytest.raises(NotFoundError):
        open_and_close("home")
    assert storage.path.exists()
    only = SourceOptions(local_fetch=LocalFetch.AUTO, storage_root=str(places["one"]))
    with open_source("containers-storage:one", only):
        pass
    with pytest.raises(NotFoundError), open_source("containers-storage:two", only):
        pass


def test_docker_manifests_are_converted(storage: Storage, repository: Repository) -> None:
    docker = "application/vnd.docker"
    types = {
        "manifest": f"{docker}.distribution.manifest.v2+json",
        "config": f"{docker}.container.image.v1+json",
        "layer": f"{docker}.image.rootfs.diff.tar.gzip",
    }
    storage.add_image("im", [FIRST], **types)
    import_all(repository, "im")


def change(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind != "flipped":
        path.unlink()
    if kind == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "longer":
        path.write_bytes(data + b"x")
    elif kind == "empty":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "link":
        path.with_name("copy").write_bytes(data)
        path.symlink_to("copy")
    elif kind == "outside":
        path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("name", ["file", "small"])
@pytest.mark.parametrize(
    "kind",
    ["flipped", "longer", "empty", "fifo", "directory", "socket", "missing", "link", "outside"],
)
def test_files_that_were_changed(
    storage: Storage, repository: Repository, kind: str, name: str
) -> None:
    storage.add_image("im", [FIRST])
    change(storage.diff(digest_of(FIRST)) / "usr" / name, kind)
    with pytest.raises((IntegrityError, NotFoundError), match=f"file usr/{name}"):
        import_all(repository, "im")
    assert find_layer(repository, digest_of(FIRST)) is None


def test_files_that_may_not_be_read(
    storage: Storage, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.add_image("im", [FIRST])

    def refuse(directory: int, path: bytes, flags: int, **more: Resolve) -> int:
        if path == b"usr/file":  # of a user that only podman may be
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))
        return openat2(directory, path, flags, **more)

    monkeypatch.setattr(storage_files, "openat2", refuse)
    with pytest.raises(UnsupportedError, match=r"usr/file: Permission denied .*podman unshare"):
        import_all(repository, "im")


def test_headers_that_were_changed(storage: Storage, repository: Repository) -> None:
    storage.add_image("im", [FIRST])
    split = storage.split(digest_of(FIRST))
    data = gzip.decompress(split.read_bytes())
    first, _, rest = data.partition(b"\n")
    line = json.loads(first)
    line["payload"] = line["payload"].replace("A", "B", 1)
    split.write_bytes(gzip.compress(json.dumps(line).encode() + b"\n" + rest))
    with pytest.raises(IntegrityError, match="its contents have the digest"):
        import_all(repository, "im")
    assert find_layer(repository, digest_of(FIRST)) is None


def test_contents_of_a_lower_layer(storage: Storage, repository: Repository) -> None:
    data = make_tar({"usr/file": BIG})  # the same contents with another mode, say
    storage.add_image("im", [FIRST, bytes(1024), data])
    copied = storage.diff(digest_of(data)) / "usr/file"
    copied.write_bytes(bytes(len(BIG)))
    try:
        os.setxattr(copied, "user.overlay.metacopy", b"")
    except OSError as error:
        pytest.skip(f"no user attributes here: {error}")
    import_all(repository, "im")
    assert find_layer(repository, digest_of(data))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("overlay-images/images.json", "{", "images.json is no JSON"),
        ("overlay-images/images.json", "[" * 100_000, "nested too deep"),
        ("overlay-images/images.json", '[{"names":["im"]}]', "id: expected a string"),
        ("overlay-images/images.json", '[{"names":"im"}]', "names: expected a list"),
        ("overlay-images/images.json", '[{"names":["im"],"id":"../x"}]', "not in the storage"),
        ("overlay-layers/layers.json", "{}", "expected a list"),
        ("overlay-layers/layers.json", "[]", "not in the storage"),
        ("overlay-layers/layers.json", '[{"diff-digest":1}]', "expected a string"),
        (
            "overlay-layers/layers.json",
            '[{"id":"a","diff-digest":"a","diff-size":-1}]',
            "diff-size",
        ),
    ],
)
def test_lists_that_are_none(
    storage: Storage, repository: Repository, name: str, text: str, message: str
) -> None:
    storage.add_image("localhost/im:latest", [FIRST])
    (storage.path / name).write_text(text.replace('"im"', '"localhost/im:latest"'))
    with pytest.raises(CfsError, match=message):
        import_all(repository, "im")


def test_documents_that_are_wrong(storage: Storage, repository: Repository) -> None:
    config = storage.config(storage.add_image("im", [FIRST]))
    data = config.read_bytes()
    config.write_bytes(data + b" ")
    with pytest.raises(IntegrityError, match="config"):
        import_all(repository, "im")
    config.unlink()
    with pytest.raises(NotFoundError, match="not in the storage"):
        import_all(repository, "im")
    config.symlink_to("/etc/passwd")
    with pytest.raises((CfsError, OSError)):
        import_all(repository, "im")
    config.unlink()
    config.write_bytes(data)
    manifest = config.with_name("manifest")
    text = manifest.read_text()
    manifest.write_text("[]")
    with pytest.raises(FormatError):
        import_all(repository, "im")
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(FormatError, match="expected a regular file"):
        import_all(repository, "im")
    manifest.unlink()
    manifest.write_text(text + " " * (5 << 20))
    with pytest.raises(FormatError, match="expected at most"):
        import_all(repository, "im")


def test_a_layer_that_leads_outside(storage: Storage, repository: Repository) -> None:
    storage.add_image("im", [FIRST])
    layers = storage.path / "overlay-layers/layers.json"
    fields = json.loads(layers.read_text())
    (storage.path.parent / "diff").mkdir()
    fields[0]["id"] = "../.."
    layers.write_text(json.dumps(fields))
    with pytest.raises(FormatError, match="diff: leads out of it"):
        import_all(repository, "im")


def test_the_lock_is_held(storage: Storage) -> None:
    storage.add_image("im", [FIRST])
    flock = struct.Struct("hhqqi4x")
    asked = flock.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with (storage.path / "overlay-layers/layers.lock").open("r+b") as other:

        def find_lock() -> int:
            kind: int = flock.unpack(fcntl.fcntl(other, fcntl.F_OFD_GETLK, asked))[0]
            return kind

        with open_source("containers-storage:im", AUTO):
            assert find_lock() == fcntl.F_RDLCK
        assert find_lock() == fcntl.F_UNLCK


def test_who_waits_for_the_lock_can_be_stopped(storage: Storage) -> None:
    storage.add_image("one", [FIRST])
    stopper = Stopper()
    options = SourceOptions(local_fetch=LocalFetch.AUTO, stopper=stopper)
    with (storage.path / "overlay-layers/layers.lock").open("r+b") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)  # of a process; ours belongs to an open file
        stopper.stop()
        with (
            pytest.raises(StoppedError),
            open_source("containers-storage:one", options),
        ):
            pass


def test_zerocopy_never_copies(storage: Storage, repository: Repository) -> None:
    storage.add_image("im", [FIRST])
    zerocopy = SourceOptions(local_fetch=LocalFetch.ZEROCOPY)
    try:
        way = import_all(repository, "im", zerocopy)[digest_of(FIRST)]
    except UnsupportedError:
        assert find_layer(repository, digest_of(FIRST)) is None
    else:
        assert way in (Method.REFLINKED, Method.HARDLINKED)


def test_there_are_no_blobs(storage: Storage) -> None:
    storage.add_image("im", [FIRST])
    with (
        open_source("containers-storage:im", AUTO) as source,
        pytest.raises(UnsupportedError, match="no blobs"),
    ):
        source.open_layer(0)


def test_no_descriptor_is_left_open(storage: Storage, repository: Repository) -> None:
    storage.add_image("im", [FIRST, SECOND])
    import_all(repository, "im")
    before = os.listdir("/proc/self/fd")
    import_all(repository, "im")
    with pytest.raises(NotFoundError):
        open_and_close("none")
    assert os.listdir("/proc/self/fd") == before


def read_lines(*lines: object) -> list[bytes | Member]:
    text = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    return list(read_tar_split(io.BytesIO(gzip.compress(text))))


def test_the_checksum_is_that_of_go() -> None:
    # CRC-64/GO-ISO, catalogue of parametrised CRC algorithms
    assert compute_checksum([b"1234", b"56789"]).hex() == "b90956c775a41001"


def test_tar_split() -> None:
    assert read_lines(
        {"type": 2, "payload": "YWI=", "position": 0},
        {"type": 1, "name": "dir/", "payload": None, "position": 1},
        b"",
        {"type": 1, "name_raw": "/w==", "size": 3, "payload": "AAAAAAAAAAA="},
        {"type": 2, "payload": ""},
    ) == [b"ab", Member(b"\xff", 3, bytes(8))]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        {"type": 3, "payload": ""},
        {"type": 2},
        {"type": 2, "payload": "?"},
        {"type": 2, "payload": "\u00e9"},
        {"type": 1, "name": "a", "size": -1, "payload": ""},
        {"type": 1, "name": "a", "size": 1 << 70, "payload": ""},
        {"type": 1, "name": "a", "size": 1},
        {"type": 1, "size": 1, "payload": ""},
        b'{"type":1,"name":"\\ud800","size":1,"payload":""}',
    ],
)
def test_lines_that_are_none(line: object) -> None:
    with pytest.raises(FormatError):
        read_lines(line)


def test_a_line_without_end_is_not_kept() -> None:
    bomb = gzip.compress(bytes(1 << 20)) * 200
    with pytest.raises(FormatError, match="a line of more than"):
        list(read_tar_split(io.BytesIO(bomb)))


@settings(deadline=None)  # others use the machine
@given(st.binary(max_size=200))
def test_any_bytes_are_a_tar_split_or_refused(data: bytes) -> None:
    for packed in (data, gzip.compress(data)):
        with suppress(FormatError):
            list(read_tar_split(io.BytesIO(packed)))


def test_huge_lists_are_not_read(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.add_image("im", [])
    monkeypatch.setattr(containers_storage, "_MAX_LIST_SIZE", 10)
    with pytest.raises(FormatError, match="expected at most 10 bytes"):
        open_and_close("im")
