"""Tags: names of manifests, ``streams/refs/oci/TAG``, and referrers (spec repository 5.3, 5.9)."""

import os
from contextlib import suppress
from dataclasses import dataclass

from cfs.digest import Digest
from cfs.errors import FormatError, InvalidRequestError, NotFoundError
from cfs.oci.reference import check_tag, decode_tag, encode_tag, parse_digest
from cfs.repository.refs import (
    REFS,
    STREAMS,
    check_name,
    read_link,
    remove_link,
    set_link,
    walk_refs,
)
from cfs.repository.repository import Repository
from cfs.repository.streams import find_stream

__all__ = [
    "Tag",
    "check_stream_name",
    "find_manifest_stream",
    "list_referrers",
    "list_tags",
    "manifest_name",
    "remove_tag",
    "resolve_tag",
    "set_tag",
]

_TAGS = b"oci/"
_REFERRERS = b"oci-referrers/"
_STREAMS = STREAMS.encode() + b"/"
_REFS = _STREAMS + REFS + b"/"
_MANIFEST = "oci-manifest-"


def manifest_name(digest: str) -> str:
    """Return the content identifier of the stream of a manifest."""
    return _MANIFEST + digest


def find_manifest_stream(repository: Repository, digest: str) -> Digest:
    """Return the digest of the stream of a manifest.

    Raises:
        NotFoundError: there is no such manifest.
        FormatError: something else has its name.
    """
    try:
        return find_stream(repository, manifest_name(digest))
    except NotFoundError:
        msg = f"Manifest {digest} not found"
        raise NotFoundError(msg) from None


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A name, and the digest of the manifest that it leads to."""

    name: str
    digest: str


def check_stream_name(name: str) -> None:
    """Refuse a name of a stream that cannot be, or that would be among the tags.

    Raises:
        InvalidRequestError: it is such a name.
    """
    top = check_name(name).partition(b"/")[0] + b"/"
    if top in (_TAGS, _REFERRERS):
        msg = f"name {name!r}: those below {os.fsdecode(top)!r} are for images"
        raise InvalidRequestError(msg)


def list_tags(repository: Repository) -> list[Tag]:
    """Return all tags, sorted by name; what has another shape is left out.

    A tag may lead to a manifest that is missing.

    Raises:
        OSError: they cannot be listed.
    """
    tags = []
    for ref in walk_refs(repository.fd, STREAMS, _TAGS):
        if ref.target is not None:
            with suppress(FormatError):
                name = decode_tag(ref.name.removeprefix(_TAGS))
                tags.append(Tag(name, _parse_target(ref.target)))
    return sorted(tags)


def resolve_tag(repository: Repository, name: str) -> str:
    """Return the digest of the manifest that a tag leads to; it may be missing.

    Raises:
        InvalidRequestError: no tag can be like that.
        NotFoundError: there is no such tag.
        FormatError: it leads to something else than a manifest.
        OSError: reading it failed.
    """
    target = read_link(repository.fd, _REFS + _TAGS + encode_tag(name))
    if target is None:
        msg = f"OCI reference not found: {name}"
        raise NotFoundError(msg)
    return _parse_target(target)


def set_tag(repository: Repository, name: str, digest: str) -> None:
    """Give a manifest a name, which another one may have had.

    Raises:
        InvalidRequestError: no image may be called so.
        NotFoundError: there is no such manifest: nothing could be collected with such a name.
        ConflictError: something that is no link has the name.
        OSError: the store cannot be written to.
    """
    check_tag(name)
    if not repository.objects.has(find_manifest_stream(repository, digest)):
        msg = f"Manifest {digest} not found: its object is missing"
        raise NotFoundError(msg)
    target = _STREAMS + manifest_name(digest).encode()
    set_link(repository.fd, _REFS + _TAGS + encode_tag(name), target)


def remove_tag(repository: Repository, name: str) -> None:
    """Remove a tag; the manifest stays until the next collection.

    Raises:
        InvalidRequestError: no tag can be like that.
        NotFoundError: there is no such tag.
        ConflictError: something that is no link has the name.
        OSError: the store cannot be written to.
    """
    try:
        remove_link(repository.fd, _REFS + _TAGS + encode_tag(name))
    except FileNotFoundError:
        msg = f"OCI reference not found: {name}"
        raise NotFoundError(msg) from None


def list_referrers(repository: Repository, digest: str) -> list[str]:
    """Return the digests of the artifacts about a manifest, sorted.

    Those that are not in the store are left out.

    Raises:
        OSError: they cannot be listed.
    """
    directory = _REFERRERS + encode_tag(digest) + b"/"
    referrers = []
    for ref in walk_refs(repository.fd, STREAMS, directory):
        if ref.target is None:
            continue
        with suppress(FormatError, NotFoundError, InvalidRequestError):
            artifact = _parse_target(ref.target)
            if decode_tag(ref.name.removeprefix(directory)) == artifact:
                find_stream(repository, manifest_name(artifact))
                referrers.append(artifact)
    return referrers


def _parse_target(target: bytes) -> str:
    """Return the digest in the last component of a link's text.

    Raises:
        FormatError: there is none.
    """
    name = target.rpartition(b"/")[2].decode(errors="backslashreplace")
    if not name.startswith(_MANIFEST):
        msg = f"Invalid manifest reference: {name}"
        raise FormatError(msg)
    try:
        return parse_digest(name.removeprefix(_MANIFEST))
    except InvalidRequestError as error:
        msg = f"Invalid OCI digest in reference: {error}"
        raise FormatError(msg) from None
