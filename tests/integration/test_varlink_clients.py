"""Clients that we did not write: the command line of PyPI ``varlink``, ``asyncvarlink``."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncvarlink
import pytest

from cfs.service.handles import StoreOptions
from tests.integration.varlink_replay import whole_service
from tests.paths import CHECKOUT
from tests.varlink_client import SECONDS, serving

REPOSITORY = "org.composefs.Repository"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "sock"
    with whole_service(StoreOptions(insecure=True)) as dispatcher, serving(dispatcher, path):
        yield f"unix:{path}"


def varlink_cli(*arguments: str, cwd: Path) -> str:
    words = [sys.executable, "-W", "ignore", "-m", "varlink.cli", *arguments]
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_pypi_command_line(address: str, tmp_path: Path) -> None:
    said = varlink_cli("info", address, cwd=tmp_path)
    assert "Vendor: org.composefs" in said
    for name in (REPOSITORY, "org.composefs.Oci"):
        text = (CHECKOUT / "varlink" / f"{name}.varlink").read_text()
        assert varlink_cli("help", f"{address}/{name}", cwd=tmp_path).strip() == text.strip()
    create = json.dumps({"path": str(tmp_path / "r")})
    method = f"{address}/{REPOSITORY}"
    said = varlink_cli("call", f"{method}.InitRepository", create, cwd=tmp_path)
    assert json.loads(said) == {"created": True}
    said = varlink_cli("call", f"{method}.OpenRepository", create, cwd=tmp_path)
    assert json.loads(said)["handle"] == 1
    said = varlink_cli("call", f"{method}.CloseRepository", '{"handle": 9}', cwd=tmp_path)
    assert f"{REPOSITORY}.InvalidHandle" in said
    said = varlink_cli("call", "-m", f"{method}.ListMounts", "{}", cwd=tmp_path)
    assert json.loads(said) == {"mounts": []}


def test_asyncvarlink(address: str, tmp_path: Path) -> None:
    """Positional descriptors need its low level."""
    found = asyncio.run(use_asyncvarlink(address.removeprefix("unix:"), str(tmp_path / "r")))
    assert found["created"] is True
    assert found["handle"] == 1
    assert found["error"] == "org.composefs.Oci.InvalidRequest"


async def use_asyncvarlink(path: str, store: str) -> dict[str, Any]:
    transport, protocol = await asyncvarlink.connect_unix_varlink(
        asyncvarlink.VarlinkClientProtocol, path
    )

    async def call(
        method: str, parameters: dict[str, Any], fds: list[int] | None = None
    ) -> dict[str, Any]:
        request = asyncvarlink.VarlinkMethodCall(method, parameters)
        reply: Any = await protocol.call(request, fds)
        reply, _ = reply if isinstance(reply, tuple) else (reply, None)
        if reply.error is not None:
            return {"error": reply.error}
        found: dict[str, Any] = reply.parameters
        return found

    try:
        found = await call(f"{REPOSITORY}.InitRepository", {"path": store})
        found |= await call(f"{REPOSITORY}.OpenRepository", {"path": store})
        digest = f"sha256:{'0' * 64}"
        layer = {"handle": 1, "diff_id": digest, "zerocopy": False}
        with open(os.devnull) as file:
            found |= await call("org.composefs.Oci.PutLayer", layer, [file.fileno()])
    finally:
        transport.close()
    return found
