"""Commands about OCI images with ``--connect``."""

from dataclasses import asdict

import click

from cfs.cli.connect import opened_store
from cfs.cli.oci.fsck import print_oci_report
from cfs.cli.oci.images import check_document_choice, print_document, print_images
from cfs.cli.output import print_json
from cfs.cli.report import escape
from cfs.client.oci import Check, ComputeId, Inspect, ListImages, Tag, Untag, XattrFiltering
from cfs.oci.reference import Reference
from cfs.repository.findings import Report

__all__ = ["compute_id", "fsck", "images", "inspect", "tag", "untag"]

_FILTERS = {
    "allowlist-only": XattrFiltering.ALLOWLIST_ONLY,
    "keep-user-xattrs": XattrFiltering.KEEP_USER_XATTRS,
}


def images(ctx: click.Context, *, is_json: bool) -> None:
    """List the tagged images."""
    with opened_store(ctx) as (client, handle):
        found = client.call(ListImages(handle)).images
    print_images([asdict(image) for image in found], is_json=is_json)


def inspect(ctx: click.Context, *, image: Reference, is_manifest: bool, is_config: bool) -> None:
    """Show manifest and config of an image."""
    check_document_choice(ctx, is_manifest=is_manifest, is_config=is_config)
    with opened_store(ctx) as (client, handle):
        found = client.call(Inspect(handle, _show(image)))
    if is_manifest or is_config:
        print_document((found.manifest if is_manifest else found.config).encode())
    else:
        print_json(asdict(found))


def tag(ctx: click.Context, *, digest: str, name: str) -> None:
    """Give an image a name."""
    with opened_store(ctx) as (client, handle):
        client.call(Tag(handle, digest, name))
    click.echo(f"Tagged {digest} as {escape(name)}")


def untag(ctx: click.Context, *, name: str) -> None:
    """Remove a name."""
    with opened_store(ctx) as (client, handle):
        client.call(Untag(handle, name))
    click.echo(f"Removed tag {escape(name)}")


def compute_id(
    ctx: click.Context, *, reference: Reference, stream: str | None, bootable: bool, xattrs: str
) -> None:
    """Print the digest of an image."""
    with opened_store(ctx) as (client, handle):
        call = ComputeId(handle, _show(reference), stream, bootable, _FILTERS[xattrs])
        click.echo(escape(client.call(call).image_id))


def fsck(ctx: click.Context, *, image: str | None, is_json: bool) -> None:
    """Have the store and its images checked."""
    from cfs.oci.fsck import OciReport

    with opened_store(ctx) as (client, handle):
        reply = client.call(Check(handle, image))
    found = asdict(reply.repo)
    del found["ok"]
    report = OciReport(
        Report(**found),
        images_checked=reply.images_checked,
        images_corrupted=reply.images_corrupted,
        errors=reply.errors,
    )
    print_oci_report(report, is_json=is_json)


def _show(reference: Reference) -> str:
    """Return a reference as the methods take it."""
    return f"@{reference.digest}" if reference.tag is None else reference.tag
