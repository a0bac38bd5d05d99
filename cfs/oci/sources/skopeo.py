"""Registries and whatever else skopeo reads, through its image proxy (spec repository 5.7).

Against ``skopeo copy`` into a temporary directory this fetches nothing that is there already, needs
no room, and importing goes on while the network is waited for.

What skopeo verifies is verified again: it is a program found in ``PATH``, of any version.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import BinaryIO

from cfs.errors import FormatError, UnsupportedError
from cfs.oci.manifest import MAX_DOCUMENT_SIZE, Descriptor, Manifest, diff_ids_of
from cfs.oci.reference import digest_of
from cfs.oci.sources import Source, SourceOptions
from cfs.oci.sources.skopeo_proxy import Proxies
from cfs.oci.sources.verified import open_verified, read_document

__all__ = ["open_with_skopeo"]

_STORAGE = "containers-storage"
_REMOTE = ("docker", "registry", "dir")
_TAR = "application/vnd.oci.image.layer.v1.tar"


@contextmanager
def open_with_skopeo(image: str, options: SourceOptions) -> Iterator[Source]:
    """Open an image of any transport of skopeo; ``registry:`` means ``docker:``.

    Raises:
        UnsupportedError: there is no skopeo, or none that can do it.
        SourceError: skopeo cannot open the image, and says why.
    """
    transport, _, rest = image.partition(":")
    if transport == "registry":
        image = f"docker://{rest.removeprefix('//')}"
    elif transport == _STORAGE:
        image = f"{transport}:{rest.removeprefix('sha256:')}"  # of a bare id
    with (
        _scratch_directory(transport) as scratch,
        closing(Proxies(image, _command(transport, options, scratch))) as proxies,
        options.stopper.calling(proxies.stop),
    ):
        yield _SkopeoSource(proxies, image)


@contextmanager
def _scratch_directory(transport: str) -> Iterator[str | None]:
    """Have a directory for temporary files of a transport that makes some.

    The proxy never removes the layers that it has unpacked of storage (1.9.3), and no program
    does when it is killed.
    """
    if transport in _REMOTE:
        yield None
        return
    # as skopeo: /tmp is often too small
    place = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="cfs-", dir=place) as directory:
        yield directory


def _command(transport: str, options: SourceOptions, scratch: str | None) -> list[str]:
    """Return the command of a proxy."""
    needed = ["skopeo"]
    if transport == _STORAGE and os.geteuid() != 0:
        needed = ["podman", "unshare", "skopeo"]  # its files belong to users of his name space
    for program in (needed[0], needed[-1]):
        if shutil.which(program) is None:
            msg = f"images of {transport}: are read through {program}, which is not installed"
            raise UnsupportedError(msg)
    choices = {"arch": options.arch, "os": options.os, "variant": options.variant}
    access = {"authfile": options.authfile, "creds": options.creds, "cert-dir": options.cert_dir}
    command = [
        *_ending_with_us(),
        *needed,
        *(f"--override-{name}={value}" for name, value in choices.items() if value),
        *([] if scratch is None else [f"--tmpdir={scratch}"]),
        "experimental-image-proxy",
        *(f"--{name}={value}" for name, value in access.items() if value is not None),
    ]
    if options.tls_verify is not None:
        command.append(f"--tls-verify={str(options.tls_verify).lower()}")
    return command


def _ending_with_us() -> list[str]:
    """Return what has the kernel end a proxy that waits for the network when we are killed."""
    setpriv = shutil.which("setpriv")
    # that of busybox lacks the option
    if setpriv is None or os.path.basename(os.path.realpath(setpriv)) != "setpriv":
        return []
    return [setpriv, "--pdeathsig=TERM"]


class _SkopeoSource:
    """One image; a :class:`~cfs.oci.sources.StoppableSource`."""

    def __init__(self, proxies: Proxies, image: str) -> None:
        """Open the image."""
        self._proxies = proxies
        self._is_storage = image.startswith(f"{_STORAGE}:")
        self._layers: Sequence[Descriptor] = ()
        with proxies.lease() as proxy:
            pipe, original = proxy.fetch("GetManifest", what=f"{image}: manifest")
            with pipe:
                self._manifest = io.BufferedReader(pipe).read(MAX_DOCUMENT_SIZE + 1)
        if len(self._manifest) > MAX_DOCUMENT_SIZE:
            msg = f"the manifest has more than {MAX_DOCUMENT_SIZE} bytes"
            raise FormatError(msg)
        # skopeo converts Docker's manifests, but names the digest that they had before
        self._digest = digest_of(self._manifest)
        self._is_converted = original != self._digest

    def read_manifest(self) -> tuple[str, bytes]:
        """Return digest and bytes of the manifest; see :class:`~cfs.oci.sources.Source`."""
        return self._digest, self._manifest

    def read_config(self, manifest: Manifest) -> bytes:
        """Return the bytes of the config; see :class:`~cfs.oci.sources.Source`."""
        config = manifest.config
        with self._proxies.lease() as proxy:
            if self._is_converted:  # with the manifest: nobody has a blob of that digest
                pipe, _ = proxy.fetch("GetFullConfig", what="config")
            else:
                pipe, _ = proxy.fetch(
                    "GetBlob", config.digest, config.size, what=f"config {config.digest}"
                )
            return read_document(pipe, config)

    def layers(self, manifest: Manifest) -> Sequence[Descriptor]:
        """Return the layers; see :class:`~cfs.oci.sources.Source`.

        The storage has no blobs: it makes the tars again, which only the diff ids name.
        """
        self._layers = manifest.layers
        if self._is_storage and manifest.is_container:
            diff_ids = diff_ids_of(manifest, self.read_config(manifest))
            self._layers = tuple(
                replace(layer, media_type=_TAR, digest=diff_id)
                for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
            )
        return self._layers

    @contextmanager
    def open_layer(self, index: int) -> Iterator[BinaryIO]:
        """Open a layer; see :class:`~cfs.oci.sources.Source`."""
        layer = self._layers[index]
        with self._proxies.lease() as proxy:
            # the size of a tar in the storage is not known before, so skopeo calls it wrong
            pipe, size = proxy.fetch(
                "GetBlob",
                layer.digest,
                layer.size,
                what=f"blob {layer.digest}",
                is_checked=not self._is_storage,
            )
            if self._is_storage and isinstance(size, int):
                layer = replace(layer, size=size)
            with open_verified(pipe, layer) as reader:
                yield reader

    def stop(self) -> None:
        """End what other threads read; see :class:`~cfs.oci.sources.StoppableSource`."""
        self._proxies.stop()
