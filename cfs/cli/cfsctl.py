"""``cfsctl``: global options and commands (spec cli-and-varlink a.2, a.3).

A command's module is imported when the command runs, so that help is quick.
"""

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import click

from cfs import __version__
from cfs.cli.report import run_reporting
from cfs.cli.strict import GlobalOptions, check_repetitions
from cfs.compat import override
from cfs.digest import Algorithm
from cfs.errors import UnsupportedError

__all__ = ["cfsctl", "run"]

_USAGE_STATUS = 2


class _Entry(NamedTuple):
    """Where a command is and what help says of it."""

    module: str
    name: str
    help: str
    is_hidden: bool = False


_COMMANDS = {
    "init": _Entry("repository", "init", "Make a store"),
    "transaction": _Entry("repository", "transaction", "Keep the store open until a signal"),
    "cat": _Entry("repository", "cat", "Print a stream"),
    "gc": _Entry("collect", "gc", "Remove what no name needs"),
    "fsck": _Entry("collect", "fsck", "Check the store"),
    "create-image": _Entry("image", "create_image", "Store a directory as an image"),
    "import-image": _Entry("images", "import_image", "Store an image file from stdin"),
    "images": _Entry("images", "images", "List the named images"),
    "list-images": _Entry("images", "images", "", is_hidden=True),
    "image-objects": _Entry("images", "image_objects", "List the objects that an image needs"),
    "dump-files": _Entry("images", "dump_files", "Print files of an image as dumpfile lines"),
    "compute-karg": _Entry("image", "compute_karg", "Print the kernel argument of a directory"),
    "mount": _Entry("mount", "mount", "Mount an image of the store"),
    "ps": _Entry("mounts", "ps", "List the FUSE mounts"),
    "umount": _Entry("mounts", "umount", "Unmount FUSE mounts"),
    "compute-id": _Entry("image", "compute_id", "Print the digest of a directory's image"),
    "create-dumpfile": _Entry("image", "create_dumpfile", "Print a directory as a dumpfile"),
    "fuse-serve": _Entry("serve", "fuse_serve", "Serve an image over FUSE"),
    "help": _Entry("cfsctl", "show_help", "Print help of a command"),
    "fetch": _Entry("cfsctl", "fetch", "", is_hidden=True),
    "ostree": _Entry("cfsctl", "ostree", "", is_hidden=True),
    "mkcomposefs": _Entry("cfsctl", "mkcomposefs", "", is_hidden=True),
    "composefs-info": _Entry("cfsctl", "composefs_info", "", is_hidden=True),
}


class _LazyGroup(click.Group):
    """The group over the table of commands."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Name the commands that help shows."""
        return [name for name, entry in _COMMANDS.items() if not entry.is_hidden]

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"cfs.cli.{entry.module}"), entry.name)
        assert isinstance(command, click.Command)
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name].help) for name in self.list_commands(ctx)])

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once the options were counted."""
        check_repetitions(self, ctx, args)
        return super().parse_args(ctx, args)


@click.group(
    cls=_LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
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
) -> None:
    """Make, keep and serve composefs images."""
    given = {"--repo": repo is not None, "--user": user, "--system": system}
    selectors = [option for option, is_given in given.items() if is_given]
    if len(selectors) > 1:
        msg = f"{selectors[0]} cannot be used with {selectors[1]}"
        raise click.UsageError(msg, ctx)
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
    )


@click.command(add_help_option=False)
@click.argument("command", nargs=-1)
@click.pass_context
def show_help(ctx: click.Context, /, command: tuple[str, ...]) -> None:
    """Print help, of a command if one is named."""
    group = ctx.parent
    assert group is not None
    if not command:
        click.echo(cfsctl.get_help(group))
        return
    found = cfsctl.get_command(group, command[0])
    if found is None or len(command) > 1:
        msg = f"no such command {' '.join(command)!r}"
        raise click.UsageError(msg, group)
    click.echo(found.get_help(click.Context(found, group, command[0])))


_OPAQUE = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED)


@click.command(add_help_option=False, context_settings=_OPAQUE)
@_WORDS
@click.pass_context
def mkcomposefs(ctx: click.Context, /, words: tuple[str, ...]) -> None:
    """Run the C-compatible tool."""
    ctx.exit(importlib.import_module("cfs.cli.mkcomposefs").run(words))


@click.command(add_help_option=False, context_settings=_OPAQUE)
@_WORDS
@click.pass_context
def composefs_info(ctx: click.Context, /, words: tuple[str, ...]) -> None:
    """Run the C-compatible tool."""
    ctx.exit(importlib.import_module("cfs.cli.composefs_info").run(words))


@click.command(add_help_option=False, context_settings=_OPAQUE)
@_WORDS
def ostree(words: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever they are
    """Refuse: ostree is not part of cfs."""
    msg = "ostree commands are not supported by cfs"
    raise UnsupportedError(msg)


@click.command(add_help_option=False, context_settings=_OPAQUE)
@_WORDS
def fetch(words: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever they are
    """Refuse: fetching over HTTP is not part of cfs."""
    msg = "fetch is not supported by cfs"
    raise UnsupportedError(msg)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its status."""
    return run_reporting("Error", lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
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
