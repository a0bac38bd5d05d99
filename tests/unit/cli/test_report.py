"""Errors in one line."""

import errno

from cfs.cli.report import describe
from cfs.errors import FormatError


def test_a_message_stays_in_its_line_and_short() -> None:
    text = describe(FormatError("begin \x1b[2J\n" + "A" * 3_000_000 + " end"))
    assert text.startswith("begin \\x1b[2J\\nAAA")
    assert text.endswith("AAA end")
    assert text.isprintable()
    assert len(text) < 5000


def test_a_descriptor_is_no_name() -> None:
    assert describe(IsADirectoryError(errno.EISDIR, "Is a directory", 3)) == "Is a directory"
