"""``cfsctl oci dump`` and ``oci compute-id``: the tree of an image (spec cli-and-varlink a.6)."""

import gc
import sys
from typing import TypeVar

import click

from cfs.cli.conversion import bootable_option, xattrs_option
from cfs.cli.oci.references import parsed_by
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.digest import Digest
from cfs.oci.reference import Reference

__all__ = ["add_config_arguments", "compute_id", "dump", "parse_stream"]

_C = TypeVar("_C", bound=click.Command)


def add_config_arguments(command: _C) -> _C:
    """Give a command the arguments REF and VERITY, which name a config."""
    command.params[:0] = [
        click.Argument(["reference"], callback=parsed_by(Reference.parse), metavar="REF"),
        click.Argument(["stream"], required=False, metavar="[VERITY]"),
    ]
    return command


def parse_stream(stream: str | None) -> Digest | None:
    """Return the id of a config's stream.

    Raises:
        FormatError: it cannot be one.
    """
    return None if stream is None else Digest.parse(stream)


@add_config_arguments
@click.command(cls=StrictCommand, params=[bootable_option(), xattrs_option()])
@click.pass_context
def dump(
    ctx: click.Context,
    /,
    *,
    reference: Reference,
    stream: str | None,
    bootable: bool,
    xattrs: str,
) -> None:
    """Print the files of an image as a dumpfile; REF is a tag, or @DIGEST of a config."""
    from cfs.dumpfile import format_tree
    from cfs.oci.images import find_config, tree_of
    from cfs.transform import XattrMode

    gc.disable()  # all that is made lives to the end
    config_stream = parse_stream(stream)
    with open_store(ctx) as repository:
        config, verify = find_config(repository, reference, config_stream)
        mode = XattrMode(xattrs)
        root = tree_of(repository, config, bootable=bootable, mode=mode, verify=verify)
    sys.stdout.buffer.writelines(format_tree(root))


@add_config_arguments
@click.command(cls=StrictCommand, params=[bootable_option(), xattrs_option()])
@click.pass_context
def compute_id(
    ctx: click.Context,
    /,
    *,
    reference: Reference,
    stream: str | None,
    bootable: bool,
    xattrs: str,
) -> None:
    """Print the digest of an image; REF is a tag, or @DIGEST of a config."""
    from cfs.oci.images import compute_image, find_config
    from cfs.transform import XattrMode

    gc.disable()
    config_stream = parse_stream(stream)
    with open_store(ctx) as repository:
        config, verify = find_config(repository, reference, config_stream)
        mode = XattrMode(xattrs)
        digest = compute_image(repository, config, bootable=bootable, mode=mode, verify=verify)
    click.echo(digest)
