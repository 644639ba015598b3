"""layer_tune: which blocks are chosen, what of them is trained, what it costs, adapters, and what is refused."""

import copy
import sys

import open_clip
import pytest
import torch
from rich.console import Console
from tiny import IMAGES, clip, flickr8k, vit

import effbench
from effbench.arms import trained_state
from effbench.calibration_set import CalibrationSet
from effbench.engine import groups
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.live import Live
from effbench.measure.flop_towers import Request, count_towers
from effbench.method import TrainingPlan
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.tower import view
from effbench.records import Protocol
from effbench.spec import canonical, parse
from effbench.training import training_mode
from effbench_methods.algorithms.layer_choice import PLACES, best, by_place

TEXTS = torch.randint(1, 48, (2, 12), generator=torch.Generator().manual_seed(2))
TEXTS[:, -1] = 49
FLOPS = Request("timm:deit_small_patch16_224", train=True)


def dual(text_layers=2):
    """A timm tower of 4 blocks and a text tower, as the harness joins them."""
    image = TimmFeatures(vit(num_classes=0))
    text = open_clip.transformer.TextTransformer(12, 50, width=24, heads=3, layers=text_layers, output_dim=16)
    return DualEncoder(image, text, torch.nn.Linear(image.width, 16), "cosine", 16)


def planned(model, spec, locked=()):
    """The model as the spec trains it, gradients set, and its plan."""
    (method,) = parse(spec)
    seen = view(model)
    method.edit_model(seen)
    plan = TrainingPlan(seen, list(locked), [])
    method.edit_training(plan)
    plan.set_gradients()
    return model, plan


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, loss, lr=0.1):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr)
    loss().backward()
    optimiser.step()
    return optimiser


def calibration(batches=((IMAGES, TEXTS),), available=32, thrifty=False):
    def loss(model, batch):
        return model.loss(*model(*batch))

    return CalibrationSet(lambda: iter(batches), available, lambda model, batch: model(*batch), loss, thrifty)


# --- which blocks


@pytest.mark.parametrize(
    "strategy, layers, k, expected",
    [
        ("uniform", 32, 8, (0, 4, 8, 12, 18, 22, 26, 30)),  # the choice of arXiv 2412.12785
        ("uniform", 32, 16, tuple(range(0, 32, 2))),
        ("uniform", 12, 3, (0, 6, 10)),
        ("uniform", 12, 1, (0,)),
        ("uniform", 7, 4, (0, 2, 4, 6)),
        ("uniform", 5, 4, (0, 1, 3, 4)),
        ("full", 4, 1, (0, 1, 2, 3)),
        ("top", 12, 3, (9, 10, 11)),
        ("middle", 12, 4, (4, 5, 6, 7)),
        ("bottom", 12, 3, (0, 1, 2)),
        ("hybrid", 12, 3, (0, 1, 11)),
        ("hybrid", 12, 4, (0, 1, 10, 11)),
    ],
)
def test_choices_by_place(strategy, layers, k, expected):
    assert by_place(strategy, layers, k) == expected


@pytest.mark.parametrize("strategy", [place for place in PLACES if place != "full"])
def test_every_number_of_layers_is_chosen_exactly(strategy):
    for layers in range(1, 40):
        for k in range(1, layers + 1):
            chosen = by_place(strategy, layers, k)
            assert len(chosen) == k and sorted(set(chosen) & set(range(layers))) == list(chosen)


def test_the_highest_scores_are_best_and_ties_go_by_order():
    assert best([1.0, 3.0, 2.0, 3.0], 2) == (1, 3)
    assert best([1.0, 1.0, 2.0, 1.0], 2) == (0, 2)


def test_one_choice_has_one_name():
    for spec in ("layer_tune:at=3/1", "layer_tune:by=list,at=1/3"):
        assert canonical(parse(spec)) == "layer_tune:at=1/3"
    assert canonical(parse("layer_tune:by=uniform,share=0.25")) == "layer_tune"
    assert canonical(parse("layer_tune:lora=4")) == "layer_tune:lora=4"


