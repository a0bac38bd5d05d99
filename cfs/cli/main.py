"""Entry point of ``cfsctl``: which tool is meant (spec cli-and-varlink a.1).

Nothing slow is imported here: the C-compatible tools start without click.
"""

import importlib
import os
import sys

__all__ = ["TOOLS", "main"]

_INTERRUPT_STATUS = 130
TOOLS = {
    "mkcomposefs": "cfs.cli.mkcomposefs",
    "composefs-info": "cfs.cli.composefs_info",
    "mount.composefs": "cfs.cli.mount_composefs",
    "mount.fuse.composefs": "cfs.cli.mount_fuse_composefs",
}


def main() -> int:
    """Run the tool that the program name or the first argument names; return its status."""
    arguments = sys.argv[1:]
    name = os.path.basename(sys.argv[0])
    module = "cfs.cli.cfsctl"
    if "COMPLETE" in os.environ:  # the words are about a line that nobody has sent off yet
        module = "cfs.cli.completion"
    elif name not in TOOLS and arguments and arguments[0] in TOOLS:
        name = arguments.pop(0)
    try:
        status: int = importlib.import_module(TOOLS.get(name, module)).run(arguments)
    except KeyboardInterrupt:  # while modules were imported
        return _INTERRUPT_STATUS
    return status


if __name__ == "__main__":
    sys.exit(main())
