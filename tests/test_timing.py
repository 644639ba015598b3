"""Timing: when a pass ends, where a step's time goes, what the figures are made of, and the batch nobody may change."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from effbench import randomness, records, speeds
from effbench.arms import ArmPlan
from effbench.errors import EffbenchError, InvalidError
from effbench.lockstep import Arm, BatchChanged, Setting, steps
from effbench.measure.clock import Clock
from effbench.measure.split import Split
from effbench.timing import Stopping, pairs


class Hands:
    """A clock whose hands a test moves."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(
    "stopping, pairs, seconds, spread, over",
    [
        (Stopping(30), 29, 1e9, 0, False),
        (Stopping(30), 30, 0, 9, True),
        (Stopping(30, budget=60), 500, 59, 0, False),  # a budget alone is used up
        (Stopping(30, budget=60), 8, 60, 0, True),
        (Stopping(30, until=0.02), 20, 1, 0, False),  # never before the fewest pairs
        (Stopping(30, until=0.02), 30, 1, 0.001, True),
        (Stopping(30, until=0.02), 33, 1, 0.001, False),  # looked at now and then only
        (Stopping(30, until=0.02), 40, 1, 0.5, False),
        (Stopping(30, until=0.02), 40, 301, 0.5, True),
        (Stopping(30, until=0.02, budget=60), 40, 61, 0.5, True),
    ],
)
def test_when_a_timing_pass_ends(stopping, pairs, seconds, spread, over):
    times = [1.0 + spread * (i % 7) / 7 for i in range(pairs)]
    assert stopping.over(pairs, seconds, [[1.0] * pairs, times]) is over


def test_every_arm_must_be_sure_before_timing_ends():
    sure, unsure = [1.0] * 30, [1.0 + i % 5 for i in range(30)]
    assert Stopping(30, until=0.02).over(30, 1, [sure, sure, sure])
    assert not Stopping(30, until=0.02).over(30, 1, [sure, sure, unsure])


class Scorer(nn.Module):
    is_overhead = True

    def __init__(self, hands):
        super().__init__()
        self.hands = hands

    def forward(self, x):
        self.hands.seconds += 0.5
        return x


class Tower(nn.Module):
    def __init__(self, hands):
        super().__init__()
        self.hands, self.scorer = hands, Scorer(hands)

    def forward(self, x):
        self.hands.seconds += 1
        x = self.scorer(x)
        self.hands.seconds += 2
        return x


def test_a_step_is_split_without_counting_anything_twice():
    hands = Hands()
    image, text = Tower(hands), nn.Linear(1, 1)
    model = nn.ModuleList([image, text])
    clock = Clock(timer=hands)
    split = Split({"image": image, "text": text}, model, clock)

    def step():
        image(torch.zeros(1))
        hands.seconds += 4
        text(torch.zeros(1))
        split.enter("backward")
        hands.seconds += 8
        split.leave()
        split.enter("optimiser")
        hands.seconds += 16
        split.leave()

    for _ in range(2):  # a step knows nothing of the one before
        with split:
            _, total = clock.timed(step)
        spent = split.seconds(total)
        assert spent == dict(image=3, overhead=0.5, text=0, backward=8, optimiser=16, head=4)
        assert sum(spent.values()) == total
    assert not image._forward_hooks and not image._forward_pre_hooks


def test_a_part_that_fails_is_left_all_the_same():
    class Broken(nn.Module):
        def forward(self):
            raise ValueError

    module, clock = Broken(), Clock()
    split = Split({"image": module}, module, clock)
    with split, pytest.raises(ValueError):
        clock.timed(module)
    assert split.open == []


def test_on_a_gpu_parts_are_events_that_wait_for_nothing(monkeypatch):
    calls, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = now[0]
            calls.append("event")

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    clock, module = Clock("cuda:0"), nn.Identity()

    def step():
        module(torch.zeros(1))
        now[0] += 2

    split = Split({"image": module}, module, clock)
    with split:
        _, seconds = clock.timed(step)
    assert seconds == pytest.approx(2) and split.seconds(seconds)["head"] == pytest.approx(2)
    assert calls == ["wait", "event", "event", "event", "event", "wait"]


