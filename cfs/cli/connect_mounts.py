"""Commands that mount, and that list and end mounts, with ``--connect``.

With FUSE the service mounts, on a directory as it sees it, and keeps serving.  A mount of the
kernel comes as a descriptor, and it is we who put it on the directory.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from cfs.cli.connect import connected, opened_store, refuse_options
from cfs.cli.fuse_options import parse_items, read_items
from cfs.cli.mount_options import parse_request
from cfs.cli.mounts import check_targets, print_mounts
from cfs.cli.report import describe, escape, fail
from cfs.client import Client, VarlinkError
from cfs.client.convert import encode, wire_fields
from cfs.client.fuse import FuseMode, FuseMount, FuseParams, FuseState, FuseVerify
from cfs.client.oci import OciFuseMount, OciMount
from cfs.client.repository import (
    FuseServe,
    ListMounts,
    Mount,
    Mounted,
    MountParams,
    Unmount,
)
from cfs.errors import CfsError, InvalidRequestError, MountPointError, NotFoundError
from cfs.fuse.choices import Mode, Passthrough, Verify
from cfs.linux.files import owned
from cfs.linux.mounts import attach_mount, is_initial_user_namespace
from cfs.linux.notify import Notifier
from cfs.mount import prepare_mountpoint
from cfs.mounting.choice import FuseWish, MountRequest

if TYPE_CHECKING:
    from cfs.fuse.options import ServeChoices

__all__ = ["fuse_serve", "mount", "oci_mount", "ps", "umount"]

_MODES = {Mode.PLAIN: FuseMode.FUSE, Mode.OVERLAY: FuseMode.FUSE_OVERLAY}
_VERIFY = {
    Verify.OFF: FuseVerify.OFF,
    Verify.OPEN: FuseVerify.OPEN,
    Verify.REQUIRE: FuseVerify.REQUIRE,
}


def mount(
    ctx: click.Context, *, image: str, mountpoint: str, foreground: bool, **options: Any
) -> None:
    """Mount an image."""
    request = parse_request(**options)
    params = _fuse_params(ctx, request)
    with opened_store(ctx) as (client, handle), _changes(request) as fds:
        if _wants_kernel(request):
            _attach(client.call(Mount(handle, image, _kernel_params(request), fds=fds)), mountpoint)
            return
        place = os.path.join(os.getcwd(), mountpoint)
        _serve(ctx, client, FuseServe(handle, image, place, foreground, params, fds=fds))


def oci_mount(
    ctx: click.Context,
    *,
    image: str,
    mountpoint: str,
    bootable: bool,
    foreground: bool,
    **options: Any,
) -> None:
    """Mount an OCI image."""
    request = parse_request(**options)
    params = _fuse_params(ctx, request)
    with opened_store(ctx) as (client, handle), _changes(request) as fds:
        if _wants_kernel(request):
            kernel_call = OciMount(handle, image, bootable, _kernel_params(request), fds=fds)
            _attach(client.call(kernel_call), mountpoint)
            return
        place = os.path.join(os.getcwd(), mountpoint)
        call = OciFuseMount(handle, image, place, bootable, foreground, params, fds=fds)
        _serve(ctx, client, call)


def fuse_serve(
    ctx: click.Context,
    *,
    image: str,
    mountpoint: str,
    items: tuple[str, ...],
    basedirs: tuple[str, ...],
    background: bool,
    upperdir: str | None,
    workdir: str | None,
    read_write: bool,
    has_stats: bool,
    **_: object,
) -> None:
    """Serve an image file of ours with the objects of the service's store."""
    has_grace = ctx.get_parameter_source("grace") is not click.core.ParameterSource.DEFAULT
    refuse_options(ctx, {"--basedir": bool(basedirs), "--stats": has_stats, "--grace": has_grace})
    try:
        parse_items(items, upperdir=upperdir, workdir=workdir, read_write=read_write)
    except InvalidRequestError as error:
        raise click.UsageError(str(error), ctx) from None
    choices: ServeChoices = {"mode": Mode.PLAIN, **read_items(items)}
    request = MountRequest(
        choices=choices, upperdir=upperdir, workdir=workdir, read_write=read_write
    )
    params = _fuse_params(ctx, request)
    with ExitStack() as stack:
        file = owned(stack, os.open(image, os.O_RDONLY | os.O_CLOEXEC))
        client, handle = stack.enter_context(opened_store(ctx))
        fds = [file, *stack.enter_context(_changes(request))]
        place = os.path.join(os.getcwd(), mountpoint)
        _serve(ctx, client, FuseServe(handle, None, place, not background, params, fds=fds))