# --- what is trained

BLOCK = "image_encoder.trunk.blocks.{}."
STEM = {"image_encoder.trunk." + name for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")}
STEM.add("image_encoder.trunk.patch_embed.proj.bias")


def in_blocks(model, *indices):
    return {name for name, _ in model.named_parameters() for i in indices if name.startswith(BLOCK.format(i))}


@pytest.mark.parametrize(
    "spec, blocks, stem",
    [
        ("layer_tune", (0,), False),
        ("layer_tune:0.5", (0, 2), False),
        ("layer_tune:layers=3,by=top", (1, 2, 3), False),
        ("layer_tune:at=3/1", (1, 3), False),
        ("layer_tune:at=1,stem=true", (1,), True),
        ("layer_tune:by=full", (0, 1, 2, 3), True),
        ("layer_tune:by=full,stem=false", (0, 1, 2, 3), False),
        ("layer_tune:by=head", (), False),
    ],
)
def test_the_chosen_blocks_are_trained_and_all_that_is_not_of_the_tower(spec, blocks, stem):
    model, _ = planned(dual(), spec)
    every = {name for name, _ in model.named_parameters()}
    frozen = in_blocks(model, *(i for i in range(4) if i not in blocks)) | (set() if stem else STEM)
    assert trained(model) == every - frozen
    assert "image_encoder.trunk.norm.weight" in every - frozen and "text_encoder.token_embedding.weight" in every


def test_on_openclip():
    model, _ = planned(clip(), "layer_tune:at=3")
    text = {n for n, _ in model.named_parameters() if not n.startswith("visual.")}
    last = {n for n, _ in model.named_parameters() if n.startswith("visual.transformer.resblocks.3.")}
    assert len(last) == 12 and trained(model) == text | last | {
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "visual.proj",
    }


def test_the_text_tower():
    model, _ = planned(clip(), "layer_tune:at=1,target=text")
    frozen = {n for n, _ in model.named_parameters() if n.startswith("transformer.resblocks.0.")}
    assert {n for n, _ in model.named_parameters()} - trained(model) == frozen | {
        "token_embedding.weight",
        "positional_embedding",
    }
    locked = dual()
    planned(locked, "layer_tune:at=1,target=text", locked=[locked.image_encoder])
    assert not any(n.startswith(("image_encoder", "text_encoder.transformer.resblocks.0")) for n in trained(locked))
    assert any(n.startswith("text_encoder.transformer.resblocks.1") for n in trained(locked))


@pytest.mark.parametrize(
    "by, per_block",
    [
        ("bitfit", 24 + 72 + 24 + 24 + 96 + 24),  # norm1, qkv, proj, norm2, fc1, fc2
        ("layernorm", 4 * 24),
    ],
)
@pytest.mark.parametrize("make", [vit, clip])
def test_only_biases_or_only_norms(by, per_block, make):
    model, plan = planned(make(), f"layer_tune:by={by}")
    blocks = plan.model.image.blocks
    assert sum(p.numel() for p in blocks.parameters() if p.requires_grad) == 4 * per_block
    names = {name.rpartition(".")[2] for name, p in blocks.named_parameters() if p.requires_grad}
    assert names == ({"bias"} if by == "bitfit" else {"weight", "bias"})
    stem = plan.model.image.stem
    assert not any(p.requires_grad for p in stem.parameters())
    model, plan = planned(vit(), f"layer_tune:by={by},stem=true")
    assert {n for n in trained(model) if "embed" in n} == ({"patch_embed.proj.bias"} if by == "bitfit" else set())


def test_training_changes_what_is_trained_and_nothing_else():
    model, plan = planned(dual(), "layer_tune:at=1/3")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_mode([Arm(model, plan)])
    assert [block.training for block in model.image_encoder.trunk.blocks] == [False, True, False, True]
    optimiser = step(model, lambda: model.loss(*model(IMAGES, TEXTS)))
    names = trained(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names
    assert len(optimiser.state) == len(names)
    assert sum(len(group["params"]) for group in groups(model, Protocol())) == len(names)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= names and changed & in_blocks(model, 0, 1, 2, 3) == in_blocks(model, 1, 3)
    saved = trained_state(model)
    assert {n for n in saved if ".blocks." in n} == in_blocks(model, 1, 3) and len(saved) == len(names)


class Arm:
    """What `training_mode` looks at."""

    def __init__(self, model, plan):
        self.model, self.frozen, self.trained = model, plan.frozen, plan.trained


# reference_numbers.json: train_cost_in_forwards_deit_small
@pytest.mark.parametrize(
    "spec, expected",
    [
        ("layer_tune:by=full", "2.987"),
        ("layer_tune:at=0/4/8,stem=true", "2.305"),
        ("layer_tune:at=3/7/11", "2.026"),
        ("layer_tune:by=top", "1.494"),
        ("layer_tune:by=head", "1.0"),
    ],
)
def test_reference_training_costs(spec, expected):
    one = count_towers(Request(FLOPS.backbone))["image"].count.dense_flops
    found = count_towers(FLOPS, parse(spec))["image"]
    assert not found.disagreement
    assert f"{found.count.dense_flops / one:.{len(expected) - 2}f}" == expected


# --- adapters


def outputs(model):
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize("make", [lambda: vit(num_classes=5), lambda: clip().visual])
def test_adapters_train_travel_and_merge(make):
    (method,) = parse("layer_tune:lora=4,alpha=8,layers=2")
    assert method.phase == "both"
    plain, library = make(), make()
    keys = list(library.state_dict())
    expected = outputs(library)
    model, plan = planned(plain, canonical((method,)))
    assert (outputs(model) - expected).abs().max() < 1e-5  # B = 0
    blocks = plan.model.image.blocks
    adapters = [p for p in blocks.parameters() if p.requires_grad]
    linears = [(24, 72), (24, 24), (24, 96), (96, 24)]
    assert sum(p.numel() for p in adapters) == 2 * sum(4 * (a + b) for a, b in linears)
    before = {n: p.detach().clone() for n, p in blocks.named_parameters() if not p.requires_grad}
    for _ in range(2):  # A moves from the second step on
        step(model, lambda: model(IMAGES).square().sum(), lr=0.01)
    assert all(torch.equal(p, before[n]) for n, p in blocks.named_parameters() if n in before)
    learned = outputs(model)
    assert (learned - expected).abs().max() > 1e-3

    other = make()  # as arms.testing_model does it
    seen = view(other)
    method.edit_model(seen)
    state = trained_state(model)
    assert set(state) <= set(other.state_dict())
    other.load_state_dict(state, strict=False)
    assert torch.equal(outputs(other), learned)
    method.finish(seen, calibration())
    assert (outputs(other) - learned).abs().max() < 1e-4
    assert list(other.state_dict()) and sorted(other.state_dict()) == sorted(keys)
    fresh = make()
    fresh.load_state_dict(other.state_dict())
    assert (outputs(fresh) - learned).abs().max() < 1e-4
    assert not any("lora" in name or "peft" in vars(part) for name, part in other.named_modules())


def test_merged_adapters_cost_nothing_in_testing():
    test = Request("timm:test_vit")
    plain = count_towers(test)["image"].count.dense_flops
    assert count_towers(test, parse("layer_tune:lora=4"))["image"].count.dense_flops == plain
    assert count_towers(test, parse("layer_tune:lora=4,by=gradient"))["image"].count.dense_flops == plain


def test_adapters_leave_other_methods_layers_alone():
    model = vit()
    stack = parse("token_prune:at=1,keep=0.5,score=learned+layer_tune:at=1,lora=2")
    seen = view(model)
    for method in stack:
        method.edit_model(seen)
    plan = TrainingPlan(seen, [], [])
    for method in stack:
        method.edit_training(plan)
    plan.set_gradients()
    edit = {n for n, _ in model.named_parameters() if "token_edit" in n}
    assert edit and edit <= trained(model) and not any("lora" in n for n in edit)


def test_adapters_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="lora needs peft") as refused:
        planned(vit(), "layer_tune:lora=2")
    assert "effbench[lora]" in refused.value.hint


# --- chosen by scores


def outlier(by):
    """A model whose block 2 stands out by a criterion."""
    model = dual()
    block = model.image_encoder.trunk.blocks[2]
    with torch.no_grad():
        if by == "parameter_change":  # small weights change most for a step of AdamW
            for p in block.parameters():
                p.mul_(0.1)
        else:
            block.mlp.fc2.weight.mul_(300)
            block.attn.proj.weight.mul_(100)
    if by == "gradient":
        model = dual()
        for i in (0, 1, 3):  # layer scale that lets nothing through
            other = model.image_encoder.trunk.blocks[i]
            other.attn.proj.weight.data.zero_()
            other.mlp.fc2.weight.data.zero_()
    return model


@pytest.mark.parametrize("by", ["block_influence", "angular", "gradient", "parameter_change"])
def test_a_block_that_stands_out_is_chosen_and_the_model_stays_as_it_was(by):
    model = outlier(by).train()
    (method,) = parse(f"layer_tune:layers=1,by={by},images=2,stem=true")
    seen = view(model)
    before = copy.deepcopy(model.state_dict())
    settled = method.settle(seen, calibration())
    assert settled.at == (2,) and settled.stem
    assert parse(canonical((settled,))) == (settled,) and canonical((settled,)) == "layer_tune:at=2,stem=true"
    assert method.settle(seen, calibration()) == settled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
    assert settled.notes(seen) == [
        "trains what comes before the blocks, block 2 of the timm VisionTransformer, and what comes after the blocks"
    ]


def test_settled_choices_outlive_the_removal_of_blocks():
    (method,) = parse("layer_tune:by=top,layers=2")
    seen = view(vit())
    settled = method.settle(seen, calibration())
    assert canonical((settled,)) == "layer_tune:at=2/3"
    seen.image.keep_blocks((0, 3))
    assert "trains blocks 2, 3 of the" in settled.notes(seen)[0]


def test_parameter_change_takes_its_steps():
    seen, taken = view(dual()), []

    def batches():
        for _ in range(2):
            taken.append(1)
            yield IMAGES, TEXTS

    for spec, thrifty, steps in (("steps=5", False, 5), ("steps=5", True, 1)):
        taken.clear()
        (method,) = parse(f"layer_tune:by=parameter_change,images=32,{spec}")
        endless = CalibrationSet(batches, 32, lambda m, b: m(*b), lambda m, b: m.loss(*m(*b)), thrifty)
        method.settle(seen, endless)
        assert len(taken) == steps


def test_scores_of_the_text_tower():
    model = dual(text_layers=4)
    with torch.no_grad():
        model.text_encoder.transformer.resblocks[1].mlp.c_proj.weight.mul_(1000)
    (method,) = parse("layer_tune:by=block_influence,target=text,images=2,layers=1")
    assert method.settle(view(model), calibration()).at == (1,)


# --- what is refused


@pytest.mark.parametrize(
    "spec, message",
    [
        ("layer_tune:layers=5", "has 4 blocks"),
        ("layer_tune:layers=5,by=gradient,images=2", "has 4 blocks"),
        ("layer_tune:layers=2,share=0.5", "layers stands in place of share"),
        ("layer_tune:share=0", "share=0.0 is not valid"),
        ("layer_tune:at=4", "at=4, but this timm VisionTransformer has blocks 0 to 3"),
        ("layer_tune:at=2/2", "names a block twice"),
        ("layer_tune:by=list", "names no block"),
        ("layer_tune:by=uniform,at=1", "at says nothing with by=uniform"),
        ("layer_tune:by=top,at=1", "at says nothing with by=top"),
        ("layer_tune:at=1,layers=2", "layers says nothing with by=list"),
        ("layer_tune:by=head,share=0.5", "share says nothing with by=head"),
        ("layer_tune:by=bitfit,lora=2", "lora says nothing with by=bitfit"),
        ("layer_tune:images=3", "images says nothing with by=uniform"),
        ("layer_tune:by=gradient,steps=3", "steps says nothing with by=gradient"),
        ("layer_tune:by=head,stem=true", "its stem neither"),
        ("layer_tune:by=best", "by=best is not valid"),
        ("layer_tune:alpha=2", "there are none"),
        ("layer_tune:lora=25", "more than the width 24"),
        ("layer_tune:phase=test", "phase=test is not valid"),
        ("layer_tune:phase=both", "phase=both cannot be"),
        ("layer_tune:lora=2,phase=train", "phase=train cannot be"),
        ("quantize+layer_tune:lora=2", "layer_tune must stand before quantize"),
        ("layer_tune:target=decoder", "captioning"),
        ("layer_tune:target=vision", "target=vision is not valid"),
        ("layer_tune:target=text", "needs a text tower"),
        ("layer_tune:by=gradient", "needs 64 training images"),
    ],
)
def test_bad_parameters_are_refused(spec, message):
    with pytest.raises(UsageError, match=message) as refused:
        (method,) = parse(spec)
        planned(vit(), canonical((method.settle(view(vit()), calibration()),)))
    assert refused.value.hint


def test_a_locked_tower_is_refused():
    model = dual()
    with pytest.raises(UsageError, match="--train locked") as refused:
        planned(model, "layer_tune", locked=[model.image_encoder])
    assert "--train full" in refused.value.hint


def test_what_was_not_settled_is_not_trained():
    with pytest.raises(InvalidError, match="was not settled"):
        planned(vit(), "layer_tune:by=gradient")


def test_scores_that_are_not_finite_are_refused():
    model = dual()
    model.projection.weight.data.fill_(float("nan"))
    (method,) = parse("layer_tune:by=gradient,images=2")
    with pytest.raises(EffbenchError, match="not finite"):
        method.settle(view(model), calibration())


# --- end to end


def test_a_run(tmp_path):
    methods = ["layer_tune:at=1", "layer_tune:layers=2,by=gradient,lora=2,images=16", "layer_tune:by=head"]
    options = dict(backbone="timm:test_vit", weights="random", image_size=32, batch_size=8, epochs=1, train="full")
    found = effbench.run(
        [*methods, "layer_tune:at=1+random_token_drop"],
        data=flickr8k(tmp_path / "data"),
        out=tmp_path / "out",
        live=Live(Console(quiet=True)),
        **options,
        threads=1,
        timing_pairs=0,
        memory_runs=0,
        controls=(),
    )
    assert {arm.status for arm in found.arms} == {"ok"}
    baseline = found.baseline()
    one, scored, head = (found.arm(name) for name in methods)
    assert "image_encoder.trunk.blocks.1" in one.structure.trained_layers
    assert head.train_flops.dense < one.train_flops.dense < baseline.train_flops.dense
    assert head.trained_parameters < scored.trained_parameters < one.trained_parameters < baseline.trained_parameters
    assert any("lora_A" in layer for layer in scored.structure.trained_layers) and scored.phase == "both"
    assert scored.parameters == baseline.parameters and scored.test_flops.dense == baseline.test_flops.dense
    assert any("trains block 1 of the timm" in note for note in one.notes)
    assert any("adapters of rank 2" in note for note in scored.notes)
