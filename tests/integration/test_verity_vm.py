"""Stores with real fs-verity, in a virtual machine: this kernel may have none."""

import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from tests.paths import DATA
from tests.vm.disks import made_disk
from tests.vm.machine import Done, Machine

STORES = DATA / "repository"
ALGORITHMS = ("sha256", "sha512")
PYTHON = os.path.realpath(sys.executable)
GOOD, BAD = os.urandom(70_000), os.urandom(70_000)
DISK_SIZE = 256 << 20
STORE, DAMAGED_STORE, IMAGE = "/run/data/store", "/run/data/damaged", "refs/demo"
# what becomes of an object, and what fsck says then
FINDINGS = {
    "tampered": "object-verity-failed",  # on the raw disk: only reading it shows that
    "replaced": "object-digest-mismatch",
    "plain": "object-verity-missing",
    "plain and other": "object-verity-missing",
}
CONTENTS = {name: os.urandom(70_000) for name in FINDINGS}


class Guest(NamedTuple):
    """A machine with an ext4 that can do fs-verity on ``/run/data``, its disk seen from here."""

    machine: Machine
    disk: Path

    def shell(self, script: str) -> str:
        return self.machine.shell(script).check()

    def cfsctl(self, *words: str, store: str = STORE) -> Done:
        return self.machine.cfsctl("--repo", store, *words)

    def create_image(self, store: str = STORE) -> None:
        words = ("create-image", "--no-propagate-usr-to-root", "/run/tree", "demo")
        self.cfsctl(*words, store=store).check()

    def make_store(self, files: dict[str, bytes], store: str = STORE) -> None:
        self.shell(f"rm -rf {store}")
        self.make_tree("/run/tree", files)
        made = self.machine.cfsctl("init", "--algorithm", "fsverity-sha256-12", store)
        assert "verity:    required" in made.check()
        self.create_image(store)

    def unmount(self) -> None:
        self.shell("while grep -q ' /run/mnt ' /proc/mounts; do umount /run/mnt; done")

    def make_tree(self, directory: str, files: dict[str, bytes]) -> None:
        self.shell(f"rm -rf {directory}; mkdir -p {directory}")
        for name, content in files.items():
            self.machine.run("dd", f"of={directory}/{name}", stdin=content).check()

    def object_of(self, content: bytes, store: str = STORE) -> str:
        """The path of the object with this content; each content is there once."""
        self.machine.run("dd", "of=/run/wanted", stdin=content)
        script = f"find {store}/objects -type f -exec cmp -s {{}} /run/wanted \\; -print"
        (path,) = self.shell(script).split()
        return path

    def errors(self, *words: str, store: str = STORE) -> list[str]:
        done = self.machine.cfsctl("--repo", store, *words, "fsck", "--json")
        errors: list[str] = json.loads(done.check())["errors"]
        return sorted(errors)

    def tamper(self, content: bytes) -> None:
        """Change one byte of a file on the raw disk, as the guest's kernel would refuse to."""
        self.shell("sync")
        with self.disk.open("r+b") as file, mmap.mmap(file.fileno(), 0) as disk:
            start = disk.find(content[:4096])
            assert start > 0
            assert disk.find(content[:4096], start + 1) < 0
            disk[start + 100] ^= 1
        self.shell("echo 3 >/proc/sys/vm/drop_caches")


@pytest.fixture(scope="module")
def guest(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_machine: None,  # noqa: ARG001 - before the machine
) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("vm")
    disk = made_disk(DISK_SIZE, directory / "disk")
    with Machine(directory, [disk]) as machine:
        machine.shell("mount -t ext4 /dev/vdc /run/data; mkdir /run/mnt").check()
        yield Guest(machine, disk)


@pytest.fixture
def store(guest: Guest) -> Iterator[Guest]:
    """A secure store with one image."""
    guest.make_store({"good": GOOD, "bad": BAD, "small": b"text"})
    yield guest
    guest.unmount()


