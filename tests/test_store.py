import errno
import json
import os
import subprocess
import sys
import zlib
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from effbench import records, samples, store
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.task import Items


def make_record(name="run-1", **changes):
    envelope = records.Envelope(
        task="flickr8k", data="scenes", data_fingerprint="f00", images={"test": 10}, captions={"test": 50},
        metrics=("t2i_r10",), backbone="timm:tiny", weights="sha256:0123456789abcdef", transform="resize 32",
        protocol=records.Protocol(), device_model="some CPU",
    )  # fmt: skip
    plain = dict(t2i_r10=records.MetricValue(value=48.0 / 0.9, higher_is_better=True))
    baseline = records.Arm(name="baseline", spec="", kind="baseline", tokens=(197, 197), metrics=plain)
    arm = records.Arm(
        name="token_prune",
        spec="token_prune:keep=0.5",
        kind="method",
        test_speedup=records.Speedup(value=1.5, low=1.4, high=1.6, n=30, verdict="FASTER"),
        metrics={
            "t2i_r10": records.MetricValue(
                value=48.0, higher_is_better=True, lossiness=records.Interval(value=0.1, low=0.05, high=0.2, n=10)
            ),
            "arm": records.MetricValue(value=1.0, higher_is_better=True),
        },
    )
    fields = dict(
        id=name,
        created=datetime(2025, 1, 2, tzinfo=UTC),
        lockstep_overhead=zlib.crc32(name.encode()) / 2**40,  # no two runs are alike in it
        primary_metric="t2i_r10",
        envelope=envelope,
        provenance=records.Provenance(command="effbench run"),
        arms=(baseline, arm),
    )
    return records.Record(**fields | changes)


def steps(n=3):
    return pd.DataFrame([dict(kind="step", arm="baseline", seed=0, phase="train", index=i, loss=1.5) for i in range(n)])


def test_what_is_written_is_read_back(tmp_path):
    record = make_record()
    path = store.write(record, steps(), tmp_path)
    assert path == tmp_path / "records" / "run-1" and store.read(path) == store.read(path / "record.json") == record
    assert sorted(os.listdir(tmp_path / "records")) == ["run-1"]
    items = samples.item_samples("noop", 0, "t2i_rank", Items(np.array([3, 1]), np.array([0, 1])))
    store.write(make_record("run-2", wall_time=2.0), pd.concat([steps(), items]), tmp_path)
    frame = store.load(tmp_path, samples=True)
    assert list(frame) == ["run", *samples.TYPES] and len(frame) == 8
    got = frame[frame.kind == "item"]
    assert got.value.tolist() == [3, 1] and got.seconds.isna().all() and frame["index"].dtype == "int64"


def test_a_record_is_never_overwritten(tmp_path):
    store.write(make_record(), steps(), tmp_path)
    with pytest.raises(EffbenchError, match="never overwritten"):
        store.write(make_record(wall_time=9.0), steps(), tmp_path)
    assert store.read(tmp_path / "records" / "run-1").wall_time == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_samples", full)
    with pytest.raises(EffbenchError, match="disk is full"):
        store.write(make_record(), steps(), tmp_path)
    assert os.listdir(tmp_path / "records") == []


@pytest.mark.parametrize("frame", [pd.DataFrame({"secnds": [1.0]}), pd.DataFrame({"seconds": ["soon"]})])
def test_samples_that_do_not_fit_are_refused(tmp_path, frame):
    with pytest.raises(InvalidError):
        store.write(make_record(), frame, tmp_path)
    assert os.listdir(tmp_path / "records") == []


def test_a_writer_killed_half_way_is_invisible(tmp_path):
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "import test_store; from pathlib import Path; from effbench import store\n"
        "store.write_samples = lambda *_: os._exit(9)\n"
        "store.write(test_store.make_record(), test_store.steps(), Path(sys.argv[1]))"
    )
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), here, os.path.dirname(here)])
    assert done.returncode == 9 and store.read_all(tmp_path) == ([], [])
    store.write(make_record(), steps(), tmp_path)
    assert len(store.read_all(tmp_path)[0]) == 1


