"""Random layers, applied by us and by composefs-rs: the same trees and ids, or both refuse.

``CFS_RUST_CFSCTL`` names its ``cfsctl``, built with ``oci``; without it this is skipped.
``CFS_INTEROP_TREES`` is how many stacks of layers are tried.
"""

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.dumpfile import format_tree
from cfs.erofs.writer import Rules, write_image
from cfs.errors import CfsError
from cfs.fsverity import compute_digest
from cfs.oci.images import tree_of
from cfs.repository.repository import Repository, init
from cfs.transform import XattrMode
from tests.oci_cases import store_image
from tests.oci_layouts import TAR, Layout

_NR_STACKS = int(os.environ.get("CFS_INTEROP_TREES", "10"))
_SECONDS = 60
# few names, so that they meet
_NAMES = ("usr", "run", "a", "b", "c", ".", "é")
_TYPES = (
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE,
    tarfile.LNKTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_SIZES = (0, 1, 64, 65, 512, 1000)


@pytest.fixture
def rust(tmp_path: Path) -> "Rust":
    name = os.environ.get("CFS_RUST_CFSCTL")
    if not name:
        pytest.skip("CFS_RUST_CFSCTL does not name the cfsctl of composefs-rs")
    rust = Rust(name, tmp_path)
    if "import-layer" not in rust.run("oci", "--help").stdout:
        pytest.skip("the cfsctl of CFS_RUST_CFSCTL was built without oci")
    return rust


class Rust:
    """composefs-rs with a store of its own."""

    def __init__(self, name: str, work: Path) -> None:
        self._name = name
        self._work = work
        self._variables = {key: os.environ[key] for key in os.environ if key != "RUST_BACKTRACE"}

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self._name, *words],
            cwd=self._work,
            env=self._variables,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=_SECONDS,
        )


def make_layers(chance: random.Random) -> list[bytes]:
    """Return one to three layers; most of their entries have a place in the tree."""
    known: dict[str, bytes] = {}
    return [make_layer(chance, known) for _ in range(chance.randint(1, 3))]


def make_layer(chance: random.Random, known: dict[str, bytes]) -> bytes:
    """Return a tar; ``known`` is what the tree has, by path, with its type."""
    target = io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=target, mode="w", format=chance.choice(formats)) as tar:
        add_member(tar, chance, "usr", tarfile.DIRTYPE, known)
        for _ in range(chance.randint(0, 12)):
            directories = [path for path, kind in known.items() if kind == tarfile.DIRTYPE]
            parent = chance.choice(["", *directories])
            name = chance.choice(_NAMES)
            kind = chance.choice(_TYPES)
            match chance.random():
                case number if number < 0.15:
                    name = f".wh.{name}"
                case number if number < 0.2:
                    name = ".wh..wh..opq"
            if f"{parent}/{name}" in ("/usr", "/run", "/."):
                kind = tarfile.DIRTYPE
            add_member(tar, chance, f"{parent}/{name}".lstrip("/"), kind, known)
    return target.getvalue()


def add_member(
    tar: tarfile.TarFile, chance: random.Random, path: str, kind: bytes, known: dict[str, bytes]
) -> None:
    member = tarfile.TarInfo(chance.choice(["", "./", "/"]) + path)
    member.mode = chance.choice([0o644, 0o755, 0o4711])
    member.uid, member.mtime = chance.choice([0, 1000]), chance.choice([0, 1, 1_700_000_000])
    # composefs-rs pulls no whiteout that has two names
    files = [path for path, kind in known.items() if kind in (tarfile.REGTYPE, tarfile.SYMTYPE)]
    if kind == tarfile.LNKTYPE:
        if files or chance.random() < 0.02:
            member.linkname = chance.choice(files or ["usr", "nope"])
        else:
            kind = tarfile.REGTYPE
    if kind == tarfile.REGTYPE:
        member.size = chance.choice(_SIZES)
    elif kind == tarfile.SYMTYPE:
        member.linkname = chance.choice(["a", "../b", "/usr"])
    elif kind == tarfile.CHRTYPE:
        member.devmajor, member.devminor = chance.choice([(0, 0), (5, 1)])
    member.type = kind
    if tar.format == tarfile.PAX_FORMAT and chance.random() < 0.3:
        name = chance.choice(["user.k", "security.capability", "trusted.x"])
        member.pax_headers = {f"SCHILY.xattr.{name}": "v"}
    tar.addfile(member, io.BytesIO(bytes(member.size)))
    note(known, os.path.normpath(path), kind)


def note(known: dict[str, bytes], path: str, kind: bytes) -> None:
    """Say what the tree has now; roughly, as ``.`` and links are left out."""
    parent, name = os.path.split(path)
    gone = path
    if name.startswith(".wh."):
        gone = parent if name == ".wh..wh..opq" else os.path.join(parent, name[4:])
    if kind != tarfile.DIRTYPE or gone != path:
        for below in [other for other in known if f"{other}/".startswith(f"{gone}/")]:
            if below != gone or name != ".wh..wh..opq":
                del known[below]
    if gone == path and path != ".":
        known[path] = kind


def ours(repository: Repository, layers: list[bytes], mode: XattrMode) -> Iterator[str]:
    """Yield dump and ids, or nothing if we refuse."""
    try:
        root = tree_of(repository, store_image(repository, layers), mode=mode)
    except CfsError:
        return
    yield b"".join(format_tree(root)).decode(errors="surrogateescape")
    for version in (0, 1, 2):
        image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
        yield f"{compute_digest(image, repository.algorithm)}\n"


def theirs(rust: Rust, work: Path, layers: list[bytes], mode: XattrMode) -> Iterator[str]:
    """Yield the same of composefs-rs."""
    store = ("--repo", "rust-store")
    options = ("app", "--xattrs", mode.value)
    layout = Layout(work / "layout")
    layout.add_image("app", layers, TAR)
    rust.run(*store, "oci", "pull", f"oci:{layout.path}:app", "app")
    done = rust.run(*store, "oci", "dump", *options)
    if done.returncode == 0:
        yield done.stdout
        for version in ("0", "1", "2"):
            yield rust.run(*store, "--erofs-version", version, "oci", "compute-id", *options).stdout


def test_random_layers_give_the_same_tree(rust: Rust, tmp_path: Path) -> None:
    differences = []
    nr_trees = 0
    path = str(tmp_path / "store")
    init(path, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with Repository.open(path, insecure=True) as repository:
        for seed in range(_NR_STACKS):
            layers = make_layers(random.Random(seed))
            mode = list(XattrMode)[seed % 2]
            work = tmp_path / str(seed)
            work.mkdir()
            words = ("--repo", "rust-store", "init", "--insecure", "--reset-metadata")
            rust.run(*words, "--algorithm", "fsverity-sha256-12")
            found = list(ours(repository, layers, mode))
            expected = list(theirs(rust, work, layers, mode))
            nr_trees += bool(expected)
            if found != expected:
                differences.append((seed, found[:1], expected[:1]))
    assert differences == []
    assert nr_trees > _NR_STACKS / 3
