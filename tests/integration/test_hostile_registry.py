"""Registries, programs and people that do not do what they should while an image is pulled."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.registry import (
    Blob,
    Cfs,
    HostileRegistry,
    hostile_registry,
    need,
    pulled,
    refused,
    streams,
)
from tests.integration.stores import CFSCTL
from tests.integration.waiting import wait_for_end, wait_until
from tests.paths import CHECKOUT

SECONDS = 300


@pytest.fixture
def hostile(layouts: Path) -> Iterator[HostileRegistry]:
    need("skopeo")
    with hostile_registry() as registry:
        registry.load(layouts / "fixture")
        yield registry


def drops(data: bytes) -> dict[str, object]:
    return {"data": data[:-20], "declared_size": len(data)}


DAMAGES: dict[str, Callable[[bytes], dict[str, object]]] = {
    "dropped": drops,
    "empty": lambda _: {"data": b""},
    "short": lambda data: {"data": data[:-20]},
    "long": lambda data: {"data": data + bytes(20)},
    "much too long": lambda data: {"data": data + bytes(4 << 20)},
    "wrong": lambda data: {"data": data[:-1] + bytes([data[-1] ^ 1])},
    "refused": lambda _: {"data": b"\x1b[31mno\n\nno", "status": 500},
    "endless": lambda data: {"data": data, "declared_size": 1 << 50},
}


@pytest.mark.parametrize("part", ["config", "layer"])
def test_damaged_blobs(part: str, hostile: HostileRegistry, tmp_path: Path, cfs: Cfs) -> None:
    """Whatever is wrong: one clear line, nothing stored, and the right image is pulled after it."""
    manifest = json.loads(hostile.manifest.data)
    digest = (manifest["config"] if part == "config" else manifest["layers"][0])["digest"]
    blob = hostile.blobs[digest]
    right = dict(vars(blob))
    for name, damage in DAMAGES.items():
        vars(blob).update(right | damage(right["data"]))
        line = refused(cfs("oci", "pull", "--tls-verify=false", hostile.image, "image"))
        assert line.startswith("Error: "), name
        assert line.isprintable(), name
        assert streams(tmp_path) == set(), name
    vars(blob).update(right)
    pulled(cfs("oci", "pull", "--tls-verify=false", hostile.image, "image"))
    assert cfs("oci", "fsck").returncode == 0


def test_wrong_manifests(hostile: HostileRegistry, tmp_path: Path, cfs: Cfs) -> None:
    """Manifests that are no manifests, or lie about sizes."""
    right = hostile.manifest
    document = json.loads(right.data)
    (layer,) = document["layers"]
    pull = ["oci", "pull", "--tls-verify=false", hostile.image, "image"]
    for data in (b"", b"{}", b"[" * 100_000, b"null", b'"x"', right.data[:-1], b" " * (5 << 20)):
        hostile.manifest = type(right)(data)
        refused(cfs(*pull))
    lies: list[dict[str, object]] = [
        {"layers": [{**layer, "size": layer["size"] + 1}]},
        {"layers": [{**layer, "size": -1}]},
        {"layers": [{**layer, "size": 1 << 62}]},
        {"layers": [{**layer, "digest": "sha256:" + "0" * 64}]},
        {"layers": [{**layer, "digest": "sha256:../../../etc/passwd"}]},
        {"layers": [layer, layer]},
        {"layers": []},
        {"config": {**document["config"], "digest": layer["digest"], "size": layer["size"]}},
        {"config": {**document["config"], "size": 1 << 62}},
    ]
    for changes in lies:
        hostile.manifest = right
        hostile.change_manifest(**changes)
        refused(cfs(*pull))
        sound = {f"oci-layer-{diff_id}" for diff_id in diff_ids(hostile, document)}
        assert streams(tmp_path) <= sound, changes
    hostile.manifest = right
    pulled(cfs(*pull))
    assert cfs("oci", "fsck").returncode == 0


def test_second_pull_fetches_no_blob(hostile: HostileRegistry, cfs: Cfs) -> None:
    pull = ["oci", "pull", "--tls-verify=false", hostile.image, "image"]
    first = pulled(cfs(*pull))
    hostile.blobs.clear()
    assert pulled(cfs(*pull)) == first


def test_manifest_of_another_digest(hostile: HostileRegistry, tmp_path: Path, cfs: Cfs) -> None:
    image = hostile.image.replace(":tag", "@sha256:" + "5" * 64)
    assert "5" * 64 in refused(cfs("oci", "pull", "--tls-verify=false", image, "image"))
    assert streams(tmp_path) == set()


def test_layer_of_another_diff_id(layouts: Path, tmp_path: Path, cfs: Cfs) -> None:
    """All blobs have their digests, but the config lies about the layer."""
    need("skopeo")
    with hostile_registry() as registry:
        registry.load(layouts / "bad-diff-id")
        refused(cfs("oci", "pull", "--tls-verify=false", registry.image, "image"))
    assert streams(tmp_path) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_pull_ends_while_it_waits(
    number: signal.Signals, hostile: HostileRegistry, tmp_path: Path, cfs: Cfs
) -> None:
    """Nothing is waited for, and no process of skopeo stays behind."""
    need("setpriv")
    hostile.is_open.clear()
    for blob in hostile.blobs.values():
        blob.is_stuck = True
    command = [*CFSCTL, "--repo", str(tmp_path / "store"), "oci", "pull", "--tls-verify=false"]
    process = subprocess.Popen([*command, hostile.image], cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    wait_until(lambda: hostile.is_asked.is_set() or process.poll() is not None, "nobody asks")
    assert process.returncode is None
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    assert children
    process.send_signal(number)
    assert process.wait(SECONDS) != 0
    for child in children:
        wait_for_end(child)
    assert not hostile.was_waited_for
    assert streams(tmp_path) == set()
    assert cfs("oci", "fsck").returncode == 0


def test_failing_layer_ends_the_others(
    hostile: HostileRegistry, tmp_path: Path, cfs: Cfs, layouts: Path
) -> None:
    """One layer is damaged while the registry keeps us waiting for another."""
    diff_id = "sha256:" + "1" * 64
    hostile.load(layouts / "fixture")
    document = json.loads(hostile.manifest.data)
    (layer,) = document["layers"]
    other = gzip.compress(b"no tar" * 100)
    digest = f"sha256:{hashlib.sha256(other).hexdigest()}"
    hostile.blobs[digest] = Blob(other)
    config = json.loads(hostile.blobs[document["config"]["digest"]].data)
    config["rootfs"]["diff_ids"].append(diff_id)
    data = json.dumps(config).encode()
    config_digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    hostile.blobs[config_digest] = Blob(data)
    hostile.blobs[layer["digest"]].is_stuck = True
    hostile.is_open.clear()
    hostile.change_manifest(
        config={**document["config"], "digest": config_digest, "size": len(data)},
        layers=[layer, {**layer, "digest": digest, "size": len(other)}],
    )
    assert diff_id in refused(cfs("oci", "pull", "--tls-verify=false", hostile.image, "image"))
    assert not hostile.was_waited_for
    assert streams(tmp_path) == set()


def diff_ids(registry: HostileRegistry, manifest: dict[str, dict[str, str]]) -> list[str]:
    config = json.loads(registry.blobs[manifest["config"]["digest"]].data)
    found: list[str] = config["rootfs"]["diff_ids"]
    return found


FAKES = {
    "old": ("#!/bin/sh\necho 'unknown command' >&2; exit 1\n", "unknown command"),
    "dead": ("#!/bin/sh\nkill -KILL $$\n", "signal 9"),
    "dead of a nameless signal": ("#!/bin/sh\nkill -40 $$\n", "signal 40"),
    "silent": ("#!/bin/sh\nexit 0\n", "exit status 0"),
    "chatty": ("#!/bin/sh\nyes | head -c 1000000 >&2\n", "exit status 0"),
    "previous": ('{"success":true,"value":"0.2.2","pipeid":0,"error":""}', "too old"),
    "no version": ('{"success":true,"value":[],"pipeid":0,"error":""}', "too old"),
    "huge version": (f'{{"success":true,"value":"0.{"9" * 5000}"}}', "too old"),
    "no JSON": ("hello", "no JSON"),
    "deep": ("[" * 20_000, "JSON"),
    "no object": ("[]", "expected an object"),
    "failing": ('{"success":false,"error":"two\\nlines\\u001b[0m"}', "two lines?[0m"),
    "dying": ('{"success":true,"value":"0.2.3","pipeid":0,"error":""}', "skopeo ended"),
}
ANSWER = """#!/usr/bin/python3
import socket
channel = socket.socket(fileno=0)
channel.recv(40000)
channel.send({reply!r}.encode())
"""


def test_skopeo_that_does_not_work(
    tmp_path: Path, cfs: Cfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    pull = ["oci", "pull", "docker://127.0.0.1:1/image", "image"]
    assert "skopeo, which is not installed" in refused(cfs(*pull))
    with monkeypatch.context() as patch:  # users' storage is read in their name space
        patch.setattr(os, "geteuid", lambda: 1000)
        line = refused(cfs("oci", "pull", "containers-storage:image"))
    assert "podman, which is not installed" in line
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    for name, (text, expected) in FAKES.items():
        script = text if text.startswith("#!") else ANSWER.format(reply=text)
        (programs / "skopeo").write_text(script)
        (programs / "skopeo").chmod(0o755)
        assert expected in refused(cfs(*pull)), name
    assert streams(tmp_path) == set()


# as skopeo's, but that it finds nothing wrong, and adds a byte to one blob
LIAR = """#!/usr/bin/python3
import json, os, pathlib, socket
channel = socket.socket(fileno=0)
blobs = pathlib.Path({layout!r}, "blobs/sha256")
(entry,) = json.loads((blobs.parents[1] / "index.json").read_bytes())["manifests"]
while message := channel.recv(40000):
    request = json.loads(message)
    value, digest, fds = None, None, []
    if request["method"] == "Initialize":
        value = "0.2.3"
    elif request["method"] == "OpenImage":
        value = 1
    elif request["method"] == "GetManifest":
        value = digest = entry["digest"]
    elif request["method"] == "GetBlob":
        digest, value = request["args"][1:]
    if digest:
        data = (blobs / digest[7:]).read_bytes() + b" " * (digest == {wrong!r})
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        fds.append(reader)
    reply = {{"success": True, "value": value, "pipeid": len(fds), "error": ""}}
    socket.send_fds(channel, [json.dumps(reply).encode()], fds)
    for fd in fds:
        os.close(fd)
"""


def test_skopeo_that_verifies_nothing(
    layouts: Path, tmp_path: Path, cfs: Cfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layouts / "fixture"
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    digest = entry["digest"]
    document = json.loads((layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    config, layer = document["config"]["digest"], document["layers"][0]["digest"]
    program = tmp_path / "skopeo"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for wrong in (config, layer):
        program.write_text(LIAR.format(layout=str(layout), wrong=wrong))
        program.chmod(0o755)
        assert wrong in refused(cfs("oci", "pull", "docker://127.0.0.1:1/image", "image"))
        assert streams(tmp_path) == set()
    program.write_text(LIAR.format(layout=str(layout), wrong=None))
    assert pulled(cfs("oci", "pull", "docker://127.0.0.1:1/image", "image")) == digest


def test_registry_that_does_not_answer(tmp_path: Path, cfs: Cfs) -> None:
    need("skopeo")
    assert "127.0.0.1:1" in refused(cfs("oci", "pull", "docker://127.0.0.1:1/image", "image"))
    assert streams(tmp_path) == set()
