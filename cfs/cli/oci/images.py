"""Tagged images: ``oci images``, ``inspect``, ``tag``, ``untag``.

Specification: cli-and-varlink a.6, a.9.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from cfs.cli.oci.references import parsed_by
from cfs.cli.output import print_json
from cfs.cli.report import describe, escape
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.oci.reference import Reference, parse_digest

__all__ = [
    "check_document_choice",
    "images",
    "inspect",
    "print_document",
    "print_images",
    "tag",
    "untag",
]

_SHORT_DIGEST_SIZE = 12


@click.command(cls=StrictCommand)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.pass_context
def images(ctx: click.Context, /, is_json: bool) -> None:
    """List the tagged images; one that cannot be read is left out, with a warning."""
    from cfs.oci.listing import list_images

    with open_store(ctx) as repository:
        listing = list_images(repository)
    for name, error in listing.problems:
        click.echo(f"Warning: {escape(name)}: {describe(error)}", err=True)
    print_images([asdict(image) for image in listing.images], is_json=is_json)


def print_images(found: Sequence[Mapping[str, Any]], *, is_json: bool) -> None:
    """Print tagged images, with the members of varlink's ``ImageEntry``."""
    if is_json:
        print_json({"images": found})
    elif not found:
        click.echo("No images found")
    else:
        from cfs.cli.table import format_table

        rows = [
            (
                image["name"],
                image["manifest_digest"].removeprefix("sha256:")[:_SHORT_DIGEST_SIZE],
                image["architecture"] if image["is_container"] else "artifact",
                str(image["layer_count"]),
                str(image["referrer_count"]),
            )
            for image in found
        ]
        header = ("NAME", "DIGEST", "ARCH", "LAYERS", "REFS")
        click.echo(format_table(header, rows), nl=False)


@click.command(cls=StrictCommand)
@click.option("--manifest", "is_manifest", is_flag=True, help="Print only the manifest, as it is.")
@click.option("--config", "is_config", is_flag=True, help="Print only the config, as it is.")
@click.argument("image", callback=parsed_by(Reference.parse))
@click.pass_context
def inspect(ctx: click.Context, /, image: Reference, is_manifest: bool, is_config: bool) -> None:
    """Show manifest and config of IMAGE, a tag or @DIGEST, and the ids of what was made of it."""
    from cfs.oci.listing import inspect_image

    check_document_choice(ctx, is_manifest=is_manifest, is_config=is_config)
    with open_store(ctx) as repository:
        inspection = inspect_image(repository, image)
    if is_manifest or is_config:
        print_document(inspection.manifest if is_manifest else inspection.config)
    else:
        print_json(inspection.as_dict())


def check_document_choice(ctx: click.Context, *, is_manifest: bool, is_config: bool) -> None:
    """Refuse two documents at once.

    Raises:
        click.UsageError: both were asked for.
    """
    if is_manifest and is_config:
        msg = "--manifest cannot be used with --config"
        raise click.UsageError(msg, ctx)


def print_document(document: bytes) -> None:
    """Print a document as it is, and a line feed."""
    sys.stdout.buffer.write(document)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


@click.command(cls=StrictCommand)
@click.argument("digest", callback=parsed_by(parse_digest))
@click.argument("name")
@click.pass_context
def tag(ctx: click.Context, /, digest: str, name: str) -> None:
    """Give the image whose manifest has DIGEST the tag NAME."""
    from cfs.oci.tags import set_tag

    with open_store(ctx, write=True) as repository:
        set_tag(repository, name, digest)
    click.echo(f"Tagged {digest} as {escape(name)}")


@click.command(cls=StrictCommand)
@click.argument("name")
@click.pass_context
def untag(ctx: click.Context, /, name: str) -> None:
    """Remove the tag NAME; what it leads to stays until the next collection."""
    from cfs.oci.tags import remove_tag

    with open_store(ctx, write=True) as repository:
        remove_tag(repository, name)
    click.echo(f"Removed tag {escape(name)}")