@pytest.fixture(scope="module")
def damaged(guest: Guest) -> dict[str, list[str]]:
    """Damage objects in all ways; return the paths in the store by kind of finding."""
    guest.make_store({**CONTENTS, "good": GOOD, "small": b"text"}, DAMAGED_STORE)
    paths = {name: guest.object_of(CONTENTS[name], DAMAGED_STORE) for name in CONTENTS}
    for name, content in CONTENTS.items():
        if name == "tampered":
            continue
        copy = content if name == "plain" else content[:-1] + bytes([content[-1] ^ 1])
        guest.machine.run("dd", "of=/run/data/other", stdin=copy).check()
        if name == "replaced":
            guest.shell("fsverity enable /run/data/other")
        guest.shell(f"mv -f /run/data/other {paths[name]}")
    guest.tamper(CONTENTS["tampered"])
    found: dict[str, list[str]] = {}
    for name, path in paths.items():
        found.setdefault(FINDINGS[name], []).append(path.removeprefix(f"{DAMAGED_STORE}/"))
    return found


def test_objects_and_metadata_have_fs_verity(store: Guest) -> None:
    measured = store.shell(
        f"cd {STORE}/objects; fsverity measure */*; fsverity measure ../meta.json"
    )
    *objects, metadata = (line.split() for line in measured.splitlines())
    assert len(objects) == 3
    assert {digest for digest, _ in objects} == {
        f"sha256:{path.replace('/', '')}" for _, path in objects
    }
    assert metadata[1] == "../meta.json"
    assert store.errors("--require-verity") == []


@pytest.mark.usefixtures("damaged")
def test_kernel_mount_demands_fs_verity_and_refuses_other_objects(guest: Guest) -> None:
    guest.cfsctl("mount", IMAGE, "/run/mnt", store=DAMAGED_STORE).check()
    line = guest.shell("grep ' /run/mnt ' /proc/mounts").split()
    assert line[2] == "overlay"
    assert {"verity=require", "metacopy=on", "redirect_dir=on"} <= set(line[3].split(","))
    assert guest.shell("ls -d /sys/block/*/loop 2>/dev/null || true") == ""
    check_reads(guest)


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("options", ["passthrough=on", "passthrough=off"])
def test_fuse_refuses_other_objects(guest: Guest, options: str) -> None:
    """Without being asked to verify: the store is secure."""
    guest.cfsctl("mount", f"--fuse=yes,{options}", IMAGE, "/run/mnt", store=DAMAGED_STORE).check()
    assert " fuse" in guest.shell("grep ' /run/mnt ' /proc/mounts")
    check_reads(guest)


def check_reads(guest: Guest) -> None:
    try:
        for name, content in (("good", GOOD), ("small", b"text")):
            assert guest.machine.run("cat", f"/run/mnt/{name}").stdout == content
        for name in CONTENTS:
            bad = guest.machine.run("cat", f"/run/mnt/{name}")
            assert bad.status == 1
            assert b"Input/output error" in bad.stderr
            assert bad.stdout == b""
    finally:
        guest.unmount()


def test_fsck_finds_other_objects(guest: Guest, damaged: dict[str, list[str]]) -> None:
    found = [error.split(": ")[1:3] for error in guest.errors(store=DAMAGED_STORE)]
    assert sorted(found) == sorted(
        [kind, path] for kind, paths in damaged.items() for path in paths
    )


def test_storing_again_repairs_an_object_without_fs_verity(store: Guest) -> None:
    path = store.object_of(BAD)
    store.shell(f"cp {path} /run/data/copy; mv -f /run/data/copy {path}")
    assert len(store.errors()) == 1
    store.create_image()
    assert store.errors() == []


def test_secure_init_without_fs_verity_leaves_nothing(guest: Guest) -> None:
    done = guest.machine.cfsctl("init", "/run/nothing/store")
    assert done.status == 1
    assert b"fs-verity" in done.stderr
    assert b"Traceback" not in done.stderr
    assert guest.machine.run("test", "-e", "/run/nothing/store/meta.json").status == 1


