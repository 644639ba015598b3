import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

from effbench import calibrate, trials
from effbench.calibrate import Log, Setting, Trial
from effbench.cli import main
from effbench.commands.calibrate import calibrate as command
from effbench.errors import EffbenchError, UsageError
from effbench.live import Live
from effbench.measure.clock import Clock
from effbench.quantities import duration, share
from effbench.report.calibration import print_calibration, rate, rows
from effbench.timing import Stopping

SETTING = Setting(
    device_model="A [machine] 3.1, 2 cores",
    threads=1,
    backbone="timm:tiny",
    batch=1,
    pairs=6,
    slower=0.05,
    until=0.01,
    budget=60.0,
)


def made(kind="same", ratio=1.0, pairs=30, seed=0, extra=0.0):
    noise = 1 + 0.002 * np.random.default_rng(seed).standard_normal(pairs)
    return Trial(kind=kind, baseline=tuple(0.02 * ratio * noise), arm=(0.02,) * pairs, seconds=1.5, extra=extra)


@pytest.fixture
def small(monkeypatch):
    """Trials of a tiny tower."""
    monkeypatch.setattr(trials, "image_tower", lambda backbone: (tiny.vit(), 32))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "text, value", [("2%", 0.02), ("0.02", 0.02), (" 1.5 % ", 0.015), (0.05, 0.05), ("99.9%", 0.999)]
)
def test_a_share(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "0", "0%", "100%", "-2%", "", "%", "two", "nan", "1.2.3%", "1e-2x"])
def test_what_is_no_share(text):
    with pytest.raises(UsageError, match="is not a share"):
        share(text)


@pytest.mark.parametrize(
    "text, seconds", [("60", 60), ("60s", 60), ("1.5m", 90), ("2 min", 120), ("1h", 3600), ("500ms", 0.5), (60.0, 60)]
)
def test_a_length_of_time(text, seconds):
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["0", "-1s", "", "s", "1d", "inf", "nan", "1:30", "1.2.3s"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UsageError, match="is not a length of time"):
        duration(text)


def test_a_summary_says_what_the_trials_showed():
    same = [made(ratio=r, seed=i) for i, r in enumerate([1.0] * 18 + [1.05, 1 / 1.05])]
    slower = [made("slower", 1 / 1.05, extra=0.049), made("slower", 1.0, extra=0.051)]
    got = calibrate.summary(SETTING, same + slower)
    assert got.trials == 20 and got.verdicts == {"NO DIFFERENCE": 18, "FASTER": 1, "SLOWER": 1}
    assert got.coverage == pytest.approx(np.mean([t.speedup.low <= 1 <= t.speedup.high for t in same]))
    assert 0.04 < got.noise_floor < 0.06 and 0 < got.half_width < 0.01
    assert (got.slower_by, got.slower_trials, got.slower_found) == (pytest.approx(0.05), 2, 1)


def test_what_is_stored_is_found_by_machine_and_threads(tmp_path):
    found = calibrate.summary(SETTING, [made()])
    file = calibrate.store(found, tmp_path)
    assert file.name == "a-machine-3-1-2-cores-1-thread.json" and [*tmp_path.iterdir()] == [file]
    assert calibrate.load(SETTING.device_model, 1, tmp_path) == found
    assert calibrate.load(SETTING.device_model, 2, tmp_path) is None
    assert calibrate.load("a machine 3.1 2 cores", 1, tmp_path) is None  # the same file name, another machine
    assert calibrate.load(SETTING.device_model, 1) is None  # the cache is another folder
    calibrate.store(found)
    assert calibrate.load(SETTING.device_model, 1) == found


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b"[" * 70_000, b'{"trials": 1}'])
def test_a_damaged_calibration_counts_as_none(tmp_path, content):
    calibrate.store(calibrate.summary(SETTING, [made()]), tmp_path).write_bytes(content)
    assert calibrate.load(SETTING.device_model, 1, tmp_path) is None


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EffbenchError, match="cannot write"):
        calibrate.store(calibrate.summary(SETTING, [made()]), tmp_path / "file")


def test_trials_survive_a_kill_and_other_settings_do_not(tmp_path):
    log = Log(SETTING, tmp_path)
    for seed in range(3):
        log.add(made(seed=seed))
    text = log.file.read_text()
    log.file.write_text(text[:-40])  # killed while writing the third
    again = Log(SETTING, tmp_path)
    assert again.trials == log.trials[:2] and again.count("same") == 2
    again.add(made("slower"))
    assert [t.kind for t in Log(SETTING, tmp_path).trials] == ["same", "same", "slower"]
    assert Log(SETTING.model_copy(update=dict(batch=2)), tmp_path).trials == []
    log.file.write_text(text)
    assert Log(SETTING, tmp_path, fresh=True).trials == []
    assert json.loads(log.file.read_text()) == SETTING.model_dump(mode="json")


