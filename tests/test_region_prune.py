"""region_prune: which layers are the region, which go, that they are gone, and what is refused."""

import types
from dataclasses import dataclass, replace
from functools import partial

import pytest
import tiny
import torch

import effbench
from effbench import arms
from effbench.arms import ArmPlan, judges, plan_arms, settled, trained_state, training_model, try_out
from effbench.calibration_set import CalibrationSet
from effbench.errors import UsageError
from effbench.method import Method
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import generate
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.records import Captioning
from effbench.registry import methods
from effbench.spec import canonical, parse

RegionPrune = methods.get("region_prune")
LAYERS = 8
PROTOCOL = types.SimpleNamespace(device="cpu", train="locked")
TOKENS = torch.tensor([[3, 4, 5, 6, 49, 0], [7, 8, 49, 0, 0, 0]])
BATCH = dict(tokens=TOKENS, target=torch.where(TOKENS > 0, TOKENS, IGNORE), image=tiny.IMAGES)


class Task:
    """As much of a captioning task as an arm's model needs."""

    def build(self, *_):
        with torch.random.fork_rng(devices=[]):
            tower = TimmTokens(tiny.vit())  # which seeds
            decoder = language.tiny(50, LAYERS, 32)
            return Captioner(tower, PooledLinear(24, 32, 2), decoder, (), (49,), 49, Captioning()).eval()

    def locked(self, model):
        return [model.image_encoder]

    def loss(self, model, batch):
        return model.loss(model.prefix(model.features(batch["image"])), batch["tokens"], batch["target"])

    observe = loss


CALIBRATION = CalibrationSet(lambda: iter([BATCH]), 64, Task().observe, Task().loss)
ARM = (Task(), None, None, PROTOCOL)


class Only(Method):
    """Trains some layers of the decoder and the connector."""

    default_phase = "train"
    trained = (1, 4)

    def edit_training(self, plan):
        blocks = plan.model.decoder.blocks
        plan.frozen += [block for i, block in enumerate(blocks) if i not in self.trained]


def only(*layers):
    return type("Only", (Only,), dict(trained=layers))()


def pruned(*stack, state=None, seed=0):
    """The model that a stack is tested with; by default with the weights that an arm of it, or the baseline, trains."""
    plan = ArmPlan("stack", stack)
    trains = plan if plan.during("train", "both") else ArmPlan("baseline", kind="baseline")
    state = trained_state(training_model(trains, *ARM)[0]) if state is None else state
    torch.manual_seed(seed)
    return arms.testing_model(plan, *ARM, state, CALIBRATION)


def numbers(model):
    """Which layers of a fresh model are left, by their weights."""
    fresh = [block.mlp.down_proj.weight for block in Task().build().language.body.layers]
    left = [block.mlp.down_proj.weight for block in model.language.body.layers]
    return [next(i for i, weight in enumerate(fresh) if torch.equal(weight, mine)) for mine in left]


@pytest.fixture
def distances(monkeypatch):
    """Distances that the method is told, and what it asked for."""
    told, asked = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.01, 0.6, 0.02, 0.15]), []

    def measured(*given):
        asked.append(given)
        return told

    monkeypatch.setitem(RegionPrune.finish.__globals__, "angular_distance", measured)
    return asked


def test_the_layers_of_least_distance_outside_the_tuned_ones_go(distances):
    model = pruned(only(1, 4), RegionPrune(drop=2))
    assert numbers(model) == [0, 1, 2, 4, 5, 7]  # 4 turns least, and was tuned
    assert [asked[3:] for asked in distances] == [(64, 1)] and len(distances[0][0]) == 6  # layer by layer
    assert RegionPrune(drop=2).notes(view(model)) == [
        "layers 3, 6 of 8 of the decoder removed (angular distance 0.0500, 0.0200; the others outside 0.1000 to "
        "0.6000; inside 0.0100 to 0.2000), outside the tuned layers 1, 4"
    ]
    model = pruned(only(5), RegionPrune(drop=7))
    assert numbers(model) == [5]
    (note,) = RegionPrune().notes(view(model))
    assert note.endswith("; all that lie outside; inside 0.6000), outside the tuned layer 5")


