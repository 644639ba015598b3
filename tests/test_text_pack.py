"""text_pack: equal to the library's own padded tower in values, order and gradients, with fewer tokens."""

import copy
import itertools
import pickle

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from tiny import clip, vit

import effbench
from effbench.errors import UsageError
from effbench.measure.flops import flops
from effbench.models.tower import view
from effbench_methods.algorithms.packing import best_fit_decreasing, groups, pack, places
from effbench_methods.text_pack import TextPack

SPECS = ["text_pack", "text_pack:row=7", "text_pack:trim", "text_pack:bucket", "text_pack:bucket,buckets=2"]
LENGTHS = [4, 12, 1, 3, 3, 7, 5, 4, 2, 11]  # with the end-of-text token; 12 is the context


def ids(lengths=LENGTHS, end=49):
    drawn = torch.randint(1, end, (len(lengths), 12), generator=torch.Generator().manual_seed(2))
    for text, length in zip(drawn, lengths, strict=True):
        text[length - 1], text[length:] = end, 0
    return drawn


def tower(**options):
    torch.manual_seed(0)
    size = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2, output_dim=8)
    return TextTransformer(**size | options).eval()


def custom(**text):
    torch.manual_seed(0)
    size = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2)
    vision = dict(image_size=32, patch_size=8, width=24, head_width=8, layers=4)
    return open_clip.CustomTextCLIP(16, vision, size | text).eval()


def encode(model, texts):
    return model.encode_text(texts) if hasattr(model, "encode_text") else model(texts)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "make, end",
    [
        (tower, 49),
        (lambda: tower(proj_type="none"), 49),
        (lambda: tower(proj_bias=True, ls_init_value=0.3), 49),
        (lambda: tower(pool_type="eos", eos_id=5), 5),
        (clip, 49),
        (custom, 49),
    ],
)
def test_features_and_gradients_are_the_library_s_own(spec, make, end):
    model, texts = make().train(), ids(end=end)
    native = copy.deepcopy(model)
    keys = list(model.state_dict())
    effbench.apply(model, spec)
    ours, theirs = encode(model, texts), encode(native, texts)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5
    assert list(model.state_dict()) == keys
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = {name: p.grad for name, p in native.named_parameters() if p.grad is not None}
    found = {name.replace("qkv.", "in_proj_"): p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name.replace("attn.proj.", "attn.out_proj."): gradient for name, gradient in found.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("spec", SPECS)
def test_a_text_does_not_depend_on_its_batch(spec):
    model = effbench.apply(tower(), spec)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids())
        assert (model(ids()[order]) - whole[order]).abs().max() < 1e-5
        assert (model(ids()[3:4]) - whole[3:4]).abs().max() < 1e-5
        other = ids()
        other[1:] = other[1:].flip(0)
        assert (model(other)[:1] - whole[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("spec, rows", [("text_pack:trim", (3, 5)), ("text_pack:row=8", (2, 6))])
def test_padding_does_not_enter_the_tower(spec, rows):
    model = effbench.apply(tower(), spec)
    seen = []
    model.transformer.resblocks[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(ids([5, 3, 3]))
    assert seen == [(*rows, 24)]
    model(ids([2]))
    assert seen[1] == (1, 2, 24)


def test_the_model_copies_pickles_and_autocasts():
    model = effbench.apply(clip(), "text_pack")
    with torch.inference_mode():
        expected = model.encode_text(ids())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.encode_text(ids()), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.encode_text(ids()) - expected).abs().max() < 0.1
    model, native = (copy.deepcopy(m).bfloat16() for m in (model, clip()))
    with torch.inference_mode():
        assert (model.encode_text(ids()) - native.encode_text(ids())).abs().max() < 0.1


def test_compiled_with_its_graph_break_it_is_the_same():
    model = effbench.apply(tower(), "text_pack")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for lengths in (LENGTHS, LENGTHS[:4]):
            assert (compiled(ids(lengths)) - model(ids(lengths))).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["trim", "bucket", "pack"])
def test_no_text_is_no_error(how):
    model = effbench.apply(clip(), f"text_pack:how={how}")
    with torch.no_grad():
        assert encode(model, ids()[:0]).shape == (0, 16)


def test_clip_takes_short_texts():
    model = clip()
    with torch.no_grad():
        expected = model.encode_text(ids([3, 5, 4]))
        view(model)
        assert (model.encode_text(ids([3, 5, 4])) - expected).abs().max() < 1e-5
        assert (model.encode_text(ids([3, 5, 4])[:, :5]) - expected).abs().max() < 1e-5
        normed = model.encode_text(ids([3, 5, 4])[:, :5], normalize=True)
        assert (normed.norm(dim=-1) - 1).abs().max() < 1e-5
    assert isinstance(model, open_clip.CLIP)


@pytest.mark.parametrize("how", ["trim", "pack"])
def test_reference_flops(how):
    model = effbench.apply(TextTransformer(vocab_size=2), f"text_pack:{how}")
    # reference_numbers.json: clip_text_vit_b_gflops_by_length
    for length, gflops in [(77, 5.960), (32, 2.442), (24, 1.827), (20, 1.520), (16, 1.215), (14, 1.062), (12, 0.910)]:
        texts = torch.zeros(1, 77, dtype=torch.long)
        texts[0, length - 1] = 1
        assert round(flops(model, texts).dense_flops / 1e9, 3) == gflops


def test_packed_flops_are_those_of_the_rows_and_the_mask_is_seen():
    model = effbench.apply(tower(), "text_pack:row=8")
    count = flops(model, ids([5, 3, 3, 4, 1]))  # rows of 8: 5+3, 4+3+1
    linear, pairs = 2 * 2 * 12 * 16 * 24 * 24 + 2 * 5 * 24 * 8, 2 * 2 * 2 * 24
    assert count.dense_flops == linear + pairs * 2 * 64
    assert count.useful_flops == linear + pairs * (15 + 6 + 10 + 6 + 1)


def test_notes_tell_the_share_of_the_places_that_hold_captions():
    model, method = tower(), TextPack(row=8)
    seen = view(model)
    method.edit_model(seen)
    assert method.notes(seen) == []
    model(ids([5, 3, 3, 4, 1]))
    (note,) = method.notes(seen)
    assert "27 % padded to 12, 64 % trimmed, 100 % in 4 buckets, 100 % packed in rows of 8" in note


def test_best_fit_decreasing():
    packing = best_fit_decreasing(np.array([3, 5, 4, 4, 2]), 8)  # 5 | 4 4 | 3 goes to the 5, 2 to a new row
    assert packing.row.tolist() == [0, 0, 1, 1, 2] and packing.start.tolist() == [5, 0, 0, 4, 0]
    assert pack(np.array([6, 6]), 8).width == 6  # as short as two rows can be
    assert pack(np.array([9]), 8).width == 9  # never cut


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 200)
    packing = pack(lengths, 40)
    sequence, position, last = places(lengths, packing)
    assert sequence.shape == (packing.rows, packing.width)
    assert (sequence.ravel()[last] == np.arange(200)).all() and (position.ravel()[last] == lengths - 1).all()
    held = set(zip(sequence.ravel().tolist(), position.ravel().tolist(), strict=True))
    assert held == {(s, p) for s, n in enumerate(lengths.tolist()) for p in range(n)}
    assert lengths.sum() > 0.9 * packing.rows * packing.width


