"""Pulling an image into a store (spec repository 5.4).

Everything that gets a name is complete and has the digest of its name: layers are registered one
by one when their contents were verified, then image, configuration and manifest, then the tag.
So an interrupted pull leaves layers that the next one finds.

The caller's thread waits; a pool of threads imports layers, the largest first.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import BinaryIO

from cfs.digest import Digest
from cfs.errors import FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.oci.documents import config_of, load_config, load_manifest
from cfs.oci.finalize import store_image
from cfs.oci.images import BootImage, link_boot_image
from cfs.oci.layers import (
    ImportedLayer,
    Statistics,
    find_sound_layer,
    import_blob,
    import_layer,
    layer_name,
)
from cfs.oci.manifest import (
    Compression,
    Descriptor,
    Manifest,
    diff_ids_of,
    layer_compression,
)
from cfs.oci.reference import check_tag
from cfs.oci.sources import (
    ImportingSource,
    Source,
    SourceOptions,
    StoppableSource,
    Stopper,
    open_source,
)
from cfs.oci.tags import set_tag
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import register_stream
from cfs.transform.oci import XattrMode

__all__ = [
    "Done",
    "Event",
    "Message",
    "Progress",
    "Pulled",
    "Skipped",
    "Started",
    "link_boot",
    "pull",
]

_MIN_WORKERS = 3  # a registry is slower than a processor
_MAX_WORKERS = 8
_READ_SIZE = 1 << 20
_IMAGE_WRITER = "cfs.erofs.writer"


@dataclass(frozen=True, slots=True)
class Started:
    """A layer is fetched; ``size`` is that of its blob in bytes."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Progress:
    """So many bytes of the blob of a layer were read."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer is there already."""

    id: str


@dataclass(frozen=True, slots=True)
class Done:
    """A layer was stored."""

    id: str


@dataclass(frozen=True, slots=True)
class Message:
    """A line for the user."""

    text: str


Event = Started | Progress | Skipped | Done | Message
Report = Callable[[Event], None]


def _ignore(event: Event) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What a pull has stored.

    Attributes:
        manifest_digest: of the manifest, ``sha256:...``.
        config_digest: of the configuration.
        manifest_stream: its stream at the end; that of 0.9 is outdated at once.
        config_stream: likewise.
        tag: the name it got, if any.
        statistics: what became of the contents of its layers.
        boot: the boot image, once :func:`link_boot` has made it.
    """

    manifest_digest: str
    config_digest: str
    manifest_stream: Digest
    config_stream: Digest
    tag: str | None
    statistics: Statistics
    boot: BootImage | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer to be had: ``id`` is its diff id, for artifacts the digest of its blob."""

    id: str
    index: int
    size: int
    compression: Compression | None
    is_artifact: bool

    @property
    def content_type(self) -> bytes:
        return ContentType.BLOB if self.compression is None else ContentType.LAYER


class _StoppedError(Exception):
    """Another layer has failed: no need to go on."""


def pull(
    repository: Repository,
    image: str,
    options: SourceOptions,
    *,
    name: str | None,
    bootable: bool = False,
    report: Report = _ignore,
) -> Pulled:
    """Pull an image: store its layers, configuration and manifest, make its image, tag it.

    Args:
        repository: the store.
        image: ``TRANSPORT:...``, see :func:`cfs.oci.sources.open_source`.
        options: which image of several, and how to reach it.
        name: tag for it; None: it gets none, and the next collection removes it.
        bootable: refuse artifacts, because :func:`link_boot` will follow.
        report: is told what happens; called by several threads, by one at a time.

    Raises:
        InvalidRequestError: image or name cannot be like that, or an artifact shall be bootable.
        UnsupportedError: the store cannot be written, or the source needs what is not there.
        NotFoundError: there is no such image.
        FormatError: manifest, configuration or a layer break their format.
        IntegrityError: something has not the digest or size it should have.
        StoppedError: the stopper of the options has ended it; there is no tag.
        OSError: reading or writing failed.
    """
    if name is not None:
        check_tag(name)
    repository.check_writable()
    with open_source(image, options) as source:
        digest, data = source.read_manifest()
        manifest = Manifest.parse(data)
        if bootable and not manifest.is_container:
            msg = f"{image} is an artifact, no container image: it cannot be made bootable"
            raise InvalidRequestError(msg)
        work = _Pull(repository, source, manifest, report, options.stopper)
        config, layers = work.fetch()
    work.say("storing manifest")
    stored = store_image(repository, digest, data, config, layers, name=None)
    options.stopper.check()
    if name is not None:
        set_tag(repository, name, digest)
    return Pulled(
        manifest_digest=digest,
        config_digest=stored.config_digest,
        manifest_stream=stored.manifest_stream,
        config_stream=stored.config_stream,
        tag=name,
        statistics=work.statistics,
    )


def link_boot(
    repository: Repository,
    pulled: Pulled,
    expected: Digest | None = None,
    *,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
) -> Pulled:
    """Make the boot image of what was pulled.

    Args:
        repository: the store.
        pulled: a container image.
        expected: digest that the boot image shall have, in one of the attribute modes and formats.
        mode: which xattrs it keeps, unless a digest is expected.

    Raises:
        BootMismatchError: no boot image has that digest.
        FormatError: the tree has no form as boot image.
        OSError: reading or writing failed.
    """
    config = config_of(repository, load_manifest(repository, pulled.manifest_digest))
    _, boot = link_boot_image(repository, config, expected=expected, mode=mode)
    final = load_manifest(repository, pulled.manifest_digest)
    return replace(
        pulled, manifest_stream=final.stream, config_stream=final.config_stream, boot=boot
    )


