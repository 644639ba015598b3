"""Every dense entry of reference_numbers.json, by both counters, to its last printed digit (keys as in that file).

Merging tokens (ToMe) and pruning inside a decoder (FastV) come with those methods; the course report has its own test.
"""

import logging

import open_clip
import pytest
import timm
import torch

import effbench
from effbench.measure.analytic import analytic
from effbench.measure.flops import flops as dispatched

# dense_gmacs, dense_exact_macs
DENSE_GMACS = {
    "deit_tiny_patch16_224": "1.2537",
    "deit_small_patch16_224": "4.5989",
    "vit_base_patch16_224": "17.5638",
    "vit_base_patch32_224": "4.4092",
    "vit_small_patch16_384": "15.49",
    "vit_large_patch16_224": "61.555",
}
EXACT_MACS = {"deit_small_patch16_224": 4598882304}
# openclip_gflops, openclip_exact_flops: image, text
OPENCLIP_GFLOPS = {
    "ViT-B-32": ("8.82", "5.96"),
    "ViT-B-16": ("35.13", "5.96"),
    "ViT-S-16": ("9.2", "3.38"),
    "ViT-L-14": ("162.03", "13.3"),
}
EXACT_FLOPS = {"ViT-B-32": (8817623040, 5959540736)}
# clip_text_vit_b_gflops_by_length
TEXT_GFLOPS = {77: "5.96", 32: "2.442", 24: "1.827", 20: "1.52", 16: "1.215", 14: "1.062", 12: "0.91"}
# evit_gmacs_fused
EVIT_GMACS = {0.9: "4.0219", 0.8: "3.4772", 0.7: "3.0293", 0.6: "2.6353", 0.5: "2.3088"}
# train_cost_in_forwards_deit_small: blocks trained, stem trained
TRAIN_COST = {
    "full": ("2.987", range(12), True),
    "uniform_0_4_8_with_stem": ("2.305", (0, 4, 8), True),
    "uniform_3_7_11_no_stem": ("2.026", (3, 7, 11), False),
    "top3_no_stem": ("1.494", (9, 10, 11), False),
    "head_only": ("1.0", (), False),
}


def both(model, inputs, train=False):
    """FLOPs as dispatched, once the layers' formulas have given the same."""
    count, formulas = dispatched(model, inputs, train=train), analytic(model, inputs, train=train)
    assert count.complete and not formulas.without_formula
    assert count.dense_flops == formulas.flops
    return count.dense_flops


def printed(value, like):
    """The value with as many digits as the published text."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def images(size):
    return torch.empty(1, 3, size, size, device="meta")


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def openclip(name):
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            return open_clip.create_model(name, pretrained=None, device="meta", force_custom_text=True).eval()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", DENSE_GMACS)
def test_dense_towers(name):
    macs = both(on_meta(name), images(int(name[-3:]))) // 2
    assert printed(macs / 1e9, DENSE_GMACS[name]) == DENSE_GMACS[name]
    assert macs == EXACT_MACS.get(name, macs)


@pytest.mark.parametrize("name", OPENCLIP_GFLOPS)
def test_openclip(name):
    model = openclip(name)
    found = (
        both(model.visual, images(model.visual.image_size[0])),
        both(model.text, torch.zeros(1, 77, dtype=torch.long, device="meta")),
    )
    for flops, published in zip(found, OPENCLIP_GFLOPS[name], strict=True):
        assert printed(flops / 1e9, published) == published
    assert found == EXACT_FLOPS.get(name, found)


@pytest.mark.parametrize("length", TEXT_GFLOPS)
def test_text_tower_by_length(length):
    text = openclip("ViT-B-32").text
    text.attn_mask = text.attn_mask[:length, :length]
    found = both(text, torch.zeros(1, length, dtype=torch.long, device="meta"))
    assert printed(found / 1e9, TEXT_GFLOPS[length]) == TEXT_GFLOPS[length]


@pytest.mark.parametrize("keep", EVIT_GMACS)
def test_evit(keep):
    model = effbench.apply(timm.create_model("deit_small_patch16_224"), f"token_prune:keep={keep},fuse=true")
    assert printed(both(model.to("meta"), images(224)) / 2e9, EVIT_GMACS[keep]) == EVIT_GMACS[keep]


@pytest.mark.parametrize("case", TRAIN_COST)
def test_training_in_forwards(case):
    expected, blocks, stem = TRAIN_COST[case]
    model = on_meta("deit_small_patch16_224").requires_grad_(False)
    for part in [model.norm, model.head, *(model.blocks[i] for i in blocks), *([model.patch_embed] if stem else [])]:
        part.requires_grad_(True)
    model.cls_token.requires_grad_(stem)
    model.pos_embed.requires_grad_(stem)
    assert printed(both(model, images(224), train=True) / both(model, images(224)), expected) == expected
