"""layer_prune: which blocks go, that they are really gone, and what is refused."""

import copy
import pickle

import pytest
import tiny
import torch
from rich.console import Console
from tiny import IMAGES, clip, vit

import effbench
from effbench.arms import ArmPlan, plan_arms
from effbench.calibration_set import CalibrationSet, of_inputs
from effbench.errors import InvalidError, UsageError
from effbench.live import Live
from effbench.measure.flops import flops
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import generate
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.records import Captioning
from effbench.registry import methods
from effbench.spec import canonical, parse

LayerPrune = methods.get("layer_prune")
TEXTS = torch.tensor([[48, 3, 4, 49] + [0] * 8, [48, 5, 49] + [0] * 9])
PHOTOS = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def quiet(model, *numbers):
    """Let blocks of a model that is not wrapped yet give back what they take."""
    blocks = model.visual.transformer.resblocks if hasattr(model, "visual") else model.blocks
    for number in numbers:
        block = blocks[number]
        attention = block.attn.out_proj if hasattr(block.attn, "out_proj") else block.attn.proj
        for linear in (attention, [m for m in block.mlp.modules() if isinstance(m, torch.nn.Linear)][-1]):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    return model


def numbered(model):
    """Write its number into every block, to tell which are left."""
    seen = view(model)
    for tower in filter(None, (seen.image, seen.text)):
        for number, block in enumerate(tower.blocks):
            block.number = number
    return model


def left(model, name="image"):
    return [block.number for block in getattr(view(model), name).blocks]


def loose(depth=6):
    """A model whose blocks turn the tokens by about a tenth each, none of them like another."""
    model = vit(depth=depth)
    for block in model.blocks:
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.2)
    return model


@pytest.mark.parametrize("drop", [0, 1, 3])
@pytest.mark.parametrize("by", ["block_influence", "angular", "every_other", "random"])
def test_the_tower_is_one_of_fewer_blocks(drop, by):
    model = effbench.apply(vit(), f"layer_prune:drop={drop},by={by},images=20", PHOTOS)
    shorter = vit(depth=4 - drop)
    assert len(model.blocks) == 4 - drop
    assert flops(model, IMAGES).dense_flops == flops(shorter, IMAGES).dense_flops
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in shorter.parameters())
    assert list(model.state_dict()) == list(shorter.state_dict())  # keys count from 0 again
    shorter.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(IMAGES)
        assert (shorter(IMAGES) - expected).abs().max() < 1e-5
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)


@pytest.mark.parametrize("target, layers", [("tower", (2, 2)), ("text", (4, 1))])
def test_openclip_s_towers(target, layers):
    model = clip()
    drop = 2 if target == "tower" else 1
    effbench.apply(model, f"layer_prune:drop={drop},target={target},images=2", [(IMAGES, TEXTS)])
    torch.manual_seed(0)
    text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=layers[1])
    vision = dict(image_size=32, patch_size=8, width=24, head_width=8, layers=layers[0])
    shorter = tiny.open_clip.CLIP(16, vision, text).eval()
    shorter.load_state_dict(model.state_dict())  # strict: the same keys
    assert (model.visual.transformer.layers, model.transformer.layers) == layers
    with torch.no_grad():
        for found, expected in zip(model(IMAGES, TEXTS), shorter(IMAGES, TEXTS), strict=True):
            assert (found - expected).abs().max() < 1e-5
    assert flops(model, IMAGES, TEXTS).dense_flops == flops(shorter, IMAGES, TEXTS).dense_flops


@pytest.mark.parametrize("make", [loose, clip])
@pytest.mark.parametrize("by", ["block_influence", "angular"])
def test_blocks_that_do_nothing_go_and_nothing_changes(make, by):
    model = quiet(make(), 1, 2)
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
    numbered(model)
    calibration = PHOTOS if make is loose else [(IMAGES, TEXTS)]
    images = 20 if make is loose else 2
    effbench.apply(model, f"layer_prune:drop=2,by={by},images={images}", calibration)
    assert left(model) == [0, 3, 4, 5][: len(left(model))] and len(left(model)) in (2, 4)
    with torch.no_grad():
        assert (tower(IMAGES) - expected).abs().max() < 1e-6
    (note,) = methods.get("layer_prune")().notes(view(model))
    measure = "block influence (0.0000, 0.0000;" if by == "block_influence" else "angular distance (0.0000;"
    assert f"blocks 1, 2 of {len(left(model)) + 2} removed, of the least {measure}" in note


def test_influence_takes_blocks_apart_and_angular_takes_neighbours():
    for by, expected in (("block_influence", [1, 3, 4, 5]), ("angular", None)):
        model = numbered(quiet(loose(), 0, 2))
        effbench.apply(model, f"layer_prune:drop=2,by={by},images=20", PHOTOS)
        gone = sorted(set(range(6)) - set(left(model)))
        assert left(model) == expected if expected else gone[1] == gone[0] + 1


