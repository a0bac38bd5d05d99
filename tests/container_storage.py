"""Storage as podman and buildah have it (containers/storage, driver overlay), made by hand."""

import base64
import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfs.oci.sources.tar_split import compute_checksum
from tests.oci_layouts import digest_of

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class Storage:
    """A storage; images are added to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: list[Any] = []
        self._layers: list[Any] = []
        for name in ("overlay/l", "overlay-images", "overlay-layers"):
            (path / name).mkdir(parents=True)
        (path / "overlay-layers/layers.lock").touch()
        self._write_lists()

    def diff(self, diff_id: str) -> Path:
        """Return the directory with the files of a layer."""
        return self.path / "overlay" / diff_id.removeprefix("sha256:") / "diff"

    def split(self, diff_id: str) -> Path:
        name = diff_id.removeprefix("sha256:")
        return self.path / "overlay-layers" / f"{name}.tar-split.gz"

    def image(self, identifier: str) -> Path:
        return self.path / "overlay-images" / identifier

    def add_image(self, name: str, tars: Sequence[bytes], **types: str) -> str:
        """Add an image; return its identifier, the digest of its config without ``sha256:``."""
        diff_ids = [digest_of(tar) for tar in tars]
        for index, tar in enumerate(tars):
            if not self.diff(diff_ids[index]).exists():
                self._add_layer(diff_ids[index], tar, diff_ids[:index])
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode()
        described = {
            "mediaType": types.get("config", _CONFIG),
            "digest": digest_of(config),
            "size": len(config),
        }
        layers = [
            {
                "mediaType": types.get("layer", _LAYER),
                "digest": digest_of(gzip.compress(tar, mtime=0)),
                "size": 1,
            }
            for tar in tars
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": types.get("manifest", _MANIFEST),
            "config": described,
            "layers": layers,
        }
        identifier = digest_of(config).removeprefix("sha256:")
        self.image(identifier).mkdir(exist_ok=True)
        (self.image(identifier) / "manifest").write_text(json.dumps(manifest))
        self.config(identifier).write_bytes(config)
        self._images.append({"id": identifier, "names": [name]})
        self._write_lists()
        return identifier

    def config(self, identifier: str) -> Path:
        key = base64.b64encode(f"sha256:{identifier}".encode()).decode()
        return self.image(identifier) / f"={key}"

    def _write_lists(self) -> None:
        images, layers = json.dumps(self._images), json.dumps(self._layers)
        (self.path / "overlay-images/images.json").write_text(images)
        (self.path / "overlay-layers/layers.json").write_text(layers)

    def _add_layer(self, diff_id: str, data: bytes, below: Sequence[str]) -> None:
        diff = self.diff(diff_id)
        diff.mkdir(parents=True)
        short = diff_id[-26:].upper()
        (self.path / "overlay/l" / short).symlink_to(f"../{diff.parent.name}/diff")
        (diff.parent / "link").write_text(short)
        if below:
            lower = ":".join(f"l/{name[-26:].upper()}" for name in reversed(below))
            (diff.parent / "lower").write_text(lower)
        write_split(self.split(diff_id), data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar.getmembers():
                # whiteouts are devices there; modes and owners do not matter
                if member.isreg() and not os.path.basename(member.name).startswith(".wh."):
                    path = diff / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data[member.offset_data :][: member.size])
        self._layers.append(
            {"id": diff.parent.name, "diff-digest": diff_id, "diff-size": len(data)}
        )


def write_split(path: Path, data: bytes) -> None:
    """Write what is left of a tar without its contents."""
    lines = []
    pos = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar.getmembers():
            lines.append(_raw(data[pos : member.offset_data]))
            name = member.name.encode(errors="surrogateescape")
            line: dict[str, Any] = {"type": 1, "payload": None}
            try:
                line["name"] = name.decode()
            except UnicodeDecodeError:
                line["name_raw"] = base64.b64encode(name).decode()
            size = member.size if member.isreg() else 0
            pos = member.offset_data + size
            if size:
                checksum = compute_checksum([data[member.offset_data : pos]])
                line |= {"size": size, "payload": base64.b64encode(checksum).decode()}
            lines.append(line)
    lines += [_raw(data[pos:]), _raw(b"")]
    numbered = [json.dumps({**line, "position": number}) for number, line in enumerate(lines)]
    path.write_bytes(gzip.compress("\n".join([*numbered, ""]).encode()))


def _raw(data: bytes) -> dict[str, Any]:
    return {"type": 2, "payload": base64.b64encode(data).decode()}
