#!/usr/bin/env python3
"""Makes the manual pages:  packaging/man/build.py DIRECTORY.

Options and arguments come from the programs themselves, interfaces from their descriptions, so
that they are never out of date.  What else there is to say is in ``notes/PAGE``, in troff: what
stands before the first section goes to DESCRIPTION, the rest behind the options.
"""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module, resources
from pathlib import Path

import click

from cfs import __version__
from cfs.cli.cfsctl import cfsctl
from cfs.cli.group import LazyGroup

NOTES = Path(__file__).parent / "notes"
INTERFACES = ("org.composefs.Repository", "org.composefs.Oci")
# program, section, module, words that make it print its usage, summary
TOOLS = (
    ("mkcomposefs", "1", "mkcomposefs", "--help", "make a composefs image"),
    ("composefs-info", "1", "composefs_info", "--help", "print what composefs images hold"),
    ("mount.composefs", "8", "mount_composefs", "-h", "mount a composefs image by the kernel"),
    ("mount.fuse.composefs", "8", "mount_fuse_composefs", "-h", "serve a composefs image by FUSE"),
)
_MANUALS = {"1": "User Commands", "7": "Interfaces", "8": "System Administration"}
_COMMENT = re.compile(r"#(?: (.*))?$")
_GROUPS = {"method": "METHODS", "error": "ERRORS", "type": "TYPES"}


def main() -> int:
    """Write all pages."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and the directory
        sys.stderr.write("usage: build.py DIRECTORY\n")
        return 2
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, section, lines in pages():
        text = "\n".join(lines) + "\n"
        (directory / f"{name}.{section}").write_text(text, encoding="utf-8")
    return 0


def pages() -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, section and lines of each page."""
    for words, command, summary in commands(("cfsctl",), cfsctl, "composefs images and stores"):
        yield "-".join(words), "1", command_page(words, command, summary)
    for name, section, module, option, summary in TOOLS:
        yield name, section, tool_page(name, section, usage_of(module, option), summary)
    for name in INTERFACES:
        yield name, "7", interface_page(name)


def commands(
    name: tuple[str, ...], command: click.Command, summary: str
) -> Iterator[tuple[tuple[str, ...], click.Command, str]]:
    """Yield words, command and summary of a command and of those below."""
    yield name, command, summary
    if isinstance(command, LazyGroup):
        ctx = click.Context(command)
        for word in command.list_commands(ctx):
            found = command.get_command(ctx, word)
            if found is not None and word != "help":
                yield from commands((*name, word), found, command.summary(word))


# ---- troff


def escape(text: str) -> str:
    """Return text that troff prints as it is."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def head(name: str, section: str, summary: str) -> list[str]:
    """Return title and NAME."""
    title = escape(name.upper() if section != "7" else name)
    return [
        f'.TH {title} {section} "" "cfs {__version__}" "{_MANUALS[section]}"',
        ".SH NAME",
        rf"{escape(name)} \- {escape(_begin_small(summary))}",
    ]


def _begin_small(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def entry(term: str, text: str) -> list[str]:
    """Return an item of a list."""
    return [".TP", rf"\fB{escape(term)}\fR", escape(" ".join(text.split()))]


def notes(name: str) -> tuple[list[str], list[str]]:
    """Return what people wrote for DESCRIPTION, and further sections."""
    path = NOTES / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    first = next((i for i, line in enumerate(lines) if line.startswith(".SH ")), len(lines))
    return lines[:first], lines[first:]


# ---- pages


def command_page(name: tuple[str, ...], command: click.Command, summary: str) -> list[str]:
    """Return the page of a command of ``cfsctl``."""
    page = "-".join(name)
    ctx = click.Context(command, info_name=" ".join(name), help_option_names=["-h", "--help"])
    pieces = " ".join(command.collect_usage_pieces(ctx))
    description, sections = notes(page)
    lines = [
        *head(page, "1", summary),
        ".SH SYNOPSIS",
        rf"\fBcfsctl\fR [GLOBAL OPTIONS] \fB{escape(' '.join(name[1:]))}\fR {escape(pieces)}"
        if name[1:]
        else rf"\fBcfsctl\fR {escape(pieces)}",
        ".SH DESCRIPTION",
        *(escape(line) for line in (command.help or "").strip().splitlines()),
        *description,
    ]
    options = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    records = [record for option in options if (record := option.get_help_record(ctx))]
    if records:
        lines.append(".SH OPTIONS")
        for term, text in records:
            lines += entry(term, text)
    if isinstance(command, LazyGroup):
        lines.append(".SH COMMANDS")
        for word in command.list_commands(ctx):
            see = "" if word == "help" else f"; {page}-{word}(1)"
            lines += entry(word, command.summary(word) + see)
    return [*lines, *sections, *(see_also() if name[1:] and not sections else ())]


def see_also() -> list[str]:
    """Return the last section of most pages."""
    return [".SH SEE ALSO", r"\fBcfsctl\fR(1) for the global options, names and exit status"]


def usage_of(module: str, option: str) -> list[str]:
    """Return what a program prints when asked how to use it."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        import_module(f"cfs.cli.{module}").run([option])
    return output.getvalue().splitlines()


