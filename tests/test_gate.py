import json
import subprocess
import sys

import pytest
from test_leaderboard import EVIL, make_arm, make_record

from effbench.commands.gate import gate
from effbench.errors import InvalidError, UsageError
from effbench.gate import compare
from effbench.records import Flops, Kernels, Structure

FACTS = dict(
    test_flops=Flops(dense=1_000_000, useful=900_000, overhead=5),
    train_flops=Flops(dense=3_000_000),
    tokens=(197, 138, 138),
    structure=Structure(dtypes={"fp32": 400}),
    kernels=Kernels(attention={"sdpa:flash": 12}, threads=2),
)


def record(run="20250102-run", /, envelope=(), protocol=(), **arm):
    made = make_record(run, arms=(make_arm(**FACTS | arm),))
    held = made.envelope.protocol.model_copy(update=dict(protocol))
    return made.model_copy(update=dict(envelope=made.envelope.model_copy(update=dict(envelope) | dict(protocol=held))))


def changed(**arm):
    """What the gate says about a run whose method arm differs so from the reference: figures and their per cent."""
    found = compare(record("reference"), record(**arm))
    assert found.exit_code == (1 if found.changes else 0)
    assert {change.arm for change in found.changes} <= {"token_prune"}
    return {change.figure: change.percent for change in found.changes}


@pytest.fixture
def saved(tmp_path):
    """Write records, each in a folder of its own below records/, as a leaderboard keeps them."""

    def save(*records):
        for each in records:
            folder = tmp_path / "records" / each.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(each.model_dump_json())
        return tmp_path

    return save


def test_times_quality_and_machine_do_not_matter():
    other = record(
        ratio=9.0,
        quality=1.0,
        memory=None,
        kernels=Kernels(attention={"sdpa:flash": 6}, threads=64),
        envelope=dict(device_model="another machine"),
        protocol=dict(threads=64, timing_batch=3, timing_pairs=0, seeds=(0, 1, 2), lr=7.0),
    )
    found = compare(record("reference"), other)
    assert found.exit_code == 0
    assert found.verdict.startswith("SAME: ")
    assert found.figures > 4 * 4 and found.arms == 4


TRAIN = ("train FLOPs", "train low-bit operations", "train overhead FLOPs", "train FLOPs complete")


@pytest.mark.parametrize(
    ("arm", "figures"),
    [
        (dict(test_flops=Flops(dense=900_000, useful=900_000, overhead=5)), {"test FLOPs": pytest.approx(-10)}),
        (dict(test_flops=Flops(dense=1_000_001, useful=900_000, overhead=5)), {"test FLOPs": pytest.approx(1e-4)}),
        (dict(test_flops=Flops(dense=1_000_000, useful=450_000, overhead=5)), {"test useful FLOPs": -50}),
        (dict(test_flops=Flops(dense=1_000_000, useful=900_000)), {"test overhead FLOPs": -100}),
        (dict(test_flops=Flops(dense=1_000_000, overhead=5)), {"test useful FLOPs": None}),
        (dict(train_flops=None), dict.fromkeys(TRAIN)),
        (dict(train_flops=Flops(dense=3_000_000, low_bit=7)), {"train low-bit operations": None}),
        (dict(train_flops=Flops(dense=3_000_000, complete=False)), {"train FLOPs complete": None}),
        (dict(tokens=(197, 138, 137)), {"tokens": None}),
        (dict(weight_bytes=18_350_080), {"weight bytes": -50}),
        (dict(parameters=18_360_000), {"parameters": 100}),
        (dict(trained_parameters=5), {"trained parameters": None}),
        (dict(structure=Structure(dtypes={"int8": 400})), {"bytes by dtype": None}),
        (dict(kernels=Kernels(attention={"eager": 12})), {"attention": None}),
    ],
)
def test_a_figure_that_changed_is_named(arm, figures):
    assert changed(**arm) == figures


def test_a_lower_figure_is_an_improvement_and_still_fails():
    found = compare(record("reference"), record(tokens=(197, 99, 99), weight_bytes=1, parameters=10**9))
    assert [change.lower for change in found.changes] == [True, True, False]
    assert found.verdict == (
        f"CHANGED: 3 of {found.figures} figures are not those of the reference, "
        "2 of them lower: an improvement still needs a new reference"
    )


def test_what_the_reference_does_not_know_is_noted():
    old = record(
        "reference", structure=None, kernels=None, train_flops=None, test_flops=Flops(dense=1_000_000, overhead=5)
    )
    new = record()
    new = new.model_copy(update=dict(arms=(*new.arms, make_arm("extra", "extra"))))
    found = compare(old, new)
    assert found.exit_code == 0
    assert found.notes[0] == "extra is not in the reference: not compared"
    assert found.notes[1].startswith("not in the reference, so not compared: test useful FLOPs, train FLOPs, ")
    assert compare(old, old).notes == ("both records have the id reference",)


def test_an_invalid_runs_figures_are_compared_and_it_is_said():
    run = record().model_copy(update=dict(status="INVALID", why_invalid="noop is out of its band"))
    assert "the run is INVALID (noop is out of its band)" in compare(record("reference"), run).notes[0]


