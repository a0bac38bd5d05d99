"""What is in a layer of the store: its tar, its entries, their number (spec repository 5.11)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfs.digest import Digest
from cfs.dumpfile.escapes import escape_field
from cfs.dumpfile.printer import format_inode, format_link
from cfs.errors import NotFoundError
from cfs.oci.filesystem import make_inode, read_layer
from cfs.oci.layers import find_layer
from cfs.oci.tar import Kind, make_absolute
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import open_stored_stream

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = ["LayerSummary", "format_entries", "read_tar", "summarize_layer"]


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """Numbers of a layer.

    Attributes:
        diff_id: digest of its tar.
        stream: digest of its splitstream.
        size: of the tar, in bytes.
        nr_entries: in the tar, whiteouts included.
        nr_objects: different objects that the tar is made of.
        external_size: bytes of all entries that are objects.
    """

    diff_id: str
    stream: Digest
    size: int
    nr_entries: int
    nr_objects: int
    external_size: int

    def as_dict(self) -> dict[str, object]:
        """Return it as composefs-rs prints it (spec cli-and-varlink a.9)."""
        return {
            "diffId": self.diff_id,
            "verity": str(self.stream),
            "size": self.size,
            "entryCount": self.nr_entries,
            "splitstream": {
                "externalObjects": self.nr_objects,
                "externalSize": self.external_size,
                "inlineSize": max(0, self.size - self.external_size),
            },
        }


def read_tar(repository: "Repository", diff_id: str) -> Iterator[bytes]:
    """Yield the tar of a layer in pieces, byte for byte as it was.

    Raises:
        NotFoundError: there is no such layer, or one of its objects is missing.
        FormatError: the layer is no tar or broken; what comes before was given.
        IntegrityError: an object is not what its name says.
    """
    digest = _find(repository, diff_id)
    with open_stored_stream(repository, digest, ContentType.LAYER) as stream:
        yield from stream.contents(repository.objects)


def summarize_layer(repository: "Repository", diff_id: str) -> LayerSummary:
    """Count what is in a layer.

    Raises:
        NotFoundError: there is no such layer.
        FormatError: it is no tar or broken.
    """
    digest = _find(repository, diff_id)
    with open_stored_stream(repository, digest, ContentType.LAYER) as stream:
        size = stream.total_size
    nr_entries = external_size = 0
    objects = set()
    for entry, content in read_layer(repository, digest):
        nr_entries += 1
        if isinstance(content, Digest):
            objects.add(content)
            external_size += entry.size
    return LayerSummary(
        diff_id=diff_id,
        stream=digest,
        size=size,
        nr_entries=nr_entries,
        nr_objects=len(objects),
        external_size=external_size,
    )


def format_entries(repository: "Repository", diff_id: str) -> Iterator[bytes]:
    """Yield the entries of a layer as lines of a dumpfile, in their order.

    Raises:
        NotFoundError: there is no such layer.
        FormatError: it is no tar or broken; the entries before that place were given.
    """
    for entry, content in read_layer(repository, _find(repository, diff_id)):
        path = escape_field(make_absolute(entry.path))  # that of the root is empty
        if entry.kind is Kind.HARDLINK:
            yield format_link(path, escape_field(make_absolute(entry.target)))
            continue
        inode = make_inode(entry, content)
        inode.mode |= entry.mode  # with all bits of the header, as composefs-rs
        yield format_inode(path, inode, 1)


def _find(repository: "Repository", diff_id: str) -> Digest:
    digest = find_layer(repository, diff_id)
    if digest is None:
        msg = f"Layer {diff_id} not found"
        raise NotFoundError(msg)
    return digest
