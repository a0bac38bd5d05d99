"""What the standard library has only in later versions of Python."""

from typing import TYPE_CHECKING

__all__ = ["override"]

if TYPE_CHECKING:
    from typing_extensions import override  # typing has it from 3.12 on
else:

    def override(method: object) -> object:
        """Mark what replaces an inherited method, for the type checker."""
        return method
