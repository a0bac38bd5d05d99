"""Settings and descriptors on their way to another process."""

import os
from collections.abc import Iterator

import pytest

from cfs.fuse.handover import Handover, channel_pair, receive, send
from cfs.linux.traces import Trace


@pytest.fixture
def fds() -> Iterator[list[int]]:
    opened = [os.memfd_create(f"{number}") for number in range(4)]
    yield opened
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("nr_objects", [0, 1, 246, 247, 600])
def test_everything_arrives(nr_objects: int, fds: list[int]) -> None:
    sent = Handover(
        vector=fds[0], state=fds[1], devices=[fds[2]] * 2, objects=[fds[3]] * nr_objects,
        traces=[Trace(fds[0], "entry"), Trace(fds[1])],
        mountpoint="/odd\udcff\n" * 300, device=7, grace=0.5, has_workers=True,
        is_metadata_only=False, passthrough=2, stack_depth=1, verify=1, masked_flags=1 << 63,
    )  # fmt: skip
    ours, theirs = channel_pair()
    with ours, theirs:
        send(ours, sent)
        got = receive(theirs)
    assert got is not None
    kept = [trace.fd for trace in got.traces]
    received = [got.vector, got.state, *got.devices, *got.objects, *kept]
    expected = [fds[0], fds[1], fds[2], fds[2], *[fds[3]] * nr_objects, fds[0], fds[1]]
    try:
        assert all(map(os.path.sameopenfile, received, expected))
        assert len(received) == len(expected)
        assert not any(map(os.get_inheritable, received))
    finally:
        for fd in received:
            os.close(fd)
    assert [trace.name for trace in got.traces] == ["entry", None]
    names = ("vector", "state", "devices", "objects", "traces")
    same = {name: getattr(sent, name) for name in names}
    assert got._replace(**same) == sent


def test_nobody_sends_anything() -> None:
    ours, theirs = channel_pair()
    ours.close()
    with theirs:
        assert receive(theirs) is None
