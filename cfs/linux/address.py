"""Varlink addresses of unix sockets, for those who listen and those who connect."""

from typing import NamedTuple

from cfs.errors import InvalidRequestError

__all__ = ["SCHEME", "UnixAddress", "parse_address"]

SCHEME = "unix:"


class UnixAddress(NamedTuple):
    """Where a socket is.

    Attributes:
        name: path, or the name of an abstract socket.
        is_abstract: it is such a name.
        options: for whoever listens, as ``mode=0666``.
    """

    name: str
    is_abstract: bool
    options: str


def parse_address(text: str) -> UnixAddress:
    """Parse ``unix:PATH``, ``unix:@NAME``, each with ``;OPTIONS`` behind it, or a path.

    A path with a colon that could be another kind of address needs a slash before it.

    Raises:
        InvalidRequestError: it is none of these.
    """
    scheme, colon, rest = text.partition(":")
    is_address = bool(colon) and scheme.isalnum()
    name, _, options = rest.partition(";") if is_address else (text, "", "")
    is_abstract = is_address and name.startswith("@")
    if is_abstract:
        name = name[1:]
    if not name or "\0" in name or (is_address and f"{scheme}:" != SCHEME):
        msg = f"address {text!r}: expected unix:PATH"
        raise InvalidRequestError(msg)
    return UnixAddress(name, is_abstract, options)
