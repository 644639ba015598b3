"""The tower view: equal to the library, the library's keys, copies, and what is refused."""

import copy
import pickle

import pytest
import timm
import torch
from open_clip.transformer import TextTransformer
from tiny import IMAGES, clip, vit
from torch import nn

from effbench.errors import InvalidError, UsageError
from effbench.models.attention import Attention, class_attention
from effbench.models.token_state import TokenEdit, TokenState
from effbench.models.tower import view


class First(TokenEdit):
    """Keeps the first k patch tokens."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, state, projections):
        return lambda field, kind: field[:, : state.prefix + self.k]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(qk_norm=True, init_values=0.3),
        dict(reg_tokens=4),
        dict(class_token=False, global_pool="avg"),
        dict(scale_attn_norm=True),
        dict(qkv_bias=False, pre_norm=True),
    ],
)
def test_a_wrapped_timm_vit_is_the_library_s_own(options):
    model = vit(**options)
    with torch.no_grad():
        expected, keys = model(IMAGES), list(model.state_dict())
        state = copy.deepcopy(model.state_dict())
        tower = view(model).image
        assert (model(IMAGES) - expected).abs().max() < 1e-5
        assert tower.prefix == model.num_prefix_tokens and tower.grid == (4, 4) and len(tower) == 4
        assert list(model.state_dict()) == keys
        model.load_state_dict(state)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IMAGES), model(IMAGES))


def test_a_wrapped_openclip_model_is_the_library_s_own():
    model = clip()
    texts = torch.randint(1, 49, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, text = model.encode_image(IMAGES), model.encode_text(texts)
        state = copy.deepcopy(model.state_dict())
        seen = view(model)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        model.load_state_dict(state)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert (other.encode_image(IMAGES) - image).abs().max() < 1e-5
            assert (other.encode_text(texts) - text).abs().max() < 1e-5
    assert (seen.image.prefix, seen.text.prefix, len(seen.text)) == (1, 0, 2)
    linears = [m for m in model.visual.transformer.modules() if type(m) is nn.Linear]
    assert len(linears) == 4 * 4  # qkv, proj and the MLP's two of every block are plain linears


def test_gradients_reach_the_library_s_parameters():
    model = clip()
    parameter = model.visual.transformer.resblocks[0].attn.in_proj_weight
    view(model)
    model.train().encode_image(IMAGES).sum().backward()
    assert parameter.grad.abs().sum() > 0


def test_texts_shorter_than_the_context():
    text = TextTransformer(context_length=12, vocab_size=50, width=24, heads=3, layers=2, output_dim=8).eval()
    tokens = torch.tensor([[3, 4, 49, 0, 0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 49, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = text(tokens)
        view(text)
        assert (text(tokens[:, :5]) - expected).abs().max() < 1e-5


def test_an_edit_removes_tokens_and_reaches_every_field():
    tower = view(vit()).image
    tower.after_attention(1, First(5))
    widths = []
    for block in tower.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    tower.loop(torch.randn(2, 17, 24))
    assert widths == [17, 6, 6, 6]

    mask = torch.arange(9.0).view(3, 3)
    state = TokenState(torch.randn(2, 3, 4), 0, mask, sizes=torch.ones(2, 3), source=torch.arange(3).expand(2, 3))
    reduced = state.reduced(lambda field, kind: field[:, [0, 2]])
    assert torch.equal(reduced.mask[0, 0], mask[[0, 2]][:, [0, 2]]) and reduced.mask.shape == (2, 1, 2, 2)
    assert reduced.sizes.shape == (2, 2) and reduced.source.tolist() == [[0, 2], [0, 2]]


def test_an_edited_tower_compiles_without_graph_breaks():
    from torch._dynamo.utils import counters

    model = vit()
    view(model).image.after_attention(1, First(5))
    counters.clear()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(IMAGES)
        assert (compiled - model(IMAGES)).abs().max() < 1e-5
    assert not counters["graph_break"]


def test_class_attention_is_the_row_of_the_map():
    torch.manual_seed(0)
    attention = Attention(nn.Linear(24, 72), nn.Linear(24, 24), 3, 8**-0.5)
    x = torch.randn(2, 7, 24)
    _, projections = attention(x, with_projections=True)
    full = (projections.q @ projections.k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    assert (class_attention(projections) - full.mean(1)[:, 0]).abs().max() < 1e-6


def test_sizes_weigh_keys_like_repeated_tokens():
    torch.manual_seed(0)
    attention = Attention(nn.Linear(24, 72), nn.Linear(24, 24), 3, 8**-0.5)
    x = torch.randn(1, 4, 24)
    repeated = torch.cat([x, x[:, -1:].expand(1, 2, 24)], dim=1)
    weighted = attention(x, sizes=torch.tensor([[1.0, 1.0, 1.0, 3.0]]))
    assert (weighted - attention(repeated)[:, :4]).abs().max() < 1e-6


def test_what_cannot_be_edited_is_refused_by_name():
    with pytest.raises(UsageError, match="ParallelScalingBlock"):
        view(vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    with pytest.raises(UsageError, match="Linear is no transformer tower"):
        view(nn.Linear(2, 2))
    tower = view(vit()).image
    with pytest.raises(UsageError, match="block 4 does not exist: .* 0 to 3"):
        tower.after_attention(4, First(1))
    tower.after_attention(2, First(1))
    with pytest.raises(UsageError, match="both reduce the tokens in block 2"):
        tower.after_attention(2, First(1))


def test_a_path_that_would_skip_the_edit_is_refused():
    model = vit()
    view(model).image.after_attention(1, First(5))
    with pytest.raises(InvalidError, match="outside effbench's loop"):
        model.forward_intermediates(IMAGES)
