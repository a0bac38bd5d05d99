"""``cfsctl fuse-serve``: serve an image file over FUSE (spec cli-and-varlink c.7)."""

import os

import click

from cfs.cli.fuse_options import FuseOptions, check_supported, parse_items
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import InvalidRequestError, UnsupportedError

__all__ = ["fuse_serve"]

_GRACE_SECONDS_MAX = 86_400


def _parse_option(
    ctx: click.Context, param: click.Parameter, words: tuple[str, ...]
) -> FuseOptions:
    try:
        return parse_items(words)
    except InvalidRequestError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _parse_grace(ctx: click.Context, param: click.Parameter, seconds: float) -> float:
    if not 0 <= seconds <= _GRACE_SECONDS_MAX:  # nan is neither
        msg = f"{seconds} is not a number of seconds from 0 to {_GRACE_SECONDS_MAX}"
        raise click.BadParameter(msg, ctx, param)
    return seconds


@click.command(cls=StrictCommand)
@click.option(
    "-o", "options", metavar="ITEMS", multiple=True, callback=_parse_option,
    help="FUSE options, separated by commas: allow-other, mode=plain, workers=0, ...",
)  # fmt: skip
@click.option(
    "--basedir", "basedirs", metavar="DIR", multiple=True, help="Directory of objects; repeatable."
)
@click.option("--background", is_flag=True, help="Return when the image is served.")
@click.option("--upperdir", metavar="DIR", help="Upper directory of an overlay.")
@click.option("--workdir", metavar="DIR", help="Work directory of an overlay.")
@click.option("--read-write", is_flag=True, help="Make the overlay writable.")
@click.option(
    "--grace", metavar="SECONDS", type=float, default=1.0, show_default=True, callback=_parse_grace,
    help="Time for those who use the mount when the server is told to end.",
)  # fmt: skip
@click.argument("image")
@click.argument("mountpoint")
@click.pass_context
def fuse_serve(
    ctx: click.Context,
    /,
    *,
    image: str,
    mountpoint: str,
    options: FuseOptions,
    basedirs: tuple[str, ...],
    background: bool,
    upperdir: str | None,
    workdir: str | None,
    read_write: bool,
    grace: float,
) -> None:
    """Serve the file IMAGE at MOUNTPOINT until SIGINT, SIGTERM or umount."""
    if (upperdir is None) != (workdir is None) or (read_write and upperdir is None):
        msg = "--upperdir and --workdir need each other, --read-write needs both"
        raise click.UsageError(msg, ctx)
    check_supported(options)
    if upperdir is not None:
        msg = "--upperdir is not supported yet"
        raise UnsupportedError(msg)
    if find_global_options(ctx).has_repository and not basedirs:
        msg = "objects of a store come with the repository: give --basedir, or --no-repo for none"
        raise UnsupportedError(msg)
    ctx.exit(_serve(image, mountpoint, options, basedirs, background=background, grace=grace))


def _serve(
    image: str,
    mountpoint: str,
    options: FuseOptions,
    basedirs: tuple[str, ...],
    *,
    background: bool,
    grace: float,
) -> int:
    """Mount, then wait unless in the background; return the status."""
    from cfs.erofs import open_image
    from cfs.fuse import serve_foreground, start

    mount = start(
        open_image(image),
        mountpoint,
        basedirs,
        name=image,
        allow_other=options.allow_other,
        background=background,
        grace=grace,
    )
    notify_socket = os.environ.get("NOTIFY_SOCKET")
    if not background:
        return serve_foreground(mount, grace=grace, notify_socket=notify_socket)
    mount.leave()
    return 0
