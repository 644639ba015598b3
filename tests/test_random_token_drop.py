"""random_token_drop: random-LTD trains the middle blocks on random parts of the tokens and leaves testing alone."""

import copy

import pytest
import torch
from tiny import IMAGES, clip, vit
from torch import nn

import effbench
from effbench.errors import UsageError
from effbench.method import TrainingPlan
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods.random_token_drop import RandomTokenDrop


def planned(model, frozen=(), trained=(), **parameters):
    method, seen = RandomTokenDrop(**parameters), view(model)
    method.edit_model(seen)
    plan = TrainingPlan(seen, list(frozen), list(trained))
    method.edit_training(plan)
    return plan


def passed(tower, images=IMAGES):
    """What goes into and comes out of each block's loop step, and how many tokens its MLP sees."""
    seen = []
    through = tower.loop._through

    def spy(block, state):
        after = through(block, state)
        seen.append((state.tokens.detach(), after.tokens.detach()))
        return after

    tower.loop._through = spy
    try:
        out = tower.module(images)
    finally:
        del tower.loop._through
    return out, seen


@pytest.mark.parametrize(
    "make", [vit, lambda: vit(reg_tokens=4), lambda: vit(class_token=False, global_pool="avg"), clip]
)
def test_middle_blocks_see_a_part_and_prefix_tokens_always(make):
    tower = planned(make(), keep=0.3).model.image
    tower.module.train()
    tower.blocks[1].token_bypass.share = tower.blocks[2].token_bypass.share = 0.3
    out, seen = passed(tower)
    prefix = tower.prefix
    assert [inside.shape[1] for inside, _ in seen] == [prefix + 16, prefix + 5, prefix + 5, prefix + 16]
    assert torch.equal(seen[1][0][:, :prefix], seen[0][1][:, :prefix])
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.module.parameters())


def test_tokens_that_pass_by_are_bit_equal_and_each_image_draws_its_own():
    tower = planned(vit(), keep=0.3).model.image
    tower.module.train()
    drawn = []
    for block in (1, 2):
        tower.blocks[block].token_bypass.register_forward_hook(lambda *seen: drawn.append((seen[1][0].tokens, seen[2])))
    last = []
    tower.blocks[3].norm1.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    tower.module(IMAGES)
    (x1, index1), (x2, index2) = drawn
    for before, index, after in ((x1, index1, x2), (x2, index2, last[0])):
        went = torch.zeros(2, 17, dtype=torch.bool).scatter(1, index, True)
        assert torch.equal(before[~went], after[~went])
        assert (before[went] != after[went]).any(dim=-1).all()
        assert went.sum(1).tolist() == [index.shape[1]] * 2  # no token twice
    sets = [frozenset(row.tolist()) for row in (*index1, *index2)]
    assert len(set(sets)) == 4


def test_a_part_goes_through_as_if_it_were_alone():
    tower = planned(vit(), keep=0.5).model.image
    plain = vit()
    tower.module.train()
    kept = []
    tower.blocks[1].token_bypass.register_forward_hook(lambda *seen: kept.append((seen[1][0].tokens, seen[2])))
    after = []
    tower.blocks[2].token_bypass.register_forward_pre_hook(lambda _, inputs: after.append(inputs[0].tokens))
    with torch.no_grad():
        tower.module(IMAGES)
        tokens, index = kept[0]
        row = torch.arange(2)[:, None]
        assert (after[0][row, index] - plain.blocks[1](tokens[row, index])).abs().max() < 1e-5


@pytest.mark.parametrize("make", [vit, clip])
def test_testing_is_untouched_and_all_tokens_are_the_baseline(make):
    model = make()
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        plan = planned(model, keep=0.2)
        assert (tower(IMAGES) - expected).abs().max() < 1e-5
        model.train()
        assert (tower(IMAGES) - expected).abs().max() > 1e-3
        for call in plan.each_step:
            call(0.7)
        assert (tower(IMAGES) - expected).abs().max() < 1e-5


def test_the_part_rises_linearly():
    plan = planned(vit(), keep=0.4, until=0.5)
    part = plan.model.image.blocks[1].token_bypass
    shares = []
    for step in range(10):
        for call in plan.each_step:
            call(step / 10)
        shares.append(part.share)
    assert shares == pytest.approx([0.4, 0.52, 0.64, 0.76, 0.88, 1, 1, 1, 1, 1])
    fresh = planned(vit(), keep=0.4, until=0.5)
    assert fresh.model.image.blocks[1].token_bypass.share == pytest.approx(0.4 + 0.6 * 0.75)  # the mean over all steps


def test_a_resumed_training_is_bit_equal():
    def steps(model, plan, first, last):
        model.train()
        for step in range(first, last):
            for call in plan.each_step:
                call(step / 4)
            loss = model(IMAGES).square().mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    whole = vit()
    plan = planned(whole, keep=0.3)
    torch.manual_seed(3)
    steps(whole, plan, 0, 2)
    state, weights = torch.get_rng_state(), copy.deepcopy(whole.state_dict())
    steps(whole, plan, 2, 4)
    again = vit()
    plan = planned(again, keep=0.3)
    again.load_state_dict(weights)
    torch.set_rng_state(state)
    steps(again, plan, 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_locked_tower_is_refused():
    model = vit()
    with pytest.raises(UsageError, match="nothing of it is trained") as refused:
        planned(model, frozen=[model])
    assert refused.value.hint == "use --train full"
    part = vit()
    planned(part, frozen=[part], trained=[part.head])
    planned(vit(), frozen=[nn.Linear(2, 2)])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("random_token_drop:keep=0", "keep=0"),
        ("random_token_drop:keep=1.2", "keep=1.2"),
        ("random_token_drop:until=0", "until=0"),
        ("random_token_drop:phase=test", "phase=test"),
    ],
)
def test_bad_parameters_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        parse(spec)


def test_towers_that_cannot_are_refused():
    with pytest.raises(UsageError, match="needs an image tower"):
        RandomTokenDrop().edit_model(type("View", (), dict(image=None)))
    with pytest.raises(UsageError, match="this tower has 2"):
        RandomTokenDrop().edit_model(view(vit(depth=2)))
    with pytest.raises(UsageError, match="acts while training"):
        effbench.apply(vit(), "random_token_drop")
    seen = view(vit())
    parse("token_prune:at=1")[0].edit_model(seen)
    with pytest.raises(UsageError, match="both choose the tokens in block 1"):
        RandomTokenDrop().edit_model(seen)


@pytest.mark.parametrize("middle, refused", [("at=1", True), ("at=3", False)])
def test_another_method_in_a_middle_block_is_refused_in_either_order(middle, refused):
    seen = view(vit())
    stack = parse(f"random_token_drop+token_prune:{middle},score=norm,phase=both")
    for method in stack:
        method.edit_model(seen)
    plan = TrainingPlan(seen, [], [])
    if not refused:
        return stack[0].edit_training(plan)
    with pytest.raises(UsageError, match="random_token_drop and token_prune conflict"):
        stack[0].edit_training(plan)
