"""What the leaderboard and the terminal say of methods beside their controls, of stacks and of single images."""

import re

import pytest
from rich.console import Console
from test_store import make_record

from effbench import records
from effbench.records import Flops, Interaction, Interval, MetricValue, PerImage, Speedup, Versus
from effbench.report import equal_budget, leaderboard, show


def ratio(value):
    return Speedup(value=value, low=value - 0.1, high=value + 0.1, n=30, verdict="FASTER")


def interval(value, half=1.0):
    return Interval(value=value, low=value - half, high=value + half, n=1000)


def rival(control, advantage, *arms, verdict=None):
    said = verdict or ("BETTER" if advantage > 1 else "WORSE" if advantage < -1 else "NO DIFFERENCE SHOWN")
    names = arms or (f"blind:score={control}",)
    return Versus(
        control=control, arms=names, share=0.5, value=40 - advantage, advantage=interval(advantage), verdict=said
    )


def arm(name, *versus, kind="method", control="", tokens=(197, 138), giga=2.0, **more):
    return records.Arm(
        name=name,
        spec="" if kind == "baseline" else name,
        kind=kind,
        control=control,
        test_speedup=None if kind == "baseline" else ratio(more.pop("speed", 1.5)),
        test_flops=Flops(dense=int(giga * 1e9)),
        tokens=tokens,
        metrics={"t2i_r10": MetricValue(value=40.0, higher_is_better=True)},
        versus=versus,
        **more,
    )


def record_of(*arms, weights="0123abcd", train="locked"):
    envelope = make_record().envelope
    changes = dict(weights=weights, protocol=envelope.protocol.model_copy(update=dict(train=train)))
    return make_record(arms=arms, envelope=envelope.model_copy(update=changes))


BASELINE = arm("baseline", kind="baseline", tokens=(197, 197), giga=4.0)


def judged(weights="0123abcd", train="locked", without=()):
    """A record of methods and all kinds of controls, as a sweep leaves it."""
    between = ("resize:size=160", "resize:size=176")
    both = Interaction(parts=("merge", "pack"), speedup=interval(1.05, 0.02), quality=interval(0.99, 0.01))
    images = PerImage(images=200, flops=Interval(value=1.9e9, low=1.5e9, high=2.3e9), batch=16, padded=2_200_000_000)
    arms = (
        BASELINE,
        arm("noop", kind="control", control="noop", tokens=(197, 197), giga=4.0),
        arm("merge", rival("random", 3.0), rival("norm", 0.5), rival("resize", -2.0, *between), speed=1.6),
        arm("adaptive", rival("random", 0.5), rival("resize", 4.0, "resize:size=160"), per_image=images),
        arm("window", rival("resize", 2.0, *between), tokens=(197, 197)),
        arm("pack", tokens=(197, 197), text_speedup=ratio(3.5), speed=1.2),
        arm("merge+pack", rival("random", 2.0), rival("resize", 5.0, *between), interaction=both, speed=2.0),
        arm("resize:size=160", kind="control", control="resize", giga=1.0),
        arm("resize:size=176", kind="control", control="resize", giga=3.0),
        arm("merge:r=8", kind="control", control="part"),
        *(arm(f"blind:score={each}", kind="control", control=each) for each in ("random", "norm")),
    )
    return record_of(*(each for each in arms if each.name not in without), weights=weights, train=train)


def page_line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_page_says_first_who_beats_the_controls_and_who_does_not():
    text = leaderboard.render([judged()], [])
    assert "- **Beat random at an equal budget (2 of 3):** merge+pack, merge. **No difference" in text
    assert (
        "- **Beat resize at equal FLOPs (2 of 3):** merge+pack, window. **Worse:** merge. "
        "**No resize at equal FLOPs:** adaptive." in text
    )


def test_each_method_stands_beside_its_controls():
    text = leaderboard.render([judged()], []).split("<summary>Against controls at the same budget</summary>")[1]
    assert page_line(text, "| arm").split(" | ")[2:] == [
        "random (same budget)", "advantage over random", "norm (same budget)", "advantage over norm",
        "resize (same FLOPs)", "advantage over resize |",
    ]  # fmt: skip
    assert page_line(text, "| merge |") == (
        "| merge | 40.0 | 37.0 | +3.0 \\[+2.0, +4.0\\] **BETTER** | 39.5 | +0.5 \\[-0.5, +1.5\\] NO DIFFERENCE SHOWN "
        "| 42.0 (resize:size=160 to resize:size=176) | -2.0 \\[-3.0, -1.0\\] **WORSE** |"
    )
    # it takes no token away, and has no resize either
    assert page_line(text, "| pack |") == "| pack | 40.0 | n/a | n/a | n/a | n/a | — | — |"
    # its tokens were taken, but norm was not measured; its FLOPs lie below every size
    assert "| — | — | 36.0 (resize:size=160, 0.50x its FLOPs) |" in page_line(text, "| adaptive |")


