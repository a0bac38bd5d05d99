"""JSON of strangers: what is refused, and what the rest is thought to cost."""

import json
import random
import tracemalloc
from contextlib import suppress

import pytest

from cfs.errors import FormatError
from cfs.messages import decode_object, decoding_cost

LONG = 1 << 17  # more than what is free


def padded(message: str) -> bytes:
    return message.encode() + b" " * LONG


@pytest.mark.parametrize(
    "bad",
    [
        b"", b"[]", b"null", b"{", b'{"a":1}x', b"\xff", b"\xef\xbb\xbf{}", b'{"a":1,"a":2}',
        b'{"a":NaN}', b'{"a":{"b":1,"b":2}}', b'{"a":"\\ud800"}', b'{"\\udfff":1}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "{}".encode("utf-16-le"),
    ],
    ids=lambda bad: str(bad[:20]),
)  # fmt: skip
def test_what_is_no_message(bad: bytes) -> None:
    with pytest.raises(FormatError):
        decode_object(bad)


def test_pairs_of_surrogates_are_text() -> None:
    assert decode_object(b'{"a":"\\ud83d\\udca9"}') == {"a": "\U0001f4a9"}


@pytest.mark.parametrize("escape", ["\\\\", '\\"', "\\\\\\", "x\\", "\\\\\\\\\\"])
def test_values_are_counted_across_pieces(escape: str) -> None:
    """Commas in strings are no values, wherever the border of two pieces is."""
    text = escape * 150_001 + ",[{" * 1000
    for shift in range(4):
        message = json.dumps({"x" * shift: text, "list": [1] * 100}).encode()
        cost = decoding_cost(message, 103)  # two objects' and lists' beginnings, and commas
        assert cost == 2 * len(message) + 102 * 100
        with pytest.raises(FormatError, match="more than 101 values"):
            decoding_cost(message, 101)


def test_costs_are_no_less_than_what_decoding_takes() -> None:
    draw = random.Random(1)
    parts = ['"\\u00e4"', "[]", "{}", '""', "[[]]", '{"a":1}', "1.5", '"\U0001f4a9"']
    parts.append('"' + "x" * 3000 + '"')
    for _ in range(20):
        chosen = draw.sample(parts, 3)
        message = ('{"a":[' + ",".join(chosen * 40_000)[:600_000]).encode()
        cost = decoding_cost(message, 1 << 22)
        tracemalloc.start()
        with suppress(FormatError):  # it was cut somewhere
            decode_object(message)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5 * (cost + len(message))


def test_short_messages_are_free() -> None:
    assert decoding_cost(b"[" * 10_000, 1) == 0
    assert decoding_cost(padded("{}"), 1) == 2 * (LONG + 2) + 100


def test_counting_takes_no_memory() -> None:
    message = b'"' + b"\\\\" * (8 << 20) + b'"'
    tracemalloc.start()
    decoding_cost(message, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
