"""compile: the outputs of the uncompiled model, one graph per shape, and no silent fall-back."""

import copy
from functools import partial

import pytest
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.errors import EffbenchError, UsageError
from effbench.measure.clock import Clock
from effbench.measure.flops import flops
from effbench.measure.kernels import kernels
from effbench.measure.split import Split
from effbench.models.token_state import TokenEdit
from effbench.models.tower import view
from effbench.registry import methods
from effbench_methods import compile as module


@pytest.fixture
def traced(monkeypatch):
    """Dynamo traces and guards as ever, but nothing is handed to a C++ compiler, which takes seconds a graph."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode, **options: real(*args, backend="eager", **options))


def graphs(model):
    return [part.graphs for m in model.modules() if isinstance(part := m._compiled_call_impl, module.Compiled)]


def test_inductor_gives_the_outputs_of_the_uncompiled_model():
    model = effbench.apply(vit(depth=1), "token_merge:r=2")
    with torch.inference_mode():
        expected = model(IMAGES)
        effbench.apply(model, "compile")
        assert graphs(model) == [0]  # nothing is compiled before it runs
        assert (model(IMAGES) - expected).abs().max() < 1e-5
    assert graphs(model) == [1]
    (note,) = methods.get("compile")().notes(view(model))
    assert "1 graphs" in note and "of 0.0 s" not in note


def test_both_towers_are_compiled_and_each_batch_size_once(traced):
    model = clip()
    texts = torch.randint(1, 49, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(IMAGES, texts)
        effbench.apply(model, "compile")
        for _ in range(2):
            for y, x in zip(model(IMAGES, texts)[:2], expected[:2], strict=True):
                assert (y - x).abs().max() < 1e-5
        assert graphs(model) == [1, 1]
        model.encode_image(IMAGES[:1])
        assert sorted(graphs(model)) == [1, 2]
        one = effbench.apply(clip(), "compile:target=text")
        one(IMAGES, texts)
        assert graphs(one) == [1]


def test_more_shapes_than_dynamo_s_own_limit_are_all_compiled(traced):
    model, other = (effbench.apply(vit(depth=1), "compile") for _ in range(2))
    with torch.inference_mode():
        for batch in range(1, 10):  # torch gives up at 8
            model(IMAGES[:1].repeat(batch, 1, 1, 1))
            other(IMAGES[:1].repeat(batch, 1, 1, 1))
        assert graphs(model) == graphs(other) == [9]
        dynamic = effbench.apply(vit(depth=1), "compile:dynamic=true")
        for batch in range(2, 5):
            dynamic(IMAGES[:1].repeat(batch, 1, 1, 1))
    assert graphs(dynamic) == [1]


def test_past_the_limit_it_fails_instead_of_running_uncompiled(traced, monkeypatch):
    monkeypatch.setattr(module, "GRAPHS", 2)
    model = effbench.apply(vit(depth=1), "compile")
    with torch.inference_mode():
        for batch in (1, 2):
            model(IMAGES[:batch])
        with pytest.raises(EffbenchError, match="compile: more than 2 graphs") as failed:
            model(IMAGES[:1].repeat(3, 1, 1, 1))
    assert "dynamic=true" in failed.value.hint


class Breaks(TokenEdit):
    def forward(self, state, projections):
        torch._dynamo.graph_break()


def test_a_graph_break_is_an_error_that_names_compile(traced):
    model = vit(depth=1)
    view(model).image.after_attention(0, Breaks())
    effbench.apply(model, "compile")
    with torch.inference_mode(), pytest.raises(EffbenchError, match="^compile: .*graph_break"):
        model(IMAGES)


def test_steps_that_are_split_compile_nothing_anew(traced):
    model = effbench.apply(vit(), "token_merge:r=2+compile")
    plain = effbench.apply(vit(), "token_merge:r=2")
    spent = {}
    for name, each in (("compiled", model), ("plain", plain)):
        split = Split({"image": each}, each, Clock("cpu"))
        for _ in range(3):
            with torch.inference_mode(), split:
                output, seconds = split.clock.timed(partial(each, IMAGES))
        spent[name] = split.seconds(seconds)
        assert output.shape == (2, 5)
    assert graphs(model) == [1]
    assert "overhead" not in spent["compiled"] and spent["compiled"]["image"] > 0
    assert spent["plain"]["overhead"] > 0


def test_counting_and_watching_compile_nothing(traced):
    model = effbench.apply(vit(depth=2), "compile")
    with torch.inference_mode():
        model(IMAGES)
    assert flops(model, IMAGES).dense_flops == flops(vit(depth=2), IMAGES).dense_flops
    with torch.inference_mode():
        seen = kernels(lambda: model(IMAGES))
    assert seen.attention == {"sdpa:flash": 2} and seen.compiled and graphs(model) == [1]


def test_a_copy_is_not_compiled(traced):
    model = effbench.apply(vit(depth=1), "compile")
    again = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert graphs(model) == [1] and graphs(again) == []
    assert model.state_dict().keys() == vit(depth=1).state_dict().keys()


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(UsageError, match="target=text names no tower"):
        effbench.apply(vit(), "compile:target=text")
    with pytest.raises(UsageError, match="text_pack lays every batch of texts out in another shape"):
        effbench.apply(clip(), "text_pack+compile")
    effbench.apply(clip(), "text_pack+compile:target=tower")
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UsageError, match="compile: torch.compile is switched"),
    ):
        effbench.apply(vit(), "compile")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UsageError, match="finds no C\\+\\+ compiler"):
            effbench.apply(vit(), "compile")
