"""``oci pull`` that is interrupted, goes on, or finds something odd."""

import json
import os
import pty
import random
import signal
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.errors import CfsError, IntegrityError, NotFoundError
from cfs.oci.pull import Done, Event, Message, Progress, Pulled, Skipped, Started, pull
from cfs.oci.sources import LocalFetch, SourceOptions
from cfs.repository.repository import Repository
from tests.command_line import Result, command, environment, run_forking, run_text
from tests.oci_layouts import TAR, Layout, digest_of, make_tar

NR_KILLS = int(os.environ.get("CFS_KILLS", "20"))
DEADLINE = 300
WIDTH = 40  # of a terminal
BASE = make_tar({"usr": None, "usr/a": b"a" * 100, "boot": None, "sysroot": None})
TOP = make_tar({"usr/b": b"b" * 5000})


Cfsctl = Callable[..., Result]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def cfsctl(
    capsys: pytest.CaptureFixture[str], store: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> Cfsctl:
    """Run a command in this process."""
    monkeypatch.chdir(layout.path.parent)
    capsys.readouterr()

    def call(*arguments: str) -> Result:
        return run_text(capsys, "--repo", store, *arguments)

    return call


def streams(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "streams").glob("oci-*"))


def pull_events(store: Path, image: str) -> tuple[Pulled | CfsError, list[Event]]:
    events: list[Event] = []
    with Repository.open(str(store)) as repository:
        try:
            done: Pulled | CfsError = pull(
                repository, image, SourceOptions(), name="x", report=events.append
            )
        except CfsError as error:
            done = error
    return done, events


def check_failure(result: Result, *words: str) -> None:
    status, stdout, stderr = result
    assert (status, stdout) == (1, "")
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def check_sound(cfsctl: Cfsctl) -> None:
    result = cfsctl("oci", "fsck")
    assert result.status == 0, result


