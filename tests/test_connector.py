"""Connectors: tokens, parameters and FLOPs by formula, each image for itself, and what is refused."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import flickr8k

import effbench
from effbench import arms, records
from effbench.arms import ArmPlan, training_model, try_out
from effbench.calibration_set import of_inputs
from effbench.errors import UsageError
from effbench.live import Live
from effbench.measure.analytic import analytic_of
from effbench.measure.flops import flops_of
from effbench.models import connectors, language
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import TYPES, PooledLinear
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.spec import canonical, parse
from effbench_methods.connector import Connector

WIDTH, OUT, GRID, PATCHES = 24, 32, 6, 36
TOKENS = dict(linear=36, mlp=36, pool=9, attention=9, perceiver=9, c_abstractor=9, shuffle2=9, shuffle3=4)
X = torch.randn(3, PATCHES, WIDTH, generator=torch.Generator().manual_seed(2))


def made(kind, tokens=9, depth=2, width=WIDTH):
    torch.manual_seed(0)
    return connectors.make(kind, width, OUT, tokens, depth if kind in connectors.DEPTHS else None)


def whole(connector, tokens=X):
    return connector(connector.pool(tokens))


def linear(rows, *widths, bias=True):
    """FLOPs and parameters of linear layers behind one another on so many rows."""
    pairs = list(zip(widths, widths[1:], strict=False))
    return 2 * rows * sum(a * b for a, b in pairs), sum(a * b + bias * b for a, b in pairs)


def added(*each):
    return tuple(map(sum, zip(*each, strict=True)))


def formula(kind, n, m, c, out, depth):
    """FLOPs of an image and parameters, by hand: n patches, m tokens, c channels."""
    if kind in ("linear", "mlp", "pool"):
        return linear(m, c, out, out) if kind == "mlp" else linear(m, c, out)
    if kind == "attention":
        return added(linear(n, c, 2 * c), linear(m, c, out), (4 * m * n * c, m * c))
    if kind == "perceiver":
        projections = added(linear(m, c, c, c, bias=False), linear(n + m, c, 2 * c, bias=False))
        layer = added(projections, linear(m, c, 4 * c, c, bias=False), (4 * m * (n + m) * c, 3 * 2 * c))
        return added(*[layer] * depth, linear(m, c, out), (0, m * c + 2 * c))
    if kind == "c_abstractor":
        squeeze = linear(1, c, c // 4, c)
        found = [linear(m, c, out, out)]
        for rows in (n, m):
            block = added(linear(rows, c, c, c, bias=False), (2 * rows * 9 * c, 9 * c), squeeze, (0, 3 * 2 * c))
            found += [block] * depth
        return added(*found)
    if kind == "shuffle2":
        return added(linear(m, 4 * c, out, out), (0, 2 * 4 * c))
    return added(linear(m, 9 * c, 3 * c, out, out), (0, 2 * 9 * c + 2 * 3 * c))


@pytest.mark.parametrize("width", [24, 128])  # one head, and two
@pytest.mark.parametrize("kind", TYPES)
def test_tokens_parameters_and_flops_are_those_of_the_formula(kind, width):
    connector, m = made(kind, width=width), TOKENS[kind]
    x = torch.randn(3, PATCHES, width)
    flops, parameters = formula(kind, PATCHES, m, width, OUT, 2)
    assert whole(connector, x).shape == (3, m, OUT)
    assert sum(p.numel() for p in connector.parameters()) == parameters
    with torch.no_grad():
        count, layers = (counted(lambda: whole(connector, x), connector) for counted in (flops_of, analytic_of))
    assert count.complete and count.dense_flops == 3 * flops
    assert (layers.flops, layers.without_formula) == (3 * flops, ())

    def loss():
        return whole(connector, x).sum()

    trained = flops_of(lambda: loss().backward(), connector)
    assert trained.complete and trained.dense_flops == analytic_of(loss, connector, train=True).flops > 3 * flops


@pytest.mark.parametrize("kind", TYPES)
def test_an_image_is_handed_over_alike_alone_and_in_a_batch_in_training_too(kind):
    connector = made(kind).train()
    together = whole(connector)
    assert (whole(connector, X[1:2]) - together[1:2]).abs().max() < 1e-5
    assert (whole(connector, X.flip(0)).flip(0) - together).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())
    assert not list(connector.buffers())


@pytest.mark.parametrize("kind", TYPES)
def test_every_patch_has_a_part_and_pool_has_no_parameters(kind):
    connector, x = made(kind), X[:1].clone().requires_grad_()
    whole(connector, x).square().sum().backward()
    assert (x.grad.abs().sum(dim=2) > 0).all()
    pooled, other = (c.pool(X) for c in (connector, made(kind).apply(scramble)))
    assert torch.equal(pooled, other)
    assert pooled is X or kind in ("pool", "shuffle2", "shuffle3")


def scramble(module):
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter)


def test_means_over_squares_and_over_groups_of_neighbours_where_no_grid_is_left():
    pool = PooledLinear(WIDTH, OUT, 3).pool
    squares = X.unflatten(1, (3, 2, 3, 2)).mean(dim=(2, 4)).flatten(1, 2)
    assert torch.allclose(pool(X), squares, atol=1e-6)
    assert torch.allclose(pool(X[:, :18]), X[:, :18].unflatten(1, (9, 2)).mean(dim=2), atol=1e-6)  # two neighbours each
    for n in (11, 16, 25, 35):
        assert pool(X[:, :n]).shape == (3, 9, WIDTH)
    for n in (4, 7, 9):  # no more than there are
        assert torch.equal(pool(X[:, :n]), X[:, :n])
    assert torch.equal(PooledLinear(WIDTH, OUT, None).pool(X[:, :35]), X[:, :35])


def test_the_patches_of_a_square_become_the_channels_of_one_token():
    for along, kind in ((2, "shuffle2"), (3, "shuffle3")):
        grid = X.unflatten(1, (GRID, GRID))
        pooled = made(kind).pool(X).unflatten(1, (GRID // along, GRID // along))
        for row, column in ((0, 0), (1, 0), (0, 1)):
            square = grid[:, row * along : (row + 1) * along, column * along : (column + 1) * along]
            assert torch.equal(pooled[:, row, column], square.flatten(1))


def test_attention_is_softmax_over_all_patches():
    connector = made("attention", width=128)
    x = torch.randn(2, PATCHES, 128)
    found = []
    k, v = connector.kv(x).chunk(2, dim=2)
    for head in (slice(0, 64), slice(64, 128)):
        weights = (connector.queries[:, head] @ k[..., head].transpose(1, 2) / 8).softmax(dim=2)
        found.append(weights @ v[..., head])
    assert (connector(x) - connector.proj(torch.cat(found, dim=2))).abs().max() < 1e-5


def test_latents_attend_to_patches_and_to_latents():
    layer = made("perceiver").layers[0]
    x, latents = X, torch.randn(3, 9, WIDTH)
    normed = F.layer_norm(latents, (WIDTH,))
    both = torch.cat([F.layer_norm(x, (WIDTH,)), normed], dim=1)
    k, v = layer.attention.kv(both).chunk(2, dim=2)
    found = (layer.attention.q(normed) @ k.transpose(1, 2) / math.sqrt(WIDTH)).softmax(dim=2) @ v
    y = latents + layer.attention.proj(found)
    assert (layer(x, latents) - (y + layer.mlp(y))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["c_abstractor", "shuffle2", "shuffle3"])
def test_what_needs_a_grid_says_so_when_it_gets_none(kind):
    with pytest.raises(UsageError, match=f"connector {kind} needs a square grid .* hands 35 over"):
        whole(made(kind), X[:, :35])
    if kind != "c_abstractor":
        with pytest.raises(UsageError, match="do not cover a grid of 5 x 5"):
            whole(made(kind), X[:, :25])


def captioner(side=3, size=48, stages=("language",), **options):
    tower = TimmTokens(tiny.vit(img_size=size))
    decoder = language.tiny(words=50, layers=2, width=OUT)
    made = records.Captioning(stages=stages, max_tokens=6, new_tokens=3, **options)
    return Captioner(tower, PooledLinear(WIDTH, OUT, side), decoder, (), (49,), 49, made).eval()


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 4, 5, 49], [7, 8, 49, 0]])
BATCH = dict(image=IMAGES, tokens=IDS, target=torch.where(IDS > 0, IDS, IGNORE))


class Task:
    """As much of a captioning task as an arm's model needs; all its models start from the same weights."""

    def __init__(self, **options):
        self.options = options

    def build(self, *_):
        with torch.random.fork_rng(devices=[]):
            return captioner(**self.options)

    def locked(self, model):
        return [model.image_encoder]

    def loss(self, model, batch):
        return model.loss(model.prefix(model.features(batch["image"])), batch["tokens"], batch["target"])

    observe = loss


