"""The view of a decoder: layers taken out, states and attention shown, on three families of transformers."""

import copy
import pickle

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from effbench.errors import UsageError
from effbench.models.captioner import Language
from effbench.models.decoder import Decoder
from effbench.models.decoding import generate

WORDS, WIDTH, LAYERS = 40, 32, 5
KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
X = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def make(family, layers=LAYERS, kinds=KINDS):
    torch.manual_seed(0)
    common = dict(vocab_size=WORDS, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if family == "gpt2":
        config = GPT2Config(n_embd=WIDTH, n_layer=layers, n_head=4, n_positions=64, **common)
        model = GPT2LMHeadModel(config)
    else:
        common |= dict(hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48)
        common |= dict(max_position_embeddings=64)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common))
        elif family == "neox":  # its norms are called attention too, and stand before it
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**common))
        else:
            more = dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=4, layer_types=list(kinds))
            model = Qwen2ForCausalLM(Qwen2Config(**more, **common))
    for name, p in model.named_parameters():  # so that layers do something, none like another
        if p.ndim > 1 and "embed" not in name and "wte" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return Language(model.get_decoder(), model.get_output_embeddings()).eval()


@pytest.fixture(params=["llama", "gpt2", "qwen2", "neox"])
def family(request):
    return request.param


@torch.no_grad()
def test_what_is_left_is_a_model_of_these_layers_alone(family):
    language, kept = make(family), [0, 3, 4]
    decoder = Decoder(language)
    layers = list(decoder.blocks)
    decoder.keep_blocks(reversed(kept))  # they stay in order
    assert [*decoder.blocks] == [layers[i] for i in kept] and len(decoder) == 3
    assert len(Decoder(language)) == 3  # a second look finds them

    built = make(family, layers=3, kinds=[KINDS[i] for i in kept])
    built.load_state_dict(language.state_dict())  # strict: the same keys
    assert torch.equal(built(X), language(X))
    for options in (dict(), dict(beams=2)):
        ids, held = generate(language, X, 8, WORDS - 1, exactly=True, **options)
        expected, cache = generate(built, X, 8, WORDS - 1, exactly=True, **options)
        assert torch.equal(ids, expected) and held == cache
    whole, full = generate(make(family), X, 8, WORDS - 1, exactly=True)
    greedy, held = generate(language, X, 8, WORDS - 1, exactly=True)
    assert not torch.equal(whole, greedy)
    assert held < full if family == "qwen2" else held * LAYERS == full * 3  # a layer of a window caches less
    assert torch.equal(greedy, generate(language, X, 8, WORDS - 1, exactly=True, cached=False)[0])
    for other in (copy.deepcopy(language), pickle.loads(pickle.dumps(language))):
        assert torch.equal(generate(other, X, 8, WORDS - 1, exactly=True)[0], greedy)


@torch.no_grad()
def test_all_layers_kept_changes_nothing(family):
    language = make(family)
    before = language(X)
    Decoder(language).keep_blocks(range(LAYERS))
    assert torch.equal(language(X), before)
    assert generate(language, X, 4, WORDS - 1)[0].shape == (3, 4)


def test_each_layer_keeps_its_kind_of_attention():
    language = make("qwen2")
    Decoder(language).keep_blocks([1, 4])
    assert language.body.config.layer_types == ["sliding_attention", "full_attention"]
    from transformers import DynamicCache

    windows = [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=language.body.config).layers]
    assert windows == [True, False]


def test_layers_that_cannot_be_kept_are_refused_and_all_stay(family):
    decoder = Decoder(make(family))
    for kept, message in (([], "no layer of .* would be left"), ([1, 5], "layer 5 does not exist: .* layers 0 to 4")):
        with pytest.raises(UsageError, match=message):
            decoder.keep_blocks(kept)
    with pytest.raises(UsageError, match="layer -2 does not exist"):
        decoder.keep_blocks([-2, 3])
    assert len(decoder) == LAYERS == decoder.config.num_hidden_layers


@torch.no_grad()
def test_states_are_those_of_the_library(family):
    language = make(family)
    decoder, found = Decoder(language), []
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in language.modules())

    def see(depth, tokens):
        found.append((depth, tokens))
        return tokens * 0  # must not get into the model

    with decoder.seeing(see):
        shown = language(X)
    assert torch.equal(shown, language(X)) and len(found) == LAYERS + 1
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in language.modules()) == hooks
    expected = language.body(inputs_embeds=X, output_hidden_states=True, use_cache=False).hidden_states
    norm = next(getattr(language.body, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(language.body, n))
    for (depth, tokens), place in zip(found, range(LAYERS + 1), strict=True):
        assert depth == place
        assert torch.equal(norm(tokens) if depth == LAYERS else tokens, expected[place])


@torch.no_grad()
def test_attention_rows_sum_to_1_and_look_back(family):
    language = make(family)
    decoder, found = Decoder(language), {}
    before = language(X)
    assert decoder.config._attn_implementation == "sdpa"
    with decoder.showing_attention(lambda layer, weights: found.setdefault(layer, weights)):
        assert (language(X) - before).abs().max() < 1e-4
    assert decoder.config._attn_implementation == "sdpa" and torch.equal(language(X), before)
    assert list(found) == list(range(LAYERS))
    for layer, weights in found.items():
        assert weights.shape == (3, 4, 6, 6)
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-5 and weights.triu(1).abs().max() == 0
        window = family == "qwen2" and KINDS[layer] == "sliding_attention"
        assert (weights[:, :, 5, :2].abs().max() == 0) == window  # a window of 4 tokens


def test_the_implementation_is_put_back_after_an_error(family):
    language = make(family)
    decoder = Decoder(language)
    hooks = sum(len(m._forward_hooks) for m in language.modules())
    with pytest.raises(ZeroDivisionError), decoder.showing_attention(lambda *_: 1 / 0):
        language(X)
    assert decoder.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_hooks) for m in language.modules()) == hooks


@pytest.mark.parametrize("failure", ["raises", "warns", "gives none", "has none"])
def test_a_model_that_cannot_give_attention_is_refused(failure, monkeypatch):
    language = make("llama")
    decoder = Decoder(language)
    own = type(language.body).set_attn_implementation
    if failure == "raises":

        def refuse(self, name):
            if name == "eager":
                raise ValueError("not supported")
            own(self, name)

        monkeypatch.setattr(type(language.body), "set_attn_implementation", refuse)
    elif failure == "warns":  # as the library does of a model with an attention of its own
        monkeypatch.setattr(type(language.body), "_can_set_attn_implementation", classmethod(lambda cls: False))
    elif failure == "gives none":
        decoder.blocks[2].self_attn.register_forward_hook(lambda _, __, out: (out[0], None))
    else:
        decoder.blocks[3].mixer = decoder.blocks[3]._modules.pop("self_attn")
    with (
        pytest.raises(UsageError, match="LlamaModel cannot give the rows") as refused,
        decoder.showing_attention(lambda *_: None),
    ):
        language(X)
    assert "by=block_influence" in refused.value.hint
    assert decoder.config._attn_implementation == "sdpa"


def test_a_model_without_a_list_of_layers_is_refused():
    language = make("llama")
    language.body.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match="LlamaModel has no list of 7 equal layers"):
        Decoder(language)
