"""``cfsctl``: global options and commands (spec cli-and-varlink a.2, a.3).

A command's module is imported when the command runs, so that help is quick.
"""

import importlib
import os
from collections.abc import Sequence

import click

from cfs import __version__
from cfs.cli.connect import refuse_options, with_address
from cfs.cli.group import Entry, LazyGroup
from cfs.cli.report import run_reporting
from cfs.cli.strict import GlobalOptions, StrictCommand
from cfs.compat import override
from cfs.digest import Algorithm
from cfs.errors import UnsupportedError

__all__ = ["cfsctl", "run"]

_USAGE_STATUS = 2


_COMMANDS = {
    "init": Entry("repository", "init", "Make a store"),
    "transaction": Entry("repository", "transaction", "Keep the store open until a signal"),
    "cat": Entry("repository", "cat", "Print a stream"),
    "gc": Entry("collect", "gc", "Remove what no name needs"),
    "fsck": Entry("collect", "fsck", "Check the store"),
    "create-image": Entry("image", "create_image", "Store a directory as an image"),
    "import-image": Entry("images", "import_image", "Store an image file from stdin"),
    "images": Entry("images", "images", "List the named images"),
    "list-images": Entry("images", "images", "", is_hidden=True),
    "image-objects": Entry("images", "image_objects", "List the objects that an image needs"),
    "dump-files": Entry("images", "dump_files", "Print files of an image as dumpfile lines"),
    "compute-karg": Entry("image", "compute_karg", "Print the kernel argument of a directory"),
    "mount": Entry("mount", "mount", "Mount an image of the store"),
    "ps": Entry("mounts", "ps", "List the FUSE mounts"),
    "umount": Entry("mounts", "umount", "Unmount FUSE mounts"),
    "compute-id": Entry("image", "compute_id", "Print the digest of a directory's image"),
    "create-dumpfile": Entry("image", "create_dumpfile", "Print a directory as a dumpfile"),
    "fuse-serve": Entry("serve", "fuse_serve", "Serve an image over FUSE"),
    "oci": Entry("oci", "oci", "Pull, inspect and mount OCI images"),
    "varlink": Entry("varlink", "varlink", "Serve stores and images over varlink"),
    "help": Entry("group", "show_help", "Print help of a command"),
    "fetch": Entry("cfsctl", "fetch", "", is_hidden=True),
    "ostree": Entry("cfsctl", "ostree", "", is_hidden=True),
    "mkcomposefs": Entry("cfsctl", "mkcomposefs", "", is_hidden=True),
    "composefs-info": Entry("cfsctl", "composefs_info", "", is_hidden=True),
}


class _Program(LazyGroup):
    """The group, whose option ``--connect`` may have no value."""

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once ``--connect`` has a value."""
        return super().parse_args(ctx, with_address(args))


@click.group(cls=_Program, entries=_COMMANDS, no_args_is_help=False)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.option("--repo", metavar="PATH", help="Store to use.")
@click.option("--user", is_flag=True, help="Use the store of the user.")
@click.option("--system", is_flag=True, help="Use the store of the system.")
@click.option("--hash", "hash_name", type=click.Choice(["sha256", "sha512"]), help="Hash to use.")
@click.option("--erofs-version", type=click.Choice(["0", "1", "2"]), help="Format of images.")
@click.option("--insecure", is_flag=True, hidden=True)
@click.option("--require-verity", is_flag=True, help="Fail unless the store has fs-verity.")
@click.option("--no-upgrade", is_flag=True, help="Do not convert old stores.")
@click.option("--no-repo", is_flag=True, help="Open no store.")
@click.option(
    "--connect", metavar="[ADDRESS]",
    help="Have a varlink service do it, with its store; by default the one of the user or system.",
)  # fmt: skip
@click.pass_context
def cfsctl(
    ctx: click.Context,
    /,
    *,
    hash_name: str | None,
    erofs_version: str | None,
    repo: str | None,
    user: bool,
    system: bool,
    insecure: bool,
    require_verity: bool,
    no_upgrade: bool,
    no_repo: bool,
    connect: str | None,
) -> None:
    """Make, keep and serve composefs images."""
    given = {"--repo": repo is not None, "--user": user, "--system": system}
    selectors = [option for option, is_given in given.items() if is_given]
    if len(selectors) > 1:
        msg = f"{selectors[0]} cannot be used with {selectors[1]}"
        raise click.UsageError(msg, ctx)
    if connect is not None:
        given |= {
            "--erofs-version": erofs_version is not None,
            "--require-verity": require_verity,
            "--no-upgrade": no_upgrade,
            "--no-repo": no_repo,
        }
        refuse_options(ctx, given)
    ctx.obj = GlobalOptions(
        algorithm=None if hash_name is None else Algorithm.parse(hash_name),
        erofs_version=None if erofs_version is None else int(erofs_version),
        has_repository=not no_repo,
        path=repo,
        is_user=user,
        is_system=system,
        insecure=insecure,
        require_verity=require_verity,
        upgrade=not no_upgrade,
        connect=connect,
    )


_OPAQUE = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED)


@click.command(cls=StrictCommand, add_help_option=False, context_settings=_OPAQUE)
@_WORDS
@click.pass_context
def mkcomposefs(ctx: click.Context, /, words: tuple[str, ...]) -> None:
    """Run the C-compatible tool."""
    ctx.exit(importlib.import_module("cfs.cli.mkcomposefs").run(words))


@click.command(cls=StrictCommand, add_help_option=False, context_settings=_OPAQUE)
@_WORDS
@click.pass_context
def composefs_info(ctx: click.Context, /, words: tuple[str, ...]) -> None:
    """Run the C-compatible tool."""
    ctx.exit(importlib.import_module("cfs.cli.composefs_info").run(words))


@click.command(cls=StrictCommand, add_help_option=False, context_settings=_OPAQUE)
@_WORDS
def ostree(words: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever they are
    """Refuse: ostree is not part of cfs."""
    msg = "ostree commands are not supported by cfs"
    raise UnsupportedError(msg)


@click.command(cls=StrictCommand, add_help_option=False, context_settings=_OPAQUE)
@_WORDS
def fetch(words: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever they are
    """Refuse: fetching over HTTP is not part of cfs."""
    msg = "fetch is not supported by cfs"
    raise UnsupportedError(msg)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its status."""
    return run_reporting("Error", lambda: _run(arguments))


def _serve_if_activated() -> bool:
    """Serve varlink if a socket was passed; return False if none was."""
    if "LISTEN_FDS" not in os.environ:
        return False
    from cfs.service.activation import is_activated

    if not is_activated():
        return False
    from cfs.cli.varlink import serve
    from cfs.service.handles import StoreOptions

    serve(StoreOptions())
    return True


def _run(arguments: Sequence[str]) -> int:
    if not arguments and _serve_if_activated():
        return 0
    if not arguments:
        with click.Context(cfsctl, info_name="cfsctl", help_option_names=["-h", "--help"]) as ctx:
            click.echo(cfsctl.get_help(ctx), err=True)
        return _USAGE_STATUS
    try:
        status = cfsctl.main(list(arguments), prog_name="cfsctl", standalone_mode=False)
    except click.UsageError as error:
        return _fail_usage(error)
    except click.Abort:
        raise KeyboardInterrupt from None
    return status if isinstance(status, int) else 0


def _fail_usage(error: click.UsageError) -> int:
    message = error.format_message().replace("\n", " ")
    click.echo(f"error: {message}\n", err=True)
    if error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
    return _USAGE_STATUS
