"""effbench.apply: every training-free method, on both libraries, as a user's own model meets it."""

import copy
import pickle

import pytest
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.errors import UsageError
from effbench.method import Method
from effbench.registry import methods

MODELS = {
    "class token": vit,
    "average pool": lambda: vit(class_token=False, global_pool="avg"),
    "registers": lambda: vit(reg_tokens=4),
    "openclip": clip,
}
NOOP = {
    "channel_prune": "ratio=0.001",  # no width is nearer to a smaller multiple of round_to
    "layer_prune": "drop=0",
    "token_merge": "r=0",
    "token_prune": "keep=1,at=1/2,score=norm",
    "patch_pool": "side=1,at=1",
    "resize": "size=32",
    "sparse_attention": "window=4,path=reshape",
    "text_pack": "how=pack,row=12",
}
ACTIVE = [
    "token_merge:r=3",
    "token_merge:r=3,variant=tofu,schedule=decreasing",
    "token_merge:ratio=0.75,variant=pitome",
    "token_prune:keep=0.5,at=1/2",
    "token_prune:keep=0.5,at=1/2,fuse=true",
    "token_prune:keep=0.5,at=1/2,score=norm",
    "token_prune:keep=0.5,at=1/2,score=mean_query",
    "token_prune:keep=0.5,at=1/2,score=ats",
    "token_prune:keep=0.5,at=1,score=settled,exit=true",
    "token_prune:keep=0.5,at=1/2,score=grid",
    "token_prune:keep=0.5,at=1/2,score=diversity",
    "patch_pool:at=1",
    "patch_pool:at=1,how=grid",
    "sparse_attention:window=2,path=reshape",
    "sparse_attention:pattern=sliding,window=3,path=masked",
    "sparse_attention:pattern=topk,k=4",
    "resize:size=16",
    "resize:size=24+token_prune:keep=0.5,at=2,score=norm",
]
LOSSLESS = [f"{name}:{parameters}" for name, parameters in NOOP.items()]
LOSSLESS += [f"text_pack:how={how}" for how in ("trim", "bucket")]
LOSSLESS += [f"sparse_attention:{other}" for other in ("window=4,path=masked", "pattern=topk,k=16")]
BOTH = LOSSLESS + ACTIVE


def made(name, spec=""):
    """A model, edited where there is a spec, and its inputs."""
    model, inputs = MODELS[name](), (IMAGES,)
    if name == "openclip":
        inputs = (IMAGES, torch.tensor([[48, 3, 4, 49] + [0] * 8, [48, 5, 49] + [0] * 9]))
    return effbench.apply(model, spec) if spec else model, inputs


def out(model, inputs):
    result = model(*inputs)
    return torch.cat([part.flatten() for part in result]) if isinstance(result, tuple) else result


def fits(name, spec):
    """Class attention needs a class token, and text_pack texts."""
    scores_by_class = "score=ats" in spec or "token_prune" in spec and "score=" not in spec
    return not (scores_by_class and name == "average pool") and ("text_pack" not in spec or name == "openclip")


def cases(specs):
    return [(name, spec) for name in MODELS for spec in specs if fits(name, spec)]


def compiles(name, spec):
    """All but ats, where the number of tokens depends on the data (as in text_pack); timm's pool reads merged sizes."""
    return "score=ats" not in spec and (name == "openclip" or name == "average pool" and "token_merge:r" in spec)


def test_every_training_free_method_has_its_no_op_here():
    free = {name for name in methods.names() if methods.get(name)().phase == "test"}
    built_in = {name for name in free if methods.get(name).__module__.startswith("effbench_methods.")}
    # these change how numbers are held or run, so none of their parameters changes nothing, or need a decoder; see
    # their own tests
    assert built_in - {"compile", "decoder_prune", "precision", "quantize", "region_prune"} == set(NOOP)


@pytest.mark.parametrize("name, spec", cases(LOSSLESS))
def test_a_no_op_is_the_baseline(name, spec):
    with torch.no_grad():
        expected, found = out(*made(name)), out(*made(name, spec))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name, spec", cases(ACTIVE))
def test_an_active_method_changes_the_outputs_and_not_their_shape(name, spec):
    with torch.no_grad():
        expected, found = out(*made(name)), out(*made(name, spec))
    assert found.shape == expected.shape and found.isfinite().all() and (found - expected).abs().max() > 1e-5


@pytest.mark.parametrize("name, spec", [case for case in cases(BOTH) if case[0] in ("registers", "openclip")])
def test_copies_pickles_infers_and_autocasts(name, spec):
    model, inputs = made(name, spec)
    with torch.inference_mode():
        expected = out(model, inputs)
        assert torch.equal(out(copy.deepcopy(model), inputs), expected)
        assert torch.equal(out(pickle.loads(pickle.dumps(model)), inputs), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert out(model, inputs).isfinite().all()
    assert model.state_dict().keys() == MODELS[name]().state_dict().keys()


@pytest.mark.parametrize("name, spec", [case for case in cases(ACTIVE) if compiles(*case)])
def test_compiles_without_a_graph_break(name, spec):
    tower = made(name, spec)[0]
    tower = getattr(tower, "visual", tower)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(tower, backend="eager", fullgraph=True)(IMAGES)
        assert (found - tower(IMAGES)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        (
            "token_prune:score=learned",
            "token_prune:score=learned acts while training",
            "--method token_prune:score=learned",
        ),
        ("token_prune:phase=both", "phase=both", "leave phase= out"),
        ("random_token_drop", "random_token_drop acts while training", "effbench run --method random_token_drop"),
        ("patch_pool:at=1+random_token_drop", "random_token_drop acts while training", "effbench run"),
    ],
)
def test_what_must_be_trained_is_refused_before_the_model_is_touched(spec, message, hint):
    model = vit()
    blocks = model.blocks
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(model, spec)
    assert hint in refused.value.hint and model.blocks is blocks


def test_methods_are_taken_as_objects_and_checked_as_a_stack():
    prune, resize = methods.get("token_prune"), methods.get("resize")
    stack: list[Method] = [resize(size=16), prune(keep=0.5, at=(1,))]
    with torch.no_grad():
        assert torch.equal(
            effbench.apply(vit(), tuple(stack))(IMAGES),
            out(*made("class token", "resize:size=16+token_prune:keep=0.5,at=1")),
        )
    with pytest.raises(UsageError, match="must stand before"):
        effbench.apply(vit(), tuple(reversed(stack)))