def test_trials_are_timed_as_a_run_is(small, tmp_path):
    log = Log(SETTING.model_copy(update=dict(budget=0.2)), tmp_path)
    with Live(Console(quiet=True)) as live:
        trials.measure(log, dict(same=2, slower=1, loaded=1), "cpu", live)
    assert [t.kind for t in log.trials] == ["same", "same", "slower", "loaded"]
    same, _, slower, loaded = log.trials
    assert len(same.baseline) == len(same.arm) == 6 and min(same.baseline) > 0 and same.extra == 0
    assert slower.extra > 0 and len(slower.baseline) >= 6 and len(loaded.baseline) >= 6
    assert loaded.seconds < 60 and same.seconds > sum(same.baseline) + sum(same.arm)


def test_the_arms_are_copies_of_their_own_and_take_turns(monkeypatch):
    tower, extra, order = tiny.vit(), trials.Extra(3), []
    pair = trials.Pair(tower, 2, 32, Clock(), extra)
    first, second = (arm.model for arm in pair.arms)
    pointers = [{p.data_ptr() for p in model.tower.parameters()} for model in (tower_of(tower), first, second)]
    assert not pointers[0] & pointers[1] and not pointers[1] & pointers[2]
    assert first.extra is None and second.extra is extra
    for name, model in (("A", first), ("B", second)):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    pair.trial("same", Stopping(6))
    assert "".join(order) == "ABBA" * 4 + "AB"  # three turns of warm-up and six pairs
    assert trials.Extra(3).flops == 2 * 3 * (2 * trials.WIDTH * trials.HIDDEN)


class tower_of(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower


def test_the_size_of_the_extra_work_is_found_by_measuring(monkeypatch):
    """With a clock that takes 1 s for a step and 1 ms per row of extra work."""
    pair = trials.Pair(tiny.vit(), 1, 32, Clock())
    seconds = lambda model, *_: len(model.vectors) / 1000 if isinstance(model, trials.Extra) else 1.0  # noqa: E731
    monkeypatch.setattr(trials, "_step", seconds)
    monkeypatch.setattr(pair.clock, "timed", lambda work: (None, work()))
    found = trials.sized(pair, 0.05)
    assert len(found.vectors) == 50 and trials.alone(pair, found) == pytest.approx(0.05)


def test_an_arm_that_fails_stops_the_calibration():
    pair = trials.Pair(tiny.vit(), 1, 32, Clock())
    pair.arms[1].model.tower.blocks = None
    with pytest.raises(EffbenchError, match="a trial failed"):
        pair.trial("same", Stopping(6))


def test_the_busy_process_ends_with_its_context(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(KeyboardInterrupt), trials.busy_process():
        assert started[0].poll() is None
        raise KeyboardInterrupt
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    "hits, n, verdict",
    [(0, 300, "ok"), (3, 300, "ok"), (4, 300, "short"), (0, 60, "n < 300"), (1, 20, "n < 300"), (10, 60, "short")],
)
def test_a_rate_is_ok_only_with_enough_trials(hits, n, verdict):
    assert rate("false", hits, n, 0, 0.01, "at most 1 %", 300).verdict == verdict


@pytest.mark.parametrize("colour", [False, True])
def test_the_table_is_the_same_with_and_without_colour(colour):
    all_kinds = [made(seed=i) for i in range(20)] + [made("slower", 1 / 1.05, extra=0.05), made("loaded")]
    console = Console(record=True, width=140, color_system="truecolor" if colour else None, file=open("/dev/null", "w"))
    print_calibration(SETTING, all_kinds, console)
    text = console.export_text()
    for expected in ("A [machine] 3.1", "0.0 % (0 of 20)", "n < 300", "5 % slower arm", "beside a busy process"):
        assert expected in text
    assert len(rows(SETTING, all_kinds[:20])) == 6


def test_the_command_stores_resumes_and_starts_anew(small, tmp_path, monkeypatch, capsys):
    options = dict(trials=20, slower_trials=0, loaded_trials=0, pairs=6, threads=1, device="cpu", out=tmp_path)
    trial, done = trials.Pair.trial, []

    def stopped(self, *args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(args)
        return trial(self, *args)

    monkeypatch.setattr(trials.Pair, "trial", stopped)
    with pytest.raises(KeyboardInterrupt):
        command(**options)
    assert [p.name.rpartition(".")[2] for p in tmp_path.iterdir()] == [
        "jsonl"
    ]  # five are too few to be kept as a result
    done = [None] * 100
    command(**options)
    assert len(done) == 115 and "calibration: " in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["trials"] == 20
    command(**options)
    assert len(done) == 135  # that one was finished: another is measured


def test_reading_a_calibration_imports_no_torch():
    code = "import sys; import effbench.calibrate, effbench.report.calibration; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_bad_options_are_usage_errors(capsys):
    for options in (["--slower", "2"], ["--budget", "soon"], ["--trials", "3"], ["--device", "abacus"]):
        assert main(["calibrate", *options]) == 3, options
    assert "0.02" in capsys.readouterr().err
