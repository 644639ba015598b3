import io
import re
import xml.etree.ElementTree as tree
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from test_leaderboard import BASELINE, EVIL, make_arm, make_record

from effbench.cli import main
from effbench.errors import InvalidError
from effbench.records import Interval, MetricValue, Speedup, Structure, TimeSplit
from effbench.report import plot_style, plot_text, plots, strengths
from effbench.report.standings import sections

PRIMARY = "t2i_r10"
BAD = "a$b$ \\alpha_1 ${x}^2$ <script>alert(1)</script> --> & \u202e\x1b[31m"


def arm(spec, ratio=1.4, quality=48.0, loss=0.1, tokens=(197, 197), kind="method", **changes):
    metric = MetricValue(
        value=quality,
        low=quality - 2,
        high=quality + 1,
        higher_is_better=True,
        lossiness=None if loss is None else Interval(value=loss, low=loss - 0.02, high=loss + 0.03),
    )
    return make_arm(spec, spec, ratio, kind=kind, **dict(metrics={PRIMARY: metric}, tokens=tokens) | changes)


def blind(spec, of, **changes):
    return arm(spec, kind="control", control="random", controls_for=of, **changes)


def rows(*arms, **changes):
    return sections([make_record(arms=arms, **changes)])[0].rows


def curve_rows():
    """token_prune at its default (0.7) and 0.5, with norm at both; random controls for the plain ones."""
    return rows(
        arm("token_prune", 1.3, 50.0, 0.05, (197, 138)),
        arm("token_prune:keep=0.5", 1.8, 40.0, 0.2, (197, 99)),
        arm("token_prune:keep=0.25", 2.2, 20.0, 0.6, (197, 50)),
        arm("token_prune:score=norm", 1.35, 49.0, 0.07, (197, 138)),
        arm("token_prune:keep=0.5,score=norm", 1.85, 41.0, 0.19, (197, 99)),
        blind("token_prune:score=random", ("token_prune",), ratio=1.4, quality=47.0),
        blind("token_prune:keep=0.5,score=random", ("token_prune:keep=0.5",), ratio=1.9, quality=35.0),
    )


def texts(figure):
    """Everything that is written in a figure."""
    from matplotlib.text import Text

    return [each.get_text() for each in figure.findobj(Text) if each.get_text()]


def line(panel, label):
    return next(each for each in panel.lines if each.get_label() == label)


