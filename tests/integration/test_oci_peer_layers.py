"""Damaged layers, imported and listed by us and by composefs-rs: the same verdict and text.

Needs ``CFS_RUST_CFSCTL``, built with ``oci``; ``CFS_FUZZ_LAYERS`` is how many are tried.
"""

import io
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.errors import FormatError, UnsupportedError
from cfs.oci.layer_listing import format_entries
from cfs.oci.layers import import_layer
from cfs.oci.manifest import Compression
from cfs.oci.reference import digest_of
from cfs.oci.tar import BLOCK_SIZE
from cfs.repository.repository import Repository, init
from tests.oci_cases import case_layers
from tests.unit.oci.test_tar import mend

Tool = Callable[..., subprocess.CompletedProcess[bytes]]

NR_LAYERS = int(os.environ.get("CFS_FUZZ_LAYERS", "30"))
# offsets of the fields of a header, and within some of them
FIELDS = (0, 100, 108, 116, 124, 126, 130, 136, 148, 156, 257, 263, 264, 329, 337, 345)
BYTES = b"\0 07\x80\xffLKxgS\n="
# we refuse what 0.9 takes without understanding it, and list what makes it crash
REFUSED_BY_US = ("invalid size", "global header between")
CRASHED = 101


def damaged(draw: random.Random) -> bytes:
    layer = bytearray(
        draw.choice([each for each in case_layers().values() if 0 < len(each) < 1 << 15])
    )
    for _ in range(draw.choice((1, 1, 2))):
        block_off = draw.randrange(len(layer)) // BLOCK_SIZE * BLOCK_SIZE
        off = block_off + draw.choice((*FIELDS, draw.randrange(BLOCK_SIZE)))
        if off < len(layer):
            layer[off] = draw.choice((*BYTES, draw.randrange(256)))
            if draw.random() < 0.85:
                mend(layer, block_off)
    return bytes(layer)


def test_damaged_layers(rust: Tool, tmp_path: Path) -> None:
    if b"import-layer" not in rust("oci", "--help").stdout:
        pytest.skip("the cfsctl of CFS_RUST_CFSCTL was built without oci")
    rust("--repo", "theirs", "init", "--insecure", "--algorithm", "fsverity-sha256-12")
    ours = str(tmp_path / "ours")
    init(ours, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    draw = random.Random(int(os.environ.get("CFS_FUZZ_SEED", "6")))
    with Repository.open(ours) as repository:
        layers = [damaged(draw) for _ in range(NR_LAYERS)]
        differences = [text for layer in layers if (text := compare(repository, rust, layer))]
    assert differences == []


def compare(repository: Repository, rust: Tool, layer: bytes) -> str:
    """Return how the two differ; nothing if they agree."""
    diff_id = digest_of(layer)
    theirs = rust("--repo", "theirs", "oci", "import-layer", diff_id, stdin=layer)
    blob = io.BytesIO(layer)
    try:
        import_layer(repository, blob, compression=Compression.NONE, diff_id=diff_id)
    except (FormatError, UnsupportedError) as error:
        is_right = theirs.returncode or any(text in str(error) for text in REFUSED_BY_US)
        return "" if is_right else f"{diff_id}: refused by us: {error}"
    if theirs.returncode:
        return f"{diff_id}: refused by them: {theirs.stderr!r}"
    theirs = rust("--repo", "theirs", "oci", "layer", "--dumpfile", diff_id)
    lines: list[bytes] = []
    is_whole = True
    try:
        lines.extend(format_entries(repository, diff_id))
    except (FormatError, UnsupportedError):
        is_whole = False
    found = b"".join(lines)
    if theirs.returncode == CRASHED or (found, is_whole) == (theirs.stdout, not theirs.returncode):
        return ""
    return f"{diff_id}: {found!r} beside {theirs.stdout!r}, {theirs.stderr!r}"
