import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from rich.console import Console

from effbench import store
from effbench.errors import EffbenchError
from effbench.records import (
    Arm,
    Economics,
    Envelope,
    Flops,
    Interval,
    Memory,
    MetricValue,
    Protocol,
    Provenance,
    Record,
    Speedup,
    TimeSplit,
)
from effbench.report import figures, leaderboard, markdown, show

METRICS = ("t2i_r10", "t2i_r1", "t2i_r5", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_medr", "i2t_medr")
EVIL = (
    "a|b\n\n# big <script>alert(1)</script> `rm` [x](javascript:1) "
    "![i](http://evil.example/x.png) \u202egnp.exe\x1b[31m"
)


def make_arm(name="token_prune", spec=None, ratio=1.42, quality=48.0, kind="method", **changes):
    spec = f"{name}:keep=0.5" if spec is None else spec
    figure = Speedup(
        value=ratio, low=ratio - 0.03, high=ratio + 0.04, n=30, verdict="FASTER" if ratio > 1.1 else "NO DIFFERENCE"
    )
    metrics = {
        each: MetricValue(
            value=quality,
            low=quality - 1.5,
            high=quality + 1.5,
            higher_is_better="medr" not in each,
            unit="rank" if "medr" in each else "%",
            lossiness=None if kind == "baseline" else Interval(value=0.034, low=0.012, high=0.056, n=1000),
        )
        for each in METRICS
    }
    fields = dict(
        name=name,
        spec=spec,
        kind=kind,
        test_time=TimeSplit(total=9.0, compute=8.8, data_wait=0.2),
        test_speedup=None if kind == "baseline" else figure,
        image_speedup=None if kind == "baseline" else figure,
        test_flops=Flops(dense=2_510_000_000),
        parameters=9_180_000,
        weight_bytes=36_700_160,
        memory=Memory(weights=36_700_160, load_peak=60_000_000, run_peak=412_000_000),
        tokens=(197, 197, 197),
        metrics=metrics,
    )
    return Arm(**fields | changes)


def make_record(
    name="20250102-abc", day=2, arms=(), task="flickr8k", data="flickr8k", epochs=12, synthetic=False, **changes
):
    envelope = Envelope(
        task=task, data=data, data_fingerprint="f00", synthetic=synthetic,
        images={"test": 1000}, captions={"test": 5000},
        metrics=METRICS, backbone="timm:deit_tiny_patch16_224", weights="ab" * 32, transform="resize 224 bicubic",
        protocol=Protocol(epochs=epochs, threads=2), device_model="Some CPU @ 2.0 GHz",
    )  # fmt: skip
    fixed = (
        make_arm("baseline", "", kind="baseline"),
        make_arm("noop", "", 1.001, kind="control", control="noop"),
        make_arm("identity", "", 1.02, kind="control", control="identity"),
    )
    fields = dict(
        id=name,
        created=datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=day - 1),
        wall_time=432.0,
        peak_memory=1_400_000_000,
        lockstep_overhead=0.012,
        primary_metric="t2i_r10",
        envelope=envelope,
        provenance=Provenance(command="effbench run --method token_prune --task flickr8k", effbench="0.1.0", load=0.31),
        arms=(*fixed, *(arms or (make_arm(),))),
    )
    return Record(**fields | changes)


