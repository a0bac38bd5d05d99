"""Layers go from our service to that of composefs-rs, and back."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.linux.framing import close_all
from cfs.repository.repository import init
from cfs.service.handles import StoreOptions
from tests.integration.rust_service import serving_rust
from tests.integration.varlink_replay import whole_service
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.varlink_client import Json, RawClient, serving

OCI, REPOSITORY = "org.composefs.Oci", "org.composefs.Repository"
TAR = make_tar({"usr": None, "usr/tool": b"tool" * 100, "usr/lib": b"lib" * 40_000})


@pytest.fixture
def clients(rust_words: list[str], tmp_path: Path) -> Iterator[dict[str, RawClient]]:
    """A client of each service."""
    with ExitStack() as stack:
        dispatcher = stack.enter_context(whole_service(StoreOptions()))
        stack.enter_context(serving(dispatcher, tmp_path / "ours"))
        stack.enter_context(serving_rust(rust_words, tmp_path / "theirs"))
        yield {
            name: stack.enter_context(RawClient.connect(str(tmp_path / name)))
            for name in ("ours", "theirs")
        }


def call(client: RawClient, method: str, **parameters: object) -> Json:
    reply: Json = client.call(f"{OCI}.{method}", **parameters)["parameters"]
    assert "message" not in reply, reply
    return reply


@pytest.mark.parametrize(("source", "target"), [("ours", "theirs"), ("theirs", "ours")])
def test_relayed(source: str, target: str, clients: dict[str, RawClient], tmp_path: Path) -> None:
    Layout(tmp_path / "layout").add_image("v1", [TAR])
    handles = {}
    for name, algorithm in ((source, Algorithm.SHA512), (target, Algorithm.SHA256)):
        path = str(tmp_path / f"store-{name}")
        init(path, algorithm=algorithm, is_secure=False, erofs_version=1)
        opened = clients[name].call(f"{REPOSITORY}.OpenRepository", path=path)
        handles[name] = opened["parameters"]["handle"]
    image, diff_id = f"oci:{tmp_path}/layout:v1", digest_of(TAR)
    here = {"handle": handles[source]}
    call(clients[source], "Pull", **here, image=image, name="v1",
         local_fetch="disabled", bootable=False)  # fmt: skip
    clients[source].send(f"{OCI}.GetLayer", parameters={**here, "params": {"diff_id": diff_id}})
    reply = clients[source].receive()
    assert reply is not None
    directories = reply.members["parameters"]["dir_count"]
    there = {"handle": handles[target]}
    clients[target].send(
        f"{OCI}.PutLayer", reply.fds[: 1 + directories],
        parameters={**there, "diff_id": diff_id, "zerocopy": False},
    )  # fmt: skip
    put = clients[target].receive()
    close_all(reply.fds)
    assert put is not None
    assert put.members["parameters"]["already_present"] is False
    documents = call(clients[source], "Inspect", **here, image="v1")
    verity = call(clients[target], "HasLayer", **there, diff_id=diff_id)["layer_verity"]
    assert verity == put.members["parameters"]["layer_verity"]
    call(
        clients[target], "FinalizeImage", **there, name="v1",
        manifest_json=documents["manifest"], config_json=documents["config"],
        layers=[{"diff_id": diff_id, "layer_verity": verity}],
    )  # fmt: skip
    for name in (source, target):
        assert call(clients[name], "Check", handle=handles[name])["ok"]
