"""Registries on this machine: ``docker-registry``, and one that answers as a test wants."""

import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cfs.compat import override
from tests.command_line import Done
from tests.integration.waiting import wait_until

Cfs = Callable[..., Done]

USER, PASSWORD = "somebody", "pass:word with blanks"
_SECONDS = 120
_ADDRESS = "127.0.0.1:0"
_LISTENING = re.compile(r"listening on (127\.0\.0\.1:[0-9]+)")
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def need(*programs: str) -> None:
    """Skip the test unless these programs are installed."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


@dataclass(frozen=True)
class Registry:
    """A running registry.

    Attributes:
        address: host and port.
        access: options of ``oci pull`` that reach it.
    """

    address: str
    access: Sequence[str]

    def image(self, name: str) -> str:
        return f"docker://{self.address}/{name}"

    def push(self, source: str, name: str, *options: str) -> None:
        """Copy an image to it; ``options`` are skopeo's."""
        access = [f"--dest-{option.removeprefix('--')}" for option in self.access]
        command = ["skopeo", "--insecure-policy", "copy", "-q", *access, *options]
        command += [source, self.image(name)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)


@contextmanager
def plain_registry(directory: Path) -> Iterator[Registry]:
    """Run a registry without TLS, whose images are in ``directory / "images"``."""
    with _serve(directory, "plain", {}) as address:
        yield Registry(address, ["--tls-verify=false"])


@contextmanager
def secret_registry(directory: Path) -> Iterator[Registry]:
    """Run a registry with TLS and a password, whose images are in ``directory / "images"``."""
    certificates = directory / "certificates"
    certificates.mkdir()
    _make_certificates(directory, certificates)
    words = ["htpasswd", "-Bbn", "-C4", USER, PASSWORD]
    users = subprocess.run(words, check=True, capture_output=True, timeout=_SECONDS).stdout
    (directory / "users").write_bytes(users)
    settings = {
        "auth": {"htpasswd": {"realm": "tests", "path": str(directory / "users")}},
        "http": {
            "addr": _ADDRESS,
            "tls": {
                "certificate": str(directory / "server.crt"),
                "key": str(directory / "server.key"),
            },
        },
    }
    with _serve(directory, "secret", settings) as address:
        yield Registry(address, [f"--cert-dir={certificates}", f"--creds={USER}:{PASSWORD}"])


@contextmanager
def _serve(directory: Path, name: str, settings: dict[str, object]) -> Iterator[str]:
    configuration = {
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "images")}},
        "http": {"addr": _ADDRESS},
        **settings,
    }
    # JSON is YAML
    (directory / f"{name}.yml").write_text(json.dumps(configuration))
    log = directory / f"{name}.log"
    command = ["docker-registry", "serve", str(directory / f"{name}.yml")]
    if shutil.which("setpriv"):  # it does not survive tests that are killed
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        wait_until(
            lambda: _LISTENING.search(log.read_text()) or process.poll() is not None,
            "the registry does not start",
        )
        match = _LISTENING.search(log.read_text())
        assert match, log.read_text()
        yield match[1]
    finally:
        process.kill()
        process.wait()


def _make_certificates(directory: Path, trusted: Path) -> None:
    """Make an authority in ``trusted`` and a certificate of it for this machine."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    authority = ["-CA", str(trusted / "ca.crt"), "-CAkey", str(directory / "ca.key")]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"]
    for command in (
        [*new, "-keyout", str(directory / "ca.key"), "-out", str(trusted / "ca.crt"),
         "-subj", "/CN=authority of a test"],
        [*new, *authority, *extension, "-keyout", str(directory / "server.key"),
         "-out", str(directory / "server.crt"), "-subj", "/CN=127.0.0.1"],
    ):  # fmt: skip
        subprocess.run(
            [*command, "-nodes", "-days", "2"], check=True, capture_output=True, timeout=_SECONDS
        )


@dataclass
class Blob:
    """What a hostile registry answers when it is asked for a blob or manifest.

    Attributes:
        data: the body.
        declared_size: Content-Length, if it is not the size of ``data``.
        status: of HTTP.
        is_stuck: it comes when the registry is open.
    """

    data: bytes
    declared_size: int | None = None
    status: int = 200
    is_stuck: bool = False


@dataclass
class HostileRegistry:
    """One image, served as ``docker://ADDRESS/image:tag``; tests change what is in ``blobs``.

    Attributes:
        is_open: cleared: who asks for a stuck blob waits.
        is_asked: somebody has asked for one.
        was_waited_for: and stayed there until we gave up.
    """

    address: str
    blobs: dict[str, Blob] = field(default_factory=dict)
    manifest: Blob = field(default_factory=lambda: Blob(b""))
    is_open: threading.Event = field(default_factory=threading.Event)
    is_asked: threading.Event = field(default_factory=threading.Event)
    was_waited_for: bool = False

    @property
    def image(self) -> str:
        return f"docker://{self.address}/image:tag"

    def load(self, layout: Path) -> None:
        """Serve the first image of a layout."""
        blobs = {f"sha256:{path.name}": path for path in (layout / "blobs/sha256").iterdir()}
        self.blobs = {digest: Blob(path.read_bytes()) for digest, path in blobs.items()}
        index = json.loads((layout / "index.json").read_bytes())
        self.manifest = Blob(self.blobs[index["manifests"][0]["digest"]].data)

    def change_manifest(self, **changes: object) -> None:
        self.manifest = Blob(json.dumps(json.loads(self.manifest.data) | changes).encode())

    def find(self, path: str) -> tuple[Blob, str] | None:
        kind, _, name = path.removeprefix("/v2/image/").partition("/")
        is_manifest = kind == "manifests"
        blob = self.manifest if is_manifest else self.blobs.get(name)
        if blob and blob.is_stuck:
            self.is_asked.set()
            self.was_waited_for |= not self.is_open.wait(_SECONDS)
        return (blob, _MANIFEST if is_manifest else "application/octet-stream") if blob else None


@contextmanager
def hostile_registry() -> Iterator[HostileRegistry]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = registry.find(self.path)
            if self.path == "/v2/":
                found = Blob(b"{}"), "application/json"
            blob, kind = found or (Blob(b"{}", status=404), "application/json")
            self.send_response(blob.status)
            self.send_header("Content-Type", kind)
            size = len(blob.data) if blob.declared_size is None else blob.declared_size
            self.send_header("Content-Length", str(size))
            self.send_header("Docker-Content-Digest", f"sha256:{_sha256(registry.manifest.data)}")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(blob.data)

        do_HEAD = do_GET  # noqa: N815

        @override
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = False  # they are waited for in the end, with their descriptors

        @override
        def handle_error(self, *where: object) -> None:
            """Who is given too much goes away."""

    with Server(("127.0.0.1", 0), Handler) as server:
        registry = HostileRegistry(f"127.0.0.1:{server.server_address[1]}")
        registry.is_open.set()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield registry
        finally:
            registry.is_open.set()
            server.shutdown()
            thread.join()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pulled(done: Done) -> str:
    """Return the digest of the manifest that was pulled."""
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].decode()


def refused(done: Done) -> str:
    """Return the one line of an error."""
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    return line


def streams(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "store/streams").glob("oci-*")}
