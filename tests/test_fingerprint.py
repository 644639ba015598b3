"""What a model's outputs are recognised by, and how often each operation runs."""

import math
import statistics

import pytest
import tiny
import torch
from torch import nn

import effbench
from effbench.gate_quality import distance
from effbench.measure.census import census
from effbench.measure.fingerprint import PROJECTIONS, fingerprint
from effbench.measure.kernels import kernels

OUT = {"image": torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), "text": torch.ones(3, 5)}


def changed(**outputs):
    return fingerprint(OUT | outputs, 8)


def test_the_checksum_is_of_every_bit_and_of_names_and_shapes():
    one = fingerprint(OUT, 8)
    assert one == fingerprint(dict(reversed(OUT.items())), 8)
    for other in (
        changed(image=torch.nextafter(OUT["image"], torch.tensor(9.0))),
        changed(text=torch.ones(5, 3)),
        changed(text=torch.ones(3, 5, dtype=torch.float64)),
        fingerprint({"image": OUT["image"], "texts": OUT["text"]}, 8),
    ):
        assert other.sha256 != one.sha256


@pytest.mark.parametrize("apart", [1e-5, 1e-3, 0.3])
def test_projections_estimate_the_relative_distance(apart):
    generator = torch.Generator().manual_seed(5)
    ratios = []
    for _ in range(40):
        outputs, noise = torch.randn(2, 8, 64, generator=generator, dtype=torch.float64)
        moved = outputs + apart * noise * outputs.norm() / noise.norm()
        found = distance(fingerprint({"image": outputs}, 8).vectors, fingerprint({"image": moved}, 8).vectors)
        ratios.append(found / apart)
    assert statistics.median(ratios) == pytest.approx(1, abs=0.15)
    assert 0.4 < min(ratios) and max(ratios) < 2.5
    assert 0.15 < statistics.stdev(map(math.log, ratios)) < 0.35  # of two estimates of 18 % each


def test_what_is_not_finite_or_not_a_fraction():
    one = fingerprint(OUT, 8)
    for value in (math.nan, math.inf):
        lost = changed(image=OUT["image"].clone().fill_(value))
        assert distance(one.vectors, lost.vectors) == 1 and lost.sha256 != one.sha256
    ids = fingerprint({"ids": torch.arange(6)}, 2)
    assert ids.vectors == {} and distance(ids.vectors, ids.vectors) is None
    assert [len(vector) for vector in one.vectors.values()] == [PROJECTIONS] * 2


def test_operations_by_name_without_views():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Flatten())
    with torch.no_grad():
        assert census(lambda: model(torch.ones(2, 4)).reshape(8).t()) == {
            "aten::addmm": 2,
            "aten::gelu": 1,
            "aten::ones": 1,
        }


def test_a_layer_more_and_a_kernel_less_show():
    def seen(model):
        with torch.inference_mode():
            return census(lambda: model(tiny.IMAGES))

    plain, more = seen(tiny.vit()), seen(tiny.vit(depth=5))
    assert more["aten::gelu"] == 5 == plain["aten::gelu"] + 1
    slow = tiny.vit()
    for module in slow.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert seen(slow)["aten::_softmax"] == 4 and "aten::_softmax" not in plain


def test_kernels_may_be_watched_in_the_same_pass():
    model = effbench.apply(tiny.vit(), "token_prune:keep=0.5,at=1")
    found = []
    with torch.inference_mode():
        both = census(lambda: found.append(kernels(lambda: model(tiny.IMAGES))))
        assert both == census(lambda: model(tiny.IMAGES)) and both["aten::topk"] == 1
        assert found == [kernels(lambda: model(tiny.IMAGES))]


def test_quantised_weights_are_counted_by_their_parts():
    model = effbench.apply(tiny.vit(embed_dim=48), "quantize")
    with torch.inference_mode():
        assert sum(census(lambda: model(tiny.IMAGES)).values()) > 20
