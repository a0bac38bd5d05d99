"""Start to serve a vector.

Runs in the command or the service; imports neither pyfuse3 nor trio.  Its processes are told by
end of file that their starter has gone.
"""

import importlib.util
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple, Self

from cfs.errors import MountError, UnsupportedError
from cfs.fuse.handover import MESSAGE_SIZE, Handover, channel_pair, send
from cfs.fuse.mounts import GRACE_SECONDS, Mount
from cfs.fuse.options import DEFAULT, Mode, Passthrough, ServeOptions, Verify
from cfs.fuse.program import User, spawn
from cfs.fuse.shared import publish
from cfs.inodes import InodeVector
from cfs.linux.files import is_on_overlay, owned
from cfs.linux.fusedev import clone_device, raise_readahead
from cfs.linux.traces import Trace
from cfs.mount import FuseMount, Place, detach, prepare_mountpoint

__all__ = ["START_SECONDS", "Launcher", "serve", "start"]

StrPath = str | os.PathLike[str]
START_SECONDS = 60.0
_END_SECONDS = 5


class _Descriptors(NamedTuple):
    objects: list[int]
    state: int
    table: int


class Launcher:
    """The processes of a mount, started before it is known what they will serve.

    Use it as context manager around reading the image: they load their modules meanwhile.

    Args:
        options: how to serve.
        background: give the processes no standard streams.
        user: in whose name objects are read; None: our own.
        patience: seconds until they have to serve.
    """

    def __init__(
        self,
        options: ServeOptions = DEFAULT,
        *,
        background: bool = False,
        user: User | None = None,
        patience: float = START_SECONDS,
    ) -> None:
        self._options = options
        self._patience = patience
        self._verify = options.verify or Verify.OFF
        self._nr_workers = _count_workers(options)
        if not self._nr_workers and options.passthrough is Passthrough.ON:
            msg = "passthrough needs the extension cfs.fuse._worker, which was not built"
            raise UnsupportedError(msg)
        self._channel, theirs = channel_pair()
        name = "supervisor" if options.supervise else "session"
        with theirs:
            self._process: subprocess.Popen[bytes] | None = spawn(
                name,
                theirs,
                has_workers=self._nr_workers > 0,
                background=background,
                user=user,
            )

    @property
    def pid(self) -> int:
        """Number of the process that keeps the mount: supervisor, or without one session."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, unless they serve a mount; idempotent."""
        if self._process is None:
            return
        self._channel.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def start(
        self,
        vector: InodeVector,
        mountpoint: StrPath | Place,
        basedirs: Sequence[StrPath | int],
        *,
        name: str,
        grace: float = GRACE_SECONDS,
        traces: Sequence[Trace] = (),
    ) -> Mount:
        """Mount a vector and return when it serves; arguments and errors as for :func:`start`.

        A :class:`~cfs.mount.Place` may be no directory at all; then there is nothing of the mount
        but the descriptor that :meth:`Mount.take_tree` gives.

        Copies of the descriptors of ``traces`` are held by the processes of the mount, and the
        names removed when it ends; if this fails they are the caller's business.
        """
        assert self._process is not None
        if isinstance(mountpoint, Place):
            place = mountpoint
        else:
            place = Place(prepare_mountpoint(os.fspath(mountpoint)))
        target = place.path
        with ExitStack() as stack:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            fds = _Descriptors(
                objects=[
                    path if isinstance(path, int) else owned(stack, os.open(path, flags))
                    for path in basedirs
                ],
                state=owned(stack, os.memfd_create("cfs-state", os.MFD_CLOEXEC)),
                table=owned(stack, publish(self._served_vector(vector))),
            )
            mount = stack.enter_context(closing(self._make_mount(place, name, fds.objects)))
            device = None
            try:
                self._hand_over(self._settings(target, grace, fds, traces), mount)
                self._wait_until_serving()
                device = mount.attach()
                raise_readahead(device)
                with suppress(OSError):  # dead by now: the caller sees that when he waits
                    self._channel.send(f"mounted {device}".encode())
                kept = os.dup(fds.state) if self._nr_workers else -1
            except BaseException:
                self.close()  # first: of a connection that has ended nothing hangs
                mount.discard()
                if device is not None:
                    detach(target, device)
                raise
            tree = mount.take_detached()
            served = Mount(target, device, self._process, self._channel, kept, tree_fd=tree)
            self._process = None
        return served

    def _served_vector(self, vector: InodeVector) -> InodeVector:
        if self._options.mode is Mode.PLAIN:
            return vector
        from cfs.fuse.overlay import metadata_vector  # noqa: PLC0415 - only for overlays

        return metadata_vector(vector, verify=self._verify)

    def _make_mount(self, place: Place, name: str, objects: Sequence[int]) -> FuseMount:
        options = self._options
        if options.mode is Mode.PLAIN:
            return FuseMount(
                place, name, allow_other=options.allow_other, attributes=options.attributes
            )
        from cfs.overlaymount import OverlayLayers, OverlayMount, OverlayVerity  # noqa: PLC0415

        is_required = self._verify is Verify.REQUIRE

        layers = OverlayLayers(
            objects=objects,
            upperdir=options.upperdir,
            workdir=options.workdir,
            read_write=options.read_write,
            verity=OverlayVerity.REQUIRE if is_required else OverlayVerity.OFF,
            attributes=options.attributes,
        )
        return OverlayMount(place, name, layers)

    def _settings(
        self, target: str, grace: float, fds: _Descriptors, traces: Sequence[Trace]
    ) -> Handover:
        options = self._options
        is_overlay = options.mode is Mode.OVERLAY
        wants_depth = options.passthrough is not Passthrough.OFF
        return Handover(
            vector=fds.table,
            state=fds.state,
            devices=(),
            objects=fds.objects,
            traces=traces,
            mountpoint=target,
            grace=grace,
            has_workers=self._nr_workers > 0,
            is_metadata_only=is_overlay,
            passthrough=Passthrough.OFF if is_overlay else options.passthrough,
            stack_depth=2 if wants_depth and any(map(is_on_overlay, fds.objects)) else 1,
            verify=Verify.OFF if is_overlay else self._verify,  # overlayfs verifies
            masked_flags=options.masked_flags,
        )

    def _hand_over(self, settings: Handover, mount: FuseMount) -> None:
        """Give the processes everything; what keeps the connection alive is theirs alone then."""
        with ExitStack() as stack:
            devices = [mount.device_fd]
            if self._nr_workers:
                clones = clone_device(mount.device_fd, self._nr_workers - 1)
                devices.extend(owned(stack, clone) for clone in clones)
                for fd in devices:
                    os.set_blocking(fd, False)
            with suppress(BrokenPipeError):  # dead by now: the wait for its word will tell
                send(self._channel, settings._replace(devices=devices, device=mount.device))
        mount.release_device()

    def _wait_until_serving(self) -> None:
        """Wait for the word of the processes; their death is a failure too."""
        self._channel.settimeout(self._patience)
        try:
            message = self._channel.recv(MESSAGE_SIZE)
        except TimeoutError:
            message = f"failed: did not serve within {self._patience:g} s".encode()
        except ConnectionResetError:
            message = b""
        self._channel.settimeout(None)
        if message != b"serving":
            reason = message.decode(errors="replace").removeprefix("failed: ")
            msg = f"FUSE session: {reason or 'ended before it served'}"
            raise MountError(msg)


