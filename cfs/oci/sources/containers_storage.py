"""``containers-storage:NAME`` without skopeo: the storage of podman and buildah (spec 5.8).

Files of the storage become objects by reflink where that is possible, else by copy, or with
:attr:`~cfs.oci.sources.LocalFetch.ZEROCOPY` by hard link.  What was changed in the storage does not
get far: the tar that comes of a layer must have its diff id.
"""

import base64
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from cfs.errors import IntegrityError, NotFoundError, UnsupportedError
from cfs.linux.files import open_path, openat2, owned
from cfs.linux.mountinfo import mounted_at
from cfs.oci.layers import ImportedLayer
from cfs.oci.manifest import (
    DOCKER_MANIFEST_TYPE,
    MAX_DOCUMENT_SIZE,
    Compression,
    Config,
    Descriptor,
    Manifest,
    convert_docker,
    layer_type,
)
from cfs.oci.reference import check_content, digest_of
from cfs.oci.sources import LocalFetch, SourceOptions, Stopper
from cfs.oci.sources.storage_files import (
    DATA,
    LAYERS,
    OPEN_DIRECTORY,
    OPEN_FILE,
    open_layer,
    read_file,
)
from cfs.oci.transfer import receive_layer
from cfs.repository.repository import Repository
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_list,
    parse_size,
    parse_string,
    parse_strings,
)

__all__ = ["StorageSource", "open_containers_storage"]

_IMAGES = "overlay-images"
_SYSTEM_ROOT = "/var/lib/containers/storage"
_ADDITIONAL = "additionalimagestore"
_IMAGE_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_MAX_LIST_SIZE = 64 << 20  # of images.json and layers.json, bytes
_LOCK_PAUSE_S = 0.05
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class StorageSource:
    """One image of a storage; an :class:`~cfs.oci.sources.ImportingSource`.

    Immutable: any thread may call.
    """

    def __init__(self, root: int, image: bytes, *, zerocopy: bool) -> None:
        """Read what the storage knows of an image.

        Args:
            root: directory of the storage; borrowed.
            image: path of the image below it.
            zerocopy: fail rather than copy a file.

        Raises:
            FormatError: a document is broken.
            IntegrityError: the config is not the one of the manifest.
            NotFoundError: something is missing.
            OSError: it cannot be read.
        """
        self._root = root
        self._zerocopy = zerocopy
        self._manifest = read_file(root, image + b"/manifest", MAX_DOCUMENT_SIZE)
        manifest = Manifest.parse(self._manifest)
        if manifest.media_type == DOCKER_MANIFEST_TYPE:
            self._manifest = convert_docker(self._manifest)
        digest = manifest.config.digest
        key = b"/=" + base64.b64encode(digest.encode())
        self._config = read_file(root, image + key, MAX_DOCUMENT_SIZE)
        check_content(self._config, digest, "config")
        self._diff_ids = Config.parse(self._config).diff_ids
        self._stored = _read_layers(root)

    def read_manifest(self) -> tuple[str, bytes]:
        """Return digest and bytes of the manifest; see :class:`~cfs.oci.sources.Source`."""
        return digest_of(self._manifest), self._manifest

    def read_config(self, manifest: Manifest) -> bytes:  # noqa: ARG002 - there is one only
        """Return the bytes of the config; see :class:`~cfs.oci.sources.Source`."""
        return self._config

    def layers(self, manifest: Manifest) -> Sequence[Descriptor]:  # noqa: ARG002 - as above
        """Return the layers as they are here: uncompressed, whatever the manifest says."""
        return [
            Descriptor(
                media_type=layer_type(Compression.NONE),
                digest=diff_id,
                size=self._find(diff_id).size,
                annotations={},
                platform=None,
                artifact_type=None,
            )
            for diff_id in self._diff_ids
        ]

    def open_layer(self, index: int) -> AbstractContextManager[BinaryIO]:
        """Refuse: there are no blobs here, only files."""
        msg = f"layer {self._diff_ids[index]}: its storage has no blobs"
        raise UnsupportedError(msg)

    def import_layer(self, repository: Repository, index: int, diff_id: str) -> ImportedLayer:  # noqa: ARG002 - the diff id says which
        """Store and register a layer; see :class:`~cfs.oci.sources.ImportingSource`."""
        with (
            open_layer(self._root, self._find(diff_id).id) as layer,
            closing(layer.chunks()) as chunks,
        ):
            try:
                return receive_layer(
                    repository, diff_id, chunks, layer.directories, zerocopy=self._zerocopy
                )
            except IntegrityError:
                layer.check()
                raise
            except UnsupportedError as error:
                place = os.readlink(f"/proc/self/fd/{self._root}") + f"/{DATA}"
                if self._zerocopy and mounted_at(place) is not None:
                    msg = f"{error} ({place} is a mount of its own: unmount it if nobody uses it)"
                    raise UnsupportedError(msg) from None
                raise

    def _find(self, diff_id: str) -> "_StoredLayer":
        if diff_id not in self._stored:
            msg = f"layer {diff_id}: not in the storage"
            raise NotFoundError(msg)
        return self._stored[diff_id]


