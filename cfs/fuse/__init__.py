"""Serve an ``InodeVector`` over FUSE; importing this loads neither pyfuse3 nor trio."""

from cfs.fuse.supervisor import Mount, serve, serve_foreground, start

__all__ = ["Mount", "serve", "serve_foreground", "start"]
