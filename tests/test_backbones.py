"""Backbones: where weights are looked for, what fits, and both libraries under one experiment."""

import json

import open_clip
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from tiny import flickr8k

import effbench
from effbench.errors import InvalidError, UsageError
from effbench.live import Live
from effbench.models import choose as choosing
from effbench.models.backbones import OpenClip, Timm
from effbench.models.choose import choose
from effbench.records import Protocol


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(choosing, "reachable", lambda timeout=0.0: False)
    monkeypatch.delenv("EFFBENCH_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights of timm's smallest ViT, classifier included."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(7)
    save_file(timm.create_model("test_vit").state_dict(), folder / "test_vit.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    vision = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=4)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
    (folder / "effbench-tiny.json").write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(folder)
    return "effbench-tiny"


def test_auto_takes_the_weights_it_finds(weights, monkeypatch):
    monkeypatch.setenv("EFFBENCH_WEIGHTS", str(weights))
    backbone, banner = choose("auto", image_size=32)
    stored = timm.models.load_state_dict(weights / "test_vit.safetensors")
    assert str(backbone) == "timm:test_vit" and not banner and backbone.weights_id.startswith("sha256:")
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(backbone.reference.state_dict()[key], stored[key])
    named, _ = choose("timm:test_vit", image_size=32)  # a name without weights looks there too
    assert named.weights_id == backbone.weights_id
    direct, _ = choose("auto", weights / "test_vit.safetensors", image_size=32)
    assert direct.weights_id == backbone.weights_id


def test_auto_falls_back_to_the_shipped_tower_with_a_banner():
    backbone, banner = choose("auto")
    text = " ".join(banner)
    assert str(backbone) == "shipped:scenes_vit" and backbone.image_size == 96
    assert "EFFBENCH_WEIGHTS" in text and "Looked for" in text and "timm:deit_tiny_patch16_224" in text
    embedded, banner = choose("auto", embedded=True)
    assert embedded.weights_id == backbone.weights_id and not banner


def test_weights_of_another_image_size_are_interpolated(weights):
    backbone = Timm("test_vit", weights / "test_vit.safetensors", image_size=64)
    assert backbone.reference.pos_embed.shape[1] == 16 + 1 and backbone.image_size == 64


def test_torch_files_are_read_without_unpickling_code(weights, tmp_path):
    state = timm.models.load_state_dict(weights / "test_vit.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
    stored = Timm("test_vit", tmp_path / "a.pth").weights_id
    assert stored == Timm("test_vit", weights / "test_vit.safetensors").weights_id


def test_random_weights_are_the_same_in_every_run():
    one, two = (Timm("test_vit", "random", image_size=32).reference.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_openclip_weights_load_and_its_features_are_the_library_s(tiny_clip, tmp_path):
    torch.manual_seed(3)
    original = open_clip.create_model(tiny_clip).eval()
    torch.save(original.state_dict(), tmp_path / "clip.pt")
    backbone = OpenClip(tiny_clip, tmp_path / "clip.pt")
    model = backbone.dual_encoder(Protocol(), None).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.tokenizer([])(["a dog runs", "two cats"])
    with torch.no_grad():
        image, text = model(images, tokens)
        assert (image - original.encode_image(images, normalize=True)).abs().max() < 1e-5
        assert (text - original.encode_text(tokens, normalize=True)).abs().max() < 1e-5


def test_an_openclip_experiment(tiny_clip, tmp_path):
    found = effbench.run(
        ["token_prune:keep=0.5,at=1/2"],
        data=flickr8k(tmp_path),
        out=tmp_path / "out",
        backbone=f"openclip:{tiny_clip}",
        weights="random",
        batch_size=8,
        epochs=1,
        timing_pairs=0,
        threads=1,
        live=Live(Console(quiet=True)),
    )
    method = found.arm("token_prune:keep=0.5,at=1/2")
    assert {arm.status for arm in found.arms} == {"ok"} and method.tokens == (17, 9, 5, 5)
    assert method.test_flops.dense < found.baseline().test_flops.dense


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("timm:test_vit",), InvalidError, "no weights were named for timm:test_vit"),
        (("timm:test_vi", "random"), UsageError, "no model named 'test_vi'"),
        (("openclip:ViT-B-33", "random"), UsageError, "no model named 'ViT-B-33'"),
        (("timm:test_vit", None, "none_such"), InvalidError, "neither in the library's cache"),
        (("timm:test_vit", "x.safetensors", "tag"), UsageError, "exclude each other"),
        (("auto", "random"), UsageError, "chooses weights by itself"),
        (("auto", "nobody.safetensors"), UsageError, "no model is called 'nobody'"),
        (("shipped:none",), UsageError, "ships no tower named 'none'"),
        (("shipped:scenes_vit", None, "tag"), UsageError, "its own weights"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, error, message):
    with pytest.raises(error, match=message) as refused:
        choose(*arguments)
    assert refused.value.hint
