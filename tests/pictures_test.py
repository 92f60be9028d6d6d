"""The pictures show the numbers they were given: positions, lengths, gaps and order, read back from the artists."""

import io
import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from infinite_jax import drawing, panels, pictures


def rows_of(steps, **columns) -> list[dict]:
    """Rows of a record, keys with __ for a slash."""
    return [
        {"step": step} | {key.replace("__", "/"): values[i] for key, values in columns.items() if values[i] != "absent"}
        for i, step in enumerate(steps)
    ]


def axes_of(draw, *arguments, width=400, height=200, **keywords):
    _, axes = drawing.blank(width, height, left=100, right=100)
    draw(axes, *arguments, **keywords)
    return axes


def test_a_null_and_an_absent_key_are_gaps():
    step_K, value_K = drawing.column(rows_of([0, 1, 2], a=["absent", None, 2]), "a")
    np.testing.assert_array_equal(step_K, [0, 1, 2])
    np.testing.assert_array_equal(value_K, [math.nan, math.nan, 2.0])


def test_stability_draws_the_average_only_while_the_domain_has_a_share():
    rows = rows_of(
        range(5),
        triage__share__a=["absent", 0.0, 0.5, 0.5, None],
        triage__acc_ema__a=["absent", 0.5, 0.6, 0.7, 0.7],
        triage__band__a=["absent", 1, 1, 0, 0],
        eval__pass_rate__a=[0.25, "absent", "absent", "absent", 0.75],
    )
    axes = axes_of(panels.stability, rows, "a")
    lines = {to_hex(line.get_color()): line for line in axes.lines}
    np.testing.assert_array_equal(lines[drawing.INK].get_ydata(), [math.nan, math.nan, 0.6, 0.7, math.nan])
    np.testing.assert_array_equal(lines[drawing.HELD].get_xydata(), [[0, 0.25], [4, 0.75]])
    spans = {to_hex(patch.get_facecolor()): patch.get_path().get_extents() for patch in axes.patches}
    assert {tint: (box.x0, box.x1) for tint, box in spans.items()} == {
        drawing.TINTS[1]: (2, 3),
        drawing.TINTS[0]: (3, 4),
    }


def test_without_triage_keys_the_line_is_the_pass_rate_of_each_step():
    rows = rows_of(range(3), pass_rate__a=["absent", 0.25, 0.5])
    axes = axes_of(panels.stability, rows, "a")
    drawn = next(line for line in axes.lines if to_hex(line.get_color()) == drawing.INK)
    np.testing.assert_array_equal(drawn.get_ydata(), [math.nan, 0.25, 0.5])


def test_shares_are_stacked_in_order_and_fill_the_whole():
    rows = rows_of(range(3), triage__share__a=["absent", 0.25, 0.5], triage__share__b=["absent", 0.75, 0.5])
    axes = axes_of(panels.shares, rows, ["a", "b"])
    a, b = (patch.get_paths()[0].get_extents() for patch in axes.collections if isinstance(patch, PolyCollection))
    assert (a.y0, a.y1, b.y0, b.y1) == (0, 0.5, 0.25, 1)
    assert (a.x0, a.x1) == (0, 2)  # the share of step 1 is that of the draw between 0 and 1
    assert [text.get_text() for text in axes.texts] == ["a", "b"]


def test_small_shares_become_one_layer_and_labels_keep_apart():
    names = [f"d{i}" for i in range(40)]
    share = np.r_[np.full(10, 0.09), np.full(30, 0.1 / 30)]
    rows = [{"step": s} | {f"triage/share/{n}": float(p) for n, p in zip(names, share)} for s in (1, 2)]
    axes = axes_of(panels.shares, rows, names, most=11)
    assert [text.get_text() for text in axes.texts] == [*names[:10], "30 others"]
    axes = axes_of(panels.shares, rows, names, most=40, height=600)
    at = [text.get_position()[1] for text in axes.texts]
    assert len(at) == 40 and min(np.diff(at)) * 570 >= 10 and at[-1] <= 1 and at[0] >= 0


def priorities(name, band, staleness, uncertainty, base):
    terms = zip(("band", "staleness", "uncertainty", "base"), (band, staleness, uncertainty, base))
    return {f"triage/priority_{term}/{name}": value for term, value in terms}


