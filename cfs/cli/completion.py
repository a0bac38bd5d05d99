"""Completion in shells: ``COMPLETE=SHELL cfsctl`` (spec cli-and-varlink a.1).

Without words it prints the script that the shell loads.  The scripts come back for what may stand
at the end of a line: zsh and fish give the words behind the program's name, the last one as far as
it is typed, and get ``files``, ``directories`` or ``nothing``, what else to offer, and then a line
``WORD<tab>HELP`` for each candidate.  bash gives ``COMP_LINE`` and ``COMP_POINT`` (``complete -C``)
and gets the candidates alone, quoted.

Options and commands are click's; names are those of the store or service that the line is about.
"""

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import click

from cfs.cli.cfsctl import cfsctl
from cfs.cli.completion_names import Candidates, find_names
from cfs.cli.completion_tools import complete_tool
from cfs.cli.connect import with_address
from cfs.cli.group import LazyGroup, show_help
from cfs.cli.main import TOOLS
from cfs.cli.report import run_reporting

__all__ = ["complete", "run"]

_SCRIPTS = {"bash": "cfsctl.bash", "zsh": "_cfsctl", "fish": "cfsctl.fish"}
_USAGE_STATUS = 2
_EXPANDED = frozenset("\"'$`\\!")  # by bash, between quotes
_KINDS = {"DIR": "directories", "PATH": "files", "ADDRESS": "files"}
_ARGUMENT_KINDS = {
    "path": "directories",
    "mountpoint": "directories",
    "fuse-serve image": "files",
    "oci pull image": "files",
}
_STORES = ("repo", "source")  # options that are called PATH, too
_ITEMS: Mapping[str, Sequence[str]] = {"--fuse": ("auto", "yes", "no"), "-o": ()}


@dataclass
class _Line:
    """The words so far.

    Attributes:
        command: that they lead to.
        path: its name, without that of the program.
        values: of options, by name of the parameter.
        arguments: those given.
        pending: option whose value comes next.
        has_options: no ``--`` was seen.
    """

    command: click.Command = cfsctl
    path: str = ""
    values: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    pending: click.Option | None = None
    has_options: bool = True

    def add(self, word: str) -> None:
        """Take one more word."""
        if self.pending is not None:
            self._set(self.pending, word)
            self.pending = None
        elif self.has_options and word.startswith("-") and len(word) > 1:
            self._add_option(word)
        elif isinstance(self.command, click.Group):
            self._descend(word)
        else:
            self.arguments.append(word)

    def _set(self, option: click.Option, value: str) -> None:
        self.values[str(option.name)] = value

    def _add_option(self, word: str) -> None:
        self.has_options = word != "--"
        name, equals, value = word.partition("=")
        option = self.find_option(name)
        if option is None and not word.startswith("--"):  # -oITEMS
            option, equals, value = self.find_option(word[:2]), "=", word[2:]
        if option is None:
            return
        if equals or option.is_flag:
            self._set(option, value)
        elif option.opts[0] != "--fuse":  # its value may be missing, so that it must not follow
            self.pending = option

    def find_option(self, name: str) -> click.Option | None:
        """Return the option of the command with this name."""
        return next((option for option in self.options() if name in option.opts), None)

    def options(self) -> list[click.Option]:
        """Return those of the command that help shows."""
        found = self.command.get_params(click.Context(self.command))
        return [option for option in found if isinstance(option, click.Option)]

    def _descend(self, word: str) -> None:
        assert isinstance(self.command, click.Group)
        found = self.command.get_command(click.Context(self.command), word)
        if found is None:
            self.arguments.append(word)
        else:
            self.command, self.path = found, f"{self.path} {word}".strip()