def some_records():
    """Two comparable runs, one with other epochs, one synthetic, one invalid: between them every kind of row."""
    pruned = make_arm(
        test_flops=Flops(dense=1_730_000_000, overhead=4_000_000, complete=False), tokens=(197, 138, 97, 68), ratio=1.31
    )
    trained = make_arm(
        "token_merge",
        "token_merge:r=13,phase=both",
        1.62,
        phase="both",
        train_time=TimeSplit(total=100.0),
        train_speedup=Speedup(value=1.2, low=1.1, high=1.3, n=90, verdict="FASTER"),
        notes=("merges 13 tokens in each of 12 blocks",),
    )
    blind = make_arm(
        "random",
        "token_prune:keep=0.5,score=random",
        1.33,
        31.0,
        "control",
        control="random",
        controls_for=("token_prune",),
    )
    failed = make_arm(
        "quantize", "quantize", status="FAILED", error="RuntimeError: no kernel for int8", metrics={}, test_speedup=None
    )
    return [
        make_record("20250102-first", 2, (pruned, blind)),
        make_record(
            "20250103-second", 3, (pruned, trained, failed, blind), notes=("1 caption without an image dropped",)
        ),
        make_record("20250104-short", 4, epochs=1),
        make_record("20250105-scenes", 5, data="scenes", synthetic=True),
        make_record("20250106-broken", 6, status="INVALID", why_invalid="noop is 1.21x [1.15, 1.27]: outside its band"),
    ]


def section(text, heading):
    return next(part for part in text.split("\n## ") if heading in part.splitlines()[0])


def arms_of(part):
    names = [line.split("|")[1].strip(" *") for line in part.splitlines() if line.startswith("| ")]
    return names[2 : names.index("arm", 1)]


def test_baseline_then_methods_by_speedup_then_controls():
    part = section(leaderboard.render(some_records()[:2], []), "flickr8k")
    order = arms_of(part)
    assert order[0].startswith("baseline") and order[1].startswith("token_merge")
    assert [name.split(":")[0].split(" (")[0] for name in order[2:4]] == ["token_prune", "quantize"]
    assert all(name.startswith("control") for name in order[4:]) and len(order) == 7
    assert "token_prune:keep=0.5 (2 runs)" in part
    assert "FAILED: RuntimeError: no kernel for int8" in part
    assert "≥ 1.73 +0.0040" in part and "197 → 68" in part


def test_the_newest_success_is_shown():
    old, new = make_record("a", 2, (make_arm(ratio=1.3),)), make_record("b", 3, (make_arm(ratio=1.7),))
    worst = make_record("c", 4, (make_arm(status="FAILED", error="boom", test_speedup=None),))
    part = leaderboard.render([old, new, worst], [])
    assert "1.70x" in part and "1.30x" not in part and "boom" not in part and "(3 runs)" in part


def test_envelopes_are_apart_and_say_in_what_they_differ():
    text = leaderboard.render(some_records()[:3], [])
    parts = text.split("\n## ")[1:]
    assert len(parts) == 2 and all("differ in (here)" in part and "protocol.epochs" in part for part in parts)
    assert "protocol.epochs (1)" in parts[0] and "token_merge" not in parts[0] and "protocol.threads" not in text
    assert "differ in (here)" not in leaderboard.render(some_records()[:2], [])


def test_synthetic_data_are_named_last_and_never_ranked_with_real_ones():
    parts = leaderboard.render(some_records(), []).split("\n## ")[1:]
    assert "data **scenes (synthetic)**" in parts[-1] and "never ranked with results on real data" in parts[-1]
    assert not any("drawn by a program" in part for part in parts[:-1])


def test_invalid_runs_are_listed_and_not_ranked():
    text = leaderboard.render(
        [make_record("bad", status="INVALID", why_invalid="noop is off")], ["x/record.json is bad"]
    )
    assert "`bad`: noop is off" in text and "| arm" not in text and "x/record.json is bad" in text


def test_train_speedup_is_not_claimed_for_the_baselines_own_weights():
    arm = make_arm(train_speedup=Speedup(value=9.99, n=3, verdict="TOO FEW SAMPLES"))
    assert "9.99" not in leaderboard.render([make_record(arms=(arm,))], [])


