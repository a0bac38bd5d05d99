"""``cfsctl oci mount``: mount an OCI image of the store (spec cli-and-varlink a.6, a.8, c.6)."""

import click

from cfs.cli.fuse_options import FuseCommand
from cfs.cli.mount_options import mount_options, mount_stored
from cfs.mounting.choice import MountRequest
from cfs.repository.repository import Repository

__all__ = ["mount"]


@click.command(cls=FuseCommand)
@click.option("--bootable", is_flag=True, help="Mount what pull --bootable has made of it.")
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
    bootable: bool,
    request: MountRequest,
    foreground: bool,
) -> None:
    """Mount IMAGE, a tag or the digest of a manifest, on the directory MOUNTPOINT."""
    from cfs.oci.mountable import find_mountable

    def find(repository: Repository) -> str:
        return str(find_mountable(repository, image, boot=bootable))

    mount_stored(ctx, find, mountpoint, request, foreground=foreground)
