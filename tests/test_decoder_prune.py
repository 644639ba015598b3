"""decoder_prune: fewer image tokens in later layers and their caches, and nothing else changed."""

import copy
from itertools import combinations

import pytest
import tiny
import tiny_hf
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, MistralConfig, MistralForCausalLM

from effbench.errors import UsageError
from effbench.measure.flops import flops_of
from effbench.models.captioner import Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import cache_bytes, generate, new_cache
from effbench.models.language import tiny as tiny_language
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.models.whole_model import HuggingFace
from effbench.passes import kinds as made_of
from effbench.records import Captioning
from effbench.registry import tasks
from effbench.spec import parse
from effbench_methods._prune_stages import budget
from effbench_methods.algorithms.decoder_selection import determinantal, dominant_and_contextual, least_like, relevance
from effbench_methods.decoder_prune import DecoderPrune

LAYERS, WIDTH, WORDS, HIDDEN, PATCHES = 4, 64, 50, 192, 16
EVERY = ("fastv", "pyramid", "dart", "visionzip", "divprune", "cdpruner", "pool", "random")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def captioner(before=(), after=(49,), tower=None):
    torch.manual_seed(0)
    language = tiny_language(WORDS, LAYERS, WIDTH, init=0.2)
    options = Captioning(width=WIDTH, layers=LAYERS, image_tokens=PATCHES, new_tokens=6)
    tower = TimmTokens(tower or tiny.vit())
    return Captioner(tower, PooledLinear(24, WIDTH, 4), language, before, after, 48, options).eval()


def pruned(spec, model=None):
    model = model or captioner(before=(1, 2), after=(3, 4, 49))
    (method,) = parse(f"decoder_prune:{spec}")
    method.edit_model(view(model))
    return model