def test_after_full_training_the_region_is_that_of_the_parameters(distances):
    for options, kept in (
        (dict(), [0, 1, 2, 5, 6, 7]),  # uniform 25 %: layers 0 and 6
        (dict(layers=4, by="top"), [1, 2, 4, 5, 6, 7]),
        (dict(at=(6, 3)), [1, 2, 3, 5, 6, 7]),
    ):
        model = pruned(RegionPrune(drop=2, **options))
        assert numbers(model) == kept, options
        (note,) = RegionPrune().notes(view(model))
        assert "(all layers were tuned)" in note
    model = pruned(RegionPrune(drop=1), state={})
    assert numbers(model) == [0, 1, 2, 3, 5, 6, 7]
    assert RegionPrune().notes(view(model))[0].endswith("outside the region of layers 0, 6")
    model = pruned(only(), RegionPrune(drop=1))  # the connector alone was trained
    assert numbers(model) == [0, 1, 2, 3, 5, 6, 7]
    assert RegionPrune().notes(view(model))[0].endswith("(no layer was tuned)")
    model = pruned(only(1, 2), RegionPrune(drop=1, at=(4, 6)))  # what was tuned counts
    assert numbers(model) == [0, 1, 2, 3, 5, 6, 7]


def test_with_layer_tune_the_tuned_layers_stay(distances):
    for spec, kept in (
        ("layer_tune:at=2/5,target=decoder+region_prune:drop=4", [1, 2, 5, 7]),
        ("layer_tune:at=4/6,lora=2,target=decoder+region_prune:drop=2", [1, 2, 4, 5, 6, 7]),
    ):
        stack = parse(spec)
        chosen = settled(ArmPlan("stack", stack), *ARM, CALIBRATION).methods
        assert numbers(pruned(*chosen)) == kept


def test_what_is_left_is_the_model_of_these_layers_and_writes_with_a_cache():
    model, whole = pruned(only(1, 4), RegionPrune(drop=3)), Task().build()
    kept = numbers(model)
    assert len(kept) == 5 and {1, 4} <= set(kept)
    decoder = language.tiny(50, 5, 32)
    decoder.body.embed_tokens, decoder.body.norm, decoder.head = (
        whole.language.body.embed_tokens,
        whole.language.body.norm,
        whole.language.head,
    )
    for own, i in zip(decoder.body.layers, kept, strict=True):
        own.load_state_dict(whole.language.body.layers[i].state_dict())
    with torch.no_grad():
        prefix = model.prefix(model.features(tiny.IMAGES))
        assert torch.equal(decoder.eval()(prefix), model.language(prefix))
        write = partial(generate, model.language, prefix, 6, 49, exactly=True)
        (ids, held), (_, full) = write(), generate(whole.language, prefix, 6, 49, exactly=True)
        assert torch.equal(ids, write(cached=False)[0]) and held * LAYERS == full * 5


def test_a_layer_that_does_nothing_goes_and_nothing_changes():
    class Quiet(Task):
        def build(self, *_):
            model = super().build()
            for layer in (model.language.body.layers[i] for i in (2, 6)):
                torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
                torch.nn.init.zeros_(layer.mlp.down_proj.weight)
            return model

    task = Quiet()
    plan = ArmPlan("stack", (only(0, 6), RegionPrune(drop=1)))
    arm = (task, None, None, PROTOCOL)
    model = arms.testing_model(plan, *arm, trained_state(training_model(plan, *arm)[0]), CALIBRATION)
    assert "layer 2 of 8 of the decoder removed (angular distance 0.0000;" in RegionPrune().notes(view(model))[0]
    with torch.no_grad():
        assert (task.loss(model, BATCH) - task.loss(task.build(), BATCH)).abs() < 1e-5


def test_no_layer_to_drop_changes_no_bit():
    model, baseline = pruned(RegionPrune(drop=0)), pruned()
    with torch.no_grad():
        prefix = baseline.prefix(baseline.features(tiny.IMAGES))
        assert torch.equal(model.language(prefix), baseline.language(prefix))
        assert torch.equal(generate(model.language, prefix, 5, 49)[0], generate(baseline.language, prefix, 5, 49)[0])
    assert RegionPrune(drop=0).notes(view(model)) == [] and RegionPrune(drop=0).controls() == {}


