"""Which kind of mount comes out of what was said (spec cli-and-varlink a.8, c.6)."""

from typing import NamedTuple, TypedDict

import pytest

from cfs.errors import InvalidRequestError, MountError
from cfs.fuse.options import Mode, Passthrough, ServeChoices, ServeOptions, Verify
from cfs.linux.mounts import MountAttr
from cfs.mounting import choice
from cfs.mounting.choice import FuseWish, MountRequest, choose

KERNEL = None
AUTO, YES, NO = FuseWish.AUTO, FuseWish.YES, FuseWish.NO


class Changes(TypedDict):
    upperdir: str
    workdir: str


CHANGES: Changes = {"upperdir": "u", "workdir": "w"}


class Machine(NamedTuple):
    uid: int = 0
    is_initial: bool = True
    can_overlay: bool = True


@pytest.fixture(name="machine")
def fixture_machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The machine and its user; by default root and a new kernel."""
    machine: Machine = getattr(request, "param", Machine())
    monkeypatch.setattr("os.geteuid", lambda: machine.uid)
    monkeypatch.setattr(choice, "is_initial_user_namespace", lambda: machine.is_initial)
    monkeypatch.setattr(choice, "_can_overlay", lambda: machine.can_overlay)


ROOT = Machine()
OTHER = Machine(uid=1000, can_overlay=False)
pytestmark = pytest.mark.usefixtures("machine")


@pytest.mark.parametrize(
    ("machine", "wish", "expected"),
    [
        (ROOT, AUTO, KERNEL),
        (Machine(is_initial=False), AUTO, Mode.OVERLAY),
        (Machine(is_initial=False, can_overlay=False), AUTO, Mode.PLAIN),
        (OTHER, AUTO, Mode.PLAIN),
        (ROOT, YES, Mode.OVERLAY),
        (Machine(can_overlay=False), YES, Mode.PLAIN),
        (ROOT, NO, KERNEL),
        (OTHER, NO, KERNEL),
    ],
    indirect=["machine"],
)
def test_kind_depends_on_user_and_kernel(wish: FuseWish, expected: Mode | None) -> None:
    options = choose(MountRequest(wish=wish))
    assert (None if options is None else options.mode) == expected


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"mode": Mode.PLAIN}, Mode.PLAIN),
        ({"mode": Mode.OVERLAY}, Mode.OVERLAY),
        ({"passthrough": Passthrough.ON}, Mode.PLAIN),
        ({"passthrough": Passthrough.AUTO}, Mode.PLAIN),
        ({"passthrough": Passthrough.OFF}, Mode.OVERLAY),
        ({"verify": Verify.OPEN}, Mode.PLAIN),
        ({"verify": Verify.REQUIRE}, Mode.OVERLAY),
        ({"workers": 4, "supervise": False}, Mode.OVERLAY),
    ],
)
def test_kind_depends_on_what_was_said(choices: ServeChoices, expected: Mode) -> None:
    said: ServeChoices = {"mode": expected, **choices}
    assert choose(MountRequest(wish=YES, choices=choices)) == ServeOptions(**said)


@pytest.mark.parametrize("machine", [OTHER], indirect=True)
def test_mode_that_was_said_is_not_questioned() -> None:
    options = choose(MountRequest(wish=YES, choices={"mode": Mode.OVERLAY}))
    assert options is not None
    assert options.mode is Mode.OVERLAY


def test_options_of_fuse_do_not_matter_to_the_kernel() -> None:
    assert choose(MountRequest(choices={"workers": 4})) is None


def test_upper_directory_and_attributes_are_handed_on() -> None:
    request = MountRequest(wish=YES, read_write=True, attributes=MountAttr.NOSUID, **CHANGES)
    assert choose(request) == ServeOptions(
        mode=Mode.OVERLAY, read_write=True, attributes=MountAttr.NOSUID, **CHANGES
    )


@pytest.mark.parametrize("machine", [OTHER], indirect=True)
def test_upper_directory_is_not_dropped_where_there_is_no_overlay() -> None:
    with pytest.raises(MountError, match="an upper directory needs an overlay"):
        choose(MountRequest(wish=YES, **CHANGES))


def test_automatic_passthrough_gives_way_to_an_upper_directory() -> None:
    request = MountRequest(wish=YES, choices={"passthrough": Passthrough.AUTO}, **CHANGES)
    options = choose(request)
    assert options is not None
    assert options.mode is Mode.OVERLAY


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"upperdir": "u"}, "upper directory needs a work directory"),
        ({"workdir": "w"}, "work directory needs an upper directory"),
        ({"read_write": True}, "read-write needs an upper directory"),
        ({**CHANGES, "choices": {"mode": Mode.PLAIN}}, "needs mode=overlay"),
        ({**CHANGES, "choices": {"passthrough": Passthrough.ON}}, "cannot be combined"),
        ({**CHANGES, "choices": {"verify": Verify.OPEN}}, "cannot be combined"),
        ({"choices": {"mode": Mode.OVERLAY, "passthrough": Passthrough.ON}}, "cannot be combined"),
        ({"choices": {"workers": 0, "passthrough": Passthrough.ON}}, "cannot be combined"),
    ],
)
def test_contradictions_are_refused_whatever_the_machine(
    said: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        MountRequest(**said)  # type: ignore[arg-type] # the table has the types
