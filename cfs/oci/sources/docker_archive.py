"""``docker-archive:PATH[:NAME|@NUMBER]``: what ``docker save`` writes (containers-transports(5)).

Such an archive has no manifest and no digests but the diff ids of its config.  So the manifest is
made here, always the same for the same image: layers are named by their diff ids, compressed ones
by the digest that they turn out to have.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from cfs.errors import FormatError, InvalidRequestError, NotFoundError
from cfs.oci.compression import detect_compression
from cfs.oci.manifest import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MAX_DOCUMENT_SIZE,
    Compression,
    Config,
    Descriptor,
    Manifest,
    layer_type,
)
from cfs.oci.reference import digest_of
from cfs.oci.sources import SourceOptions
from cfs.oci.sources.archives import (
    TarFiles,
    open_archive,
    split_archive_reference,
)
from cfs.oci.sources.verified import open_verified
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_list,
    parse_string,
    parse_strings,
)

__all__ = ["DockerArchiveSource", "open_docker_archive"]

_LIST = "manifest.json"
_BUFFER_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class _Saved:
    """An image of the archive: paths in it, and the names of the image."""

    config: str
    layers: tuple[str, ...]
    names: tuple[str, ...]


class DockerArchiveSource:
    """One image of an archive; a :class:`~cfs.oci.sources.Source`.  Immutable."""

    def __init__(self, files: TarFiles, name: str | None) -> None:
        """Choose the image.

        Args:
            files: the archive.
            name: of the image, or ``@`` and its number; without it, there has to be one only.

        Raises:
            InvalidRequestError: there are several images and no name, or the name is none.
            NotFoundError: there is no such image, or a file is missing.
            FormatError: a document is broken.
        """
        self._files = files
        images = _parse_list(_read(files, _LIST))
        image = images[_choose([image.names for image in images], name)]
        self._config = _read(files, image.config)
        self._paths = image.layers
        self._layers = tuple(self._describe_layers())

    def read_manifest(self) -> tuple[str, bytes]:
        """Return digest and bytes of the manifest; see :class:`~cfs.oci.sources.Source`."""
        config = {
            "mediaType": CONFIG_TYPE,
            "digest": digest_of(self._config),
            "size": len(self._config),
        }
        layers = [
            {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
            for layer in self._layers
        ]
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config,
            "layers": layers,
        }
        data = json.dumps(document, separators=(",", ":")).encode()
        return digest_of(data), data

    def read_config(self, manifest: Manifest) -> bytes:  # noqa: ARG002 - there is one only
        """Return the bytes of the config; see :class:`~cfs.oci.sources.Source`."""
        return self._config

    def layers(self, manifest: Manifest) -> Sequence[Descriptor]:
        """Return the layers of the manifest; see :class:`~cfs.oci.sources.Source`."""
        return manifest.layers

    def open_layer(self, index: int) -> AbstractContextManager[BinaryIO]:
        """Open a layer; see :class:`~cfs.oci.sources.Source`."""
        return open_verified(self._files.open_file(self._paths[index])[0], self._layers[index])

    def _describe_layers(self) -> Iterator[Descriptor]:
        diff_ids = Config.parse(self._config).diff_ids
        if len(diff_ids) != len(self._paths):
            msg = f"expected {len(self._paths)} diff ids in the config, found {len(diff_ids)}"
            raise FormatError(msg)
        digests: dict[str, str] = {}
        for path, diff_id in zip(self._paths, diff_ids, strict=True):
            file, size = self._files.open_file(path)
            compression = detect_compression(file)
            digest = diff_id
            if compression is not Compression.NONE:
                if path not in digests:
                    digests[path] = _hash(self._files.open_file(path)[0])
                digest = digests[path]
            yield Descriptor(
                media_type=layer_type(compression),
                digest=digest,
                size=size,
                annotations={},
                platform=None,
                artifact_type=None,
            )


@contextmanager
def open_docker_archive(rest: str, options: SourceOptions) -> Iterator[DockerArchiveSource]:  # noqa: ARG001 - an archive is for one platform
    """Open the image ``PATH[:NAME|@NUMBER]``.

    Raises:
        InvalidRequestError: there is no path, or no name although there are several images.
        NotFoundError: there is no such archive or image, or a file is missing.
        FormatError: archive or documents are broken.
        OSError: it cannot be read.
    """
    path, name = split_archive_reference(rest, "docker-archive")
    with open_archive(path) as files:
        yield DockerArchiveSource(files, name)


def _read(files: TarFiles, path: str) -> bytes:
    file, size = files.open_file(path)
    if size > MAX_DOCUMENT_SIZE:
        msg = f"{path}: {size} bytes, expected at most {MAX_DOCUMENT_SIZE}"
        raise FormatError(msg)
    return file.read()


def _hash(file: io.RawIOBase) -> str:
    digesting = hashlib.sha256()
    while data := file.read(_BUFFER_SIZE):
        digesting.update(data)
    return f"sha256:{digesting.hexdigest()}"


def _parse_list(data: bytes) -> list[_Saved]:
    images: list[Any] = parse_list({_LIST: load_json(data, _LIST)}, _LIST, "archive")
    return [_parse_saved(image, f"{_LIST}: image {number}") for number, image in enumerate(images)]


def _parse_saved(value: object, where: str) -> _Saved:
    fields: Mapping[str, Any] = parse_fields(value, where, ("Config", "RepoTags", "Layers"))
    names = () if fields.get("RepoTags") is None else parse_strings(fields, "RepoTags", where)
    return _Saved(
        parse_string(fields, "Config", where), parse_strings(fields, "Layers", where), names
    )


def _choose(images: Sequence[Sequence[str]], name: str | None) -> int:
    """Return the number of the image of a name."""
    if name is None:
        if len(images) != 1:
            msg = f"the archive holds {len(images)} images: expected one, or the name of one"
            raise InvalidRequestError(msg)
        return 0
    if name.startswith("@"):
        number = name[1:]
        if not (number.isascii() and number.isdigit()):
            msg = f"{name!r}: expected @ and the number of an image in the archive"
            raise InvalidRequestError(msg)
        if len(number) <= len(str(len(images))) and int(number) < len(images):
            return int(number)
    wanted = _normalize(name)
    for index, names in enumerate(images):
        if wanted in map(_normalize, names):
            return index
    msg = f"no image {name} in the archive"
    raise NotFoundError(msg)


def _normalize(name: str) -> str:
    """Return a name with registry and tag, those that Docker adds where there are none."""
    registry, slash, rest = name.partition("/")
    if not slash or not (registry == "localhost" or "." in registry or ":" in registry):
        registry, rest = "docker.io", name if slash else f"library/{name}"
    if ":" not in rest:
        rest += ":latest"
    return f"{registry}/{rest}"