def test_the_queue_is_sorted_and_each_bar_is_its_terms():
    row = {"step": 7, "triage/share/off": 0.0} | priorities("off", 9, 9, 9, 9) | priorities("low", -3, 0.1, 0.2, -0.5)
    row |= priorities("first", -2, 0.5, 0.25, 0)
    names = ["off", "low", "first", "unknown"]
    assert panels.by_priority(row, names) == ["first", "low"]
    axes = axes_of(panels.queue, row, names)
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    # the band term counts from the lowest, -3; below 0 goes left
    wanted = [(0, 0, 1), (0, 1, 0.5), (0, 1.5, 0.25), (0, 1.75, 0), (1, 0, 0), (1, 0, 0.1), (1, 0.1, 0.2), (1, 0, -0.5)]
    np.testing.assert_allclose(bars, wanted, atol=1e-12)
    diamonds = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamonds, [(1.75, 0), (-0.2, 1)], atol=1e-12)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "low"]


def test_heat_is_opaque_where_the_value_is_largest_and_marks_flags():
    rows = rows_of([1, 2, 3], k__a=[0, 5, 20], k__b=[10, None, 0], flag__a=[0, 0, 1], flag__b=[0, 0, 0])
    axes = axes_of(panels.heat, rows, ["a", "b"], "k", marks="flag")
    np.testing.assert_allclose(axes.images[0].get_array()[..., 3], [[0, 0.25, 1], [0.5, 0, 0]])
    flags = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "X"]
    assert flags == [[[3, 0]], []]
    assert panels.heat(drawing.blank(300, 200)[1], rows, ["a", "b"], "k", least=40) == 40


def test_a_rare_long_wait_survives_thinning():
    rows = [{"step": s, "k/a": 50 if s == 777 else 0} for s in range(1, 2001)]
    axes = axes_of(panels.heat, rows, ["a"], "k")
    assert axes.images[0].get_array()[..., 3].max() == 1


def test_grades_right_of_zero_are_the_pass_rate():
    axes = axes_of(panels.grade_bars, {"a": [np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 0, 1.0])]})
    ends = np.array([(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]).reshape(2, 4, 2)
    np.testing.assert_allclose(ends[0], [(-0.3, -0.2), (-0.2, 0), (0, 0.3), (0.3, 0.7)], atol=1e-12)
    assert ends[1, 3].tolist() == [0, 1]
    heights = [bar.get_y() for bar in axes.patches]
    assert heights[0] < heights[4]  # the axis points down: the first evaluation is above


def test_the_running_mean_of_a_constant_is_that_constant_up_to_the_ends():
    axes = axes_of(panels.curve, rows_of(range(100), a=[2.0] * 100), "a")
    faint, strong = axes.lines
    assert faint.get_alpha() < 1
    np.testing.assert_allclose(strong.get_ydata(), 2.0)


def test_seconds_are_stacked_by_phase_and_cut_above_the_usual():
    columns = {
        "time__rollout_s": [1.0, 1, 1],
        "time__update_s": [99.0, 2, 2],
        "time__evaluate_s": ["absent", "absent", 4],
    }
    axes = axes_of(panels.seconds, rows_of([1, 2, 3], **columns))
    rollout, grade, update, evaluate = (patch.get_data() for patch in axes.patches)
    np.testing.assert_array_equal(rollout.values, [1, 1, 1])
    np.testing.assert_array_equal(update.baseline, grade.values)
    np.testing.assert_array_equal(evaluate.values, [100, 3, 7])
    assert axes.get_ylim()[1] == pytest.approx(6 * 7 * 1.05)


def test_thinning_keeps_evaluations_and_the_last_row():
    rows = [{"step": s} | ({"eval/macro": 0.5} if s % 700 == 0 else {}) for s in range(5001)]
    kept = [row["step"] for row in drawing.thinned(rows, 100)]
    assert len(kept) < 120 and {0, 700, 1400, 4900, 5000} <= set(kept) and kept == sorted(kept)


def test_a_long_name_is_cut_and_a_dollar_is_a_dollar():
    assert drawing.fitted(["short", "a" * 50], 62, size=10) == ["short", "a" * 9 + "…"]
    row = {"step": 1} | priorities("a$x$b", 0, 0, 0, 0)
    axes = axes_of(panels.queue, row, ["a$x$b"])
    axes.figure.savefig(io.BytesIO(), format="svg")
    assert not axes.get_yticklabels()[0].get_parse_math()


def test_board_figures_follow_what_is_recorded(tmp_path):
    from tensorboardX import SummaryWriter

    assert pictures.board_figures([], ["a"]) == {}
    plain = rows_of(range(3), pass_rate__a=["absent", 0.5, 0.5], eval__macro=[0.5, "absent", 0.5])
    assert set(pictures.board_figures(plain, ["a"])) == {"report/stability"}
    full = [row | {"triage/share/a": 1.0, "triage/staleness/a": 0} | priorities("a", 0, 0, 0, 0) for row in plain]
    found = pictures.board_figures(full, ["a"])
    assert set(found) == {"report/stability", "report/shares", "report/queue", "report/staleness"}
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("report/queue", found["report/queue"], 1)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 1000