def tool_page(name: str, section: str, usage: Sequence[str], summary: str) -> list[str]:
    """Return the page of a program that is not click's, from the text it prints itself."""
    description, sections = notes(name)
    lines = [*head(name, section, summary), ".SH SYNOPSIS"]
    for line in usage:
        if line.startswith(("Usage:", "or:")):
            lines += [escape(line.partition(":")[2].strip()), ".br"]
    lines += [".SH DESCRIPTION", *description]
    for line in usage:
        if line.startswith(("Usage:", "or:")):
            continue
        if not line.startswith(" "):
            lines.append(f".SH {line.rstrip(':').upper()}")
        elif line.startswith("   "):
            lines.append(escape(line.strip()))
        else:
            term, _, text = line.strip().partition("  ")
            lines += entry(term, text) if text else [".TP", rf"\fB{escape(term)}\fR"]
    return [*lines, *sections]


def interface_page(name: str) -> list[str]:
    """Return the page of a varlink interface, from its description."""
    text = (resources.files("cfs.service") / "interfaces" / f"{name}.varlink").read_text("utf-8")
    description, sections = notes(name)
    intro, members = read_interface(text)
    lines = [
        *head(name, "7", intro[0].rstrip(".")),
        ".SH DESCRIPTION",
        *map(paragraph, intro),
        *description,
    ]
    for keyword, title in _GROUPS.items():
        lines.append(f".SH {title}")
        for comments, declaration in members:
            if not declaration[0].startswith(f"{keyword} "):
                continue
            member = re.split(r"[ (]", declaration[0])[1]
            lines += [f".SS {escape(member)}", *map(paragraph, comments)]
            lines += [".PP", ".EX", *map(escape, declaration), ".EE"]
    return [*lines, *sections]


def paragraph(text: str) -> str:
    """Return a paragraph of a comment."""
    return escape(text) if text else ".PP"


def read_interface(text: str) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """Return the comment of an interface, and comment and lines of each member."""
    intro: list[str] = []
    members: list[tuple[list[str], list[str]]] = []
    comments: list[str] = []
    declaration: list[str] = []
    for line in text.splitlines():
        comment = _COMMENT.match(line)
        if declaration or line.startswith(tuple(f"{keyword} " for keyword in _GROUPS)):
            declaration.append(line)
            code = "\n".join(part.partition("#")[0] for part in declaration)
            if code.count("(") == code.count(")"):
                members.append((comments, declaration))
                comments, declaration = [], []
        elif comment:
            comments.append(comment[1] or "")
        elif line.startswith("interface "):
            intro, comments = comments, []
        elif not line:
            comments = []
    return intro, members


if __name__ == "__main__":
    sys.exit(main())
