from io import StringIO

import pytest
from rich.console import Console

from trivium.report.tables import Table, length_tables, percent, threshold, to_rich, write_interval, write_points


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.0, "100.0 %"),
        (0.9996, "99.96 %"),
        (0.99999, "99.999 %"),
        (0.5, "50.0 %"),
        (0.0, "0.0 %"),
        (0.0004, "0.04 %"),
        (None, "–"),
    ],
)
def test_a_rate_is_100_or_0_percent_only_if_it_is(rate, text):
    assert percent(rate) == text


def test_intervals_of_rates_end_where_rates_end():
    assert write_interval({"mean": 0.99, "low": 0.95, "high": 1.03}) == "99.0 % (95.0–100)"
    assert write_interval({"mean": 0.01, "low": -0.02, "high": 0.04}) == "1.0 % (0.0–4.0)"
    assert write_interval({"mean": 1.0, "low": 1.0, "high": 1.0}) == "100.0 % (100–100)"
    assert write_interval({"mean": 0.5, "low": None, "high": None}) == "50.0 % (one seed)"
    assert write_interval({"mean": None, "low": None, "high": None}) == "–"


def test_a_threshold_is_written_as_it_was_given():
    assert [threshold(rate) for rate in (0.9, 0.99, 0.975, 0.999)] == ["90 %", "99 %", "97.5 %", "99.9 %"]


def test_differences_are_in_points_and_keep_their_sign():
    assert write_points({"mean": -0.012, "low": -0.02, "high": -0.004}) == "-1.2 ± 0.8"
    assert write_points({"mean": 0.012, "low": None, "high": None}) == "+1.2 (one seed)"


def printed(table, width):
    stream = StringIO()
    Console(file=stream, width=width).print(to_rich(table))
    return stream.getvalue()


def test_a_narrow_terminal_breaks_names_and_headings_but_no_number():
    table = Table(
        "", ["variant", "a long heading of a column", "tokens"], [["x" * 30, "99.4 % (96.8–100)", "1,234,567"]]
    )
    text = printed(table, 48)
    assert "99.4 % (96.8–100)" in text
    assert "1,234,567" in text
    assert "…" not in text
    assert text.count("x") == 30


def test_what_looks_like_markup_is_printed_as_it_is():
    assert "[red]7[/red]" in printed(Table("", ["answer"], [["[red]7[/red]"]]), 40)


def test_scores_by_length_are_two_tables_with_a_column_a_length():
    right = {"rate": 0.5, "low": 0.4, "high": 0.6, "successes": 5, "n": 10}
    over_seeds = {"mean": 0.25, "low": 0.1, "high": 0.4, "values": [0.2, 0.3]}
    found = length_tables(
        {
            "run": {"18": {"exact_match": right, "token_error": right}},
            "study": {key: {"exact_match": over_seeds, "token_error": right} for key in ("18", "34")},
        }
    )
    assert [table.columns for table in found] == [["", "18", "34"]] * 2
    assert found[0].rows == [
        ["run", "50.0 % (40.0–60.0)", "–"],
        ["study", "25.0 % (10.0–40.0)", "25.0 % (10.0–40.0)"],
    ]
    assert found[1].rows[1] == ["study", "50.0 % (40.0–60.0)", "50.0 % (40.0–60.0)"]
    assert length_tables({"run": {}}) == []