def rows(seconds, arm="baseline", phase="timing 4", **columns):
    each = dict(kind="step", arm=arm, seed=0, phase=phase, data_wait=0.0)
    return [each | columns | dict(index=i, seconds=s) for i, s in enumerate(seconds)]


def test_warm_up_is_recorded_and_not_used():
    frame = speeds.complete(rows([9, 9, 9, *[2.0] * 8]) + rows([1, 1, 1, *[1.0] * 8], "fast"))
    found = speeds.by_batch(frame, "fast", [4])
    assert [(t.batch, t.seconds, t.speedup.value, t.speedup.n) for t in found] == [(4, 1.0, 2.0, 8)]
    assert speeds.split(speeds.timed(frame, "baseline", 4), first=9.0).first_step == 9.0


def test_end_to_end_counts_what_all_arms_wait_for():
    frame = speeds.complete(rows([2.0] * 12, data_wait=2.0) + rows([1.0] * 12, "fast", data_wait=2.0))
    both = [speeds.timed(frame, name, 4) for name in ("baseline", "fast")]
    assert speeds.speedup(*both, "seconds").value == 2.0
    assert speeds.speedup(*both, "seconds", "data_wait", "transfer").value == pytest.approx(4 / 3)


def test_the_ceiling_is_amdahls():
    frame = speeds.complete(rows([4.0] * 5, image_seconds=3.0, head_seconds=1.0))
    assert speeds.ceiling(frame, {"image"}) == 4.0
    assert speeds.ceiling(frame, set()) == 1.0
    assert speeds.ceiling(frame, {"image", "head"}) is None


def timing(batch, verdict):
    return records.Timing(batch=batch, seconds=1, speedup=records.Speedup(value=1, verdict=verdict))


@pytest.mark.parametrize(
    "verdicts, batch",
    [
        (["FASTER", "AMBIGUOUS", "FASTER", "FASTER"], 4),
        (["FASTER"] * 4, 1),
        (["FASTER", "FASTER", "FASTER", "SLOWER"], None),
        ([], None),
    ],
)
def test_the_batch_from_which_on_a_method_pays(verdicts, batch):
    assert speeds.pays_from(tuple(timing(2**i, verdict) for i, verdict in enumerate(verdicts))) == batch


def test_training_is_paired_in_blocks_of_the_whole():
    frame = speeds.complete(
        rows([3.0] * 60, phase="train")
        + rows([1.0] * 60, "fast", "train")
        + rows([6.0] * 30, phase="features")
        + rows([2.0] * 30, "fast", "features")
    )
    found = speeds.training_speedup(frame, "fast")
    assert found.value == 3.0 and found.n == speeds.BLOCKS


def test_energy_is_absent_where_it_was_not_read():
    assert speeds.energy(pd.DataFrame(rows([1.0])), "x") is None
    assert speeds.energy(pd.DataFrame(rows([1.0, 1.0], joules=3.0)), "RAPL").joules_per_step == 3.0


class OneImage:
    """A task of which only the batch matters."""

    def parts(self, model):
        return {}


def setting(clock=None):
    protocol = records.Protocol(threads=1)
    return Setting(OneImage(), None, protocol, clock or Clock(), None)


def arm(name, kind="method"):
    randomness.seed_all(0)
    return Arm(ArmPlan(name, kind=kind), nn.Identity(), randomness.get_state())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_method_that_changes_the_batch_is_named(mode):
    def work(arm, batch, index):
        with mode():
            if arm.name == "greedy":
                batch["image"].mul_(0.5)

    arms = [arm("baseline", "baseline"), arm("greedy"), arm("other")]
    with pytest.raises(BatchChanged, match="greedy changed the batch that all arms share \\(image, in place\\)"):
        list(steps(arms, "quality", 0, range(1), lambda i: dict(image=torch.ones(2)), work, setting()))


