"""Images from registries: Debian's ``docker-registry`` with a real image."""

import http.client
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.debian_image import TAG, get_debian_image
from tests.integration.registry import (
    PASSWORD,
    USER,
    Cfs,
    Registry,
    need,
    plain_registry,
    pulled,
    refused,
    secret_registry,
    streams,
)
from tests.integration.stores import run, unmount
from tests.vm.cache import Unavailable

SECONDS = 300
KEPT_ATTRIBUTE = "security.capability"  # spec repository 6.5


@pytest.fixture(scope="module")
def registry(layouts: Path) -> Iterator[Registry]:
    need("skopeo", "docker-registry")
    directory = layouts / "registry"
    directory.mkdir()
    with plain_registry(directory) as running:
        yield running


@pytest.mark.usefixtures("root", "fuse")
def test_debian_from_registries(tmp_path: Path, mnt: Path) -> None:
    need("skopeo", "docker-registry", "umoci", "htpasswd", "openssl")
    try:
        layout = get_debian_image()
    except Unavailable as error:
        pytest.skip(f"no Debian image: {error}")
    with plain_registry(tmp_path) as plain:
        plain.push(f"oci:{layout}:{TAG}", "debian")
        first = pull_debian(tmp_path / "first", plain)
    with secret_registry(tmp_path) as secret:
        second = pull_debian(tmp_path / "second", secret)
    assert first == second

    run("--repo", tmp_path / "first", "oci", "mount", "--fuse", "debian", mnt)
    try:
        seen = walk(mnt)
    finally:
        unmount(mnt)
    bundle = tmp_path / "bundle"
    subprocess.run(
        ["umoci", "unpack", f"--image={layout}:{TAG}", str(bundle)],
        check=True, capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    transform(bundle / "rootfs")
    expected = walk(bundle / "rootfs")
    shutil.rmtree(bundle)
    assert len(expected) > 2000
    assert {path: (seen.get(path), found) for path, found in expected.items()
            if seen.get(path) != found} == {}  # fmt: skip
    assert seen.keys() == expected.keys()
    check_interesting(expected)


def pull_debian(store: Path, registry: Registry) -> list[str]:
    run("--repo", store, "init", "--insecure")
    image = registry.image("debian")
    printed = run("--repo", store, "oci", "pull", *registry.access, image, "debian").stdout
    run("--repo", store, "fsck")
    return [*printed.splitlines()[:2], run("--repo", store, "oci", "compute-id", "debian").stdout]


def transform(root: Path) -> None:
    """Apply the transformations of spec repository 6.5 to an unpacked tree."""
    usr = (root / "usr").lstat()
    for path in (root, *root.rglob("*")):
        for name in os.listxattr(path, follow_symlinks=False):
            if name != KEPT_ATTRIBUTE:
                os.removexattr(path, name, follow_symlinks=False)
    for path in (root / "run").iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    os.utime(root / "run", ns=(usr.st_mtime_ns, usr.st_mtime_ns))
    os.chown(root, usr.st_uid, usr.st_gid)
    root.chmod(stat.S_IMODE(usr.st_mode))
    os.utime(root, ns=(usr.st_mtime_ns, usr.st_mtime_ns))


@dataclass(frozen=True)
class Seen:
    """All that can be seen of a file; images of format 2 have no fractions of seconds."""

    mode: int
    owner: tuple[int, int]
    device: int
    mtime: int
    attributes: dict[str, bytes]
    content: int | str  # hash of the bytes, or the target
    names: frozenset[str]


def walk(root: Path) -> dict[str, Seen]:
    paths = {str(path.relative_to(root)): path for path in (root, *root.rglob("*"))}
    found = {name: path.lstat() for name, path in paths.items()}
    names: dict[int, set[str]] = {}
    for name, status in found.items():
        names.setdefault(status.st_ino, set()).add(name)
    return {
        name: Seen(
            status.st_mode,
            (status.st_uid, status.st_gid),
            status.st_rdev,
            int(status.st_mtime),
            {
                key: os.getxattr(paths[name], key, follow_symlinks=False)
                for key in os.listxattr(paths[name], follow_symlinks=False)
            },
            read(paths[name], status.st_mode),
            frozenset(names[status.st_ino]),
        )
        for name, status in found.items()
    }


def read(path: Path, mode: int) -> int | str:
    if stat.S_ISLNK(mode):
        return os.readlink(path)
    return hash(path.read_bytes()) if stat.S_ISREG(mode) else 0


def check_interesting(tree: dict[str, Seen]) -> None:
    """Make sure that the image still has what it was made for."""
    assert KEPT_ATTRIBUTE in tree["opt/app/ping"].attributes
    assert tree["opt/app/os-release"].names == {"opt/app/os-release", "usr/lib/os-release"}
    assert tree["opt/app/file-9"].names == {"opt/app/file-9", "opt/app/file-10"}
    assert stat.S_ISREG(tree["opt/app/becomes-a-file"].mode)
    assert stat.S_ISDIR(tree["opt/app/becomes-a-directory"].mode)
    assert KEPT_ATTRIBUTE in tree["opt/app/file-21"].attributes
    assert tree["opt/app/by-umoci"].names == {"opt/app/by-umoci", "opt/app/by-umoci-too"}
    assert "opt/app/opaque/new" in tree
    gone = ("file-3", "file-20", "removed", "opaque/inner")
    assert not tree.keys() & {f"opt/app/{name}" for name in gone} | tree.keys() & {"usr/bin/yes"}
    assert not [path for path in tree if path.startswith("run/")]


def test_access_to_a_registry(tmp_path: Path, layouts: Path, cfs: Cfs) -> None:
    need("skopeo", "docker-registry", "htpasswd", "openssl")
    with secret_registry(tmp_path) as secret:
        secret.push(f"oci:{layouts}/fixture", "fixture")
        image = secret.image("fixture")
        certificates, credentials = secret.access
        wrong = f"--creds={USER}:wrong"
        assert "unauthorized" in refused(cfs("oci", "pull", certificates, wrong, image))
        assert "unauthorized" in refused(cfs("oci", "pull", certificates, image))
        assert "certificate" in refused(cfs("oci", "pull", credentials, image))
        assert streams(tmp_path) == set()
        first = pulled(cfs("oci", "pull", "--tls-verify=false", credentials, image, "first"))

        authfile = tmp_path / "authfile"
        login = ["skopeo", "login", f"--cert-dir={certificates.partition('=')[2]}"]
        login += [f"--authfile={authfile}", f"--username={USER}", f"--password={PASSWORD}"]
        subprocess.run([*login, secret.address], check=True, capture_output=True, timeout=SECONDS)
        words = [certificates, f"--authfile={authfile}", image, "second"]
        assert pulled(cfs("oci", "pull", *words)) == first


def test_docker_schema_2(registry: Registry, layouts: Path, cfs: Cfs) -> None:
    registry.push(f"oci:{layouts}/fixture", "docker", "--format=v2s2")
    access = list(registry.access)
    pulled(cfs("oci", "pull", *access, registry.image("docker"), "docker"))
    pulled(cfs("oci", "pull", f"oci:{layouts}/fixture", "layout"))
    ids = {cfs("oci", "compute-id", name).stdout for name in ("docker", "layout")}
    assert len(ids) == 1
    assert cfs("oci", "fsck").returncode == 0
    again = cfs("oci", "pull", *access, registry.image("docker"), "docker")
    assert b"0 new" in again.stdout


def test_transports_of_skopeo(registry: Registry, layouts: Path, tmp_path: Path, cfs: Cfs) -> None:
    kept = "--preserve-digests"  # skopeo compresses layers otherwise
    registry.push(f"oci:{layouts}/multi:v1", "multi", kept)
    copied = f"dir:{tmp_path}/copied"
    command = ["skopeo", "--insecure-policy", "copy", "-q", kept, f"oci:{layouts}/multi:v1"]
    subprocess.run([*command, copied], check=True, capture_output=True, timeout=SECONDS)
    access = list(registry.access)
    expected = pulled(cfs("oci", "pull", f"oci:{layouts}/multi:v1", "layout"))
    plain = f"registry:{registry.address}/multi"
    for image in (copied, plain, registry.image(f"multi@{expected}")):
        assert pulled(cfs("oci", "pull", *access, image)) == expected
    missing = refused(cfs("oci", "pull", *access, registry.image("missing")))
    assert "manifest unknown" in missing


def test_platform_is_chosen(registry: Registry, layouts: Path, cfs: Cfs) -> None:
    """An index of two images that differ in their platform."""
    access = list(registry.access)
    names = {"amd64": "fixture", "s390x": "other-arch"}
    entries = []
    for architecture, name in names.items():
        registry.push(f"oci:{layouts}/{name}", f"list:{architecture}")
        (entry,) = json.loads((layouts / name / "index.json").read_bytes())["manifests"]
        platform = {"os": "linux", "architecture": architecture}
        entries.append({**entry, "platform": platform})
    entries[1]["platform"]["variant"] = "z1"
    put_index(registry, "list", entries)
    for architecture, entry in zip(names, entries, strict=True):
        variant = entry["platform"].get("variant", "")
        words = [*access, f"--arch={architecture}", f"--variant={variant}"]
        words.append(registry.image("list:both"))
        assert pulled(cfs("oci", "pull", *words)) == entry["digest"]
    for wrong in ("--os=plan9", "--variant=z9"):
        words = [*access, "--arch=s390x", wrong, registry.image("list:both")]
        assert wrong.partition("=")[2] in refused(cfs("oci", "pull", *words))


def put_index(registry: Registry, name: str, entries: Sequence[object]) -> None:
    kind = "application/vnd.oci.image.index.v1+json"
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": entries})
    connection = http.client.HTTPConnection(registry.address)
    connection.request("PUT", f"/v2/{name}/manifests/both", body, {"Content-Type": kind})
    response = connection.getresponse()
    assert response.status == 201, response.read()
    connection.close()
