"""What a check of a store found; spec repository 9.2, 9.3 and cli-and-varlink a.10.

A report has one owner; parts that were found by other threads are added when these are done.
"""

import os
from dataclasses import asdict, dataclass, field

__all__ = ["Report", "describe_errno", "show"]


@dataclass(slots=True)
class Report:
    """Counts and findings, in the order of the reply of varlink's ``Fsck``.

    Attributes:
        has_metadata: ``meta.json`` is there and can be read.
        objects_checked, streams_checked, images_checked: entries looked at.
        objects_corrupted, streams_corrupted, images_corrupted: of these, the damaged ones.
        broken_links: links that lead to nothing.
        missing_objects: references to objects that are not there.
        errors: a line for each finding, ``fsck: KIND: FIELD: FIELD``.
    """

    has_metadata: bool = True
    objects_checked: int = 0
    objects_corrupted: int = 0
    streams_checked: int = 0
    streams_corrupted: int = 0
    images_checked: int = 0
    images_corrupted: int = 0
    broken_links: int = 0
    missing_objects: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether nothing was found."""
        return not self.errors

    def find(self, kind: str, *fields: str) -> None:
        """Record a finding of a kind."""
        self.errors.append(": ".join(("fsck", kind, *fields)))

    def lose_metadata(self, reason: str) -> None:
        """Record that ``meta.json`` is missing or cannot be read."""
        self.has_metadata = False
        self.find("metadata-parse-failed", "meta.json", reason)

    def count_entry(self, category: str, *, is_corrupted: bool) -> None:
        """Count a checked entry of ``objects``, ``streams`` or ``images``."""
        checked, corrupted = f"{category}_checked", f"{category}_corrupted"
        setattr(self, checked, getattr(self, checked) + 1)
        setattr(self, corrupted, getattr(self, corrupted) + is_corrupted)

    def add(self, other: "Report") -> None:
        """Add the counts and findings of another report."""
        for name in self.__slots__:
            if name not in ("has_metadata", "errors"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.has_metadata = self.has_metadata and other.has_metadata
        self.errors += other.errors

    def as_dict(self) -> dict[str, object]:
        """Return the reply of varlink's ``Fsck``, which is what ``fsck --json`` prints."""
        return {"ok": self.is_ok, **asdict(self)}


def describe_errno(error: OSError) -> str:
    """Return the reason of an error as composefs-rs writes it."""
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"


def show(name: bytes) -> str:
    """Return a file name as text, whatever its bytes."""
    return name.decode(errors="backslashreplace")
