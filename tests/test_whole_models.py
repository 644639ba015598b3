"""Whole vision-language models of transformers give their library's own results, or are refused by name."""

import copy
import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_hf
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from effbench import start
from effbench.datasets import resolve
from effbench.errors import InvalidError, UsageError
from effbench.models import whole_model
from effbench.models.captioner import image_positions
from effbench.models.choose import choose
from effbench.models.decoding import generate
from effbench.models.tower import view
from effbench.models.whole_model import HuggingFace, patches_of
from effbench.records import Captioning

MAKERS = dict(
    llava=tiny_hf.llava,
    idefics3=tiny_hf.idefics3,
    qwen2_vl=tiny_hf.qwen_vl,
    qwen2_5_vl=lambda folder: tiny_hf.qwen_vl(folder, newer=True),
)
OWN = Captioning(decoder="own", image_tokens=0, stages=(), max_tokens=4, new_tokens=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for name, make in MAKERS.items():
        make(root / name)
    return root


def backbone(folders, name):
    return HuggingFace(str(folders / name), image_size=32 if name.startswith("qwen") else None)


@pytest.mark.parametrize("name", MAKERS)
def test_writes_what_the_library_writes(folders, name):
    made = backbone(folders, name)
    library = AutoModelForImageTextToText.from_pretrained(folders / name).eval()
    processor = AutoProcessor.from_pretrained(folders / name)
    if name == "idefics3":
        assert "one tile" in made.notes[0]
        processor.image_processor.do_image_splitting = False
        processor.image_processor.size = dict(longest_edge=32)
    else:
        assert not made.notes
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(2)]
    model = made.captioner(OWN).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (made.mean, made.std))
    images = torch.stack([(torch.tensor(np.asarray(p)).permute(2, 0, 1) / 255 - mean) / std for p in pictures])
    with torch.no_grad():
        prefix = model.prefix(model.features(images))
        ids, _ = generate(model.language, prefix, 6, made.words.end, exactly=True)
        without_cache, _ = generate(model.language, prefix, 6, made.words.end, exactly=True, cached=False)
        for row, picture in zip(ids, pictures, strict=True):
            inputs = whole_model._ask(processor, picture)
            expected = library.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1)
            assert row.tolist() == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids.equal(without_cache) and not ids[0].equal(ids[1])


@pytest.mark.parametrize("name", MAKERS)
def test_the_parts_are_whole_and_apart(folders, name):
    model = backbone(folders, name).captioner(OWN)
    parts = [model.image_encoder, model.connector, model.language]
    held = [{id(p) for p in part.parameters()} for part in parts]
    assert all(held) and not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    assert held[0] | held[1] | held[2] == {id(p) for p in model.parameters()}
    library = AutoModelForImageTextToText.from_pretrained(folders / name)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in library.parameters())
    seen = view(model)
    assert seen.image is None and seen.connector is model.connector and len(seen.decoder) == 3


def test_positions_with_padding_in_front_and_of_text_alone(folders):
    model = backbone(folders, "qwen2_vl").captioner(OWN).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[12, 13, 14]])
    with torch.no_grad():
        prefix = model.prefix(model.features(images))
        alone, _ = generate(model.language, prefix, 5, 2, exactly=True)
        padded = torch.cat([torch.randn(2, 3, 16), prefix], dim=1)
        mask = torch.cat([torch.zeros(2, 3), torch.ones(prefix.shape[:2])], dim=1).long()
        assert generate(model.language, padded, 5, 2, exactly=True, mask=mask)[0].equal(alone)
        words = model.logits(model.starts(1), text)
        plain = model.language.body(torch.cat([model.start[None], text[:, :-1]], dim=1)).last_hidden_state
        assert words.allclose(model.language.head(plain), atol=1e-5)
    t, h, w = image_positions(torch.arange(9)[None], 2, 2, 3)
    assert t.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5]]
    assert h.tolist() == [[0, 1, 2, 2, 2, 3, 3, 3, 5]] and w.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5]]


def test_flat_patches_keep_squares_together():
    images = torch.arange(64.0).view(1, 1, 8, 8)
    flat = patches_of(images, 2, 2, 1)
    assert flat[0].tolist() == [0, 1, 8, 9] and flat[1].tolist() == [2, 3, 10, 11] and flat[2].tolist()[0] == 16
    assert patches_of(images, 2, 2, 3).equal(flat.repeat(1, 3))


