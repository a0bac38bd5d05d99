"""Which manifest of an index is taken: by tag, then by platform (spec repository 5.6).

Works on parsed documents; whoever calls says how blobs are read.
"""

from collections.abc import Callable, Iterator, Sequence

from cfs.errors import FormatError, NotFoundError
from cfs.oci.manifest import (
    DOCKER_MANIFEST_TYPE,
    INDEX_TYPES,
    MANIFEST_TYPE,
    Config,
    Descriptor,
    Index,
    Manifest,
    Platform,
    convert_docker,
    native_platform,
)
from cfs.oci.reference import digest_of
from cfs.oci.sources import SourceOptions

__all__ = ["choose_manifest", "load_manifest", "wanted_platform"]

_REF_NAME = "org.opencontainers.image.ref.name"
# indices may name each other's contents again and again: what is read in all has a limit, bytes
_MAX_READ = 16 << 20
_MAX_SHOWN = 20
# what a processor of a variant runs, best first; as containers' registries have it
_ARM_VARIANTS = ("v8", "v7", "v6", "v5")

_Load = Callable[[Descriptor], bytes]


def choose_manifest(index: Index, tag: str | None, wanted: Platform, load: _Load) -> Descriptor:
    """Return the descriptor of the first manifest that fits.

    The platform of a descriptor counts; where it has none, that of the config.  A manifest that
    is for no platform at all, as artifacts are, is taken if there is no other.

    Args:
        index: of the layout.
        tag: the entry must have it; None takes all entries.
        wanted: platform; without a variant any variant fits.
        load: returns the verified bytes of a document.

    Raises:
        NotFoundError: no entry has that tag, or none fits.
        FormatError: an index in an index in an index, or a document that is none.
    """
    entries = [
        entry for entry in index.manifests if tag in (None, entry.annotations.get(_REF_NAME))
    ]
    if not index.manifests:
        msg = "Image index contains no manifests"
        raise NotFoundError(msg)
    if not entries:
        msg = f"Tag {tag!r} not found in image index"
        raise NotFoundError(msg)
    return _Choice(wanted, load).choose(entries)


def load_manifest(descriptor: Descriptor, load: _Load) -> tuple[str, bytes]:
    """Return digest and bytes of a manifest; one of Docker becomes one of OCI.

    Raises:
        FormatError: it is no manifest.
    """
    data = load(descriptor)
    if Manifest.parse(data).media_type == DOCKER_MANIFEST_TYPE:
        data = convert_docker(data)
        return digest_of(data), data
    return descriptor.digest, data


def wanted_platform(options: SourceOptions) -> Platform:
    """Return the platform to choose: this machine's, but for what the options say."""
    native = native_platform()
    return Platform(
        options.os or native.os, options.arch or native.architecture, options.variant or None
    )


class _Choice:
    """One search; keeps what it has read and seen."""

    def __init__(self, wanted: Platform, load: _Load) -> None:
        self._wanted = wanted
        self._load_blob = load
        self._read_size = 0
        self._seen: list[tuple[Platform | None, Descriptor]] = []
        self._variants = _variants(wanted)

    def choose(self, entries: Sequence[Descriptor]) -> Descriptor:
        best: Descriptor | None = None
        best_rank = len(self._variants)
        for candidate in self._expand(entries):
            platform = candidate.platform or self._platform_of_config(candidate)
            rank = self._rank(platform)
            if rank == 0:
                return candidate
            if rank < best_rank:
                best, best_rank = candidate, rank
            self._seen.append((platform, candidate))
        if best is None and len(self._seen) == 1 and self._seen[0][0] is None:
            best = self._seen[0][1]
        if best is None:
            raise NotFoundError(self._explain())
        return best

    def _expand(self, entries: Sequence[Descriptor]) -> Iterator[Descriptor]:
        """Give the manifests in order; an index is replaced by what it holds, once."""
        for entry in entries:
            nested: Sequence[Descriptor] = (entry,)
            if entry.media_type in INDEX_TYPES:
                nested = Index.parse(self._load(entry)).manifests
            for candidate in nested:
                if candidate.media_type in INDEX_TYPES:
                    msg = "Nested image indices are not supported"
                    raise FormatError(msg)
                if candidate.media_type not in (MANIFEST_TYPE, DOCKER_MANIFEST_TYPE):
                    msg = f"Unexpected media type {candidate.media_type}"
                    raise FormatError(msg)
                yield candidate

    def _platform_of_config(self, candidate: Descriptor) -> Platform | None:
        manifest = Manifest.parse(load_manifest(candidate, self._load)[1])
        if not manifest.is_container:
            return None
        config = Config.parse(self._load(manifest.config))
        return Platform(config.os, config.architecture, config.variant)

    def _rank(self, platform: Platform | None) -> int:
        """Return 0 for what fits best, the number of variants for what does not fit."""
        wanted = self._wanted
        if platform and (platform.os, platform.architecture) == (wanted.os, wanted.architecture):
            if wanted.variant is None:
                return 0
            if platform.variant in self._variants:
                return self._variants.index(platform.variant)
        return len(self._variants)

    def _load(self, descriptor: Descriptor) -> bytes:
        self._read_size += descriptor.size
        if self._read_size > _MAX_READ:
            msg = f"indices name more than {_MAX_READ} bytes of documents"
            raise FormatError(msg)
        return self._load_blob(descriptor)

    def _explain(self) -> str:
        shown = {_format(platform) for platform, _ in self._seen if platform}
        some = ", ".join(sorted(shown)[:_MAX_SHOWN]) or "(no platform info)"
        return f"No manifest found for platform {_format(self._wanted)}; available: {some}"


def _variants(wanted: Platform) -> tuple[str | None, ...]:
    """Return what will do, best first."""
    if wanted.variant is None:
        return (None,)
    if wanted.architecture == "arm" and wanted.variant in _ARM_VARIANTS:
        return (*_ARM_VARIANTS[_ARM_VARIANTS.index(wanted.variant) :], None)
    return (wanted.variant, None)


def _format(platform: Platform) -> str:
    parts = (platform.os, platform.architecture, platform.variant)
    return "/".join(part for part in parts if part)
