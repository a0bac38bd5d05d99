"""Stores written by one tool and used by the other, beside composefs-rs itself.

``CFS_RUST_CFSCTL`` names its ``cfsctl``; without it all of this is skipped, and the recordings of
``tests/data`` stand for it.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Done, command, environment, run
from tests.integration.waiting import wait_until
from tests.paths import DATA

Tool = Callable[..., Done]

_NR_TREES = int(os.environ.get("CFS_INTEROP_TREES", "10"))
_ALPHABET = bytes(sorted(set(range(1, 256)) - {ord("/")}))
_FORMATS = ("0", "1", "2")
_HASHES = ("sha256", "sha512")
_SECONDS = 60


@pytest.fixture
def ours(tmp_path: Path) -> Tool:
    def run_ours(*words: str | Path, stdin: bytes = b"") -> Done:
        return run("cfsctl", *words, cwd=tmp_path, stdin=stdin)

    return run_ours


def printed(done: Done) -> bytes:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    make_tree(path, random.Random(0))
    return path


def make_tree(path: Path, rng: random.Random) -> None:
    """Make a root file system at random, with all that this user can make."""
    path.mkdir()
    for name in ("usr", "etc", "boot", "sysroot", "run"):
        _fill(path / name, rng, 0)


def _fill(path: Path, rng: random.Random, depth: int) -> None:
    path.mkdir()
    for _ in range(rng.randrange(9)):
        name = bytes(rng.choices(_ALPHABET, k=rng.choice((1, 3, 12, 255))))
        child = path / os.fsdecode(name)
        if name in (b".", b"..") or os.path.lexists(child):
            continue
        if depth < 3 and rng.random() < 0.3:
            _fill(child, rng, depth + 1)
        else:
            _make_leaf(child, rng)
        _decorate(child, rng)
    _decorate(path, rng)


def _make_leaf(path: Path, rng: random.Random) -> None:
    kind = rng.choice(("small", "large", "large", "link", "fifo", "device", "again"))
    siblings = [p for p in path.parent.iterdir() if not p.is_symlink() and p.is_file()]
    if kind == "link":
        path.symlink_to(os.fsdecode(bytes(rng.choices(_ALPHABET, k=rng.randrange(1, 300)))))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device" and os.geteuid() == 0:
        os.mknod(path, rng.choice((stat.S_IFCHR, stat.S_IFBLK)) | 0o600, os.makedev(1, 3))
    elif kind == "again" and siblings:
        path.hardlink_to(siblings[0])
    else:
        sizes = (0, 1, 63, 64) if kind == "small" else (65, 4095, 4096, 4097, 70_000)
        path.write_bytes(rng.randbytes(rng.choice(sizes)))


def _decorate(path: Path, rng: random.Random) -> None:
    is_link = path.is_symlink()
    if not is_link:
        path.chmod(rng.choice((0o755, 0o644, 0o700, 0o1777, 0o4711)) | 0o700 * path.is_dir())
    if not is_link and (path.is_dir() or path.is_file()):
        for number in range(rng.choice((0, 0, 2))):
            os.setxattr(path, f"user.n{number}", rng.randbytes(rng.choice((0, 5, 100))))
    if os.geteuid() == 0:
        os.chown(path, rng.choice((0, 1000, 70_000)), 0, follow_symlinks=False)
    nanoseconds = rng.choice((0, 1, 10**9 * 1_700_000_000 + rng.randrange(10**9)))
    os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def facts(store: Path) -> list[str]:
    """Describe everything in a store, as ``facts.txt`` of ``tests/data/repository``."""
    found = []
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store)
        status = path.lstat()
        if path.is_symlink():
            found.append(f"link {name} -> {path.readlink()}")
        elif path.is_dir():
            found.append(f"directory {stat.S_IMODE(status.st_mode):o} {name}")
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append(f"file {stat.S_IMODE(status.st_mode):o} {name} {digest}")
    return found


def make_store(tool: Tool, store: Path, tree: Path, *, algorithm: str, version: str) -> None:
    """Give a store named and unnamed images by one tool."""
    words = ["--insecure", "--algorithm", f"fsverity-{algorithm}-12", "--erofs-version", version]
    printed(tool("init", *words, store))
    printed(tool("--repo", store, "create-image", tree, "base"))
    printed(tool("--repo", store, "create-image", "--no-propagate-usr-to-root", tree, "a/b"))
    printed(tool("--repo", store, "create-image", "--bootable", tree))
    image = printed(tool("--repo", store, "create-image", tree, "again")).strip()
    content = (store / "images" / image.decode().partition(":")[2]).read_bytes()
    printed(tool("--repo", store, "import-image", "imported", stdin=content))


@pytest.fixture(params=["ours", "rust"])
def store(request: pytest.FixtureRequest, tree: Path, tmp_path: Path, rust: Tool) -> Path:  # noqa: ARG001
    """A store made by either tool, and nothing else touched by it."""
    path = tmp_path / "store"
    tool: Tool = request.getfixturevalue(request.param)
    make_store(tool, path, tree, algorithm="sha512", version="1")
    return path


@pytest.mark.parametrize("version", _FORMATS)
@pytest.mark.parametrize("algorithm", _HASHES)
def test_both_tools_write_the_same_store(
    algorithm: str, version: str, ours: Tool, rust: Tool, tree: Path
) -> None:
    stores = [tree.parent / name for name in ("a", "b")]
    for store, tool in zip(stores, (ours, rust), strict=True):
        make_store(tool, store, tree, algorithm=algorithm, version=version)
    assert facts(stores[0]) == facts(stores[1])


QUESTIONS = [
    ("images",),
    ("images", "--json"),
    ("image-objects", "base"),
    ("image-objects", "refs/a/b"),
    ("image-objects", "a/b"),
    ("image-objects", "nope"),
    ("dump-files", "base", "/usr", "/etc", "/run"),
    ("dump-files", "refs/a/b", "--backing-path-only", "/nope"),
    ("fsck",),
    ("fsck", "--json"),
    ("fsck", "--metadata-only"),
    ("gc", "--dry-run"),
    ("cat", "nope"),
]


@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_both_tools_answer_alike(
    words: tuple[str, ...], store: Path, ours: Tool, rust: Tool
) -> None:
    check_alike(words, store, ours, rust)


def check_alike(words: tuple[str, ...], store: Path, ours: Tool, rust: Tool) -> None:
    answers = [tool("--repo", store, *words) for tool in (ours, rust)]
    mine, theirs = answers
    assert (mine.returncode, sort(mine.stdout)) == (theirs.returncode, sort(theirs.stdout))


def sort(text: bytes) -> Any:
    """Return an answer without the orders that 0.9 leaves open."""
    try:
        document = json.loads(text)
    except ValueError:
        return sorted(text.splitlines())
    return {
        key: sorted(value, key=json.dumps) if isinstance(value, list) else value
        for key, value in document.items()
    }


def first_image(store: Path) -> Path:
    return min(path for path in (store / "images").iterdir() if path.is_symlink())


def first_object(store: Path) -> Path:
    images = {path.resolve() for path in (store / "images").iterdir()}
    return min(path for path in (store / "objects").glob("*/*") if path not in images)


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:40] + b"x" + content[41:])


def make_stream(store: Path) -> None:
    target = first_object(store).relative_to(store)
    (store / "streams").mkdir(exist_ok=True)
    (store / "streams/stream").symlink_to(f"../{target}")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "object changed": lambda store: overwrite(first_object(store)),
    "object missing": lambda store: first_object(store).unlink(),
    "object of another name": lambda store: (first_object(store).parent / "junk").touch(),
    "image link missing": lambda store: first_image(store).unlink(),
    "dangling name": lambda store: (store / "images/refs/gone").symlink_to("../gone"),
    "file for a name": lambda store: (store / "images/refs/file").touch(),
    "file for an image": lambda store: (store / "images/file").touch(),
    "image that is none": lambda store: overwrite(first_image(store).resolve()),
    "stream that is none": make_stream,
    "empty objects": lambda store: shutil.rmtree(store / "objects"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_both_tools_find_the_same_damage(
    damage: Callable[[Path], None], store: Path, ours: Tool, rust: Tool
) -> None:
    damage(store)
    mine, theirs = (tool("--repo", store, "fsck", "--json") for tool in (ours, rust))
    reports = [json.loads(printed(done)) for done in (mine, theirs)]
    for report in reports:  # the reasons behind a path are free
        report["errors"] = sorted(":".join(line.split(": ")[:3]) for line in report["errors"])
    assert reports[0] == reports[1]
    statuses = [tool("--repo", store, "fsck").returncode for tool in (ours, rust)]
    assert statuses[0] == statuses[1]


def test_both_tools_collect_the_same(store: Path, ours: Tool, rust: Tool, tmp_path: Path) -> None:
    for name in ("base", "again"):
        (store / "images/refs" / name).unlink()
    (store / "images/refs/imported").unlink()
    shutil.copytree(store, tmp_path / "copy", symlinks=True)
    mine = printed(ours("--repo", store, "gc"))
    assert mine == printed(rust("--repo", tmp_path / "copy", "gc"))
    assert mine.startswith(b"Objects: ")
    assert facts(store) == facts(tmp_path / "copy")
    for tool in (ours, rust):
        assert printed(tool("--repo", store, "gc")) == b"Objects: 0 removed (0 bytes)\n"
        assert printed(tool("--repo", store, "fsck")).endswith(b"status: ok\n")


@pytest.mark.parametrize("seed", range(_NR_TREES))
def test_both_tools_compute_the_same_ids(seed: int, ours: Tool, rust: Tool, tmp_path: Path) -> None:
    rng = random.Random(seed)
    make_tree(tmp_path / "root", rng)
    ways = [[], ["--xattrs", "keep-user-xattrs"], ["--no-propagate-usr-to-root"], ["--bootable"]]
    for command_name in ("compute-id", "create-dumpfile", "compute-karg"):
        words = [
            "--no-repo",
            "--erofs-version",
            rng.choice(_FORMATS),
            "--hash",
            rng.choice(_HASHES),
        ]
        options = [] if command_name == "compute-karg" else rng.choice(ways)
        words += [command_name, *options, "root"]
        assert printed(ours(*words)) == printed(rust(*words)), words


@contextmanager
def transaction(words: list[str], store: Path) -> Iterator[None]:
    """Keep a store open by a tool's own command."""
    line = [*words, "--repo", str(store), "transaction"]
    inode = f":{store.stat().st_ino} "
    with subprocess.Popen(line, env=environment()) as holder:
        try:
            wait_until(lambda: is_locked(holder.pid, inode), "the transaction holds the lock")
            yield
        finally:
            holder.send_signal(signal.SIGTERM)
            holder.wait(_SECONDS)


