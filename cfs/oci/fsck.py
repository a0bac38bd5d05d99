"""Check of the images of a store; spec repository 9.4 and cli-and-varlink a.10.

Nothing is changed.  The store is checked first, in threads; the images are looked at by the
caller's thread.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cfs.digest import Digest
from cfs.errors import CfsError, FormatError
from cfs.oci.document_streams import config_key, config_name, open_document, read_document
from cfs.oci.layers import layer_name
from cfs.oci.manifest import Config, Manifest
from cfs.oci.reference import digest_like
from cfs.oci.tags import Tag, find_manifest_stream, list_tags, manifest_name, resolve_tag
from cfs.repository.findings import Report
from cfs.repository.fsck import check
from cfs.repository.images import open_image
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import has_stream

__all__ = ["OciReport", "check_images"]

_SEAL = "containers.composefs.fsverity"


@dataclass(slots=True)
class OciReport:
    """Counts and findings, in the order of the reply of varlink's ``Check``.

    Attributes:
        repo: what the check of the store has found.
        images_checked: tags looked at.
        images_corrupted: of these, the ones with a finding.
        errors: a line for each finding, ``fsck: KIND: TAG: FIELD``.
    """

    repo: Report
    images_checked: int = 0
    images_corrupted: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether nothing was found, neither in the images nor in the store."""
        return not self.errors and self.repo.is_ok

    def as_dict(self) -> dict[str, object]:
        """Return the reply of varlink's ``Check``, which is what ``oci fsck --json`` prints."""
        return {
            "ok": self.is_ok,
            "images_checked": self.images_checked,
            "images_corrupted": self.images_corrupted,
            "errors": self.errors,
            "repo": self.repo.as_dict(),
        }

    def add(self, findings: Report) -> None:
        """Add what was found in one image."""
        self.images_checked += 1
        self.images_corrupted += not findings.is_ok
        self.errors += findings.errors


def check_images(repository: Repository, name: str | None = None) -> OciReport:
    """Return what is wrong with a store and its tagged images.

    Args:
        repository: the store, open.
        name: of a single image; by default all are checked.

    Raises:
        OSError: the directories of the store cannot be read.
    """
    report = OciReport(check(repository))
    if name is None:
        tags = list_tags(repository)
    else:
        try:
            tags = [Tag(name, resolve_tag(repository, name))]
        except CfsError as error:
            unresolved = Report()
            unresolved.find("ref-resolve-failed", name, str(error))
            report.add(unresolved)
            return report
    for tag in tags:
        report.add(_ImageCheck(repository, tag).run())
    return report


class _ImageCheck:
    """The check of one image; collects findings."""

    def __init__(self, repository: Repository, tag: Tag) -> None:
        self._repository = repository
        self._tag = tag
        self._findings = Report()

    def run(self) -> Report:
        """Check the image, up to the first finding that hides the rest."""
        if self._tag.name.startswith("@"):
            self._find("invalid-ref-name", "leading '@' is reserved for digest references")
            return self._findings
        content_id = manifest_name(self._tag.digest)
        stream = self._open("manifest", content_id, None, ContentType.MANIFEST)
        if stream is None:
            return self._findings
        with stream:
            references = stream.named_refs
            data = self._read("manifest", stream, self._tag.digest)
        if data is not None:
            try:
                manifest = Manifest.parse(data)
            except FormatError as error:
                self._find("manifest-parse-failed", str(error))
            else:
                self._check_config(manifest, references)
        return self._findings

    def _check_config(self, manifest: Manifest, references: Mapping[str, Digest]) -> None:
        digest = manifest.config.digest
        stream_id = references.get(config_key(digest))
        if stream_id is None:
            self._find("config-ref-missing", digest)
            return
        stream = self._open("config", config_name(digest), stream_id, ContentType.CONFIG)
        if stream is None:
            return
        with stream:
            layers = stream.named_refs
            data = self._read("config", stream, digest)
        if data is None:
            return
        if manifest.is_container:
            self._check_container(data, layers)
            return
        digests = [layer.digest for layer in manifest.layers]
        self._check_layers("artifact-layer", digests, references)

    def _check_container(self, data: bytes, layers: Mapping[str, Digest]) -> None:
        try:
            config = Config.parse(data)
        except FormatError as error:
            self._find("config-parse-failed", str(error))
            return
        self._check_layers("layer", config.diff_ids, layers)
        seal = config.labels.get(_SEAL)
        if seal:  # an empty one names nothing
            try:
                with open_image(self._repository, seal):
                    pass
            except (CfsError, OSError):
                self._find("seal-image-missing", seal, f"Opening image '{seal}'")

    def _check_layers(
        self, kind: str, names: Sequence[str], references: Mapping[str, Digest]
    ) -> None:
        for name in names:
            if name not in references:
                self._find(f"{kind}-ref-missing", name)
                continue
            if kind == "layer":
                self._check_registered(name)
            self._check_object(kind, name, references[name])

    def _check_registered(self, diff_id: str) -> None:
        content_id = layer_name(diff_id)
        try:
            if not has_stream(self._repository, content_id):
                self._find("layer-stream-missing", diff_id)
        except (CfsError, OSError):
            detail = f"Checking if stream '{content_id}' exists"
            self._find("layer-check-failed", diff_id, detail)

    def _check_object(self, kind: str, name: str, stream: Digest) -> None:
        try:
            os.close(self._repository.objects.open_object(stream))
        except (CfsError, OSError):
            detail = f"Opening object {self._repository.algorithm.name.lower()}:{stream}"
            self._find(f"{kind}-object-missing", name, detail)

    def _open(
        self, what: str, content_id: str, stream: Digest | None, content_type: bytes
    ) -> SplitStream | None:
        try:
            if stream is None:
                stream = find_manifest_stream(self._repository, self._tag.digest)
            return open_document(self._repository, stream, content_id, content_type)
        except (CfsError, OSError):
            self._find(f"{what}-read-failed", f"Opening stream '{content_id}'")
            return None

    def _read(self, what: str, stream: SplitStream, digest: str) -> bytes | None:
        """Return a document that has its digest."""
        try:
            data = read_document(self._repository, stream)
        except (CfsError, OSError) as error:
            # composefs-rs tells the outermost of several reasons
            self._find(f"{what}-read-failed", str(error).partition(": ")[0])
            return None
        found = digest_like(data, digest)
        if found != digest:
            self._find(f"{what}-digest-mismatch", f"expected {digest}, got {found}")
            return None
        return data

    def _find(self, kind: str, *fields: str) -> None:
        self._findings.find(kind, self._tag.name, *fields)
