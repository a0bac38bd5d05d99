"""Serve an ``InodeVector`` over FUSE.

Everything is loaded when it is first used: a session process must not load what only its starter
needs, and nobody else loads pyfuse3 and trio.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from cfs.fuse.foreground import serve_foreground
    from cfs.fuse.launcher import Launcher, serve, start
    from cfs.fuse.mounts import Mount
    from cfs.fuse.options import Mode, Passthrough, ServeOptions, Verify

__all__ = [
    "Launcher",
    "Mode",
    "Mount",
    "Passthrough",
    "ServeOptions",
    "Verify",
    "serve",
    "serve_foreground",
    "start",
]

__getattr__ = load_lazily(
    __name__,
    {
        "foreground": ["serve_foreground"],
        "launcher": ["Launcher", "serve", "start"],
        "mounts": ["Mount"],
        "options": ["Mode", "Passthrough", "ServeOptions", "Verify"],
    },
)
