"""Every command of the store, used as nobody should: one line, the right status, nothing left."""

import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.command_line import Done, command, environment, run, run_here
from tests.integration.waiting import wait_until
from tests.oci_layouts import Layout, digest_of, make_tar

FILES = make_tar({"usr": None, "usr/file": b"of a layer\n" * 1000})
LAYER = digest_of(FILES)
TAG = "a/b\n:1"
ONE_LINE = re.compile(rb"Error: [^\n]+\n")
WORDS = [
    ["images"],
    ["images", "--json"],
    ["image-objects", "one"],
    ["dump-files", "one", "/"],
    ["fsck"],
    ["fsck", "--json"],
    ["gc", "--dry-run"],
    ["compute-karg", "--no-propagate-usr-to-root", "tree"],
    ["create-image", "tree", "two"],
    ["cat", "stream"],
    ["oci", "images"],
    ["oci", "layer", LAYER],
    ["oci", "pull", "oci:layout:v1", TAG],
    ["oci", "fsck"],
]
BAD_NAMES: list[str | bytes] = [
    *("", ".", "..", "../x", "a/../b", "/a", "a//b", "./a", "a/", "one/below", "mounted/x"),
    "x" * 256,
    "a/" * 3000,
    b"\xff",
]


@pytest.fixture
def store(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Path:
    """A store with the image ``one`` of the directory ``tree`` and an OCI image of ``layout``."""
    for name in ("usr", "boot", "sysroot"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    (tmp_path / "tree/usr/file").write_bytes(os.urandom(5000))
    path = tmp_path / "store"
    layout = Layout(tmp_path / "layout")
    layout.add_image("v1", [FILES])
    pull = ["oci", "pull", f"oci:{layout.path}:v1", TAG]
    create = ["create-image", str(tmp_path / "tree"), "one"]
    for words in (["init", "--insecure"], create, pull):
        done = run_here(capfdbinary, "--repo", path, *words)
        assert done.returncode == 0, done.stderr
    return path


def content(store: Path) -> list[tuple[str, int, int, str]]:
    """List everything but directories; who changes contents changes their times."""
    found = []
    for path in sorted(store.rglob("*")):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            target = os.readlink(path) if path.is_symlink() else ""
            found.append((str(path), status.st_mode, status.st_mtime_ns, target))
    return found


def use(store: Path, *words: str | bytes, stdin: bytes = b"") -> Done:
    done = run("cfsctl", "--repo", store, *words, cwd=store.parent, stdin=stdin)
    assert b"Traceback" not in done.stderr
    return done


def test_bad_names_are_refused_before_anything_is_written(
    store: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    image = next((store / "images").glob("[0-9a-f]*"))
    tree = str(store.parent / "tree")
    before = content(store)
    for given in BAD_NAMES:
        name = os.fsdecode(given)
        for words in (["create-image", tree], ["import-image"], ["image-objects"], ["cat"]):
            done = run_here(capfdbinary, "--repo", store, *words, name, stdin=image)
            assert done.returncode == 1, (words, name)
            assert ONE_LINE.fullmatch(done.stderr), (words, name)
    assert content(store) == before


@pytest.mark.parametrize("data", [b"", b"x" * 8192, bytes(4096)], ids=["nothing", "junk", "zeros"])
def test_what_is_no_image_is_not_imported(data: bytes, store: Path) -> None:
    before = content(store)
    done = use(store, "import-image", "new", stdin=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert ONE_LINE.fullmatch(done.stderr)
    assert content(store) == before


def replace(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)


HAZARDS: dict[str, Callable[[Path], object]] = {
    "meta.json is a fifo": lambda s: replace(s / "meta.json", os.mkfifo),
    "meta.json is a directory": lambda s: replace(s / "meta.json", os.mkdir),
    "meta.json is a loop": lambda s: replace(s / "meta.json", lambda p: p.symlink_to(p.name)),
    "meta.json is huge": lambda s: os.truncate(s / "meta.json", 1 << 40),
    "meta.json is deep": lambda s: (s / "meta.json").write_text("[" * 100_000),
    "meta.json has a huge number": lambda s: (s / "meta.json").write_text("9" * 10_000),
    "images is a file": lambda s: replace(s / "images", Path.touch),
    "objects is a file": lambda s: replace(s / "objects", Path.touch),
    "objects leads away": lambda s: replace(s / "objects", lambda p: p.symlink_to("/")),
    "streams is a fifo": lambda s: replace(s / "streams", os.mkfifo),
    "the image is a fifo": lambda s: replace(image_of(s), os.mkfifo),
    "the image is a device": lambda s: replace(image_of(s), lambda p: p.symlink_to("/dev/zero")),
    "the image is huge": lambda s: os.truncate(image_of(s), 1 << 36),
    "the image is empty": lambda s: os.truncate(image_of(s), 0),
    "the name is a loop": lambda s: replace(s / "images/refs/one", lambda p: p.symlink_to("one")),
    "the name leads away": lambda s: replace(
        s / "images/refs/one", lambda p: p.symlink_to("/etc/passwd")
    ),
    "a name is not UTF-8": lambda s: os.symlink("../x", os.fsencode(s / "images/refs/") + b"\xff"),
}


def image_of(store: Path) -> Path:
    return next((store / "images").glob("[0-9a-f]*")).resolve()


@pytest.mark.parametrize("hazard", HAZARDS.values(), ids=HAZARDS.keys())
def test_hazards_in_a_store_end_nobody_and_are_left_alone(
    hazard: Callable[[Path], object], store: Path
) -> None:
    hazard(store)
    before = content(store)
    for words in (["images"], ["image-objects", "one"], ["dump-files", "one", "/"], ["gc", "-n"]):
        done = use(store, *words)
        assert done.returncode in (0, 1)
        assert bool(done.stderr) == bool(done.returncode)
        assert content(store) == before
    assert use(store, "fsck", "--metadata-only").returncode in (0, 1)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_stdout_that_takes_nothing(words: list[str], store: Path) -> None:
    line = [*command("cfsctl"), "--repo", str(store), *words]
    for target in (">&-", ">/dev/full"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {target}', "-", *line],
            cwd=store.parent,
            env=environment(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 1
        assert ONE_LINE.fullmatch(done.stderr)


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["latin-1", "ascii"],
)
def test_output_is_utf8_in_every_locale(variables: dict[str, str], store: Path) -> None:
    assert use(store, "create-image", "tree", "é").returncode == 0
    done = run("cfsctl", "--repo", store, "images", cwd=store, stdin=b"", **variables)
    assert done.returncode == 0
    assert "│ é    ┆" in done.stdout.decode()


def test_too_little_memory_is_one_line(store: Path) -> None:
    script = 'ulimit -v 500000 && head -c 700000000 /dev/zero | "$@"'
    line = [*command("cfsctl"), "--repo", str(store), "import-image", "new"]
    done = subprocess.run(
        ["sh", "-c", script, "-", *line], env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"Error: Cannot allocate memory\n")


@pytest.mark.parametrize("words", [["import-image", "new"], ["transaction"]], ids=" ".join)
def test_an_interrupt_leaves_nothing(words: list[str], store: Path) -> None:
    before = content(store)
    inode = f":{store.stat().st_ino} "
    line = [*command("cfsctl"), "--repo", str(store), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        wait_until(
            lambda: any(
                f" {process.pid} " in lock and inode in lock
                for lock in Path("/proc/locks").read_text().splitlines()
            ),
            "the store is open",
        )
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert (stdout, stderr.strip()) == (b"", b"")
    assert content(store) == before


def test_tags_keep_their_line(store: Path) -> None:
    listed = use(store, "oci", "images").stdout.decode()
    assert "│ a/b\\n:1 ┆" in listed
    removed = use(store, "oci", "untag", TAG)
    assert removed.stdout == b"Removed tag a/b\\n:1\n"
    assert use(store, "oci", "images").stdout == b"No images found\n"


def test_a_layer_is_not_written_to_a_terminal(store: Path) -> None:
    line = [*command("cfsctl"), "--repo", str(store), "oci", "layer", LAYER]
    ours, terminal = os.openpty()
    try:
        done = subprocess.run(
            line, env=environment(), stdout=terminal, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(ours)
        os.close(terminal)
    assert done.returncode == 1
    assert ONE_LINE.fullmatch(done.stderr)
    assert b"terminal" in done.stderr


def test_pulls_and_collections_at_the_same_time(store: Path) -> None:
    for number in range(8):
        Layout(store.parent / str(number)).add_image(
            "v1", [FILES, make_tar({"usr/own": b"%d" % number * 5000})]
        )
    words = [["oci", "pull", "-q", f"oci:{number}:v1", f"n{number}"] for number in range(8)]
    lines = [[*command("cfsctl"), "--repo", str(store), *w] for w in [*words, ["gc"], ["gc"]]]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(line, cwd=store.parent, env=environment(), stderr=subprocess.PIPE)
            )
            for line in lines
        ]
        for process in processes:
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == 0
            assert stderr == b"" or stderr.startswith(b"Waiting until nobody else uses the store")
    assert use(store, "oci", "fsck").stdout.endswith(b"oci images: 9/9 ok\n")
