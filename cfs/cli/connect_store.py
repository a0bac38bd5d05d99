"""Commands about stores with ``--connect``."""

import os
from dataclasses import asdict

import click

from cfs.cli.collect import conclude, print_collection
from cfs.cli.connect import connected, opened_store, refuse_options
from cfs.cli.images import print_images
from cfs.cli.report import escape
from cfs.cli.repository import print_outcome
from cfs.cli.strict import find_global_options
from cfs.client.repository import (
    EnsureRepository,
    EnsureStatus,
    Fsck,
    Gc,
    ImageObjects,
    InitRepository,
    ListImageRefs,
)
from cfs.errors import InvalidRequestError
from cfs.repository.findings import Report
from cfs.repository.repository import Outcome

__all__ = ["fsck", "gc", "image_objects", "images", "init"]

_OUTCOMES = {
    EnsureStatus.CREATED: Outcome.CREATED,
    EnsureStatus.OPENED: Outcome.PRESERVED,
    EnsureStatus.UPGRADED: Outcome.UPGRADED,
}


def init(
    ctx: click.Context,
    *,
    path: str | None,
    algorithm: str,
    insecure: bool,
    ensure: bool,
    reset_metadata: bool,
    erofs_version: str | None,
) -> None:
    """Have a store made."""
    options = find_global_options(ctx)
    refuse_options(
        ctx,
        {"--reset-metadata": reset_metadata, "--erofs-version": erofs_version is not None},
    )
    if path is None:
        msg = "--connect needs the PATH of the store"
        raise click.UsageError(msg, ctx)
    if options.algorithm is not None and options.algorithm.name.lower() not in algorithm:
        msg = f"--hash contradicts --algorithm {algorithm}"
        raise InvalidRequestError(msg)
    is_insecure = insecure or options.insecure
    place = os.path.join(os.getcwd(), path)  # the service works elsewhere
    with connected(ctx) as client:
        if ensure:
            call = EnsureRepository(place, algorithm, is_insecure)
            outcome = _OUTCOMES[client.call(call).status]
        else:
            created = client.call(InitRepository(place, algorithm, is_insecure)).created
            outcome = Outcome.CREATED if created else Outcome.EXISTED
    print_outcome(outcome, path, algorithm, is_secure=not is_insecure)


def gc(
    ctx: click.Context, *, roots: tuple[str, ...], dry_run: bool, remove_broken: bool, no_wait: bool
) -> None:
    """Have removed what no name needs."""
    from cfs.repository.gc import Collection

    refuse_options(ctx, {"--remove-broken": remove_broken, "--no-wait": no_wait})
    with opened_store(ctx) as (client, handle):
        result = client.call(Gc(handle, dry_run=dry_run, roots=roots)).result
    links = {"images": result.images_pruned, "streams": result.streams_pruned}
    collection = Collection(
        nr_objects=result.objects_removed, size=result.objects_bytes, nr_links=links
    )
    print_collection(collection, dry_run=dry_run)


def fsck(ctx: click.Context, *, is_json: bool, metadata_only: bool) -> None:
    """Have the store checked."""
    with opened_store(ctx) as (client, handle):
        reply = client.call(Fsck(handle, metadata_only))
    found = asdict(reply)
    del found["ok"]
    conclude(Report(**found), is_json=is_json)


def images(ctx: click.Context, *, is_json: bool, no_trunc: bool) -> None:
    """List the named images."""
    with opened_store(ctx) as (client, handle):
        found = client.call(ListImageRefs(handle)).images
    print_images(
        sorted((asdict(image) for image in found), key=lambda image: image["name"]),
        is_json=is_json,
        no_trunc=no_trunc,
    )


def image_objects(ctx: click.Context, *, name: str) -> None:
    """List the objects that an image needs."""
    with opened_store(ctx) as (client, handle):
        digests = client.call(ImageObjects(handle, name)).object_ids
    click.echo("".join(f"{escape(digest)}\n" for digest in digests), nl=False)
