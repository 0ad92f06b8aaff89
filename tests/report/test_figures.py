from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.report.axes import short_count
from trivium.report.figures import (
    intervals,
    learning_curves,
    length_curves,
    length_map,
    save,
    to_svg,
)
from trivium.report.spread import spread
from trivium.report.style import PLAIN, Row, Series, styles

NAMES = {"attention": "attention", "local": "local", "simplicial": "simplicial", "attention_flops": "attention"}


def curves(ends):
    looks = styles(NAMES)
    tokens = [1e5, 3e5, 1e6, 2e6]
    return [
        Series(name, looks[name], tokens, [0.0, 0.3, end * 0.9, end], [0.0, 0.2, 0.8 * end, end], [0.1, 0.4, end, end])
        for name, end in zip(NAMES, ends, strict=True)
    ]


def drawn_texts(figure):
    """Return the boxes of the names right of the axes, in pixels."""
    canvas = figure.canvas
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = figure.axes[0].texts
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


@pytest.mark.parametrize("ends", [(1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.01, 0.0), (0.5, 0.51, 0.9, 0.1)])
def test_names_beside_curves_neither_collide_nor_leave_the_figure(ends):
    figure = learning_curves(curves(ends), label="Exact match", percent=True, thresholds=(0.9,))
    boxes = drawn_texts(figure)
    assert sorted(name for name, _ in boxes) == sorted(NAMES)
    width, height = figure.get_size_inches() * figure.dpi
    for _, box in boxes:
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for (_, low), (_, high) in pairwise(sorted(boxes, key=lambda item: item[1].y0)):
        assert low.y1 <= high.y0 + 1


def test_curves_that_end_alike_are_named_with_the_fastest_on_top():
    series = curves((1.0, 1.0, 1.0, 1.0))
    fast = Series("simplicial", series[2].style, series[2].tokens, [0.5, 0.9, 1.0, 1.0])
    boxes = drawn_texts(learning_curves([series[0], series[1], fast, series[3]], label="Exact match", percent=True))
    assert max(boxes, key=lambda item: item[1].y0)[0] == "simplicial"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=7))
def test_spread_keeps_the_order_the_gap_and_the_bounds(wanted):
    places = spread(wanted, gap=12, low=0, high=100)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for low, high in pairwise(order):
        assert places[high] - places[low] >= 12 - 1e-6
    assert min(places) >= -1e-6
    assert max(places) <= 100 + 1e-6


def test_spread_leaves_alone_what_has_room():
    assert spread([10, 40, 80], gap=12, low=0, high=100) == pytest.approx([10, 40, 80])


def test_a_mixer_has_one_colour_and_its_variants_differ_without_colour():
    looks = styles(NAMES)
    assert looks["attention"].colour == looks["attention_flops"].colour
    shapes = {(look.marker, str(look.line), look.filled) for look in looks.values()}
    assert len(shapes) == len(NAMES)
    alone = styles({"another name": "simplicial"})
    assert alone["another name"].colour == looks["simplicial"].colour
    assert styles({"x": "a mixer of tomorrow"}) == styles({"x": "a mixer of tomorrow"})


def luminance(colour):
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mixer", ["attention", "local", "simplicial", "gla", "gated_deltanet", "prefix_scan", "other"])
def test_names_can_be_read_on_white(mixer):
    colour = styles({"x": mixer})["x"].colour
    # 3 : 1 is the contrast that WCAG asks of graphics and large text.
    assert 1.05 / (luminance(colour) + 0.05) >= 3


def test_svg_is_the_same_for_the_same_data_and_links_nowhere():
    texts = [to_svg(learning_curves(curves((1.0, 0.9, 0.8, 0.7)), label="Loss")) for _ in range(2)]
    assert texts[0] == texts[1]
    assert "attention_flops</text>" in texts[0]
    assert "matplotlib.org" not in texts[0]
    assert 'href="http' not in texts[0]


