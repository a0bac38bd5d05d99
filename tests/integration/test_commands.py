"""The commands as users start them, against recordings of the C tools and of composefs-rs.

``tests/data/cli/README.md`` says what the recordings mean and how their directory is made.
"""

import errno
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.command_line import (
    CASES,
    Case,
    Done,
    check_case,
    command,
    environment,
    run,
    run_case,
    run_shell,
    unpack_tree,
)

# C has no --hardlinks; a bare --fuse needs no value here (spec cli-and-varlink c.6)
OURS_DIFFERS = {"C mkcomposefs: hard links", "fuse without a value"}
# C's words for a filter end in the text of errno 0, the others are those of getopt
OTHER_WORDS = {
    "C composefs-info: filter with a slash",
    "C composefs-info: unknown option",
    "C mount.composefs: unknown flag",
}
NO_STORE = {"--no-repo", "--no-propagate-usr-to-root"}
ROOT_LINE = "/ 4096 40755 2 0 0 0 1700000000.0 - - -\n"


def is_ours(case: Case) -> bool:
    argv = case.get("argv")
    if not argv or case["what"] in OURS_DIFFERS:
        return False
    if case["area"] == "usage":
        return True
    if argv[0] == "cfsctl":
        is_tool = "mkcomposefs" in argv and "tree" not in argv
        return is_tool or (set(argv) >= NO_STORE and "compute-karg" not in argv)
    is_hardlinks = argv[0] == "mkcomposefs" and "--hardlinks" in argv
    return is_hardlinks or argv[0].startswith("C ")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the cases were recorded; with the tree only as root."""
    directory = tmp_path_factory.mktemp("cli")
    for case in CASES:
        if "file" in case and "content" in case and case["area"] == "mkcomposefs":
            (directory / case["file"]).write_text(case["content"])
    for size in (512, 513, 5000, 5001):
        line = f"/a {size} 100644 1 0 0 0 1700000000.0 - {'x' * size} -\n"
        (directory / f"in{size}.dump").write_text(ROOT_LINE + line)
    (directory / "empty.dump").touch()
    for image, dump in (("g.img", "good.dump"), ("o.img", "odd.dump")):
        assert run("mkcomposefs", "--from-file", dump, image, cwd=directory).returncode == 0
    if os.geteuid() == 0:
        unpack_tree(directory)
        assert (
            run("mkcomposefs", "--digest-store=ds", "tree", "t.img", cwd=directory).returncode == 0
        )
    return directory


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if is_ours(case)],
    ids=lambda case: f"{case['area']}: {case['what']}",
)
def test_recorded_case(case: Case, work: Path) -> None:
    if "root" in case.get("needs", ()) and os.geteuid() != 0:
        pytest.skip("needs root: the tree has devices, owners and trusted xattrs")
    done = run_case(case, work)
    check_case(case, done)
    name = case["argv"][0]
    if name.startswith("C ") and case["exit"] == 1 and case["what"] not in OTHER_WORDS:
        words = case["stderr_was"].strip().partition(": ")
        assert (words[2] or words[0]) in done.stderr.decode()


def test_recorded_digest_store(work: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree has devices, owners and trusted xattrs")
    (expected,) = (
        case["files"] for case in CASES if "files" in case and case["area"] == "mkcomposefs"
    )
    found = [path for path in (work / "ds").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(work)) for path in found) == sorted(expected)
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o644}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "good.dump"
    path.write_text(ROOT_LINE + "/a 3 100644 1 0 0 0 0.0 - abc -\n")
    return path


def make(dump: Path, image: Path | str) -> Done:
    return run("mkcomposefs", "--from-file", dump, image, cwd=dump.parent)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_new_image_follows_the_umask(dump: Path) -> None:
    done = subprocess.run(
        [
            "sh",
            "-c",
            'umask 027 && exec "$@"',
            "-",
            *command("mkcomposefs"),
            "--from-file",
            dump,
            "i",
        ],
        cwd=dump.parent,
        env=environment(),
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert stat.S_IMODE((dump.parent / "i").stat().st_mode) == 0o640


def test_an_image_is_replaced_and_keeps_its_mode(dump: Path) -> None:
    image = dump.parent / "image"
    image.write_text("old")
    image.chmod(0o600)
    link = dump.parent / "link"
    link.symlink_to("image")
    assert make(dump, link).returncode == 0
    assert link.is_symlink()
    assert image.stat().st_size > 4096
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert names(dump.parent) == {"good.dump", "image", "link"}


def test_a_dangling_symlink_gets_its_target(dump: Path) -> None:
    link = dump.parent / "link"
    link.symlink_to("image")
    assert make(dump, link).returncode == 0
    assert (dump.parent / "image").stat().st_size > 4096


def test_a_fifo_is_written_to(dump: Path) -> None:
    fifo = dump.parent / "fifo"
    os.mkfifo(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert make(dump, fifo).returncode == 0
    reader.join(60)
    make(dump, "image")
    assert received == [(dump.parent / "image").read_bytes()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_bad_dump_leaves_everything_as_it_was(dump: Path, old: str | None) -> None:
    dump.write_text(ROOT_LINE + "/a x\n")
    if old:
        (dump.parent / "image").write_text(old)
    before = names(dump.parent)
    done = make(dump, "image")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"mkcomposefs: line 2: ")
    assert done.stderr.count(b"\n") == 1
    assert names(dump.parent) == before
    assert not old or (dump.parent / "image").read_text() == old


def test_an_image_is_not_written_to_a_terminal(dump: Path) -> None:
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [*command("mkcomposefs"), "--from-file", dump, "-"],
            env=environment(),
            stdout=terminal,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    finally:
        os.close(terminal)
        os.close(controller)
    assert done.returncode == 1
    assert done.stderr == b"mkcomposefs: stdout is a tty.  Refusing to use it\n"


@pytest.mark.parametrize("name", ["mkcomposefs", "composefs-info", "cfsctl"])
def test_a_full_disk_behind_stdout(name: str, dump: Path) -> None:
    make(dump, "image")
    (dump.parent / "tree").mkdir()
    arguments = {
        "mkcomposefs": ["--from-file", "good.dump", "-"],
        "composefs-info": ["dump", "image"],
        "cfsctl": ["--no-repo", "create-dumpfile", "--no-propagate-usr-to-root", "tree"],
    }
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*command(name), *arguments[name]],
            cwd=dump.parent,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert os.strerror(errno.ENOSPC).encode() in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("name", ["mkcomposefs", "composefs-info"])
def test_a_reader_that_has_gone_is_no_news(name: str, dump: Path) -> None:
    make(dump, "image")
    words = {"mkcomposefs": ["--from-file", "good.dump", "-"], "composefs-info": ["dump", "image"]}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*command(name), *words[name]],
            cwd=dump.parent,
            env=environment(),
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ([], 0),
        (["--min-version=1"], 1),
        (["--max-version=1"], 0),
        (["--min-version=1", "--max-version=0"], 1),
        (["--min-version=2", "--max-version=2"], 2),
        (["--min-v", "1"], 1),
    ],
)
def test_format_versions(options: list[str], version: int, dump: Path) -> None:
    done = run("mkcomposefs", *options, "--from-file", dump, "image", cwd=dump.parent)
    assert done.returncode == 0, done.stderr
    header = (dump.parent / "image").read_bytes()[:16]
    assert int.from_bytes(header[4:8], "little") == 1
    assert int.from_bytes(header[12:16], "little") == version


@pytest.mark.parametrize(
    "options",
    [
        ["--min-version=2"],
        ["--max-version=2"],
        ["--min-version=1", "--max-version=2"],
        ["--min-version=2", "--max-version=1"],
        ["--min-version=-1"],
        ["--min-version=3", "--max-version=3"],
    ],
)
def test_format_versions_that_there_are_not(options: list[str], dump: Path) -> None:
    done = run("mkcomposefs", *options, "--from-file", dump, "image", cwd=dump.parent)
    assert done.returncode == 1
    assert done.stderr.startswith(b"mkcomposefs: cannot write file: Invalid argument")
    assert names(dump.parent) == {"good.dump"}


def test_strict_mode_comes_from_the_environment(dump: Path) -> None:
    dump.write_text(dump.read_text().rstrip("\n"))
    words = ("--from-file", "--print-digest-only", dump)
    assert run("mkcomposefs", *words, cwd=dump.parent).returncode == 0
    done = run("mkcomposefs", *words, cwd=dump.parent, CFS_PARSE_STRICT="")
    assert done.returncode == 1
    assert b"missing final newline" in done.stderr


def test_the_tools_under_their_own_names(dump: Path) -> None:
    script = dump.parent / "mkcomposefs"
    main = "import sys; from cfs.cli.main import main; sys.exit(main())"
    script.write_text(f"#!{sys.executable}\n{main}\n")
    script.chmod(0o755)
    done = subprocess.run(
        [script, "--from-file", "--print-digest-only", dump],
        env=environment(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, len(done.stdout)) == (0, 65)


@pytest.mark.parametrize("name", ["mkcomposefs", "composefs-info"])
def test_help_names_every_option(name: str, tmp_path: Path) -> None:
    done = run(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {name} ".encode())


@pytest.mark.parametrize(
    "words",
    [
        ["--no-repo", "create-dumpfile", "."],
        ["--no-repo", "compute-id", "--no-propagate-usr-to-root", "--bootable", "."],
        ["fuse-serve", "image", "."],
        ["--no-repo", "fuse-serve", "-o", "mode=overlay", "image", "."],
        ["--no-repo", "fuse-serve", "image", "."],
        ["--no-repo", "create-dumpfile", "--no-propagate-usr-to-root", "link"],
        ["ostree", "pull", "--x"],
        ["fetch", "url", "name"],
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    done = run("cfsctl", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"Error: [^\n]+\n", done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ["fuse-serve", "-o", "nope", "image", "."],
        ["fuse-serve", "-o", "workers=0,workers=0", "image", "."],
        ["fuse-serve", "--upperdir", "u", "image", "."],
        ["fuse-serve", "--upperdir", "u", "--workdir", "w", "image", "."],
        ["fuse-serve", "--background", "--background", "image", "."],
        ["create-dumpfile", "--xattrs", "nope", "."],
        ["create-dumpfile"],
    ],
)
def test_usage_errors(words: list[str], tmp_path: Path) -> None:
    done = run("cfsctl", "--no-repo", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: ")


@pytest.mark.parametrize("version", ["0", "1", "2"])
@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_the_id_is_the_digest_of_the_image(version: str, name: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("x" * 100)
    shutil.copy(tree / "file", tree / "other")
    (tree / "name").hardlink_to(tree / "file")
    words = ["--no-repo", "--hash", name, "--erofs-version", version]
    done = run("cfsctl", *words, "compute-id", "--no-propagate-usr-to-root", "tree", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rb"[0-9a-f]+\n", done.stdout)
    assert len(done.stdout) == (65 if name == "sha256" else 129)
    if name == "sha256":
        options = [f"--min-version={version}", f"--max-version={version}", "--hardlinks"]
        words = ["--print-digest-only", *options, "tree"]
        assert run("mkcomposefs", *words, cwd=tmp_path).stdout == done.stdout


@pytest.mark.parametrize("closing", [">&-", ">/dev/full"])
@pytest.mark.parametrize("words", ["info dump image", "info --help", "make --digest"])
def test_stdout_that_takes_nothing_is_one_line(closing: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(b"/ 0 40755 1 0 0 0 0.0 - - -\n")
    run_tools("$make --from-file dump image", tmp_path)
    words = words.replace("--digest", "--print-digest-only --from-file dump")
    done = run_tools(f"${words} {closing}", tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rb"(composefs-info|mkcomposefs): [A-Z][^\n]*\n", done.stderr)


def test_closed_stdin_is_one_line_and_closed_stderr_not_stdout(tmp_path: Path) -> None:
    done = run_tools("$make --from-file - image <&-", tmp_path)
    assert (done.returncode, done.stderr) == (1, b"mkcomposefs: Bad file descriptor\n")
    done = run_tools("$info ls missing 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def run_tools(script: str, cwd: Path) -> Done:
    python = f"{sys.executable} -m cfs.cli."
    return run_shell(script, cwd, make=f"{python}mkcomposefs", info=f"{python}composefs_info")
