"""Images on mount points: kernel or FUSE, what is mounted, what keeps it alive."""
