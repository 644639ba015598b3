"""The pixel cache: right pixels, built once, rebuilt when damaged, clear errors."""

import resource
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effbench import pixels as module
from effbench.errors import EffbenchError, InvalidError
from effbench.pixels import crop, open_image, pixels
from effbench.task import Data, Example


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Data:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    examples = []
    for i in range(7):
        file = tmp_path / f"{i}.jpg"
        noise((40, 30), i).save(file)
        examples.append(Example(file, ("a caption",), file.name))
    return Data("tiny", {"train": examples[:4], "dev": examples[4:6], "test": examples[6:]}, "f00d")


def cached(tmp_path: Path) -> Path:
    [file] = (tmp_path / "cache" / "pixels").glob("*.u8")
    return file


def test_splits_hold_their_images_in_order(data, monkeypatch):
    monkeypatch.setattr(module, "_block", lambda size: 3)
    maps = pixels(data, 16)
    assert {split: m.shape for split, m in maps.items()} == {
        "train": (4, 3, 16, 16),
        "dev": (2, 3, 16, 16),
        "test": (1, 3, 16, 16),
    }
    for split, examples in data.splits.items():
        for i, example in enumerate(examples):
            assert np.array_equal(maps[split][i], crop(open_image(example), 16))
    with pytest.raises(ValueError, match="read-only"):
        maps["train"][0] = 0


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 64), (16, 50), (17, 16), (9, 12)])
def test_crop_equals_resizing_all_and_cropping(size):
    image = noise(size)
    short = min(size)
    whole = image.resize((int(16 * size[0] / short), int(16 * size[1] / short)), Image.Resampling.BICUBIC)
    left, top = round((whole.width - 16) / 2), round((whole.height - 16) / 2)
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
    # PIL keeps the box in single precision
    assert np.abs(crop(image, 16).astype(int) - expected).max() <= 2


def test_image_of_the_right_size_is_untouched():
    assert np.array_equal(crop(noise((16, 16)), 16), np.asarray(noise((16, 16))).transpose(2, 0, 1))


def test_very_long_strip_is_cropped_without_being_enlarged():
    assert crop(Image.new("RGB", (60_000, 1), "red"), 512)[:, 5, 5].tolist() == [255, 0, 0]


def test_second_use_decodes_nothing(data, tmp_path):
    first = {split: m.copy() for split, m in pixels(data, 16).items()}
    for examples in data.splits.values():
        for example in examples:
            example.image.unlink()
    again = pixels(data, 16)
    assert all(np.array_equal(first[split], again[split]) for split in first)
    assert data.notes == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "trailer"])
def test_damaged_cache_is_rebuilt_with_a_note(data, tmp_path, damage):
    before = pixels(data, 16)["test"].copy()
    file = cached(tmp_path)
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[1000] ^= 1
    if damage == "trailer":
        raw[-20] ^= 255
    file.write_bytes({"truncate": raw[:-100], "empty": b""}.get(damage, raw))
    assert np.array_equal(pixels(data, 16)["test"], before)
    assert len(data.notes) == 1 and "rebuilt" in data.notes[0]


def test_other_data_size_selection_or_order_is_another_file(data, tmp_path):
    pixels(data, 16)
    pixels(data, 8)
    pixels(Data("tiny", data.splits, "beef"), 16)
    pixels(Data("tiny", data.splits | {"train": data.splits["train"][:2]}, "f00d"), 16)
    pixels(Data("tiny", dict(reversed(data.splits.items())), "f00d"), 16)
    pixels(Data("tiny", data.splits | {"train": data.splits["train"][::-1]}, "f00d"), 16)
    assert len(list((tmp_path / "cache" / "pixels").glob("*.u8"))) == 6


def break_file(file: Path, how: str) -> None:
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "no image":
        file.write_text("not an image")
    elif how == "postscript":
        Image.new("RGB", (8, 8)).save(file, format="EPS")
    elif how == "bomb":
        Image.new("1", (10_000, 8_500)).save(file, format="PNG")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "no image", "postscript", "bomb", "missing"])
def test_bad_image_is_named_and_leaves_no_cache(data, tmp_path, how):
    break_file(data.splits["dev"][1].image, how)
    with pytest.raises(InvalidError, match=r"5\.jpg") as caught:
        pixels(data, 16)
    assert "effbench data check tiny" in caught.value.hint
    assert not [f for f in (tmp_path / "cache" / "pixels").iterdir() if f.suffix != ".lock"]


def test_drawn_images_and_a_drawing_that_fails(data):
    data.splits["train"] = [Example(partial(noise, (20, 20)), ("drawn",), "drawn-0")]
    assert np.array_equal(pixels(data, 20)["train"][0], np.asarray(noise((20, 20))).transpose(2, 0, 1))
    data.splits["train"] = [Example(partial(noise, (-1, -1)), ("drawn",), "drawn-1")]
    with pytest.raises(InvalidError, match="drawn-1"):
        pixels(data, 24)


def test_full_disk_is_one_clear_error(data, tmp_path):
    # the limit on file size makes write() fail as a full disk does
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(EffbenchError, match="cannot write") as caught:
            pixels(data, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "EFFBENCH_CACHE" in caught.value.hint
    assert not list((tmp_path / "cache" / "pixels").glob("*.part"))
    assert pixels(data, 16)["test"].shape == (1, 3, 16, 16)


def test_cache_that_cannot_be_a_folder(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(EffbenchError, match="cannot write"):
        pixels(data, 16)


def test_two_runs_at_once_build_once(data, monkeypatch):
    built = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: (built.append(1), build(*args)))
    with ThreadPoolExecutor(2) as pool:
        maps = list(pool.map(lambda _: pixels(data, 16), range(2)))
    assert built == [1] and np.array_equal(maps[0]["train"], maps[1]["train"])
