"""Writing: greedy as transformers writes, beams as an exhaustive search, with a cache and without."""

import itertools

import pytest
import tiny_hf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.models.captioner import Language
from effbench.models.decoding import generate, new_cache, read, shared

END = 2


def language(**changed):
    model = tiny_hf.loud(LlamaForCausalLM(LlamaConfig(**tiny_hf.LLAMA | changed)))
    return Language(model.model, model.lm_head).eval(), model


def prefix(rows=3, tokens=5):
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def steps_of(writer):
    """Widths (batch, tokens) of what enters the body, step by step."""
    seen = []
    writer.body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("beams", [1, 3])
def test_writes_what_the_library_writes(beams):
    writer, model = language()
    for most, exactly in ((7, True), (7, False)):
        ids, _ = generate(writer, prefix(), most, END, beams=beams, exactly=exactly)
        assert ids.shape == (3, most)
        if beams == 1:
            stop = dict(min_new_tokens=most, eos_token_id=-1) if exactly else dict(eos_token_id=END, pad_token_id=END)
            attended = torch.ones(3, 5, dtype=torch.long)
            expected = model.generate(
                inputs_embeds=prefix(), attention_mask=attended, max_new_tokens=most, do_sample=False, **stop
            )
            assert ids[:, : expected.shape[1]].equal(expected) and (ids[:, expected.shape[1] :] == END).all()
        elif exactly:
            expected = model.generate(
                inputs_embeds=prefix(), max_new_tokens=most, num_beams=beams, do_sample=False, eos_token_id=-1
            )
            assert ids.equal(expected)


def test_with_a_cache_and_without():
    writer, _ = language()
    for exactly in (True, False):
        cached, held = generate(writer, prefix(), 9, END, exactly=exactly)
        again, none = generate(writer, prefix(), 9, END, exactly=exactly, cached=False)
        assert cached.equal(again) and held and not none


def test_one_beam_is_greedy_and_more_are_no_worse():
    from effbench.models import decoding

    writer, _ = language()
    greedy, _ = generate(writer, prefix(), 6, END)
    cache = new_cache(writer)
    logits = writer(prefix(), 4, cache)[:, -1]
    assert decoding._beams(writer, logits, cache, None, 6, END, False, 1).equal(greedy)
    for exactly in (True, False):
        scores = []
        for beams in (1, 4, 16):
            ids, _ = generate(writer, prefix(), 6, END, beams=beams, exactly=exactly)
            scores.append(torch.stack([mean(writer, prefix()[i], ids[i], exactly) for i in range(3)]))
        assert (scores[2] >= scores[0] - 1e-5).all() and (scores[2] > scores[0] + 1e-3).any()


def mean(writer, start, ids, exactly=False):
    """Mean log-probability per token of one text, its end included."""
    ids = ids.tolist()
    ids = ids[: ids.index(END) + 1] if END in ids and not exactly else ids
    whole = torch.cat([start, writer.embed(torch.tensor(ids[:-1], dtype=torch.long))])[None]
    found = writer(whole, len(start) - 1)[0].log_softmax(dim=-1)
    return found.gather(1, torch.tensor(ids)[:, None]).mean()


@pytest.mark.parametrize("exactly, words, seed", [(False, 3, 53), (True, 3, 0), (False, 5, 0), (True, 5, 1)])
def test_beams_that_prune_nothing_are_an_exhaustive_search(exactly, words, seed):
    """Of 3 words and seed 53 the best text is none that begins as one of the 3 likeliest pairs."""
    most = 3
    writer, _ = language(vocab_size=words)
    starts = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed))
    found, _ = generate(writer, starts, most, END, beams=words**2, exactly=exactly)
    for start, ids in zip(starts, found, strict=True):
        texts = itertools.product(range(words), repeat=most)
        if not exactly:
            texts = {t[: t.index(END) + 1] if END in t else t for t in texts}
        best = max(texts, key=lambda text: mean(writer, start, torch.tensor(text), exactly).item())
        assert ids.tolist() == [*best, *[END] * (most - len(best))]


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_in_front_changes_nothing(beams):
    writer, _ = language()
    rows = [prefix()[i : i + 1, : 5 - i] for i in range(3)]
    alone = [generate(writer, row, 6, END, beams=beams, exactly=True)[0] for row in rows]
    padded = torch.stack([torch.cat([torch.randn(5 - row.shape[1], 16), row[0]]) for row in rows])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    together, _ = generate(writer, padded, 6, END, beams=beams, exactly=True, mask=mask)
    assert together.equal(torch.cat(alone))
    wrong, _ = generate(writer, padded, 6, END, beams=beams, exactly=True)
    assert not wrong.equal(together)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("wanted", [1, 6])
def test_no_step_behind_the_last_token(beams, wanted):
    """A model that never ends stops at the most; what is asked for exactly goes on behind an end."""
    writer, _ = language()
    seen = steps_of(writer)
    ids, _ = generate(writer, prefix(), wanted, -1, beams=beams)
    assert seen == [(3, 5)] + [(3 * beams, 1)] * (wanted - 1) and (ids >= 0).all()
    always = torch.zeros(48)
    always[END] = 1e4
    writer.head.register_forward_hook(lambda _, __, out: out + always)
    seen.clear()
    assert (generate(writer, prefix(), wanted, END, beams=beams)[0] == END).all()
    assert seen == [(3, 5)]
    seen.clear()
    generate(writer, prefix(), wanted, END, beams=beams, exactly=True)
    assert len(seen) == wanted


def test_bytes_of_the_cache():
    writer, _ = language()
    layers, kv_heads, width = 3, 1, 8
    _, held = generate(writer, prefix(), 7, END, exactly=True)
    assert held == 2 * layers * 3 * kv_heads * (5 + 7 - 1) * width * 4  # the last token is written, never read
    _, first = generate(writer, prefix(), 1, END)
    assert first == 2 * layers * 3 * kv_heads * 5 * width * 4
    _, four = generate(writer, prefix(), 7, END, beams=4, exactly=True)
    assert four == 4 * held


def test_a_prompt_that_is_read_once_serves_texts_and_writing():
    model, _ = language()
    with torch.no_grad():
        expected, held = generate(model, prefix(), 6, END, exactly=True)
        prompt = read(model, prefix())
        other = shared(prompt.cache)
        model(prefix(tokens=3), 0, other)
        other.reorder_cache(torch.tensor([1, 1, 0]))
        found, same = generate(model, prefix(), 6, END, exactly=True, prompt=prompt)
    assert found.equal(expected) and held == same
