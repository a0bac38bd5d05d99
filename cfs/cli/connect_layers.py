"""``oci layer``, ``oci import-layer`` and ``oci copy`` with ``--connect``."""

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO, Self

import click

from cfs.cli.connect import opened_store, refuse_options
from cfs.cli.oci.copy import open_source, print_copied
from cfs.cli.oci.layers import print_pieces, refuse_terminal_input, refuse_terminal_output
from cfs.client.errors import InvalidReplyError
from cfs.client.layers import (
    FinalizeImage,
    GetLayer,
    GetLayerParams,
    HasLayer,
    LayerRef,
    PutLayer,
)
from cfs.digest import Digest
from cfs.errors import CfsError, FormatError
from cfs.linux.files import owned, write_all
from cfs.oci.documents import config_of, find_manifest
from cfs.oci.finalize import layer_types
from cfs.oci.reference import Reference, check_content
from cfs.oci.splitdir import (
    MAX_CONTENTS_SIZE,
    File,
    Inline,
    format_chunk,
    format_contents_head,
    read_chunks,
)
from cfs.oci.tar import padded, read_entry
from cfs.oci.transfer import read_sent_layer, send_layer

__all__ = ["copy", "import_layer", "layer"]

_PIECE_SIZE = 1 << 20


def layer(ctx: click.Context, *, diff_id: str, is_dumpfile: bool, is_json: bool) -> None:
    """Print the tar of a layer that the service sends."""
    refuse_options(ctx, {"--dumpfile": is_dumpfile, "--json": is_json})
    refuse_terminal_output()
    with opened_store(ctx) as (client, handle), ExitStack() as stack:
        fds: list[int] = []
        nr_directories = 0
        for reply in client.stream(GetLayer(handle, GetLayerParams(diff_id=diff_id))):
            stack.enter_context(reply)
            fds += [reply.descriptors[index] for index in range(len(reply.descriptors))]
            nr_directories = reply.dir_count
        if len(fds) <= nr_directories:
            msg = f"the service sent {len(fds)} descriptors: expected {nr_directories} and a pipe"
            raise InvalidReplyError(msg)
        with open(fds[0], "rb", closefd=False) as pipe:
            directories = fds[1 : nr_directories + 1]
            print_pieces(read_sent_layer(diff_id, read_chunks(pipe), directories))


def import_layer(ctx: click.Context, *, diff_id: str, name: str | None) -> None:
    """Send the tar on stdin to the service."""
    refuse_options(ctx, {"NAME": name is not None})
    with opened_store(ctx) as (client, handle), ExitStack() as stack:
        verity = client.call(HasLayer(handle, diff_id)).layer_verity
        if verity is None:
            refuse_terminal_input()
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="cfs-"))
            # not that of sys.stdin, which the end of the process would wait for
            source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 - the sender's
            with _Sender(_chunks_of(source, directory)) as sender:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
                fds = [sender.pipe, owned(stack, os.open(directory, flags))]
                verity = client.call(PutLayer(handle, diff_id, fds=fds)).layer_verity
    digest = Digest.parse(verity)
    click.echo(f"{digest.algorithm.name.lower()}:{digest}")


def copy(
    ctx: click.Context, *, image: Reference, source: str, name: str | None, zerocopy: bool
) -> None:
    """Send an image of a store of ours to the service."""
    with open_source(ctx, source) as origin, opened_store(ctx) as (client, handle):
        found = find_manifest(origin, image)
        check_content(found.data, found.digest, "Manifest")
        config = config_of(origin, found, verify=True)
        layers = []
        for digest in layer_types(found.manifest, config.data):
            verity = client.call(HasLayer(handle, digest)).layer_verity
            if verity is None:
                if digest not in found.layers:
                    msg = f"manifest {found.digest}: its stream does not refer to layer {digest}"
                    raise FormatError(msg)
                chunks = map(format_chunk, send_layer(origin, found.layers[digest]))
                with _Sender(chunks) as sender:
                    fds = [sender.pipe, origin.objects.fd]
                    call = PutLayer(handle, digest, zerocopy, fds=fds)
                    verity = client.call(call).layer_verity
            layers.append(LayerRef(diff_id=digest, layer_verity=verity))
        documents = (
            found.data.decode(errors="surrogateescape"),
            config.data.decode(errors="surrogateescape"),
        )
        done = client.call(FinalizeImage(handle, *documents, layers, name))
    ids = (done.manifest_digest, done.manifest_verity, done.config_digest, done.config_verity)
    print_copied(image, source, name, ids)


class _Sender:
    """Writes pieces into a pipe, in a thread, while the context lasts.

    If the call fails, the thread may wait for its source for ever: it ends with the process.

    Args:
        pieces: to write.

    Attributes:
        pipe: to read from.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pipe, self._end = os.pipe2(os.O_CLOEXEC)
        self._pieces = pieces
        self._error: CfsError | OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Tell our error rather than what the service makes of it."""
        os.close(self.pipe)  # if the service reads no more, writing fails from now on
        if kind is None:
            self._thread.join()
        if self._error is not None:
            raise self._error from None

    def _run(self) -> None:
        try:
            for data in self._pieces:
                write_all(self._end, data)
        except BrokenPipeError:  # the service says why
            pass
        except (CfsError, OSError) as error:
            self._error = error
        finally:
            os.close(self._end)


def _chunks_of(source: BinaryIO, directory: str) -> Iterator[bytes]:
    """Yield a tar as a splitdirfdstream: what becomes objects in chunks of its own."""
    inline: list[bytes] = []

    def read(size: int) -> bytes:
        data = source.read(size)
        inline.append(data)
        return data

    while entry := read_entry(read):
        yield from _drain(inline)
        padding = padded(entry.size) - entry.size
        if entry.is_external:
            yield from _contents(source, entry.size, directory)
        else:
            padding += entry.size
        for data in _pieces(source, padding):
            yield format_chunk(Inline(data))
    while read(_PIECE_SIZE):
        yield from _drain(inline)
    yield from _drain(inline)


def _drain(inline: list[bytes]) -> Iterator[bytes]:
    data = b"".join(inline)
    inline.clear()
    if data:
        yield format_chunk(Inline(data))


def _contents(source: BinaryIO, size: int, directory: str) -> Iterator[bytes]:
    if size <= MAX_CONTENTS_SIZE:
        yield format_contents_head(size)
        yield from _pieces(source, size)
        return
    fd, path = tempfile.mkstemp(dir=directory)
    with open(fd, "wb") as file:
        file.writelines(_pieces(source, size))
    yield format_chunk(File(size, 0, os.fsencode(os.path.basename(path))))


def _pieces(source: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        data = source.read(min(size, _PIECE_SIZE))
        if not data:
            msg = "tar: unexpected end of the archive in the contents of an entry"
            raise FormatError(msg)
        size -= len(data)
        yield data