class Protocol:
    device, train, engine = "cpu", "locked", "plain"


CALIBRATION = of_inputs(IMAGES)


def arm(spec, **options):
    return ArmPlan(spec, parse(spec)), Task(**options), None, None, Protocol


def trained(spec, seed=0, **options):
    torch.manual_seed(seed)
    return training_model(*arm(spec, **options))


def model_of(spec, **options):
    torch.manual_seed(0)
    return arms.testing_model(*arm(spec, **options), {}, CALIBRATION)


@pytest.mark.parametrize("kind", TYPES)
def test_an_arm_trains_a_fresh_connector_and_is_tested_with_what_it_trained(kind):
    spec = f"connector:type={kind}"
    model, plan = trained(spec)
    assert plan.model.connector is model.connector and all(p.requires_grad for p in model.connector.parameters())
    prefix = model.prefix(model.features(IMAGES))
    assert prefix.shape == (2, TOKENS[kind] + 1, OUT)
    again, other = trained(spec)[0].state_dict(), trained(spec, seed=1)[0].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    new = [key for key, value in model.state_dict().items() if not torch.equal(value, other[key])]
    assert new and all(key.startswith("connector.") for key in new)
    fresh = arms.testing_model(*arm(spec), model.state_dict(), CALIBRATION)
    assert torch.equal(fresh.prefix(fresh.features(IMAGES)), prefix)
    said = [n for method in parse(spec) for n in method.notes(view(fresh))]
    assert said == [f"the {kind} connector has {sum(p.numel() for p in fresh.connector.parameters()):,} parameters"]


