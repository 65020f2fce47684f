import math

import pytest

from disttrain.report import formatting as f


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "n/a"), (0.0, "0"), (0.0123456, "0.01235"), (12_345.6, "12,350"), (4e-7, "4.000e-07"), (math.nan, "nan")],
)
def test_significant(value: float | None, words: str) -> None:
    assert f.significant(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "n/a"),
        (122_880, "122,880"),
        (999_499, "999,499"),
        (1e6, "1.00 M"),
        (95.31e6, "95.3 M"),
        (1.5e12, "1.50 T"),
    ],
)
def test_short_counts(value: float | None, words: str) -> None:
    assert f.short(value) == words


def test_short_counts_never_show_a_thousand_of_a_unit() -> None:
    assert (f.short(999_600), f.short(999.6e6), f.short(9.996e6)) == ("1.00 M", "1.00 B", "10.0 M")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "n/a"),
        (0, "0 s"),
        (4.2e-5, "42 µs"),
        (0.2513, "251 ms"),
        (12.34, "12.3 s"),
        (90, "90 s"),
        (120, "2 min"),
        (252, "4 min 12 s"),
        (3 * 3600 + 299.6, "3 h 5 min"),
        (3599.8, "1 h"),
        (7199.8, "2 h"),
        (86_399.9, "1 d"),
        (2 * 86_400 + 4 * 3600, "2 d 4 h"),
        (math.inf, "inf"),
    ],
)
def test_seconds(seconds: float | None, words: str) -> None:
    assert f.seconds_text(seconds) == words


def test_other_units() -> None:
    assert (f.bytes_text(1.49e9), f.bytes_text(None), f.bytes_text(12)) == ("1.49 GB", "n/a", "12 B")
    assert (f.flops_text(8.64e14), f.percent(0.4312), f.percent(None)) == ("864 TFLOP/s", "43.1%", "n/a")
    assert f.fixed(3.14159265) == "3.1416"


def test_the_scale_of_a_chart_follows_its_largest_value() -> None:
    assert f.scale("seconds", [0.2, 0.03, math.inf]) == f.Scale(1e-3, "ms")
    assert f.scale("bytes", [5e9, -1]) == f.Scale(1e9, "GB")
    assert f.scale("seconds", []) == f.Scale(1.0, "s")
    assert [f.time_scale(s).unit for s in (60, 4000, 80_000, 1e6)] == ["seconds", "minutes", "hours", "days"]
