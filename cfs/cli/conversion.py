"""Options that say what to do to a tree before it becomes an image (spec repository 6.5)."""

import click

__all__ = ["DEFAULT_XATTRS", "bootable_option", "xattrs_option"]

_XATTR_MODES = ("allowlist-only", "keep-user-xattrs")  # XattrMode's, without importing it
DEFAULT_XATTRS = _XATTR_MODES[0]


def bootable_option() -> click.Option:
    """Return ``--bootable``."""
    return click.Option(["--bootable"], is_flag=True, help="Convert for booting.")


def xattrs_option() -> click.Option:
    """Return ``--xattrs``."""
    return click.Option(
        ["--xattrs"],
        type=click.Choice(_XATTR_MODES),
        default=DEFAULT_XATTRS,
        show_default=True,
        help="Which xattrs the OCI conversion keeps.",
    )
