import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_leaderboard import EVIL, make_arm, make_record

from effbench import cli
from effbench.compare import choose, compare
from effbench.errors import UsageError
from effbench.quality import lossiness
from effbench.records import Flops, Provenance, Speedup
from effbench.rescoring import Scores, reading
from effbench.samples import item_samples, write_samples
from effbench.task import Items, Metric

R10 = Metric("t2i_r10", "t2i_rank", lambda ranks: 100 * (ranks <= 10), True, 10.0, 100.0)
IMAGES = 60


def ranks(seed=0, better=0.0):
    """Ranks of 60 images with 5 captions each; `better` is the share that is moved to rank 1."""
    drawn = np.random.default_rng(seed)
    found = drawn.integers(1, 25, 5 * IMAGES)
    found[drawn.random(5 * IMAGES) < better] = 1
    return Items(found, np.repeat(np.arange(IMAGES), 5))


def record(name="a", scores=(), envelope=(), protocol=(), **changes):
    """A record whose t2i_r10 is computed from the given scores: by arm, a list of Items by seed; and its samples."""
    scores = dict(baseline=[ranks()], noop=[ranks()], identity=[ranks()], token_prune=[ranks(1)]) | dict(scores)
    made = make_record(name, **changes)
    trained = dict(train="none", seeds=tuple(range(len(scores["baseline"])))) | dict(protocol)
    held = made.envelope.protocol.model_copy(update=trained)
    made = made.model_copy(update=dict(envelope=made.envelope.model_copy(update=dict(envelope) | dict(protocol=held))))
    arms = []
    for arm in made.arms:
        items = scores.get(arm.name)
        if items is None:
            arms.append(arm)
            continue
        base = scores["baseline"]
        value = lossiness(R10, base, base if arm.kind == "baseline" else items)
        arms.append(arm.model_copy(update=dict(metrics=arm.metrics | {R10.name: value})))
    rows = [item_samples(arm, n, "t2i_rank", each) for arm, of in scores.items() for n, each in enumerate(of)]
    return made.model_copy(update=dict(arms=tuple(arms))), pd.concat(rows, ignore_index=True)


def put(a, b):
    """Compare two (record, samples)."""
    return compare(a[0], b[0], (a[1], b[1]))


def arm(found, name="token_prune"):
    return next(each for each in found.arms if each.a.name == name)


@pytest.fixture
def board(tmp_path):
    """Write records and samples as a leaderboard keeps them; returns its folder."""

    def save(*made):
        for each, samples in made:
            folder = tmp_path / "board" / "records" / each.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(each.model_dump_json())
            write_samples(samples, folder / "samples.parquet")
        return tmp_path / "board"

    return save


def test_fields_of_the_envelope_that_differ_come_first_and_then_nothing_is_judged():
    one = record()
    other = record("b", envelope=dict(backbone="timm:vit_base_patch16_224"), protocol=dict(epochs=3))
    found = put(one, other)
    assert [(each.name, each.a, each.b) for each in found.envelope] == [
        ("backbone", "timm:deit_tiny_patch16_224", "timm:vit_base_patch16_224"),
        ("protocol.epochs", 12, 3),
    ]
    assert not found.judged
    assert {ratio.verdict for each in found.arms for ratio in each.ratios} == {""}
    assert all(each.quality.verdict == "" and each.quality.difference is None for each in found.arms)


def speed(value, low, high, n=30):
    return Speedup(value=value, low=low, high=high, n=n, verdict="AMBIGUOUS")


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (speed(1.4, 1.38, 1.42), speed(1.5, 1.47, 1.53), "FASTER"),
        (speed(1.5, 1.47, 1.53), speed(1.4, 1.38, 1.42), "SLOWER"),
        (speed(1.4, 1.3, 1.5), speed(1.55, 1.49, 1.6), "NO DIFFERENCE SHOWN"),  # the intervals meet
        (speed(1.4, 1.399, 1.401), speed(1.43, 1.429, 1.431), "NO DIFFERENCE SHOWN"),  # apart by 2 %
        (speed(1.4, None, None, 3), speed(9, 8, 10), ""),
    ],
)
def test_a_speedup_differs_beyond_both_intervals_and_the_margin(a, b, verdict):
    found = put(
        record(arms=(make_arm(test_speedup=a),)), record("b", arms=(make_arm(test_speedup=b, train_speedup=b),))
    )
    ratio, train = arm(found).ratios
    assert (ratio.name, ratio.verdict) == ("test", verdict)
    assert ratio.change == pytest.approx(b.value / a.value)
    assert (train.name, train.a, train.verdict, train.change) == ("train", None, "", None)


