"""What became of the contents of an image (spec cli-and-varlink a.6)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cfs.objectdir import Method

__all__ = ["Statistics"]

_STEP = 1024
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SHARED = (Method.REFLINKED, Method.HARDLINKED)


@dataclass(slots=True)
class Statistics:
    """How many objects were stored in which way; for one thread.

    Attributes:
        counts: of objects, by the way they were stored.
        sizes: their bytes.
        inlined_size: bytes of everything else.
    """

    counts: Counter[Method] = field(default_factory=Counter)
    sizes: Counter[Method] = field(default_factory=Counter)
    inlined_size: int = 0

    def count(self, method: Method, size: int) -> None:
        """Add an object of so many bytes."""
        self.counts[method] += 1
        self.sizes[method] += size

    def merge(self, other: "Statistics") -> None:
        """Add those of another layer."""
        self.counts.update(other.counts)
        self.sizes.update(other.sizes)
        self.inlined_size += other.inlined_size

    def format(self) -> str:
        """Return the text of ``oci pull``."""
        copied, present = self.counts[Method.COPIED], self.counts[Method.PRESENT]
        inlined = f"{_format_size(self.inlined_size)} inlined"
        if not any(self.counts[method] for method in _SHARED):
            stored = _format_size(self.sizes[Method.COPIED])
            return f"{copied} new + {present} already present objects; {stored} stored, {inlined}"
        shared = [method for method in _SHARED if self.counts[method]]
        counts = self._format_counts([*shared, Method.COPIED, Method.PRESENT])
        sizes = [f"{_format_size(self.sizes[way])} {way.value}" for way in [*shared, Method.COPIED]]
        return f"{counts} objects; {', '.join([*sizes, inlined])}"

    def _format_counts(self, methods: Iterable[Method]) -> str:
        return " + ".join(f"{self.counts[method]} {method.value}" for method in methods)


def _format_size(size: int) -> str:
    if size < _STEP:
        return f"{size} B"
    power = (size.bit_length() - 1) // 10
    return f"{size / _STEP**power:.2f} {_UNITS[power - 1]}"