def test_every_other_goes_from_the_end_backwards_and_leaves_the_last():
    for drop, expected in ((1, [0, 1, 2, 3, 5]), (3, [1, 3, 5]), (4, [1, 3]), (5, [1])):
        assert left(effbench.apply(numbered(vit(depth=6)), f"layer_prune:drop={drop},by=every_other")) == expected


def test_named_blocks_go():
    model = effbench.apply(numbered(vit(depth=6)), "layer_prune:at=4/1")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert (compiled(IMAGES) - model(IMAGES)).abs().max() < 1e-5
    assert left(model) == [0, 2, 3, 5]
    assert LayerPrune(at=(4, 1)).notes(view(model)) == ["blocks 1, 4 of 6 removed, as named"]


def test_random_follows_the_seed_and_keeps_the_order():
    whole = numbered(vit(depth=6))

    def drawn(seed):
        torch.manual_seed(seed)
        return tuple(left(effbench.apply(copy.deepcopy(whole), "layer_prune:drop=3,by=random")))

    draws = {drawn(seed) for seed in range(8)}
    assert drawn(3) == drawn(3) and len(draws) > 3
    assert all(len(draw) == 3 and list(draw) == sorted(draw) for draw in draws)


def test_blocks_of_other_methods_stay_or_go_with_their_part():
    model = numbered(quiet(loose(), 1, 3))  # the two of least influence, of which one prunes tokens
    effbench.apply(model, "token_prune:keep=0.5,at=1+layer_prune:drop=2,images=20", PHOTOS)
    assert 1 in left(model) and 3 not in left(model) and len(left(model)) == 4
    assert sum(block.token_edit is not None for block in model.blocks) == 1

    model = numbered(quiet(loose(), 1, 3))
    effbench.apply(model, "token_merge:r=2+layer_prune:drop=2,images=20", PHOTOS)
    assert left(model) == [0, 2, 4, 5]
    (note,) = LayerPrune().notes(view(model))
    assert note.endswith("with them their part of token_merge")
    merged = effbench.apply(vit(depth=4), "token_merge:r=2")
    assert flops(model, IMAGES).dense_flops == flops(merged, IMAGES).dense_flops


def test_the_choice_of_settle_is_explicit_and_always_the_same():
    method = LayerPrune(drop=2, images=20, phase="both")
    found = []
    for _ in range(2):
        model = quiet(loose(), 1, 3)
        seen = view(model)
        settled = method.settle(seen, of_inputs(PHOTOS))
        assert len(model.blocks) == 6  # it looks, and removes nothing
        assert parse(canonical((settled,))) == (settled,) and settled.settle(seen, of_inputs(None)) is settled
        settled.edit_model(seen)
        settled.finish(seen, of_inputs(None))
        assert len(model.blocks) == 4
        found.append(canonical((settled,)))
    assert found == ["layer_prune:at=1/3,phase=both"] * 2
    with pytest.raises(InvalidError, match="not chosen yet"):
        method.edit_model(view(vit()))


def test_phase_both_trains_and_tests_the_same_structure(tmp_path, monkeypatch):
    from effbench import experiment

    built = dict(training_model=[], testing_model=[])

    def watch(name):
        make = getattr(experiment, name)

        def made(plan, *rest):
            model = make(plan, *rest)
            if plan.name.endswith("images=8,phase=both") and plan.methods[0].at:
                built[name].append(model[0] if isinstance(model, tuple) else model)
            return model

        monkeypatch.setattr(experiment, name, made)

    for name in built:
        watch(name)
    specs = ["layer_prune:drop=2,images=8,phase=both", "layer_prune:drop=2,images=8"]
    small = dict(backbone="timm:test_vit", weights="random", image_size=32, batch_size=8, epochs=1, timing_pairs=0)
    small |= dict(train="full", threads=1, memory_runs=0, live=Live(Console(quiet=True)), controls=("random",))
    found = effbench.run(specs, data=tiny.flickr8k(tmp_path), out=tmp_path / "out", **small)

    (both, after), baseline = map(found.arm, specs), found.baseline()
    assert both.status == after.status == "ok"
    assert both.test_flops.dense == after.test_flops.dense < baseline.test_flops.dense
    assert both.parameters == after.parameters < baseline.parameters
    assert "as chosen before training" in both.notes[0] and "of the least block influence" in after.notes[0]
    assert both.train_time.settle > 0 and after.train_time is None
    (tested,), trained = built["testing_model"], [model.state_dict() for model in built["training_model"]]
    state = tested.state_dict()
    assert all(weights.keys() == state.keys() for weights in trained)
    # one of them was trained, the others were only checked and counted
    assert any(all(torch.equal(weights[key], value) for key, value in state.items()) for weights in trained)

    blind = [arm for arm in found.arms if arm.control == "random"]
    assert {arm.name for arm in blind} == {"layer_prune:drop=2,by=random,phase=both", "layer_prune:drop=2,by=random"}
    assert all(arm.status == "ok" and arm.parameters == both.parameters for arm in blind)