def test_security_of_a_store_is_kept(guest: Guest) -> None:
    """All of an insecure store is without fs-verity, or mounts by digest would refuse parts."""
    guest.shell(f"rm -rf {STORE}")
    guest.make_tree("/run/tree", {"good": GOOD})
    guest.machine.cfsctl("init", "--insecure", STORE).check()
    guest.create_image()
    files = guest.shell(f"find {STORE} -type f").split()
    assert len(files) == 3
    assert all(guest.machine.run("fsverity", "measure", file).status for file in files)
    for words in (("init", STORE), ("--require-verity", "fsck")):
        done = guest.cfsctl(*words)
        assert done.status == 1, words
        assert done.stderr.startswith(b"Error: ")
    guest.cfsctl("mount", IMAGE, "/run/mnt").check()
    assert "verity=" not in guest.shell("grep ' /run/mnt ' /proc/mounts")
    assert guest.machine.run("cat", "/run/mnt/good").stdout == GOOD
    guest.shell("umount /run/mnt")


@pytest.mark.parametrize("has_verity", [True, False], ids=["secure", "insecure"])
def test_old_store_is_secure_if_each_object_is(store: Guest, *, has_verity: bool) -> None:
    path = store.object_of(BAD)
    if not has_verity:
        store.shell(f"cp {path} /run/data/copy; mv -f /run/data/copy {path}")
    store.shell(f"rm {STORE}/meta.json")
    store.cfsctl("images").check()
    is_secure = store.machine.run("fsverity", "measure", f"{STORE}/meta.json").status == 0
    assert is_secure == has_verity


def test_digest_store_gets_fs_verity(guest: Guest) -> None:
    """As with the C tool, which tries."""
    other = os.urandom(70_000)  # nowhere else on the disk
    guest.make_tree("/run/tree", {"good": GOOD, "bad": other})
    words = ["--digest-store=/run/data/flat", "/run/tree", "/run/data/image"]
    guest.machine.run("@cfs.cli.main", "mkcomposefs", *words).check()
    measured = guest.shell("cd /run/data/flat; fsverity measure */*; fsverity enable ../image")
    objects = [line.split() for line in measured.splitlines()]
    assert {digest for digest, _ in objects} == {
        f"sha256:{path.replace('/', '')}" for _, path in objects
    }
    digest = guest.shell("fsverity measure /run/data/image").split()[0].removeprefix("sha256:")
    options = f"basedir=/run/data/flat,digest={digest}"
    mount = ["@cfs.cli.main", "mount.composefs", "-o", options, "/run/data/image", "/run/mnt"]
    guest.machine.run(*mount).check()
    assert "verity=require" in guest.shell("grep ' /run/mnt ' /proc/mounts")
    guest.tamper(other)
    assert guest.machine.run("cat", "/run/mnt/good").stdout == GOOD
    assert guest.machine.run("cat", "/run/mnt/bad").status == 1
    guest.shell("umount /run/mnt")
    wrong = options[:-1] + ("0" if options[-1] != "0" else "1")
    mount[3] = wrong
    assert guest.machine.run(*mount).status == 1


def test_enable_and_measure(guest: Guest) -> None:
    """What cfs.fsverity says, beside the computed digest and the kernel's reasons to refuse."""
    script = """
import errno, os, sys
from cfs.digest import Algorithm
from cfs.fsverity import compute_digest, enable, measure
for algorithm in Algorithm:
    path = f"/run/data/{algorithm.name}"
    with open(path, "wb") as file:
        file.write(b"hello world\\n" * 1000)
        file.flush()
        fd = os.open(path, os.O_RDONLY)
        assert measure(fd) is None
        try:
            enable(fd, algorithm)
        except OSError as error:
            assert error.errno == errno.ETXTBSY
        else:
            sys.exit("enabled while it was open for writing")
    enable(fd, algorithm)
    enable(fd, algorithm)
    assert measure(fd) == compute_digest(b"hello world\\n" * 1000, algorithm)
"""
    assert guest.machine.run(PYTHON, "-c", script).check() == ""


