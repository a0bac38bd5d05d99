"""``cfsctl create-dumpfile`` and ``compute-id``: a directory's text and image digest."""

import errno
import os
import sys
from typing import TypeVar

import click

from cfs.cli.strict import GlobalOptions, StrictCommand, find_global_options
from cfs.digest import Algorithm
from cfs.directory import ScanOptions, scan
from cfs.dumpfile import format_tree
from cfs.erofs.writer import Rules, write_image
from cfs.errors import UnsupportedError
from cfs.fsverity import compute_digest
from cfs.tree import Directory

__all__ = ["compute_id", "create_dumpfile"]

_DEFAULT_VERSION = 1  # whatever the store says (spec repository 7)
_C = TypeVar("_C", bound=click.Command)


def _add_parameters(command: _C) -> _C:
    """Give a command what all have that turn a directory into a tree."""
    xattrs = click.Choice(["allowlist-only", "keep-user-xattrs"])
    command.params += [
        click.Argument(["path"]),
        click.Option(["--bootable"], is_flag=True, help="Convert for booting."),
        click.Option(
            ["--no-propagate-usr-to-root"], is_flag=True, help="Do not convert as for OCI images."
        ),
        click.Option(["--xattrs"], type=xattrs, help="Which xattrs the OCI conversion keeps."),
    ]
    return command


def _scan(
    ctx: click.Context, path: str, *, bootable: bool, no_propagate_usr_to_root: bool
) -> Directory:
    """Return the tree of a directory, with hard links."""
    options = find_global_options(ctx)
    lacking = {
        "without --no-repo": options.has_repository,
        "without --no-propagate-usr-to-root": not no_propagate_usr_to_root,
        "with --bootable": bootable,
    }
    for name, is_wanted in lacking.items():
        if is_wanted:
            msg = f"{ctx.info_name} {name} is not supported yet: it comes with the repository"
            raise UnsupportedError(msg)
    if os.path.islink(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return scan(path, options=ScanOptions(hardlinks=True, algorithm=_choose_algorithm(options)))


def _choose_algorithm(options: GlobalOptions) -> Algorithm:
    return options.algorithm or Algorithm.SHA512


@_add_parameters
@click.command(cls=StrictCommand)
@click.pass_context
def create_dumpfile(
    ctx: click.Context, /, path: str, bootable: bool, no_propagate_usr_to_root: bool, **_: object
) -> None:
    """Print a directory as a dumpfile."""
    root = _scan(ctx, path, bootable=bootable, no_propagate_usr_to_root=no_propagate_usr_to_root)
    sys.stdout.buffer.writelines(format_tree(root))


@_add_parameters
@click.command(cls=StrictCommand)
@click.pass_context
def compute_id(
    ctx: click.Context, /, path: str, bootable: bool, no_propagate_usr_to_root: bool, **_: object
) -> None:
    """Print the digest of a directory's image."""
    options = find_global_options(ctx)
    root = _scan(ctx, path, bootable=bootable, no_propagate_usr_to_root=no_propagate_usr_to_root)
    version = _DEFAULT_VERSION if options.erofs_version is None else options.erofs_version
    image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
    click.echo(str(compute_digest(image, _choose_algorithm(options))))
