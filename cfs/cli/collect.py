"""``cfsctl gc`` and ``fsck`` (spec cli-and-varlink a.5, a.10, c.7)."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cfs.cli.output import print_json
from cfs.cli.report import escape, fail
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.errors import IntegrityError
from cfs.linux.lock_holders import find_lock_holders

if TYPE_CHECKING:
    from cfs.repository.fsck import Report
    from cfs.repository.gc import Collection

__all__ = ["conclude", "ended_by_interrupt", "fsck", "gc", "print_collection", "print_report"]


@click.command(cls=StrictCommand)
@click.option("-r", "--root", "roots", multiple=True, metavar="NAME", help="Keep this, too.")
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option("--remove-broken", is_flag=True, help="Remove names that lead to nothing usable.")
@click.option("--no-wait", is_flag=True, help="Fail if somebody else uses the store.")
@click.pass_context
def gc(
    ctx: click.Context,
    /,
    roots: tuple[str, ...],
    dry_run: bool,
    remove_broken: bool,
    no_wait: bool,
) -> None:
    """Remove what no name needs."""
    from cfs.repository.gc import collect

    if dry_run and remove_broken:
        msg = "--remove-broken cannot be used with --dry-run"
        raise click.UsageError(msg, ctx)
    with open_store(ctx, write=not dry_run, wait=not no_wait) as repository:
        collection = collect(
            repository,
            [os.fsencode(name) for name in roots],
            dry_run=dry_run,
            remove_broken=remove_broken,
            wait=not no_wait,
            on_wait=lambda: click.echo(_describe_wait(repository.fd), err=True),
        )
    print_collection(collection, dry_run=dry_run)
    _print_problems(collection)
    if collection.problems:
        ctx.exit(1)


def print_collection(collection: "Collection", *, dry_run: bool) -> None:
    """Print what a collection did or would do."""
    if dry_run:
        click.echo("Dry run (no files deleted):")
    click.echo(f"Objects: {collection.nr_objects} removed ({collection.size} bytes)")
    if any(collection.nr_links.values()):
        counts = [f"{number} {category}" for category, number in collection.nr_links.items()]
        click.echo(f"Pruned symlinks: {', '.join(counts)}")


def _print_problems(collection: "Collection") -> None:
    for problem in collection.problems:
        fail("Error", escape(str(problem)))
    if not collection.is_complete:
        fail("Error", "no object was removed: what these names need is not known")
    if any(problem.link for problem in collection.problems):
        click.echo("Hint: gc --remove-broken removes names that are of no use", err=True)


def _describe_wait(fd: int) -> str:
    """Return what a collection waits for, with names if they can be found."""
    names = []
    for pid in find_lock_holders(fd):
        try:
            name = Path(f"/proc/{pid}/comm").read_text(errors="backslashreplace").strip()
        except OSError:
            continue
        names.append(f"{escape(name)} (pid {pid})")
    return "Waiting until nobody else uses the store" + (f": {', '.join(names)}" if names else "")


@click.command(cls=StrictCommand)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.option("--metadata-only", is_flag=True, help="Leave out the contents of objects.")
@click.pass_context
def fsck(ctx: click.Context, /, is_json: bool, metadata_only: bool) -> None:
    """Check the store."""
    from cfs.repository.fsck import check

    with open_store(ctx) as repository, ended_by_interrupt():
        report = check(repository, metadata_only=metadata_only)
    conclude(report, is_json=is_json)


def conclude(report: "Report", *, is_json: bool) -> None:
    """Print what a check of a store has found.

    Raises:
        IntegrityError: findings, unless as JSON.
    """
    if is_json:
        print_json(report.as_dict())
        return
    print_report(report)
    if not report.is_ok:
        msg = "repository integrity check failed"
        raise IntegrityError(msg)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once.

    The threads that digest hear of no exception, and a sparse object keeps them busy for days.
    There is nothing to clean up.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored: started in the background
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_report(report: "Report") -> None:
    """Print what a check of a store has found (spec cli-and-varlink a.10)."""
    is_sound = not any(error.startswith("fsck: metadata-") for error in report.errors)
    click.echo(f"meta.json: {'ok' if is_sound else 'error'}")
    for category, checked, corrupted in (
        ("objects", report.objects_checked, report.objects_corrupted),
        ("streams", report.streams_checked, report.streams_corrupted),
        ("images", report.images_checked, report.images_corrupted),
    ):
        click.echo(f"{category}: {checked - corrupted}/{checked} ok")
    if report.broken_links:
        click.echo(f"broken symlinks: {report.broken_links}")
    if report.missing_objects:
        click.echo(f"missing objects: {report.missing_objects}")
    click.echo("status: ok" if report.is_ok else f"status: {len(report.errors)} error(s)")
    for error in report.errors:
        click.echo(f"  - {escape(error)}")
