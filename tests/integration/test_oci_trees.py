"""``oci dump``, ``oci compute-id``, ``oci prepare-boot``: how they are called, what they print."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import Rules, write_image
from cfs.fsverity import compute_digest
from tests.command_line import Done, run_here
from tests.oci_layouts import Layout, digest_of, make_tar

LAYERS = [
    make_tar({"usr": None, "boot": None, "sysroot": None, "gone": b"x", "big": b"y" * 100}),
    make_tar({".wh.gone": b"", "usr/lib": None, "usr/lib/modules": None}),
    make_tar(
        {
            "usr/lib/modules/6.1": None,
            "usr/lib/modules/6.1/vmlinuz": b"k" * 100,
            "usr/lib/modules/6.1/initramfs.img": b"i" * 100,
        }
    ),
]
OPTIONS = [(), ("--bootable",), ("--xattrs", "keep-user-xattrs")]

Cfsctl = Callable[..., Done]


@pytest.fixture
def cfsctl(
    capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Cfsctl:
    """Run a command on a store with an image ``app`` and an artifact ``sig``."""
    monkeypatch.chdir(tmp_path)
    layout = Layout(tmp_path / "layout")
    layout.add_image("app", LAYERS)
    layout.add_artifact("sig", [layout.add_blob(b"signature", "text/plain")])

    def call(*words: str) -> Done:
        return run_here(capfdbinary, "--repo", "store", *words)

    assert call("init", "--insecure").returncode == 0
    for name in ("app", "sig"):
        assert call("oci", "pull", f"oci:layout:{name}", name).returncode == 0
    return call


def config_of(cfsctl: Cfsctl) -> str:
    manifest = json.loads(cfsctl("oci", "inspect", "app", "--manifest").stdout)
    digest: str = manifest["config"]["digest"]
    return digest


def stream_of(name: str) -> str:
    return os.readlink(f"store/streams/{name}").removeprefix("../objects/").replace("/", "")


def test_dump_and_id_are_those_of_the_image(cfsctl: Cfsctl) -> None:
    digest = cfsctl("oci", "compute-id", "app").stdout.decode().strip()
    assert json.loads(cfsctl("oci", "inspect", "app").stdout)["composefs_erofs"] == digest
    dump = cfsctl("oci", "dump", "app").stdout
    assert [line.split(b" ")[0] for line in dump.splitlines()] == [
        b"/", b"/big", b"/boot", b"/sysroot", b"/usr", b"/usr/lib", b"/usr/lib/modules",
        b"/usr/lib/modules/6.1", b"/usr/lib/modules/6.1/initramfs.img",
        b"/usr/lib/modules/6.1/vmlinuz",
    ]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("version", [1, 2])
def test_the_dump_is_what_the_image_is_made_of(
    cfsctl: Cfsctl, options: tuple[str, ...], version: int
) -> None:
    dump = cfsctl("oci", "dump", *options, "app")
    found = cfsctl("--erofs-version", str(version), "oci", "compute-id", *options, "app")
    assert (dump.returncode, found.returncode) == (0, 0)
    root = parse_dumpfile(dump.stdout)
    image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
    assert found.stdout.decode() == f"{compute_digest(image, Algorithm.SHA512)}\n"


def test_config_and_stream_name_the_same_image(cfsctl: Cfsctl) -> None:
    digest = config_of(cfsctl)
    stream = stream_of(f"oci-config-{digest}")
    by_tag = cfsctl("oci", "compute-id", "app").stdout
    for words in ((f"@{digest}",), (f"@{digest}", stream), ("app", "0" * len(stream))):
        assert cfsctl("oci", "compute-id", *words).stdout == by_tag


@pytest.mark.parametrize("command", ["dump", "compute-id", "prepare-boot"])
@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("nope",), 1, b"OCI reference not found: nope"),
        (("sig",), 1, b"sig is an artifact"),
        (("@sha256:12",), 2, b"invalid digest"),
        ((f"@sha256:{'0' * 64}",), 1, b"0" * 64),
        (("app", "00"), 1, b"digest '00': expected 64 or 128 hex digits"),
        (("CONFIG", "0" * 128), 1, b"object not found: " + b"0" * 128),
        (("CONFIG", "MANIFEST"), 1, b"Invalid splitstream content type"),
        ((), 2, b"REF"),
    ],
)
def test_what_names_no_container_image(
    cfsctl: Cfsctl, command: str, words: tuple[str, ...], status: int, message: bytes
) -> None:
    config = config_of(cfsctl)
    manifest = json.loads(cfsctl("oci", "images", "--json").stdout)["images"][0]
    names = {
        "CONFIG": f"@{config}",
        "MANIFEST": stream_of(f"oci-manifest-{manifest['manifest_digest']}"),
    }
    done = cfsctl("oci", command, *(names.get(word, word) for word in words))
    assert (done.returncode, done.stdout) == (status, b"")
    assert message in done.stderr
    assert status == 2 or done.stderr.count(b"\n") == 1


def test_layers_are_verified_unless_the_stream_is_named(cfsctl: Cfsctl) -> None:
    digest = config_of(cfsctl)
    stream = stream_of(f"oci-config-{digest}")
    by_tag = cfsctl("oci", "compute-id", "app").stdout
    path = compute_digest(b"y" * 100, Algorithm.SHA512).object_path.decode()
    Path("store/objects", path).chmod(0o644)
    Path("store/objects", path).write_bytes(b"z" * 100)
    for words in (("app",), (f"@{digest}", stream)):
        assert cfsctl("oci", "compute-id", *words).stdout == by_tag
    for command in ("compute-id", "dump"):
        done = cfsctl("oci", command, f"@{digest}")
        assert (done.returncode, done.stdout) == (1, b"")
        expected = f"Layer has incorrect checksum: expected {digest_of(LAYERS[0])}"
        assert expected.encode() in done.stderr


def test_a_boot_entry_and_the_state_of_the_image(cfsctl: Cfsctl) -> None:
    options = ("--bootdir", "boot", "--entry-id", "x", "--cmdline", "a=b", "--cmdline", "quiet")
    done = cfsctl("oci", "prepare-boot", "app", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    digest = cfsctl("oci", "compute-id", "--bootable", "app").stdout.decode().strip()
    entry = Path("boot/loader/entries/x.conf").read_text().splitlines()
    assert entry[-1] == f"options composefs.digest=?v1-sha512-12:{digest} a=b quiet"
    assert Path("boot/x/vmlinuz").read_bytes() == b"k" * 100
    state = Path("state/deploy") / digest
    assert sorted(str(path.relative_to(state)) for path in state.rglob("*")) == [
        "etc", "etc/upper", "etc/work", "var",
    ]  # fmt: skip
    assert cfsctl("gc").returncode == 0
    assert Path(f"store/images/{digest}").exists()


def test_a_store_that_prefers_format_2_boots_that_one(cfsctl: Cfsctl) -> None:
    done = cfsctl("--erofs-version", "2", "oci", "prepare-boot", "app", "--bootdir", "boot")
    assert done.returncode == 0
    words = ("--erofs-version", "2", "oci", "compute-id", "--bootable", "app")
    digest = cfsctl(*words).stdout.decode().strip()
    entry = Path("boot/loader/entries/6.1.conf").read_text().splitlines()
    assert entry[-1] == f"options composefs=?{digest}"
