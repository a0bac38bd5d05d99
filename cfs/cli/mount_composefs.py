"""``mount.composefs``: mount an image file in the kernel, as the C tool does.

Spec cli-and-varlink a.13.  Also the helper that ``mount -t composefs`` and fstab lines of this type
start.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from cfs.cli.mount_helper import HelperArguments, open_image_file, run_helper
from cfs.cli.report import describe
from cfs.errors import CfsError, MountError, NotFoundError
from cfs.linux.files import owned
from cfs.mounting.kernel import mount_in_kernel
from cfs.overlaymount import OverlayLayers, OverlayVerity

__all__ = ["main", "run"]

_FSTYPE = "composefs"
_MORE = """\
  tryverity             the same as verity if the kernel can
  idmap=FILE            user namespace that maps the owners
"""


def main() -> int:
    """Entry point of the console script."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the tool and return its status."""
    return run_helper(_FSTYPE, _MORE, arguments, _parse, _mount)


def _parse(arguments: Sequence[str]) -> HelperArguments:
    return HelperArguments.parse(arguments, _FSTYPE, values=["idmap"], flags=["tryverity"])


def _mount(parsed: HelperArguments, basedirs: Sequence[str]) -> None:
    if parsed.is_fake:
        return
    with ExitStack() as stack:
        namespace = _open_namespace(parsed.values.get("idmap"))
        if namespace is not None:
            owned(stack, namespace)
        image = owned(stack, open_image_file(parsed.image))
        try:
            parsed.check_image(image)
            layers = OverlayLayers(
                objects=[owned(stack, _open_basedir(path)) for path in basedirs],
                upperdir=parsed.values.get("upperdir"),
                workdir=parsed.values.get("workdir"),
                read_write=parsed.is_writable,
                verity=_verity(parsed),
                attributes=parsed.attributes,
            )
            source = _FSTYPE.encode()
            mount_in_kernel(image, parsed.mountpoint, layers, source=source, namespace_fd=namespace)
        except (CfsError, OSError) as error:
            msg = f"Failed to mount composefs {parsed.image}: {describe(error)}"
            raise MountError(msg) from None


def _open_namespace(path: str | None) -> int | None:
    try:
        return None if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        msg = f"Failed to open userns {path}: {error.strerror}"
        raise NotFoundError(msg) from None


def _open_basedir(path: str) -> int:
    # not O_PATH, which overlayfs of Linux 6.13 and 6.14 does not take
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _verity(parsed: HelperArguments) -> OverlayVerity:
    if parsed.wants_verity:
        return OverlayVerity.REQUIRE
    return OverlayVerity.TRY if "tryverity" in parsed.flags else OverlayVerity.OFF


if __name__ == "__main__":
    sys.exit(main())
