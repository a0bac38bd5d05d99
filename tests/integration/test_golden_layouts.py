"""Layouts that composefs-rs 0.9 has pulled, beside what we make of them: ``tests/data/oci``.

Where 0.9 is wrong (own marks of spec repository 5) we differ, and each of these is listed here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Result, run_text
from tests.paths import DATA

Case = dict[str, Any]

CASES: dict[str, Case] = json.loads((DATA / "oci" / "layouts.json").read_text())
VERSIONS = ("0", "1", "2")
# not read by 0.9, or only in part: which layout holds the same files
SAME_TREE = {
    "nested-index-only": "fixture",
    "docker-schema2": "fixture",
    "gzip-2-members": "gzip-trailing-zeros",
    "gzip-2-members-mid": "gzip-trailing-zeros",
    "gzip-empty-first": "gzip-trailing-zeros",
    "zstd-2-frames": "gzip-trailing-zeros",
    "zstd-skippable-first": "gzip-trailing-zeros",
}
# read by 0.9 though it is damaged: what we say
REFUSED = {
    "bad-layer-blob": "sha256:20e86c25666745437ca21c0d9715e57b511a13c550fc40d06198ac9b56ee7e9f",
    "bad-manifest-blob": "sha256:31258a2e41f3472c16e1600562550593fcd6e29f36ae7cbb35d280ae99c362a6",
    "bad-config-blob": "sha256:4e86e52af0b088fa448892c6075dae6da8520ec04e6585f77daf363040733429",
    "bad-diff-id": "sha256:1111111111111111111111111111111111111111111111111111111111111111",
    "swapped-diff-ids": "sha256:b76cf369e13665e7dd1afd2a4c075b87d3f62deb92af2b9983959641bfb017e0",
}
OWN_TESTS = ("artifacts", "artifact-no-platform")
EXACT = [name for name in CASES if name not in {*SAME_TREE, *REFUSED, *OWN_TESTS}]
NOTHING_TO_DO = "\nobjects  0 new + 0 already present objects; 0 B stored, 0 B inlined\n"
# refused by both, by us before a layer is stored, or the documents of what has no image
NOTHING_LEFT = ("docker-layer-type", "no-layers", "too-few-diff-ids", "too-many-diff-ids")


Cfsctl = Callable[..., Result]


@pytest.fixture
def cfsctl(
    capsys: pytest.CaptureFixture[str], layouts: Path, monkeypatch: pytest.MonkeyPatch
) -> Cfsctl:
    """Run a command in this process, where the layouts are."""
    monkeypatch.chdir(layouts)

    def call(*arguments: str | Path) -> Result:
        return run_text(capsys, *arguments)

    return call


@pytest.fixture
def store(tmp_path: Path, cfsctl: Cfsctl) -> Path:
    return make_store(cfsctl, tmp_path / "store", "sha256")


def make_store(cfsctl: Cfsctl, path: Path, algorithm: str) -> Path:
    cfsctl("init", "--insecure", "--algorithm", f"fsverity-{algorithm}-12", path)
    return path


def own_case(name: str) -> Case:
    """Return what we make of a layout: what was recorded, but for what is listed above."""
    case = CASES[name]
    if name not in SAME_TREE:
        return case
    model = CASES[SAME_TREE[name]]
    (tag,) = model["tags"]
    (pull,) = case["pulls"]
    return {**case, "by_tag": {pull["args"][0]: model["by_tag"][tag]}, "model": model}


def list_names(store: Path, directory: str) -> list[str]:
    return sorted(path.name for path in (store / directory).glob("*") if path.name != "refs")


def check_sound(cfsctl: Cfsctl, store: Path) -> None:
    for kind in ("fsck",), ("oci", "fsck"):
        result = cfsctl("--repo", store, *kind)
        assert result.status == 0, result


def mask(stdout: str, store: Path) -> str:
    """Replace the id of a stream, and check that it is a stream."""
    lines = stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("verity   "):
            digest = line.split()[1]
            assert (store / "objects" / digest[:2] / digest[2:]).exists()
            lines[number] = "verity   VOLATILE"
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("name", EXACT)
def test_pull_as_recorded(name: str, cfsctl: Cfsctl, store: Path) -> None:
    case = CASES[name]
    for pull in case["pulls"]:
        status, stdout, stderr = cfsctl("--repo", store, "oci", "pull", *pull["args"])
        assert status == pull["exit"], stderr
        if status:
            assert stdout == ""
            assert stderr.startswith("Error: ")
            assert stderr.count("\n") == 1
        else:
            assert (mask(stdout, store), stderr) == (pull["stdout"], "")
    expected = [] if name in NOTHING_LEFT else case["streams"]
    assert list_names(store, "streams") == expected
    check_store(cfsctl, store, case)


def check_store(cfsctl: Cfsctl, store: Path, case: Case) -> None:
    """Compare what is in the store, as far as it is not about garbage."""
    assert list_names(store, "images") == case["images_dir"]
    images = json.loads(cfsctl("--repo", store, "oci", "images", "--json").stdout)
    assert images == case["images_json"]
    report = json.loads(cfsctl("--repo", store, "oci", "fsck", "--json").stdout)
    expected = json.loads(json.dumps(case["fsck_json"]))
    for document in (report, expected):
        # how many streams were written that a collection will remove
        del document["repo"]["objects_checked"]
        if not case["tags"]:
            del document["repo"]["streams_checked"]
    assert report == expected
    for tag, found in case["by_tag"].items():
        assert json.loads(cfsctl("--repo", store, "oci", "inspect", tag).stdout) == found["inspect"]
        check_trees(cfsctl, store, tag, found)


def check_trees(cfsctl: Cfsctl, store: Path, tag: str, found: Case) -> None:
    """Compare dumps and layers."""
    for key, option in (("dump", ()), ("dump_bootable", ("--bootable",))):
        if key in found:
            status, stdout, stderr = cfsctl("--repo", store, "oci", "dump", *option, tag)
            if isinstance(found[key], dict):
                assert (status, stdout, stderr[:7]) == (1, "", "Error: ")
            else:
                assert (stdout, stderr) == (found[key], "")
    for diff_id, expected in found.get("layer_json", {}).items():
        layer = json.loads(cfsctl("--repo", store, "oci", "layer", "--json", diff_id).stdout)
        assert {**layer, "verity": "VOLATILE"} == expected


WITH_IDS = [
    name for name in CASES if name not in {*REFUSED, *OWN_TESTS} and own_case(name)["by_tag"]
]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids(name: str, algorithm: str, cfsctl: Cfsctl, tmp_path: Path) -> None:
    case = own_case(name)
    store = make_store(cfsctl, tmp_path / "store", algorithm)
    for pull in case["pulls"]:
        cfsctl("--repo", store, "oci", "pull", *pull["args"])
    found, expected = {}, {}
    for tag, of_tag in case["by_tag"].items():
        if "ids" not in of_tag:
            continue
        wanted = {(): of_tag["ids"], ("--bootable",): of_tag.get("ids_bootable")}
        if algorithm == "sha512":
            of_store = case.get("model", case)["ids_sha512"]
            model_tag = tag if tag in of_store else next(iter(of_store))
            wanted = {(): of_store[model_tag], ("--bootable",): of_store.get(f"{tag} --bootable")}
        else:
            wanted["--bootable", "--xattrs", "keep-user-xattrs"] = of_tag.get("ids_bootable_user")
        for options, ids in wanted.items():
            for version in VERSIONS if isinstance(ids, dict) and "1" in ids else ():
                words = ("--repo", store, "--erofs-version", version, "oci", "compute-id")
                expected[tag, options, version] = ids[version]
                found[tag, options, version] = cfsctl(*words, *options, tag).stdout.strip()
    assert found == expected


@pytest.mark.parametrize("name", SAME_TREE)
def test_what_only_we_read(name: str, cfsctl: Cfsctl, store: Path) -> None:
    case = own_case(name)
    (pull,) = case["pulls"]
    status, stdout, stderr = cfsctl("--repo", store, "oci", "pull", *pull["args"])
    assert (status, stderr) == (0, "")
    tag = pull["args"][0]
    assert f"\ntagged   {tag}\n" in stdout
    check_trees(cfsctl, store, tag, case["by_tag"][tag])
    assert list_names(store, "images") == case["model"]["images_dir"]
    check_sound(cfsctl, store)
    again = cfsctl("--repo", store, "oci", "pull", *pull["args"])
    assert again.stdout.splitlines()[:4] == stdout.splitlines()[:4]
    assert again.stdout.endswith(NOTHING_TO_DO)


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_09_reads(name: str, cfsctl: Cfsctl, store: Path) -> None:
    """Nothing stays under a name whose content it is not."""
    for pull in CASES[name]["pulls"]:
        status, stdout, stderr = cfsctl("--repo", store, "oci", "pull", *pull["args"])
        assert (status, stdout) == (1, "")
        assert stderr.startswith("Error: ")
        assert stderr.count("\n") == 1
        assert REFUSED[name] in stderr
    assert list_names(store, "streams") in ([], sound_layers(name))
    assert list_names(store, "images") == []
    check_sound(cfsctl, store)
    # and the sound image with the same layers is not disturbed
    assert cfsctl("--repo", store, "oci", "pull", "oci:fixture").status == 0
    assert cfsctl("--repo", store, "oci", "pull", "oci:seal-good").status == 0
    check_sound(cfsctl, store)


def sound_layers(name: str) -> list[str]:
    """Return the layers of an image that may be stored before another one is found bad."""
    good = {*CASES["fixture"]["streams"], *CASES["seal-good"]["streams"]}
    return [stream for stream in CASES[name]["streams"] if stream in good and "layer" in stream]


def test_artifacts_that_share_their_config(cfsctl: Cfsctl, store: Path) -> None:
    """0.9 cannot pull the second one."""
    case = CASES["artifacts"]
    for _ in range(2):
        for pull in case["pulls"]:
            status, stdout, stderr = cfsctl("--repo", store, "oci", "pull", *pull["args"])
            assert (status, stderr) == (0, "")
            if not pull["exit"] and "2 new" in stdout:
                assert mask(stdout, store) == pull["stdout"]
    found = json.loads(cfsctl("--repo", store, "oci", "inspect", "arta").stdout)
    assert found == case["by_tag"]["arta"]["inspect"]
    assert cfsctl("--repo", store, "oci", "inspect", "artb").status == 0
    check_sound(cfsctl, store)
    # each is kept by its own name
    before = list_names(store, "streams")
    cfsctl("--repo", store, "oci", "untag", "artb")
    assert cfsctl("--repo", store, "gc").status == 0
    assert list_names(store, "streams") == case["streams"]
    assert set(case["streams"]) < set(before)
    check_sound(cfsctl, store)


def test_artifact_without_platform(cfsctl: Cfsctl, store: Path) -> None:
    """It is the only candidate; 0.9 wants a platform."""
    assert cfsctl("--repo", store, "oci", "pull", "oci:artifact-no-platform", "a").status == 0
    (image,) = json.loads(cfsctl("--repo", store, "oci", "images", "--json").stdout)["images"]
    assert not image["is_container"]
    check_sound(cfsctl, store)
