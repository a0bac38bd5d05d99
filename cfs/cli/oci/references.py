"""Arguments that name images: what is no digest is an error of usage (spec cli-and-varlink a.4)."""

from collections.abc import Callable
from typing import TypeVar

import click

from cfs.errors import InvalidRequestError

__all__ = ["parsed_by"]

_Value = TypeVar("_Value")


def parsed_by(
    parse: Callable[[str], _Value],
) -> Callable[[click.Context, click.Parameter, str | None], _Value | None]:
    """Return the callback of an argument that a function of the library parses.

    ``parsed_by(parse_digest)`` or ``parsed_by(Reference.parse)`` for instance.
    """

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> _Value | None:
        try:
            return None if value is None else parse(value)
        except InvalidRequestError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return convert
