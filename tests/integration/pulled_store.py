"""Stores as ``oci pull`` of composefs-rs leaves them, made of nothing but the written format.

The layout is that of ``tests/data/cli``.  The ids of the streams are those that were recorded, so
this also shows that streams of another writer are read.  Spec repository 3 and 5.
"""

import hashlib
import json
import os
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard

from cfs.digest import Algorithm, Digest
from cfs.fsverity import compute_digest
from tests.command_line import LAYERS, run, unpack_layer

_MAX_INLINE_SIZE = 64
_EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
_EMPTY_CONFIG = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
MANIFEST = "sha256:c33b0626be461148711e797df21d06fb54771836a2c1125ae499e11d22f28355"
SIGNATURE = "sha256:b34d8acd7562038034e9aaff45d035939951b2edd1eb64909992b7b7ed6587af"

Names = Sequence[tuple[str, Digest]]


class PulledStore:
    """Registers streams in a store.

    Args:
        path: an insecure store of sha512 and format 1.
        work: directory of the recordings, see ``unpack_tree``.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self._path = path
        self._work = work

    def pull_container(self, *, bootable: bool = False) -> Digest:
        """Pull ``oci:layout:v1`` as ``app``; return the id of its config stream."""
        layers = [self.add_layer(name) for name in LAYERS]
        keys = [("composefs.image.v1", self._make_image())]
        if bootable:
            keys.append(("composefs.image.boot.v1", self._make_image("--bootable")))
        manifest = self._blob(MANIFEST)
        name = json.loads(manifest)["config"]["digest"]
        config = self._add_document(f"oci-config-{name}", b"ociconfg", name, [*layers, *keys])
        names = [(f"config:{name}", config), *layers]
        self._add_document(f"oci-manifest-{MANIFEST}", b"ocimanif", MANIFEST, names)
        self._tag("app", MANIFEST)
        return config

    def pull_artifact(self) -> None:
        """Pull ``oci:layout:sig`` as ``sig``."""
        manifest = json.loads(self._blob(SIGNATURE))
        name = manifest["layers"][0]["digest"]
        layer = (name, self._add_document(f"oci-layer-{name}", b"oci_blob", name, []))
        content_id = f"oci-config-{_EMPTY_CONFIG}"
        config = self._add_document(content_id, b"ociconfg", _EMPTY_CONFIG, [layer])
        names = [(f"config:{_EMPTY_CONFIG}", config), layer]
        self._add_document(f"oci-manifest-{SIGNATURE}", b"ocimanif", SIGNATURE, names)
        self._tag("sig", SIGNATURE)

    def add_layer(self, name: str, ref: str | None = None) -> tuple[str, Digest]:
        """Import a layer; return its diff id and the id of its stream."""
        tar = (self._work / name).read_bytes()
        chunks: list[bytes | Digest] = []
        end = 0
        with tarfile.open(self._work / name) as members:
            for member in members:
                if member.isreg() and member.size > _MAX_INLINE_SIZE:
                    start, end_of_file = member.offset_data, member.offset_data + member.size
                    chunks += [tar[end:start], self._put(tar[start:end_of_file])]
                    end = end_of_file
        chunks.append(tar[end:])
        diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
        content_id = f"oci-layer-{diff_id}"
        digest = self._add_stream(content_id, b"ocilayer", chunks, [], len(tar))
        if ref is not None:
            self._link(f"streams/refs/{ref}", f"../{content_id}")
        return diff_id, digest

    def _make_image(self, *options: str) -> Digest:
        """Store the image of both layers, of which the upper one removes and replaces."""
        merged = self._work / "merged"
        if not merged.exists():
            unpack_layer(self._work / "base.tar", merged)
            (merged / "var" / "gone").unlink()
            (merged / "var" / "opq" / "old").unlink()
            unpack_layer(self._work / "top.tar", merged)
        words: list[str | Path] = ["--repo", self._path, "create-image", *options, merged]
        done = run("cfsctl", *words, cwd=self._work)
        assert done.returncode == 0, done.stderr
        return Digest.parse(done.stdout.decode().strip().removeprefix("sha512:"))

    def _blob(self, name: str) -> bytes:
        return (self._work / "layout/blobs" / name.replace(":", "/")).read_bytes()

    def _tag(self, name: str, manifest: str) -> None:
        self._link(f"streams/refs/oci/{name}", f"../../oci-manifest-{manifest}")

    def _link(self, name: str, target: str) -> None:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def _put(self, data: bytes) -> Digest:
        digest = compute_digest(data, Algorithm.SHA512)
        path = self._path / "objects" / os.fsdecode(digest.object_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return digest

    def _add_document(self, content_id: str, kind: bytes, blob: str, names: Names) -> Digest:
        data = self._blob(blob)
        return self._add_stream(content_id, kind, [self._put(data)], names, len(data))

    def _add_stream(
        self, content_id: str, kind: bytes, chunks: list[bytes | Digest], names: Names, size: int
    ) -> Digest:
        digest = self._put(_encode_stream(kind, chunks, names, size))
        self._link(f"streams/{content_id}", f"../objects/{os.fsdecode(digest.object_path)}")
        return digest


def _encode_stream(kind: bytes, chunks: Iterable[bytes | Digest], names: Names, size: int) -> bytes:
    """Return a splitstream as composefs-rs writes it (spec repository 3.1 to 3.5)."""
    objects: list[Digest] = []
    body = b""
    for chunk in chunks:
        if isinstance(chunk, bytes):
            body += struct.pack("<q", -len(chunk)) + chunk if chunk else b""
            continue
        if chunk not in objects:
            objects.append(chunk)
        body += struct.pack("<q", objects.index(chunk))
    streams = list(dict.fromkeys(digest for _, digest in names))
    records = sorted((name.encode(), streams.index(digest)) for name, digest in names)
    named = b"".join(b"%d:%s\0" % (index, name) for name, index in records)
    sections = [
        b"".join(digest.value for digest in streams),
        b"".join(digest.value for digest in objects),
        _compress(named),
        _compress(body),
    ]
    ranges = []
    end = 112
    for section in sections:
        ranges.append((end, end + len(section)))
        end += len(section)
    order = [ranges[0], ranges[1], ranges[3], ranges[2]]
    header = b"SplitStream\0\0\0" + bytes([Algorithm.SHA512, 12]) + struct.pack("<QQ", 32, 112)
    info = b"".join(struct.pack("<QQ", *place) for place in order) + kind + struct.pack("<Q", size)
    return header + info + b"".join(sections)


def _compress(data: bytes) -> bytes:
    if not data:
        return _EMPTY_FRAME
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    return compressor.compress(data) + compressor.flush()
