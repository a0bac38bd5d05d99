"""What may stand behind the names of the C-compatible tools, for completion.

The words are those of their help, so that there is no other list of them.
"""

import importlib
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from cfs.cli.completion_names import Candidates
from cfs.cli.main import TOOLS

__all__ = ["complete_tool"]

_LINE = re.compile(r"^ {2}(\S+(?:, \S+)*) {2,}(.+)$", re.MULTILINE)
_IN_BRACKETS = re.compile(r"\[(--\S+=)")


def complete_tool(name: str, before: Sequence[str], current: str) -> Candidates:
    """Return what may stand in place of a word; more than what begins like it.

    Args:
        name: of the tool.
        before: words between the name and this one.
        current: what is typed of it.
    """
    words = _read_help(name)
    options = [each for each in words if each[0].startswith("-")]
    others = [each for each in words if not each[0].startswith("-")]
    nr_arguments = sum(not word.startswith("-") for word in before)
    if name.startswith("mount."):
        if before[-1:] == ["-o"]:
            start = "".join(current.rpartition(",")[:2])
            return Candidates(words=[(start + word, text) for word, text in others])
        is_image = nr_arguments == before.count("-o")
        return Candidates("files" if is_image else "directories", [("-o", "Options of the mount")])
    if current.startswith("-"):
        return Candidates("files" if "=" in current else "nothing", options)
    return Candidates(words=others) if others and not nr_arguments else Candidates("files")


def _read_help(name: str) -> list[tuple[str, str]]:
    """Return the words that the help of a tool explains, with ``=`` if a value follows."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        importlib.import_module(TOOLS[name]).run(["--help"])
    usage = output.getvalue()
    found = [(word, "") for word in _IN_BRACKETS.findall(usage)]
    for names, text in _LINE.findall(usage):
        for word in names.split(", "):
            option, equals, _ = word.partition("=")
            found.append((option + equals, text))
    return found
