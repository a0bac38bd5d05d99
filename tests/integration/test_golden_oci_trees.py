"""Trees and images of the layers of ``tests/data/oci``, beside what composefs-rs made of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfs.digest import Algorithm, Digest
from cfs.dumpfile import format_tree
from cfs.erofs.writer import Rules, write_image
from cfs.errors import CfsError
from cfs.fsverity import compute_digest
from cfs.oci.documents import StoredConfig
from cfs.oci.images import compute_image, tree_of
from cfs.repository.repository import Repository, init
from cfs.transform import XattrMode
from cfs.tree import Directory
from tests.oci_cases import case_layers, load_cases, store_config, store_layer

Case = dict[str, Any]

_MODES = {XattrMode.ALLOWLIST_ONLY: "", XattrMode.KEEP_USER_XATTRS: "_user"}
# what we refuse although composefs-rs takes it: part of the message
REFUSED = {
    # layers that make no sense (spec repository 6.1)
    "num-size-wrap": "invalid size",
    "pax-size-max": "invalid size",
    "pax-x-then-g": "global header between",
    "gnu-L-then-g": "global header between",
    # what no file system could hold (6.8)
    "name-256": "/usr: name of 256 bytes",
    "name-5000": "/usr: name of 5000 bytes",
    "name-nul": "/usr: name b'a\\x00b'",
    "gnu-long-2nul": "/usr: name b'a\\x00'",
    "gnu-long-midnul": "/usr: name b'a\\x00b'",
    "pax-basic": "/usr/sl: target of 0 bytes",
    "sl-empty": "/usr/s: target of 0 bytes",
    "sl-4096": "/usr/s: target of 4096 bytes",
    "sl-nul": "/usr/s: target b'a\\x00b'",
    "xattr-65535": "/usr/f: xattrs of 65573 bytes",
    "xattr-65536": "/usr/f: xattrs of 65574 bytes",
    "dev-huge": "/usr/c0: rdev",
    "dev-huge-minor": "/usr/c0: rdev",
}
REFUSED_WITH_USER_XATTRS = REFUSED | {"xattr-longname": "/usr/f: xattr name of 305 bytes"}
# composefs-rs crashes; a fraction that is no number counts as none
TAKEN = {"pax-mtime-utf8"}
# dumps have the bits of a mode that images have, not all that stood in the archive
OTHER_DUMPS = {"mode-bits"}
# readers of format 2 take no longer ones (spec erofs-image 7.1)
LONG_LINKS = {"sl-1025", "sl-4095"}


@pytest.fixture(params=[Algorithm.SHA256, Algorithm.SHA512], ids=lambda found: found.name)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    path = str(tmp_path / "store")
    init(path, algorithm=request.param, is_secure=False, erofs_version=1)
    with Repository.open(path, insecure=True) as opened:
        yield opened


@pytest.mark.parametrize("table", ["cases", "boot"])
def test_all_stacks_of_layers(repository: Repository, table: str) -> None:
    differences: list[str] = []
    for name, case in load_cases(table).items():
        try:
            config = _store(repository, case)
        except CfsError as error:
            differences += _judge_refusal(case, str(error), REFUSED.get(name))
            continue
        for mode in _MODES:
            found = _compare(repository, config, name, case, mode, bootable=table == "boot")
            differences += [f"{name}, {mode.value}: {text}" for text in found]
    assert differences == []


def _store(repository: Repository, case: Case) -> StoredConfig:
    streams: dict[str, Digest] = {}
    verdicts = case.get("import", ["ok"] * len(case["layers"]))
    for diff_id, verdict in zip(case["layers"], verdicts, strict=True):
        try:
            streams[diff_id] = store_layer(repository, case_layers()[diff_id])
        except CfsError:
            if verdict == "ok":
                raise
    return store_config(repository, case["layers"], streams)


def _compare(
    repository: Repository,
    config: StoredConfig,
    name: str,
    case: Case,
    mode: XattrMode,
    *,
    bootable: bool,
) -> Iterator[str]:
    refused = REFUSED if mode is XattrMode.ALLOWLIST_ONLY else REFUSED_WITH_USER_XATTRS
    try:
        root = tree_of(repository, config, bootable=bootable, mode=mode)
    except CfsError as error:
        yield from _judge_refusal(case, str(error), refused.get(name))
        return
    if name in refused or ("dump" not in case and name not in TAKEN):
        yield "was taken"
    elif name not in TAKEN:
        yield from _compare_dump(root, name, case, mode, repository.algorithm)
        ids = _expectation(case, "ids", mode)[repository.algorithm.name.lower()]
        yield from _compare_ids(root, name, ids, repository.algorithm)


def _expectation(case: Case, what: str, mode: XattrMode) -> Any:
    """Return what was recorded; nothing is if it is as with other xattrs."""
    return case.get(what + _MODES[mode]) or case[what]


def _judge_refusal(case: Case, message: str, expected: str | None) -> Iterator[str]:
    if "dump" in case and (expected is None or expected not in message):
        yield f"was refused: {message}"
    if "\n" in message or not message:
        yield f"message of other than one line: {message}"


def _compare_dump(
    root: Directory, name: str, case: Case, mode: XattrMode, algorithm: Algorithm
) -> Iterator[str]:
    text = b"".join(format_tree(root))
    digest = hashlib.sha256(text).hexdigest()
    if algorithm is Algorithm.SHA256:
        expected = _expectation(case, "dump", mode)
        if isinstance(expected, dict):
            expected = expected["sha256"]
        else:
            expected = hashlib.sha256(expected.encode(errors="surrogateescape")).hexdigest()
    elif mode is XattrMode.ALLOWLIST_ONLY:
        expected = case["dump_sha512_digest"]
    else:
        return
    if (digest == expected) is (name in OTHER_DUMPS):
        yield f"dump:\n{text.decode(errors='backslashreplace')}"


def _compare_ids(
    root: Directory, name: str, ids: dict[str, str], algorithm: Algorithm
) -> Iterator[str]:
    for text, expected in ids.items():
        version = int(text)
        try:
            image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
        except CfsError as error:
            if version != 2 or name not in LONG_LINKS:
                yield f"format {version}: {error}"
            continue
        if str(compute_digest(image, algorithm)) != expected:
            yield f"format {version}: another id"


# spec repository 11.1, upstream's tests: by name, format, and whether it is to be booted
PINNED = {
    ("fixture", 1, False): "d06f1f6a73f62ed48e05ce9442ff045cdf2a9f5ba1ec623795de3d6177a253d9"
    "1076459795d94f55d8c3d71dab458bb3fc0071255a50c0a4896d86ffdc870b9a",
    ("fixture", 2, False): "f7684c21050615c02cec250e0c7d4118fb0ff6340af5039e06f2f372a7614fff"
    "25dfd38cf7f28ad67d8b86e86371b7deafa9ae4bf543630322aee6196417de92",
    ("fixture-boot", 1, False): "bc0367c455dde5e5ceb694ea62a0dc2fe0470e641f5a12e48b79a0e4212954f0"
    "9ce8049c5bea8d5074e2c39374a5c87e8059c16fa30423f3430cde3100b8f701",
    ("fixture-boot", 1, True): "bc0367c455dde5e5ceb694ea62a0dc2fe0470e641f5a12e48b79a0e4212954f0"
    "9ce8049c5bea8d5074e2c39374a5c87e8059c16fa30423f3430cde3100b8f701",
}


@pytest.mark.parametrize(("name", "version", "bootable"), PINNED)
def test_ids_that_upstream_has_pinned(
    tmp_path: Path,
    name: str,
    version: int,
    bootable: bool,  # noqa: FBT001 - of a table
) -> None:
    path = str(tmp_path / "store")
    init(path, algorithm=Algorithm.SHA512, is_secure=False, erofs_version=version)
    with Repository.open(path, insecure=True) as repository:
        config = _store(repository, load_cases("cases")[name])
        found = compute_image(repository, config, bootable=bootable)
    assert str(found) == PINNED[name, version, bootable]