def test_figures_are_saved_as_their_suffix_says(tmp_path):
    figure = learning_curves(curves((1.0, 0.9, 0.8, 0.7)), label="Exact match", percent=True)
    assert save(figure, tmp_path / "new" / "a.svg").read_text().lstrip().startswith("<?xml")
    assert save(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_loss_and_tokens_are_on_log_axes():
    axes = learning_curves(curves((1.0, 0.9, 0.8, 0.7)), label="Rate", percent=True).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    positive = [Series("training", PLAIN, [1e5, 1e6], [2.0, 0.1])]
    axes = learning_curves(positive, label="Loss").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert intervals([row("attention", 1e6)], label="Tokens").axes[0].get_xscale() == "log"


def row(name, mean, low=None, high=None, values=(), note=""):
    return Row(name, styles(NAMES)[name], mean, low, high, values, note)


def test_curves_by_length_mark_the_lengths_that_were_read_and_where_training_ended():
    lengths = [18, 34, 180, 512]
    look = styles(NAMES)["attention"]
    curve = Series("attention", look, lengths, [0.0, 0.1, 0.6, 0.9], [0.0, 0.0, 0.5, 0.8], [0.1, 0.2, 0.7, 1.0])
    figure = length_curves([curve], label="Token error", trained=18)
    (axes,) = figure.axes
    assert axes.get_xticks().tolist() == lengths
    assert any(list(line.get_xdata()) == [18, 18] for line in axes.lines)
    assert axes.get_ylim() == (-0.02, 1.02)
    assert "trained on up to 18" in axes.get_xlabel()


def test_rows_without_a_value_say_so_and_rates_end_where_rates_end():
    rows = [row("attention", None, note="0 of 3 seeds reached it"), row("local", 0.99, 0.95, 1.03, (0.98, 1.0))]
    figure = intervals(rows, label="Exact match", percent=True)
    assert "0 of 3 seeds reached it" in [name for name, _ in drawn_texts(figure)]
    bars = [patch for patch in figure.axes[0].patches if patch.get_width() > 0]
    assert len(bars) == 1
    assert bars[0].get_x() + bars[0].get_width() <= 1 + 1e-9


def test_figures_of_nothing_are_empty_and_not_an_error():
    assert to_svg(learning_curves([], label="Exact match", percent=True))
    assert to_svg(intervals([row("attention", None)], label="Tokens"))
    assert to_svg(learning_curves([Series("one", PLAIN, [1e5], [0.0])], label="Loss"))


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (12_000, "12 k"), (999_900, "1 M"), (1_530_000, "1.53 M"), (2e9, "2 G"), (0, "0")]
)
def test_counts_are_written_as_people_say_them(count, text):
    assert short_count(count) == text


@pytest.mark.parametrize("low", [1e5, 3e5, 7.3e5])
@pytest.mark.parametrize("times", [1.2, 1.8, 3.0, 6.0, 20.0, 1e3, 1e6])
def test_ticks_of_tokens_do_not_collide(low, times):
    looks = styles(NAMES)["attention"]
    points = [low * times ** (n / 9) for n in range(10)]
    curve = Series("attention", looks, points, [n / 9 for n in range(10)])
    figure = learning_curves([curve], label="Exact match", percent=True)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) >= 2
    for one, other in pairwise(boxes):
        assert one.x1 < other.x0


def test_a_map_writes_each_rate_rounded_down_and_bounds_what_was_trained():
    rates = {(10, 10): 1.0, (10, 40): 0.9999, (40, 10): 0.0, (40, 40): None}
    figure = length_map(rates, label="Right, %", names=("digits of a", "digits of b"), trained=20)
    (axes,) = figure.axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "100", (0, 1): "99", (1, 0): "0"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "40"]
    assert axes.get_xlabel() == "digits of a"
    (box,) = axes.patches
    assert (box.get_width(), box.get_height()) == (1, 1)


def test_labels_of_many_lengths_leave_each_other_room():
    curve = Series("attention", styles(NAMES)["attention"], [*range(20, 201, 10), 500], [1.0] * 20)
    (axes,) = length_curves([curve], label="Right").axes
    ticks = axes.get_xticks().tolist()
    assert ticks[-1] == 500
    assert 4 < len(ticks) < 15