def run(arguments: Sequence[str]) -> int:
    """Answer a shell that completes, or print its script; return the status."""
    return run_reporting("Error", lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    shell = os.environ["COMPLETE"]
    if shell not in _SCRIPTS:
        shells = ", ".join(_SCRIPTS)
        click.echo(f"error: COMPLETE={shell}: expected one of {shells}", err=True)
        return _USAGE_STATUS
    if "COMP_LINE" in os.environ and shell == "bash":
        _answer_bash(os.environ["COMP_LINE"], os.environ.get("COMP_POINT", ""), arguments)
    elif arguments:
        found = complete(arguments[1:])  # behind "--"
        click.echo(found.kind)
        for word, text in found.words:
            click.echo(f"{word}\t{text}")
    else:
        script = resources.files("cfs.cli") / "completion_scripts" / _SCRIPTS[shell]
        click.echo(script.read_text(encoding="utf-8"), nl=False)
    return 0


def _answer_bash(line: str, point: str, arguments: Sequence[str]) -> None:
    """Print candidates.

    Args:
        line: as it is typed.
        point: number of bytes before the cursor.
        arguments: the command, the part of the word that bash replaces (what follows the last
            ``=`` or ``:``), and the word before.
    """
    encoded = os.fsencode(line)
    before = os.fsdecode(encoded[: int(point)] if point.isdecimal() else encoded)
    words, is_quoted = _split(before)
    replaced = arguments[1] if len(arguments) > 1 else ""
    kept = len(words[-1]) - len(replaced) if words[-1].endswith(replaced) else 0
    program = os.path.basename(words[0])
    for word, _ in complete([program, *words[1:]] if program in TOOLS else words[1:]).words:
        # the shell must not expand, and so run, what others wrote into a name
        if not is_quoted:
            click.echo(shlex.quote(word[kept:]))
        elif _EXPANDED.isdisjoint(word):
            click.echo(word[kept:])


def _split(line: str) -> tuple[list[str], bool]:
    """Return the words of a line, the last one as far as it goes, and whether it is in quotes."""
    for quote in ("", '"', "'"):
        lexer = shlex.shlex(line + quote, posix=True, punctuation_chars=False)
        lexer.whitespace_split = True
        lexer.commenters = ""
        try:
            words = list(lexer)
        except ValueError:  # a quote is open
            continue
        if not quote and line[-1:].isspace():
            words.append("")
        return words or [""], bool(quote)
    return [""], False


def complete(words: Sequence[str]) -> Candidates:
    """Return what may stand in place of the last word; nothing, if the store cannot be read.

    Args:
        words: behind the program's name, that of another tool first; what is typed of the last one.
    """
    *before, current = words or [""]
    if before and before[0] in TOOLS:
        found = complete_tool(before[0], before[1:], current)
    else:
        found = _complete_cfsctl(before, current)
    chosen = [
        (word, " ".join(text.split()))
        for word, text in found.words
        if word.startswith(current) and word.isprintable()
    ]
    return Candidates(found.kind, chosen)


def _complete_cfsctl(before: Sequence[str], current: str) -> Candidates:
    line = _Line()
    root: dict[str, str] = {}
    for word in with_address(before):
        line.add(word)
        if not line.path:
            root = dict(line.values)
    line.values = {**root, **line.values}
    found = _candidates(line, current)
    if not line.path and before[-1:] == ["--connect"]:  # an address or a command
        return Candidates("files" if "/" in current else "nothing", [*found.words, *_addresses()])
    return found


def _candidates(line: _Line, current: str) -> Candidates:
    if line.pending is not None:
        return _complete_value(line.pending, "", current)
    if line.has_options and current.startswith("-"):
        name, equals, value = current.partition("=")
        option = line.find_option(name)
        if equals and option is not None:
            return _complete_value(option, f"{name}=", value)
        shown = [option for option in line.options() if not option.hidden]
        return Candidates(
            words=[(name, option.help or "") for option in shown for name in option.opts]
        )
    if isinstance(line.command, click.Group):
        return Candidates(words=list(_commands(line.command)))
    return _complete_argument(line)


def _commands(group: click.Command) -> Iterator[tuple[str, str]]:
    assert isinstance(group, LazyGroup)
    for name in group.list_commands(click.Context(group)):
        yield name, group.summary(name)


def _complete_value(option: click.Option, prefix: str, value: str) -> Candidates:
    """Return what may be the value of an option, each with a prefix."""
    if option.opts[0] in _ITEMS:
        start, comma, _ = value.rpartition(",")
        items = _fuse_items(() if comma else _ITEMS[option.opts[0]])
        return Candidates(words=[(f"{prefix}{start}{comma}{item}", "") for item in items])
    if isinstance(option.type, click.Choice):
        return Candidates(words=[(f"{prefix}{choice}", "") for choice in option.type.choices])
    if option.type is click.BOOL:
        return Candidates(words=[(f"{prefix}{choice}", "") for choice in ("true", "false")])
    if option.name == "connect":
        return Candidates("files", [(f"{prefix}{word}", text) for word, text in _addresses()])
    kind = "directories" if option.name in _STORES else _KINDS.get(str(option.metavar), "nothing")
    return Candidates(kind)


def _addresses() -> Iterator[tuple[str, str]]:
    """Yield where a service may listen and there is a socket."""
    from cfs.client.address import default_addresses
    from cfs.linux.address import parse_address

    for address in default_addresses():
        if os.path.exists(parse_address(address).name):
            yield address, "Where a service listens"


def _fuse_items(more: Iterable[str]) -> list[str]:
    from cfs.cli.fuse_options import FUSE_KEYS

    values = {"mode": ("plain", "overlay"), "verify": ("open", "require", "off"), "workers": ("",)}
    items = [f"{key}={value}" for key, texts in values.items() for value in texts]
    return [*more, *(key for key in FUSE_KEYS if key not in values), *items]


def _complete_argument(line: _Line) -> Candidates:
    params = [p for p in line.command.params if isinstance(p, click.Argument)]
    if not params:
        return Candidates()
    param = params[min(len(line.arguments), len(params) - 1)]
    if len(line.arguments) >= len(params) and param.nargs == 1:
        return Candidates()
    if line.command is show_help:
        return _complete_help(line)
    name = f"{line.path} {param.name}"
    kind = _ARGUMENT_KINDS.get(name) or _ARGUMENT_KINDS.get(str(param.name), "nothing")
    return Candidates(kind, find_names(name, line.values))


def _complete_help(line: _Line) -> Candidates:
    group = _Line()
    for word in [*line.path.split()[:-1], *line.arguments]:
        group.add(word)
    is_group = isinstance(group.command, click.Group)
    return Candidates(words=list(_commands(group.command)) if is_group else [])
