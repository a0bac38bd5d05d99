"""An image from an ``oci:`` layout: ours beside ``umoci unpack``, ``skopeo copy`` and composefs-rs.

``python bench/pull.py [ROOT] [WORK]``: ROOT is a root file system, a directory or a tar of one; by
default mmdebstrap makes one.  It becomes an image with a single layer compressed by gzip -6.  WORK
(default: the directory for temporary files) is where layout and stores are made.  Every contestant
in turn, ``ROUNDS`` times, with the layout in the page cache; what the one before left unwritten is
synced before the clock starts.  Prints the fastest round and its processor time, and how many times
as long as ours each takes.  A second pull finds everything there.

``CFS_RUST_CFSCTL`` names the cfsctl of composefs-rs.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from create_image import run_timed

ROUNDS = 3
LEVEL = 6
PIECE_SIZE = 1 << 20
OURS = "cfsctl oci pull"
TYPES = "application/vnd.oci.image"


class Layout:
    """An OCI layout with one image ``v1``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)

    def write(self, tar: Iterator[bytes]) -> None:
        """Make the image of its only layer."""
        diff_id, blob = hashlib.sha256(), self.path / "layer"
        with gzip.open(blob, "wb", LEVEL) as packed:
            for piece in tar:
                diff_id.update(piece)
                packed.write(piece)
        with blob.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        layer = self._describe("layer.v1.tar+gzip", digest, blob.stat().st_size)
        blob.rename(self.blobs / digest)
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{diff_id.hexdigest()}"]}
        config = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
        described = self._add("config.v1+json", config)
        manifest = {"schemaVersion": 2, "config": described, "layers": [layer]}
        entry = self._add("manifest.v1+json", manifest)
        entry["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
        index = {"schemaVersion": 2, "manifests": [entry]}
        (self.path / "index.json").write_text(json.dumps(index))
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def _add(self, kind: str, document: object) -> dict[str, object]:
        data = json.dumps(document).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return self._describe(kind, digest, len(data))

    @staticmethod
    def _describe(kind: str, digest: str, size: int) -> dict[str, object]:
        return {"mediaType": f"{TYPES}.{kind}", "digest": f"sha256:{digest}", "size": size}


def read_tar(root: Path | None) -> Iterator[bytes]:
    """Yield the root file system as a tar."""
    if root is not None and root.is_file():
        command = ["cat", str(root)]
    elif root is not None:
        command = ["tar", "--numeric-owner", "--xattrs", "-C", str(root), "-cf", "-", "."]
    else:
        # mirrors that stand still are good enough to measure with
        stale = '--aptopt=Acquire::Check-Valid-Until "false"'
        command = ["mmdebstrap", "--variant=minbase", "--format=tar", stale, "stable", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603 - known tools
        assert process.stdout is not None
        while piece := process.stdout.read(PIECE_SIZE):
            yield piece
    if process.returncode:
        msg = f"{command[0]}: status {process.returncode}"
        raise SystemExit(msg)


def contestants(layout: str, store: str) -> dict[str, tuple[list[str] | None, list[str], bool]]:
    """Return by name how a store is prepared, how it is filled, and whether to do so twice."""
    ours = [sys.executable, "-m", "cfs.cli.main"]
    init = ["init", "--insecure", "--algorithm", "fsverity-sha256-12", store]
    pull = ["--repo", store, "oci", "pull", f"oci:{layout}:v1", "v1"]
    found: dict[str, tuple[list[str] | None, list[str], bool]] = {
        OURS: ([*ours, *init], [*ours, *pull], True)
    }
    if rust := os.environ.get("CFS_RUST_CFSCTL"):
        found["composefs-rs"] = ([rust, *init], [rust, *pull], True)
    if umoci := shutil.which("umoci"):
        found["umoci unpack"] = (None, [umoci, "unpack", "--image", f"{layout}:v1", store], False)
    if skopeo := shutil.which("skopeo"):
        copy = [skopeo, "--insecure-policy", "copy", "-q", f"oci:{layout}:v1", f"dir:{store}"]
        found["skopeo copy dir:"] = (None, copy, False)
    return found


def main() -> None:
    """Measure and print."""
    words = sys.argv[1:]
    results: dict[str, list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory(dir=words[1] if len(words) > 1 else None) as work:
        layout = Layout(Path(work, "layout"))
        layout.write(read_tar(Path(words[0]) if words else None))
        size = sum(path.stat().st_size for path in layout.blobs.iterdir())
        sys.stdout.write(f"layers of {size / 1e6:.0f} MB\n")
        start = min(
            run_timed([sys.executable, "-m", "cfs.cli.main", "--version"])[0] for _ in "123"
        )
        for number in range(ROUNDS):
            for name in contestants("", ""):
                store = str(Path(work, f"{name} {number}"))
                prepare, command, is_repeated = contestants(str(layout.path), store)[name]
                if prepare:
                    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
                row = run_timed(command)
                again = run_timed(command) if is_repeated else (float("nan"),) * 3
                results.setdefault(name, []).append((*row[:2], *again[:2], row[2]))
    best = {
        name: [min(column) for column in zip(*rounds, strict=True)]
        for name, rounds in results.items()
    }
    sys.stdout.write(f"{'':20}{'pull':>10}{'ratio':>8}{'CPU':>10}{'again':>10}{'memory':>10}\n")
    for name, (seconds, cpu, again_seconds, _, memory) in best.items():
        ratio = seconds / best[OURS][0]
        sys.stdout.write(
            f"{name:20}{seconds:8.2f} s{ratio:8.2f}{cpu:8.2f} s{again_seconds:8.2f} s"
            f"{memory / 1e6:7.0f} MB\n"
        )
    sys.stdout.write(f"start-up of cfsctl: {start:.2f} s\n")


if __name__ == "__main__":
    main()