def test_events(store: Path, layout: Layout) -> None:
    manifest = layout.add_image("v1", [BASE, TOP, BASE])
    image = f"oci:{layout.path}:v1"
    done, events = pull_events(store, image)
    assert isinstance(done, Pulled)
    sizes = {
        digest_of(tar): layer["size"]
        for tar, layer in zip([BASE, TOP, BASE], manifest["layers"], strict=True)
    }
    assert {event.id: event.size for event in events if isinstance(event, Started)} == sizes
    assert [event for event in events if isinstance(event, Started)] == [
        Started(name, size) for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    assert sorted(event.id for event in events if isinstance(event, Done)) == sorted(sizes)
    for name, size in sizes.items():
        read = [event.size for event in events if isinstance(event, Progress) and event.id == name]
        assert read == sorted(read)
        assert read[-1] == size
    assert any(isinstance(event, Message) for event in events)
    again, events = pull_events(store, image)
    assert isinstance(again, Pulled)
    assert [event for event in events if not isinstance(event, Message)] == [
        Skipped(digest_of(BASE)), Skipped(digest_of(TOP)),
    ]  # fmt: skip
    # the ids are those at the end, so that nothing changes
    assert (again.manifest_stream, again.config_stream) == (
        done.manifest_stream,
        done.config_stream,
    )


def test_layers_that_are_there_are_not_fetched(store: Path, layout: Layout) -> None:
    manifest = layout.add_image("v1", [BASE, TOP])
    image = f"oci:{layout.path}:v1"
    blob = layout.blob(manifest["layers"][1]["digest"])
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    layout.blob(manifest["layers"][0]["digest"]).chmod(0o600)
    failed, _ = pull_events(store, image)
    assert isinstance(failed, CfsError)
    assert f"oci-layer-{digest_of(TOP)}" not in streams(store)
    if streams(store) != [f"oci-layer-{digest_of(BASE)}"]:
        # it was stopped by the other one: let it come alone
        layout.add_image("base", [BASE])
        pull_events(store, f"oci:{layout.path}:base")
    layout.blob(manifest["layers"][0]["digest"]).unlink()
    blob.write_bytes(good)
    done, events = pull_events(store, image)
    assert isinstance(done, Pulled), done
    assert Skipped(digest_of(BASE)) in events
    assert Done(digest_of(TOP)) in events


@pytest.mark.parametrize(
    "name", ["@x", "@sha256:" + "0" * 64, "", ".", "..", "x" * 256, "a\0b"], ids=repr
)
def test_names_that_cannot_be(cfsctl: Cfsctl, layout: Layout, store: Path, name: str) -> None:
    layout.add_image("v1", [BASE])
    check_failure(cfsctl("oci", "pull", "oci:layout:v1", name))
    check_failure(cfsctl("oci", "pull", "oci:not-looked-at", name))
    assert streams(store) == []


def test_artifact_cannot_be_booted(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    layout.add_artifact("a", [layout.add_blob(b"text", "text/plain")])
    check_failure(cfsctl("oci", "pull", "--bootable", "oci:layout:a"), "artifact", "bootable")
    assert streams(store) == []


def test_image_without_boot_directory(cfsctl: Cfsctl, layout: Layout) -> None:
    """It is stored and tagged, and so the report comes as well (spec 5.4)."""
    layout.add_image("v1", [make_tar({"usr": None})])
    status, stdout, stderr = cfsctl("oci", "pull", "--bootable", "oci:layout:v1", "x")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "boot" in stderr
    assert "\ntagged   x\n" in stdout
    assert "Boot image" not in stdout
    check_sound(cfsctl)


def test_expected_digest(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    layout.add_image("v1", [BASE])
    for text in ("00", "x" * 64, "0" * 128):
        result = cfsctl("oci", "pull", "--bootable", "--expected-digest", text, "oci:layout:v1")
        check_failure(result, "Parsing --expected-digest")
    assert streams(store) == []
    wanted = ("oci", "pull", "--bootable", "--expected-digest")
    status, stdout, stderr = cfsctl(*wanted, "0" * 64, "oci:layout:v1", "x")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "0" * 64 in stderr
    assert "(tried 4 mode/version combinations)" in stderr
    assert "\ntagged   x\n" in stdout
    digest = cfsctl("--erofs-version", "2", "oci", "compute-id", "--bootable", "x").stdout.strip()
    status, stdout, _ = cfsctl(*wanted, digest, "oci:layout:v1", "x")
    assert status == 0
    end = f"\nBoot image: {digest} (xattr-mode=allowlist-only, format-version=V2)\n"
    assert stdout.endswith(end)
    assert cfsctl("oci", "pull", "--expected-digest", digest, "oci:layout:v1").status == 2
    check_sound(cfsctl)


def test_printed_ids_survive_a_collection(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    """Those that 0.9 prints are garbage at once."""
    layout.add_image("v1", [BASE, TOP])
    for options in ((), ("--bootable",), ()):
        stdout = cfsctl("oci", "pull", *options, "oci:layout:v1", "x").stdout
        assert cfsctl("gc").status == 0
        (verity,) = (line.split()[1] for line in stdout.splitlines() if line.startswith("verity"))
        assert (store / "objects" / verity[:2] / verity[2:]).exists()
    check_sound(cfsctl)


def test_quiet(cfsctl: Cfsctl, layout: Layout) -> None:
    layout.add_image("v1", [BASE])
    for option in ("-q", "--quiet"):
        status, stdout, stderr = cfsctl("oci", "pull", option, "oci:layout:v1", "x")
        assert (status, stderr) == (0, "")
        assert stdout == f"{stdout[:71]}\n"
        assert stdout.startswith("sha256:")


def test_blob_with_the_digest_of_a_layer(cfsctl: Cfsctl, layout: Layout) -> None:
    """A blob is stored in another form than a layer, under a name of the same form."""
    layout.add_image("v1", [BASE], TAR)
    layout.add_artifact("a", [layout.add_blob(BASE, "application/octet-stream")])
    for tag in ("a", "v1", "a", "v1"):
        result = cfsctl("oci", "pull", f"oci:layout:{tag}", tag)
        assert result.status == 0, result
    check_sound(cfsctl)
    assert cfsctl("oci", "compute-id", "v1").status == 0


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
def test_artifact_of_tars(cfsctl: Cfsctl, layout: Layout, store: Path, suffix: str) -> None:
    """The tar is stored under the digest of the blob (spec 5.2)."""
    layout.add_image("v1", [TOP], TAR + suffix)
    (layer,) = layout.add_image("v1", [TOP], TAR + suffix)["layers"]
    layout.add_artifact("a", [layer])
    assert cfsctl("oci", "pull", "oci:layout:a", "a").status == 0
    assert [name for name in streams(store) if "layer" in name] == [f"oci-layer-{layer['digest']}"]
    result = cfsctl("cat", f"oci-layer-{layer['digest']}")
    assert len(result.stdout) == len(TOP)
    check_sound(cfsctl)


def test_config_of_an_artifact_becomes_one_of_an_image(cfsctl: Cfsctl, layout: Layout) -> None:
    manifest = layout.add_image("v1", [BASE])
    other = {**manifest["config"], "mediaType": "application/x-other"}
    layout.add_manifest("a", other, [layout.add_blob(b"text", "text/plain")])
    for tag in ("a", "v1", "a"):
        assert cfsctl("oci", "pull", f"oci:layout:{tag}", tag).status == 0
        check_sound(cfsctl)
    assert json.loads(cfsctl("oci", "inspect", "v1").stdout)["composefs_erofs"]


def test_two_manifests_of_one_config(cfsctl: Cfsctl, layout: Layout) -> None:
    """Both show the boot image that was made for one of them."""
    layout.add_image("gzip", [BASE], f"{TAR}+gzip")
    layout.add_image("zstd", [BASE], f"{TAR}+zstd")
    assert cfsctl("oci", "pull", "oci:layout:gzip", "gzip").status == 0
    assert cfsctl("oci", "pull", "--bootable", "oci:layout:zstd", "zstd").status == 0
    found = [json.loads(cfsctl("oci", "inspect", tag).stdout) for tag in ("gzip", "zstd")]
    assert found[0]["composefs_boot_erofs"] == found[1]["composefs_boot_erofs"] is not None
    assert cfsctl("gc").status == 0
    check_sound(cfsctl)


def test_lost_parts_are_fetched_again(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    layout.add_image("v1", [BASE, TOP])
    assert cfsctl("oci", "pull", "oci:layout:v1", "x").status == 0
    before = streams(store)
    ids = cfsctl("oci", "compute-id", "x").stdout
    for name in before:
        (store / "streams" / name).unlink()
        assert cfsctl("oci", "pull", "oci:layout:v1", "x").status == 0, name
        assert streams(store) == before
        check_sound(cfsctl)
    for name in before:
        (store / "streams" / os.readlink(store / "streams" / name)).unlink()
        assert cfsctl("oci", "pull", "oci:layout:v1", "x").status == 0, name
        check_sound(cfsctl)
    assert cfsctl("oci", "compute-id", "x").stdout == ids


@pytest.mark.parametrize("damage", ["short", "long", "other", "missing", "fifo", "bomb"])
def test_bad_layer_leaves_nothing(cfsctl: Cfsctl, layout: Layout, store: Path, damage: str) -> None:
    manifest = layout.add_image("v1", [BASE, TOP])
    path = layout.blob(manifest["layers"][1]["digest"])
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "short":
            path.write_bytes(data[:-1])
        case "long":
            path.write_bytes(data + b"x")
        case "other":
            path.write_bytes(bytes(len(data)))
        case "fifo":
            os.mkfifo(path)
        case "bomb":
            path.write_bytes(data)
            os.truncate(path, 1 << 40)
    result = cfsctl("oci", "pull", "oci:layout:v1", "x")
    check_failure(result, path.name, "has the digest" if damage == "other" else "")
    assert set(streams(store)) <= {f"oci-layer-{digest_of(BASE)}"}
    assert cfsctl("gc").status == 0
    assert streams(store) == []
    assert not list((store / "objects").glob("*/*"))


def test_store_that_cannot_be_written(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    layout.add_image("v1", [BASE])
    meta = store / "meta.json"
    document = json.loads(meta.read_text())
    document.setdefault("features", {})["read-only-compatible"] = ["unknown"]
    meta.write_text(json.dumps(document))
    check_failure(cfsctl("oci", "pull", "oci:layout:v1", "x"))
    assert streams(store) == []


def test_report_that_fails_ends_the_pull(store: Path, layout: Layout) -> None:
    """As when a client of the service has gone: all threads end, and nothing is half-written."""
    layout.add_image("v1", [BASE, TOP])

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            raise IntegrityError("gone")

    with Repository.open(str(store)) as repository, pytest.raises(IntegrityError, match="gone"):
        pull(repository, f"oci:{layout.path}:v1", SourceOptions(), name="x", report=report)
    assert streams(store) == []


def test_interrupt_ends_all_threads(store: Path, layout: Layout) -> None:
    layout.add_image("v1", [BASE, TOP])
    image = f"oci:{layout.path}:v1"
    events: list[Event] = []

    def report(event: Event) -> None:
        if isinstance(event, Progress) and not events:
            events.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with Repository.open(str(store)) as repository, pytest.raises(KeyboardInterrupt):
        pull(repository, image, SourceOptions(), name="x", report=report)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(DEADLINE)
            assert not thread.is_alive()
    done, _ = pull_events(store, image)
    assert isinstance(done, Pulled), done


def test_options_for_the_source(cfsctl: Cfsctl, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def refuse(image: str, options: SourceOptions) -> None:
        found.append((image, options))
        raise NotFoundError("nothing here")

    monkeypatch.setattr("cfs.oci.pull.open_source", refuse)
    words = ["--arch", "arm", "--os", "plan9", "--variant", "v7", "--authfile", "a", "--creds"]
    words += ["u:p", "--cert-dir", "d", "--local-fetch", "zerocopy", "--tls-verify", "docker://x"]
    check_failure(cfsctl("oci", "pull", *words), "nothing here")
    check_failure(cfsctl("oci", "pull", "--tls-verify=false", "docker://x"))
    check_failure(cfsctl("oci", "pull", "--", "docker://x", "--tls-verify"))
    everything = SourceOptions(
        arch="arm", os="plan9", variant="v7", tls_verify=True, authfile="a", creds="u:p",
        cert_dir="d", local_fetch=LocalFetch.ZEROCOPY,
    )  # fmt: skip
    options = [everything, SourceOptions(tls_verify=False), SourceOptions()]
    assert found == [("docker://x", of_call) for of_call in options]
    assert cfsctl("oci", "pull", "--tls-verify=perhaps", "docker://x").status == 2
    assert cfsctl("oci", "pull", "-q", "--quiet", "docker://x").status == 2


def test_progress_on_a_terminal(store: Path, layout: Layout) -> None:
    layout.add_image("v1", [BASE, TOP])
    words = [*command("cfsctl"), "--repo", str(store), "oci", "pull"]
    shown = []
    for options in ((), ("-q",)):
        terminal, stderr = pty.openpty()
        termios.tcsetwinsize(terminal, (24, WIDTH))  # in a pipe, stdout has none
        with open(terminal, "rb", buffering=0) as reader:
            done = subprocess.run(
                [*words, *options, f"oci:{layout.path}:v1"],
                env=environment(TERM="xterm"),
                stdout=subprocess.PIPE,
                stderr=stderr,
                check=False,
                timeout=DEADLINE,
            )
            os.set_blocking(terminal, False)
            os.close(stderr)
            shown.append(_read(reader.fileno()))
        assert done.returncode == 0, shown
    for tar in (BASE, TOP):
        assert f"{digest_of(tar)[:19]} stored" in shown[0]
    bars = [line for line in shown[0].splitlines() if "[." in line or "[#" in line]
    assert bars
    assert {len(line.rpartition("\x1b[J")[2]) for line in bars} == {WIDTH - 1}
    assert shown[1] == ""


def _read(fd: int) -> str:
    data = b""
    try:
        while more := os.read(fd, 1 << 16):
            data += more
    except OSError:  # EIO: that is how terminals end
        pass
    return data.decode()


def test_killed_pull_can_be_repeated(ground: Path) -> None:
    numbers = random.Random(6)
    layout = Layout(ground / "layout")
    layout.add_image("v1", [
        make_tar({
            "usr": None,
            **{f"usr/{number}-{file}": numbers.randbytes(8000) for file in range(60)},
            f"usr/large-{number}": numbers.randbytes(1 << 20),
        })
        for number in range(5)
    ])  # fmt: skip
    result = run_forking("pull_killing", layout.path, ground, NR_KILLS, 7)
    assert result["problems"] == []
    assert result["killed"] == NR_KILLS
    assert result["resumed"] > 0
