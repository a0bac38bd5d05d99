"""Serve an ``InodeVector`` over FUSE.

Everything is loaded when it is first used: a session process must not load what only its starter
needs, and nobody else loads pyfuse3 and trio.
"""

import importlib
from typing import TYPE_CHECKING

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

_MODULES = {
    "Launcher": "launcher",
    "Mount": "mounts",
    "serve": "launcher",
    "serve_foreground": "foreground",
    "start": "launcher",
}


if not TYPE_CHECKING:  # the checker shall not take modules of this package for objects

    def __getattr__(name: str) -> object:
        if name not in __all__:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        module = importlib.import_module(f"cfs.fuse.{_MODULES.get(name, 'options')}")
        value = globals()[name] = getattr(module, name)
        return value