@dataclass
class _Pull:
    """The part of a pull that needs the source.

    State: ``_lock`` guards what the threads share, that is the order of reports.
    """

    repository: Repository
    source: Source
    manifest: Manifest
    report: Report
    stopper: Stopper
    statistics: Statistics = field(default_factory=Statistics)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def fetch(self) -> tuple[bytes, Sequence[tuple[str, Digest]]]:
        """Store the layers; return the configuration, and the layers with their ids in order."""
        digest = self.manifest.config.digest
        stored = _find_config(self.repository, digest)
        config = self.source.read_config(self.manifest) if stored is None else stored
        self.say(f"config {digest} {'fetched' if stored is None else 'is there'}")
        return config, list(self._store_layers(self._plan(config)).items())

    def _plan(self, config: bytes) -> list[_Layer]:
        """Say which layers there must be, before any is stored."""
        blobs = self.source.layers(self.manifest)
        self.say(f"{len(blobs)} layers")
        if not self.manifest.is_container:
            return [_plan_layer(index, blob, None) for index, blob in enumerate(blobs)]
        diff_ids = diff_ids_of(self.manifest, config)
        return [
            _plan_layer(index, blob, diff_id)
            for index, (blob, diff_id) in enumerate(zip(blobs, diff_ids, strict=True))
        ]

    def _store_layers(self, layers: Sequence[_Layer]) -> dict[str, Digest]:
        """Import the layers that are missing; return the streams of all, in their order."""
        # the same one may come several times
        wanted = {layer.id: layer for layer in reversed(layers)}
        streams: dict[str, Digest] = {}
        missing = []
        for layer in wanted.values():
            stream = find_sound_layer(self.repository, layer.id, layer.content_type)
            if stream is None:
                missing.append(layer)
            else:
                streams[layer.id] = stream
                self._tell(Skipped(layer.id))
        missing.sort(key=lambda layer: layer.size, reverse=True)
        for layer, imported in self._import_all(missing):
            streams[layer.id] = imported.stream
            self.statistics.merge(imported.statistics)
        return {layer.id: streams[layer.id] for layer in layers}

    def _import_all(self, layers: Sequence[_Layer]) -> list[tuple[_Layer, ImportedLayer]]:
        if not layers:
            return []
        nr_workers = min(max(len(os.sched_getaffinity(0)), _MIN_WORKERS), _MAX_WORKERS)
        with ThreadPoolExecutor(nr_workers, "layer") as executor:
            if self.manifest.is_container:
                # takes a tenth of a second, with numpy: better now than afterwards
                executor.submit(import_module, _IMAGE_WRITER)
            try:
                futures = {executor.submit(self._import, layer): layer for layer in layers}
                return [(futures[future], future.result()) for future in as_completed(futures)]
            except BaseException:
                self._stop.set()
                if isinstance(self.source, StoppableSource):
                    self.source.stop()
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _import(self, layer: _Layer) -> ImportedLayer:
        self._tell(Started(layer.id, layer.size))
        imported = self._fetch(layer)
        self._tell(Done(layer.id))
        return imported

    def _fetch(self, layer: _Layer) -> ImportedLayer:
        if isinstance(self.source, ImportingSource):
            return self.source.import_layer(self.repository, layer.index, layer.id)
        nr_read = 0

        def advance(size: int) -> None:
            nonlocal nr_read
            if self._stop.is_set():
                raise _StoppedError
            nr_read += size
            self._tell(Progress(layer.id, nr_read))

        with self.source.open_layer(layer.index) as blob:
            try:
                imported = self._import_blob(layer, blob, advance)
            except FormatError:
                # if it is another blob than it should be, then its end says so
                while blob.read(_READ_SIZE):
                    pass
                raise
        if layer.is_artifact and layer.compression is not None:
            register_stream(self.repository, layer_name(layer.id), imported.stream)
        return imported

    def _import_blob(
        self, layer: _Layer, blob: BinaryIO, progress: Callable[[int], None]
    ) -> ImportedLayer:
        if layer.compression is None:
            return import_blob(self.repository, blob, layer.id, progress=progress)
        diff_id = None if layer.is_artifact else layer.id
        return import_layer(
            self.repository, blob,
            compression=layer.compression, diff_id=diff_id, progress=progress,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Report a line for the user."""
        self._tell(Message(text))

    def _tell(self, event: Event) -> None:
        self.stopper.check()
        with self._lock:
            self.report(event)


def _plan_layer(index: int, blob: Descriptor, diff_id: str | None) -> _Layer:
    """Say what a layer is; ``diff_id`` is None for artifacts.

    Raises:
        FormatError: it is none of a container image.
    """
    compression = layer_compression(blob.media_type)
    if compression is None and diff_id is not None:
        # 0.9 stores the blob under the diff id, and every later pull takes it for the layer
        msg = f"layer {blob.digest}: media type {blob.media_type!r} is no layer of an image"
        raise FormatError(msg)
    return _Layer(diff_id or blob.digest, index, blob.size, compression, diff_id is None)


def _find_config(repository: Repository, digest: str) -> bytes | None:
    """Return a configuration that is there and sound."""
    with suppress(NotFoundError, FormatError, IntegrityError):
        return load_config(repository, digest, verify=True).data
    return None
