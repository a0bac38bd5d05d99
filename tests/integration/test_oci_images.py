"""``oci images``, ``inspect``, ``tag``, ``untag`` and ``fsck`` as users see them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.oci.documents import load_config
from cfs.oci.tags import set_tag
from cfs.repository.repository import Repository, init
from tests.command_line import Done, run, run_here
from tests.oci_documents import ARTIFACT_TYPE, StoredImage

OTHER = "sha256:" + "0" * 64
HOSTILE = [
    b"",
    b"null",
    b"[" * 100_000,
    b'{"config":' * 100_000,
    b'{"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": ["../../x"]}}',
    b'{"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": {}}}',
    b'{"architecture": "\\ud800", "os": "linux", "rootfs": {"diff_ids": []}}',
    b'{"architecture": "a", "os": "b", "os": "c", "rootfs": {"diff_ids": []}}',
    b'{"architecture": "a", "os": ' + b"9" * 5000 + b', "rootfs": {"diff_ids": []}}',
    b"\xff\xfe",
]
Cfsctl = Callable[..., Done]


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    store = str(tmp_path / "store")
    init(store, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with Repository.open(store) as opened:
        yield opened


@pytest.fixture
def cfsctl(repository: Repository, capfdbinary: pytest.CaptureFixture[bytes]) -> Cfsctl:
    """Run ``cfsctl oci`` in this process."""

    def call(*words: str) -> Done:
        return run_here(capfdbinary, "--repo", repository.path, "oci", *words)

    return call


def check(done: Done, stdout: str) -> None:
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, stdout, b"")


def check_failure(done: Done, words: str, status: int = 1) -> None:
    assert (done.returncode, done.stdout) == (status, b"")
    assert words in done.stderr.decode()
    assert status == 2 or done.stderr.count(b"\n") == 1


def test_tags_come_and_go(repository: Repository, cfsctl: Cfsctl) -> None:
    image = StoredImage(repository)
    artifact = StoredImage(repository, config=b"{}", config_type=ARTIFACT_TYPE)
    check(cfsctl("images"), "No images found\n")
    check(cfsctl("images", "--json"), '{\n  "images": []\n}\n')
    check(cfsctl("tag", image.digest, "b/c:d"), f"Tagged {image.digest} as b/c:d\n")
    check(cfsctl("tag", image.digest, "two\nlines"), f"Tagged {image.digest} as two\\nlines\n")
    check(cfsctl("tag", artifact.digest, "sig"), f"Tagged {artifact.digest} as sig\n")
    short, of_artifact = (one.digest[7:19] for one in (image, artifact))
    rows = [
        f"│ b/c:d      ┆ {short} ┆ amd64    ┆ 2      ┆ 0    │",
        f"│ sig        ┆ {of_artifact} ┆ artifact ┆ 2      ┆ 0    │",
        f"│ two\\nlines ┆ {short} ┆ amd64    ┆ 2      ┆ 0    │",
    ]
    assert cfsctl("images").stdout.decode().splitlines()[3::2] == rows
    found = json.loads(cfsctl("images", "--json").stdout)["images"]
    assert [entry["name"] for entry in found] == ["b/c:d", "sig", "two\nlines"]
    created = "2026-01-01T00:00:00Z"
    assert [entry["created"] for entry in found] == [created, None, created]
    for name, shown in (("two\nlines", "two\\nlines"), ("b/c:d", "b/c:d"), ("sig", "sig")):
        check(cfsctl("untag", name), f"Removed tag {shown}\n")
    check(cfsctl("images"), "No images found\n")
    check_failure(cfsctl("untag", "sig"), "Error: OCI reference not found: sig\n")


def test_what_cannot_be_tagged(repository: Repository, cfsctl: Cfsctl) -> None:
    """A tag that leads nowhere would keep collections from removing anything."""
    image = StoredImage(repository)
    check_failure(cfsctl("tag", OTHER, "x"), f"Error: Manifest {OTHER} not found\n")
    for name in ("", ".", "@x", "x" * 256):
        check_failure(cfsctl("tag", image.digest, name), "Error: ")
    for digest in ("x", "sha256:00", f"@{image.digest}"):
        check_failure(cfsctl("tag", digest, "x"), "invalid digest", status=2)
    assert not (Path(repository.path) / "streams" / "refs").exists()


def test_inspecting(repository: Repository, cfsctl: Cfsctl) -> None:
    made = repository.objects.put_bytes(b"an image" * 20)
    image = StoredImage(repository, images={"composefs.image.v1": made})
    set_tag(repository, "a", image.digest)
    for reference in ("a", f"@{image.digest}"):
        done = cfsctl("inspect", reference)
        assert done.returncode == 0
        assert json.loads(done.stdout) == {
            "manifest": image.data.decode(),
            "config": image.config_data.decode(),
            "referrers": [],
            "composefs_erofs": str(made),
            "composefs_boot_erofs": None,
        }
        check(cfsctl("inspect", "--manifest", reference), image.data.decode() + "\n")
        check(cfsctl("inspect", "--config", reference), image.config_data.decode() + "\n")
    words = "--manifest cannot be used with --config"
    check_failure(cfsctl("inspect", "--manifest", "--config", "a"), words, status=2)
    check_failure(cfsctl("inspect", "@a"), "invalid digest 'a'", status=2)
    check_failure(cfsctl("inspect", f"@{OTHER}"), f"Error: Manifest {OTHER} not found\n")
    check_failure(cfsctl("inspect", ""), "Error: invalid tag ''")
    check_failure(cfsctl("inspect", image.digest), "Error: OCI reference not found: sha256:")


def test_an_artifact_with_any_config(repository: Repository, cfsctl: Cfsctl) -> None:
    config = b"\xff\0" + "é".encode()
    image = StoredImage(repository, config=config, config_type=ARTIFACT_TYPE)
    set_tag(repository, "a", image.digest)
    text = json.loads(cfsctl("inspect", "a").stdout)["config"]
    assert text.encode(errors="surrogateescape") == config
    assert cfsctl("inspect", "--config", "a").stdout == config + b"\n"
    assert json.loads(cfsctl("fsck", "--json").stdout)["ok"]


def test_an_artifact_without_its_config_is_not_listed(
    repository: Repository, cfsctl: Cfsctl
) -> None:
    image = StoredImage(repository, config_type=ARTIFACT_TYPE)
    set_tag(repository, "a", image.digest)
    repository.sync()
    stream = load_config(repository, image.config).stream
    (Path(repository.path) / "objects" / stream.object_path.decode()).unlink()
    listed = cfsctl("images")
    assert (listed.returncode, listed.stdout) == (0, b"No images found\n")
    assert listed.stderr.startswith(b"Warning: a: Opening stream 'oci-config-sha256:")


@pytest.mark.parametrize("config", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_configs(repository: Repository, cfsctl: Cfsctl, config: bytes) -> None:
    sound, image = StoredImage(repository), StoredImage(repository, config=config)
    set_tag(repository, "good", sound.digest)
    set_tag(repository, "bad", image.digest)
    listed = cfsctl("images", "--json")
    assert [entry["name"] for entry in json.loads(listed.stdout)["images"]] == ["good"]
    assert listed.stderr.startswith(b"Warning: bad: config")
    assert listed.stderr.count(b"\n") == 1
    check_failure(cfsctl("inspect", "bad"), "Error: config")
    report = json.loads(cfsctl("fsck", "--json").stdout)
    assert (report["images_checked"], report["images_corrupted"]) == (2, 1)
    (finding,) = report["errors"]
    assert finding.startswith("fsck: config-parse-failed: bad: config")


def test_checking_one_image(repository: Repository, cfsctl: Cfsctl) -> None:
    sound, bad = StoredImage(repository), StoredImage(repository, config=b"no JSON")
    set_tag(repository, "good", sound.digest)
    set_tag(repository, "bad", bad.digest)
    done = cfsctl("fsck", "good")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().endswith("\nstatus: ok\noci images: 1/1 ok\n")
    done = cfsctl("fsck", "nothing")
    assert (done.returncode, done.stderr) == (1, b"Error: OCI integrity check failed\n")
    finding = "fsck: ref-resolve-failed: nothing: OCI reference not found: nothing"
    assert done.stdout.decode().endswith(f"\noci images: 0/1 ok\noci errors: 1\n  - {finding}\n")
    for name, kind in (("bad", "config-parse-failed: bad"), ("..", "ref-resolve-failed: ..")):
        done = cfsctl("fsck", "--json", name)
        assert done.returncode == 0
        report = json.loads(done.stdout)
        assert (report["ok"], report["images_corrupted"]) == (False, 1)
        (error,) = report["errors"]
        assert error.startswith(f"fsck: {kind}: ")


def test_findings_stay_in_their_line(repository: Repository, cfsctl: Cfsctl) -> None:
    seal = {"containers.composefs.fsverity": "two\nlines"}
    set_tag(repository, "a\nb", StoredImage(repository, labels=seal).digest)
    finding = "fsck: seal-image-missing: a\\nb: two\\nlines: Opening image 'two\\nlines'"
    assert cfsctl("fsck").stdout.decode().endswith(f"\noci errors: 1\n  - {finding}\n")


def test_a_seal_names_an_image(repository: Repository, cfsctl: Cfsctl) -> None:
    digest = repository.objects.put_bytes(b"an image" * 20)
    image = StoredImage(repository, labels={"containers.composefs.fsverity": str(digest)})
    set_tag(repository, "a", image.digest)
    kind = f"fsck: seal-image-missing: a: {digest}: "
    (error,) = json.loads(cfsctl("fsck", "--json").stdout)["errors"]
    assert error.startswith(kind)
    directory = Path(repository.path) / "images"
    directory.mkdir()
    (directory / str(digest)).symlink_to(f"../objects/{digest.object_path.decode()}")
    assert json.loads(cfsctl("fsck", "--json").stdout)["errors"] == []


def test_layers_that_are_not_there(repository: Repository, cfsctl: Cfsctl) -> None:
    image = StoredImage(repository)
    set_tag(repository, "a", image.digest)
    repository.sync()
    (_, first), (diff_id, _) = image.layers
    (Path(repository.path) / "objects" / first.object_path.decode()).unlink()
    (Path(repository.path) / "streams" / f"oci-layer-{diff_id}").unlink()
    report = json.loads(cfsctl("fsck", "--json").stdout)
    assert report["errors"] == [
        f"fsck: layer-object-missing: a: {image.layers[0][0]}: Opening object sha256:{first}",
        f"fsck: layer-stream-missing: a: {diff_id}",
    ]


def test_commands_start_quickly(repository: Repository) -> None:
    """None of them needs numpy, whose import takes longer than all the rest."""
    image = StoredImage(repository)
    set_tag(repository, "a", image.digest)
    lines = [["images"], ["inspect", "a"], ["tag", image.digest, "b"], ["untag", "b"], ["--help"]]
    for line in lines:
        done = run(
            "cfsctl",
            *("--repo", repository.path, "oci", *line),
            cwd=Path(repository.path),
            PYTHONPROFILEIMPORTTIME="1",
        )
        assert done.returncode == 0
        loaded = {entry.rpartition(b"|")[2].strip() for entry in done.stderr.splitlines()}
        assert b"click" in loaded
        assert not loaded & {b"numpy", b"isal", b"pyfuse3"}