def edited(change):
    value = json.loads(make_record().model_dump_json())
    change(value)
    return json.dumps(value)


TEXT = make_record().model_dump_json()


@pytest.mark.parametrize(
    "content, says",
    [
        (TEXT[: len(TEXT) // 2], "truncated or not JSON"),
        ("", "truncated or not JSON"),
        ("[" * 100_000, "truncated or not JSON"),
        ("{}", "schema_version|id"),
        (edited(lambda r: r.update(schema_version=3)), "newer effbench"),
        (edited(lambda r: r.update(wall_time=float("nan"))), "wall_time: Input should be a finite"),
        (edited(lambda r: r.update(id="../../etc")), "id: String should match"),
        (edited(lambda r: r["arms"][1].update(tokens=[-1])), "arms.1.tokens.0"),
        (edited(lambda r: r.update({"ev\x1b[31mil": 1})), r"ev\\x1b\[31mil"),
        (edited(lambda r: r["arms"].pop(0)), "exactly one baseline"),
        (edited(lambda r: r["arms"].append(r["arms"][1])), "same name"),
        (" " * (store.MAX_RECORD_BYTES + 1), "larger than"),
    ],
    ids=lambda value: value[:12] if len(value) < 60 else "",
)
def test_a_bad_record_is_named_with_its_first_problem(tmp_path, content, says):
    folder = tmp_path / "records" / "run-1"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(content)
    with pytest.raises(InvalidError, match=says) as caught:
        store.read(folder)
    assert str(folder / "record.json") in str(caught.value) and caught.value.exit_code == 2
    assert store.read_all(tmp_path) == ([], [str(caught.value)])


def test_a_missing_record_or_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "record.json")
    for path in (tmp_path, tmp_path / "nothing", "/dev/zero"):
        with pytest.raises(InvalidError):
            store.read(path)


def test_damaged_samples_are_refused(tmp_path):
    path = store.write(make_record(), steps(), tmp_path)
    (path / "samples.parquet").write_bytes((path / "samples.parquet").read_bytes()[:-50])
    with pytest.raises(InvalidError, match="does not hold samples"):
        store.load(path, samples=True)
    pd.DataFrame({"a": [1]}).to_parquet(path / "samples.parquet")
    with pytest.raises(InvalidError, match="does not hold samples"):
        store.load(path, samples=True)


def test_records_come_oldest_first_and_a_renamed_copy_is_a_problem(tmp_path):
    for name, day in (("c", 3), ("a", 5), ("b", 4)):
        store.write(make_record(name, created=datetime(2025, 1, day)), steps(), tmp_path)
    (tmp_path / "records" / "a").rename(tmp_path / "records" / "z")
    got, problems = store.read_all(tmp_path)
    assert [record.id for record in got] == ["c", "b"] and len(problems) == 1 and "renamed" in problems[0]


def test_a_copy_under_another_id_is_named_and_counted_once(tmp_path):
    for name, overhead in (("first", 0.01), ("second", 0.01), ("third", 0.1)):
        store.write(make_record(name, lockstep_overhead=overhead), steps(), tmp_path)
    got, problems = store.read_all(tmp_path)
    assert [record.id for record in got] == ["first", "third"]
    assert len(problems) == 1 and "second is a copy: the same measurement as first" in problems[0]


def test_of_a_record_and_its_edited_copy_neither_counts(tmp_path):
    """Whichever comes first by name: the copy must not take the place of the genuine one."""
    baseline, arm = make_record().arms
    faster = arm.model_copy(update=dict(test_speedup=records.Speedup(value=9, low=8, high=10, n=30, verdict="FASTER")))
    for name, arms in (("0-forged", (baseline, faster)), ("genuine", (baseline, arm)), ("x-copy", (baseline, arm))):
        made = make_record(name, lockstep_overhead=0.01, arms=arms, created=datetime(2025, 3, 4, tzinfo=UTC))
        store.write(made, steps(), tmp_path)
    store.write(make_record("other"), steps(), tmp_path)
    got, problems = store.read_all(tmp_path)
    assert [record.id for record in got] == ["other"] and len(problems) == 3
    assert all("one of them was edited" in each and "(0-forged, genuine, x-copy)" in each for each in problems)
    assert store.find(tmp_path, "latest").name == "other"
    with pytest.warns(UserWarning, match="one of them was edited"):
        assert set(store.load(tmp_path).run) == {"other"}


def test_text_of_a_record_adds_no_line_to_a_problem(tmp_path):
    baseline, arm = make_record().arms
    arm = arm.model_copy(update=dict(name="a\n::error::b", promised=2.0, realised=99.0))
    store.write(make_record(arms=(baseline, arm)), steps(), tmp_path)
    (tmp_path / "records" / "x\n::error::y").mkdir()
    got, problems = store.read_all(tmp_path)
    assert not got and len(problems) == 2 and not any("\n" in each for each in problems)
    assert all("::error::" in each for each in problems)


def test_every_column_of_load_stands_in_its_docstring():
    baseline, arm = make_record().arms
    said = " ".join(store.load.__doc__.split()).replace("(", " ").replace(")", " ").replace(",", " ").replace(";", " ")
    ends = ("_low", "_high", "_verdict", "_note")  # said once for all
    missing = {name for name in store.row(make_record(), arm) if not name.endswith(ends)} - set(said.split())
    assert missing == {"t2i_r10", "t2i_r10_lossiness", "arm_lossiness"}


CONTRADICTIONS = {
    "a speed-up of 1e+308": dict(test_speedup=records.Speedup(value=1e308, verdict="TOO FEW SAMPLES")),
    "a speed-up of -1": dict(test_speedup=records.Speedup(value=-1, low=-2, high=-0.5, verdict="SLOWER")),
    "the speed-up of 9.9 lies outside": dict(
        test_speedup=records.Speedup(value=9.9, low=1, high=2, verdict="AMBIGUOUS")
    ),
    "is called FASTER": dict(test_speedup=records.Speedup(value=0.9, low=0.8, high=1.1, verdict="FASTER")),
    "of the promised speed-up": dict(promised=2.0, realised=99.0),
    "better than its best value, 100": dict(
        metrics=dict(m=records.MetricValue(value=500, ceiling=100, higher_is_better=True))
    ),
    "lossy-ness of t2i_r10 of 0, where": dict(
        metrics=dict(t2i_r10=records.MetricValue(value=3.7, higher_is_better=True, lossiness=records.Interval(value=0)))
    ),
    "as good as the baseline's": dict(
        metrics=dict(
            t2i_r10=records.MetricValue(
                value=48, higher_is_better=True, lossiness=records.Interval(value=0.1), equivalent=True, margin=0.01
            )
        )
    ),
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_figures_that_contradict_each_other_are_no_record(tmp_path, said):
    baseline, arm = make_record().arms
    edited = make_record(arms=(baseline, arm.model_copy(update=CONTRADICTIONS[said])))
    store.write(edited, steps(), tmp_path)
    got, (problem,) = store.read_all(tmp_path)
    assert not got and "contradicts itself: token_prune: " in problem and said in problem


def test_a_record_of_a_day_to_come_is_none(tmp_path):
    store.write(make_record(created=datetime(9999, 12, 31, tzinfo=UTC)), steps(), tmp_path)
    assert "a day that is to come" in store.read_all(tmp_path)[1][0]


def test_links_pipes_and_names_that_climb_are_not_followed(tmp_path):
    folder = tmp_path / "here" / "records"
    path = store.write(make_record("run-1"), steps(), tmp_path / "here")
    store.write(make_record("outside", wall_time=1.0), steps(), tmp_path / "there")
    (folder / "outside").symlink_to(tmp_path / "there" / "records" / "outside")
    (folder / "run-2").mkdir()
    (folder / "run-2" / "record.json").symlink_to(path / "record.json")
    (folder / "run-3").mkdir()
    os.mkfifo(folder / "run-3" / "record.json")
    (folder / "run-4").mkdir()
    (folder / "run-4" / "record.json").write_text(edited(lambda r: r.update(id="../../there/records/outside")))
    (folder / "stray.json").write_text(TEXT)
    (folder / "a\n\x1b[31m").mkdir()
    got, problems = store.read_all(tmp_path / "here")
    assert [record.id for record in got] == ["run-1"] and len(problems) == 5
    said = "\n".join(problems)
    for part in ("outside is a link", "run-2/record.json is a link", "run-3/record.json is not a file", "id: String"):
        assert part in said, said


def test_huge_numbers_are_records_and_what_is_no_number_is_not(tmp_path):
    folder = tmp_path / "records"
    for name, text in (("huge", "1e308"), ("more", "1e999"), ("nan", "NaN"), ("whole", "1" + "0" * 5000)):
        (folder / name).mkdir(parents=True)
        content = edited(lambda r, name=name: r.update(id=name, wall_time="@"))
        (folder / name / "record.json").write_text(content.replace('"@"', text))
    got, problems = store.read_all(tmp_path)
    assert [record.id for record in got] == ["huge"] and len(problems) == 3


def test_find_by_id_beginning_latest_and_path(tmp_path):
    for name, day in (("20250101-aa", 1), ("20250103-bb", 3), ("20250102-cc", 2)):
        store.write(make_record(name, created=datetime(2025, 1, day, tzinfo=UTC)), steps(), tmp_path)
    folder = tmp_path / "records"
    assert store.find(tmp_path, "20250102-cc") == store.find(tmp_path, "20250102") == folder / "20250102-cc"
    assert store.find(tmp_path, "latest") == folder / "20250103-bb"
    assert store.find(tmp_path, str(folder / "20250101-aa")) == folder / "20250101-aa"
    for name, says in (("2025", "3 runs begin"), ("20250101-ab", "did you mean '20250101-aa'"), ("", "no run ''")):
        with pytest.raises(UsageError, match=says):
            store.find(tmp_path, name)
    with pytest.raises(UsageError, match="no run in"):
        store.find(tmp_path / "empty", "latest")


def test_load_gives_one_tidy_row_per_arm(tmp_path):
    path = store.write(make_record(), steps(), tmp_path)
    for place in (path, tmp_path, tmp_path / "records"):
        frame = store.load(place)
        assert frame.arm.tolist() == ["baseline", "token_prune"]
    row = frame.set_index("arm").loc["token_prune"]
    assert row.test_speedup == 1.5 and row.test_speedup_verdict == "FASTER" and row.t2i_r10_lossiness_high == 0.2
    assert frame.tokens_last.tolist()[0] == 197 and frame.test_flops.isna().all()
    with pytest.raises(InvalidError):
        store.load(tmp_path / "nowhere")


def test_records_and_samples_of_schema_1_stay_readable(tmp_path):
    """What schema 2 added is absent from them."""
    dump = json.loads(make_record().model_dump_json())
    dump["schema_version"] = 1
    for name in ("energy", "calibration"):
        del dump[name]
    for arm in dump["arms"]:
        for name in ("promised", "realised", "kernels", "structure", "train_memory", "by_batch", "agreement"):
            del arm[name]
    for name in ("schedule", "engine", "zero_stage", "processes"):
        del dump["envelope"]["protocol"][name]
    folder = tmp_path / "records" / "run-1"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(dump))
    old = (
        steps()
        .assign(image_seconds=0.5)
        .drop(columns="loss")
        .reindex(columns=[name for name in samples.TYPES if name not in samples.LATER])
    )
    old.to_parquet(folder / "samples.parquet", index=False)
    record = store.read(folder)
    assert record.envelope.digest == make_record().envelope.digest and record.arm("token_prune").promised is None
    frame = store.load(tmp_path, samples=True)
    assert frame["image_seconds"].tolist() == [0.5] * 3 and frame["text_seconds"].isna().all()