def written(model, images=IMAGES, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        prefix = model.prefix(model.features(images))
        return generate(model.language, prefix, 6, model.end, exactly=True, **options)


def left_in(spec, depth=LAYERS, text=5):
    """Tokens that each layer is given."""
    (method,) = parse(f"decoder_prune:{spec}")
    image, found = PATCHES, []
    for layer in range(depth):
        if layer in method.layers(depth):
            image = budget(method.keep, image)
        found.append(text + image)
    return found


@pytest.mark.parametrize("by", EVERY)
def test_keeping_all_is_the_baseline(by):
    plain = captioner(before=(1, 2), after=(3, 4, 49))
    assert written(pruned(f"by={by},keep=1"))[0].equal(written(plain)[0])


@pytest.mark.parametrize("by", ("fastv", "divprune", "cdpruner"))
def test_a_share_that_keeps_all_in_effect_is_the_baseline_too(by):
    plain = captioner(before=(1, 2), after=(3, 4, 49))
    assert written(pruned(f"by={by},keep=0.99"))[0].equal(written(plain)[0])  # ceil(0.99 x 16) = 16


@pytest.mark.parametrize("by", EVERY)
def test_prefill_flops_and_cache_bytes_are_those_of_the_tokens_that_are_left(by):
    spec = f"by={by},keep=0.25"
    model = pruned(spec)
    tokens = left_in(spec)
    with torch.no_grad():
        prefix = model.prefix(model.features(IMAGES))
        count = flops_of(lambda: generate(model.language, prefix, 1, model.end, exactly=True), model)
    block = 4 * WIDTH**2 + 3 * WIDTH * HIDDEN
    wanted = sum(n * block + 2 * n**2 * WIDTH for n in tokens) + WIDTH * WORDS  # MACs of one prompt
    assert count.dense_flops == 2 * len(IMAGES) * wanted and count.complete
    assert count.overhead_flops < 0.05 * count.dense_flops
    _, held = written(model)
    assert held == sum(2 * 4 * WIDTH * len(IMAGES) * (n + 5) for n in tokens)


# reference_numbers.json: fastv_ratio_percent_7b_576_image_tokens
@pytest.mark.parametrize(("keep", "percent"), [(0.5, 55.2), (0.25, 33.2), (0.1, 20.3)])
def test_the_ratio_of_fastv_is_the_published_one(keep, percent):
    """4 n d^2 + 2 n^2 d + 2 n d m per layer (2403.06764); 36 text tokens reproduce all three figures."""
    width, mlp, depth, text, image = 4096, 11008, 32, 36, 576
    (layer,) = DecoderPrune(keep=keep).layers(depth)
    lengths = [text + image] * layer + [text + budget(keep, image)] * (depth - layer)
    cost = [4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp for n in lengths]
    assert round(100 * sum(cost) / (depth * cost[0]), 1) == percent


@pytest.mark.parametrize("by", [by for by in EVERY if by != "random"])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(by):
    model = pruned(f"by={by},keep=0.25")
    alone = torch.cat([written(model, image[None])[0] for image in IMAGES])
    assert written(model)[0].equal(alone)
    assert written(model, IMAGES.flip(0))[0].equal(alone.flip(0))


@pytest.mark.parametrize("spec", ("by=fastv", "by=pyramid", "by=divprune", "by=cdpruner", "by=dart,positions=renumber"))
def test_the_cache_changes_nothing(spec):
    model = pruned(spec)
    assert written(model)[0].equal(written(model, cached=False)[0])
    again = copy.deepcopy(model)
    del model.language.shortener.choices["0" if "0" in model.language.shortener.choices else "2"]
    assert again.language.shortener.choices and written(again)[0].equal(written(pruned(spec))[0])


@pytest.mark.parametrize("by", ("pyramid", "divprune"))
def test_a_pruned_decoder_compiles_as_one_graph(by):
    torch.compiler.reset()
    model = pruned(f"by={by}")
    expected, _ = written(model)
    model.language.body.compile(fullgraph=True, dynamic=True, backend="eager")
    assert written(model)[0].equal(expected)


@pytest.mark.parametrize("spec", ("by=fastv", "by=pyramid,keep=0.6", "by=dart", "by=cdpruner", "by=divprune,at=0/2"))
def test_a_prompt_that_is_padded_at_the_front_is_the_prompt_alone_with_beams_too(spec):
    model = pruned(spec)
    language = model.language
    with torch.no_grad():
        prompt = model.prefix(model.features(IMAGES))
        padded = torch.cat([prompt[:, :1].expand(-1, 3, -1), prompt], dim=1)
        mask = torch.ones(padded.shape[:2], dtype=torch.long)
        mask[:, :3] = 0
        longer = torch.cat([torch.randn(1, 3, WIDTH), prompt[:1]], dim=1)  # a prompt that has so many more tokens
        mixed, both = torch.cat([padded[:2], longer]), mask.clone()
        both[2] = 1
        for beams in (1, 3):
            alone, _ = generate(language, prompt, 5, 48, exactly=True, beams=beams)
            assert generate(language, padded, 5, 48, exactly=True, beams=beams, mask=mask)[0].equal(alone)
            assert generate(language, mixed, 5, 48, exactly=True, beams=beams, mask=both)[0][:2].equal(alone[:2])


def test_what_stays_keeps_its_position_or_is_renumbered_as_published():
    kept, new = (pruned(f"by=random,at=2,positions={how}") for how in ("keep", "renumber"))
    seen = {}
    for name, model in (("keep", kept), ("renumber", new)):
        last = model.language.body.layers[3]
        last.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(kwargs["position_embeddings"][0]),
            with_kwargs=True,
        )
        written(model)
    rotary = kept.language.body.rotary_emb
    every = rotary(torch.zeros(1, 1, WIDTH), torch.arange(40)[None])[0]
    origin = kept.language.shortener.left[2].origin
    assert torch.equal(seen["keep"][0], every.expand(3, -1, -1).take_along_dim(origin[..., None], 1))
    assert torch.equal(seen["renumber"][0], every[:, : origin.shape[1]].expand_as(seen["renumber"][0]))
    prompt, left = PATCHES + 5, origin.shape[1]
    for step in range(1, 5):  # the words behind it
        assert torch.equal(seen["keep"][step][0], every[0, prompt + step - 1 : prompt + step])
        assert torch.equal(seen["renumber"][step][0], every[0, left + step - 1 : left + step])


