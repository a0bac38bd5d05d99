"""Documents that tests store."""

import json
from collections.abc import Mapping, Sequence

from cfs.digest import Digest
from cfs.oci.document_streams import config_name
from cfs.oci.document_updates import put_config, put_manifest
from cfs.oci.documents import ConfigDocument, ManifestDocument
from cfs.oci.manifest import CONFIG_TYPE
from cfs.oci.reference import digest_of
from cfs.oci.tags import manifest_name
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import register_stream

ARTIFACT_TYPE = "application/vnd.oci.empty.v1+json"


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def add_layer(repository: Repository, data: bytes) -> tuple[str, Digest]:
    """Register a layer that consists of inline data, tar or not."""
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        writer.write_inline(data)
        stream = writer.finish()
    register_stream(repository, f"oci-layer-{digest_of(data)}", stream)
    return digest_of(data), stream


def write_config(
    repository: Repository,
    digest: str,
    data: bytes,
    layers: Sequence[tuple[str, Digest]],
    images: Mapping[str, Digest] | None = None,
) -> Digest:
    """Store a config and register it; return the id of its stream."""
    document = ConfigDocument(digest=digest, data=data, layers=dict(layers), images=images or {})
    stream = put_config(repository, document)
    register_stream(repository, config_name(digest), stream)
    return stream


def write_manifest(
    repository: Repository,
    digest: str,
    data: bytes,
    config: tuple[str, Digest],
    layers: Sequence[tuple[str, Digest]],
) -> Digest:
    """Store a manifest and register it; return the id of its stream."""
    document = ManifestDocument(digest=digest, data=data, layers=dict(layers))
    stream = put_manifest(repository, document, config)
    register_stream(repository, manifest_name(digest), stream)
    return stream


class StoredImage:
    """An image of a store: layers, config, manifest, all registered.

    Args:
        repository: the store.
        layers: contents of the layers.
        labels: of the config.
        note: makes a difference between manifests of the same config.
        config: the config as it is, in place of a sound one.
        config_type: its media type; another one makes an artifact.
        images: made of it already.
    """

    def __init__(
        self,
        repository: Repository,
        layers: tuple[bytes, ...] = (b"one", b"two"),
        *,
        labels: Mapping[str, str] | None = None,
        note: str = "",
        config: bytes | None = None,
        config_type: str = CONFIG_TYPE,
        images: Mapping[str, Digest] | None = None,
    ) -> None:
        self.layers = [add_layer(repository, data) for data in layers]
        diff_ids = [name for name, _ in self.layers]
        self.config_data = (
            config
            if config is not None
            else encode(
                {
                    "architecture": "amd64",
                    "os": "linux",
                    "created": "2026-01-01T00:00:00Z",
                    "config": {"Labels": labels},
                    "rootfs": {"type": "layers", "diff_ids": diff_ids},
                }
            )
        )
        self.config = digest_of(self.config_data)
        self.data = encode(
            {
                "schemaVersion": 2,
                "config": {
                    "mediaType": config_type,
                    "digest": self.config,
                    "size": len(self.config_data),
                },
                "layers": [{"mediaType": "x/y", "digest": name, "size": 1} for name in diff_ids],
                "annotations": {"note": note},
            }
        )
        self.digest = digest_of(self.data)
        stream = write_config(repository, self.config, self.config_data, self.layers, images)
        write_manifest(repository, self.digest, self.data, (self.config, stream), self.layers)
