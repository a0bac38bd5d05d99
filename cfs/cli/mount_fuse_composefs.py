"""``mount.fuse.composefs``: serve an image file over FUSE (spec cli-and-varlink a.8, c.6).

The helper that ``mount -t fuse.composefs`` and fstab lines of this type start.
"""

import os
import sys
from collections.abc import Sequence

from cfs.cli.fuse_options import FUSE_KEYS, read_items
from cfs.cli.mount_helper import HelperArguments, open_image_file, run_helper
from cfs.mounting.choice import MountRequest, choose_serving

__all__ = ["main", "run"]

_FSTYPE = "fuse.composefs"
_MORE = """\
  workers=N, passthrough[=on|off|auto], mode=plain|overlay, verify=off|open|require,
  supervise=on|off, allow-other
                        as for cfsctl fuse-serve
"""


def main() -> int:
    """Entry point of the console script."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the tool and return its status; what serves stays behind."""
    return run_helper(_FSTYPE, _MORE, arguments, _parse, _mount)


def _parse(arguments: Sequence[str]) -> HelperArguments:
    return HelperArguments.parse(arguments, _FSTYPE, others=[*FUSE_KEYS, "allow_other"])


def _make_request(parsed: HelperArguments) -> MountRequest:
    """Return how to serve.

    Raises:
        InvalidRequestError: an option is wrong or contradicts another.
    """
    items = [item.replace("_", "-") for item in parsed.others]
    if parsed.wants_verity and "verify=require" not in items:
        items.append("verify=require")
    return MountRequest(
        choices=read_items(items),
        upperdir=parsed.values.get("upperdir"),
        workdir=parsed.values.get("workdir"),
        read_write=parsed.is_writable,
        attributes=parsed.attributes,
    )


def _mount(parsed: HelperArguments, basedirs: Sequence[str]) -> None:
    from cfs.cli.runtime import records_directory
    from cfs.mounting.serving import serve_file

    request = _make_request(parsed)
    if parsed.is_fake:
        return
    fd = open_image_file(parsed.image)
    try:
        parsed.check_image(fd)
        serve_file(
            f"/proc/self/fd/{fd}", parsed.mountpoint, choose_serving(request), name=parsed.image,
            basedirs=basedirs, records=records_directory(), background=True,
        ).leave()  # fmt: skip
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
