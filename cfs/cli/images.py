"""Images of a store: ``import-image``, ``images``, ``image-objects``, ``dump-files``.

Specification: cli-and-varlink a.5.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from cfs.cli.output import print_json
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.errors import FormatError

__all__ = ["dump_files", "image_objects", "images", "import_image", "print_images"]

_SHORT_DIGEST_SIZE = 12


@click.command(cls=StrictCommand)
@click.argument("name")
@click.pass_context
def import_image(ctx: click.Context, /, name: str) -> None:
    """Store the image file on stdin under NAME."""
    from cfs.erofs.headers import MAX_IMAGE_SIZE
    from cfs.repository import images as stored

    with open_store(ctx, write=True) as repository:
        stored.check_image_name(name)
        data = sys.stdin.buffer.read(MAX_IMAGE_SIZE + 1)
        if len(data) > MAX_IMAGE_SIZE:
            msg = f"stdin: more than {MAX_IMAGE_SIZE} bytes, which no image has"
            raise FormatError(msg)
        digest = stored.import_image(repository, data, name)
    click.echo(f"{digest.algorithm.name.lower()}:{digest}")


@click.command(cls=StrictCommand)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.option("--no-trunc", is_flag=True, help="Print whole digests.")
@click.pass_context
def images(ctx: click.Context, /, is_json: bool, no_trunc: bool) -> None:
    """List the named images."""
    from cfs.repository.images import list_images

    with open_store(ctx) as repository:
        found = list_images(repository)
    print_images([asdict(image) for image in found], is_json=is_json, no_trunc=no_trunc)


def print_images(
    found: Sequence[Mapping[str, str]], *, is_json: bool, no_trunc: bool = False
) -> None:
    """Print named images, each with ``name`` and ``digest``."""
    if is_json:
        print_json({"images": found})
    elif not found:
        click.echo("No images found")
    else:
        from cfs.cli.table import format_table

        size = None if no_trunc else _SHORT_DIGEST_SIZE
        rows = [(each["name"], each["digest"].removeprefix("sha256:")[:size]) for each in found]
        click.echo(format_table(("NAME", "DIGEST"), rows), nl=False)


@click.command(cls=StrictCommand)
@click.argument("name")
@click.pass_context
def image_objects(ctx: click.Context, /, name: str) -> None:
    """List the objects that the image NAME needs."""
    from cfs.repository import images as stored

    with open_store(ctx) as repository:
        digests = stored.image_objects(repository, name)
        prefix = repository.algorithm.name.lower()
    click.echo("".join(f"{prefix}:{digest}\n" for digest in digests), nl=False)


@click.command(cls=StrictCommand)
@click.option("--backing-path-only", is_flag=True, help="Only print where the contents are.")
@click.argument("image")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.pass_context
def dump_files(
    ctx: click.Context, /, image: str, paths: tuple[str, ...], backing_path_only: bool
) -> None:
    """Print files of an image as dumpfile lines, directories with all that is below them."""
    from cfs.dumpfile import format_backing_path, format_file
    from cfs.erofs import View, load_image
    from cfs.repository.images import open_image

    with open_store(ctx) as repository, open_image(repository, image) as file:
        vector = load_image(file.fd, image, view=View.TREE)
    lines: list[bytes] = []  # all or nothing
    for path in map(os.fsencode, paths):
        if backing_path_only:
            lines.append(format_backing_path(vector, path))
        else:
            lines.extend(format_file(vector, path))
    sys.stdout.buffer.writelines(lines)
