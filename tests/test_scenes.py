"""The embedded data set: the same everywhere, captions that are true and tell scenes apart, a tower that loads."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from importlib import resources

import pytest

from effbench.errors import UsageError
from effbench.task import DataRequest
from effbench_tasks.drawing.scene import COLOURS, PLACES, SHAPES, Scene, draw, generator, sample
from effbench_tasks.scenes import SIZES, Scenes, examples, fingerprint

THING = re.compile(
    rf"(?:(small|large) )?\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    rf"(?: in the ({'|'.join(place for row in PLACES for place in row)}))?"
)


@pytest.fixture(scope="module")
def data():
    return Scenes().load(DataRequest())


def true_of(caption: str, scene: Scene) -> bool:
    """Whether all that a caption says holds in a scene; reads the words, shares nothing with what wrote them."""
    there = {(thing.colour, thing.shape): thing for thing in scene.things}
    told = []
    for size, colour, shape, place in THING.findall(caption):
        thing = there.get((colour, shape))
        if thing is None or size not in ("", thing.size) or place not in ("", thing.place):
            return False
        told.append(thing)
    if ground := re.search(r"on (?:a )?(plain|striped|dotted|checked) (\w+)", caption):
        if ground.groups() != (scene.texture, scene.background):
            return False
    if count := re.search(r"(two|three) shapes", caption):
        if {"two": 2, "three": 3}[count[1]] != len(scene.things):
            return False
    if way := re.search(r"\b(above|below|left of|right of)\b", caption):
        first, second = told
        rows, columns = first.row - second.row, first.column - second.column
        if not {"above": rows < 0, "below": rows > 0, "left of": columns < 0, "right of": columns > 0}[way[1]]:
            return False
    return bool(told)


def scene_of(example) -> Scene:
    return example.image.args[0]


def test_sizes_and_unique_captions(data):
    assert data.sizes() == SIZES and data.sizes()["test"] >= 500 and data.synthetic
    for listed in data.splits.values():
        lines = [line for example in listed for line in example.captions]
        assert len(set(lines)) == len(lines) == 5 * len(listed)


def test_splits_share_no_scene(data):
    scenes = [scene_of(example) for listed in data.splits.values() for example in listed]
    assert len(set(scenes)) == len(scenes)
    assert sample(generator(0, "tower", 0)) not in scenes


def test_captions_are_true_and_tell_test_images_apart(data):
    gallery = [scene_of(example) for example in data.splits["test"]]
    also_true = 0
    for index, example in enumerate(data.splits["test"]):
        for line in example.captions:
            assert true_of(line, gallery[index]), line
        line = example.captions[index % 5]
        also_true += sum(true_of(line, scene) for scene in gallery) - 1
    assert also_true / len(gallery) < 0.05


def test_things_lie_in_their_cells_and_keep_their_distance():
    for index in range(200):
        scene = sample(generator(0, "train", index))
        assert len({t.colour for t in scene.things}) == len({t.place for t in scene.things}) == len(scene.things)
        for thing in scene.things:
            reach = {"small": 7, "large": 13}[thing.size]
            x, y = thing.centre
            assert 32 * thing.column <= x - reach and x + reach < 32 * (thing.column + 1)
            assert 32 * thing.row <= y - reach and y + reach < 32 * (thing.row + 1)


def test_pictures_show_their_things():
    scene = next(s for s in (sample(generator(0, "train", i)) for i in range(99)) if s.things[0].shape == "circle")
    image = draw(scene)
    assert image.mode == "RGB" and image.size == (96, 96)
    assert image.getpixel(scene.things[0].centre) == COLOURS[scene.things[0].colour]


def test_another_process_draws_the_same(data):
    script = (
        "import hashlib; from effbench_tasks.scenes import examples\n"
        "found = examples('dev', 20)\n"
        "print(hashlib.sha256(b''.join(e.image().tobytes() for e in found)).hexdigest(), found[7].captions)"
    )
    there = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = examples("dev", 20)
    pixels = hashlib.sha256(b"".join(e.image().tobytes() for e in here)).hexdigest()
    assert there.stdout.strip() == f"{pixels} {here[7].captions}"


def test_drawing_survives_pickling(data):
    example = data.splits["test"][3]
    assert pickle.loads(pickle.dumps(example)).image().tobytes() == example.image().tobytes()


def test_fingerprint_depends_on_the_captions(data):
    fewer = data.splits | {"dev": data.splits["dev"][:-1]}
    assert fingerprint(fewer) != data.fingerprint == fingerprint(data.splits)


def test_a_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match="drawn, not read"):
        Scenes().load(DataRequest(tmp_path))


def test_shipped_tower_fits_its_architecture():
    from safetensors import safe_open
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    file = resources.files("effbench.models") / "shipped" / "scenes_vit.safetensors"
    with resources.as_file(file) as path:
        assert path.stat().st_size <= 3_000_000
        with safe_open(path, "pt") as stored:
            facts = stored.metadata()
        weights = load_file(path)
    tower = VisionTransformer(**json.loads(facts["architecture"]))
    tower.load_state_dict(weights)
    assert len(tower.blocks) == 12 and tower.cls_token is not None
    assert len(json.loads(facts["mean"])) == len(json.loads(facts["std"])) == 3
    assert facts["command"].startswith("python -m effbench_tasks.drawing.train_tower") and facts["trained_on"]
