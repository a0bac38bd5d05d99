"""``oci pull`` with ``--connect``."""

import os
from collections.abc import Iterator

import click

from cfs.cli.connect import opened_store, refuse_options
from cfs.cli.oci.progress import PullProgress
from cfs.cli.oci.pull import PulledText, check_expected, print_pulled
from cfs.client import oci as varlink
from cfs.client.errors import InvalidReplyError
from cfs.oci.pull import Done, Event, Message, Progress, Skipped, Started

__all__ = ["pull"]

_LOCAL_TRANSPORTS = ("oci:", "oci-archive:", "docker-archive:", "dir:")


def pull(
    ctx: click.Context,
    *,
    image: str,
    name: str | None,
    bootable: bool,
    expected_digest: str | None,
    quiet: bool,
    local_fetch: str,
    **source: str | bool | None,
) -> None:
    """Have an image pulled, and show how far it is."""
    check_expected(ctx, expected_digest, bootable=bootable)
    refuse_options(
        ctx,
        {f"--{key.replace('_', '-')}": value is not None for key, value in source.items()},
    )
    tag = image if name is None else name
    with opened_store(ctx) as (client, handle), PullProgress(quiet=quiet) as progress:
        call = varlink.Pull(
            handle, _from_anywhere(image), tag, local_fetch,
            bootable=bootable, expected_digest=expected_digest,
        )  # fmt: skip
        events = _Events()
        for reply in client.stream(call):
            for event in events.of(reply):
                progress(event)
    if events.completed is None:
        msg = "the service ended a pull without saying what it stored"
        raise InvalidReplyError(msg)
    print_pulled(_describe(events.completed, tag), quiet=quiet, is_expected=bool(expected_digest))


def _from_anywhere(image: str) -> str:
    """Return an image's name that means the same in the service's working directory."""
    for transport in _LOCAL_TRANSPORTS:
        if image.startswith(transport):
            return transport + os.path.join(os.getcwd(), image.removeprefix(transport))
    return image


class _Events:
    """Makes of replies what a pull of ours would tell; trusts no order.

    Attributes:
        completed: the last reply, once it came.
    """

    def __init__(self) -> None:
        self.completed: varlink.Completed | None = None
        self._started: set[str] = set()

    def of(self, reply: varlink.PullReply) -> Iterator[Event]:
        self.completed = reply.completed
        if reply.message is not None:
            yield Message(reply.message)
        if reply.skipped is not None:
            yield Skipped(reply.skipped.id)
        if reply.started is not None:
            self._started.add(reply.started.id)
            yield Started(reply.started.id, reply.started.total or 0)
        if reply.progress is not None and reply.progress.id in self._started:
            yield Progress(reply.progress.id, reply.progress.fetched)
        if reply.done is not None and reply.done.id in self._started:
            self._started.remove(reply.done.id)
            yield Done(reply.done.id)


def _describe(completed: varlink.Completed, tag: str) -> PulledText:
    boot = None
    if completed.boot_image is not None:
        mode, version = completed.boot_image_mode, completed.boot_image_format_version
        boot = (completed.boot_image, mode or "?", version or "?")
    return PulledText(
        manifest_digest=completed.manifest_digest,
        config_digest=completed.config_digest,
        verity=completed.manifest_verity,
        tag=tag,
        statistics=completed.stats,
        boot=boot,
    )