def test_fastv_keeps_what_the_last_token_attends_to_most():
    model = pruned("by=fastv,keep=0.25,at=2")
    shown = {}
    plain = captioner(before=(1, 2), after=(3, 4, 49))
    with torch.no_grad(), view(plain).decoder.showing_attention(shown.__setitem__):
        plain.language(plain.prefix(plain.features(IMAGES)))
    row = shown[1].mean(dim=1)[:, -1, 2 : 2 + PATCHES]  # of the layer before, to the image tokens
    written(model)
    image = model.language.shortener.left[2].origin[:, 2:-3] - 2
    assert image.equal(row.topk(4, dim=1).indices.sort(dim=1).values)


def test_cdpruner_finds_the_likely_set_and_looks_at_one_sample_alone():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 6, 8, generator=generator)
    weight = torch.rand(2, 6, generator=generator) + 0.1
    unit = nn.functional.normalize(tokens, dim=-1) * weight[..., None]
    kernel = unit @ unit.transpose(1, 2)
    found = determinantal(tokens, weight, 3)
    for row, chosen in zip(kernel, found.tolist(), strict=True):
        best = []
        for _ in range(3):
            rest = [i for i in range(6) if i not in best]
            best.append(max(rest, key=lambda i: torch.det(row[best + [i]][:, best + [i]]).item()))
        assert chosen == best
    text = torch.randn(2, 8, generator=generator)
    alone = torch.cat([relevance(tokens[i : i + 1], text[i : i + 1]) for i in range(2)])
    assert relevance(tokens, text).equal(alone) and alone.amax() <= 1 and alone.amin() > 0


