"""JSON from anywhere: what the parser of the standard library lets through is refused."""

import pytest

from cfs.errors import FormatError
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_integer,
    parse_list,
    parse_string,
    parse_strings,
)


def fields_of(text: bytes) -> dict[str, object]:
    return parse_fields(load_json(text, "it"), "it", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "expecting value"),
        (b"{", "expecting property name"),
        (b"{} x", "extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "can't decode"),
        (b"NaN", "no number of JSON: NaN"),
        (b"-Infinity", "no number of JSON: -Infinity"),
        (b"9" * 5000, "limit"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
    ],
)
def test_what_is_no_json(text: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=f"^it is no JSON: .*{reason}"):
        load_json(text, "it")


def test_a_known_key_twice_is_refused() -> None:
    value = load_json(b'{"a": 1, "b": 2, "b": 3}', "it")
    assert parse_fields(value, "it", ("a",)) == {"a": 1}
    assert parse_fields(value, "it", None) == {"a": 1, "b": 3}
    with pytest.raises(FormatError, match=r"^it: b is there twice$"):
        parse_fields(value, "it", ("a", "b"))


@pytest.mark.parametrize("text", [b"[]", b"null", b'"a"', b"1"])
def test_what_is_no_object(text: bytes) -> None:
    with pytest.raises(FormatError, match=r"^it: expected an object, found "):
        parse_fields(load_json(text, "it"), "it", ())


@pytest.mark.parametrize("value", [b"true", b"1.0", b"-1", b"10", b'"1"', b"null", b"[]", b"{}"])
def test_what_is_no_integer(value: bytes) -> None:
    fields = fields_of(b'{"a": ' + value + b"}")
    with pytest.raises(FormatError, match=r"^it: a: found .*, expected an integer from 0 to 9$"):
        parse_integer(fields, "a", "it", range(10))


@pytest.mark.parametrize("value", [b"1", b"null", b"[]", b'{"b": []}', rb'"\ud800"'])
def test_what_is_no_string(value: bytes) -> None:
    fields = fields_of(b'{"a": ' + value + b', "list": [' + value + b"]}")
    with pytest.raises(FormatError, match=r"^it: a: expected a string, found "):
        parse_string(fields, "a", "it")
    with pytest.raises(FormatError, match=r"^it: list: expected a string, found "):
        parse_strings(fields, "list", "it")


def test_messages_are_short_and_tell_what_is_missing() -> None:
    fields = fields_of(b'{"a": "' + b"x" * 10_000 + b'"}')
    with pytest.raises(FormatError, match=r"^it: a: expected a list, found .{,40}$"):
        parse_list(fields, "a", "it")
    with pytest.raises(FormatError, match=r"^it: b: expected a string, found nothing$"):
        parse_string(fields, "b", "it")