def test_tokens_are_those_asked_for_or_those_of_the_baseline():
    for side, tokens, expected in ((3, "", 9), (None, "", 36), (3, ",tokens=16", 16), (None, ",tokens=4", 4)):
        for kind in ("pool", "attention", "perceiver", "c_abstractor"):
            model = model_of(f"connector:type={kind}{tokens}", side=side)
            assert model.connector(model.features(IMAGES)).shape[1] == expected
    assert model_of("connector:type=shuffle2,tokens=9").features(IMAGES).shape == (2, 9, 4 * WIDTH)
    depth = model_of("connector:type=perceiver,depth=1").connector
    assert len(depth.layers) == 1 and len(model_of("connector:type=perceiver").connector.layers) == 6
    assert len(list(model_of("connector:type=c_abstractor").connector.before.children())) == 3


def test_a_tower_that_keeps_all_its_patches_is_the_baseline_and_one_that_drops_some_feeds_the_decoder_no_more():
    with torch.no_grad():
        expected = captioner().prefix(captioner().features(IMAGES))
        model = model_of("token_prune:keep=1,at=1")
        assert (model.prefix(model.features(IMAGES)) - expected).abs().max() < 1e-5
        for keep, tokens in ((0.5, 9), (0.3, 9), (0.1, 4)):
            model = model_of(f"token_prune:keep={keep},at=1,fuse=false")
            assert model.prefix(model.features(IMAGES)).shape == (2, tokens + 1, OUT)


