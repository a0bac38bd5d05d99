"""Manifests, indexes and configs as values (OCI image specification; spec repository 5.2, 5.4).

The documents come from registries and stores, so every value is checked for its type when it is
parsed; keys that mean nothing here are not looked at.  No state; any thread.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from cfs.errors import FormatError, InvalidRequestError
from cfs.oci.reference import parse_digest
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_integer,
    parse_list,
    parse_size,
    parse_string,
    parse_strings,
)

__all__ = [
    "CONFIG_TYPE",
    "DOCKER_MANIFEST_TYPE",
    "INDEX_TYPES",
    "MANIFEST_TYPE",
    "MAX_DOCUMENT_SIZE",
    "Compression",
    "Config",
    "Descriptor",
    "Index",
    "Manifest",
    "Platform",
    "convert_docker",
    "diff_ids_of",
    "layer_compression",
    "layer_type",
    "native_platform",
]

MAX_DOCUMENT_SIZE = 4 << 20
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_FOREIGN_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN_LAYER = "application/vnd.docker.image.rootfs.foreign.diff.tar"
_OF_DOCKER = {
    DOCKER_MANIFEST_TYPE: MANIFEST_TYPE,
    "application/vnd.docker.container.image.v1+json": CONFIG_TYPE,
    _DOCKER_LAYER: _LAYER,
    f"{_DOCKER_LAYER}.gzip": f"{_LAYER}+gzip",
    f"{_DOCKER_LAYER}.zstd": f"{_LAYER}+zstd",
    _DOCKER_FOREIGN_LAYER: _FOREIGN_LAYER,
    f"{_DOCKER_FOREIGN_LAYER}.gzip": f"{_FOREIGN_LAYER}+gzip",
}
_VERSIONS = (2,)
# names of Go for what uname calls the machine
_ARCHITECTURES = {
    "x86_64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armv6l": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
    "loongarch64": "loong64",
    "mips64": "mips64" if sys.byteorder == "big" else "mips64le",
}


class Compression(Enum):
    """What the media type of a layer says of its blob."""

    NONE = ""
    GZIP = "+gzip"
    ZSTD = "+zstd"


def layer_compression(media_type: str) -> Compression | None:
    """Return how a layer of this type is compressed; None if it is no tar of OCI."""
    for compression in Compression:
        if media_type in (_LAYER + compression.value, _FOREIGN_LAYER + compression.value):
            return compression
    return None


def layer_type(compression: Compression) -> str:
    """Return the media type of a layer that is compressed like that."""
    return _LAYER + compression.value


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image is for, in the words of Go."""

    os: str
    architecture: str
    variant: str | None = None