@dataclass(frozen=True, slots=True)
class _StoredLayer:
    """What the storage says of a layer: its name there, and the size of its tar in bytes."""

    id: str
    size: int


@contextmanager
def open_containers_storage(rest: str, options: SourceOptions) -> Iterator[StorageSource]:
    """Open the image of a name or an identifier, in the first storage that has it.

    Nobody changes layers in that storage meanwhile.

    Raises:
        NotFoundError: no storage has it, or something of it is missing.
        FormatError: a document is broken.
        IntegrityError: the config is not the one of the manifest.
        OSError: it cannot be read.
    """
    zerocopy = options.local_fetch is LocalFetch.ZEROCOPY
    only = options.storage_root
    for path in _list_roots(os.environ) if only is None else [only]:
        with ExitStack() as stack:
            root = _open_root(path, stack)
            image = None if root is None else _find_image(root, rest)
            if root is not None and image is not None:
                _lock(root, stack, options.stopper)
                yield StorageSource(root, image, zerocopy=zerocopy)
                return
    msg = f"Failed to find image {rest} in any storage"
    raise NotFoundError(msg)


def _list_roots(environment: Mapping[str, str]) -> Iterator[str]:
    if environment.get("CONTAINERS_STORAGE_ROOT"):
        yield environment["CONTAINERS_STORAGE_ROOT"]
    if environment.get("XDG_DATA_HOME"):
        yield f"{environment['XDG_DATA_HOME']}/containers/storage"
    elif environment.get("HOME"):
        yield f"{environment['HOME']}/.local/share/containers/storage"
    yield _SYSTEM_ROOT
    for option in environment.get("STORAGE_OPTS", "").split(","):
        key, _, value = option.strip().partition("=")
        if key.rpartition(".")[2] == _ADDITIONAL and value:
            yield value


def _open_root(path: str, stack: ExitStack) -> int | None:
    """Return the directory of a storage, None if that is none."""
    try:
        root = owned(stack, open_path(path, OPEN_DIRECTORY))
        for name in (_IMAGES, LAYERS, DATA):
            os.stat(name, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    return root


def _lock(root: int, stack: ExitStack, stopper: Stopper) -> None:
    """Keep those away who change layers; they lock the same file for writing."""
    try:
        fd = owned(stack, openat2(root, f"{LAYERS}/layers.lock".encode(), OPEN_FILE))
    except FileNotFoundError:
        return
    lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except BlockingIOError:  # whoever has it may keep it for ever
            stopper.check()
            time.sleep(_LOCK_PAUSE_S)
        else:
            return


def _find_image(root: int, name: str) -> bytes | None:
    """Return the directory of an image below that of the storage."""
    match = _IMAGE_ID.fullmatch(name)
    if match:
        path = f"{_IMAGES}/{match[1]}"
        with suppress(FileNotFoundError):
            os.stat(path, dir_fd=root)
            return path.encode()
    for fields, where in _read_list(root, f"{_IMAGES}/images.json", ("id", "names")):
        names = () if fields.get("names") is None else parse_strings(fields, "names", where)
        if any(_is_same_name(known, name) for known in names):
            return f"{_IMAGES}/{parse_string(fields, 'id', where)}".encode()
    return None


def _is_same_name(known: str, name: str) -> bool:
    return any(known == text or known.endswith(f"/{text}") for text in (name, f"{name}:latest"))


def _read_layers(root: int) -> dict[str, _StoredLayer]:
    """Return the layers of a storage by their diff ids."""
    keys = ("id", "diff-digest", "diff-size")
    layers = {}
    for fields, where in _read_list(root, f"{LAYERS}/layers.json", keys):
        # layers of containers have none
        if fields.get("diff-digest") is not None:
            size = 0
            if fields.get("diff-size") is not None:
                size = parse_size(fields, "diff-size", where)
            layer = _StoredLayer(parse_string(fields, "id", where), size)
            layers[parse_string(fields, "diff-digest", where)] = layer
    return layers


def _read_list(root: int, path: str, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a JSON list, and where they are."""
    value = load_json(read_file(root, path.encode(), _MAX_LIST_SIZE), path)
    for number, item in enumerate(parse_list({path: value}, path, "storage")):
        where = f"{path}: item {number}"
        yield parse_fields(item, where, keys), where
