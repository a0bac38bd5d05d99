"""Single layers: ``oci import-layer``, ``layer`` (spec cli-and-varlink a.6)."""

import sys
from collections.abc import Iterator

import click

from cfs.cli.oci.references import parsed_by
from cfs.cli.output import print_json
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.errors import InvalidRequestError
from cfs.oci.reference import parse_digest

__all__ = [
    "import_layer",
    "layer",
    "print_pieces",
    "refuse_terminal_input",
    "refuse_terminal_output",
]


@click.command(cls=StrictCommand)
@click.argument("diff_id", metavar="DIGEST", callback=parsed_by(parse_digest))
@click.argument("name", required=False)
@click.pass_context
def import_layer(ctx: click.Context, /, diff_id: str, name: str | None) -> None:
    """Store the uncompressed tar on stdin, whose digest is DIGEST, and name it."""
    from cfs.oci import layers
    from cfs.oci.manifest import Compression
    from cfs.oci.tags import check_stream_name
    from cfs.repository.splitstream_format import ContentType
    from cfs.repository.streams import register_stream

    if name is not None:
        check_stream_name(name)  # before all the work
    with open_store(ctx, write=True) as repository:
        stream = layers.find_sound_layer(repository, diff_id, ContentType.LAYER)
        if stream is None:
            refuse_terminal_input()
            stream = layers.import_layer(
                repository, sys.stdin.buffer, compression=Compression.NONE, diff_id=diff_id
            ).stream
        if name is not None:
            register_stream(repository, layers.layer_name(diff_id), stream, name)
    click.echo(f"{stream.algorithm.name.lower()}:{stream}")


@click.command(cls=StrictCommand)
@click.option("--dumpfile", "is_dumpfile", is_flag=True, help="Print its entries as a dumpfile.")
@click.option("--json", "is_json", is_flag=True, help="Print its size and what is in it as JSON.")
@click.argument("diff_id", metavar="DIGEST", callback=parsed_by(parse_digest))
@click.pass_context
def layer(ctx: click.Context, /, diff_id: str, is_dumpfile: bool, is_json: bool) -> None:
    """Print the tar of the layer DIGEST, uncompressed."""
    from cfs.oci.layer_listing import format_entries, read_tar, summarize_layer

    if is_dumpfile and is_json:
        msg = "--dumpfile cannot be used with --json"
        raise click.UsageError(msg, ctx)
    if not (is_dumpfile or is_json):
        refuse_terminal_output()
    with open_store(ctx) as repository:
        if is_json:
            print_json(summarize_layer(repository, diff_id).as_dict())
        elif is_dumpfile:
            print_pieces(format_entries(repository, diff_id))
        else:
            print_pieces(read_tar(repository, diff_id))


def refuse_terminal_input() -> None:
    """Refuse to read a tar from the keyboard.

    Raises:
        InvalidRequestError: stdin is a terminal.
    """
    if sys.stdin.isatty():
        msg = "stdin is a terminal: expected a tar"
        raise InvalidRequestError(msg)


def refuse_terminal_output() -> None:
    """Refuse to show people a tar.

    Raises:
        InvalidRequestError: stdout is a terminal.
    """
    if sys.stdout.isatty():
        msg = "stdout is a terminal: redirect it, or use --dumpfile or --json"
        raise InvalidRequestError(msg)


def print_pieces(pieces: Iterator[bytes]) -> None:
    """Write data to stdout."""
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
