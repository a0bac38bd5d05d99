"""The replayer of the recorded exchanges finds what is not as recorded.

Each reply of our service is compared with the recording, changed in one place after the other:
every change must be found.
"""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cfs.compat import override
from cfs.service.handles import StoreOptions
from tests.integration.rust_service import serving_rust
from tests.integration.varlink_replay import (
    Setting,
    compare,
    is_closed,
    play,
    wanted_of_us,
)
from tests.varlink_client import Json, RawClient, Reply

FILES = ["init", "repository", "service", "oci", "pull", "finalize-poison", "layers"]
Said = tuple[Json, int] | None


class Recorder(RawClient):
    """A client that notes down the replies: members and number of descriptors, or the end."""

    said: list[Said]

    @override
    def receive(self) -> Reply | None:
        reply = super().receive()
        self.said.append(None if reply is None else (reply.members, len(reply.fds)))
        return reply


class Repeater(RawClient):
    """Stands for a client that gets noted replies once more, then those of an idle service."""

    def __init__(self, said: list[Said]) -> None:
        """Take the replies."""
        self._said = iter(said)

    @override
    def send(self, method: str, *_: Any, **__: Any) -> None:
        assert method.endswith(".GetInfo")

    @override
    def receive(self) -> Reply | None:
        for said in self._said:
            if said is None:
                return None
            members, count = said
            return Reply(members, [os.open(os.devnull, os.O_RDONLY) for _ in range(count)])
        return Reply({"parameters": {"interfaces": []}}, [])


def changed_values(value: Any, where: str, orderless: list[str]) -> Iterator[Any]:
    """Yield a value with one change: member, number, text, order, kind."""
    if isinstance(value, dict) and "$" in value:
        yield {"$": "hex128" if value["$"] == "int" else "int"}
        yield None
    elif isinstance(value, dict):
        yield from changed_objects(value, where, orderless)
    elif isinstance(value, list):
        yield from changed_lists(value, where, orderless)
    else:
        yield from changed_scalars(value)


def changed_objects(value: Json, where: str, orderless: list[str]) -> Iterator[Json]:
    """Yield an object with another member, with others, without one, in another order."""
    yield {**value, "other": None}
    if len(value) > 1:
        yield dict(reversed(value.items()))
    for name, member in value.items():
        yield {key: kept for key, kept in value.items() if key != name}
        for changed in changed_values(member, f"{where}.{name}".lstrip("."), orderless):
            yield {**value, name: changed}


def changed_lists(value: list[Any], where: str, orderless: list[str]) -> Iterator[Any]:
    """Yield a list that is longer, shorter, in another order, or has another element."""
    yield [*value, "other"]
    if value:
        yield value[1:]
        yield value[0]
    if value[::-1] != value and where not in orderless:
        yield value[::-1]
    for index, element in enumerate(value):
        for changed in changed_values(element, f"{where}[]", orderless):
            yield [*value[:index], changed, *value[index + 1 :]]


def changed_scalars(value: Any) -> list[Any]:
    """Return other values than one without members."""
    match value:
        case bool():
            return [not value, int(value), None]
        case int():
            return [value + 1, -value - 1, str(value), float(value)]
        case str():
            return [f"{value}x", f"{value.swapcase()}.", None]
    return [0, "", {}, False]


def changed_exchanges(wanted: Json) -> Iterator[Json]:
    """Yield what is wanted with one change each."""
    if "any" in wanted or wanted.get("order") == "layer":
        return
    if "answers" in wanted:
        for index, answer in enumerate(wanted["answers"]):
            if answer not in ("closed", "nothing"):
                other = copy.deepcopy(wanted)
                other["answers"][index] = "org.composefs.Oci.Other"
                yield other
        yield {**wanted, "answers": ["other", *wanted["answers"]]}
        return
    order = wanted.get("order", [])
    orderless = order if isinstance(order, list) else []
    only_last = order == "progress"
    replies = wanted["receive"]
    for index in range(len(replies) - 1 if only_last else 0, len(replies)):
        for reply in changed_values(replies[index], "", orderless):
            yield {**wanted, "receive": [*replies[:index], reply, *replies[index + 1 :]]}
        if not only_last:
            counts = wanted.get("fds_out", [0] * len(replies))
            more = [count + (place == index) for place, count in enumerate(counts)]
            yield {**wanted, "fds_out": more}
    if wanted.get("silent") or is_closed(wanted):
        answer = {"parameters": {}, "continues": False}
        yield {key: kept for key, kept in wanted.items() if key not in ("silent", "closed")} | {
            "receive": [*replies, answer]
        }
    elif not only_last:
        yield {**wanted, "receive": replies[:-1], "closed": True}


@pytest.mark.parametrize("name", FILES)
def test_every_change_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Said] = []

    def connect(path: str) -> RawClient:
        client = Recorder.connect(path)
        assert isinstance(client, Recorder)
        client.said = said
        return client

    missed = []
    count = 0
    setting = Setting(connect=connect)
    for number, exchange, differences in play(name, tmp_path, monkeypatch, setting):
        assert differences == []
        if number and "shell" not in exchange:
            wanted = wanted_of_us(exchange)
            assert list(compare(Repeater(said), wanted)) == [] or wanted.get("order") == "layer"
            for changed in changed_exchanges(wanted):
                count += 1
                if not list(compare(Repeater(said), changed)):
                    missed.append((number, json.dumps(changed)))
        said.clear()
    assert missed == []
    assert count > 10


def test_other_layers_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be repeated without the descriptors is changed before it is played."""
    changed = []

    def change(exchange: Json) -> Json:
        wanted = wanted_of_us(exchange)
        if wanted.get("order") != "layer":
            return wanted
        changed.append(exchange["what"])
        return {**wanted, "layer": "sha256:" + "0" * 64}

    played = play("layers", tmp_path, monkeypatch, Setting(wanted=change))
    found = [exchange["what"] for _, exchange, differences in played if differences]
    assert found == changed != []


def test_undeclared_replies() -> None:
    """Where any sound reply will do it must be one of the interface."""
    wanted = {"any": True, "send": {"method": "org.composefs.Oci.ComputeId"}}
    sound: list[Json] = [
        {"parameters": {"image_id": "x"}, "continues": False},
        {"error": "org.composefs.Oci.InternalError", "parameters": {"message": "x"}},
    ]
    for members in sound:
        assert list(compare(Repeater([(members, 0)]), wanted)) == []
        for bad in changed_values(members["parameters"], "", []):
            if set(bad) != set(members["parameters"]) or None in bad.values():
                assert list(compare(Repeater([({**members, "parameters": bad}, 0)]), wanted))
    for name in ("org.composefs.Oci.Other", "org.composefs.Repository.InternalError", "x"):
        other = {**sound[1], "error": name}
        assert list(compare(Repeater([(other, 0)]), wanted)) == [f"undeclared: {name}"]


@pytest.mark.parametrize("name", [*FILES, "mount"])
def test_peer_is_as_recorded(
    name: str,
    rust_words: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """composefs-rs itself, with its defects, is found to be as recorded."""
    if name == "mount":
        request.getfixturevalue("overlay")

    @contextmanager
    def serve(options: StoreOptions, path: Path) -> Iterator[None]:
        words = ["--insecure"] if options.insecure else []
        with serving_rust(rust_words, path, *words):
            yield

    played = play(
        name, tmp_path, monkeypatch, Setting(serve=serve, wanted=lambda exchange: exchange)
    )
    assert [found for found in played if found[2]] == []