def test_nothing_measured_by_an_invalid_run_is_judged():
    found = put(record(), record("b", status="INVALID", why_invalid="noop is 1.21x"))
    assert not found.judged and not found.envelope
    assert found.notes == ("B is INVALID, so nothing that it measured is judged: noop is 1.21x",)


def test_the_quality_of_two_runs_is_paired_by_item():
    found = arm(put(record(), record("b", scores=dict(token_prune=[ranks(1, better=0.5)])))).quality
    at_a, at_b = (R10.value(each.values).mean() for each in (ranks(1), ranks(1, better=0.5)))
    assert found.verdict == "BETTER"
    assert found.difference.value == pytest.approx(at_b - at_a)
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert found.difference.high - found.difference.low < found.a.high - found.a.low  # what pairing is for
    base = R10.value(ranks().values).mean()
    assert found.lossiness.value == pytest.approx(at_a / base - at_b / base)
    turned = arm(put(record(scores=dict(token_prune=[ranks(1, better=0.5)])), record("b"))).quality
    assert turned.verdict == "WORSE" and turned.difference.value == pytest.approx(at_a - at_b)


def test_equal_scores_are_the_same_and_a_small_difference_is_not_shown():
    found = put(record(), record("b", scores=dict(token_prune=[ranks(1, better=0.01)])))
    assert {each.quality.verdict for each in found.arms if each.a.name != "token_prune"} == {"SAME"}
    assert arm(found).quality.verdict == "NO DIFFERENCE SHOWN"


def test_runs_that_trained_with_few_seeds_allow_no_claim():
    trained = dict(train="locked", epochs=3)
    one, other = record(protocol=trained), record("b", dict(token_prune=[ranks(1, better=0.5)]), protocol=trained)
    quality = arm(put(one, other)).quality
    assert quality.difference.low > 0 and quality.verdict == "NO DIFFERENCE SHOWN" and "3 seeds" in quality.note
    seeds = dict(baseline=[ranks()] * 3, noop=[ranks()] * 3, identity=[ranks()] * 3, token_prune=[ranks(1)] * 3)
    better = seeds | dict(token_prune=[ranks(1, better=0.5)] * 3)
    assert (
        arm(put(record("a", seeds, protocol=trained), record("b", better, protocol=trained))).quality.verdict
        == "BETTER"
    )


@pytest.mark.parametrize("damage", ["no file", "other images", "not finite", "wrong value", "twice", "no baseline"])
def test_items_that_do_not_fit_are_not_paired(damage):
    one, other = record(), record("b", scores=dict(token_prune=[ranks(1, better=0.5)]))
    samples = other[1]
    mine = samples["arm"] == "token_prune"
    if damage == "no file":
        samples = None
    elif damage == "other images":
        samples = samples.assign(group=samples["group"].where(~mine, samples["group"] + 1))
    elif damage == "not finite":
        samples = samples.assign(value=samples["value"].where(~mine, np.nan))
    elif damage == "wrong value":
        samples = samples.assign(value=samples["value"].where(~mine, 1.0))
    elif damage == "twice":
        samples = pd.concat([samples, samples[mine]])
    else:
        samples = samples[samples["arm"] != "baseline"]
    found = compare(one[0], other[0], (one[1], samples))
    quality = arm(found).quality
    assert quality.difference is None and quality.lossiness is None
    assert quality.note == "not paired by item" and quality.verdict == "BETTER"  # by the intervals of the records
    assert len(found.notes) == 1 and "intervals" in found.notes[0]


def test_a_metric_is_read_from_scores_only_if_it_gives_every_recorded_value():
    made, samples = record()
    metric, columns = reading("t2i_r10", [Scores(made, samples)])
    assert columns == ("t2i_rank",) and metric.value(np.array([10, 11])).tolist() == [100, 0]
    off = made.arms[-1].metrics | {"t2i_r10": made.arms[-1].metrics["t2i_r10"].model_copy(update=dict(by_seed=(50.0,)))}
    wrong = made.model_copy(update=dict(arms=(*made.arms[:-1], made.arms[-1].model_copy(update=dict(metrics=off)))))
    assert reading("t2i_r10", [Scores(wrong, samples)]) is None
    assert reading("no such metric", [Scores(made, samples)]) is None