def ps(ctx: click.Context, *, is_json: bool) -> None:
    """List the FUSE mounts of the service that are served."""
    with connected(ctx) as client:
        mounts = _serving(client)
    empty = dict.fromkeys(wire_fields(FuseMount))
    print_mounts([empty | encode(each) for each in mounts], is_json=is_json)


def umount(ctx: click.Context, *, lazy: bool, is_all: bool, mountpoints: tuple[str, ...]) -> None:
    """End FUSE mounts of the service."""
    check_targets(ctx, mountpoints, is_all=is_all)
    status = 0
    with connected(ctx) as client:
        # what was mounted last may lie upon what was mounted before
        mounts = [each for each in reversed(_serving(client)) if each.mountpoint is not None]
        targets = [each.mountpoint for each in mounts] if is_all else mountpoints
        for target in targets:
            try:
                found = _select(mounts, target or "")
                client.call(Unmount(found.mount_id, lazy or None))
                mounts.remove(found)
            except VarlinkError as error:  # which knows numbers only
                status = fail("Error", f"{escape(target or '')}: {describe(error)}")
            except (CfsError, OSError) as error:
                status = fail("Error", describe(error))
    ctx.exit(status)


def _serving(client: Client) -> list[FuseMount]:
    mounts = client.call(ListMounts()).mounts
    return [each for each in mounts if each.state is FuseState.SERVING]


def _select(mounts: Sequence[FuseMount], path: str) -> FuseMount:
    """Return the mount at a path, the one mounted last.

    Raises:
        NotFoundError: there is none.
    """
    for place in (os.path.normpath(os.path.join(os.getcwd(), path)), os.path.realpath(path)):
        for each in mounts:
            if each.mountpoint == place:
                return each
    msg = f"{path}: not a FUSE mount of the service"
    raise NotFoundError(msg)


def _wants_kernel(request: MountRequest) -> bool:
    """Whether to ask for a mount of the kernel: by default if we can attach it."""
    if request.wish is FuseWish.AUTO:
        return os.geteuid() == 0 and is_initial_user_namespace()
    return request.wish is FuseWish.NO


@contextmanager
def _changes(request: MountRequest) -> Iterator[list[int]]:
    """Open upper and work directory, if they were named."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with ExitStack() as stack:
        places = (request.upperdir, request.workdir)
        yield [owned(stack, os.open(path, flags)) for path in places if path is not None]


def _kernel_params(request: MountRequest) -> MountParams:
    has_changes = request.upperdir is not None
    return MountParams(overlay=has_changes or None, read_write=request.read_write or None)


def _fuse_params(ctx: click.Context, request: MountRequest) -> FuseParams:
    """Return what was said of FUSE; the service chooses the rest."""
    choices = request.choices
    passthrough = choices.get("passthrough")
    refuse_options(
        ctx,
        {
            "passthrough=auto": passthrough is Passthrough.AUTO,
            "supervise=off": not choices.get("supervise", True),
        },
    )
    mode, verify = choices.get("mode"), choices.get("verify")
    return FuseParams(
        mode=None if mode is None else _MODES[mode],
        passthrough=None if passthrough is None else passthrough is Passthrough.ON,
        workers=choices.get("workers"),
        allow_other=choices.get("allow_other"),
        overlay=request.upperdir is not None or None,
        read_write=request.read_write or None,
        verify=None if verify is None else _VERIFY[verify],
    )


def _attach(mounted: Mounted, mountpoint: str) -> None:
    with mounted, ExitStack() as stack:
        fd = owned(stack, mounted.take_mount())
        try:
            attach_mount(fd, prepare_mountpoint(mountpoint))
        except OSError as error:
            msg = f"cannot mount on {mountpoint}: {error.strerror}"
            raise MountPointError(msg, error.errno or 0) from None


def _serve(ctx: click.Context, client: Client, call: FuseServe | OciFuseMount) -> None:
    """Have an image served; stay as long as it is, if the call waits."""
    if not call.wait:
        client.call(call).close()
        return
    mount_id = None
    with _interrupted_by_sigterm():
        try:
            for reply in client.stream(call):
                reply.close()
                is_first, mount_id = mount_id is None, reply.mount.mount_id
                if is_first and (notifier := Notifier.from_environment()):
                    notifier.send("READY=1")
        except KeyboardInterrupt:  # that has closed the connection, which ends the mount
            if mount_id is None:
                raise
            _await_end(ctx, mount_id)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _await_end(ctx: click.Context, mount_id: int) -> None:
    with suppress(CfsError), connected(ctx) as client:  # it may have ended by itself
        client.call(Unmount(mount_id, detach=True))
