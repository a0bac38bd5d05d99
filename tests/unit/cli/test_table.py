"""Tables."""

from cfs.cli.table import format_table


def test_a_table_as_composefs_rs_prints_it() -> None:
    assert format_table(("NAME", "DIGEST"), [("a", "0123"), ("b", "4567")]) == (
        "┌──────┬────────┐\n"
        "│ NAME ┆ DIGEST │\n"
        "╞══════╪════════╡\n"
        "│ a    ┆ 0123   │\n"
        "├╌╌╌╌╌╌┼╌╌╌╌╌╌╌╌┤\n"
        "│ b    ┆ 4567   │\n"
        "└──────┴────────┘\n"
    )


def test_width_is_that_of_a_terminal() -> None:
    lines = format_table(("N",), [("日本",), ("e\u0301",), ("abcd",)]).splitlines()
    assert lines[3] == "│ 日本 │"
    assert lines[5] == "│ e\u0301    │"
    assert lines[7] == "│ abcd │"


def test_cells_cannot_move_the_cursor() -> None:
    table = format_table(("N",), [("a\x1b[2J\nb\x9b",)])
    assert r"│ a\x1b[2J\nb\x9b │" in table
