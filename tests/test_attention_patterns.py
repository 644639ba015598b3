"""Sparse attention's patterns and paths as functions of tensors: every path computes what the mask says."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from effbench.errors import EffbenchError
from effbench.models.attention import Projections
from effbench_methods.algorithms import attention_paths
from effbench_methods.algorithms.attention_gather import gathered
from effbench_methods.algorithms.attention_paths import best_keys, block_mask, fastest, flex, masked
from effbench_methods.algorithms.attention_patterns import Layout, block_sparse, sliding, windows

PATTERNS = {
    "window": windows((6, 6), 3, False),
    "shifted": windows((6, 6), 3, True),
    "oblong": windows((6, 6), 2, True),
    "sliding": sliding((6, 6), 3),
    "block": block_sparse(36, 5),
    "bigbird": block_sparse(36, 4, 2, seed=3),
}


def projections(tokens, batch=2, heads=3, width=8, packed=True):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 3, heads, width, generator=random).permute(2, 0, 3, 1, 4)
    return Projections(*(x if packed else x.contiguous()).unbind(0), 0.3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", PATTERNS)
def test_gathering_is_the_masked_reference(name, prefix, grad):
    layout = Layout(PATTERNS[name], prefix, (6, 6))
    for packed in (True, False):
        p = projections(36 + prefix, packed=packed)
        with torch.set_grad_enabled(grad):
            assert (gathered(p, layout) - masked(p, layout.seen)).abs().max() < 1e-5
            bias = torch.randn(2, 1, 1, 36 + prefix)
            assert (gathered(p, layout, bias) - masked(p, layout.seen, bias)).abs().max() < 1e-5


def test_gathering_passes_the_reference_gradient():
    layout = Layout(PATTERNS["shifted"], 1, (6, 6))
    gradients = []
    for path in (lambda p: gathered(p, layout), lambda p: masked(p, layout.seen)):
        p = projections(37)
        q = p.q.clone().requires_grad_()
        path(p._replace(q=q)).square().sum().backward()
        gradients.append(q.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5


def test_windows_are_what_swin_says():
    seen = windows((4, 6), 2, False).seen
    assert seen.sum(1).tolist() == [4] * 24
    assert torch.where(seen[0])[0].tolist() == [0, 1, 6, 7]
    shifted = windows((4, 6), 2, True).seen
    assert torch.where(shifted[0])[0].tolist() == [0]  # the corner is alone: nothing wraps around the border
    assert torch.where(shifted[7])[0].tolist() == [7, 8, 13, 14]
    assert windows((4, 4), 4, True).seen.all()  # one window fills the grid: there is nothing to shift


def test_sliding_window_is_cut_at_the_border():
    seen = sliding((12, 12), 5).seen
    assert seen[0].sum() == 9 and seen[5 * 12 + 5].sum() == 25 and torch.equal(seen, seen.T)


def test_blocks_see_their_neighbours_and_random_others():
    near = block_sparse(20, 4).seen
    assert torch.where(near[9])[0].tolist() == list(range(4, 16))
    seen = block_sparse(20, 4, 2, seed=1).seen
    assert (seen | ~near).all() and seen[9].sum() == 20 and seen[0].sum() == 16
    assert torch.equal(seen, block_sparse(20, 4, 2, seed=1).seen)


@pytest.mark.parametrize("name", PATTERNS)
def test_prefix_tokens_see_all_and_are_seen_by_all(name):
    seen = Layout(PATTERNS[name], 2, (6, 6)).seen
    assert seen[:2].all() and seen[:, :2].all() and not seen.all()


def test_topk_keeps_the_best_and_the_prefix():
    p = projections(11)
    y = best_keys(p, 3, 1)
    scores = p.scale * p.q @ p.k.transpose(-2, -1)
    cut = scores[..., 1:].sort(descending=True).values[..., 2:3]
    seen = F.pad(scores[..., 1:] >= cut, (1, 0), value=True)
    seen[:, :, 0] = True
    assert (y - masked(p, seen)).abs().max() < 1e-5
    assert (best_keys(p, 10, 1) - masked(p, torch.ones(11, 11, dtype=torch.bool))).abs().max() < 1e-5


def test_timing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    p = projections(5)
    choice = fastest(
        {"masked": lambda p: masked(p, torch.ones(5, 5, dtype=torch.bool))}, (2, 3, 5, 8), 0.3, p.q.dtype, p.q.device
    )
    assert choice.path == "masked" and torch.equal(torch.get_rng_state(), before)


def test_flex_is_compiled_or_refused(monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("FlexAttention needs a C++ compiler on a CPU")
    layout, p = Layout(PATTERNS["shifted"], 1, (6, 6)), projections(37, width=16)
    pattern = block_mask(layout.seen)
    with torch.inference_mode():
        assert (flex(p, pattern) - masked(p, layout.seen)).abs().max() < 1e-5
        limit = torch._dynamo.config.patch(recompile_limit=1)
        with limit, pytest.raises(EffbenchError, match="did not compile.*RecompileLimit"):
            for batch in (3, 4, 5):
                flex(projections(37, batch=batch, width=16), pattern)
        monkeypatch.setattr(attention_paths, "_compiled_flex", lambda: attention_paths._flex)  # as if dynamo gave up
        with pytest.raises(EffbenchError, match="switched off"):
            flex(p, pattern)