def native_platform() -> Platform:
    """Return the platform of this machine; its variant is left open."""
    name = os.uname().machine
    return Platform("linux", _ARCHITECTURES.get(name, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a manifest or an index says of a blob.

    Attributes:
        media_type: of the blob.
        digest: of the blob, checked for its form.
        size: of the blob in bytes.
        annotations: whatever else was to be said.
        platform: of the image, in an index.
        artifact_type: of the manifest, in an index.
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    platform: Platform | None
    artifact_type: str | None

    @classmethod
    def parse(cls, value: object, where: str) -> Self:
        """Return the descriptor of a value of :func:`~cfs.repository.strict_json.load_json`.

        Raises:
            FormatError: it is no descriptor.
        """
        fields = parse_fields(value, where, _DESCRIPTOR_KEYS)
        return cls(
            media_type=parse_string(fields, "mediaType", where),
            digest=_parse_digest(parse_string(fields, "digest", where), where),
            size=parse_size(fields, "size", where),
            annotations=_parse_map(fields, "annotations", where),
            platform=_parse_platform(fields, where),
            artifact_type=_parse_optional(fields, "artifactType", where),
        )


_DESCRIPTOR_KEYS = ("mediaType", "digest", "size", "annotations", "platform", "artifactType")
_MANIFEST_KEYS = (
    *("schemaVersion", "mediaType", "artifactType", "config", "layers", "subject"),
    "annotations",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest of an image or an artifact.

    Attributes:
        media_type: of the manifest; that of OCI if it does not say.
        config: the blob that says how to run it.
        layers: the other blobs, in order.
        artifact_type: what kind of artifact, if it is one.
        subject: another manifest that this one is about.
        annotations: whatever else was to be said.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str | None
    subject: Descriptor | None
    annotations: Mapping[str, str]

    @property
    def is_container(self) -> bool:
        """Whether it is an image that can be mounted; all else is an artifact."""
        return self.config.media_type == CONFIG_TYPE

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the manifest of a document, of OCI or Docker schema 2.

        Raises:
            FormatError: it is no manifest.
        """
        fields, where = _load(data, "manifest", _MANIFEST_KEYS)
        parse_integer(fields, "schemaVersion", where, _VERSIONS)
        subject = fields.get("subject")
        return cls(
            media_type=_parse_optional(fields, "mediaType", where) or MANIFEST_TYPE,
            config=Descriptor.parse(_get(fields, "config", where), f"{where}: config"),
            layers=tuple(
                Descriptor.parse(layer, f"{where}: layer {number}")
                for number, layer in enumerate(parse_list(fields, "layers", where))
            ),
            artifact_type=_parse_optional(fields, "artifactType", where),
            subject=None if subject is None else Descriptor.parse(subject, f"{where}: subject"),
            annotations=_parse_map(fields, "annotations", where),
        )


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests, for several platforms or under several names."""

    manifests: tuple[Descriptor, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the index of a document, of OCI or a Docker manifest list.

        Raises:
            FormatError: it is no index.
        """
        fields, where = _load(data, "index", ("schemaVersion", "manifests"))
        parse_integer(fields, "schemaVersion", where, _VERSIONS)
        return cls(
            tuple(
                Descriptor.parse(manifest, f"{where}: manifest {number}")
                for number, manifest in enumerate(parse_list(fields, "manifests", where))
            )
        )


_CONFIG_KEYS = ("architecture", "os", "variant", "created", "rootfs", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The config of a container image.

    Attributes:
        architecture: that it is for, in the words of Go.
        os: that it is for.
        variant: of the architecture.
        created: when, as it is written there.
        diff_ids: digests of the uncompressed layers, in order.
        labels: of the containers made from it.
    """

    architecture: str
    os: str
    variant: str | None
    created: str | None
    diff_ids: tuple[str, ...]
    labels: Mapping[str, str]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the config of a document.

        Raises:
            FormatError: it is no config.
        """
        fields, where = _load(data, "config", _CONFIG_KEYS)
        rootfs_where = f"{where}: rootfs"
        rootfs = parse_fields(_get(fields, "rootfs", where), rootfs_where, ("diff_ids",))
        inner, inner_where = fields.get("config"), f"{where}: config"
        running = {} if inner is None else parse_fields(inner, inner_where, ("Labels",))
        return cls(
            architecture=parse_string(fields, "architecture", where),
            os=parse_string(fields, "os", where),
            variant=_parse_optional(fields, "variant", where),
            created=_parse_optional(fields, "created", where),
            diff_ids=tuple(
                _parse_digest(text, rootfs_where)
                for text in parse_strings(rootfs, "diff_ids", rootfs_where)
            ),
            labels=_parse_map(running, "Labels", inner_where),
        )


def diff_ids_of(manifest: Manifest, config: bytes) -> tuple[str, ...]:
    """Return the diff ids of a container image: as many as its manifest has layers.

    Raises:
        FormatError: the config is broken, or tells another number of layers.
    """
    diff_ids = Config.parse(config).diff_ids
    nr_layers = len(manifest.layers)
    if len(diff_ids) != nr_layers:
        msg = f"manifest and config disagree: {nr_layers} layers, but {len(diff_ids)} diff ids"
        raise FormatError(msg)
    return diff_ids


def convert_docker(manifest: bytes) -> bytes:
    """Return a manifest of Docker schema 2 as one of OCI, so that every tool can use it.

    The blobs are the same in both, only their types have other names.  What was given decides
    every byte of the result.

    Raises:
        FormatError: it is no manifest.
    """
    parsed = Manifest.parse(manifest)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _describe(parsed.config),
        "layers": [_describe(layer) for layer in parsed.layers],
    }
    if parsed.annotations:
        document["annotations"] = dict(parsed.annotations)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _describe(descriptor: Descriptor) -> dict[str, object]:
    media_type = _OF_DOCKER.get(descriptor.media_type, descriptor.media_type)
    fields: dict[str, object] = {
        "mediaType": media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if descriptor.annotations:
        fields["annotations"] = dict(descriptor.annotations)
    return fields


def _load(data: bytes, where: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    if len(data) > MAX_DOCUMENT_SIZE:
        msg = f"{where} of {len(data)} bytes: expected at most {MAX_DOCUMENT_SIZE}"
        raise FormatError(msg)
    return parse_fields(load_json(data, where), where, keys), where


def _get(fields: Mapping[str, Any], key: str, where: str) -> object:
    if key not in fields:
        msg = f"{where}: {key} is missing"
        raise FormatError(msg)
    return fields[key]


def _parse_digest(text: str, where: str) -> str:
    try:
        return parse_digest(text)
    except InvalidRequestError as error:
        msg = f"{where}: {error}"
        raise FormatError(msg) from None


def _parse_optional(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if fields.get(key) is None else parse_string(fields, key, where)


def _parse_map(fields: Mapping[str, Any], key: str, where: str) -> Mapping[str, str]:
    if fields.get(key) is None:
        return {}
    where = f"{where}: {key}"
    texts = parse_fields(fields[key], where, None)
    for name in texts:
        parse_string({"name": name}, "name", where)
        parse_string(texts, name, where)
    return texts


def _parse_platform(fields: Mapping[str, Any], where: str) -> Platform | None:
    if fields.get("platform") is None:
        return None
    where = f"{where}: platform"
    found = parse_fields(fields["platform"], where, ("os", "architecture", "variant"))
    return Platform(
        parse_string(found, "os", where),
        parse_string(found, "architecture", where),
        _parse_optional(found, "variant", where),
    )
