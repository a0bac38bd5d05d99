"""``cfsctl ps`` and ``umount``: the FUSE mounts of this user, root's: of all."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cfs.cli.report import describe, fail
from cfs.cli.runtime import all_records_directories
from cfs.cli.strict import StrictCommand
from cfs.errors import CfsError

if TYPE_CHECKING:
    from cfs.fuse.dataplane import Statistics
    from cfs.mounting.records import ServedMount

__all__ = ["check_targets", "print_mounts", "ps", "umount"]

_HEADER = ["IMAGE", "MOUNTPOINT", "MODE", "AGE", "REQUESTS"]
_AGE_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"))
_JSON_MODES = {"PLAIN": "Fuse", "OVERLAY": "FuseOverlay"}
_MODES = {mode: name.lower() for name, mode in _JSON_MODES.items()}


@click.command(cls=StrictCommand)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def ps(*, is_json: bool) -> None:
    """List the FUSE mounts that are served: of this user, as root of all users."""
    print_mounts([_describe(mount) for mount in _find_mounts() if mount.is_alive], is_json=is_json)


def print_mounts(mounts: Sequence[Mapping[str, Any]], *, is_json: bool) -> None:
    """Print FUSE mounts, with the members of varlink's ``FuseMount``."""
    if is_json:
        from cfs.cli.output import print_json

        print_json({"mounts": mounts})
    elif not mounts:
        click.echo("No mounts found")
    else:
        from cfs.cli.table import format_table

        click.echo(format_table(_HEADER, [_format_row(mount) for mount in mounts]), nl=False)


@click.command(cls=StrictCommand)
@click.option("-l", "--lazy", is_flag=True, help="Unmount although it is in use.")
@click.option("--all", "is_all", is_flag=True, help="Unmount all that ps lists.")
@click.argument("mountpoints", metavar="[MOUNTPOINT]...", nargs=-1)
@click.pass_context
def umount(
    ctx: click.Context, /, *, lazy: bool, is_all: bool, mountpoints: tuple[str, ...]
) -> None:
    """Unmount FUSE mounts of cfs, and no others."""
    from cfs.mounting.unmounting import select_mount, unmount

    check_targets(ctx, mountpoints, is_all=is_all)
    # what was mounted last may lie upon what was mounted before
    targets = [os.fsdecode(mount.entry.mountpoint) for mount in reversed(_find_mounts())]
    status = 0
    for mountpoint in targets if is_all else mountpoints:
        try:
            unmount(select_mount(_find_mounts(), mountpoint), lazy=lazy)
        except (CfsError, OSError) as error:
            status = fail("Error", describe(error))
    ctx.exit(status)


def check_targets(ctx: click.Context, mountpoints: Sequence[str], *, is_all: bool) -> None:
    """Refuse to unmount nothing, and two things at once.

    Raises:
        click.UsageError: there are neither mount points nor ``--all``, or both.
    """
    if is_all == bool(mountpoints):
        msg = "expected mount points, or --all"
        raise click.UsageError(msg, ctx)


def _find_mounts() -> "list[ServedMount]":
    from cfs.mounting.records import find_mounts

    return find_mounts(all_records_directories())


def _format_row(mount: Mapping[str, Any]) -> list[str]:
    started, requests = mount["started"], mount["requests"]
    return [
        mount["image"],
        mount["mountpoint"] or "-",
        _MODES[mount["mode"]],
        "-" if started is None else _format_age(max(0, int(time.time()) - started)),
        "-" if requests is None else str(requests),
    ]


def _describe(mount: "ServedMount") -> dict[str, object]:
    """Return a ``FuseMount`` of ``org.composefs.Repository``; the id is the kernel's."""
    record = mount.record
    statistics = mount.statistics()
    return {
        "mount_id": mount.entry.mount_id,
        "image": record.image,
        "mountpoint": os.fsdecode(mount.entry.mountpoint),
        "mode": _JSON_MODES[record.mode],
        "passthrough": record.passthrough if statistics is None else statistics.use_passthrough,
        "state": "Serving",
        "owner_uid": record.owner_uid,
        "server_pid": next(iter(mount.running_pids()), record.pid),
        "started": record.started,
        "requests": None if statistics is None else _count_requests(statistics),
        "error": None,
    }


def _count_requests(statistics: "Statistics") -> int:
    return sum(statistics.requests.values())


def _format_age(seconds: int) -> str:
    for size, unit in _AGE_UNITS:
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
