import json
import subprocess
import sys

import pytest
from test_leaderboard import EVIL
from test_ratings import arm, control, record

from effbench.commands.recommend import recommend as command
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.recommend import bound, recommend
from effbench.records import Memory, Speedup, Versus
from effbench.report import markdown


def fast(spec, loss=0.0, speed=1.5, wide=0.004, verdict="FASTER", **changes):
    made = arm(spec, loss, speed, wide, **changes)
    return made.model_copy(update=dict(test_speedup=made.test_speedup.model_copy(update=dict(verdict=verdict))))


def best(limit, *arms, **options):
    found = recommend([record("r", *arms)], limit, **options)
    return found.best and found.best.spec


def specs(candidates):
    return [each.spec for each in candidates]


@pytest.fixture
def saved(tmp_path):
    def save(*records):
        for each in records:
            folder = tmp_path / "records" / each.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(each.model_dump_json())
        return tmp_path

    return save


def test_the_fastest_that_is_shown_to_be_within_the_bound_is_named():
    arms = fast("safe", 0.001, 1.2), fast("quick", 0.005, 1.6), fast("unsure", 0.006, 1.9, 0.02), fast("lossy", 0.2, 3)
    found = recommend([record("r", *arms)], 0.01)
    assert specs(found.shown) == ["quick", "safe"] and specs(found.likely) == ["unsure"] and found.nearest is None
    assert best(0.30, *arms) == "lossy" and best(0.006, *arms) == "safe"
    none = recommend([record("r", *arms)], 0.001)
    assert none.best is None and none.nearest.spec == "safe" and none.nearest.needs == pytest.approx(0.005)
    assert specs(none.likely) == ["safe"]
    assert best(0.005, *arms) == "safe"  # an end on the bound is within it


def test_the_lower_end_of_the_speed_up_ranks_and_not_the_figure():
    noisy = fast("noisy", speed=1.7)
    noisy = noisy.model_copy(update=dict(test_speedup=noisy.test_speedup.model_copy(update=dict(low=1.1))))
    assert best(0.01, noisy, fast("steady", speed=1.4)) == "steady"


def test_what_is_not_shown_to_be_faster_is_not_named():
    slow = [fast("a", speed=1.3, verdict=each) for each in ("AMBIGUOUS", "NO DIFFERENCE", "SLOWER")]
    for each in slow:
        found = recommend([record("r", each)], 0.01)
        assert found.best is None and specs(found.slow) == ["a"] and found.nearest is None


def test_what_says_nothing_is_never_named_and_is_counted():
    few = Speedup(value=9.0, n=3, verdict="TOO FEW SAMPLES")
    useless = {
        "FAILED": fast("a", speed=9, status="FAILED"),
        "INVALID": fast("a", speed=9, status="INVALID"),
        "its quality means nothing": fast("a", speed=9, no_quality="no"),
        "speed-up without an interval": fast("a").model_copy(update=dict(test_speedup=few)),
        "no lossy-ness, as of a baseline at chance": fast("a", speed=9).model_copy(update=dict(metrics={})),
    }
    for reason, each in useless.items():
        found = recommend([record("r", each, fast("good"))], 0.01)
        assert specs(found.shown) == ["good"] and found.left_out == {reason: 1}
    made = fast("a", speed=9)
    bare = made.metrics["t2i_r10"].model_copy(
        update=dict(lossiness=made.metrics["t2i_r10"].lossiness.model_copy(update=dict(low=None)))
    )
    found = recommend([record("r", made.model_copy(update=dict(metrics={"t2i_r10": bare})), fast("good"))], 0.01)
    assert specs(found.shown) == ["good"] and found.left_out == {"lossy-ness without an interval": 1}
    found = recommend([record("r", fast("a", speed=9), weights="random"), record("s", fast("good"))], 0.01)
    assert specs(found.shown) == ["good"] and found.left_out == {"random weights": 1}
    bad = record("bad", fast("a", speed=9)).model_copy(update=dict(status="INVALID"))
    assert specs(recommend([bad, record("r", fast("good"))], 0.01).shown) == ["good"]
    blind = control("blind", "random", 0.0, 9.0)
    assert specs(recommend([record("r", blind, fast("good"))], 0.01).shown) == ["good"]


def test_training_of_its_own_needs_three_seeds():
    own = fast("own", phase="both", speed=2)
    found = recommend([record("r", own)], 0.01)
    assert found.best is None and specs(found.likely) == ["own"] and found.nearest is None
    three = recommend([record("r", own, protocol=dict(seeds=(0, 1, 2)))], 0.01)
    assert three.best.spec == "own" and not any("seed" in each for each in three.cannot)
    assert any("one seed" in each for each in recommend([record("r", fast("a"))], 0.01).cannot)