def test_the_control_removes_as_many_outside_the_region_blindly():
    method = RegionPrune(drop=3, layers=3, by="bottom", images=32)
    (blind,) = method.controls().values()
    assert canonical((blind,)) == "region_prune:drop=3,criterion=random,layers=3,by=bottom"
    drawn = [tuple(numbers(pruned(only(1, 4), blind, seed=seed))) for seed in range(6)]
    assert len(set(drawn)) > 2 and tuple(numbers(pruned(only(1, 4), blind, seed=0))) == drawn[0]
    assert all(len(left) == 5 and {1, 4} <= set(left) and list(left) == sorted(left) for left in drawn)
    stack = parse("layer_tune:layers=2,target=decoder+region_prune:drop=1")
    found = judges(stack)
    assert (parse("region_prune:drop=1"))[0] in [each[0] for each in found["part"]]
    assert [canonical(each) for each in found["random"]] == [canonical(stack) + ",criterion=random"]
    assert "region_prune:drop=1" in {arm.name for arm in plan_arms([stack])}


def test_what_training_changed_is_known_by_name():
    seen = []

    @dataclass(frozen=True)
    class Look(Method):
        def finish(self, model, calibration):
            seen.append(model.trained)

    pruned(only(3), Look())
    names = set(Task().build().language.body.layers[3].state_dict())
    in_layers = {name for name in seen[0] if ".layers." in name}
    assert in_layers == {f"language.body.layers.3.{name}" for name in names}
    assert "connector.proj.weight" in seen[0] and not [name for name in seen[0] if name.startswith("image_encoder")]
    pruned(Look())  # the baseline's
    assert set(seen[1]) >= seen[0] and len({n.split(".")[3] for n in seen[1] if ".layers." in n}) == LAYERS
    pruned(Look(), state={})
    assert seen[2] is None and view(Task().build()).trained is None


@pytest.mark.parametrize(
    "method, message, hint",
    [
        (
            RegionPrune(drop=7),
            "drop=7, but 6 of the 8 layers of LlamaModel lie outside the region of layers 0, 6",
            "drop=6",
        ),
        (RegionPrune(drop=1, share=1.0), "drop=1, but 0 of the 8 layers", "smaller region"),
        (RegionPrune(drop=1, at=(2, 8)), "layer 8 does not exist: LlamaModel has layers 0 to 7", "at="),
        (RegionPrune(drop=1, layers=9), "layers=9, but this LlamaModel has 8 layers", "1 to 8"),
        (RegionPrune(drop=1, images=65), "images=65 needs 65 training images .* there are 64", "images=64"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(method, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        try_out(ArmPlan("arm", (method,)), *ARM, CALIBRATION)
    assert hint in refused.value.hint


def test_more_layers_than_training_leaves_outside_are_refused_before_any_work():
    stack = (only(*range(6)), RegionPrune(drop=3))
    with pytest.raises(UsageError, match="drop=3, but 2 of the 8 layers .* outside the tuned layers 0, 1, 2, 3, 4, 5"):
        try_out(ArmPlan("arm", stack), *ARM, CALIBRATION)
    try_out(ArmPlan("arm", (stack[0], replace(stack[1], drop=2))), *ARM, CALIBRATION)
    try_out(ArmPlan("arm", (only(3), RegionPrune(drop=7))), *ARM, CALIBRATION)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("region_prune:drop=-1", "drop=-1 is not valid"),
        ("region_prune:by=full", "by=full is not valid"),
        ("region_prune:criterion=best", "criterion=best is not valid"),
        ("region_prune:share=0", "share=0.0 is not valid"),
        ("region_prune:at=1/1", "names a layer twice"),
        ("region_prune:layers=2,share=0.5", "layers stands in place of share"),
        ("region_prune:at=1,by=top", "at= stands in place of"),
        ("region_prune:phase=train", "phase=train is not valid"),
        ("quantize+region_prune", "region_prune must stand before quantize"),
        ("layer_prune:target=decoder+region_prune", "layer_prune and region_prune conflict"),
        ("region_prune+layer_prune", "region_prune and layer_prune conflict"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        parse(spec)


def test_other_specs_stand_beside_it():
    for spec in ("layer_prune:target=tower+region_prune", "region_prune:at=0/3+quantize", "token_merge+region_prune"):
        assert parse(canonical(parse(spec))) == parse(spec)


@pytest.mark.parametrize("make", [tiny.vit, tiny.clip])
def test_a_model_without_a_decoder_is_refused(make):
    for drop in (0, 1):
        with pytest.raises(UsageError, match="region_prune needs a language decoder") as refused:
            effbench.apply(make(), f"region_prune:drop={drop}", tiny.IMAGES)
        assert "layer_prune" in refused.value.hint
