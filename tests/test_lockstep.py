"""Lockstep: fair turns, isolated randomness, failures that stay with their arm, exact resume."""

import numpy as np
import pytest
import torch
from torch import nn

from effbench import randomness
from effbench.arms import ArmPlan, plan_arms
from effbench.checkpoint import Checkpoint
from effbench.errors import EffbenchError
from effbench.lockstep import Arm, Setting, steps, turn
from effbench.measure.clock import Clock
from effbench.records import Protocol
from effbench.spec import parse
from effbench.training import order, schedule


def arm(name, kind="method"):
    randomness.seed_all(0)
    return Arm(ArmPlan(name, kind=kind), nn.Identity(), randomness.get_state())


def test_the_order_alternates():
    taken = []
    arms = [arm(name) for name in "ABC"]
    for index in range(3):
        turn(arms, index, lambda a: taken.append(a.name), Clock())
    assert "".join(taken) == "ABCCBAABC"


def test_an_arm_draws_the_same_alone_and_beside_others():
    def draws(names, order=1):
        arms = [arm(name) for name in names][::order]
        seen = {name: [] for name in names}
        for index in range(4):
            turn(arms, index, lambda a: seen[a.name].append((torch.rand(1).item(), np.random.rand())), Clock())
        return seen

    alone = draws("A")["A"]
    assert draws("ABC")["A"] == alone == draws("ABC", -1)["A"] and len(set(alone)) == 4


def test_the_outer_random_state_is_untouched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    first = arm("A")
    torch.manual_seed(5)
    turn([first], 0, lambda a: torch.rand(100), Clock())
    assert torch.equal(torch.rand(3), expected)


def test_a_failure_stays_with_its_arm():
    arms = [arm("baseline", "baseline"), arm("A"), arm("B")]

    def work(a):
        if a.name == "A":
            raise ValueError("two\nlines")
        return 1

    assert set(turn(arms, 0, work, Clock())) == {"baseline", "B"}
    assert arms[1].error == "ValueError: two lines"
    assert set(turn(arms, 1, lambda a: 1, Clock())) == {"baseline", "B"}


def test_nothing_goes_on_without_the_baseline():
    def work(a):
        raise ValueError("no")

    with pytest.raises(EffbenchError, match="the baseline failed: ValueError: no"):
        turn([arm("baseline", "baseline")], 0, work, Clock())


def test_what_is_done_between_two_steps_is_in_no_loop_at_whatever_moment_it_is_saved():
    """A look at dev or a checkpoint is `other`; a resumed run begins with the seconds as they were saved in between."""

    class Task:
        def parts(self, model):
            return {}

    clock = Clock()
    setting = Setting(Task(), None, Protocol(), clock, None)
    for _ in steps([arm("baseline", "baseline")], "train", 0, range(3), lambda i: {}, lambda *a: None, setting):
        begin = clock.now()
        while clock.now() - begin < 0.05:
            pass
        setting.seconds["other"] += clock.now() - begin
        saved = dict(setting.seconds)
        assert 0 <= saved["loop"] - saved["data"] - saved["compute"] < 0.04
    assert setting.seconds["other"] >= 0.15 and setting.seconds["loop"] < 0.1


def test_random_state_survives_a_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c.pt", 60)
    randomness.seed_all(3)
    torch.randn(1), np.random.randn(1)
    checkpoint.save(dict(random=randomness.get_state()))
    expected = torch.randn(2), np.random.randn(2)
    randomness.set_state(checkpoint.load()["random"])
    assert torch.equal(torch.randn(2), expected[0]) and (np.random.randn(2) == expected[1]).all()


def test_a_damaged_checkpoint_is_no_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c.pt", 60)
    checkpoint.save(dict(a=torch.arange(1000)))
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[: len(whole) // 2])
    assert checkpoint.load() is None


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c.pt", 60)
    checkpoint.save(dict(a=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effbench.checkpoint.os.fsync", full)
    with pytest.raises(EffbenchError, match="the disk is full"):
        checkpoint.save(dict(a=2))
    assert checkpoint.load() == dict(a=1) and list(tmp_path.iterdir()) == [checkpoint.path]


def test_a_step_group_is_long_and_its_checkpoint_cheap(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("effbench.checkpoint.time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "c.pt", 60)
    now[0] = 59
    assert not checkpoint.due()
    now[0] = 61
    assert checkpoint.due()
    checkpoint.cost, checkpoint.saved = 2.0, 0.0
    now[0] = 199
    assert not checkpoint.due()
    now[0] = 200
    assert checkpoint.due()


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    assert (order(1, 2, 50) == order(1, 2, 50)).all()
    assert (order(1, 2, 50) != order(1, 3, 50)).any() and (order(1, 2, 50) != order(2, 2, 50)).any()
    assert sorted(order(1, 2, 50)) == list(range(50))


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step / 100, 0.1) for step in range(100)]
    assert max(rates) == 1.0 == rates[10] and rates[0] < 0.1 and rates[-1] < 0.01
    assert schedule(0.0, 0.0) == 1.0


def test_every_comparison_carries_its_controls():
    specs = ["token_prune:keep=0.5", "token_prune:keep=0.5,score=norm", "token_prune:keep=0.7"]
    arms = plan_arms([parse(spec) for spec in specs])
    assert [a.control for a in arms[:3]] == ["", "noop", "identity"]
    random = [a for a in arms if a.control == "random"]
    assert len(random) == 2  # one per budget
    assert random[0].controls_for == tuple(specs[:2])
    asked = plan_arms([parse("token_prune"), parse("token_prune:score=random")])
    assert [a.kind for a in asked] == ["baseline", "control", "control", "method", "method"]
