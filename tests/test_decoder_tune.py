"""layer_tune in a captioner's decoder: what is trained, what it costs, LISA, adapters, scores, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import clip, vit
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from effbench import records
from effbench.arms import ArmPlan, trained_state, try_out
from effbench.calibration_set import CalibrationSet
from effbench.engine import Plain
from effbench.errors import UsageError
from effbench.lockstep import Arm
from effbench.measure.flops import flops_of
from effbench.method import TrainingPlan
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.spec import canonical, parse
from effbench_methods._tuned_parts import stem
from effbench_methods.algorithms.decoder_importance import image_attention, multimodal_influence
from effbench_methods.algorithms.layer_choice import by_place
from effbench_methods.algorithms.layer_importance import angular_distance, block_influence
from effbench_methods.algorithms.lisa import drawn

FEATURES = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 49], [10, 11, 49, 0, 0, 0], [12, 13, 14, 49, 0, 0]])
TARGET = TOKENS.masked_fill(TOKENS == 0, IGNORE)
BATCH = dict(features=FEATURES, tokens=TOKENS, target=TARGET)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def captioner(layers=4, width=32, words=50, decoder=None, connector=None):
    torch.manual_seed(0)
    decoder = decoder or language.tiny(words=words, layers=layers, width=width)
    connector = connector or PooledLinear(24, decoder.width, 2)
    return Captioner(TimmTokens(vit()), connector, decoder, (), (49,), 49, records.Captioning())


def gpt2():
    """Its head is its token embedding, and its linear layers are transformers' Conv1D."""
    torch.manual_seed(1)
    size = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return Language(model.get_decoder(), model.get_output_embeddings())


def loss_of(model, batch=BATCH):
    return model.loss(model.prefix(batch["features"]), batch["tokens"], batch["target"])


def planned(model, spec, locked=True):
    """The view and the plan of a model that is trained as the spec says."""
    (method,) = parse(spec)
    seen = view(model)
    method.edit_model(seen)
    plan = TrainingPlan(seen, [model.image_encoder] if locked else [], [])
    method.edit_training(plan)
    plan.set_gradients()
    return plan


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def calibration(batches=(BATCH,), available=64):
    return CalibrationSet(lambda: iter(batches), available, loss_of, loss_of)


def settled(model, spec, **more):
    (method,) = parse(spec)
    return method.settle(view(model), calibration(**more))


# --- which layers


@pytest.mark.parametrize(
    "strategy, layers, k, expected",
    [
        ("mid_bottom", 32, 8, tuple(range(8, 16))),
        ("mid_top", 32, 8, tuple(range(16, 24))),
        ("mid_bottom", 8, 2, (2, 3)),
        ("mid_top", 8, 2, (4, 5)),
        ("mid_top", 8, 6, (2, 3, 4, 5, 6, 7)),
    ],
)
def test_consecutive_layers_start_at_a_quarter_and_at_half_of_the_depth(strategy, layers, k, expected):
    assert by_place(strategy, layers, k) == expected


def test_a_choice_settles_to_its_layers_under_one_name():
    for spec in ("layer_tune:layers=2", "layer_tune:layers=2,target=decoder"):
        assert canonical((settled(captioner(), spec),)) == "layer_tune:at=0/2"
    assert canonical((settled(captioner(), "layer_tune:layers=2,target=tower"),)) == "layer_tune:at=0/2,target=tower"
    one = settled(captioner(8), "layer_tune:by=mid_top,connector=false,lora=2")
    assert canonical((one,)) == "layer_tune:at=4/5,connector=false,lora=2" and parse(canonical((one,))) == (one,)
    for spec in ("layer_tune:by=lisa,stem=true", "layer_tune:by=lisa,connector=true"):
        assert canonical(parse(spec)) == "layer_tune:by=lisa"
    aligner = parse("layer_tune:layers=1,target=tower")[0].settle(view(clip()), calibration())
    assert canonical((aligner,)) == "layer_tune:at=0"


# --- what is trained

LAYER = "language.body.layers.{}."
CONNECTOR, STEM = {"connector.proj.weight", "connector.proj.bias"}, {"language.body.embed_tokens.weight"}
AFTER = {"language.body.norm.weight", "language.head.weight"}