def test_hostile_text_stays_text():
    costs = Economics(share=0.95, best_dev=1e308, seeds=1, reached=0, tuning_seconds=1e308, break_even=1e308, note=EVIL)
    evil = dict(economics=costs, agreement={f"{EVIL}_cosine": Interval(value=0.5)})
    arm = make_arm(EVIL, EVIL, notes=(EVIL,), status="FAILED", error=EVIL, **evil)
    record = make_record(arms=(arm,), task=EVIL, data=EVIL, notes=("https://evil.example @all $x$ ~~~", "- # x"))
    provenance = record.provenance.model_copy(update=dict(command="x```\n<b>\u202e"))
    record = record.model_copy(update=dict(provenance=provenance))
    text = leaderboard.render([record], [EVIL])
    outside = re.sub(r"````.*?````", "", text, flags=re.S)
    assert "<script" not in text and "<b>" not in outside and "\x1b" not in text and "\u202e" not in text
    assert not re.search(r"(?<!\\)\]\(", text.replace("[records](records)", "")) and "https://" not in text
    for one in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in one.splitlines()}) == 1, one
    assert sum(line.startswith("#") for line in text.splitlines()) == 3


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("token_prune:keep=0.5,at=3/6/9+quantize", "token_prune:keep=0.5,at=3/6/9+quantize"),
        ("_a_ *b*", r"\_a\_ \*b\*"),
        ("a\\|b", r"a\\\|b"),
        ("&lt;", "&amp;lt;"),
        ("2.0@$", "2.0&#64;&#36;"),
        ("www.x.org", "www&#46;x.org"),
        ("line\r\n\u2028 two\x00\u200b", "line two"),
        ("é日本", "é日本"),
    ],
)
def test_escape(text, escaped):
    assert markdown.escape(text) == escaped


def test_figures():
    assert [figures.number(x) for x in (0, 0.01234, 1.2345, 12.345, 123.45, 1234.5, 2e6)] == [
        "0", "0.0123", "1.23", "12.3", "123", "1234", "2e+06",
    ]  # fmt: skip
    none = MetricValue(value=1, higher_is_better=True, note="n/a (baseline at chance)")
    assert figures.lossiness(none) == "n/a (baseline at chance)" and figures.ratio(None) == "—"
    few = Speedup(value=1.5, n=2, verdict="TOO FEW SAMPLES")
    assert figures.ratio(few) == "1.50x"


def test_write_is_atomic_and_needs_no_heavy_library(tmp_path):
    store.write(make_record(), pd.DataFrame({"kind": []}), tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from effbench.report import leaderboard, show; leaderboard.write_leaderboard(Path(sys.argv[1]))\n"
        "print([m for m in ('torch', 'pandas', 'timm', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    here = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), here], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert sorted(os.listdir(tmp_path)) == ["README.md", "records"]
    (tmp_path / "file").write_text("")
    with pytest.raises(EffbenchError, match="was not written"):
        leaderboard.write_leaderboard(tmp_path / "file")


def test_an_empty_folder_gives_a_leaderboard_that_says_so(tmp_path):
    assert "No run yet" in leaderboard.write_leaderboard(tmp_path / "new").read_text()


def shown(record, width=100, **options):
    console = Console(width=width, record=True, file=open(os.devnull, "w"), **options)
    show.print_record(record, console)
    return console.export_text()


def test_a_run_in_the_terminal_fits_and_holds_the_figures():
    text = shown(some_records()[1])
    assert max(map(len, text.splitlines())) <= 100
    for figure in (
        "token_merge:r=13",
        "1.62x",
        "[1.59, 1.66]",
        "FASTER",
        "197 → 68",
        "t2i_r10",
        "+3.4 %",
        "no kernel for int8",
    ):
        assert figure in text, figure
    assert "noise floor" in text and "20250103-second" in text


def test_the_terminal_shows_hostile_text_as_text():
    text = shown(
        make_record(
            arms=(make_arm("[red]x[/red]\x1b]0;t\x07", "[link=http://x]"),), status="INVALID", why_invalid="[/]"
        )
    )
    assert "[red]x[/red]" in text.replace("\n", "") and "\x1b" not in text and "INVALID" in text
