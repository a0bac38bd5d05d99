"""The options of all commands that mount images of a store (spec cli-and-varlink a.8, c.6)."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from cfs.cli.fuse_options import parse_wish
from cfs.cli.store import open_store
from cfs.errors import InvalidRequestError
from cfs.mounting.choice import MountRequest

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = ["mount_options", "mount_stored", "parse_request"]

_OPTIONS = (
    click.option(
        "--fuse", metavar="[auto|yes|no][,OPTION...]",
        help="Whether to serve over FUSE; alone it means yes, by default it depends on whether the "
        "kernel lets us mount.  Options: workers=N, passthrough[=on|off|auto], mode=plain|overlay, "
        "verify=off|open|require, supervise=on|off, allow-other.",
    ),
    click.option("--foreground", is_flag=True, help="Stay, if the image is served over FUSE."),
    click.option("--upperdir", metavar="DIR", help="Directory that gets the changes."),
    click.option("--workdir", metavar="DIR", help="Empty directory on the same file system."),
    click.option("--read-write", is_flag=True, help="Make the mount writable."),
)  # fmt: skip


def mount_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a :class:`~cfs.cli.fuse_options.FuseCommand` the options of mounts.

    The function gets what they say as ``request``, and ``foreground`` as it is.

    Raises:
        click.UsageError: they contradict each other.
    """

    @functools.wraps(function)
    def run(
        *,
        fuse: str | None,
        upperdir: str | None,
        workdir: str | None,
        read_write: bool,
        **more: object,
    ) -> None:
        function(request=parse_request(fuse, upperdir, workdir, read_write=read_write), **more)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


def parse_request(
    fuse: str | None, upperdir: str | None, workdir: str | None, *, read_write: bool
) -> MountRequest:
    """Return what the options of mounts say.

    Raises:
        click.UsageError: they contradict each other.
    """
    try:
        wish, choices = parse_wish(fuse)
        return MountRequest(
            wish=wish, choices=choices, upperdir=upperdir, workdir=workdir, read_write=read_write
        )
    except InvalidRequestError as error:
        raise click.UsageError(str(error), click.get_current_context()) from None


def mount_stored(
    ctx: click.Context,
    find: Callable[["Repository"], str],
    mountpoint: str,
    request: MountRequest,
    *,
    foreground: bool,
) -> None:
    """Mount an image of the store; stay as long as it is served if that was asked for.

    Args:
        ctx: of the running command.
        find: returns the image's name, given the store.
        mountpoint: existing directory.
        request: how to mount.
        foreground: serve in this process.

    Raises:
        CfsError: as :func:`cfs.mounting.image.mount_image`, or of ``find``.
        OSError: likewise.
    """
    from cfs.cli.runtime import records_directory
    from cfs.mounting.image import mount_image

    with open_store(ctx) as repository:
        served = mount_image(
            repository, find(repository), mountpoint, request,
            records=records_directory(), background=not foreground,
        )  # fmt: skip
    if served is None:
        return
    if not foreground:
        served.leave()
        return
    from cfs.fuse import serve_foreground

    ctx.exit(serve_foreground(served))