@pytest.mark.parametrize("kind", ["pool", "attention", "perceiver", "linear", "mlp"])
@pytest.mark.parametrize("order", ["{0}+{1}", "{1}+{0}"])
def test_a_tower_that_drops_patches_stands_before_these(kind, order):
    spec = order.format(f"connector:type={kind}", "token_prune:keep=0.5,at=1,fuse=false")
    try_out(*arm(spec), CALIBRATION)
    model = model_of(spec)
    assert model.connector(model.features(IMAGES)).shape[1] == (18 if kind in ("linear", "mlp") else 9)
    said = [note for method in parse(spec) for note in method.notes(view(model)) if "neighbours" in note]
    assert bool(said) == (kind == "pool")


@pytest.mark.parametrize("kind", ["c_abstractor", "shuffle2", "shuffle3"])
@pytest.mark.parametrize("phase", ["test", "both"])
def test_what_needs_a_grid_refuses_such_a_tower_before_any_work(kind, phase):
    prune = f"token_prune:keep=0.5,at=1,phase={phase}"
    for spec in (f"connector:type={kind}+{prune}", f"{prune}+connector:type={kind}"):
        with pytest.raises(UsageError, match=f"type={kind} needs the grid .* which token_prune breaks up"):
            try_out(*arm(spec), CALIBRATION)
    pooled = f"connector:type={kind}+patch_pool:side=2,at=1,phase={phase}"  # a coarser grid, of 3 x 3
    if kind == "shuffle2":
        with pytest.raises(UsageError, match="do not cover a grid of 3 x 3"):
            try_out(*arm(pooled), CALIBRATION)
    else:
        try_out(*arm(pooled), CALIBRATION)


@pytest.mark.parametrize("kind", TYPES)
def test_another_image_size_stands_on_either_side(kind):
    for size, tokens in ((24, 9), (96, 144)):
        for order in ("{0}+{1}", "{1}+{0}"):
            spec = order.format(f"connector:type={kind},depth=1" if kind in connectors.DEPTHS else f"connector:{kind}",
                                f"resize:size={size},phase=both")  # fmt: skip
            if size == 24 and kind == "shuffle2":  # 3 x 3 patches
                with pytest.raises(UsageError, match="do not cover a grid of 3 x 3"):
                    try_out(*arm(spec), CALIBRATION)
                continue
            try_out(*arm(spec), CALIBRATION)
            model = model_of(spec)
            along = int(kind[-1]) if kind.startswith("shuffle") else 1
            given = tokens // along**2 if kind in ("linear", "mlp") or along > 1 else 9
            assert model.prefix(model.features(IMAGES)).shape[1] == given + 1
            why = [m.no_quality(view(model)) for m in parse(spec)]
            assert "".join(why) == ("upsampled from images of 48 px" if size == 96 else "")


def test_a_smaller_image_alone_hands_over_no_more_than_its_patches():
    for size, tokens in ((16, 4), (24, 9), (32, 9), (72, 9)):
        model = model_of(f"resize:size={size}")
        assert model.prefix(model.features(IMAGES)).shape[1] == tokens + 1


