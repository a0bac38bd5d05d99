"""``cfsctl fuse-serve``: serve an image file over FUSE (spec cli-and-varlink c.7)."""

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import click

from cfs.cli.fuse_options import parse_items
from cfs.cli.runtime import records_directory
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from cfs.fuse import Mount, ServeOptions

__all__ = ["fuse_serve"]

_GRACE_SECONDS_MAX = 86_400


def _parse_grace(ctx: click.Context, param: click.Parameter, seconds: float) -> float:
    if not 0 <= seconds <= _GRACE_SECONDS_MAX:  # nan is neither
        msg = f"{seconds} is not a number of seconds from 0 to {_GRACE_SECONDS_MAX}"
        raise click.BadParameter(msg, ctx, param)
    return seconds


@click.command(cls=StrictCommand)
@click.option(
    "-o", "items", metavar="ITEMS", multiple=True,
    help="FUSE options, separated by commas: workers=N, passthrough[=on|off|auto], "
    "mode=plain|overlay, verify=off|open|require, supervise=on|off, allow-other.",
)  # fmt: skip
@click.option(
    "--basedir",
    "basedirs",
    metavar="DIR",
    multiple=True,
    help="Directory of objects, instead of the store; repeatable.",
)
@click.option("--background", is_flag=True, help="Return when the image is served.")
@click.option("--upperdir", metavar="DIR", help="Upper directory of an overlay.")
@click.option("--workdir", metavar="DIR", help="Work directory of an overlay.")
@click.option("--read-write", is_flag=True, help="Make the overlay writable.")
@click.option(
    "--grace", metavar="SECONDS", type=float, default=1.0, show_default=True, callback=_parse_grace,
    help="Time for those who use the mount when the server is told to end.",
)  # fmt: skip
@click.option("--stats", "has_stats", is_flag=True, help="Print statistics to stderr at the end.")
@click.argument("image")
@click.argument("mountpoint")
@click.pass_context
def fuse_serve(
    ctx: click.Context,
    /,
    *,
    image: str,
    mountpoint: str,
    items: tuple[str, ...],
    basedirs: tuple[str, ...],
    background: bool,
    upperdir: str | None,
    workdir: str | None,
    read_write: bool,
    grace: float,
    has_stats: bool,
) -> None:
    """Serve the file IMAGE at MOUNTPOINT until SIGINT, SIGTERM or umount.

    SIGUSR1 prints statistics to stderr.
    """
    if has_stats and background:
        msg = "--stats and --background cannot be combined: send SIGUSR1 to the server instead"
        raise click.UsageError(msg, ctx)
    try:
        options = parse_items(items, upperdir=upperdir, workdir=workdir, read_write=read_write)
    except InvalidRequestError as error:
        raise click.UsageError(str(error), ctx) from None
    mount = _start(ctx, image, mountpoint, options, basedirs, background=background, grace=grace)
    if background:
        mount.leave()
        return
    from cfs.fuse import serve_foreground

    status = serve_foreground(mount, grace=grace, report=_print)
    if has_stats:
        _print(mount)
    ctx.exit(status)


def _start(
    ctx: click.Context,
    image: str,
    mountpoint: str,
    options: "ServeOptions",
    basedirs: tuple[str, ...],
    *,
    background: bool,
    grace: float,
) -> "Mount":
    """Mount; objects come from the directories or, if there are none, from the store."""
    from cfs.mounting.serving import serve_file

    with ExitStack() as stack:
        repository = None
        if find_global_options(ctx).has_repository and not basedirs:
            from cfs.cli.store import open_store

            repository = stack.enter_context(open_store(ctx))
        return serve_file(
            image, mountpoint, options, basedirs=basedirs, repository=repository,
            records=records_directory(), background=background, grace=grace,
        )  # fmt: skip


def _print(mount: "Mount") -> None:
    try:
        statistics = mount.statistics()
    except UnsupportedError as error:
        text = str(error)
    else:
        from cfs.fuse.statistics import format_statistics

        text = format_statistics(statistics)
    with suppress(OSError):  # whoever read it has gone: no reason to end
        click.echo(text, err=True)