def test_the_control_is_as_many_blocks_chosen_blindly():
    assert LayerPrune(drop=2, by="angular", images=9).controls() == {"random": LayerPrune(drop=2, by="random")}
    text = LayerPrune(at=(1, 2, 4, 5), target="text", phase="both").controls()
    assert text == {"random": LayerPrune(drop=4, by="random", target="text", phase="both")}
    assert LayerPrune(drop=0).controls() == {}
    arms = plan_arms([parse("layer_prune:drop=2"), parse("layer_prune:drop=2,by=angular")])
    (control,) = [arm for arm in arms if arm.control == "random"]
    assert isinstance(control, ArmPlan) and control.name == "layer_prune:drop=2,by=random"
    assert control.controls_for == ("layer_prune:drop=2", "layer_prune:drop=2,by=angular")


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("layer_prune:drop=4", "4 of the 4 blocks of timm VisionTransformer would leave none", "0 to 3"),
        ("layer_prune:drop=9", "9 of the 4 blocks", "0 to 3"),
        ("layer_prune:at=0/1/2/3", "4 of the 4 blocks", "0 to 3"),
        ("layer_prune:drop=-1", "drop=-1 is not valid", ""),
        ("layer_prune:at=1/4", "block 4 does not exist: .* blocks 0 to 3", "at="),
        ("layer_prune:at=1/-1", "at=1/-1 is not valid", ""),
        ("layer_prune:at=1/1", "names a block twice", "once"),
        ("layer_prune:at=1,by=angular", "that by=angular would choose", "one of them"),
        ("layer_prune:at=1,drop=2", "names 1 blocks, not drop=2", "leave drop out"),
        ("layer_prune:by=best", "by=best is not valid", ""),
        ("layer_prune:drop=1,phase=train", "phase=train is not valid", ""),
        (
            "layer_prune:drop=1,images=21",
            "layer_prune: images=21 needs 21 training images .* there are 20",
            "images=20",
        ),
        ("layer_prune:drop=1,target=text", "target=text needs a text tower", "target=tower"),
        ("layer_prune:drop=1,target=decoder", "target=decoder needs a decoder", "task, one that writes captions"),
        ("layer_prune:at=1+token_prune:at=1", "layer_prune and token_prune conflict: .* block 1", "at="),
        ("token_prune:at=0/1/2+layer_prune:drop=2,images=2", "token_prune acts in stay; 1 of 4 are free", "drop=1"),
        ("token_prune:at=1+layer_prune:drop=3,by=angular,images=2", "finds no 3 blocks in a row", "smaller drop"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_is_removed(spec, message, hint):
    model = vit()
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(model, spec, PHOTOS)
    assert hint in refused.value.hint and len(model.blocks) == 4


def test_without_calibration_data_only_choices_that_look_at_none_are_taken():
    with pytest.raises(UsageError, match="there are none"):
        effbench.apply(vit(), "layer_prune:drop=1")
    with pytest.raises(UsageError, match="never reaches the OpenCLIP text tower"):
        effbench.apply(clip(), "layer_prune:drop=1,target=text,images=2", IMAGES)
    for spec in ("layer_prune:at=1", "layer_prune:drop=1,by=every_other", "layer_prune:drop=1,by=random"):
        assert len(effbench.apply(vit(), spec).blocks) == 3


def captioner(layers=6):
    tower = TimmTokens(vit())  # which seeds
    decoder = language.tiny(50, layers, 32)
    for layer in decoder.body.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.2)
    return Captioner(tower, PooledLinear(24, 32, 2), decoder, (), (49,), 49, Captioning()).eval()


def caption_loss(model, batch):
    tokens, images = batch
    prefix = model.prefix(model.features(images))
    return model.loss(prefix, tokens, torch.where(tokens > 0, tokens, IGNORE))


CAPTIONS = CalibrationSet(
    lambda: iter([(torch.tensor([[3, 4, 5, 6, 49, 0], [7, 8, 49, 0, 0, 0]]), IMAGES)]), 64, caption_loss, caption_loss
)


def pruned(model, method):
    """The model after a method, and which layers of its decoder are left."""
    for number, layer in enumerate(model.language.body.layers):
        layer.number = number
    seen = view(model)
    if method.phase == "both":
        method = method.settle(seen, CAPTIONS)
    method.edit_model(seen)
    method.finish(seen, CAPTIONS)
    return model, [layer.number for layer in model.language.body.layers]


