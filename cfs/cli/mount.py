"""``cfsctl mount``: mount an image of the store (spec cli-and-varlink a.8, c.6)."""

import click

from cfs.cli.fuse_options import FuseCommand
from cfs.cli.mount_options import mount_options, mount_stored
from cfs.mounting.choice import MountRequest

__all__ = ["mount"]


@click.command(cls=FuseCommand)
@mount_options
@click.argument("image")
@click.argument("mountpoint")
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    *,
    image: str,
    mountpoint: str,
    request: MountRequest,
    foreground: bool,
) -> None:
    """Mount IMAGE, an id or a name, on the directory MOUNTPOINT."""
    mount_stored(ctx, lambda _: image, mountpoint, request, foreground=foreground)
