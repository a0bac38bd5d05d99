"""``meta.json`` as a value: parse and encode (spec repository 1.3).

Parsing is as strict as that of composefs-rs: what one tool opens the other one opens too.
Nothing here touches the file system; any thread may call.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cfs.digest import Algorithm
from cfs.errors import FormatError, InvalidRequestError, UnsupportedError
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_integer,
    parse_list,
    parse_string,
    parse_strings,
)

__all__ = ["Formats", "Metadata", "format_algorithm", "parse_algorithm"]

_NR_PARSED = 16  # files whose contents are remembered: a service reads the same ones all the time
_VERSION = 1
_MAX_VERSION = 0xFFFF_FFFF
_FORMATS = (0, 1, 2)
_KEYS = ("version", "algorithm", "features", "erofs_formats")
_FEATURES = ("compatible", "read-only-compatible", "incompatible")
_PREFIX = "fsverity-"
_BLOCK_BITS = "12"
_V1_EROFS = "v1_erofs"
_KNOWN_READ_ONLY_COMPATIBLE = frozenset([_V1_EROFS])


def format_algorithm(algorithm: Algorithm) -> str:
    """Return the name that ``meta.json`` uses: ``fsverity-sha256-12`` for instance."""
    return f"{_PREFIX}{algorithm.name.lower()}-{_BLOCK_BITS}"


def parse_algorithm(text: str) -> Algorithm:
    """Return the algorithm of a name that :func:`format_algorithm` gives.

    Raises:
        FormatError: there is no such name, or its block size is not 4096.
    """
    name, _, block_bits = text.removeprefix(_PREFIX).rpartition("-")
    if text.startswith(_PREFIX) and block_bits == _BLOCK_BITS:
        try:
            return Algorithm.parse(name)
        except InvalidRequestError:
            pass
    msg = f"algorithm {text!r}: expected fsverity-sha256-12 or fsverity-sha512-12"
    raise FormatError(msg)


@dataclass(frozen=True, slots=True)
class Formats:
    """The image formats of a store.

    Attributes:
        default: 0, 1 or 2.
        extra: further formats that every image is written in, ascending.
    """

    default: int
    extra: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """The contents of ``meta.json``.

    Attributes:
        version: of the store's layout; 0 or 1.
        algorithm: names all objects.
        compatible: features that nobody needs to know.
        read_only_compatible: features that a writer has to know.
        incompatible: features that everybody has to know.
        stored_formats: ``erofs_formats`` as written, or None.
    """

    version: int = _VERSION
    algorithm: Algorithm
    compatible: tuple[str, ...] = ()
    read_only_compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()
    stored_formats: Formats | None = None

    @classmethod
    def create(cls, algorithm: Algorithm, erofs_version: int) -> Self:
        """Return what a new store with a single image format gets."""
        return cls(
            algorithm=algorithm,
            read_only_compatible=(_V1_EROFS,) if erofs_version == 1 else (),
            stored_formats=Formats(erofs_version),
        )

    @property
    def formats(self) -> Formats:
        """The formats that count: a stored ``{default: 2}`` says less than ``v1_erofs`` does."""
        if self.stored_formats is not None and self.stored_formats != Formats(2):
            return self.stored_formats
        return Formats(1 if _V1_EROFS in self.read_only_compatible else 2)

    def check_readable(self) -> None:
        """Refuse a store that needs a newer tool.

        Raises:
            UnsupportedError: its version is above 1, or it has incompatible features.
        """
        if self.version > _VERSION:
            msg = (
                f"unsupported repository format version {self.version} "
                f"(this tool supports up to {_VERSION})"
            )
            raise UnsupportedError(msg)
        if self.incompatible:
            features = json.dumps(self.incompatible, ensure_ascii=False)
            msg = f"repository requires unknown incompatible features: {features}"
            raise UnsupportedError(msg)

    def check_writable(self) -> None:
        """Refuse to write to a store whose read-only-compatible features are not all known.

        Raises:
            UnsupportedError: one is not.
        """
        unknown = [
            name for name in self.read_only_compatible if name not in _KNOWN_READ_ONLY_COMPATIBLE
        ]
        if unknown:
            features = json.dumps(unknown, ensure_ascii=False)
            msg = f"repository has unknown read-only-compatible features, not writing: {features}"
            raise UnsupportedError(msg)

    @classmethod
    @functools.lru_cache(maxsize=_NR_PARSED)
    def parse(cls, data: bytes) -> Self:
        """Return the metadata of a file's contents.

        Raises:
            FormatError: it is no JSON, or a known key is missing, twice or of another type.
        """
        where = "meta.json"
        top = parse_fields(load_json(data, where), where, _KEYS)
        features = {}
        if "features" in top:
            features = parse_fields(top["features"], f"{where}: features", _FEATURES)
        stored = _parse_formats(top["erofs_formats"]) if "erofs_formats" in top else None
        return cls(
            version=parse_integer(top, "version", where, range(_MAX_VERSION + 1)),
            algorithm=parse_algorithm(parse_string(top, "algorithm", where)),
            compatible=_strings(features, "compatible"),
            read_only_compatible=_strings(features, "read-only-compatible"),
            incompatible=_strings(features, "incompatible"),
            stored_formats=stored,
        )

    def encode(self) -> bytes:
        """Return the contents of the file, byte for byte as composefs-rs writes them."""
        top: dict[str, object] = {
            "version": self.version,
            "algorithm": format_algorithm(self.algorithm),
            "features": {
                "compatible": self.compatible,
                "read-only-compatible": self.read_only_compatible,
                "incompatible": self.incompatible,
            },
        }
        if self.stored_formats is not None:
            formats: dict[str, object] = {"default": self.stored_formats.default}
            if self.stored_formats.extra:
                formats["extra"] = self.stored_formats.extra
            top["erofs_formats"] = formats
        return (json.dumps(top, indent=2, ensure_ascii=False) + "\n").encode()


def _strings(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return parse_strings(fields, key, "meta.json: features") if key in fields else ()


def _parse_formats(value: object) -> Formats:
    where = "meta.json: erofs_formats"
    fields = parse_fields(value, where, ("default", "extra"))
    extra = parse_list(fields, "extra", where) if "extra" in fields else []
    versions = {parse_integer({"extra": item}, "extra", where, _FORMATS) for item in extra}
    return Formats(parse_integer(fields, "default", where, _FORMATS), tuple(sorted(versions)))
