"""``cfsctl oci fsck`` (spec cli-and-varlink a.6, a.10)."""

from typing import TYPE_CHECKING

import click

from cfs.cli.collect import ended_by_interrupt, print_report
from cfs.cli.output import print_json
from cfs.cli.report import escape
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.errors import IntegrityError

if TYPE_CHECKING:
    from cfs.oci.fsck import OciReport

__all__ = ["fsck", "print_oci_report"]


@click.command(cls=StrictCommand)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.argument("image", required=False)
@click.pass_context
def fsck(ctx: click.Context, /, image: str | None, is_json: bool) -> None:
    """Check the store and all its images, or only the one with the tag IMAGE."""
    from cfs.oci.fsck import check_images

    with open_store(ctx) as repository, ended_by_interrupt():
        report = check_images(repository, image)
    print_oci_report(report, is_json=is_json)


def print_oci_report(report: "OciReport", *, is_json: bool) -> None:
    """Print what a check has found.

    Raises:
        IntegrityError: findings, unless as JSON.
    """
    if is_json:
        print_json(report.as_dict())
        return
    print_report(report.repo)
    nr_sound = report.images_checked - report.images_corrupted
    click.echo(f"oci images: {nr_sound}/{report.images_checked} ok")
    if report.errors:
        click.echo(f"oci errors: {len(report.errors)}")
    for error in report.errors:
        click.echo(f"  - {escape(error)}")
    if not report.is_ok:
        msg = "OCI integrity check failed"
        raise IntegrityError(msg)
