import json
import subprocess
import sys

import pytest
from test_leaderboard import EVIL, METRICS, make_arm, make_record

from effbench import gate_quality
from effbench.commands.gate import gate
from effbench.errors import InvalidError, UsageError
from effbench.findings import refusal
from effbench.gate import compare
from effbench.records import FROZEN_TOWER, Captioning, Fingerprint, Flops, Kernels, Structure

FACTS = dict(
    test_flops=Flops(dense=1_000_000, useful=900_000, overhead=5),
    train_flops=Flops(dense=3_000_000),
    tokens=(197, 138, 138),
    structure=Structure(dtypes={"fp32": 400}),
    kernels=Kernels(attention={"sdpa:flash": 12}, threads=2),
)


FINGERPRINT = Fingerprint(sha256="a" * 64, vectors={"image": (3.0, 4.0), "text": (1.0, 0.0)}, images=8)
FACTS |= dict(census={"aten::addmm": 49, "aten::gelu": 12}, fingerprint=FINGERPRINT)


@pytest.fixture(autouse=True)
def not_on_github(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def record(run="20250102-run", /, envelope=(), protocol=(), provenance=(), **arm):
    made = make_record(run, arms=(make_arm(**FACTS | arm),))
    held = made.envelope.protocol.model_copy(update=dict(protocol))
    whole = made.envelope.model_copy(update=dict(envelope) | dict(protocol=held))
    source = made.provenance.model_copy(update=dict(provenance))
    return made.model_copy(update=dict(envelope=whole, provenance=source))


def found(reference, run):
    """What is not as it was: verdict and what is said, by figure."""
    return {f.figure: (f.verdict, f.said) for f in compare(reference, run).findings if f.verdict != "PASS"}


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


def test_times_and_machine_do_not_matter():
    other = record(
        ratio=9.0,
        memory=None,
        kernels=Kernels(attention={"sdpa:flash": 6}, threads=64),
        envelope=dict(device_model="another machine"),
        protocol=dict(threads=64, timing_batch=3, timing_pairs=0),
        provenance=dict(commit="another", load=9.0),
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
        (dict(census={"aten::addmm": 50, "aten::gelu": 12}), {"operations": None}),
        (dict(census={}), {"operations": None}),
        (dict(fingerprint=None), {"outputs": None}),
        (dict(metrics={}), dict.fromkeys(METRICS)),
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
    notes = {(f.cell, f.figure): f.said for f in found.findings if f.verdict == "NOTE"}
    assert notes["extra", "arm"] == "not in the reference, so not compared"
    figures = {figure for cell, figure in notes if cell == "token_prune"}
    assert figures > {"test useful FLOPs", "train FLOPs", "bytes by dtype", "attention"}
    assert len(found.findings) == found.figures + len(notes)
    assert compare(old, old).notes == ("both records have the id reference",)


def test_quality_is_exact_where_nothing_was_trained_on_the_same_platform():
    bare, few = dict(protocol=dict(train="none")), dict(quality=47.99)
    told = found(record("reference", **bare), record(**bare, **few))
    assert set(told) == set(METRICS)
    worse = "-0.0208 %; worse; on the same platform and weights it must be equal"
    assert told["t2i_r10"] == ("CHANGED", worse) and told["t2i_medr"] == ("CHANGED", worse.replace("worse", "better"))
    assert set(found(record("reference"), record(**few))) == set(
        METRICS
    )  # trained to the same bits, and scored otherwise
    few["fingerprint"] = None  # what was trained may differ by 0.67 = 1.5 sqrt(2 * 0.1)
    assert found(record("reference", fingerprint=None), record(**few)) == {}
    writes = dict(protocol=dict(train="none", captioning=Captioning()))  # its base was trained on the machine
    assert found(record("reference", **writes, fingerprint=None), record(**writes, **few)) == {}


@pytest.mark.parametrize(("train", "allowed"), [("none", 1.5 * 0.02**0.5), ("locked", 1.5 * 0.2**0.5)])
def test_quality_elsewhere_has_a_tolerance_on_both_sides(train, allowed):
    here, there = (dict(protocol=dict(train=train), envelope=dict(device_model=name)) for name in ("one", "other"))
    for sign in (1, -1):
        small, large = (dict(quality=48 + sign * share * allowed) for share in (0.9, 1.1))
        assert found(record("reference", **here), record(**there, **small)) == {}
        told = found(record("reference", **here), record(**there, **large))
        assert set(told) == set(METRICS) and {verdict for verdict, _ in told.values()} == {"CHANGED"}
        assert "another device" in told["t2i_r10"][1] and f"{allowed:.3g} is allowed" in told["t2i_r10"][1]


def test_one_image_may_change_and_no_interval_allows_no_judgement():
    metric = make_arm().metrics["t2i_r10"]
    narrow = metric.model_copy(update=dict(low=48.0, high=48.0, chance=0.0, ceiling=100.0))
    assert gate_quality.tolerance(narrow, 0.01, 1000) == pytest.approx(0.1)
    assert gate_quality.tolerance(narrow.model_copy(update=dict(low=None, high=None)), 0.01, 1000) is None
    here = {name: each.model_copy(update=dict(low=None, high=None)) for name, each in make_arm().metrics.items()}
    told = found(record("reference", metrics=here, fingerprint=None), record(quality=40.0, fingerprint=None))
    assert {verdict for verdict, _ in told.values()} == {"NOTE"} and "no interval" in told["t2i_r10"][1]


def test_outputs_are_exact_here_and_nearly_so_elsewhere():
    def other(apart):
        vectors = {"image": (3.0 + 5 * apart, 4.0), "text": (1.0, 0.0)}
        return dict(fingerprint=Fingerprint(sha256="b" * 64, vectors=vectors, images=8))

    bare = dict(protocol=dict(train="none"))
    there = bare | dict(provenance=dict(versions={"torch": "3.0"}))
    reference = record("reference", **bare)
    assert found(reference, record(**bare, **other(1e-9)))["outputs"][0] == "CHANGED"
    assert found(reference, record(**there, **other(0.9e-3))).keys() == {"operations"}
    assert found(reference, record(**there, **other(1.1e-3)))["outputs"] == (
        "CHANGED",
        "differ by 0.11 %; another set of library versions: 0.1 % are allowed",
    )
    there["protocol"] = dict(train="locked")
    verdict, said = found(record("reference"), record(**there, **other(1.1e-3)))["outputs"]
    assert verdict == "NOTE" and "only quality is judged" in said
    there["protocol"] = dict(train="locked")
    for apart, verdict in ((0.9e-3, None), (1.1e-3, "CHANGED")):
        towers = [{"image": (3.0 + late, 4.0), FROZEN_TOWER: (3.0 + 5 * late * apart, 4.0)} for late in (0, 1)]
        one, other_ = (Fingerprint(sha256=each * 64, vectors=v) for each, v in zip("ab", towers, strict=True))
        told = found(record("reference", fingerprint=one), record(**there, fingerprint=other_))
        assert told["outputs"][0] == "NOTE" and told.get("outputs of the frozen tower", (None,))[0] == verdict
    for vectors in ({}, {"image": (1.0,)}, {"image": (0.0, 0.0), "text": (1.0, 0.0)}):
        broken = dict(fingerprint=Fingerprint(sha256="b" * 64, vectors=vectors))
        assert found(reference, record(**bare, **broken))["outputs"][0] == "CHANGED"


def test_operations_are_compared_where_the_libraries_are_the_same():
    more = dict(census={"aten::addmm": 61})
    assert found(record("reference"), record(**more))["operations"][0] == "CHANGED"
    told = found(record("reference"), record(**more, provenance=dict(versions={"pandas": "9"})))
    assert told["operations"][0] == "CHANGED"  # what computes is the same
    told = found(record("reference"), record(**more, protocol=dict(device="cpu:0")))
    assert told["operations"][0] == "CHANGED"
    told = found(record("reference"), record(**more, provenance=dict(versions={"torch": "3.0"})))
    assert told["operations"] == ("NOTE", "measured with another set of library versions, so not compared")
    change = next(f for f in compare(record("reference"), record(**more)).findings if f.verdict == "CHANGED")
    assert (change.old, change.new) == ("aten::addmm 49, aten::gelu 12", "aten::addmm 61, aten::gelu 0")


def test_an_invalid_runs_figures_are_compared_and_it_is_said():
    run = record().model_copy(update=dict(status="INVALID", why_invalid="noop is out of its band"))
    assert "the run is INVALID (noop is out of its band)" in compare(record("reference"), run).notes[0]


@pytest.mark.parametrize(
    ("where", "change"),
    [("envelope", {name: "another"}) for name in ("task", "data", "data_fingerprint", "split", "backbone", "weights")]
    + [("protocol", dict(train="full")), ("protocol", dict(head="bilinear")), ("protocol", dict(image_size=96))]
    + [("envelope", dict(metrics=("t2i_r1",))), ("envelope", dict(transform="none")), ("envelope", dict(recall="none"))]
    + [("protocol", dict(lr=7.0)), ("protocol", dict(seeds=(0, 1))), ("protocol", dict(captioning=Captioning()))]
    + [("protocol", dict(epochs=3)), ("protocol", dict(batch_size=8)), ("protocol", dict(data_share=0.5))],
)
def test_another_question_names_the_field(where, change):
    (name,) = change
    with pytest.raises(InvalidError, match=f"another question: {name} is ") as error:
        compare(record("reference"), record(**{where: change}))
    assert error.value.exit_code == 2 and error.value.hint


def test_every_reason_is_named():
    with pytest.raises(InvalidError, match=r"task is .* \(and 2 more\)") as error:
        compare(record("r"), record(envelope=dict(task="other"), protocol=dict(lr=7.0, head="bilinear")))
    outcome = refusal("effbench gate", error.value)
    assert [f.figure for f in outcome.of("INVALID")] == ["task", "head", "lr"] and outcome.exit_code == 2
    run = record()
    gone = run.model_copy(update=dict(arms=run.arms[:1]))
    with pytest.raises(InvalidError) as error:
        compare(record("r"), gone)
    assert [f.cell for f in error.value.findings] == ["noop", "identity", "token_prune"]


def test_training_settings_do_not_matter_where_nothing_is_trained():
    old = record("reference", protocol=dict(train="none", epochs=3, batch_size=8))
    assert compare(old, record(protocol=dict(train="none"))).exit_code == 0
    old = record("reference", protocol=dict(train="none", epochs=3, captioning=Captioning()))
    with pytest.raises(InvalidError, match="epochs"):  # of the base that all arms start from
        compare(old, record(protocol=dict(train="none", captioning=Captioning())))


def test_arms_that_cannot_be_compared():
    failed = dict(status="FAILED", error="RuntimeError: no kernel")
    for old, new, said in (
        (record("r"), record(spec="token_prune:keep=0.6"), "the run has no arm token_prune, which the reference has"),
        (record("r"), record(phase="both"), "the run has no arm token_prune"),
        (record("r"), record(**failed), "token_prune failed in the run: RuntimeError: no kernel"),
        (record("r", **failed), record(), "token_prune failed in the reference"),
        (record("r"), record(status="INVALID"), "token_prune is INVALID in the run"),
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
        dict(arm="token_prune", figure="weight bytes", old=36_700_160, new=18_350_080, said="", percent=-50.0),
        dict(arm="token_prune", figure="attention", old=["sdpa:flash"], new=["eager", "flex"], said="", percent=None),
    ]


def test_json_of_what_cannot_be_compared(saved, capsys):
    root = saved(record("20250101-old"), record("20250102-new", envelope=dict(task="other")))
    with pytest.raises(InvalidError):
        gate("20250101-old", "20250102-new", root, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "INVALID" and "task" in answer["said"]
    assert [each["figure"] for each in answer["findings"]] == ["task"] and answer["notes"]


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


def test_the_command_writes_reports_and_refuses_what_is_not_there(saved, tmp_path, monkeypatch, capsys):
    root = saved(record("20250101-old"), record("20250102-new", tokens=(197, 99, 99)))
    step, junit = tmp_path / "step.md", tmp_path / "reports" / "gate.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    step.write_text("before\n")
    assert gate("20250101-old", "20250102-new", root, junit=junit) == 1
    assert step.read_text().startswith("before\n### effbench gate: CHANGED")
    assert "--reference " in step.read_text()  # how to renew it
    assert "<failure" in junit.read_text()
    with pytest.raises(InvalidError):
        gate("nowhere/record.json", "latest", root, junit=junit, summary=tmp_path / "own.md")
    assert "<error" in junit.read_text() and "cannot be read" in (tmp_path / "own.md").read_text()
    assert "cannot be read" not in step.read_text()
    assert "::" not in capsys.readouterr().out
    for wrong in (dict(junit=root), dict(summary=root), dict(as_json=True, annotations=True)):
        with pytest.raises(UsageError):
            gate("20250101-old", "20250101-old", root, **wrong)


def test_on_github_a_records_text_is_no_command(saved, monkeypatch, capsys):
    hostile = dict(name="::error::%0A\n::add-mask::a ##[error]", spec="x", tokens=(197, 99, 99))
    root = saved(record("20250101-old", **hostile), record("20250102-new", **hostile | dict(tokens=(1,))))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert gate("20250101-old", "20250102-new", root) == 1
    lines = capsys.readouterr().out.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    end = lines.index(f"::{token}::")
    assert len(token) == 32 and any("add-mask" in line for line in lines[1:end])
    assert lines[end + 1].startswith("::error title=CHANGED%3A %3A%3Aerror%3A%3A%250A")
    assert all(line.startswith(("::error title=", "::notice title=")) for line in lines[end + 1 :])
    assert gate("nowhere/record.json", "latest", root) == 2
    assert gate("20250101-old", "2024", root) == 3
    assert gate("20250101-old", "20250102-new", root, as_json=True) == 1
    out = capsys.readouterr().out
    json.loads(out[out.rindex('{\n "verdict"') :])  # nothing after it


def test_a_reference_that_is_damaged_newer_or_not_a_record(saved, tmp_path):
    root = saved(record("20250102-new"))
    whole = json.loads(record("reference").model_dump_json())
    census = {"census": {"aten::addmm": -1}}
    damaged = (
        (json.dumps(whole)[:500], "truncated"),
        (json.dumps(whole | dict(schema_version=99)), "newer effbench"),
        (json.dumps(whole | dict(arms=[*whole["arms"][:3], whole["arms"][3] | census])), "not a record"),
        (json.dumps(whole | dict(arms=whole["arms"][1:])), "baseline"),
        ("[]", "not a record"),
    )
    for text, said in damaged:
        (tmp_path / "reference.json").write_text(text)
        with pytest.raises(InvalidError, match=said):
            gate(str(tmp_path / "reference.json"), "latest", root)