@pytest.mark.parametrize(
    "spec, layers, more",
    [
        ("layer_tune", (0,), CONNECTOR | AFTER),
        ("layer_tune:by=top,layers=2", (2, 3), CONNECTOR | AFTER),
        ("layer_tune:by=top,layers=2,connector=false", (2, 3), AFTER),
        ("layer_tune:at=1,stem=true", (1,), CONNECTOR | AFTER | STEM),
        ("layer_tune:by=full", (0, 1, 2, 3), CONNECTOR | AFTER | STEM),
        ("layer_tune:by=lisa", (0, 1, 2, 3), CONNECTOR | AFTER | STEM),
        ("layer_tune:by=head", (), CONNECTOR | AFTER),
        ("layer_tune:by=frozen", (), CONNECTOR),
    ],
)
def test_what_is_trained_beside_a_locked_tower(spec, layers, more):
    model = captioner()
    planned(model, spec)
    chosen = tuple(LAYER.format(i) for i in layers)
    assert trained(model) == {n for n, _ in model.named_parameters() if chosen and n.startswith(chosen)} | more


def test_an_unlocked_tower_is_trained_too_and_norms_alone_can_be():
    model = captioner()
    planned(model, "layer_tune:by=frozen", locked=False)
    tower = {n for n, _ in model.named_parameters() if n.startswith("image_encoder.")}
    assert tower and trained(model) == tower | CONNECTOR
    model = captioner()
    planned(model, "layer_tune:by=layernorm")
    norms = {f"language.body.layers.{i}.{n}_layernorm.weight" for i in range(4) for n in ("input", "post_attention")}
    assert trained(model) == norms | CONNECTOR | AFTER


def test_training_changes_what_is_trained_and_nothing_else():
    model = captioner()
    planned(model, "layer_tune:at=1/3")
    names, before = trained(model), copy.deepcopy(model.state_dict())
    updates = Plain(model, records.Protocol())
    updates.backward(loss_of(model))
    updates.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == names
    assert len(updates.optimiser.state) == len(names)


def losses(model, steps=3):
    updates = Plain(model, records.Protocol())
    found = []
    for _ in range(steps):
        found.append(loss_of(model))
        updates.backward(found[-1])
        updates.step()
    return [value.item() for value in found]


def test_full_trains_as_the_baseline_does_to_the_bit():
    plain, full, some = captioner(), captioner(), captioner()
    plain.image_encoder.requires_grad_(False)
    planned(full, "layer_tune:by=full")
    planned(some, "layer_tune")
    expected = losses(plain)
    assert losses(full) == expected != losses(some)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), full.parameters(), strict=True))


def test_the_gradient_stops_below_the_lowest_trained_layer():
    model = captioner()
    plan = planned(model, "layer_tune:by=top,layers=1,connector=false")
    asked = []
    with plan.model.decoder.seeing(lambda depth, tokens: asked.append(tokens.requires_grad)):
        loss_of(model).backward()
    assert asked == [False, False, False, False, True]
    assert not model.prefix(FEATURES).requires_grad


# --- what it costs


def formula(model, batch, chosen, connector):
    """(forward, D, w) in FLOPs: of a captioner with a Llama, counted from the shapes of its matrices."""
    body = model.language.body
    images, image, _ = batch["features"].shape
    text = batch["tokens"].shape[1]
    tokens, width = image + text, body.config.hidden_size  # start and text without its last token, behind the image
    inner, vocabulary = body.config.intermediate_size, model.language.head.out_features
    linear = 2 * images * tokens * (4 * width**2 + 3 * width * inner)
    attention = 2 * 2 * images * tokens**2 * width
    head = 2 * images * text * width * vocabulary
    joint = 2 * images * image * batch["features"].shape[2] * width
    layers = len(body.layers)
    above = layers if connector else layers - min(chosen)
    forward = layers * (linear + attention) + head + joint
    down = above * (linear + 2 * attention) + head  # attention multiplies two activations, each with a gradient
    weights = len(chosen) * linear + head + connector * joint
    return forward, down, weights


@pytest.mark.parametrize(
    "spec, chosen, connector",
    [
        ("layer_tune:by=full", tuple(range(8)), True),
        ("layer_tune", (0, 6), True),
        ("layer_tune:by=lisa", (0, 1), True),
        ("layer_tune:by=top,connector=false", (6, 7), False),
        ("layer_tune:by=frozen", (), True),
    ],
)
def test_a_step_costs_one_forward_pass_and_depth_and_weights(spec, chosen, connector):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 90, (4, 12), generator=generator)
    batch = dict(features=torch.randn(4, 16, 24, generator=generator), tokens=tokens, target=tokens)
    model = captioner(layers=8, width=64, words=100, connector=PooledLinear(24, 64, None))
    planned(model, spec)
    forward, down, weights = formula(model, batch, chosen, connector)
    if spec.endswith("frozen"):
        weights -= 2 * 4 * 12 * 64 * 100  # the head's
    count = flops_of(lambda: loss_of(model, batch).backward(), model)
    assert count.complete
    assert count.dense_flops == pytest.approx(forward + down + weights, rel=0.005)


