"""The varlink service of composefs-rs, as a process."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.integration.waiting import wait_until
from tests.varlink_client import SECONDS, RawClient


@contextmanager
def serving_rust(words: list[str], path: Path, *options: str) -> Iterator[None]:
    """Serve on a socket file in the current directory, with global options."""
    variables = {key: value for key, value in os.environ.items() if key != "RUST_BACKTRACE"}
    command = [*words, *options, "varlink", "--address", str(path)]
    with subprocess.Popen(command, env=variables) as service:
        try:
            wait_until(path.is_socket, "no socket")
            wait_until(lambda: _answers(path), "nobody serves")
            yield
        finally:
            service.terminate()
            service.wait(SECONDS)


def _answers(path: Path) -> bool:
    with suppress(ConnectionRefusedError):
        RawClient.connect(str(path)).close()
        return True
    return False
