"""The layer stacks of ``tests/data/oci``, and stores that are made of them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from functools import cache
from typing import Any

import zstandard

from cfs.digest import Digest
from cfs.oci.documents import StoredConfig, load_config
from cfs.oci.layers import find_layer, import_layer
from cfs.oci.manifest import Compression
from cfs.oci.reference import digest_of
from cfs.repository.repository import Repository
from tests.oci_documents import write_config
from tests.paths import DATA

CASES = DATA / "oci"


def load_cases(name: str) -> dict[str, Any]:
    """Return ``cases`` or ``boot``, by name of the case."""
    cases: dict[str, Any] = json.loads((CASES / f"{name}.json").read_text())
    return cases


@cache
def case_layers() -> dict[str, bytes]:
    """Return all layers by diff id."""
    packed = (CASES / "layers.tar.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = (tar.extractfile(member) for member in tar if member.isfile())
        layers = [member.read() for member in members if member is not None]
    return {digest_of(layer): layer for layer in layers}


def store_layer(repository: Repository, layer: bytes) -> Digest:
    """Import a tar unless it is there."""
    diff_id = digest_of(layer)
    found = find_layer(repository, diff_id)
    if found is not None:
        return found
    blob = io.BytesIO(layer)
    return import_layer(repository, blob, compression=Compression.NONE, diff_id=diff_id).stream


def store_image(repository: Repository, layers: Iterable[bytes]) -> StoredConfig:
    """Store tars and a config that names them."""
    streams = {digest_of(layer): store_layer(repository, layer) for layer in layers}
    return store_config(repository, list(streams), streams)


def store_config(
    repository: Repository, diff_ids: list[str], streams: dict[str, Digest]
) -> StoredConfig:
    """Store a config; ``streams`` may lack a layer."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    data = json.dumps(config).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    write_config(repository, digest, data, list(streams.items()))
    return load_config(repository, digest)
