"""Groups of commands whose modules are imported when a command runs, so that help is quick."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from cfs.cli.strict import check_repetitions
from cfs.compat import override

__all__ = ["Entry", "LazyGroup", "show_help"]


class Entry(NamedTuple):
    """Where a command is, below ``cfs.cli``, and what help says of it."""

    module: str
    name: str
    help: str
    is_hidden: bool = False


class LazyGroup(click.Group):
    """A group over a table of commands; ``-h`` is help, and no option may be given twice."""

    def __init__(self, *arguments: Any, entries: Mapping[str, Entry], **more: Any) -> None:
        """As :class:`click.Group`, with the table of its commands."""
        super().__init__(*arguments, **more)
        self._entries = entries

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Name the commands that help shows."""
        return [name for name, entry in self._entries.items() if not entry.is_hidden]

    def summary(self, name: str) -> str:
        """Return what help says of a command, in a few words."""
        return self._entries[name].help

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"cfs.cli.{entry.module}"), entry.name)
        assert isinstance(command, click.Command)
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self._entries[name].help) for name in self.list_commands(ctx)]
            )

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once the options were counted."""
        ctx.help_option_names = ["-h", "--help"]
        check_repetitions(self, ctx, args)
        return super().parse_args(ctx, args)


@click.command(add_help_option=False)
@click.argument("command", nargs=-1)
@click.pass_context
def show_help(ctx: click.Context, /, command: tuple[str, ...]) -> None:
    """Print help, of a command if one is named."""
    parent = ctx.parent
    assert parent is not None
    found: click.Command | None = parent.command
    for word in command:
        group = found
        assert group is not None
        found = group.get_command(parent, word) if isinstance(group, click.Group) else None
        if found is None:
            msg = f"no such command {' '.join(command)!r}"
            raise click.UsageError(msg, ctx.parent)
        parent = click.Context(found, parent, word)
    assert found is not None
    click.echo(found.get_help(parent))
