"""``cfsctl oci dump`` and ``oci compute-id``: the tree of an image (spec cli-and-varlink a.6)."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

from cfs.cli.conversion import bootable_option, xattrs_option
from cfs.cli.oci.references import parsed_by
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.digest import Digest
from cfs.oci.reference import Reference

if TYPE_CHECKING:
    from cfs.oci.documents import StoredConfig
    from cfs.repository.repository import Repository

__all__ = ["add_config_arguments", "compute_id", "dump", "open_config"]

_C = TypeVar("_C", bound=click.Command)


def add_config_arguments(command: _C) -> _C:
    """Give a command the arguments REF and VERITY, which name a config."""
    command.params[:0] = [
        click.Argument(["reference"], callback=parsed_by(Reference.parse), metavar="REF"),
        click.Argument(["stream"], required=False, metavar="[VERITY]"),
    ]
    return command


@contextmanager
def open_config(
    ctx: click.Context, reference: Reference, stream: str | None, *, write: bool = False
) -> Iterator["tuple[Repository, StoredConfig, bool]"]:
    """Open the store and find the config that the arguments name.

    Gives the store, the config, and whether to verify its layers.  What is made of it lives to
    the end of the process, so garbage of Python is not looked for from now on.

    Raises:
        FormatError: ``stream`` cannot be the id of a stream.
        Other errors: as :func:`cfs.cli.store.open_store` and :func:`cfs.oci.images.find_config`.
    """
    from cfs.oci.images import find_config

    gc.disable()
    config_stream = None if stream is None else Digest.parse(stream)
    with open_store(ctx, write=write) as repository:
        yield repository, *find_config(repository, reference, config_stream)


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
    from cfs.oci.images import tree_of
    from cfs.transform import XattrMode

    with open_config(ctx, reference, stream) as (repository, config, verify):
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
    from cfs.oci.images import compute_image
    from cfs.transform import XattrMode

    with open_config(ctx, reference, stream) as (repository, config, verify):
        mode = XattrMode(xattrs)
        digest = compute_image(repository, config, bootable=bootable, mode=mode, verify=verify)
    click.echo(digest)
