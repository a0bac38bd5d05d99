"""OCI image layouts, written by tests: sound ones, and whatever else a test wants to put in."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from tests.paths import DATA

TAR = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_EMPTY = "application/vnd.oci.empty.v1+json"
_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    TAR: bytes,
    f"{TAR}+gzip": lambda data: gzip.compress(data, 1, mtime=0),
    f"{TAR}+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}
Json = dict[str, Any]


def make_tar(files: Mapping[str, bytes | None]) -> bytes:
    """Return a layer: by path the contents of regular files, or None for directories."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            member.mtime = 1_234_567_890
            if data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))
    return target.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def unpack_layouts(directory: Path) -> Path:
    """Unpack the golden layouts of ``tests/data/oci``."""
    return unpack_golden("layouts", directory)


def unpack_golden(name: str, directory: Path) -> Path:
    """Unpack an archive of ``tests/data/oci``; needs no zstd program."""
    packed = (DATA / "oci" / f"{name}.tar.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    words = ["tar", "-xf", "-", "--no-same-owner"]
    subprocess.run(words, cwd=directory, input=data, check=True)
    return directory


class Layout:
    """A layout directory; every image that is added gets into its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[Json] = []
        self._blobs = path / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def add_blob(self, data: bytes, media_type: str) -> Json:
        """Write a blob and return its descriptor."""
        digest = digest_of(data)
        self.blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_image(
        self, tag: str, tars: Sequence[bytes], media_type: str = f"{TAR}+gzip", **config: Any
    ) -> Json:
        """Add a container image; return its manifest."""
        layers = [self.add_blob(_PACKERS[media_type](tar), media_type) for tar in tars]
        rootfs = {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]}
        document = {"architecture": "amd64", "os": "linux", "rootfs": rootfs, **config}
        return self.add_manifest(tag, self.add_blob(json.dumps(document).encode(), _CONFIG), layers)

    def add_artifact(self, tag: str, layers: Sequence[Json], **more: Any) -> Json:
        """Add an artifact with the empty config; return its manifest."""
        return self.add_manifest(tag, self.add_blob(b"{}", _EMPTY), layers, **more)

    def add_manifest(self, tag: str, config: Json, layers: Sequence[Json], **more: Any) -> Json:
        """Add a manifest under a tag, and return it."""
        manifest = {
            "schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers, **more,
        }  # fmt: skip
        entry = self.add_blob(json.dumps(manifest).encode(), _MANIFEST)
        entry["platform"] = {"architecture": "amd64", "os": "linux"}
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self._entries.append(entry)
        index = {"schemaVersion": 2, "manifests": self._entries}
        (self.path / "index.json").write_text(json.dumps(index))
        return manifest
