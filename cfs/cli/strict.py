"""Commands as composefs-rs has them: no option may be given twice (spec cli-and-varlink a.2)."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from cfs.compat import override
from cfs.digest import Algorithm

__all__ = ["GlobalOptions", "StrictCommand", "check_repetitions", "find_global_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalOptions:
    """What stands before the command.

    Attributes:
        algorithm: of ``--hash``, or None.
        erofs_version: of ``--erofs-version``, or None.
        has_repository: False with ``--no-repo``.
        path: of ``--repo``, or None.
        is_user: ``--user`` was given.
        is_system: ``--system`` was given.
        insecure: ``--insecure`` was given.
        require_verity: ``--require-verity`` was given.
        upgrade: False with ``--no-upgrade``.
        connect: address of ``--connect``, empty for the usual ones; None without it.
    """

    algorithm: Algorithm | None
    erofs_version: int | None
    has_repository: bool
    path: str | None
    is_user: bool
    is_system: bool
    insecure: bool
    require_verity: bool
    upgrade: bool
    connect: str | None = None


def find_global_options(ctx: click.Context) -> GlobalOptions:
    """Return the global options of a running command."""
    options = ctx.find_object(GlobalOptions)
    assert options is not None
    return options


def check_repetitions(command: click.Command, ctx: click.Context, args: Sequence[str]) -> None:
    """Refuse options that are given twice and are not made for it.

    Raises:
        click.UsageError: naming the option.
    """
    _, _, order = command.make_parser(ctx).parse_args(args=list(args))
    for param in order:
        if isinstance(param, click.Option) and not param.multiple and order.count(param) > 1:
            msg = f"the option {param.opts[-1]} cannot be given twice"
            raise click.UsageError(msg, ctx)


class StrictCommand(click.Command):
    """A command that refuses repeated options; ``-h`` is help.

    With ``--connect`` it runs as the method of a service that does the same.
    """

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once the options were counted."""
        ctx.help_option_names = ["-h", "--help"]
        check_repetitions(self, ctx, args)
        return super().parse_args(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        """Run, here or in a service."""
        options = ctx.find_object(GlobalOptions)
        if options is None or options.connect is None:
            return super().invoke(ctx)
        find = importlib.import_module("cfs.cli.connect").find_remote
        return find(ctx)(ctx, **ctx.params)
