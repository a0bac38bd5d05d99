"""The examples of docs/varlink.md run as they are printed, on a service as users start it."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import command, environment
from tests.integration.waiting import start_server
from tests.paths import CHECKOUT, DATA

TEXT = (CHECKOUT / "docs" / "varlink.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SECONDS = 60


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


def test_the_methods_named_exist() -> None:
    described = "".join(path.read_text() for path in (CHECKOUT / "varlink").iterdir())
    methods = set(re.findall(r"^method (\w+)", described, re.MULTILINE))
    called = set(re.findall(r"org\.composefs\.(?:Repository|Oci)\.(\w+)", TEXT)) - {"varlink"}
    assert called <= methods
    assert len(called) > 5
