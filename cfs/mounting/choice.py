"""Choose how an image is mounted: by the kernel, over FUSE, or over FUSE below an overlay.

Spec cli-and-varlink a.8 and c.6.  No shared state: any thread may call.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum

from cfs.errors import MountError
from cfs.fuse.options import Mode, Passthrough, ServeChoices, ServeOptions, Verify
from cfs.linux.mounts import MountAttr, create_mount, is_initial_user_namespace
from cfs.overlaymount import OverlayLayers, empty_layer, overlay_options

__all__ = ["FuseWish", "MountRequest", "choose", "choose_serving"]


class FuseWish(Enum):
    """Whether a user wants FUSE."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRequest:
    """What a user has said of a mount.

    Attributes:
        wish: FUSE or not.
        choices: of FUSE.
        upperdir: directory that gets the changes, or None; needs ``workdir``.
        workdir: empty directory on the same file system.
        read_write: let changes happen.
        attributes: of the mount, as ``nosuid``.

    Raises:
        InvalidRequestError: the choices contradict each other.
    """

    wish: FuseWish = FuseWish.AUTO
    choices: ServeChoices = field(default_factory=ServeChoices)
    upperdir: str | None = None
    workdir: str | None = None
    read_write: bool = False
    attributes: MountAttr = MountAttr.NONE

    def __post_init__(self) -> None:
        has_changes = (self.upperdir, self.workdir) != (None, None)
        self.serve_options(Mode.OVERLAY if has_changes else Mode.PLAIN)

    def serve_options(self, mode: Mode) -> ServeOptions:
        """Return how to serve; ``mode`` counts if none was said."""
        choices: ServeChoices = {"mode": mode, **self.choices}
        return ServeOptions(
            **choices,
            upperdir=self.upperdir,
            workdir=self.workdir,
            read_write=self.read_write,
            attributes=self.attributes,
        )


def choose(request: MountRequest) -> ServeOptions | None:
    """Return how to serve over FUSE, or None for a mount by the kernel alone.

    Raises:
        MountError: an upper directory where overlayfs cannot be used.
    """
    wants_fuse = request.wish is FuseWish.YES
    if request.wish is FuseWish.AUTO:
        wants_fuse = os.geteuid() != 0 or not is_initial_user_namespace()
    return choose_serving(request) if wants_fuse else None


def choose_serving(request: MountRequest) -> ServeOptions:
    """Return how to serve over FUSE, whatever the wish of the request.

    Raises:
        MountError: an upper directory where overlayfs cannot be used.
    """
    if "mode" in request.choices or _needs_plain(request):
        return request.serve_options(Mode.PLAIN)
    if _can_overlay():
        return request.serve_options(Mode.OVERLAY)
    if request.upperdir is not None:
        msg = (
            "an upper directory needs an overlay: Linux 6.16 or later, and root or a user name "
            "space of one's own"
        )
        raise MountError(msg)
    return request.serve_options(Mode.PLAIN)


def _needs_plain(request: MountRequest) -> bool:
    """Whether something was said that has a meaning only where FUSE reads the objects."""
    if request.upperdir is not None:
        return False
    wants_passthrough = request.choices.get("passthrough", Passthrough.OFF) is not Passthrough.OFF
    return wants_passthrough or request.choices.get("verify") is Verify.OPEN


def _can_overlay() -> bool:
    """Whether we may mount, and overlayfs takes data-only layers with ``userxattr``."""
    with ExitStack() as stack:
        try:
            layers = OverlayLayers(objects=[empty_layer(stack)])
            metadata = empty_layer(stack)
            options = overlay_options(b"none", [("userxattr", None)], layers, [], metadata)
            os.close(create_mount("overlay", options, MountAttr.RDONLY))
        except MountError:
            return False
    return True