def is_locked(pid: int, inode: str, mark: str = "") -> bool:
    lines = Path("/proc/locks").read_text().splitlines()
    return any(f" {pid} " in line and inode in line and mark in line for line in lines)


def test_our_collection_waits_for_theirs(
    ours: Tool, rust: Tool, rust_words: list[str], tree: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    make_store(rust, store, tree, algorithm="sha256", version="2")
    with transaction(rust_words, store):
        assert ours("--repo", store, "gc", "--no-wait").returncode == 1
    printed(ours("--repo", store, "gc", "--no-wait"))


def test_their_collection_waits_for_ours(
    ours: Tool, rust_words: list[str], tree: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    make_store(ours, store, tree, algorithm="sha256", version="1")
    inode = f":{store.stat().st_ino} "
    words = [*rust_words, "--repo", str(store), "gc"]
    with transaction(command("cfsctl"), store):
        collector = subprocess.Popen(words, stdout=subprocess.PIPE)
        wait_until(lambda: is_locked(collector.pid, inode, "->"), "their collection waits")
        assert collector.poll() is None
    with collector:
        assert collector.wait(_SECONDS) == 0


# --- OCI images


@pytest.fixture
def with_oci(rust: Tool) -> None:
    if rust("oci", "--help").returncode:
        pytest.skip("CFS_RUST_CFSCTL was built without OCI")


def pull(tool: Tool, store: Path) -> None:
    """Pull a container image, also for booting, and an artifact that refers to it."""
    layout = store.parent / "layout"
    if not layout.exists():
        subprocess.run(["tar", "-xf", DATA / "cli/oci.tar"], cwd=store.parent, check=True)
    printed(tool("--repo", store, "oci", "pull", "--bootable", f"oci:{layout}:v1", "app"))
    printed(tool("--repo", store, "oci", "pull", f"oci:{layout}:sig", "a/sig:1"))


@pytest.fixture(params=["ours", "rust"])
def pulled(request: pytest.FixtureRequest, tmp_path: Path, with_oci: None) -> Path:  # noqa: ARG001
    """A store into which either tool has pulled."""
    tool: Tool = request.getfixturevalue(request.param)
    printed(tool("init", "--insecure", tmp_path / "store"))
    pull(tool, tmp_path / "store")
    return tmp_path / "store"


def other(request: pytest.FixtureRequest) -> Tool:
    """Return the tool that has not made the store."""
    name = "ours" if request.node.callspec.params["pulled"] == "rust" else "rust"
    tool: Tool = request.getfixturevalue(name)
    return tool


LAYER = "sha256:c6e78ec3b137c8eca4d59f3744b6b723e653cc5c70862df646e04a13e2c7b299"
CONFIG = "sha256:71f5845239e30dae2537ddf488b26e2365baec84a19c1214d0ccc6878f6a290e"
MANIFEST = "sha256:c33b0626be461148711e797df21d06fb54771836a2c1125ae499e11d22f28355"
OCI_QUESTIONS = [
    ("images",),
    ("images", "--json"),
    ("inspect", "app"),
    ("inspect", f"@{MANIFEST}", "--manifest"),
    ("inspect", "a/sig:1"),
    ("inspect", "nope"),
    ("layer", LAYER),
    ("layer", LAYER, "--json"),
    ("layer", LAYER, "--dumpfile"),
    ("dump", "app"),
    ("dump", "--bootable", "--xattrs", "keep-user-xattrs", "app"),
    ("dump", "a/sig:1"),
    ("compute-id", "app"),
    ("compute-id", "--bootable", f"@{CONFIG}"),
    ("fsck",),
    ("fsck", "--json"),
    ("fsck", "nope", "--json"),
]


def test_both_tools_answer_alike_about_images(pulled: Path, ours: Tool, rust: Tool) -> None:
    for words in OCI_QUESTIONS:
        check_alike(("oci", *words), pulled, ours, rust)
        check_alike(("--erofs-version", "2", "oci", *words), pulled, ours, rust)


@pytest.mark.parametrize("version", _FORMATS[1:])
@pytest.mark.parametrize("algorithm", _HASHES)
@pytest.mark.usefixtures("with_oci")
def test_both_tools_pull_the_same_store(
    algorithm: str, version: str, ours: Tool, rust: Tool, tmp_path: Path
) -> None:
    stores = [tmp_path / name for name in ("a", "b")]
    words = ["--insecure", "--algorithm", f"fsverity-{algorithm}-12", "--erofs-version", version]
    for store, tool in zip(stores, (ours, rust), strict=True):
        printed(tool("init", *words, store))
        pull(tool, store)
        printed(tool("--repo", store, "gc"))
    assert steady_facts(stores[0]) == steady_facts(stores[1])


def steady_facts(store: Path) -> list[str]:
    """Return facts without the streams whose references 0.9 writes in any order."""
    moving = {
        path.resolve()
        for kind in ("config", "manifest")
        for path in (store / "streams").glob(f"oci-{kind}-*")
    }
    moving_names = {str(path.relative_to(store)) for path in moving}
    found = []
    for fact in facts(store):
        words = fact.split()
        is_link_to_moving = words[-1].removeprefix("../") in moving_names
        if words[0] != "directory" and words[2] not in moving_names:
            found.append(" ".join(words[: -1 if is_link_to_moving else None]))
    return found


def test_second_pull_by_the_other_tool(
    pulled: Path, request: pytest.FixtureRequest, ours: Tool, rust: Tool
) -> None:
    printed(ours("--repo", pulled, "gc"))
    before = steady_facts(pulled)
    pull(other(request), pulled)
    for tool in (ours, rust):
        printed(tool("--repo", pulled, "gc"))
        assert json.loads(printed(tool("--repo", pulled, "oci", "fsck", "--json")))["ok"]
    assert steady_facts(pulled) == before


def test_copies_by_the_other_tool(
    pulled: Path, request: pytest.FixtureRequest, ours: Tool, rust: Tool, tmp_path: Path
) -> None:
    copier = other(request)
    words = ["--insecure", "--algorithm", "fsverity-sha256-12"]
    for name, options in (("same", words[:1]), ("other", words)):
        store = tmp_path / name
        printed(copier("init", *options, store))
        for tag in ("app", "a/sig:1"):
            printed(copier("--repo", store, "oci", "copy", tag, "--from", pulled, "--name", tag))
        for question in ("images", "inspect", "fsck", "compute-id"):
            check_alike(("oci", question, *["app"][question == "images" :]), store, ours, rust)


def test_removal_by_the_other_tool(pulled: Path, request: pytest.FixtureRequest) -> None:
    tool = other(request)
    for tag in ("app", "a/sig:1"):
        printed(tool("--repo", pulled, "oci", "untag", tag))
    printed(tool("--repo", pulled, "gc"))
    assert [fact for fact in facts(pulled) if not fact.startswith("directory")] == [
        fact for fact in facts(pulled) if "meta.json" in fact
    ]


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize("options", [(), ("--bootable",)], ids=["plain", "bootable"])
def test_both_tools_mount_the_same(
    options: tuple[str, ...], pulled: Path, ours: Tool, rust: Tool, mnt: Path
) -> None:
    seen = []
    for tool in (ours, rust):
        printed(tool("--repo", pulled, "oci", "mount", *options, "app", mnt))
        try:
            listing = ["find", ".", "-printf", "%P %y %m %U %G %T@ %l\\n"]
            names = subprocess.run(listing, cwd=mnt, capture_output=True, check=True).stdout
            seen.append((sorted(names.splitlines()), (mnt / "usr/bin/tool").read_bytes()))
        finally:
            subprocess.run(["umount", mnt], check=True)
    assert seen[0] == seen[1]