@pytest.mark.parametrize(
    ("metric", "columns", "value"),
    [
        ("accuracy", dict(accuracy=[0.0, 1.0, 1.0, 1.0]), 75.0),
        ("cider", dict(rouge=[9.0, 9.0, 9.0, 8.0], cider=[1.0, 2.0, 3.0, 2.0]), 2.0),
        ("medr", dict(rank=[1.0, 2.0, 8.0, 90.0]), 5.0),
        ("token_loss", {"seen.0": [4.0, 2.0, 2.0, 2.0], "seen.1": [1.0, 1.0, 2.0, 1.0]}, 2.0),
        ("ppl", {"text.0": [4.0, 2.0, 2.0, 2.0], "text.1": [1.0, 1.0, 2.0, 1.0]}, float(np.exp(2.0))),
    ],
)
def test_usual_readings_of_scores_are_known(metric, columns, value):
    made = make_record()
    base = made.baseline()
    found = base.metrics["t2i_r1"].model_copy(update=dict(value=value, by_seed=(value,)))
    made = made.model_copy(update=dict(arms=(base.model_copy(update=dict(metrics={metric: found})),)))
    rows = [item_samples("baseline", 0, name, Items(np.array(v), np.arange(4))) for name, v in columns.items()]
    read, used = reading(metric, [Scores(made, pd.concat(rows))])
    assert used == tuple(columns)[-len(used) :]


def test_counted_figures_that_differ_and_arms_that_one_has():
    one = record(arms=(make_arm(), make_arm("quantize", "quantize")))
    other = record(
        "b", arms=(make_arm(test_flops=Flops(dense=5_020_000_000), tokens=(197, 99, 99)), make_arm("x", "x"))
    )
    found = put(one, other)
    changed = {each.name: (each.a, each.b, each.percent) for each in arm(found).counts}
    assert changed == {
        "test FLOPs": (2_510_000_000, 5_020_000_000, 100.0),
        "tokens": ((197, 197, 197), (197, 99, 99), None),
    }
    assert [each.name for each in found.only_a] == ["quantize"] and [each.name for each in found.only_b] == ["x"]
    assert arm(found, "noop").counts == () and arm(found, "noop").counted > 4


def test_provenance_without_what_explains_nothing():
    made = dict(commit="1" * 40, versions={"torch": "2.14"}, command="x", load=0.1, machine={"load": "1 2 3"})
    other = dict(commit="2" * 40, versions={"torch": "2.15"}, command="y", load=0.1, machine={"load": "9"})
    found = put(record(provenance=Provenance(**made)), record("b", provenance=Provenance(**other)))
    assert [each.name for each in found.provenance] == ["commit", "versions.torch"]


def test_commits_are_compared_where_their_envelopes_meet():
    def of(name, day=2, arms=(), **envelope):
        return record(name, day=day, arms=arms, envelope=envelope)[0]

    scenes, other = dict(task="scenes"), dict(task="scenes", split="dev")
    a = [of("a1", 2), of("a2", 3), of("a3", 4, **scenes)]
    b = [of("b1", 5), of("b2", 6, (make_arm("quantize", "quantize"),)), of("b3", 7, **scenes), of("b4", **other)]
    assert [(one.id, two.id) for one, two in choose(a, b)] == [("a2", "b1"), ("a3", "b3")]  # b2 shares fewer arms
    assert [(one.id, two.id) for one, two in choose([a[2]], [b[3], of("b5", split="dev")])] == [("a3", "b4")]
    with pytest.raises(UsageError, match="2 pairs are equally near: .*a1 and"):
        choose([a[0]], [of("c1", split="dev"), of("c2", task="scenes")])


def effbench(*arguments, capsys):
    code = cli.main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_shows_two_runs(board, capsys):
    better = record("20250103-b", scores=dict(token_prune=[ranks(1, better=0.5)]), day=3)
    out = board(record("20250102-a"), better)
    code, said, _ = effbench("compare", "20250102", "latest", "--out", out, capsys=capsys)
    assert code == 0
    assert said.index("Envelope: the same") < said.index("Speed-up against") < said.index("Quality")
    assert "BETTER" in said and "never seconds" in said and "0 of" in said
    code, said, _ = effbench("compare", out / "records/20250102-a", "20250103", "--out", out, "--json", capsys=capsys)
    (found,) = json.loads(said)["comparisons"]
    assert (code, found["a"]["id"], found["b"]["id"], found["judged"]) == (0, "20250102-a", "20250103-b", True)
    (pruned,) = (each for each in found["arms"] if each["arm"] == "token_prune")
    assert pruned["quality"]["verdict"] == "BETTER" and pruned["speedups"][0]["verdict"] == "NO DIFFERENCE SHOWN"
    assert pruned["quality"]["lossiness_difference"]["value"] < 0 and found["envelope"] == []
    assert "'seconds'" not in str(found)


