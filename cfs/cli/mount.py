"""``cfsctl mount``: mount an image of the store (spec cli-and-varlink a.8, c.6)."""

import os

import click

from cfs.cli.fuse_options import FuseCommand, parse_wish
from cfs.cli.store import open_store
from cfs.errors import InvalidRequestError
from cfs.mounting.choice import MountRequest

__all__ = ["mount"]


@click.command(cls=FuseCommand)
@click.option(
    "--fuse", metavar="[auto|yes|no][,OPTION...]",
    help="Whether to serve over FUSE; alone it means yes, by default it depends on whether the "
    "kernel lets us mount.  Options: workers=N, passthrough[=on|off|auto], mode=plain|overlay, "
    "verify=off|open|require, supervise=on|off, allow-other.",
)  # fmt: skip
@click.option("--foreground", is_flag=True, help="Stay, if the image is served over FUSE.")
@click.option("--upperdir", metavar="DIR", help="Directory that gets the changes.")
@click.option("--workdir", metavar="DIR", help="Empty directory on the same file system.")
@click.option("--read-write", is_flag=True, help="Make the mount writable.")
@click.argument("image")
@click.argument("mountpoint")
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    *,
    image: str,
    mountpoint: str,
    fuse: str | None,
    foreground: bool,
    upperdir: str | None,
    workdir: str | None,
    read_write: bool,
) -> None:
    """Mount IMAGE, an id or a name, on the directory MOUNTPOINT."""
    try:
        wish, choices = parse_wish(fuse)
        request = MountRequest(
            wish=wish, choices=choices, upperdir=upperdir, workdir=workdir, read_write=read_write
        )
    except InvalidRequestError as error:
        raise click.UsageError(str(error), ctx) from None
    from cfs.cli.runtime import records_directory
    from cfs.mounting.image import mount_image

    with open_store(ctx) as repository:
        served = mount_image(
            repository, image, mountpoint, request,
            records=records_directory(), background=not foreground,
        )  # fmt: skip
    if served is None:
        return
    if not foreground:
        served.leave()
        return
    from cfs.fuse import serve_foreground

    ctx.exit(serve_foreground(served, notify_socket=os.environ.get("NOTIFY_SOCKET")))