def test_groups_are_the_cheapest():
    lengths = np.random.default_rng(0).integers(1, 12, 40)
    found = groups(lengths, 3)
    assert sorted(np.concatenate(found).tolist()) == list(range(40))
    assert all(lengths[a].max() < lengths[b].min() for a, b in itertools.pairwise(found))
    distinct = np.unique(lengths).tolist()
    cheapest = min(
        sum(int(((lengths > low) & (lengths <= high)).sum()) * high for low, high in itertools.pairwise((0, *cuts)))
        for cuts in ((*inner, distinct[-1]) for inner in itertools.combinations(distinct[:-1], 2))
    )
    assert sum(len(group) * lengths[group].max() for group in found) == cheapest
    assert len(groups(np.array([3, 3]), 4)) == 1


def hugging_face():
    model = custom()
    model.text = type("HFTextEncoder", (torch.nn.Module,), {})()
    return model


@pytest.mark.parametrize(
    "make, spec, message",
    [
        (tower, "text_pack:sort", "how=sort is not valid"),
        (tower, "text_pack:row=0", "row=0 is not valid"),
        (tower, "text_pack:bucket,buckets=0", "buckets=0 is not valid"),
        (tower, "text_pack:trim,row=8", "row says nothing with how=trim"),
        (tower, "text_pack:buckets=2", "buckets says nothing with how=pack"),
        (tower, "text_pack:row=13", "row=13 is longer than the context of 12"),
        (vit, "text_pack", "VisionTransformer has no text tower"),
        (hugging_face, "text_pack", "a HFTextEncoder"),
        (lambda: tower(no_causal_mask=True), "text_pack", "bidirectional"),
        (lambda: tower(embed_cls=True), "text_pack", "embed_cls"),
        (lambda: tower(output_tokens=True), "text_pack", "output_tokens"),
        (lambda: tower(pool_type="last"), "text_pack", "pool_type=last"),
        (lambda: custom(pool_type="first"), "text_pack", "pool_type=first"),
        (lambda: effbench.apply(tower(), "text_pack:trim"), "text_pack", "both lay out the texts"),
    ],
)
def test_bad_input_is_refused(make, spec, message):
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(make(), spec)
    assert refused.value.hint