def test_it_has_to_hold_in_every_envelope():
    here = record("r", fast("a", 0.001, 2.0), fast("b", 0.001, 1.3))
    there = record("s", fast("a", 0.05, 1.9), backbone="other")
    assert recommend([here], 0.01).best.spec == "a"
    found = recommend([here, there], 0.01)
    assert found.best.spec == "b" and not found.likely
    assert recommend([here, there], 0.01, backbone="b").best.spec == "a"
    both = recommend([here, record("s", fast("a", 0.002, 1.4), backbone="other")], 0.01).best
    assert both.slowest.record.id == "s" and len(both.evidence) == 2


def test_the_newest_success_counts():
    old, new = record("r1", fast("a", 0.001)), record("r2", fast("a", 0.05))
    new = new.model_copy(update=dict(created=new.created.replace(year=2026)))
    assert recommend([old, new], 0.01).best is None and recommend([old], 0.01).best.spec == "a"


def test_real_data_go_before_drawn_ones():
    drawn = record("s", fast("drawn", speed=3), data="scenes", task="scenes", synthetic=True)
    real = record("r", fast("real"))
    found = recommend([drawn, real], 0.01)
    assert specs(found.shown) == ["real"] and found.aside == 1 and not found.synthetic
    found = recommend([drawn, real], 0.01, task="scenes")
    assert specs(found.shown) == ["drawn"] and found.synthetic and found.aside == 0
    assert any("drawn by a program" in each for each in found.cannot)


def test_real_data_without_a_usable_arm_are_not_called_drawn():
    unusable = record("r", fast("a", status="FAILED"))
    drawn = record("s", fast("drawn"), data="scenes", synthetic=True)
    empty = record("s", fast("a", status="FAILED"), data="scenes", synthetic=True)
    assert not recommend([unusable], 0.01).synthetic and not recommend([unusable, empty], 0.01).synthetic
    assert recommend([empty], 0.01).synthetic and recommend([unusable, drawn], 0.01).synthetic


def test_devices_are_never_mixed():
    cpu = record("r", fast("slow", speed=1.2))
    cuda = record("s", fast("quick", speed=3), protocol=dict(device="cuda:1"))
    assert recommend([cpu, cuda], 0.01, "cpu").best.spec == "slow"
    assert recommend([cpu, cuda], 0.01, "cuda").best.spec == "quick" == recommend([cpu, cuda], 0.01, "cuda:0").best.spec
    assert recommend([cpu], 0.01).device == "cpu"
    with pytest.raises(UsageError, match="several devices: cpu, cuda"):
        recommend([cpu, cuda], 0.01)
    with pytest.raises(UsageError, match="no run is of device tpu; there are runs of cpu"):
        recommend([cpu], 0.01, "tpu")


def test_what_beats_it_is_said_with_its_axis():
    light = Memory(weights=1, load_peak=1, run_peak=1, tensor_peak=50 * 2**20)
    heavy = light.model_copy(update=dict(tensor_peak=90 * 2**20))
    found = recommend(
        [
            record(
                "r", fast("quick", 0.004, 2, memory=heavy), fast("light", 0.001, 1.2, memory=light, weight_bytes=2**20)
            )
        ],
        0.01,
    )
    said = "\n".join(found.better)
    assert "peak memory: light 50.0 MiB, this 90.0 MiB" in said and "weights: light 1.00 MiB, this 35.0 MiB" in said
    assert "lossy-ness: light +0.1 %, this +0.4 %" in said and "FLOPs" not in said


def test_blind_controls_are_in_the_evidence():
    beaten = Versus(control="random", arms=("b",), value=4.0, advantage=dict(value=1), verdict="WORSE")
    found = recommend([record("r", fast("a", versus=(beaten,)), control("b", "random"))], 0.01)
    assert found.best.evidence[0].against() == {"random": "WORSE", "resize": None}


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.02", 0.02), (" 2.5 % ", 0.025), ("0", 0), ("0.0%", 0)])
def test_bounds(text, value):
    assert bound(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["-1%", "x%", "120%", "100%", "1", "", "%", "nan", "inf", "1e-3", "1%%", "1.2.3", "٣%"]
)
def test_what_is_no_bound(text):
    with pytest.raises(UsageError, match="is not a share from 0 to below 100 %") as error:
        bound(text)
    assert error.value.hint == "write 1% or 0.01"


