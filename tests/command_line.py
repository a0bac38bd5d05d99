"""Commands as users start them, and the recorded command lines of ``tests/data/cli``.

``tests/data/cli/README.md`` says what a recorded line means.
"""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from tests.paths import CHECKOUT, DATA

Case = dict[str, Any]
Done = subprocess.CompletedProcess[bytes]

CASES: list[Case] = [
    json.loads(line) for line in (DATA / "cli" / "cases.jsonl").read_text().splitlines()
]
MODULES = {
    "cfsctl": "cfs.cli.main",
    "mkcomposefs": "cfs.cli.mkcomposefs",
    "composefs-info": "cfs.cli.composefs_info",
    "mount.composefs": "cfs.cli.mount_composefs",
    "mount.fuse.composefs": "cfs.cli.mount_fuse_composefs",
}
LAYERS = {
    "base.tar": "63bc3f4d0d29b0be08fd530e01f46c45b0b706e15f931f9188e86b602696d44f",
    "top.tar": "96a9e395b47aefc2b44dbbc0a87b42fae4056bca92a45677d24c457274116a0b",
}
_SECONDS = 60
_FORKING_SECONDS = 300
_PLACEHOLDERS = {
    "hex128": "[0-9a-f]{128}",
    "hex64": "[0-9a-f]{64}",
    "int": "[0-9]+",
    "version": "[0-9.]+",
}


def command(name: str) -> list[str]:
    """Return the words that start a command, whatever is installed."""
    return [sys.executable, "-P", "-m", MODULES[name]]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), **more}


def run(
    name: str, *arguments: str | bytes | Path, cwd: Path, stdin: bytes = b"", **more: str
) -> Done:
    words: list[str | bytes] = [
        word if isinstance(word, bytes) else str(word) for word in arguments
    ]
    return subprocess.run(
        [*command(name), *words],
        cwd=cwd,
        env=environment(**more),
        input=stdin,
        capture_output=True,
        check=False,
        timeout=_SECONDS,
    )


def run_here(
    capture: pytest.CaptureFixture[bytes], *words: str | Path, stdin: str | Path = os.devnull
) -> Done:
    """Run ``cfsctl`` in this process, for tables of many lines.

    Args:
        capture: pytest's ``capfdbinary``.
        words: what stands behind the name of the command.
        stdin: file that is read.
    """
    line = [str(word) for word in words]
    before = sys.stdin
    with open(stdin) as file:
        sys.stdin = file
        try:
            status = run_cfsctl(line)
        finally:
            sys.stdin = before
    return Done(line, status, *capture.readouterr())


class Result(NamedTuple):
    """What became of a command, as text."""

    status: int
    stdout: str
    stderr: str


def run_text(capture: pytest.CaptureFixture[str], *words: str | Path) -> Result:
    """Run ``cfsctl`` in this process; ``capture`` is pytest's ``capsys``."""
    status = run_cfsctl([str(word) for word in words])
    return Result(status, *capture.readouterr())


def run_forking(module: str, *arguments: str | Path | int) -> dict[str, Any]:
    """Run a program of ``tests.integration`` that forks; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.integration.{module}", *map(str, arguments)],
        cwd=CHECKOUT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no threads when it forks
        capture_output=True,
        text=True,
        check=False,
        timeout=_FORKING_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run_shell(script: str, cwd: Path, **more: str) -> Done:
    return subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        check=False,
        timeout=_SECONDS,
    )


def unpack_tree(directory: Path) -> None:
    """Make the directory in which the lines were recorded: layout, layers and tree."""
    subprocess.run(["tar", "-xf", str(DATA / "cli" / "oci.tar")], cwd=directory, check=True)
    for name, digest in LAYERS.items():
        blob = directory / "layout" / "blobs" / "sha256" / digest
        (directory / name).write_bytes(gzip.decompress(blob.read_bytes()))
    unpack_layer(directory / "base.tar", directory / "tree")
    (directory / "tree").chmod(0o755)
    os.utime(directory / "tree", (1700000000, 1700000000))


def unpack_layer(layer: Path, directory: Path) -> None:
    """Unpack a layer with all that root can set, but for whiteouts."""
    directory.mkdir(exist_ok=True)
    options = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*"]
    subprocess.run(
        ["tar", *options, "-xpf", str(layer)], cwd=directory, check=True, timeout=_SECONDS
    )


def run_case(case: Case, work: Path, **more: str) -> Done:
    """Run a recorded line in its directory, with what prepares it."""
    prepare_case(case, work, **more)
    stdin = (work / case["stdin"]).read_bytes() if "stdin" in case else b""
    name, *arguments = case["argv"]
    return run(name.removeprefix("C "), *arguments, cwd=work, stdin=stdin, **more)


def prepare_case(case: Case, work: Path, **more: str) -> None:
    """Run what prepares a recorded line, if anything does."""
    if "prepare" in case:
        done = run_shell(case["prepare"], work, **more)
        assert done.returncode == 0, done.stderr


def check_case(case: Case, done: Done) -> None:
    """Compare what a recorded line gave with the recording.

    Raises:
        AssertionError: with what is different.
    """
    stderr = done.stderr.decode(errors="surrogateescape")
    assert "Traceback" not in stderr, stderr
    assert done.returncode == case["exit"], f"status {done.returncode}: {stderr}"
    assert bool(stderr) >= bool(done.returncode), "no message"
    if "stdout_sha256" in case:
        assert len(done.stdout) == case["stdout_size"]
        assert hashlib.sha256(done.stdout).hexdigest() == case["stdout_sha256"]
    else:
        check_text(done.stdout.decode(), case["stdout"], case.get("order"))
    for word in case.get("stderr_has", ()):
        assert word in stderr


def check_text(found: str, expected: str, order: str | None = None) -> None:
    """Compare texts; ``order`` is the part of the order that may differ.

    Raises:
        AssertionError: they are different.
    """
    if order == "json lists":
        assert _sort_lists(json.loads(found)) == _sort_lists(json.loads(expected))
        return
    if order in ("lines", "rows"):
        found, expected = ("\n".join(sorted(text.split("\n"))) for text in (found, expected))
    pattern = re.escape(expected)
    for name, digits in _PLACEHOLDERS.items():
        pattern = pattern.replace(f"<<{name}>>", digits)
    assert re.fullmatch(pattern, found), f"expected {expected!r}, got {found!r}"


def _sort_lists(value: Any) -> Any:
    if isinstance(value, list):
        return sorted((_sort_lists(element) for element in value), key=json.dumps)
    if isinstance(value, dict):
        return {key: _sort_lists(element) for key, element in value.items()}
    return value