@pytest.mark.parametrize("train, trusted", [("none", False), ("locked", False), ("full", True)])
def test_no_advantage_is_claimed_of_random_weights(train, trusted):
    record = judged("random", train)
    text, shown = leaderboard.render([record], []), terminal(record)
    assert "**random weights**" in text
    assert ("quality does not" in text) is ("quality does not" in shown) is not trusted
    assert ("<summary>Against controls" in text) is ("Advantage over" in shown) is trusted


@pytest.mark.parametrize(
    "found, text",
    [
        (rival("random", 3.0), "BETTER"),
        (rival("random", 3.0, verdict="NO DIFFERENCE SHOWN"), "NO DIFFERENCE SHOWN (too few seeds)"),
        (rival("random", 0.1), "NO DIFFERENCE SHOWN"),
        (
            rival("random", 0.1).model_copy(update=dict(advantage=Interval(value=9.0, n=5))),
            "NO DIFFERENCE SHOWN (too few images)",
        ),
    ],
)
def test_a_verdict_says_what_held_it_back(found, text):
    assert equal_budget.verdict(found) == text


def test_a_stack_stands_beside_its_parts():
    text = leaderboard.render([judged()], []).split("<summary>Stacks</summary>")[1]
    assert page_line(text, "| merge+pack |") == (
        "| merge+pack | merge 1.60x, pack 1.20x | 2.00x [1.90, 2.10] | 1.92x | 1.05 [1.03, 1.07] | 0.99 [0.98, 1.00] |"
    )


def test_the_text_tower_and_single_images_have_their_columns():
    text = leaderboard.render([judged()], [])
    assert "| compute | text tower |" in text  # no arm has an image tower's: such columns are left out
    assert "3.50x [3.40, 3.60]" in text
    assert "| 1.90 [1.50, 2.30], padded at batch 16: 2.20 |" in text


def test_many_controls_are_folded_away_and_say_what_they_are():
    text = leaderboard.render([judged()], [])
    visible = text.split("<details>")[0]
    assert "control · noop" in visible and "control (" not in visible
    folded = text.split("<details><summary>5 more controls</summary>")[1].split("</details>")[0]
    for label in (
        "control (random choice) · blind:score=random",
        "control (tokens by norm) · blind:score=norm",
        "control (image size) · resize:size=160",
        "control (a stack's part alone) · merge:r=8",
    ):
        assert f"| {label}<br>test |" in folded
    few = leaderboard.render([judged(without=("blind:score=norm",))], [])
    assert "more controls" not in few and "control (image size)" in few.split("<details>")[0]


def test_long_pages_fold_what_is_secondary():
    methods = [arm(f"m{i}", speed=1 + i / 10, notes=(f"note {i}",)) for i in range(15)]
    text = leaderboard.render([record_of(BASELINE, *methods)], [])
    assert "<details><summary>Where the speed-up comes from</summary>" in text
    assert "<details><summary>15 notes</summary>" in text and "- m3: note 3" in text


def terminal(record, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    show.print_record(record, console)
    return console.export_text()


def test_the_terminal_shows_verdicts_stacks_and_single_images():
    text = terminal(judged())
    assert max(map(len, text.splitlines())) <= 100
    table = text.split("Advantage over blind controls")[1]
    assert table.index("BETTER") < table.index("WORSE") and "+3.0 [+2.0, +4.0]" in table and "n/a" in table
    assert "0.50x its FLOPs" in table and "5 more controls are on the page" in table
    assert "merge+pack: 2.00x [1.90, 2.10], the product of its parts 1.92x, interaction 1.05 [1.03, 1.07]" in text
    assert "adaptive: GFLOPs of single images 1.90 [1.50, 2.30], padded at batch 16: 2.20" in text


def test_names_of_controls_are_untrusted():
    evil = "a|b <script> **x** [y](http://z)"
    found = rival(evil, 3.0, evil), rival("resize", 3.0, evil, evil)
    both = Interaction(parts=(evil,), speedup=interval(1.0))
    record = record_of(BASELINE, arm("merge", *found, interaction=both), arm(evil, kind="control", control=evil))
    text = leaderboard.render([record], [])
    assert text.count("&lt;script") >= 6 and not re.search(r"<script|(?<!\\)\*\*x|(?<!\\)\]\(http|a\|b", text)
    for one in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in one.splitlines()}) == 1, one
    assert "[y](http://z)" in re.sub(r"\s", "", terminal(record))