def test_what_an_arm_adds_to_its_batch_stays_with_it():
    seen = []

    def work(arm, batch, index):
        seen.append(sorted(batch))
        batch["mine"] = batch.pop("image") * 2

    arms = [arm("baseline", "baseline"), arm("A")]
    list(steps(arms, "quality", 0, range(2), lambda i: dict(image=torch.ones(2)), work, setting()))
    assert seen == [["image"]] * 4


def test_a_clock_that_steps_back_is_no_time():
    hands = Hands()
    clock = Clock(timer=hands)

    def step():
        hands.seconds -= 1

    with pytest.raises(InvalidError, match="the clock stepped back by 1.0"):
        clock.timed(step)
    with pytest.raises(EffbenchError, match="the baseline failed: the clock stepped back"):
        list(steps([arm("baseline", "baseline")], "x", 0, range(1), lambda i: {}, lambda *a: step(), setting(clock)))
    hands.seconds = math.nan
    with pytest.raises(InvalidError, match="the clock reads nan"):
        clock.mark()


def test_energy_is_read_around_every_step():
    class Meter:
        total = 0.0

        def joules(self):
            self.total += 1.5
            return self.total

    chosen = setting()
    chosen.meter = Meter()
    list(steps([arm("baseline", "baseline")], "x", 0, range(2), lambda i: {}, lambda *a: None, chosen))
    assert [row["joules"] for row in chosen.rows] == [1.5, 1.5] and math.isfinite(chosen.rows[0]["head_seconds"])


def test_a_meter_that_breaks_fails_no_arm():
    class Broken:
        def joules(self):
            raise EffbenchError("the counter is gone")

    class Silent:
        said = []

        def warn(self, text):
            self.said.append(text)

    chosen = setting()
    chosen.meter, chosen.live = Broken(), Silent()
    arms = [arm("baseline", "baseline"), arm("A")]
    list(steps(arms, "x", 0, range(2), lambda i: {}, lambda *a: None, chosen))
    assert [a.error for a in arms] == ["", ""] and Silent.said == ["energy is no longer measured: the counter is gone"]
    assert speeds.energy(speeds.complete(chosen.rows), "RAPL") is None


def test_the_middle_half_leaves_the_hiccups_out():
    frame = speeds.complete(rows([1, 1, 1, 5, 1, 2, 3, 4, 90, 0.01, 2.5]))
    found = speeds.middle(speeds.timed(frame, "baseline", 4))
    assert sorted(found["seconds"]) == [2, 2.5, 3, 4] and speeds.by_batch(frame, "baseline", [4])[0].seconds == 2.875


def test_garbage_is_collected_between_steps_not_within():
    import gc

    assert gc.isenabled() and Clock().timed(gc.isenabled)[0] is False and gc.isenabled()
    with pytest.raises(ValueError):
        Clock().timed(lambda: int("x"))
    assert gc.isenabled()
    gc.disable()
    try:
        Clock().timed(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_failed_arm_does_not_lend_the_others_their_last_times(monkeypatch):
    """Fewer rows a turn than arms: the times that decide when to stop are still one per pair."""
    seen = []

    class Task(OneImage):
        def batch(self, *_):
            return {}

        def serve(self, model, batch):
            pass

    class Quiet:
        def stage(self, *_, **__):
            pass

        advance = stage

    monkeypatch.setattr(Stopping, "over", lambda self, pairs, seconds, times: seen.append(times) or pairs == 5)
    chosen = setting()
    chosen.task, chosen.live = Task(), Quiet()
    arms = [arm("baseline", "baseline"), arm("A"), arm("failed")]
    arms[2].error = "no kernel"
    pairs(arms, 4, Stopping(5, budget=60), chosen, dict(test=8), None, lambda state: None)
    for name, times in zip(("baseline", "A"), seen[-1], strict=True):
        own = [row["seconds"] for row in chosen.rows if row["arm"] == name and row["index"] >= 3]
        assert times == own and len(own) == 5