# --- LISA


def lisa_steps(model, plan, updates, steps, total, see=lambda: None):
    for index in steps:
        for call in plan.each_step:
            call(index / total)
        updates.backward(loss_of(model))
        updates.step()
        see()


def test_lisa_trains_other_layers_now_and_then_and_embeddings_always():
    torch.manual_seed(0)
    model = captioner()
    plan = planned(model, "layer_tune:by=lisa,layers=2,draws=3")
    names, body = trained(model), model.language.body
    updates, moved = Plain(model, records.Protocol()), []
    state = {"last": copy.deepcopy(model.state_dict())}

    def see():
        now = model.state_dict()
        changed = {n for n, _ in model.named_parameters() if not torch.equal(now[n], state["last"][n])}
        layers = tuple(i for i in range(4) if LAYER.format(i) + "mlp.up_proj.weight" in changed)
        in_layers = {n for n in changed if n.startswith("language.body.layers.")}
        assert in_layers == {n for i in layers for n in names if n.startswith(LAYER.format(i))}  # others not decayed
        assert changed - in_layers == CONNECTOR | AFTER | STEM
        assert [p.grad is None for p in body.layers.parameters()] == [
            i not in layers for i, layer in enumerate(body.layers) for _ in layer.parameters()
        ]
        assert trained(model) == names  # what reads the weights between two steps sees them all
        moved.append(layers)
        state["last"] = copy.deepcopy(now)

    lisa_steps(model, plan, updates, range(6), 6, see)
    assert moved == [drawn(4, 2, 0, i) for i in (0, 0, 1, 1, 2, 2)] and len(set(moved)) > 1
    assert set(trained_state(model)) >= names