def _count_workers(options: ServeOptions) -> int:
    if options.workers is None and importlib.util.find_spec("cfs.fuse._worker") is None:
        return 0  # the extension was not built
    return options.nr_workers


def start(
    vector: InodeVector,
    mountpoint: StrPath,
    basedirs: Sequence[StrPath],
    *,
    name: str,
    options: ServeOptions = DEFAULT,
    background: bool = False,
    grace: float = GRACE_SECONDS,
) -> Mount:
    """Mount a vector and return when it serves.

    Args:
        vector: mount view of an image.
        mountpoint: existing directory.
        basedirs: objects directories, searched in this order; descriptors stay the caller's.
        name: of the image, shown as mount source ``composefs:NAME``.
        options: how to serve.
        background: give the processes no standard streams.
        grace: seconds for those who use the mount when it is told to end.

    Raises:
        MountError: the mount point, the kernel, fusermount3 or the session failed.
        OSError: an objects directory cannot be opened.
    """
    with Launcher(options, background=background) as launcher:
        return launcher.start(vector, mountpoint, basedirs, name=name, grace=grace)


@contextmanager
def serve(
    vector: InodeVector,
    mountpoint: StrPath,
    basedirs: Sequence[StrPath],
    *,
    name: str,
    options: ServeOptions = DEFAULT,
    grace: float = GRACE_SECONDS,
) -> Iterator[Mount]:
    """Serve a vector while the block runs; arguments and errors as for :func:`start`."""
    mount = start(vector, mountpoint, basedirs, name=name, options=options, grace=grace)
    try:
        yield mount
    finally:
        mount.unmount(grace)
