"""FLOPs of captioners against products counted by hand: every token of the decoder, with its cache as it grows."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

from effbench import records
from effbench.examine import tokens_per_layer
from effbench.measure.analytic import analytic_of, disagreement
from effbench.measure.flops import flops, flops_of
from effbench.models.captioner import IGNORE, Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import generate
from effbench.models.language import tiny as tiny_language
from effbench.models.patch_tokens import TimmTokens

TOWER, WIDTH, LAYERS, WORDS, HIDDEN = 24, 32, 3, 50, 128
IMAGES, PATCHES, NEW = 2, 16, 5
PREFIX = PATCHES + 1  # the start of a text follows the image


def captioner(beams=1):
    torch.manual_seed(0)
    options = records.Captioning(width=WIDTH, layers=LAYERS, image_tokens=PATCHES, beams=beams, new_tokens=NEW)
    language = tiny_language(WORDS, LAYERS, WIDTH)
    connector = PooledLinear(TOWER, WIDTH, 4)
    return Captioner(TimmTokens(tiny.vit()), connector, language, (), (49,), 48, options).eval()


def write(model, tokens):
    def step():
        prefix = model.prefix(model.features(tiny.IMAGES))
        return generate(model.language, prefix, tokens, model.end, beams=model.options.beams, exactly=True)

    return step


def decoder(queries, pairs, predicted):
    """FLOPs of the decoder for one text: tokens that pass through it, pairs in attention, tokens that are predicted."""
    block = 4 * WIDTH**2 + 3 * WIDTH * HIDDEN  # q, k, v and o; gate, up and down
    return 2 * (LAYERS * (queries * block + 2 * pairs * WIDTH) + predicted * WIDTH * WORDS)


def both(step, model):
    with torch.no_grad():
        return flops_of(step, model), analytic_of(step, model)


def test_a_written_text_costs_its_tower_its_prefix_and_each_token_over_a_growing_cache():
    model = captioner()
    tower = flops(model.image_encoder, tiny.IMAGES[:1]).dense_flops
    connector = 2 * PATCHES * TOWER * WIDTH
    prefill = decoder(PREFIX, PREFIX**2, 1)
    keys = [PREFIX + n for n in range(1, NEW)]  # that the second token, the third ... look at, itself among them
    for tokens, text in ((1, prefill), (NEW, prefill + decoder(NEW - 1, sum(keys), NEW - 1))):
        count, formulas = both(write(model, tokens), model)
        assert count.dense_flops == IMAGES * (tower + connector + text) and count.complete
        assert (formulas.flops, formulas.without_formula) == (count.dense_flops, ())
        hidden = LAYERS * 2 * 2 * WIDTH * (PREFIX**2 - PREFIX) // 2  # the pairs above the diagonal
        assert count.useful_flops == count.dense_flops - IMAGES * hidden


def test_beams_cost_a_decoder_step_each_and_share_the_prefix():
    model = captioner(beams=3)
    first, whole = (both(write(model, tokens), model)[0].dense_flops for tokens in (1, 2))
    assert whole - first == IMAGES * 3 * decoder(1, PREFIX + 1, 1)
    assert disagreement(*both(write(model, NEW), model)) == ""


def test_a_training_step_is_forward_and_backward_of_what_is_trained():
    model = captioner()
    model.image_encoder.requires_grad_(False)
    features = model.features(tiny.IMAGES).detach()
    tokens = torch.randint(0, WORDS, (IMAGES, 7))
    target = tokens.clone()
    target[0, 5:] = IGNORE

    def loss():
        return model.loss(model.prefix(features), tokens, target)

    queries = PREFIX + 6  # what is predicted last is not read
    decoding = IMAGES * decoder(queries, queries**2, 7)
    connector = 2 * IMAGES * PATCHES * TOWER * WIDTH
    count = flops_of(lambda: loss().backward(), model)
    assert count.dense_flops == 3 * decoding + 2 * connector  # the frozen tower's tokens take no gradient
    assert analytic_of(loss, model, train=True).flops == count.dense_flops
    model.connector.requires_grad_(False)
    assert flops_of(loss, model).dense_flops == decoding + connector


SHAPE = dict(vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "grouped keys": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "a window": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_formulas_of_other_decoders_agree_with_what_is_dispatched(name, padded):
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    language = Language(whole.get_decoder(), whole.get_output_embeddings())
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]) if padded else None
    prefix = torch.randn(2, 8, 32)
    count, formulas = both(lambda: generate(language, prefix, 4, 1, exactly=True, mask=mask), language)
    assert formulas.without_formula == () and formulas.flops == count.dense_flops
    assert count.useful_flops < count.dense_flops


def test_grouped_keys_save_projections_and_not_the_products_of_attention():
    found = []
    for heads in (4, 2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_key_value_heads=heads)).eval()
        found.append(flops(model, torch.zeros(1, 9, dtype=torch.long), use_cache=False).dense_flops)
    assert found[0] - found[1] == 2 * 2 * 2 * 9 * 32 * 16  # 2 layers, k and v: 9 tokens, half of 32 channels


def test_images_of_different_sizes_in_one_row_attend_each_to_itself():
    torch.manual_seed(0)
    rope = dict(type="mrope", mrope_section=[1, 1, 2])
    text = dict(**SHAPE, num_key_value_heads=2, rope_scaling=rope)
    vision = dict(embed_dim=24, depth=2, num_heads=3, hidden_size=32, patch_size=4)
    config = Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=45, vision_start_token_id=46)
    tower = Qwen2VL(config).model.visual.eval()
    pixels, grid = torch.randn(48, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4], [1, 4, 8]])
    count, formulas = both(lambda: tower(pixels, grid_thw=grid), tower)
    assert formulas.without_formula == () and formulas.flops == count.dense_flops
    attention = formulas.by_layer["blocks.0.attn"]
    assert attention == 2 * 2 * (16**2 + 32**2) * 24


def test_tokens_are_those_of_the_image_tower():
    model = captioner()
    seen = tokens_per_layer(model.image_encoder, write(model, NEW))
    assert seen == (PATCHES + 1,) * 4
