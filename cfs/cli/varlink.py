"""``cfsctl varlink`` and ``cfsctl oci varlink``: the service (spec cli-and-varlink b.1)."""

import logging
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from cfs.cli.runtime import records_directory
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.errors import InvalidRequestError
from cfs.linux.address import parse_address
from cfs.service.activation import STORED_PREFIX, Passed, find_socket, take_passed
from cfs.service.listening import DEFAULT_MODE

if TYPE_CHECKING:
    from cfs.linux.notify import Notifier
    from cfs.service.handles import StoreOptions
    from cfs.service.server import Server

__all__ = ["serve", "varlink"]

_MAX_MODE = 0o777
_JOIN_SECONDS = 1


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


def _check_address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Refuse what is no address.

    Raises:
        click.BadParameter: it is none.
    """
    try:
        if value is not None:
            parse_address(value)
    except InvalidRequestError as error:
        raise click.BadParameter(str(error)) from None
    return value


@click.command(cls=StrictCommand)
@click.option(
    "--address",
    metavar="PATH",
    callback=_check_address,
    help="Make a socket there: a path, or unix:PATH.",
)
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
    from cfs.linux.notify import Notifier
    from cfs.service.assemble import assembled
    from cfs.service.fuse_registry import FuseMounts
    from cfs.service.listening import listening
    from cfs.service.server import Server

    logging.basicConfig(format="cfsctl: %(message)s")  # on stderr
    threads = set(threading.enumerate())
    notifier = Notifier.from_environment()
    mounts = FuseMounts(notifier, records=records_directory())
    with ExitStack() as stack:
        if channel is None:
            assert address is not None
            channel = stack.enter_context(listening(address, mode))
        dispatcher = stack.enter_context(assembled(options, mounts))
        mounts.adopt(_find_stored(passed))
        server = Server(dispatcher, channel)
        stack.enter_context(_calling(partial(_stop, server, notifier)))
        if notifier is not None:
            notifier.send("READY=1")
        server.serve()
    if stuck := _join(set(threading.enumerate()) - threads):
        # they wait for a file system that does not answer: only the process's end ends them
        logging.getLogger(__name__).warning("%d calls did not end", stuck)
        os._exit(0)


def _join(threads: Collection[threading.Thread]) -> int:
    """Wait a moment for threads that have nothing left to do; return how many do not end."""
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return sum(thread.is_alive() for thread in threads)


def _stop(server: "Server", notifier: "Notifier | None") -> None:
    """Have a service end; its manager learns it first, for calls and mounts take seconds to end."""
    if notifier is not None:
        notifier.send("STOPPING=1")
    server.stop()


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