def no_overlap(figure):
    """Texts that lie on one another, or reach out of the figure."""
    from matplotlib.text import Text

    with plot_style.styled():
        figure.canvas.draw()
    unseen = set()  # numbers of ticks beyond an axis's ends, which are not drawn
    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [each for each in figure.findobj(Text) if each.get_text().strip() and id(each) not in unseen]
    renderer = figure.canvas.get_renderer()
    around = [Text.get_window_extent(each, renderer) for each in found]  # of an annotation without its line
    wide, high = figure.get_size_inches() * 72
    bad = [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in combinations(zip(found, around, strict=True), 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 0.7 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1.5
    ]
    out = [
        each.get_text()
        for each, box in zip(found, around, strict=True)
        if box.x0 < -1 or box.x1 > wide + 1 or box.y0 < -1 or box.y1 > high + 1
    ]
    return bad, out


def test_pareto_draws_every_arm_where_it_stands_and_lists_the_front():
    found = rows(
        arm("a_fast", 2.0, loss=0.2), arm("b_good", 1.2, loss=0.01), arm("c_bad", 1.1, loss=0.25), arm("d", 1.5, loss=0)
    )
    drawn = plots.pareto(found)
    panel = drawn.figure.axes[0]
    for name, at in (("a_fast", (2.0, 0.2)), ("c_bad", (1.1, 0.25)), ("d", (1.5, 0.0))):
        assert [float(axis[0]) for axis in line(panel, name).get_data()] == pytest.approx(at)
    steps = [[*map(float, axis)] for axis in line(panel, "front").get_data()]
    assert steps == [[1.5, 2.0], [0.0, 0.2]] and line(panel, "front").get_drawstyle() == "steps-pre"
    said = texts(drawn.figure)
    listed = said[said.index("on the front") :]
    assert "a_fast" in listed and "d" in listed and "c_bad" not in listed and "b_good" not in listed
    assert "2.00×" in said and "+20.0 %" in said and any(re.fullmatch(r"[01]\.\d\d", each) for each in said)
    reach = [each for each in panel.collections if hasattr(each, "get_segments") and each.get_segments()]
    ends = np.array([segment for each in reach for segment in each.get_segments()]).reshape(-1, 4)
    assert any(np.allclose(each, (1.97, 0.2, 2.04, 0.2)) for each in ends)  # the interval of a_fast's speed-up


def test_pareto_tells_methods_below_controls_and_names_what_is_missing():
    from effbench.records import Versus

    worse = Interval(value=-2, low=-3, high=-1)
    lost = Versus(control="random", arms=("x",), value=50, advantage=worse, verdict="WORSE")
    found = rows(
        arm("good:a=1", 1.5),
        arm("beaten:a=1", 1.6, versus=(lost,)),
        arm("broken", status="FAILED", error="boom", test_speedup=None),
        arm("lossless", loss=None),
    )
    drawn = plots.pareto(found)
    panel = drawn.figure.axes[0]
    assert line(panel, "beaten:a=1").get_markerfacecolor() == "white" != line(panel, "good:a=1").get_markerfacecolor()
    assert line(panel, "beaten:a=1").get_marker() != line(panel, "good:a=1").get_marker()
    assert any("broken" in note and "lossless" in note for note in drawn.notes)


def test_time_split_stacks_the_parts_of_one_run():
    split = dict(total=0.5, steps=10, compute=0.5, image=0.3, text=0.1, overhead=0.06, head=0.04)
    found = [
        make_arm("fast", "fast", step_time=TimeSplit(**split)),
        make_arm("untimed", "untimed", 1.3),
    ]
    base = make_arm("baseline", "", kind="baseline", step_time=TimeSplit(total=0.8, steps=10, image=0.8))
    record = make_record("20250103-b", 3, found)
    record = record.model_copy(update=dict(arms=(base, *record.arms[1:])))
    older = make_record("20250101-a", 1, (make_arm("slow", "slow", step_time=TimeSplit(total=9, steps=1, image=9)),))
    drawn = plots.time_split(sections([record, older])[0].rows)
    (panel,) = drawn.figure.axes
    bars = {each.get_label(): [(bar.get_x(), bar.get_width()) for bar in each] for each in panel.containers}
    assert list(bars) == ["image tower", "text tower", "method overhead", "head"]
    assert [each[1] for each in bars["image tower"]] == pytest.approx([80, 30])
    assert bars["method overhead"][1] == pytest.approx((40, 6)) and bars["head"][1] == pytest.approx((46, 4))
    assert {"baseline", "fast", "80.0", "50.0"} <= set(texts(drawn.figure))
    assert "slow" not in texts(drawn.figure)
    assert any("slow" in note and "do not compare" in note for note in drawn.notes)


def test_tokens_by_layer_join_arms_with_the_same_counts():
    found = [*curve_rows(), *rows(arm("sparse", tokens=(197, 197)))[-1:]]
    figure = plots.tokens(found).figure
    (panel,) = figure.axes
    drawn = {each.get_label(): [*map(int, each.get_ydata())] for each in panel.lines}
    assert drawn["keep=0.25"] == [197, 50] and drawn["defaults (2 arms)"] == [197, 138]
    assert drawn["keep=0.5 (2 arms)"] == [197, 99] and len(drawn) == 4  # and the baseline
    masked = arm("mask:k=2", tokens=(197, 50), structure=Structure(masked_tokens=True))
    assert "k=2, masked" in texts(plots.tokens(rows(masked)).figure)


def test_curves_take_the_default_from_the_method_and_its_random_control():
    found = {curve.fixed: curve for curve in strengths.curves(curve_rows())}
    assert [point.value for point in found[""].points] == [0.25, 0.5, 0.7]
    assert [point.value for point in found["score=norm"].points] == [0.5, 0.7]
    controls = [point.control and point.control.arm.spec for point in found[""].points]
    assert controls == [None, "token_prune:keep=0.5,score=random", "token_prune:score=random"]
    assert strengths.defaults("layer_prune")["drop"] == 3 and strengths.defaults("token_merge")["r"] == 13
    assert strengths.defaults("no_such_method") == {}


def test_keep_rate_draws_quality_and_speed_with_bands():
    drawn, problems = plots.draw("keep-rate", curve_rows())
    assert list(drawn) == ["keep-rate-token_prune-keep"] and not problems
    figure = drawn["keep-rate-token_prune-keep"].figure
    assert len(figure.axes) == 4
    quality, speed = figure.axes[:2]
    own, other = [each for each in quality.lines if len(each.get_xdata()) > 1 and each.get_marker() in "oX"]
    assert [*own.get_xdata()] == [0.25, 0.5, 0.7] and [*own.get_ydata()] == [20, 40, 50]
    assert [*other.get_xdata()] == [0.5, 0.7] and [*other.get_ydata()] == [35, 47]
    assert [*next(each for each in speed.lines if each.get_marker() == "o").get_ydata()] == [2.2, 1.8, 1.3]
    band = quality.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 18 and band[:, 1].max() == 51
    assert quality.get_ylim() == figure.axes[2].get_ylim()  # panels compare


@pytest.mark.parametrize("width", ["one", "two"])
def test_nothing_overlaps_or_is_cut(width):
    many = [
        arm(f"method_{i % 9}:k={i},variant=a_rather_long_name_{i}", 1 + 0.02 * i, 50 - i, 0.004 * i, (197, 190 - i))
        for i in range(26)
    ]
    timed = [
        each.model_copy(update=dict(step_time=TimeSplit(total=1, steps=10, image=0.1 + 0.01 * i, head=0.02)))
        for i, each in enumerate(many)
    ]
    found = [*rows(*timed), *curve_rows()]
    for what in plots.PLOTS:
        for name, drawn in plots.draw(what, found, width)[0].items():
            assert drawn.figure.get_figwidth() == pytest.approx({"one": 3.3, "two": 6.8}[width])
            assert no_overlap(drawn.figure) == ([], []), name


def test_hostile_text_is_shown_as_it_is_and_cannot_act():
    odd = arm(BAD, 1.5, tokens=(197, 9), step_time=TimeSplit(total=1, steps=2, image=1))
    under = arm("_hidden", 1.6, loss=0.2, tokens=(197, 50))
    found = rows(odd, under, data=EVIL, task=BAD)
    for what in ("pareto", "time", "tokens"):
        (drawn,) = plots.draw(what, found)[0].values()
        said = "".join(texts(drawn.figure)).replace("\n", "")
        assert "a$b$ \\alpha_1" in said and "\u202e" not in said and "\x1b" not in said
        svg = plot_style.as_svg(drawn.figure, BAD)
        root = tree.fromstring(svg)
        names = {each.tag.rpartition("}")[2] for each in root.iter() if isinstance(each.tag, str)}
        assert not names & {"script", "image", "a", "foreignObject", "animate", "set"}
        assert not [key for each in root.iter() for key in each.attrib if key.lower().startswith("on")]
        links = {value for each in root.iter() for key, value in each.attrib.items() if key.endswith("href")}
        assert all(value.startswith("#") for value in links)
    assert "_hidden" in texts(plots.pareto(found).figure)  # a legend of matplotlib would drop it


def test_the_same_record_gives_the_same_bytes():
    import matplotlib

    made = []
    for size in (10, 30):
        with matplotlib.rc_context({"font.size": size, "svg.hashsalt": None, "axes.facecolor": "red"}):
            drawn_both = plots.draw("pareto", curve_rows())[0] | plots.draw("keep-rate", curve_rows())[0]
            for name, drawn in drawn_both.items():
                made.append((name, plot_style.as_svg(drawn.figure, name), plot_style.as_png(drawn.figure, name)))
    half = len(made) // 2
    assert made[:half] == made[half:] and b"<dc:date>" not in made[0][1]
    assert Image.open(io.BytesIO(made[0][2])).size[0] == 990  # 3.3 inches of 300 dots


def test_figures_that_cannot_be_true_are_left_out_and_said():
    huge = Speedup(value=1e308, low=1e300, high=1e308, verdict="FASTER")
    inverted = Speedup(value=1.5, low=2.0, high=1.0, verdict="FASTER")
    wild = Interval(value=-1e308)
    found = rows(
        arm("huge", test_speedup=huge),
        arm("wild", metrics={PRIMARY: MetricValue(value=1e308, higher_is_better=True, lossiness=wild)}),
        arm("turned", test_speedup=inverted),
        arm("fine", tokens=(197, 9), step_time=TimeSplit(total=1, steps=1, image=1)),
        arm("slow", tokens=(197, 2**62), step_time=TimeSplit(total=1, steps=1, image=1e308)),
    )
    drawn = plots.pareto(found)
    assert any("huge" in note and "wild" in note and "too large" in note for note in drawn.notes)
    assert any("turned" in note and "does not lie in it" in note for note in drawn.notes)
    assert {"fine", "turned"} <= {each.get_label() for each in drawn.figure.axes[0].lines}
    for what in ("time", "tokens"):
        (drawn,) = plots.draw(what, found)[0].values()
        assert any("slow" in note for note in drawn.notes), what
        assert all(np.isfinite(panel.get_ylim()).all() for panel in drawn.figure.axes)


@pytest.mark.parametrize(
    "what, arms, message",
    [
        ("pareto", [arm("a", loss=None)], "no method has both"),
        ("time", [arm("a")], "timed steps"),
        ("tokens", [arm("a")], "no arm removes tokens"),
        ("keep-rate", [arm("token_prune:keep=0.5"), arm("token_prune:keep=0.7,score=norm")], "two strengths"),
    ],
)
def test_a_plot_with_nothing_to_show_says_why(what, arms, message):
    with pytest.raises(InvalidError, match=message):
        plots.draw(what, rows(*arms))
    with pytest.raises(InvalidError, match="no valid run"):
        plots.pareto([])


@pytest.mark.parametrize("spec", ["", "a:", "a:b", "a+", "1a:b=2", "a:b=", "a:b=1,,c=2", "+".join("a" * 17)])
def test_only_canonical_specs_are_read(spec):
    assert strengths.parsed(spec) is None
    assert strengths.parsed("a:k=1,at=3/6+b") == (("a", {"k": "1", "at": "3/6"}), ("b", {}))
    assert strengths.number("1e999999") is None and strengths.number("nan") is None and strengths.number("3/6") is None


def test_text_is_broken_to_the_width_and_kept_apart():
    lines = plot_text.wrapped("token_merge:ratio=0.95,variant=pitome+decoder_prune:by=divprune", 80)
    assert len(lines) == 2 and all(plot_text.length(each) <= 80 for each in lines) and lines[-1].endswith("…")
    places = plot_text.spread([5, 5, 5, 90], 8, 0, 100)
    assert sorted(places) == places and min(np.diff(places)) >= 8 and places[3] == 90
    assert max(plot_text.spread([99, 98, 100], 8, 0, 100)) <= 100
    assert plot_text.text("日本 é\u202e") == "\ufffd\ufffd é"


@pytest.fixture
def board(tmp_path):
    def save(*records):
        for each in records:
            folder = tmp_path / "records" / each.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(each.model_dump_json())
        return tmp_path

    return save


def test_the_command_writes_files_and_says_which(board, capsys):
    good = make_record("20250105-new", 5, (arm("a", quality=0.9 * BASELINE, tokens=(197, 9)),))
    root = board(make_record("20250102-old", 2, epochs=1), good)
    (root / "records" / "20250103-bad").mkdir()
    (root / "records" / "20250103-bad" / "record.json").write_text('{"schema_version": 99}')
    assert main(["plot", "--out", str(root)]) == 0
    said = capsys.readouterr().out
    names = sorted(each.name for each in (root / "plots").iterdir())
    assert names == ["pareto.png", "pareto.svg", "tokens.png", "tokens.svg"] and "pareto.svg" in said
    assert "no time split to plot" in said and "no keep-rate plot" in said and "20250103-bad" in said
    options = ["--to", str(root / "f"), "--width", "two", "--format", "svg"]
    assert main(["plot", "pareto", "20250105", "--out", str(root), *options]) == 0
    assert [each.name for each in (root / "f").iterdir()] == ["pareto-wide.svg"]


def test_what_the_command_cannot_do_it_says(board, capsys, tmp_path):
    root = board(
        make_record("20250102-ok", 2, (make_arm(metrics={}),)),
        make_record("20250103-off", 3, status="INVALID", why_invalid="noop is off", epochs=2),
    )
    for words, code, message in (
        (["time"], 2, "timed steps"),
        (["all", "20250103"], 2, "noop is off"),
        (["all", "none"], 3, "no run 'none'"),
        (["all"], 2, "nothing could be plotted"),
        (["all", "20250102", "--to", "/dev/null/x"], 2, "nothing could be plotted"),
        (["nonsense"], 3, "nonsense"),
    ):
        assert main(["plot", *words, "--out", str(root)]) == code, words
        assert message in capsys.readouterr().err, words
    assert main(["plot", "--out", str(tmp_path / "empty")]) == 2
    assert not (root / "plots").exists()


def test_file_names_hold_nothing_of_a_path():
    assert plots.file_name("../../etc/passwd") == "etc-passwd" and plots.file_name("token_merge:r") == "token_merge-r"
    assert plots.file_name("\u202e$") == "x" and len(plots.file_name("a" * 999)) == 60