def test_questions_that_no_record_answers():
    with pytest.raises(InvalidError, match="no valid run"):
        recommend([], 0.01)
    bad = record("bad", fast("a")).model_copy(update=dict(status="INVALID"))
    with pytest.raises(InvalidError, match="no valid run"):
        recommend([bad], 0.01)
    for question in (dict(task="flickr"), dict(backbone="c"), dict(task=EVIL)):
        with pytest.raises(UsageError, match="no run is of (task|backbone)") as error:
            recommend([record("r", fast("a"))], 0.01, **question)
        assert "there are runs of" in error.value.hint and "\x1b" not in str(error.value)
    nothing = recommend([record("r", control("blind", "random"))], 0.01)
    assert nothing.best is nothing.nearest is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("effbench run --method 'a:x=1'", "effbench run --method a:x=1"),
        ("effbench run; rm -rf ~", "effbench 'run;' rm -rf '~'"),
        ("effbench run $(id) `id` > x\nrm -rf /", "effbench run '$(id)' '`id`' '>' x rm -rf /"),
        ("rm -rf /", ""),
        ("effbench 'run", ""),
        ("", ""),
    ],
)
def test_a_recorded_command_is_printed_so_that_a_shell_runs_nothing_else(text, expected):
    assert markdown.command(text) == expected


def test_the_command_prints_its_evidence(saved, capsys):
    root = saved(record("20250102-run", fast("a", 0.004, 2.0), fast("slow", 0.001, 1.2), fast("maybe", 0.0, 3, 0.5)))
    assert command("1%", "cpu", out=root) == 0
    out = capsys.readouterr().out
    assert out.startswith("use a\nshown on cpu, on real data: 2.00x [1.98, 2.02], lossy-ness +0.4 % [+0.0, +0.8]; ")
    for said in ("20250102-run", "flickr8k", "2025-01-02", "not compared", "next best", "slow: 1.20x", "maybe: 3.00x"):
        assert said in out, said
    assert out.rstrip().endswith("again: effbench run --method token_prune --task flickr8k")
    assert command("0.1%", out=root) == 1
    out = capsys.readouterr().out
    assert "nothing to recommend" in out and "nearest: slow" in out and "needs a bound of 0.5 %" in out


def test_the_command_prints_json(saved, capsys):
    root = saved(
        *(record(f"r{k}", fast("a", -0.1), backbone=f"b{k}").model_copy(update=dict(wall_time=k)) for k in range(2))
    )
    assert command("1%", out=root, as_json=True, ratings=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["use"], len(found["shown"][0]["evidence"])) == ("USE", "a", 2)
    assert found["ratings"][0]["rated"][0]["spec"] == "a" and found["ratings"][0]["rated"][0]["quality"]["high"] is None
    assert command("1%", out=root, ratings=True) == 0
    assert "dense baseline" in capsys.readouterr().out
    assert command("0", out=saved(record("z", fast("b", 0.5), backbone="c")), task="flickr8k", as_json=True) == 0


def test_a_damaged_record_is_named_and_counts_nowhere(saved, capsys):
    root = saved(record("good", fast("a")))
    (root / "records" / "bad").mkdir()
    (root / "records" / "bad" / "record.json").write_text("{")
    assert command("1%", out=root) == 0
    assert "bad" in capsys.readouterr().err
    with pytest.raises(EffbenchError):
        command("1%", out=root / "nowhere")


def test_hostile_names_are_shown_as_text(saved, capsys):
    evil = record("r", fast(EVIL))
    evil = evil.model_copy(update=dict(envelope=evil.envelope.model_copy(update=dict(data=EVIL, device_model=EVIL))))
    assert command("1%", out=saved(evil)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "<script>" in out


def test_text_of_a_record_adds_no_line(saved, capsys):
    """On GitHub a line that begins with :: is a command to the runner."""
    forged = "a\n::error::forged"
    here = dict(protocol=dict(device=forged))
    made = record("r", fast(forged, speed=3), fast(f"{forged} 2"), fast(f"{forged} 3", 0.005, wide=0.02), **here)
    root = saved(made)
    for limit in ("1%", "0.001%"):
        command(limit, out=root)
        lines = capsys.readouterr().out.splitlines()
        assert any("a ::error::forged" in line for line in lines)
        assert not any(line.lstrip().startswith("::") for line in lines)


def test_drawn_data_left_aside_give_no_hint_that_does_not_work(saved, capsys):
    """A stand-in run has the same task as the real one: --task does not tell them apart."""
    drawn = record("s", fast("drawn"), data="scenes", synthetic=True)
    assert command("1%", out=saved(record("r", fast("real")), drawn)) == 0
    out = capsys.readouterr().out
    assert "1 envelope of drawn data, since there are real ones" in out and "--task to" not in out


def test_no_torch_is_imported():
    code = (
        "import sys, effbench.recommend, effbench.commands.recommend, effbench.report.ratings, effbench.bradley_terry\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
