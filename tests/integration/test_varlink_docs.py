"""The examples of docs/varlink.md run as they are printed, on a service as users start it."""

import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import command, environment
from tests.foreign_clients import varlinkctl_words
from tests.integration.varlink_stores import app_service
from tests.integration.waiting import start_server
from tests.paths import CHECKOUT, DATA
from tests.vm.cache import Unavailable

TEXT = (CHECKOUT / "docs" / "varlink.md").read_text()
_SHELL_PART = TEXT.partition("## From a shell\n")[2].partition("\n## ")[0]
SHELL = textwrap.dedent("\n".join(re.findall(r"^    .*$", _SHELL_PART, re.MULTILINE)))
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SECONDS = 60
_MYPY_SECONDS = 300


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with an OCI layout, and with the socket of a service."""
    subprocess.run(["tar", "-xf", DATA / "cli/oci.tar"], cwd=tmp_path, check=True)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    line = [*command("cfsctl"), "varlink", "--address", "unix:cfs.sock"]
    server = start_server(line, tmp_path, tmp_path)
    try:
        yield tmp_path
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=SECONDS)
    assert (server.returncode, errors) == (0, b"")


@pytest.mark.usefixtures("fuse")
def test_the_examples_in_python(service: Path) -> None:
    for example in EXAMPLES:
        done = subprocess.run(
            [sys.executable, "-c", example],
            cwd=service,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stderr) == (0, ""), example
        assert done.stdout
    assert not (service / "app").is_mount()


def test_the_examples_in_python_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"example{number}.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "."],
        cwd=tmp_path,
        env=environment(MYPYPATH=str(CHECKOUT)),
        capture_output=True,
        text=True,
        check=False,
        timeout=_MYPY_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.usefixtures("fuse")
def test_the_examples_for_shells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        varlinkctl = shlex.join(varlinkctl_words())
    except Unavailable as error:
        pytest.skip(f"no varlinkctl: {error}")
    cfsctl = shlex.join(command("cfsctl"))
    with app_service(tmp_path, monkeypatch) as address:
        (tmp_path / "app").mkdir()
        text = SHELL.replace("$XDG_RUNTIME_DIR/cfs.sock", address.removeprefix("unix:"))
        functions = f'varlinkctl() {{ {varlinkctl} "$@"; }}\ncfsctl() {{ {cfsctl} "$@"; }}\n'
        done = subprocess.run(
            ["bash", "-euc", functions + text.replace("/srv", str(tmp_path))],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r'"handle"\s*:\s*1\b', done.stdout)
    assert len(re.findall(r'"state"\s*:\s*"Serving"', done.stdout)) == 2
    assert "tagged   app\n" in done.stdout
    assert not (tmp_path / "app").is_mount()


def test_the_methods_named_exist() -> None:
    described = "".join(path.read_text() for path in (CHECKOUT / "varlink").iterdir())
    methods = set(re.findall(r"^method (\w+)", described, re.MULTILINE))
    called = set(re.findall(r"org\.composefs\.(?:Repository|Oci)\.(\w+)", TEXT)) - {"varlink"}
    assert called <= methods
    assert len(called) > 5