@torch.no_grad()
def write(model, cached=True):
    prefix = model.prefix(model.features(IMAGES))
    return generate(model.language, prefix, 6, 49, exactly=True, cached=cached)


@pytest.mark.parametrize("phase", ["test", "both"])
@pytest.mark.parametrize("by", ["block_influence", "angular", "every_other", "random"])
def test_a_captioner_loses_layers_of_its_decoder(by, phase):
    whole = captioner()
    with torch.no_grad():
        tower = view(copy.deepcopy(whole)).model.features(IMAGES)
    model, left = pruned(copy.deepcopy(whole), LayerPrune(drop=2, by=by, phase=phase))  # no target is named
    assert len(left) == len(model.language.body.layers) == 4 and len(model.image_encoder.trunk.blocks) == 4
    (note,) = LayerPrune().notes(view(model))
    assert note.startswith("layers ") and " of 6 of the decoder removed, " in note

    shorter = captioner(layers=4)
    shorter.load_state_dict(model.state_dict())  # strict: the same keys
    view(shorter)
    ids, held = write(model)
    assert torch.equal(ids, write(shorter)[0]) and held == write(shorter)[1] and held * 6 == write(whole)[1] * 4
    assert torch.equal(ids, write(model, cached=False)[0])
    with torch.no_grad():
        assert torch.equal(
            caption_loss(model, next(CAPTIONS._batches())), caption_loss(shorter, next(CAPTIONS._batches()))
        )
        assert torch.equal(model.features(IMAGES), tower)  # the image tower is as it was


def test_decoder_layers_that_do_nothing_go_and_nothing_changes():
    batch = next(CAPTIONS._batches())
    for by, still in (("block_influence", (1, 4)), ("angular", (3, 4))):
        model = captioner()
        for layer in (model.language.body.layers[i] for i in still):
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        with torch.no_grad():
            before = caption_loss(model, batch)
            model, left = pruned(model, LayerPrune(drop=2, by=by))
            assert left == [i for i in range(6) if i not in still]
            assert (caption_loss(model, batch) - before).abs() < 1e-5


def test_without_a_layer_to_drop_the_decoder_is_the_same_bit_for_bit():
    whole = captioner()
    view(whole)
    for phase in ("test", "both"):
        model, left = pruned(copy.deepcopy(whole), LayerPrune(drop=0, phase=phase))
        assert left == list(range(6)) and LayerPrune().notes(view(model)) == []
        with torch.no_grad():
            prefix = whole.prefix(whole.features(IMAGES))
            assert torch.equal(model.language(prefix), whole.language(prefix))
        assert torch.equal(write(model)[0], write(whole)[0])


def test_of_a_captioner_the_tower_or_named_layers_go_where_that_is_said():
    model, left = pruned(captioner(), LayerPrune(drop=1, target="tower"))
    assert len(left) == 6 and len(model.image_encoder.trunk.blocks) == 3
    assert LayerPrune(target="tower").notes(view(model))[0].startswith("block ")
    assert LayerPrune().notes(view(model)) == []
    assert pruned(captioner(), LayerPrune(at=(5, 0), target="decoder"))[1] == [1, 2, 3, 4]
    assert pruned(captioner(), LayerPrune(drop=3, by="every_other"))[1] == [1, 3, 5]
    settled = LayerPrune(drop=2, phase="both").settle(view(captioner()), CAPTIONS)
    assert parse(canonical((settled,))) == (settled,) and len(settled.at) == 2 and settled.target is None
    decoder = LayerPrune(drop=2, target="decoder").controls()["random"]
    assert canonical((decoder,)) == "layer_prune:drop=2,by=random,target=decoder"


@pytest.mark.parametrize(
    "options, message, hint",
    [
        (dict(drop=6), "6 of the 6 layers of LlamaModel would leave none", "0 to 5"),
        (dict(at=(2, 6)), "layer 6 does not exist: LlamaModel has layers 0 to 5", "choose other layers"),
        (dict(drop=1, target="text"), "target=text needs a text tower", "target=tower"),
        (dict(drop=1, images=65), "images=65 needs 65 training images .* there are 64", "images=64"),
    ],
)
def test_what_does_not_fit_a_decoder_is_refused_and_nothing_is_removed(options, message, hint):
    model = captioner()
    with pytest.raises(UsageError, match=message) as refused:
        pruned(model, LayerPrune(**options))
    assert hint in refused.value.hint and len(model.language.body.layers) == 6


def test_before_training_it_stands_before_methods_that_name_blocks():
    model = vit()
    effbench.apply(model, "token_prune:keep=0.5,at=1")
    with pytest.raises(UsageError, match="must stand before token_prune"):
        LayerPrune(at=(0,), phase="both").edit_model(view(model))
    assert "layer_tune" in LayerPrune(phase="both").goes_before and "layer_tune" not in LayerPrune().goes_before