def test_lisa_resumes_to_the_bit_and_other_seeds_draw_otherwise():
    def started(seed):
        model = captioner()
        torch.manual_seed(seed)
        return model, planned(model, "layer_tune:by=lisa,layers=1,draws=6")

    whole, plan = started(3)
    lisa_steps(whole, plan, Plain(whole, records.Protocol()), range(6), 6)
    first, plan = started(3)
    updates = Plain(first, records.Protocol())
    lisa_steps(first, plan, updates, range(3), 6)
    second, plan = started(3)
    second.load_state_dict(trained_state(first), strict=False)
    resumed = Plain(second, records.Protocol())
    resumed.load_state_dict(updates.state_dict())
    torch.rand(5)  # whatever else drew meanwhile
    lisa_steps(second, plan, resumed, range(3, 6), 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    turns = [[drawn(8, 2, seed, number) for number in range(20)] for seed in (0, 1)]
    assert turns[0] != turns[1] and set(range(8)) == {layer for turn in turns[0] for layer in turn}


def test_lisa_leaves_evaluation_and_failed_steps_alone():
    model = captioner()
    plan = planned(model, "layer_tune:by=lisa,layers=1")
    names = trained(model)
    with torch.no_grad():
        loss_of(model)
    with pytest.raises(KeyError), plan.model.decoder.seeing(lambda depth, tokens: {}[depth]):
        loss_of(model)
    assert trained(model) == names


# --- adapters


@pytest.mark.parametrize("make", [lambda: None, gpt2])
def test_adapters_train_and_merge(make):
    spec = "layer_tune:at=1,lora=2"
    plain, model = captioner(decoder=make()), captioner(decoder=make())
    keys = list(plain.state_dict())
    expected = loss_of(plain).item()
    plan = planned(model, spec)
    assert loss_of(model).item() == pytest.approx(expected, abs=1e-6)  # B = 0
    decoder = plan.model.decoder
    own = {n for n, p in decoder.blocks.named_parameters() if p.requires_grad}
    assert own and all(n.startswith("1.") and ".lora_" in n for n in own)
    linears = 7 if make() is None else 4
    assert len(own) == 2 * linears
    assert not Arm(ArmPlan("x"), model, {}, plan.frozen, plan.trained).trains_in_frozen()  # the tower's features keep
    losses(model, 4)
    learned = loss_of(model).item()
    assert abs(learned - expected) > 1e-3
    parse(spec)[0].finish(plan.model, calibration())
    assert list(model.state_dict()) == keys
    assert loss_of(model).item() == pytest.approx(learned, abs=1e-5)
    plain.load_state_dict(model.state_dict())
    assert loss_of(plain).item() == pytest.approx(learned, abs=1e-5)


# --- a head that is the token embedding


@pytest.mark.parametrize("spec, trains", [("at=1", False), ("at=1,stem=true", True), ("by=lisa", True)])
def test_a_head_that_is_the_embedding_goes_with_it(spec, trains):
    model = captioner(decoder=gpt2())
    plan = planned(model, f"layer_tune:{spec},connector=false")
    body = model.language.body
    assert model.language.head.weight is body.wte.weight and body.wte.weight.requires_grad == trains
    assert {id(part) for part in stem(plan.model.decoder)} == {id(body.wte), id(body.wpe)}
    assert body.wpe.weight.requires_grad == trains and body.ln_f.weight.requires_grad
    depth = {}
    with plan.model.decoder.seeing(lambda d, tokens: depth.setdefault(d, tokens.requires_grad)):
        loss_of(model)
    assert depth == {0: trains, 1: trains or spec == "by=lisa", 2: True}
    said = " ".join(parse(f"layer_tune:{spec}")[0].notes(plan.model))
    assert ("one matrix, which is trained" if trains else "one matrix, which is not trained") in said


# --- scores


@pytest.mark.parametrize(
    "by", ["block_influence", "multimodal", "angular", "attention", "gradient", "parameter_change"]
)
def test_scores_choose_layers_and_leave_the_model_as_it_was(by):
    model = captioner().train()
    block = model.language.body.layers[2]
    with torch.no_grad():  # a layer that stands out
        if by in ("block_influence", "multimodal", "angular"):
            block.mlp.down_proj.weight.mul_(100)
        elif by == "parameter_change":
            for p in block.parameters():
                p.mul_(0.1)
        elif by == "gradient":
            for i in (0, 1, 3):
                model.language.body.layers[i].self_attn.o_proj.weight.zero_()
                model.language.body.layers[i].mlp.down_proj.weight.zero_()
    before, how = copy.deepcopy(model.state_dict()), model.language.body.config._attn_implementation
    packed = None if by in ("gradient", "parameter_change") else object()
    model.layout = packed  # of a method that packs texts; what is looked at is a row for each text
    found = settled(model, f"layer_tune:by={by},layers=1,images=3")
    assert model.layout is packed
    assert found == settled(model, f"layer_tune:by={by},layers=1,images=3") and len(found.at) == 1
    assert by == "attention" or found.at == (2,)
    assert canonical((found,)) == f"layer_tune:at={found.at[0]}"
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.training
    assert model.language.body.config._attn_implementation == how


def hidden(model, row):
    """The library's own states and attentions of one text, without padding."""
    alone = copy.deepcopy(model)
    alone.language.body.set_attn_implementation("eager")
    text = TOKENS[row, : int((TARGET[row] != IGNORE).sum())][None]
    x = torch.cat([alone.prefix(FEATURES[row : row + 1]), alone.language.embed(text[:, :-1])], dim=1)
    states, depth = [], view(alone).decoder
    with torch.no_grad(), depth.seeing(lambda _, tokens: states.append(tokens[0].double())):
        attentions = alone.language.body(inputs_embeds=x, output_attentions=True).attentions
    return states, [a[0].double() for a in attentions]


def test_the_attention_score_is_what_texts_pay_to_the_image_without_padding():
    model = captioner()
    shares = []
    for row in range(3):
        _, attentions = hidden(model, row)
        shares.append(torch.stack([a[:, 4:, :4].sum(dim=-1).mean(dim=0) for a in attentions]))  # 4 image tokens
    expected = torch.cat(shares, dim=1).mean(dim=1)
    found = image_attention(view(model).decoder, model, calibration(), 3)
    assert torch.allclose(found, expected, atol=1e-6) and (found > 0).all() and found.std() > 1e-4


def test_influence_and_angle_of_a_decoder_count_no_padding():
    model = captioner()
    image, text, last = ([[] for _ in range(4)] for _ in range(3))
    for row in range(3):
        states, _ = hidden(model, row)
        for i in range(4):
            cosine = torch.cosine_similarity(states[i], states[i + 1], dim=-1)
            image[i].append(1 - cosine[:4])
            text[i].append(1 - cosine[4:])
            last[i].append(cosine[-1:].arccos() / torch.pi)

    def mean(*kinds):
        return torch.stack([torch.cat([x for kind in kinds for x in kind[i]]).mean() for i in range(4)])

    given = (view(model).decoder, model, calibration(), 3)
    both = multimodal_influence(*given)
    assert torch.allclose(both, (mean(image) + mean(text)) / 2, atol=1e-6)
    assert torch.allclose(block_influence(*given), mean(image, text), atol=1e-6)
    assert (both - mean(image, text)).abs().max() > 1e-5  # the two differ here
    assert torch.allclose(angular_distance(*given, n=1), mean(last), atol=1e-5)


# --- what is refused


def mamba():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    return Language(model.get_decoder(), model.get_output_embeddings())


def tried(model, spec, engine="plain"):
    """As `Experiment.check` does it, before any work."""
    task = SimpleNamespace(build=lambda *_: model, locked=lambda model: [model.image_encoder])
    protocol = SimpleNamespace(device="cpu", train="locked", engine=engine)
    rehearsal = CalibrationSet(lambda: iter([BATCH]), 64, loss_of, loss_of, thrifty=True)
    try_out(ArmPlan(spec, parse(spec)), task, None, None, protocol, rehearsal)


@pytest.mark.parametrize(
    "make, spec, message",
    [
        (captioner, "layers=5", "layers=5, but this LlamaModel has 4 layers"),
        (captioner, "layers=5,by=lisa", "has 4 layers"),
        (captioner, "at=4", "has layers 0 to 3"),
        (captioner, "lora=33", "more than the width 32 of this LlamaModel"),
        (captioner, "by=attention,images=65", "needs 65 training images"),
        (captioner, "target=tower", "frozen"),
        (captioner, "by=bitfit", "layers of this LlamaModel have none"),
        (captioner, "by=lisa,draws=0", "draws=0 is not valid"),
        (captioner, "by=lisa,draws=often", "draws=often is not valid"),
        (captioner, "draws=3", "draws says nothing with by=uniform"),
        (captioner, "by=lisa,lora=2", "lora says nothing with by=lisa"),
        (captioner, "by=lisa,stem=false", "always trains the token embedding"),
        (captioner, "by=frozen,stem=true", "nothing of the decoder"),
        (captioner, "by=frozen,connector=false", "freezes it too"),
        (captioner, "by=frozen,share=0.5", "share says nothing with by=frozen"),
        (captioner, "connector=false,target=tower", "connector=false is about a captioner's decoder"),
        (captioner, "by=attention,target=text", "by=attention is about"),
        (clip, "connector=false", "this model has none"),
        (clip, "by=lisa", "by=lisa is about"),
        (clip, "target=decoder", "only aligns images and texts"),
        (lambda: captioner(decoder=mamba()), "by=attention", "cannot give the rows of its attention"),
    ],
)
def test_bad_parameters_are_refused_before_any_work(make, spec, message):
    with pytest.raises(UsageError, match=message) as refused:
        model = make()
        if not hasattr(model, "image_encoder"):
            model.image_encoder = model.visual
        tried(model, f"layer_tune:{spec}")
    assert refused.value.hint


def test_lisa_is_refused_where_layers_without_gradients_are_moved():
    with pytest.raises(UsageError, match="--engine deepspeed cannot train layer_tune:by=lisa") as refused:
        tried(captioner(), "layer_tune:by=lisa", engine="deepspeed")
    assert "plain" in refused.value.hint
    tried(captioner(), "layer_tune", engine="deepspeed")


def test_what_fits_passes_the_check():
    for spec in ("layer_tune", "layer_tune:by=attention", "layer_tune:by=parameter_change", "layer_tune:by=lisa"):
        tried(captioner(), spec)


def test_notes_say_what_is_trained():
    def said(spec):
        return parse(f"layer_tune:{spec}")[0].notes(view(captioner()))

    assert said("at=0/2") == ["trains the connector, layers 0, 2 of the LlamaModel, and what comes after the layers"]
    assert said("at=3,connector=false") == [
        "trains layer 3 of the LlamaModel, and what comes after the layers",
        "the connector keeps its weights",
    ]
    assert said("by=frozen") == ["trains the connector alone, nothing of the LlamaModel"]
    assert "2 of the layers at a time (drawn 7 times) of the LlamaModel" in said("by=lisa,layers=2,draws=7")[0]
    assert "not saved" in said("by=lisa")[1]
