"""mixture_of_experts: the dense model at first, its FLOPs, and a router that learns."""

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from torch import nn

from effbench import arms, records
from effbench.arms import ArmPlan, trained_state, training_model
from effbench.calibration_set import of_inputs
from effbench.errors import UsageError
from effbench.measure.analytic import analytic_of, disagreement
from effbench.measure.flops import flops_of
from effbench.measure.memory import weight_bytes
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import generate
from effbench.models.tower import view
from effbench.spec import parse

WIDTH, HIDDEN, LAYERS, TOKENS = 32, 128, 3, 4 + 1 + 6 - 1
FULL = records.Protocol(train="full")
SPECS = ("mixture_of_experts", "mixture_of_experts:active=2", "mixture_of_experts:experts=8,active=4,layers=other")


def llama():
    return language.tiny(words=50, layers=LAYERS, width=WIDTH)


def of(model):
    return Language(model.get_decoder(), model.get_output_embeddings())


def captioner(make=llama, spread=6):
    torch.manual_seed(0)
    model = Captioner(nn.Identity(), PooledLinear(24, WIDTH, None), make(), (), (49,), 49, records.Captioning())
    with torch.no_grad():
        for p in model.parameters():  # MLPs that matter, and tokens that routers tell apart
            p.mul_(1 if p.ndim == 1 else spread)
    return model


def task(model):
    return SimpleNamespace(build=lambda *_: model, locked=lambda _: [])


def trained(spec, model=None):
    torch.manual_seed(1)
    found, plan = training_model(ArmPlan(spec, parse(spec)), task(model or captioner()), None, None, FULL)
    return found.train(), plan


def for_testing(spec, state, model=None):
    arm = ArmPlan(spec, parse(spec))
    return arms.testing_model(arm, task(model or captioner()), None, None, FULL, state, of_inputs(None))


def batch(images=4):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 49, (images, 6), generator=draw)
    target = tokens.clone()
    target[0, 3:] = IGNORE
    return torch.randn(images, 4, 24, generator=draw), tokens, target


def loss(model, features, tokens, target):
    return model.loss(model.prefix(features), tokens, target)


@pytest.mark.parametrize("spec", SPECS)
def test_it_starts_as_the_dense_model_and_routes_tokens_apart(spec):
    dense, model = captioner().eval(), trained(spec)[0].eval()
    features, tokens, target = batch()
    with torch.no_grad():
        expected, found = (m.logits(m.prefix(features), tokens) for m in (dense, model))
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        text, size = generate(model.language, model.prefix(features), 5, 49, exactly=True)
        assert torch.equal(text, generate(dense.language, dense.prefix(features), 5, 49, exactly=True)[0]) and size
    held = [layer.mlp for layer in model.language.body.layers if hasattr(layer.mlp, "experts")]
    assert len(held) == (1 if "other" in spec else 3)
    assert all(len(mlp.gate.chosen.unique()) > mlp.gate.top_k for mlp in held)
    copies = 4 if spec == SPECS[0] else 2
    added = len(held) * ((copies - 1) * 3 * WIDTH * HIDDEN + held[0].gate.weight.numel())
    assert weight_bytes(model) - weight_bytes(dense) == 4 * added


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_active_experts_cost_what_the_dense_mlp_does(spec, precision):
    dense, model, (features, tokens, target) = captioner().train(), trained(spec)[0], batch()
    counts = []
    for each in (dense, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            each.zero_grad()
            count = flops_of(lambda each=each: loss(each, features, tokens, target).backward(), each)
            formulas = analytic_of(lambda each=each: loss(each, features, tokens, target), each, train=True)
        assert count.complete and disagreement(count, formulas) == "" and formulas.without_formula == ()
        counts.append(count.dense_flops)
    assert counts[0] == counts[1]
    experts = sum(n for name, n in count.by_layer.items() if name.endswith("mlp.experts"))
    layers, rows = (1, 8) if "other" in spec else (3, 4)
    assert experts == 3 * layers * 2 * 4 * TOKENS * 3 * WIDTH * HIDDEN
    assert count.overhead_flops == 3 * layers * 2 * 4 * TOKENS * WIDTH * rows


@pytest.mark.parametrize("spec", SPECS[:2])
def test_no_token_depends_on_its_batch(spec):
    model, plan = trained(spec)
    step(model, plan, 3)
    model.eval()
    features, tokens, _ = batch()
    with torch.no_grad():
        whole = model.logits(model.prefix(features), tokens)
        for i in range(len(features)):
            alone = model.logits(model.prefix(features[i : i + 1]), tokens[i : i + 1])
            assert (alone - whole[i]).abs().max() < 1e-5 * whole.abs().max()
        cached, _ = generate(model.language, model.prefix(features), 5, 49, exactly=True)
        anew, _ = generate(model.language, model.prefix(features), 5, 49, exactly=True, cached=False)
    assert torch.equal(cached, anew)


def step(model, plan, steps=1):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        found = loss(model, *batch())
        sum((term() for term in plan.losses), found).backward()
        optimiser.step()
    return found.item()


@pytest.mark.parametrize("spec", SPECS[:2])
def test_both_losses_reach_the_router(spec):
    model, plan = trained(spec)
    routers = [layer.mlp.gate.weight for layer in model.language.body.layers]
    (balance,) = plan.losses
    found = loss(model, *batch())
    (term,) = [balance()]
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(term, routers, retain_graph=True))
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(found, routers))
    assert balance() == 0  # each step's once
    assert trained(f"{spec}{',' if ':' in spec else ':'}balance=0")[1].losses == []


