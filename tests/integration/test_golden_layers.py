"""Every golden layer through ``oci import-layer`` and ``oci layer``, beside composefs-rs."""

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cfs.cli.cfsctl import run
from cfs.compat import override
from cfs.digest import Algorithm
from cfs.repository.repository import init
from tests.oci_cases import case_layers, load_cases

Json = Any

# where composefs-rs takes what it does not understand (remarks in cases.json)
REFUSED_BY_US = {
    "num-size-wrap": "invalid size of an entry: 18446744073709551619",
    "pax-size-max": "invalid size of an entry: 18446744073709551615",
    "pax-x-then-g": "a global header between extension headers and their entry",
    "gnu-L-then-g": "a global header between extension headers and their entry",
}
# where it crashes; a fraction that is no number counts as none
LISTED_BY_US = {"pax-mtime-utf8"}


class Store:
    """A store that commands of this process use."""

    def __init__(
        self, path: Path, capture: pytest.CaptureFixture[bytes], patch: pytest.MonkeyPatch
    ) -> None:
        init(str(path), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
        self._path = path
        self._capture = capture
        self._patch = patch

    def oci(
        self, *arguments: str, stdin: bytes = b"", kind: type[io.BytesIO] = io.BytesIO
    ) -> tuple[int, bytes, str]:
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(kind(stdin)))
        status = run(["--repo", str(self._path), "oci", *arguments])
        stdout, stderr = self._capture.readouterr()
        return status, stdout, stderr.decode()