def test_a_git_ref_stands_for_its_records(board, capsys, tmp_path, monkeypatch):
    repository = tmp_path / "code"
    repository.mkdir()
    monkeypatch.chdir(repository)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    commits = []
    subprocess.run([*git, "init", "-q"], check=True)
    for message in ("one", "two", "three"):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
        commits.append(subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip())
    made = [
        record("20250101-old", day=1, provenance=Provenance(commit=commits[0])),
        record("20250102-dirty", day=2, provenance=Provenance(commit=commits[0] + "-dirty")),
        record("20250103-new", day=3, provenance=Provenance(commit=commits[1] + "-dirty")),
        record("20250104-bad", day=4, provenance=Provenance(commit=commits[0]), status="INVALID"),
    ]
    out = board(*made)
    code, said, _ = effbench("compare", "HEAD~2", commits[1][:10], "--out", out, "--json", capsys=capsys)
    found = json.loads(said)
    assert [each["id"] for each in (found["comparisons"][0]["a"], found["comparisons"][0]["b"])] == [
        "20250101-old",
        "20250103-new",
    ]
    assert code == 0 and found["notes"] == [f"all records of {commits[1][:12]} were made with uncommitted changes"]
    code, _, said = effbench("compare", "HEAD", "latest", "--out", out, capsys=capsys)
    assert code == 3 and f"is of the commit {commits[2][:12]}" in said and commits[0][:12] in said
    monkeypatch.chdir(out)  # elsewhere a commit is known by the records alone
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    code, said, _ = effbench("compare", commits[0][:9], "latest", "--out", out, "--json", capsys=capsys)
    assert code == 0 and json.loads(said)["comparisons"][0]["a"]["id"] == "20250101-old"
    code, _, said = effbench("compare", "main", "latest", "--out", out, capsys=capsys)
    assert code == 3 and "there is no run 'main'" in said and "in no git repository" in said


@pytest.mark.parametrize(
    ("a", "options", "code", "said"),
    [
        ("2025", (), 3, "2 runs begin with '2025'"),
        ("nothing", (), 3, "there is no run 'nothing'"),
        ("", (), 3, "there is no run ''"),
        ("--upload-pack=x", (), 3, "No such option"),
        ("latest", ("--json", "--markdown"), 3, "exclude each other"),
        ("broken.json", (), 2, "is truncated or not JSON"),
        ("newer.json", (), 2, "was written by a newer effbench"),
    ],
)
def test_what_cannot_be_compared_is_said(board, capsys, tmp_path, monkeypatch, a, options, code, said):
    monkeypatch.chdir(tmp_path)
    out = board(record("20250102-a"), record("20250103-b"))
    (tmp_path / "broken.json").write_text(record()[0].model_dump_json()[:-9])
    newer = record()[0].model_dump_json().replace('"schema_version":2', '"schema_version":99')
    (tmp_path / "newer.json").write_text(newer)
    found, _, error = effbench("compare", a, "latest", "--out", out, *options, capsys=capsys)
    assert (found, said in re.sub(r"\s+", " ", error)) == (code, True), error


def test_hostile_text_stays_text(board, capsys):
    evil = make_arm(EVIL, EVIL, status="FAILED", error=EVIL, metrics={})
    tampered = [record(name, arms=(evil,), envelope=dict(transform=f"{EVIL} {name}"))[0] for name in ("a1", "b1")]
    out = board(*((each, record()[1]) for each in tampered))
    for options in ((), ("--markdown",)):
        code, said, _ = effbench("compare", "a1", "b1", "--out", out, *options, capsys=capsys)
        assert code == 0 and "big" in said
        assert "\x1b" not in said and "\u202e" not in said
    assert not re.search(r"<script|(?<!\\)\]\(", said) and "&lt;script" in said
    lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in said.splitlines() if line.startswith("| ")}
    assert lengths <= {4, 6, 7, 8, 9}


def test_torch_is_not_imported(board):
    out = board(record("a1"), record("b1"))
    run = (
        "import sys; from effbench import cli; code = cli.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", run, "compare", "a1", "b1", "--out", str(out)], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_same_run_twice_is_noted():
    assert put(record(), record()).notes == ("both are the same run",)
