"""Weights move in memory; nothing else changes."""

import copy

import numpy as np
import torch
from tiny import IMAGES, vit
from torch import nn

from effbench.measure.placement import place_anew


def addresses(*models):
    return [tensor.data_ptr() for model in models for tensor in model.parameters()]


def test_weights_move_and_stay_the_same():
    one = vit()
    other = copy.deepcopy(one)
    with torch.inference_mode():
        expected = one(IMAGES)
    parameters, before = list(one.parameters()), addresses(one, other)
    place_anew([one, other], np.random.default_rng(0))
    assert all(now is was for now, was in zip(one.parameters(), parameters, strict=True))
    assert sum(now != was for now, was in zip(addresses(one, other), before, strict=True)) > len(before) / 2
    with torch.inference_mode():
        assert torch.equal(one(IMAGES), expected) and torch.equal(other(IMAGES), expected)


def test_what_shares_memory_goes_on_sharing_it():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].bias.detach()[:2])
    place_anew([model], np.random.default_rng(0))
    model[0].bias.data.fill_(7)
    assert model[1].weight is model[0].weight and model.view.tolist() == [7, 7]


def test_quantised_and_empty_weights_keep_their_values():
    model = nn.Linear(4, 4)
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("packed", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    place_anew([model], np.random.default_rng(0))
    assert model.packed.dequantize().tolist() == [1] * 4 and model.nothing.numel() == 0
