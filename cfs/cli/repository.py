"""``cfsctl init``, ``transaction`` and ``cat`` (spec cli-and-varlink a.5)."""

import signal
import sys
from typing import TYPE_CHECKING

import click

from cfs.cli.report import escape
from cfs.cli.store import open_store, store_path
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import InvalidRequestError

if TYPE_CHECKING:
    from cfs.repository.repository import Outcome

__all__ = ["cat", "init", "print_outcome", "transaction"]

_ALGORITHMS = ["fsverity-sha256-12", "fsverity-sha512-12"]
_DEFAULT_EROFS_VERSION = 1


@click.command(cls=StrictCommand)
@click.argument("path", required=False)
@click.option(
    "--algorithm",
    type=click.Choice(_ALGORITHMS),
    default="fsverity-sha512-12",
    show_default=True,
    help="Hash that names objects.",
)
@click.option("--insecure", is_flag=True, help="Do not demand fs-verity.")
@click.option("--ensure", is_flag=True, help="Leave a store of the same hash as it is.")
@click.option("--reset-metadata", is_flag=True, help="Remove all names; objects stay.")
@click.option("--erofs-version", type=click.Choice(["0", "1", "2"]), help="Format of images.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    path: str | None,
    *,
    algorithm: str,
    insecure: bool,
    ensure: bool,
    reset_metadata: bool,
    erofs_version: str | None,
) -> None:
    """Make a store at PATH, or where the global options say."""
    from cfs.repository.metadata import format_algorithm, parse_algorithm
    from cfs.repository.repository import init as make_store

    options = find_global_options(ctx)
    hash_number = parse_algorithm(algorithm)
    if options.algorithm not in (None, hash_number):
        msg = f"--hash contradicts --algorithm {algorithm}"
        raise InvalidRequestError(msg)
    where = store_path(options) if path is None else path
    version = options.erofs_version if erofs_version is None else int(erofs_version)
    result = make_store(
        where,
        algorithm=hash_number,
        is_secure=not (insecure or options.insecure),
        erofs_version=_DEFAULT_EROFS_VERSION if version is None else version,
        ensure=ensure,
        reset=reset_metadata,
    )
    print_outcome(
        result.outcome, where, format_algorithm(result.algorithm), is_secure=result.is_secure
    )


def print_outcome(outcome: "Outcome", where: str, algorithm: str, *, is_secure: bool) -> None:
    """Print what making a store came to."""
    from cfs.repository.repository import Outcome

    shown = escape(where)
    match outcome:
        case Outcome.CREATED:
            verity = "required" if is_secure else "not required (insecure)"
            print(f"Initialized composefs repository at {shown}")
            print(f"  algorithm: {algorithm}")
            print(f"  verity:    {verity}")
        case Outcome.EXISTED:
            print(f"Repository already initialized at {shown}")
        case Outcome.PRESERVED:
            print(f"Repository already initialized at {shown} (existing configuration preserved)")
        case Outcome.UPGRADED:
            print(f"Upgraded legacy repository at {shown}")


@click.command(cls=StrictCommand)
@click.pass_context
def transaction(ctx: click.Context, /) -> None:
    """Keep the store open, so that nothing is collected, until a signal ends it."""
    with open_store(ctx):
        while True:
            signal.pause()


@click.command(cls=StrictCommand)
@click.argument("name")
@click.pass_context
def cat(ctx: click.Context, /, name: str) -> None:
    """Print what the stream NAME holds: a content identifier or refs/NAME."""
    from cfs.repository.streams import open_stream

    with open_store(ctx) as repository, open_stream(repository, name) as stream:
        for data in stream.contents(repository.objects):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