def run(folders, data, method=(), name="llava", **options):
    return start.run(
        method,
        "flickr8k_caption",
        backbone=f"hf:{folders / name}",
        data=data,
        memory_runs=0,
        timing_pairs=2,
        timing_batch=4,
        controls="none",
        threads=1,
        **dict(epochs=1, batch_size=8) | options,
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_an_experiment(folders, name, tmp_path):
    data = tiny.flickr8k(tmp_path / "data", train=16, dev=4, test=4)
    size = dict(image_size=32) if name == "qwen2_vl" else {}
    how = dict(max_tokens=4, new_tokens=3, align_epochs=1, stages=("align",))
    record = run(folders, data, ["layer_prune:drop=1,images=8"], name, out=tmp_path / "out", captioning=how, **size)
    arms = {arm.name: arm for arm in record.arms}
    assert record.envelope.protocol.captioning.decoder == "own"
    assert record.envelope.protocol.captioning.stages == ("align",)
    pruned = next(arm for name, arm in arms.items() if name.startswith("layer_prune"))
    assert not any(arm.error for arm in arms.values())
    assert pruned.test_flops.dense < arms["baseline"].test_flops.dense


def test_what_cannot_be_asked_for(folders, tmp_path):
    data = tiny.flickr8k(tmp_path / "data", train=4, dev=2, test=2)
    found = resolve("flickr8k_caption", data)
    spec = f"hf:{folders / 'llava'}"
    own = start.captioning_options(found, None, spec)
    assert (own.decoder, own.stages, own.image_tokens) == ("own", (), 0)
    assert start.captioning_options(found, dict(stages=("align",)), spec).stages == ("align",)
    for wrong in (dict(layers=2), dict(width=64), dict(image_tokens=4), dict(decoder="tiny"), dict(decoder="hf:x")):
        with pytest.raises(UsageError, match="brings its own decoder"):
            start.captioning_options(found, wrong, spec)
    with pytest.raises(UsageError, match="decoder of a whole model"):
        start.captioning_options(found, dict(decoder="own"), "timm:deit_tiny_patch16_224")
    with pytest.raises(UsageError, match="of the tiny decoder, and hf:x brings its own"):
        start.captioning_options(found, dict(decoder="hf:x", layers=2))
    with pytest.raises(UsageError, match="no pair of towers"):
        start.captioning_options(resolve("flickr8k", data), None, spec)
    with pytest.raises(UsageError, match="32 px"):
        choose(spec, image_size=64)
    with pytest.raises(UsageError, match="multiple of 8 px.*\n.*24 and 32"):
        choose(f"hf:{folders / 'qwen2_vl'}", image_size=30)
    for options in (dict(weights="weights.pt"), dict(pretrained="tag")):
        with pytest.raises(UsageError, match="comes with its own weights"):
            choose(spec, **options)
    assert choose(spec, "random")[0].weights_id == "random"


def changed(folders, tmp_path, file, **values):
    folder = tmp_path / "changed"
    shutil.copytree(folders / "llava", folder)
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(facts | values))
    return str(folder)


def test_what_computes_otherwise_is_refused(folders, tmp_path, monkeypatch):
    made = whole_model.Projector.forward
    monkeypatch.setattr(whole_model.Projector, "forward", lambda self, tokens: 1.01 * made(self, tokens))
    with pytest.raises(UsageError, match="LlavaForConditionalGeneration.*logits differ by"):
        backbone(folders, "llava")
    monkeypatch.undo()
    facts = json.loads((folders / "llava" / "processor_config.json").read_text())
    pictures = facts["image_processor"] | dict(crop_size=dict(height=32, width=24))
    with pytest.raises(UsageError, match=r"one square image|Image features"):
        HuggingFace(changed(folders, tmp_path, "processor_config.json", image_processor=pictures))


def test_files_that_are_no_whole_model(folders, tmp_path):
    tiny_hf.llama(tmp_path / "llama")
    with pytest.raises(UsageError, match="does not write about images.*\n.*--decoder hf:"):
        HuggingFace(str(tmp_path / "llama"))
    with pytest.raises(InvalidError, match="no such folder, and the hub"):
        HuggingFace("nobody/nothing")
    for file in ("processor_config.json", "preprocessor_config.json"):
        folder = tmp_path / file
        shutil.copytree(folders / "llava", folder)
        for gone in folder.glob("*processor_config.json"):
            gone.unlink()
    with pytest.raises(InvalidError, match="processor"):
        HuggingFace(str(folder))


def test_copies_are_apart(folders):
    made = backbone(folders, "llava")
    first = made.captioner(OWN)
    with torch.no_grad():
        first.connector.module.linear_1.weight.zero_()
    assert made.captioner(OWN).connector.module.linear_1.weight.abs().sum() > 0
    again = copy.deepcopy(first)
    assert again.state_dict().keys() == first.state_dict().keys()