def test_determinantal_takes_each_token_once_even_among_copies():
    copies = torch.ones(1, 5, 4)
    assert sorted(determinantal(copies, torch.ones(1, 5), 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_dart_keeps_what_repeats_the_pivots_least():
    pivot = torch.tensor([[[1.0, 0.0]]])
    angles = torch.tensor([0.1, 3.0, 1.5, 0.5, 2.0])
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert sorted(least_like(tokens, pivot, 2)[0].tolist()) == [1, 4]
    two = torch.cat([pivot, -pivot], dim=1)
    assert sorted(least_like(tokens, two, 2)[0].tolist()) == [0, 1]  # one for each pivot
    assert sorted(least_like(tokens, two, 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_visionzip_keeps_the_dominant_and_means_of_all_others():
    tokens = torch.arange(8.0).view(1, 8, 1)
    scores = torch.tensor([[9.0, 0, 0, 0, 8, 0, 0, 0]])
    keys = torch.tensor([[0, 1.0], [1, 0], [1, 0.1], [0, 1], [0, 1], [0.1, 1], [1, 0], [0, 1]])[None]
    index, values = dominant_and_contextual(tokens, scores, keys, 4, share=0.5)
    assert sorted(index[0, :2].tolist()) == [0, 4]
    assert index[0, 2:].tolist() == [2, 6]  # every third of the six others, from the middle
    others = {1.0, 2, 3, 5, 6, 7}
    sums = [v for n in range(1, 6) for part in combinations(others, n) for v in [sum(part) / n]]
    assert all(value in sums for value in values[0, 2:, 0].tolist())
    model = pruned("by=visionzip,keep=0.5")
    written(model)
    assert model.language.shortener.left[0].gone == 8


def test_pooling_is_a_mean_over_squares():
    model = pruned("by=pool,keep=0.25")
    plain = captioner(before=(1, 2), after=(3, 4, 49))
    with torch.no_grad():
        prompt = plain.prefix(plain.features(IMAGES))
        squares = prompt[:, 2:-3].view(3, 2, 2, 2, 2, WIDTH).mean(dim=(2, 4)).flatten(1, 2)
        expected = plain.language(torch.cat([prompt[:, :2], squares, prompt[:, -3:]], dim=1), 8)
        cache = new_cache(model.language)
        found = model.language(model.prefix(model.features(IMAGES)), PATCHES + 4, cache)
    torch.testing.assert_close(found, expected)
    assert cache_bytes(cache) == 3 * LAYERS * 2 * 4 * WIDTH * 9


@pytest.mark.parametrize("name", ("llava", "qwen2_vl"))
def test_models_of_the_llava_class(tmp_path, name):
    make = dict(llava=tiny_hf.llava, qwen2_vl=tiny_hf.qwen_vl)[name]
    make(tmp_path / name)
    backbone = HuggingFace(str(tmp_path / name), image_size=32 if name != "llava" else None)
    options = Captioning(decoder="own", image_tokens=0, stages=(), max_tokens=4, new_tokens=3)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    plain, model = backbone.captioner(options), backbone.captioner(options)
    plain_bytes = written(plain, images)[1]
    zips = ("by=visionzip",) * (name == "llava")
    for spec in ("by=fastv,at=1", "by=divprune", "by=cdpruner", "by=random,at=1", "by=pool,keep=0.25", *zips):
        model = pruned(spec, backbone.captioner(options).eval())
        ids, held = written(model, images)
        assert held < plain_bytes
        if "random" not in spec:
            assert written(model, images, cached=False)[0].equal(ids)
            assert torch.cat([written(model, image[None])[0] for image in images]).equal(ids)
        assert written(pruned(spec + ",keep=1" * ("pool" not in spec), backbone.captioner(options).eval()), images)


def test_visionzip_sees_the_class_token_of_the_layer_that_llava_takes(tmp_path):
    tiny_hf.llava(tmp_path / "llava")
    backbone = HuggingFace(str(tmp_path / "llava"))
    options = Captioning(decoder="own", image_tokens=0, stages=(), max_tokens=4, new_tokens=3)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    model = pruned("by=visionzip", backbone.captioner(options).eval())
    written(model, images)
    scores, keys = model.language.shortener.choices["0"].look.taken()
    library = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", attn_implementation="eager").eval()
    tower, layer = library.base_model.vision_tower, library.config.vision_feature_layer
    with torch.no_grad():
        shown = tower(images, output_attentions=True).attentions[layer]
    torch.testing.assert_close(scores, shown.mean(dim=1)[:, 0, 1:])
    assert keys.shape == (*scores.shape, tower.config.hidden_size // tower.config.num_attention_heads)


def test_arms_that_look_into_their_towers_never_share_them():
    task = tasks.get("scenes_caption")()
    plain, other, one, two = (captioner(), pruned("by=fastv"), pruned("by=visionzip"), pruned("by=visionzip,keep=0.25"))
    kinds = [made_of(task.locked(model)) for model in (view(plain).model, other, one, two)]
    assert kinds[0] == kinds[1] and kinds[2] != kinds[0] and kinds[2] != kinds[3]


def test_text_without_an_image_is_left_alone():
    model, plain = pruned("by=fastv"), captioner(before=(1, 2), after=(3, 4, 49))
    tokens = torch.randint(0, WORDS, (2, 5))
    owner = torch.zeros(2, dtype=torch.long)
    written(model)  # what an image left is not taken for what text leaves
    with torch.no_grad():
        found, expected = (each.losses(each.starts(1), owner, tokens, tokens) for each in (model, plain))
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("keep=0", "keep"),
        ("keep=1.5", "keep"),
        ("by=nonsense", "nonsense"),
        ("by=pool,at=2", "pool"),
        ("by=visionzip,at=1", "visionzip"),
        ("at=4", "layers 0 to 3"),
        ("by=fastv,at=0", "before layer 0"),
        ("by=divprune,pivots=3", "pivots"),
        ("at=1,quarters=true", "quarters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(spec, names):
    with pytest.raises(UsageError, match=names):
        pruned(spec)


def test_what_a_model_lacks_is_refused_by_name():
    with pytest.raises(UsageError, match="pool makes squares.*0.5 of 16 image tokens are 8"):
        pruned("by=pool,keep=0.5")  # refused when the model is made
    with pytest.raises(UsageError, match="needs a language model"):
        DecoderPrune().edit_model(view(tiny.vit()))
    with pytest.raises(UsageError, match="class token"):
        pruned("by=visionzip", captioner(tower=tiny.vit(class_token=False, global_pool="avg")))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    library = MistralForCausalLM(config)
    model = captioner()
    model.language = Language(library.model, library.lm_head)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        with pytest.raises(UsageError, match="sliding"):
            pruned("", model)
    with pytest.raises(UsageError, match="acts before layer 2 already"):
        pruned("by=random,at=2", pruned("by=fastv"))
