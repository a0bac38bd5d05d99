"""Images of a store through the command line: the golden tree, and what users may do wrong."""

import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.command_line import Done, command, environment, run
from tests.stores import ALGORITHMS, STORES, load, unpack_store

IDS: dict[str, dict[str, dict[str, str]]] = json.loads((STORES / "tree-ids.json").read_text())
WAYS = {
    "oci": [],
    "oci-user": ["--xattrs", "keep-user-xattrs"],
    "plain": ["--no-propagate-usr-to-root"],
}
POLICY = "etc/selinux/t/contexts/files/file_contexts"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory, root: None) -> Path:  # noqa: ARG001
    """The directory with ``tree`` and ``extra``; owners and capabilities need root."""
    directory = tmp_path_factory.mktemp("trees")
    packed = (STORES / "tree.tar.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    options = ["--xattrs", "--xattrs-include=*", "-xpf", "-"]
    subprocess.run(["tar", *options], cwd=directory, input=data, check=True)
    return directory


def succeed(*words: str | bytes | Path, cwd: Path, stdin: bytes = b"") -> str:
    done = run("cfsctl", *words, cwd=cwd, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.decode()


def refuse(*words: str | bytes | Path, cwd: Path, stdin: bytes = b"", status: int = 1) -> str:
    done: Done = run("cfsctl", *words, cwd=cwd, stdin=stdin)
    assert done.returncode == status
    assert done.stdout == b""
    text = done.stderr.decode()
    assert "Traceback" not in text
    if status == 1:
        assert text.startswith("Error: ")
        assert text.count("\n") == 1
    return text


def make_store(path: Path, *words: str) -> Path:
    succeed("init", "--insecure", *words, path, cwd=path.parent)
    return path


def as_list(store: Path) -> dict[str, str]:
    listing = json.loads(succeed("--repo", store, "images", "--json", cwd=store))
    return {image["name"]: image["digest"] for image in listing["images"]}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("way", WAYS)
def test_golden_dump(trees: Path, algorithm: str, way: str) -> None:
    words = ["--no-repo", "--hash", algorithm, "create-dumpfile", *WAYS[way], "tree"]
    expected = (STORES / algorithm / f"tree-{way}.dump").read_text()
    assert succeed(*words, cwd=trees) == expected


@pytest.mark.parametrize("version", ["0", "1", "2"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_ids(trees: Path, tmp_path: Path, algorithm: str, version: str) -> None:
    store = make_store(tmp_path / "store", "--algorithm", f"fsverity-{algorithm}-12")
    for way, options in WAYS.items():
        expected = IDS[algorithm][way][version]
        computed = ["--no-repo", "--hash", algorithm, "--erofs-version", version, "compute-id"]
        assert succeed(*computed, *options, "tree", cwd=trees) == f"{expected}\n"
        created = ["--repo", str(store), "--erofs-version", version, "create-image"]
        assert succeed(*created, *options, "tree", way, cwd=trees) == f"{algorithm}:{expected}\n"
        assert os.path.isfile(store / "images" / expected)
    assert as_list(store) == {way: IDS[algorithm][way][version] for way in sorted(WAYS)}
    assert succeed("--repo", store, "fsck", cwd=trees).endswith("status: ok\n")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_store_made_here_has_the_objects_of_the_golden_one(
    trees: Path, tmp_path: Path, algorithm: str
) -> None:
    store = make_store(tmp_path / "store", "--algorithm", f"fsverity-{algorithm}-12")
    succeed("--repo", store, "create-image", "tree", "base", cwd=trees)
    golden = unpack_store(algorithm, tmp_path / "golden")
    ours = {path.relative_to(store): path for path in (store / "objects").glob("*/*")}
    assert len(ours) > 10
    for name, path in ours.items():
        assert path.read_bytes() == (golden / name).read_bytes()
    for link in ("images/refs/base", f"images/{IDS[algorithm]['oci']['1']}"):
        assert os.readlink(store / link) == os.readlink(golden / link)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_listing_and_names(tmp_path: Path, algorithm: str) -> None:
    store = unpack_store(algorithm, tmp_path / "store")
    listing = json.loads(succeed("--repo", store, "images", "--json", cwd=tmp_path))
    assert listing == load(algorithm, "images.json")
    cases: dict[str, Any] = load(algorithm, "open.json")["image-objects"]
    for name, case in cases.items():
        words = ["--repo", str(store), "image-objects", name]
        if case["rc"] or name.startswith("../"):  # which leads out of the images in 0.9
            refuse(*words, cwd=tmp_path)
        else:
            assert succeed(*words, cwd=tmp_path).splitlines() == case["stdout"]


def test_an_image_leaves_one_store_and_comes_into_another(trees: Path, tmp_path: Path) -> None:
    store = unpack_store("sha256", tmp_path / "golden")
    digest = IDS["sha256"]["oci"]["1"]
    image = (store / "images" / digest).read_bytes()
    other = make_store(tmp_path / "other", "--algorithm", "fsverity-sha256-12")
    words = ["--repo", str(other), "import-image", "a/name"]
    assert succeed(*words, cwd=trees, stdin=image) == f"sha256:{digest}\n"
    assert as_list(other) == {"a/name": digest}
    third = make_store(tmp_path / "third")
    text = refuse("--repo", third, "import-image", "x", cwd=trees, stdin=image)
    assert "named by sha256: expected sha512" in text
    assert "image: " in refuse("--repo", third, "import-image", "x", cwd=trees)
    assert os.listdir(third) == ["meta.json"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A directory ``tree`` and an empty store ``store``, which need no privileges."""
    (tmp_path / "tree" / "usr").mkdir(parents=True)
    (tmp_path / "tree" / "usr" / "big").write_bytes(b"b" * 100)
    make_store(tmp_path / "store")
    return tmp_path


def test_extra_formats_and_a_format_for_once(small: Path) -> None:
    meta = small / "store" / "meta.json"
    meta.write_text(meta.read_text().replace('"default": 1', '"default": 2, "extra": [0]'))
    in_two = succeed("--repo", "store", "create-image", "tree", "n", cwd=small)
    ids = [
        succeed("--no-repo", "--erofs-version", version, "compute-id", "tree", cwd=small).strip()
        for version in ("0", "1", "2")
    ]
    assert in_two == f"sha512:{ids[2]}\n"
    images = small / "store" / "images"
    assert sorted(os.listdir(images)) == sorted([ids[0], ids[2], "refs"])
    words = ["--repo", "store", "--erofs-version", "1", "create-image", "tree", "n"]
    assert succeed(*words, cwd=small) == f"sha512:{ids[1]}\n"
    assert os.readlink(images / "refs" / "n") == f"../{ids[1]}"
    assert sorted(os.listdir(images)) == sorted([*ids, "refs"])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a//b", "a/", "mounted/x", "n" * 256]
)
def test_bad_names_store_nothing(small: Path, name: str) -> None:
    refuse("--repo", "store", "create-image", "tree", name, cwd=small)
    refuse("--repo", "store", "import-image", name, cwd=small)
    assert os.listdir(small / "store") == ["meta.json"]


def test_the_directory_must_be_one(small: Path) -> None:
    (small / "link").symlink_to("tree")
    (small / "file").touch()
    for path in ("nope", "link", "file", ""):
        for verb in ("create-image", "compute-id", "create-dumpfile", "compute-karg"):
            refuse("--repo", "store", verb, path, cwd=small)
    succeed("--repo", "store", "compute-id", "link/", cwd=small)


def test_a_tree_without_usr_is_refused_unless_it_is_kept(small: Path) -> None:
    (small / "bare").mkdir()
    message = refuse("--repo", "store", "create-image", "bare", cwd=small)
    assert "/usr does not exist (--no-propagate-usr-to-root " in message
    words = ["--repo", "store", "create-image", "--no-propagate-usr-to-root", "bare"]
    assert succeed(*words, cwd=small).startswith("sha512:")


def test_what_needs_a_store_says_so_without_one(small: Path) -> None:
    for words in (["create-image", "tree"], ["import-image", "x"], ["images"], ["dump-files", "x"]):
        assert "--no-repo is only" in refuse("--no-repo", *words, cwd=small)


def test_trouble_with_the_store_is_none_of_compute_id(small: Path) -> None:
    expected = succeed("--no-repo", "compute-id", "tree", cwd=small)
    (small / "broken").mkdir()
    (small / "broken" / "meta.json").write_text("nothing")
    for path in ("nope", "broken", "tree/usr/big"):
        assert succeed("--repo", path, "compute-id", "tree", cwd=small) == expected
    done = run("cfsctl", "--user", "compute-id", "tree", cwd=small, HOME="")
    assert done.stdout.decode() == expected


@pytest.fixture
def bootable(small: Path) -> Path:
    """``tree`` with a policy and a boot entry, both too large to be inside of the image."""
    tree = small / "tree"
    for name in ("boot/loader/entries", "sysroot", os.path.dirname(POLICY)):
        (tree / name).mkdir(parents=True)
    (tree / "etc/selinux/config").write_text(f"# {'x' * 100}\nSELINUXTYPE=t\n")
    (tree / POLICY).write_text(f"# {'x' * 100}\n/.* any\n/usr/big big\n")
    (tree / "boot/loader/entries/a.conf").write_text(f"# {'x' * 100}\nlinux /usr/big\n")
    return small


def test_a_bootable_image_has_the_labels_of_its_policy(bootable: Path) -> None:
    dump = succeed("--repo", "store", "create-dumpfile", "--bootable", "tree", cwd=bootable)
    labels = {line.split()[0]: line.split()[-1] for line in dump.splitlines()}
    assert labels["/usr/big"] == "security.selinux=big"
    assert labels["/usr"] == labels["/"] == "security.selinux=any"
    assert "/boot/loader" not in labels
    digest = succeed("--repo", "store", "compute-id", "--bootable", "tree", cwd=bootable)
    created = succeed("--repo", "store", "create-image", "--bootable", "tree", cwd=bootable)
    assert created == f"sha512:{digest}"
    karg = succeed("--repo", "store", "compute-karg", "tree", cwd=bootable)
    assert karg == f"composefs.digest=v1-sha512-12:{digest}"


def test_a_boot_entry_that_leads_nowhere_is_no_matter_without_a_store(bootable: Path) -> None:
    entry = bootable / "tree/boot/loader/entries/a.conf"
    entry.write_text(f"# {'x' * 100}\nlinux /nope\n")
    words = ["--repo", "store", "create-image", "--bootable", "tree", "n"]
    assert "/nope does not exist" in refuse(*words, cwd=bootable)
    assert not (bootable / "store" / "images").exists()
    succeed("--repo", "store", "compute-id", "--bootable", "tree", cwd=bootable)


def test_no_symlink_decides_about_labels(bootable: Path) -> None:
    """0.9 follows it in ``compute-id``, even out of the tree, and refuses in ``create-image``."""
    policy = bootable / "tree" / POLICY
    policy.rename(bootable / "outside")
    policy.symlink_to(bootable / "outside")
    for verb in ("create-image", "compute-id", "create-dumpfile"):
        text = refuse("--repo", "store", verb, "--bootable", "tree", cwd=bootable)
        assert f"/{POLICY} is not a regular file" in text


def test_dangling_and_foreign_names_are_listed(small: Path) -> None:
    assert succeed("--repo", "store", "images", cwd=small) == "No images found\n"
    succeed("--repo", "store", "create-image", "tree", "a\x1b[2Jb", cwd=small)
    refs = small / "store" / "images" / "refs"
    (refs / "dangling").symlink_to("../nowhere/at-all")
    (refs / "file").touch()
    table = succeed("--repo", "store", "images", cwd=small)
    assert "│ dangling  ┆ at-all " in table
    assert r"│ a\x1b[2Jb ┆ " in table
    assert "file" not in table
    listing = json.loads(succeed("--repo", "store", "images", "--json", cwd=small))
    assert [image["name"] for image in listing["images"]] == ["a\x1b[2Jb", "dangling"]


def test_json_is_utf_8_in_any_locale(small: Path) -> None:
    succeed("--repo", "store", "create-image", "tree", "é", cwd=small)
    done = run(
        "cfsctl", "--repo", "store", "images", "--json",
        cwd=small, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"é"'.encode() in done.stdout


def test_progress_is_shown_on_a_terminal(small: Path) -> None:
    controller, terminal = pty.openpty()
    try:
        words = [*command("cfsctl"), "--repo", "store", "create-image", "tree"]
        done = subprocess.run(
            words, cwd=small, env=environment(), stdout=subprocess.PIPE, stderr=terminal, check=True
        )
        shown = os.read(controller, 4096)
    finally:
        os.close(terminal)
        os.close(controller)
    assert done.stdout.startswith(b"sha512:")
    assert b"Storing: 1 files" in shown
    assert shown.endswith(b"\r\x1b[K")


def test_dump_files_prints_all_or_nothing(small: Path) -> None:
    succeed("--repo", "store", "create-image", "tree", "n", cwd=small)
    words = ["--repo", "store", "dump-files", "n"]
    line = succeed(*words, "/usr/big", cwd=small)
    name = line.split()[8]
    assert (small / "store" / "objects" / name).read_bytes() == b"b" * 100
    backing = succeed(*words, "--backing-path-only", "usr/big", cwd=small)
    assert backing == f"usr/big {name}\n"
    assert "/nope not found" in refuse(*words, "/usr/big", "/nope", cwd=small)
    assert succeed(*words, cwd=small) == ""
    refuse("--repo", "store", "dump-files", "other", "/usr", cwd=small)


def test_a_file_that_is_no_image(small: Path) -> None:
    digest = succeed("--repo", "store", "create-image", "tree", "n", cwd=small).strip()[7:]
    path = small / "store" / "objects" / digest[:2] / digest[2:]
    path.write_bytes(b"x" * 5000)
    for words in (["image-objects", "n"], ["dump-files", "n", "/usr"]):
        assert "Error: n: " in refuse("--repo", "store", *words, cwd=small)
