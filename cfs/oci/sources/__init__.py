"""Where images come from: one interface for layouts, archives and registries (spec 5.6 to 5.8).

What a source hands out is verified: bytes have the size and the digest that they were announced
with, or reading them ends with an :class:`~cfs.errors.IntegrityError`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast, runtime_checkable

from cfs.errors import CfsError, InvalidRequestError

if TYPE_CHECKING:
    from cfs.oci.layers import ImportedLayer
    from cfs.oci.manifest import Descriptor, Manifest
    from cfs.repository import Repository

__all__ = [
    "ImportingSource",
    "LocalFetch",
    "Source",
    "SourceOptions",
    "StoppableSource",
    "StoppedError",
    "Stopper",
    "needs_program",
    "open_source",
]


class LocalFetch(Enum):
    """Whether ``containers-storage:`` is read without skopeo, and how its files become objects."""

    DISABLED = "disabled"
    AUTO = "auto"  # by reflink, else by copy
    ZEROCOPY = "zerocopy"  # by reflink, else by hard link; nothing is copied


class StoppedError(CfsError):
    """Who wanted the image does not want it any more."""


class Stopper:
    """Ends from any thread what reads an image, though it waits for a registry.

    ``_lock`` guards the rest; the actions run within it, and must not block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_stopped = False
        self._actions: list[Callable[[], None]] = []

    def stop(self) -> None:
        """End it; more than once, too."""
        with self._lock:
            self._is_stopped = True
            for action in self._actions:
                action()

    def check(self) -> None:
        """Refuse to go on.

        Raises:
            StoppedError: it was ended.
        """
        if self._is_stopped:
            msg = "stopped: nobody wants the image any more"
            raise StoppedError(msg)

    @contextmanager
    def calling(self, action: Callable[[], None]) -> Iterator[None]:
        """Have an end of the block called when somebody stops it.

        Raises:
            StoppedError: that was before.
        """
        with self._lock:
            self.check()
            self._actions.append(action)
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What a caller wishes; None leaves it to the machine, or to skopeo's configuration.

    Attributes:
        arch: architecture in place of this machine's, in the words of Go (``arm64``).
        os: operating system in place of Linux.
        variant: of the architecture (``v7``); without it the first image that fits is taken.
        tls_verify: false: registries without TLS, or with certificates of no known authority.
        authfile: path of the credentials that ``skopeo login`` has stored.
        creds: ``USER[:PASSWORD]``.
        cert_dir: directory of certificates for the registry.
        local_fetch: how to read ``containers-storage:``.
        storage_root: the only storage to look into, unless skopeo reads it.
        stopper: ends it from elsewhere.
    """

    arch: str | None = None
    os: str | None = None
    variant: str | None = None
    tls_verify: bool | None = None
    authfile: str | None = None
    creds: str | None = None
    cert_dir: str | None = None
    local_fetch: LocalFetch = LocalFetch.DISABLED
    storage_root: str | None = None
    stopper: Stopper = field(default_factory=Stopper, compare=False, repr=False)


class Source(Protocol):
    """One image of some transport: exactly one manifest, chosen when the source was opened."""

    def read_manifest(self) -> tuple[str, bytes]:
        """Return digest and bytes of the manifest, verified; a Docker manifest comes converted.

        Raises:
            IntegrityError: the bytes are not those that were announced.
            FormatError: a document is broken.
            NotFoundError: there is no such image, or none for the platform.
        """
        ...

    def read_config(self, manifest: "Manifest") -> bytes:
        """Return the bytes of the config, verified.

        Raises:
            IntegrityError: the bytes are not those that were announced.
            NotFoundError: they are missing.
        """
        ...

    def layers(self, manifest: "Manifest") -> Sequence["Descriptor"]:
        """Return what :meth:`open_layer` will give, in the order of the layers."""
        ...

    def open_layer(self, index: int) -> AbstractContextManager[BinaryIO]:
        """Open the blob of a layer, as it is; any thread may call, several may be open.

        Reading to its end verifies it, leaving the block before that end is an error.

        Args:
            index: into :meth:`layers`, which was called before.

        Raises:
            IntegrityError: size or digest are wrong; raised when it is opened, read or closed.
            NotFoundError: the blob is missing.
        """
        ...


@runtime_checkable
class ImportingSource(Source, Protocol):
    """A source that has files where others have blobs, and stores them itself."""

    def import_layer(self, repository: "Repository", index: int, diff_id: str) -> "ImportedLayer":
        """Store and register a layer, verified; any thread may call.

        Args:
            repository: the store.
            index: into :meth:`layers`, which was called before.
            diff_id: digest that the tar of the layer should have.

        Raises:
            IntegrityError: it has another one, or a file was changed.
            NotFoundError: a file is missing.
            FormatError: something is broken.
        """
        ...


@runtime_checkable
class StoppableSource(Source, Protocol):
    """A source that may have to be waited for: a registry that does not answer."""

    def stop(self) -> None:
        """End what other threads wait for, with an error for them; nothing can be read then."""
        ...


_Opener = Callable[[str, SourceOptions], AbstractContextManager[Source]]

_NATIVE = {
    "oci": ("layout", "open_layout"),
    "oci-archive": ("archives", "open_oci_archive"),
    "docker-archive": ("docker_archive", "open_docker_archive"),
}
_STORAGE = "containers-storage"
_SKOPEO = ("docker", "registry", "docker-daemon", "dir", _STORAGE)


def open_source(image: str, options: SourceOptions) -> AbstractContextManager[Source]:
    """Open the image of a reference ``TRANSPORT:REST``.

    Raises:
        InvalidRequestError: there is no such transport, or the rest is not like that.
        NotFoundError: there is no such image, or none for the platform.
        FormatError: what is there is broken.
        OSError: it cannot be read.
    """
    if "\0" in image:
        msg = "an image reference holds no zero byte"
        raise InvalidRequestError(msg)
    transport, colon, rest = image.partition(":")
    if not colon:
        msg = f"Parsing image reference transport: Missing ':' in {image}"
        raise InvalidRequestError(msg)
    if transport in _NATIVE:
        return _load(*_NATIVE[transport])(rest, options)
    if transport == _STORAGE and options.local_fetch is not LocalFetch.DISABLED:
        return _load("containers_storage", "open_containers_storage")(rest, options)
    if transport in _SKOPEO:
        return _load("skopeo", "open_with_skopeo")(image, options)
    msg = f"Parsing image reference transport: Invalid transport: {transport}"
    raise InvalidRequestError(msg)


def needs_program(image: str, options: SourceOptions) -> bool:
    """Whether skopeo is started for an image: with the rights of this process, whoever asks."""
    transport = image.partition(":")[0]
    is_storage = transport == _STORAGE and options.local_fetch is not LocalFetch.DISABLED
    return transport in _SKOPEO and not is_storage


def _load(module: str, name: str) -> _Opener:
    # one transport is used in a process: the others need not be loaded
    return cast("_Opener", getattr(import_module(f"{__name__}.{module}"), name))
