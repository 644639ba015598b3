"""`effbench flops`: what it prints and what its JSON says."""

import json
import re

import pytest
import torch
import typer

from effbench.commands.flops import flops, grouped
from effbench.errors import EffbenchError, UsageError
from effbench.measure import flop_towers
from effbench.measure.flop_towers import Request, count_towers

DEIT_TINY = 2507366400


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    app = typer.Typer()
    app.command()(flops)

    def run(*arguments):
        assert not typer.main.get_command(app).main([*arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_json_of_both_arms(command):
    found = json.loads(
        command("timm:deit_tiny_patch16_224", "--json", "--batch", "2", "--method", "token_prune:keep=0.5")
    )
    baseline, pruned = found["arms"]
    image = baseline["towers"]["image"]
    assert (found["backbone"], found["batch"], found["train"]) == ("timm:deit_tiny_patch16_224", 2, False)
    assert (baseline["name"], pruned["name"]) == ("baseline", "token_prune:keep=0.5")
    assert image["dense_flops"] == image["useful_flops"] == image["analytic_flops"] == 2 * DEIT_TINY
    assert (image["macs"], image["work_per_image"]) == (DEIT_TINY, DEIT_TINY)
    assert image["low_bit_ops"] == image["overhead_flops"] == 0 and image["complete"] and image["unknown_ops"] == []
    assert sum(image["by_layer"].values()) == 2 * DEIT_TINY and image["parameters"] == 5717416
    after = pruned["towers"]["image"]
    assert after["dense_flops"] == after["analytic_flops"] < 0.6 * image["dense_flops"]
    assert after["overhead_flops"] > 0 and after["disagreement"] == ""


def test_towers_layers_and_units(command):
    text = command("openclip:ViT-B-32", "--layers", "--batch", "2")
    rows = {row[0]: row[1:] for line in text.splitlines() if len(row := re.split(r"\s{2,}", line.strip())) > 1}
    # reference_numbers.json: openclip_exact_flops 8817623040 and 5959540736, twice
    masked = 2 * 12 * 4 * 512 * (77 * 77 - 77 * 78 // 2)
    useful = f"{(2 * 5959540736 - masked) / 1e9:.4f}"
    assert rows["image tower"] == ["8.8176", "17.6352", "17.6352", "0", "0", "17.6352", "8.8176", "87.85"]
    assert rows["text tower"] == ["5.9595", "11.9191", useful, "0", "0", "11.9191", "5.9595", "63.43"]
    assert rows["total"][1] == "29.5543" and rows["transformer.resblocks.0-11"]
    assert "1 MAC = 2 FLOPs" in text and "batch of 2" in text and "agree within 1 %" in text
    assert "\x1b" not in text


def test_training_and_what_acts_only_after_it(command):
    text = command("shipped:scenes_vit", "--train", "--method", "token_prune:keep=0.5")
    assert "forward + backward" in text and "acts only after training" in text and "0.0%" in text
    both = json.loads(command("shipped:scenes_vit", "--train", "--json", "--method", "token_prune:keep=0.5,phase=both"))
    before, after = (arm["towers"]["image"]["dense_flops"] for arm in both["arms"])
    assert after < before and not any("acts only" in note for note in both["notes"])
    forward = count_towers(Request("shipped:scenes_vit"))["image"].count.dense_flops
    assert 2.8 < before / forward < 3


def test_what_acts_only_while_training_saves_nothing_in_testing(command):
    text = command("shipped:scenes_vit", "--method", "token_prune:keep=0.5,phase=train")
    assert "acts only while training" in text and "0.0%" in text


def test_every_method_that_is_asked_for_has_a_row(command):
    methods = ("token_prune:keep=0.5", "token_prune:keep=0.5,score=norm")
    found = json.loads(command("shipped:scenes_vit", "--json", *(f"--method={method}" for method in methods)))
    assert [arm["name"] for arm in found["arms"]] == ["baseline", *methods]


def test_image_size_and_disagreement(command):
    small = json.loads(command("timm:swin_tiny_patch4_window7_224", "--image-size", "112", "--json"))
    assert "differ by" in small["arms"][0]["towers"]["image"]["disagreement"]
    text = command("timm:swin_tiny_patch4_window7_224", "--image-size", "112")
    assert "the dispatch count" in text and "agree within" not in text


def test_a_lower_bound_is_marked(command, monkeypatch):
    monkeypatch.setattr(
        flop_towers, "_edit", lambda model, *_: model.register_forward_hook(lambda *_: torch.fft.fft(torch.zeros(8)))
    )
    text = command("shipped:scenes_vit")
    assert ">= " in text and "a lower bound, no formula for aten._fft_r2c.default" in text


def test_a_model_that_needs_values_really_runs(monkeypatch):
    def needs_values(module, inputs):
        assert torch.as_tensor(inputs[0].sum().item()) == 0

    monkeypatch.setattr(flop_towers, "_edit", lambda model, *_: model.register_forward_pre_hook(needs_values))
    found = count_towers(Request("shipped:scenes_vit", batch=2))["image"]
    monkeypatch.undo()
    assert found.count == count_towers(Request("shipped:scenes_vit", batch=2))["image"].count


def test_neighbouring_blocks_of_equal_cost_share_a_row():
    blocks = {"stem.proj": 5, "blocks.0.attn.qkv": 1, "blocks.0.mlp": 2, "blocks.1.mlp": 3, "blocks.2.mlp": 4, "": 7}
    assert grouped(blocks) == [("stem", 5, 1), ("blocks.0-1", 6, 2), ("blocks.2", 4, 1), ("outside of layers", 7, 1)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["timm:deit_tinny"], "no model named"),
        (["deit_tiny_patch16_224"], "names no backbone"),
        (["timm:resnet18", "--method", "token_prune"], "no transformer tower"),
        (["shipped:scenes_vit", "--method", "no_such"], "no_such"),
        (["shipped:scenes_vit", "--weights", "x"], "own weights"),
        (["timm:deit_tiny_patch16_224", "--weights", "no/such.pth"], "no weights file"),
        (["timm:resnet18", "--image-size", "64"], "does not take an image size"),
        (["course:patches"], "brings no tower"),
        (["timm:mobilenetv4_conv_small", "--train"], "batch of 1"),
    ],
)
def test_bad_input(command, arguments, message):
    with pytest.raises(EffbenchError, match=message) as refused:
        command(*arguments)
    assert refused.value.hint
    assert isinstance(refused.value, UsageError) or "--weights" in arguments
