"""``--connect``: commands that a varlink service carries out (issue 7, point 5).

A command is parsed as always; then, instead of its own function, runs the one of the same
arguments that calls the service.  What a method has no parameter for is an error of usage, as is
a command without a method: nothing is left out silently.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import click

from cfs.cli.strict import find_global_options
from cfs.errors import InvalidRequestError

if TYPE_CHECKING:
    from cfs.client import Client
    from cfs.client.repository import Opened

__all__ = [
    "REMOTES",
    "connected",
    "default_store",
    "find_remote",
    "opened_store",
    "refuse_options",
    "with_address",
]

_OPTION = "--connect"
_WITH_VALUES = ("--repo", "--hash", "--erofs-version")  # global options before a command
REMOTES = {
    "init": "connect_store.init",
    "gc": "connect_store.gc",
    "fsck": "connect_store.fsck",
    "images": "connect_store.images",
    "list-images": "connect_store.images",
    "image-objects": "connect_store.image_objects",
    "mount": "connect_mounts.mount",
    "ps": "connect_mounts.ps",
    "umount": "connect_mounts.umount",
    "fuse-serve": "connect_mounts.fuse_serve",
    "oci images": "connect_oci.images",
    "oci inspect": "connect_oci.inspect",
    "oci tag": "connect_oci.tag",
    "oci untag": "connect_oci.untag",
    "oci compute-id": "connect_oci.compute_id",
    "oci fsck": "connect_oci.fsck",
    "oci pull": "connect_pull.pull",
    "oci copy": "connect_layers.copy",
    "oci layer": "connect_layers.layer",
    "oci import-layer": "connect_layers.import_layer",
    "oci mount": "connect_mounts.oci_mount",
}
Remote = Callable[..., Any]


def with_address(args: Sequence[str]) -> list[str]:
    """Return arguments in which ``--connect`` has a value, which is empty if none was given.

    The next word is its value if it looks like an address: click would take any word.
    """
    rest = list(args)
    words: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        if word == _OPTION:
            is_address = bool(rest) and (rest[0].startswith("unix:") or "/" in rest[0])
            word = f"{_OPTION}={rest.pop(0) if is_address else ''}"
        words.append(word)
        if word in _WITH_VALUES and rest:
            words.append(rest.pop(0))
    return words + rest


def refuse_options(ctx: click.Context, given: Mapping[str, bool]) -> None:
    """Refuse what ``--connect`` excludes, and what the method of a command has no parameter for.

    Args:
        ctx: of the running command.
        given: options, and whether they were given.

    Raises:
        click.UsageError: one was.
    """
    for option, is_given in given.items():
        if is_given:
            msg = f"{option} cannot be used with {_OPTION}"
            raise click.UsageError(msg, ctx)


def find_remote(ctx: click.Context) -> Remote:
    """Return what runs in place of a command; it takes the context and the same arguments.

    Raises:
        click.UsageError: no method does what the command does.
    """
    name = ctx.command_path.partition(" ")[2]
    if name not in REMOTES:
        msg = f"{name} cannot be used with {_OPTION}: no varlink method does it"
        raise click.UsageError(msg, ctx)
    module, _, function = REMOTES[name].partition(".")
    if name != "init":  # it is for stores that we open ourselves
        refuse_options(ctx, {"--insecure": find_global_options(ctx).insecure})
    remote: Remote = getattr(importlib.import_module(f"cfs.cli.{module}"), function)
    return remote


@contextmanager
def connected(ctx: click.Context) -> "Iterator[Client]":
    """Connect to the service of ``--connect`` while the block runs.

    Raises:
        ConnectionLostError: nobody answers there.
        InvalidRequestError: it is no address.
    """
    from cfs.client import Client

    with Client(find_global_options(ctx).connect or None) as client:
        yield client


@contextmanager
def opened_store(ctx: click.Context) -> "Iterator[tuple[Client, int]]":
    """Open the service's store while the block runs; yield client and handle.

    Raises:
        InvalidRequestError: the store has another hash than ``--hash`` says.
        CfsError: as for :meth:`cfs.client.Client.call`.
    """
    algorithm = find_global_options(ctx).algorithm
    with connected(ctx) as client, default_store(client) as store:
        if algorithm is not None and store.hash_algorithm != algorithm.name.lower():
            msg = (
                f"repository is configured for fsverity-{store.hash_algorithm}-12 but --hash "
                f"{algorithm.name.lower()} was specified"
            )
            raise InvalidRequestError(msg)
        yield client, store.handle


def default_store(client: "Client") -> "AbstractContextManager[Opened]":
    """Open the store that is meant if none is named: of the system if root serves, else his."""
    is_system = client.peer_uid == 0
    return client.opened(user=not is_system or None, system=is_system or None)
