"""Ranks, heads and the dual encoder."""

import math

import pytest
import torch
from torch import nn

from effbench.alignment import Alignment, Prepared, best_answers, overlap, ranks
from effbench.models.dual_encoder import DualEncoder
from effbench.models.vocabulary import Vocabulary

OWNER = torch.tensor([0, 0, 1, 1, 2, 2])


def by_hand(image, text):
    """Ranks by sorting, the slow way."""
    t2i, i2t = [], []
    for caption, own in enumerate(OWNER):
        scores = [float(text[caption] @ image[j]) for j in range(len(image))]
        t2i.append(sum(score >= scores[own] for score in scores))
    for j in range(len(image)):
        scores = [float(text[c] @ image[j]) for c in range(len(text))]
        best = max(s for s, own in zip(scores, OWNER, strict=True) if own == j)
        i2t.append(1 + sum(s >= best for s, own in zip(scores, OWNER, strict=True) if own != j))
    return t2i, i2t


def test_ranks_equal_those_by_hand():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        image, text = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (3, 6))  # many ties
        t2i, i2t = ranks(image, text, OWNER)
        assert (t2i.tolist(), i2t.tolist()) == by_hand(image, text)


def test_ties_and_broken_scores_count_against_the_model():
    constant = ranks(torch.ones(3, 2), torch.ones(6, 2), OWNER)
    assert constant[0].tolist() == [3] * 6 and constant[1].tolist() == [5] * 3
    broken = ranks(torch.full((3, 2), math.nan), torch.ones(6, 2), OWNER)
    assert broken[0].tolist() == [3] * 6 and broken[1].tolist() == [5] * 3
    perfect = ranks(torch.eye(3), torch.eye(3).repeat_interleave(2, 0), OWNER)
    assert perfect[0].tolist() == [1] * 6 and perfect[1].tolist() == [1] * 3


def test_chance_is_what_a_blind_guesser_gets():
    class Task(Alignment):
        def load(self, request):
            raise NotImplementedError

    images, per_image = 40, 5
    owner = torch.arange(images).repeat_interleave(per_image)
    first = {"test": torch.arange(0, images * per_image + 1, per_image).numpy()}
    prepared = Prepared(dict, {"test": torch.zeros(images * per_image, 3)}, first, None, None, None)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(40):
        noise = (torch.randn(n, 16, generator=generator) for n in (images, images * per_image))
        draws.append(ranks(*noise, owner))
    for metric in Task().metrics(prepared, "test"):
        values = torch.cat([pair[metric.items.startswith("i2t")] for pair in draws]).numpy()
        found = metric.value(values)
        seen = float(found.mean() if metric.reduce == "mean" else torch.tensor(found).median())
        assert seen == pytest.approx(metric.chance, rel=0.25), metric.name


@pytest.mark.parametrize("head", ["cosine", "sigmoid", "bilinear"])
def test_heads_reward_the_right_pairs(head):
    torch.manual_seed(0)
    model = DualEncoder(nn.Identity(), nn.Identity(), nn.Identity(), head, 8)
    x = torch.randn(6, 8)
    image, text = model(x, x)
    assert model.loss(image, text) < model.loss(image, text.roll(1, 0))
    model.loss(image, text.flip(0)).backward()
    assert model.logit_scale.grad.abs() > 0


def test_infonce_equals_the_formula():
    model = DualEncoder(nn.Identity(), nn.Identity(), nn.Identity(), "cosine", 3, logit_scale=0.0)
    image, text = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    row = [1.0, 0.0, 0.0]
    right, wrong = (-math.log(math.exp(v) / sum(map(math.exp, row))) for v in (1.0, 0.0))
    assert model.loss(image, text).item() == pytest.approx((right + 2 * wrong) / 3)


def test_vocabulary():
    captions = ["A dog runs", "a dog sits", "the cat"]
    assert Vocabulary(captions).context == 4  # the longest and the end token
    vocabulary = Vocabulary([*captions, "one two three four five"], context=5)
    assert len(vocabulary) == 5  # padding, unknown, a, dog, end
    ids = vocabulary(["a dog barks", "A dog , a dog a dog"]).tolist()
    assert ids[0] == [2, 3, 1, 4, 0] and ids[1] == [2, 3, 2, 3, 4]  # cut before the end token, which stays


def test_agreement_is_whole_with_oneself_and_counts_what_both_lists_hold():
    gallery = torch.eye(6)
    one, other = torch.eye(6)[:2] * 6 + torch.arange(6), torch.eye(6)[:2] * 6 - torch.arange(6)
    best, worse = best_answers(one, gallery, 3), best_answers(other, gallery, 3)
    assert best.tolist() == [[0, 5, 4], [1, 5, 4]] and worse.tolist() == [[0, 1, 2], [1, 0, 2]]
    assert overlap(best, best).tolist() == [1, 1]
    assert overlap(best, worse).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert best_answers(one, gallery[:2], 10).shape == (2, 2)
