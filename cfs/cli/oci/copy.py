"""``cfsctl oci copy``: copy an image from another store (spec cli-and-varlink a.6)."""

from typing import TYPE_CHECKING

import click

from cfs.cli.oci.references import parsed_by
from cfs.cli.report import escape
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import explaining
from cfs.oci.reference import Reference

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = ["copy", "open_source", "print_copied"]


@click.command(cls=StrictCommand)
@click.option("--from", "source", metavar="PATH", required=True, help="Store to copy from.")
@click.option("--name", metavar="TAG", help="Tag that the image gets here.")
@click.option(
    "--zerocopy", is_flag=True,
    help="Share the objects with the other store, by reflink or hard link; fail if that cannot be.",
)  # fmt: skip
@click.argument("image", callback=parsed_by(Reference.parse))
@click.pass_context
def copy(
    ctx: click.Context, /, *, image: Reference, source: str, name: str | None, zerocopy: bool
) -> None:
    """Copy IMAGE, a tag or @DIGEST of a manifest, from another store into this one."""
    from cfs.oci.copy import copy_image

    with open_store(ctx, write=True) as target, open_source(ctx, source) as origin:
        copied = copy_image(origin, target, image, name=name, zerocopy=zerocopy)
    manifest = (copied.manifest_digest, copied.manifest_stream)
    config = (copied.config_digest, copied.config_stream)
    print_copied(image, source, name, (*manifest, *config))


def print_copied(
    image: Reference, source: str, name: str | None, ids: "tuple[str, object, str, object]"
) -> None:
    """Print what was copied; ``ids``: digest and stream of the manifest, then of the config."""
    tagged = "" if name is None else f", tagged as {escape(name)}"
    shown = f"@{image.digest}" if image.tag is None else image.tag
    click.echo(f"Copied image {escape(shown)} from {escape(source)} to destination repo{tagged}")
    manifest_digest, manifest_stream, config_digest, config_stream = ids
    click.echo(f"Manifest digest: {escape(str(manifest_digest))}")
    click.echo(f"Manifest verity: {escape(str(manifest_stream))}")
    click.echo(f"Config digest:   {escape(str(config_digest))}")
    click.echo(f"Config verity:   {escape(str(config_stream))}")


def open_source(ctx: click.Context, path: str) -> "Repository":
    """Open the store to copy from; ``--hash`` and the like are about the other one."""
    from cfs.repository.repository import Repository

    options = find_global_options(ctx)
    with explaining(f"opening source repository {path}"):
        return Repository.open(path, upgrade=options.upgrade, insecure=options.insecure)