def test_the_balance_loss_is_switch_s_without_padding():
    model, plan = trained("mixture_of_experts:balance=0.5")
    features, tokens, target = batch()
    logits = []
    for layer in model.language.body.layers:
        layer.mlp.gate.register_forward_hook(lambda *args: logits.append(args[2][0].detach()))
    loss(model, features, tokens, target)
    there = torch.ones(4, TOKENS, dtype=torch.bool)
    there[0, TOKENS - 3 :] = False
    expected = 0.0
    for each in logits:
        probability = each.softmax(dim=-1)[there.flatten()]
        share = torch.bincount(probability.argmax(dim=-1), minlength=4) / len(probability)
        expected += 4 * (share * probability.mean(dim=0)).sum().item()
    assert plan.losses[0]().item() == pytest.approx(0.5 * expected, rel=1e-5)
    with torch.no_grad():
        for layer in model.language.body.layers:
            layer.mlp.gate.weight.zero_()  # all experts as likely
    loss(model, features, tokens, target)
    assert plan.losses[0]().item() == pytest.approx(0.5 * LAYERS)


def test_trained_experts_are_tested_and_experts_part():
    model, plan = trained("mixture_of_experts")
    first, last = step(model, plan), step(model, plan, 8)
    assert last < first
    experts = model.language.body.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1])
    again = for_testing("mixture_of_experts", trained_state(model))
    model.eval()
    with torch.no_grad():
        assert loss(again, *batch()) == loss(model, *batch())
    said = parse("mixture_of_experts")[0].notes(view(again))
    assert "4 experts with hidden layers of 128 in 3 of 3 layers, 1 of them active" in said[0]
    assert "(even: 25%)" in said[1]


@pytest.mark.parametrize(
    "stack", ["layer_tune:layers=1+", "layer_tune:by=frozen+", "sample_pack+", "layer_prune:drop=1+"]
)
def test_it_stands_beside_other_methods(stack):
    if "layer_prune" in stack:
        stack = "layer_prune:at=1,phase=both+"
    model, plan = trained(f"{stack}mixture_of_experts:balance=1")
    model.train()
    for part in plan.frozen:
        if isinstance(part, nn.Module):
            part.eval()
    found = loss(model, *batch())
    term = plan.losses[0]()
    live = [block.mlp for block in model.language.body.layers if block.mlp.gate.weight.requires_grad]
    assert len(live) == {"layer_tune:layers=1+": 1, "layer_tune:by=frozen+": 0, "sample_pack+": 3}.get(stack, 2)
    assert (term > 0) == bool(live)
    (found + term).backward()
    assert all(mlp.experts.down_proj.grad is not None and mlp.gate.weight.grad is not None for mlp in live)


def test_copies_and_pickles_even_in_the_middle_of_a_step():
    model, _ = trained("mixture_of_experts")
    found = loss(model, *batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(other, *batch()), found)
    assert len(model.language.body.layers[0].mlp.gate.logits) == 1


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=2, n_head=4, use_cache=False)
    return of(transformers.GPT2LMHeadModel(config))


def with_biases():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_bias=True,
    )
    return of(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    "spec, make, message",
    [
        ("mixture_of_experts:experts=1", llama, "experts=1 is not valid"),
        ("mixture_of_experts:active=5", llama, "active=5 is more than experts=4"),
        ("mixture_of_experts:experts=5,active=2", llama, "experts=5 is no multiple of active=2"),
        ("mixture_of_experts:balance=-1", llama, "balance=-1.* is not valid"),
        ("mixture_of_experts:phase=test", llama, "phase=test is not valid"),
        ("mixture_of_experts:experts=3,active=3", llama, "have 128 channels, which do not divide into active=3"),
        ("mixture_of_experts", gpt2, "GPT2Model hold GPT2MLP"),
        ("mixture_of_experts", with_biases, "without biases"),
        (
            "mixture_of_experts:layers=other",
            lambda: language.tiny(words=50, layers=1, width=WIDTH),
            "layers=other of 1 layer is none",
        ),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(spec, make, message):
    model = captioner(make)
    before = str(model)
    with pytest.raises(UsageError, match=message) as refused:
        trained(spec, model)
    assert refused.value.hint and str(model) == before


def test_a_model_without_a_decoder_is_refused():
    with pytest.raises(UsageError, match="acts on a captioner's decoder, and .*CLIP has none"):
        parse("mixture_of_experts")[0].edit_model(view(tiny.clip()))


def test_more_experts_than_the_machine_holds_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(UsageError, match="experts=4 of 3 layers are .* MiB of weights, and this machine has 0 MiB"):
        trained("mixture_of_experts")