def secure_cases() -> list[Any]:
    """The recorded cases; first those that say most, because checking a store takes seconds."""
    cases = [
        (algorithm, case)
        for algorithm in ALGORITHMS
        for case in json.loads((STORES / algorithm / "secure.json").read_text())
    ]
    cases.sort(key=lambda pair: pair[0] != "sha256" and "other hash" not in pair[1]["name"])
    nr_cases = int(os.environ.get("CFS_SECURE_CASES", "12"))
    return [
        pytest.param(algorithm, case, id=f"{algorithm}-{case['name']}")
        for algorithm, case in cases[:nr_cases]
    ]


# composefs-rs opens by a name what it refuses by its id; ours refuses both (spec 4.3, own)
REFUSED_BY_US = {
    ("image without fs-verity", "image-objects refs/base"),
    ("stream without fs-verity", "cat refs/layers/one"),
}


@pytest.mark.parametrize(("algorithm", "case"), secure_cases())
def test_recorded_case(guest: Guest, algorithm: str, case: dict[str, Any]) -> None:
    sound = unpacked(guest, algorithm)
    copy = "/run/data/copied"
    guest.shell(f"rm -rf {copy}; cp -al {sound} {copy}")
    for step, *arguments in case["do"]:
        guest.shell(f"cd {copy}; {STEPS[step].format(*arguments)}")
    image = guest.shell(f"basename $(readlink {copy}/images/refs/base)").strip()
    for words, expected in case.items():
        if words in ("name", "do") or (
            words == "fsck, --require-verity" and expected == case["fsck"]
        ):
            continue
        if words == "meta.json afterwards":
            measured = guest.machine.run("fsverity", "measure", f"{copy}/meta.json")
            digest = measured.stdout.decode().partition(" ")[0]
            number = str(ALGORITHMS.index(digest.partition(":")[0]) + 1) if digest else ""
            assert (f"{number}:{digest.partition(':')[2]}" if digest else "ENODATA") == expected
            continue
        command, *options = words.replace("ID of base", image).split(", ")
        if command == "fsck":
            command += " --json"
        done = guest.machine.cfsctl("--repo", copy, *options, *command.split())
        status = 1 if (case["name"], words) in REFUSED_BY_US else expected["rc"]
        assert done.status == status, (words, done)
        assert b"Traceback" not in done.stderr
        if "errors" in expected and done.status == 0:
            assert sorted(json.loads(done.stdout)["errors"]) == expected["errors"], words
        if "stdout" in expected:
            assert done.stdout.decode() == expected["stdout"], words


STEPS = {
    "plain": "cp {0} .plain; mv -f .plain {0}",
    "verity": "fsverity enable --hash-alg={1} {0}",
    "patch": "printf '\\x{2}' | dd of={0} bs=1 seek={1} conv=notrunc",
    "remove": "rm {0}",
}


def unpacked(guest: Guest, algorithm: str) -> str:
    """Unpack a golden store, once, and make all of it secure."""
    path = f"/run/data/golden-{algorithm}"
    if guest.machine.run("test", "-e", path).status:
        packed = (STORES / f"store-{algorithm}.tar.zst").read_bytes()
        content = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
        guest.shell(f"mkdir {path}.new")
        guest.machine.run("tar", "-x", "-C", f"{path}.new", stdin=content).check()
        guest.shell(
            f"cd {path}.new; [ -e meta.json ] || cd *; top=$PWD;"
            "for file in meta.json objects/*/*; do"
            f"  cp $file .plain; mv -f .plain $file; fsverity enable --hash-alg={algorithm} $file;"
            f"done; mv $top {path}"
        )
    return path