@pytest.fixture
def store(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Store:
    return Store(tmp_path / "store", capsysbinary, monkeypatch)


def test_every_layer(store: Store) -> None:
    differences = [
        f"{name}.{number}: {difference}"
        for name, case in load_cases("cases").items()
        for number in range(len(case["layers"]))
        for difference in differences_of_layer(store, name, case, number)
    ]
    assert differences == []


def differences_of_layer(store: Store, name: str, case: Json, number: int) -> list[str]:
    diff_id = case["layers"][number]
    layer = case_layers()[diff_id]
    status, stdout, stderr = store.oci("import-layer", diff_id, stdin=layer)
    problems: list[str] = []
    if status:
        if name in REFUSED_BY_US:
            is_right = REFUSED_BY_US[name] in stderr and case["import"][number] == "ok"
        else:
            is_right = case["import"][number] != "ok"
        if not is_right or stdout or not is_one_line(stderr):
            problems.append(f"{case['import'][number]!r} became {stderr!r}")
        return problems
    if case["import"][number] != "ok" or name in REFUSED_BY_US:
        problems.append(f"{case['import'][number]!r} became a success")
    if store.oci("layer", diff_id) != (0, layer, ""):
        problems.append("tar differs")
    if "layer_json" in case:
        problems += differences_of_json(store, name, diff_id, case["layer_json"][number])
        problems += differences_of_dump(store, name, diff_id, case["layer_dumpfile"][number])
    return problems


def is_one_line(stderr: str) -> bool:
    return stderr.startswith("Error: ") and stderr.count("\n") == 1


def differences_of_json(store: Store, name: str, diff_id: str, expected: Json) -> list[str]:
    status, stdout, stderr = store.oci("layer", "--json", diff_id)
    if "error" in expected:
        is_right = status == (name not in LISTED_BY_US)
        return [] if is_right else [f"json: {expected} became {status}, {stderr}"]
    found = json.loads(stdout)
    expected["verity"] = found["verity"]
    text = json.dumps(expected, indent=2).encode() + b"\n"
    return [] if (status, stdout, stderr) == (0, text, "") else [f"json: {stdout!r}, {stderr}"]


def differences_of_dump(store: Store, name: str, diff_id: str, expected: Json) -> list[str]:
    status, stdout, stderr = store.oci("layer", "--dumpfile", diff_id)
    if isinstance(expected, str):
        is_right = (status, stdout.decode()) == (0, expected)
    elif "error" in expected:
        is_listed = name in LISTED_BY_US
        is_right = status == (not is_listed) and stdout.decode().startswith(expected["partial"])
        is_right &= is_listed or is_one_line(stderr)
    else:
        digest = hashlib.sha256(stdout).hexdigest()
        is_right = (digest, len(stdout.decode())) == (expected["sha256"], expected["length"])
    return [] if is_right else [f"dump: {expected!r} became {status}, {stdout!r}, {stderr}"]


def layer_of(name: str) -> tuple[str, bytes]:
    diff_id = load_cases("cases")[name]["layers"][0]
    return diff_id, case_layers()[diff_id]


def test_layer_that_is_there_is_only_named(store: Store, tmp_path: Path) -> None:
    diff_id, layer = layer_of("fixture")
    status, stdout, _ = store.oci("import-layer", diff_id, stdin=layer)
    assert (status, stdout[:7]) == (0, b"sha256:")
    assert store.oci("import-layer", diff_id, "a/name", stdin=b"never read") == (0, stdout, "")
    link = tmp_path / "store" / "streams" / "refs" / "a" / "name"
    assert link.resolve().is_file()


def test_layer_that_was_damaged_is_read_again(store: Store, tmp_path: Path) -> None:
    diff_id, layer = layer_of("fixture")
    whole = store.oci("import-layer", diff_id, stdin=layer)
    stream = (tmp_path / "store" / "streams" / f"oci-layer-{diff_id}").resolve()
    data = stream.read_bytes()
    stream.write_bytes(data[:-1] + b"?")
    assert store.oci("import-layer", diff_id, stdin=layer) == whole
    assert stream.read_bytes() == data


def test_import_with_a_name(store: Store, tmp_path: Path) -> None:
    diff_id, layer = layer_of("fixture")
    assert store.oci("import-layer", diff_id, "name", stdin=layer)[0] == 0
    link = tmp_path / "store" / "streams" / "refs" / "name"
    assert link.readlink().name == f"oci-layer-{diff_id}"


@pytest.mark.parametrize(
    "name", ["", "..", "../../x", "/x", "a/../../x", "oci", "oci/x", "oci-referrers/x/y"]
)
def test_import_with_a_name_that_cannot_be(store: Store, tmp_path: Path, name: str) -> None:
    diff_id, layer = layer_of("fixture")
    status, stdout, stderr = store.oci("import-layer", diff_id, name, stdin=layer)
    assert (status, stdout) == (1, b"")
    assert is_one_line(stderr)
    assert not (tmp_path / "store" / "streams").exists()


def test_import_of_another_tar(store: Store, tmp_path: Path) -> None:
    (diff_id, _), (other_id, other) = layer_of("fixture"), layer_of("gnu-long")
    status, stdout, stderr = store.oci("import-layer", diff_id, stdin=other)
    assert (status, stdout) == (1, b"")
    assert stderr == f"Error: layer integrity failed: expected {diff_id}, got {other_id}\n"
    assert not (tmp_path / "store" / "streams").exists()


def test_layer_that_is_not_there(store: Store) -> None:
    diff_id = f"sha256:{0:064}"
    expected = 1, b"", f"Error: Layer {diff_id} not found\n"
    for option in ((), ("--json",), ("--dumpfile",)):
        assert store.oci("layer", diff_id, *option) == expected


def test_usage(store: Store) -> None:
    assert store.oci("layer", "nope")[0] == 2
    assert store.oci("import-layer", "sha256:00")[0] == 2
    status, _, stderr = store.oci("layer", f"sha256:{0:064}", "--json", "--dumpfile")
    assert status == 2
    assert "--dumpfile cannot be used with --json" in stderr


def test_tar_is_not_written_to_a_terminal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, stdout, stderr = store.oci("layer", f"sha256:{0:064}")
    assert (status, stdout) == (1, b"")
    assert "stdout is a terminal" in stderr


class Terminal(io.BytesIO):
    @override
    def isatty(self) -> bool:
        return True


def test_tar_is_not_read_from_a_terminal(store: Store) -> None:
    status, stdout, stderr = store.oci("import-layer", f"sha256:{0:064}", kind=Terminal)
    assert (status, stdout) == (1, b"")
    assert "stdin is a terminal" in stderr
