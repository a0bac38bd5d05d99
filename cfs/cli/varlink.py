"""``cfsctl varlink`` and ``cfsctl oci varlink``: the service (spec cli-and-varlink b.1)."""

import logging
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from cfs.cli.runtime import records_directory
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import InvalidRequestError
from cfs.service.activation import STORED_PREFIX, Passed, find_socket, take_passed
from cfs.service.listening import DEFAULT_MODE

if TYPE_CHECKING:
    from cfs.service.handles import StoreOptions

__all__ = ["serve", "varlink"]

_MAX_MODE = 0o777


def _read_mode(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    """Read permission bits in octal digits.

    Raises:
        click.BadParameter: they are none.
    """
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= _MAX_MODE:
        msg = f"{value!r} is no mode of a file such as 0600"
        raise click.BadParameter(msg)
    return mode


@click.command(cls=StrictCommand)
@click.option("--address", metavar="PATH", help="Make a socket there: a path, or unix:PATH.")
@click.option(
    "--socket-mode",
    metavar="MODE",
    default=f"{DEFAULT_MODE:04o}",
    show_default=True,
    callback=_read_mode,
    help="Permissions of the socket, in octal digits.",
)
@click.pass_context
def varlink(ctx: click.Context, /, address: str | None, socket_mode: int) -> None:
    """Serve both interfaces over varlink, until a signal ends it."""
    from cfs.service.handles import StoreOptions

    options = find_global_options(ctx)
    stores = StoreOptions(
        insecure=options.insecure,
        require_verity=options.require_verity,
        upgrade=options.upgrade,
    )
    serve(stores, address, socket_mode)


def serve(options: "StoreOptions", address: str | None = None, mode: int = DEFAULT_MODE) -> None:
    """Serve on the socket that was passed, else on one at an address, until a signal.

    Raises:
        InvalidRequestError: there is neither, or what was passed is no socket.
        BusyError: somebody serves at the address.
        OSError: the socket cannot be made.
    """
    passed = take_passed()
    channel = find_socket(passed)
    if channel is None and address is None:
        msg = "no --address given and not socket-activated"
        raise InvalidRequestError(msg)
    from cfs.service.assemble import assembled
    from cfs.service.fdstore import Notifier
    from cfs.service.fuse_registry import FuseMounts
    from cfs.service.listening import listening
    from cfs.service.server import Server

    logging.basicConfig(format="cfsctl: %(message)s")  # on stderr
    notifier = Notifier.from_environment()
    mounts = FuseMounts(notifier, records=records_directory())
    with ExitStack() as stack:
        if channel is None:
            assert address is not None
            channel = stack.enter_context(listening(address, mode))
        dispatcher = stack.enter_context(assembled(options, mounts))
        mounts.adopt(_find_stored(passed))
        server = Server(dispatcher, channel)
        stack.enter_context(_calling(server.stop))
        if notifier is not None:
            notifier.send("READY=1")
            stack.callback(notifier.send, "STOPPING=1")
        server.serve()


def _find_stored(passed: Sequence[Passed]) -> dict[str, list[int]]:
    """Return by name what an earlier service kept in the descriptor store."""
    stored = defaultdict(list)
    for name, fd in passed:
        if name.startswith(STORED_PREFIX):
            stored[name].append(fd)
    return stored


@contextmanager
def _calling(stop: Callable[[], None]) -> Iterator[None]:
    """Have the signals that end programs call something instead."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