@pytest.mark.parametrize(
    "spec, options, message, hint",
    [
        ("type=pool,tokens=8", {}, "type=pool gives a square grid, and tokens=8 is none", "tokens=4 or tokens=9"),
        ("type=c_abstractor,tokens=10", {}, "type=c_abstractor gives a square grid", "tokens=9 or tokens=16"),
        ("type=pool,tokens=49", {}, "49 image tokens are more than the 36 patches", "tokens=36 or fewer"),
        ("type=perceiver,tokens=37", {}, "37 image tokens are more than the 36 patches", "tokens=36"),
        ("type=mlp,tokens=9", {}, "type=mlp gives 36 tokens of 36 patches, not tokens=9", "type=pool"),
        ("type=linear,tokens=9", {}, "type=linear gives 36 tokens", "leave tokens out"),
        ("type=shuffle2,tokens=4", {}, "type=shuffle2 gives 9 tokens of 36 patches, not tokens=4", "leave tokens"),
        ("type=shuffle3", dict(size=32, side=2), "3 x 3 do not cover a grid of 4 x 4 patches", "type=shuffle2"),
        ("type=mlp", dict(stages=("language", "align")), "trained the baseline's connector .stage align", "language"),
        ("type=mlp", dict(stages=("language", "tune")), "stage tune", "--stages language"),
        ("type=mlp", dict(decoder="own"), "a whole model brings its own connector", "--decoder tiny or hf:PATH"),
        ("type=pool", dict(size=(32, 64)), "knows square images, and this tower's have 4 x 8", "type=attention"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(spec, options, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        try_out(*arm(f"connector:{spec}", **options), CALIBRATION)
    assert hint in refused.value.hint


def test_a_frozen_fresh_connector_and_a_full_context_are_refused():
    with pytest.raises(UsageError, match="would not be trained"):
        try_out(*arm("layer_tune:by=top,connector=false+connector:type=mlp"), CALIBRATION)
    model = view(captioner())
    model.decoder.config.max_position_embeddings = 40
    for spec, fits in (("type=pool", True), ("type=linear", False)):
        method = Connector(spec.removeprefix("type="))
        method.edit_model(model)
        if fits:
            method.check(model)
        else:
            with pytest.raises(UsageError, match="36 image tokens .* context of 40 has no room"):
                method.check(model)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("connector:type=qformer", "type=qformer is not valid"),
        ("connector:tokens=0", "tokens=0 is not valid"),
        ("connector:type=mlp,depth=2", "depth=2 says nothing with type=mlp"),
        ("connector:type=mlp,phase=test", "phase=test is not valid"),
        ("connector+connector:type=pool", "stands twice"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        parse(spec)


@pytest.mark.parametrize("make", [tiny.vit, tiny.clip])
def test_a_model_without_a_decoder_is_refused(make):
    (method,) = parse("connector:type=perceiver,tokens=64")
    assert parse(canonical((method,))) == (method,)
    with pytest.raises(UsageError, match="this model has no decoder") as refused:
        method.edit_model(view(make()))
    assert "captioning task" in refused.value.hint


def test_arms_of_an_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    specs = ["connector:type=perceiver,depth=1", "connector:type=shuffle3", "resize:size=64"]
    specs.append("connector:type=pool+token_prune:keep=0.5,at=1+quantize")
    record = effbench.run(
        specs,
        data=flickr8k(tmp_path),
        out=tmp_path / "out",
        task="flickr8k_caption",
        backbone="timm:test_vit",
        weights="random",
        image_size=48,
        batch_size=4,
        epochs=1,
        timing_pairs=3,
        threads=1,
        memory_runs=0,
        controls="none",
        live=Live(Console(quiet=True)),
        captioning=dict(
            layers=1, width=32, image_tokens=4, max_tokens=3, new_tokens=2, language_epochs=1, stages=("language",)
        ),
    )
    found = {each.name: each for each in record.arms}
    assert [each.status for each in record.arms] == ["ok"] * len(record.arms)
    assert record.notes[0].startswith(
        "26 of 26 images have fewer than 48 px along their shorter side and are upsampled"
    )
    assert found["resize:size=64"].no_quality == "upsampled from images of 48 px"
    assert not found["resize:size=64"].metrics and found["connector:type=shuffle3"].metrics
    prefix = {name: each.decoding[0].prefix for name, each in found.items()}
    assert prefix["baseline"] == prefix["connector:type=perceiver,depth=1"] == 5
    assert prefix["connector:type=shuffle3"] == 1 + 1
    assert [prefix[name] for name in specs[2:]] == [5, 5]
    tokens, width, out = 9, 64, 32
    saved = found["baseline"].decoding[0].first_token_flops - found["baseline"].decoding[0].prefill_flops
    other = found["connector:type=perceiver,depth=1"].decoding[0]
    assert other.first_token_flops - other.prefill_flops - saved == (
        formula("perceiver", tokens, 4, width, out, 1)[0] - formula("pool", tokens, 4, width, out, 1)[0]
    )
    assert all(each.train_flops for name, each in found.items() if name.startswith("connector"))