@pytest.mark.parametrize(
    ("where", "change"),
    [("envelope", {name: "another"}) for name in ("task", "data", "data_fingerprint", "split", "backbone", "weights")]
    + [("protocol", dict(train="full")), ("protocol", dict(head="bilinear")), ("protocol", dict(image_size=96))]
    + [("protocol", dict(epochs=3)), ("protocol", dict(batch_size=8)), ("protocol", dict(data_share=0.5))],
)
def test_another_question_names_the_field(where, change):
    (name,) = change
    with pytest.raises(InvalidError, match=f"another question: {name} is ") as error:
        compare(record("reference"), record(**{where: change}))
    assert error.value.exit_code == 2 and error.value.hint


def test_training_settings_do_not_matter_where_nothing_is_trained():
    old = record("reference", protocol=dict(train="none", epochs=3, batch_size=8))
    assert compare(old, record(protocol=dict(train="none"))).exit_code == 0


def test_arms_that_cannot_be_compared():
    failed = dict(status="FAILED", error="RuntimeError: no kernel")
    for old, new, said in (
        (record("r"), record(spec="token_prune:keep=0.6"), "the run has no arm token_prune, which the reference has"),
        (record("r"), record(phase="both"), "the run has no arm token_prune"),
        (record("r"), record(**failed), "token_prune failed in the run: RuntimeError: no kernel"),
        (record("r", **failed), record(), "token_prune failed in the reference"),
        (record("r"), record(kind="control", control="noop", spec=""), "the run has the same arm twice"),
    ):
        with pytest.raises(InvalidError, match=said):
            compare(old, new)


def test_the_command_finds_records_and_exits_by_their_figures(saved, capsys, tmp_path):
    root = saved(record("20250101-old"), make_record("20250103-other", 1), record("20250102-new", tokens=(197, 99, 99)))
    old = root / "records" / "20250101-old"
    assert gate(str(old), "20250101", root) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("SAME: ")
    reference = tmp_path / "reference.json"
    reference.write_bytes((old / "record.json").read_bytes())
    assert gate(str(reference), "20250102-new", root) == 1
    out = capsys.readouterr().out
    assert "197 x1, 138 x2" in out and "197 x1, 99 x2" in out and "token_prune" in out
    assert f"cp {root}/records/20250102-new/record.json {reference}" in out
    assert gate("20250101-old", "20250102-new", root) == 1
    assert f"from now on: --reference {root}/records/20250102-new/record.json" in capsys.readouterr().out


def test_the_command_prints_json(saved, capsys):
    other = dict(weight_bytes=18_350_080, kernels=Kernels(attention={"eager": 1, "flex": 1}))
    root = saved(record("20250101-old"), record("20250102-new", **other))
    assert gate("20250101-old", "20250102-new", root, as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "CHANGED"
    assert answer["changes"] == [
        dict(arm="token_prune", figure="weight bytes", old=36_700_160, new=18_350_080, percent=-50.0),
        dict(arm="token_prune", figure="attention", old=["sdpa:flash"], new=["eager", "flex"], percent=None),
    ]


def test_json_of_what_cannot_be_compared(saved, capsys):
    root = saved(record("20250101-old"), record("20250102-new", envelope=dict(task="other")))
    with pytest.raises(InvalidError):
        gate("20250101-old", "20250102-new", root, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "INVALID" and "task" in answer["said"]


def test_records_that_cannot_be_read(saved, tmp_path):
    root = saved(record("20250101-old"))
    (tmp_path / "broken.json").write_text("{")
    for name in ("nowhere/record.json", "nowhere.json", str(tmp_path), str(tmp_path / "broken.json")):
        with pytest.raises(InvalidError) as error:
            gate(name, "latest", root)
        assert error.value.exit_code == 2
    for reference, run, out in (
        ("2024", "latest", root),
        ("2025", "2024", root),
        ("2025", "latest", tmp_path / "none"),
    ):
        with pytest.raises(UsageError) as error:
            gate(reference, run, out)
        assert error.value.exit_code == 3


def test_hostile_names_are_escaped(saved, capsys):
    hostile = dict(name=EVIL, spec=EVIL, structure=Structure(dtypes={EVIL: 4}), kernels=Kernels(attention={EVIL: 1}))
    root = saved(
        record("20250101-old", **hostile),
        record("20250102-new", **hostile | dict(structure=None, kernels=Kernels(attention={"[red]eager": 1}))),
        record("20250103-gone"),
        record("20250104-task", envelope=dict(task=EVIL)),
    )
    assert gate("20250101-old", "20250102-new", root) == 1
    out = capsys.readouterr().out
    said = [out]
    for run in ("20250103-gone", "20250104-task"):
        with pytest.raises(InvalidError) as error:
            gate("20250101-old", run, root)
        said.append(str(error.value))
    for text in said:
        assert "\x1b" not in text and "\u202e" not in text
        assert "<script>" in text.replace("\n", "")  # as it is: a terminal shows it, and takes no colour from it
    assert "[red]eager" in out


def test_no_torch_is_imported():
    code = "import sys, effbench.gate, effbench.commands.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
