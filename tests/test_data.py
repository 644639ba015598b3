"""Flickr8k in its three layouts, bad copies, the stand-in and `data check`."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from effbench import datasets
from effbench.datasets import check, resolve
from effbench.errors import DataNotFound, InvalidError
from effbench.task import Data, DataRequest, Example
from effbench_tasks.flickr import layouts
from effbench_tasks.flickr8k import Flickr8k

NAMES = [f"{i}_photo.jpg" for i in range(16)]
SPLITS = {"train": NAMES[:11], "dev": NAMES[11:13], "test": NAMES[13:15]}


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EFFBENCH_DATA", raising=False)


def caption(name: str, i: int) -> str:
    return f'A "dog" , no. {i} of {name} .'


def photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.new("RGB", (12, 10), (i * 16, 0, 0)).save(folder / name)


def split_files(folder: Path) -> None:
    for split, names in SPLITS.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")


def official(root: Path, images: str = "Flicker8k_Dataset") -> Path:
    photos(root / images)
    text = root / "Flickr8k_text"
    text.mkdir()
    ids = [*NAMES, "2258277193_586949ec62.jpg.1"]
    (text / "Flickr8k.token.txt").write_text("".join(f"{n}#{i}\t{caption(n, i)}\n" for n in ids for i in range(5)))
    split_files(text)
    return root


def kaggle(root: Path) -> Path:
    photos(root / "Images")
    quoted = [f'{n},"{caption(n, i)}"'.replace('"dog"', '""dog""') for n in NAMES for i in range(5)]
    (root / "captions.txt").write_text("\r\n".join(["image,caption", *quoted]) + "\r\n")
    return root


def karpathy(root: Path) -> Path:
    photos(root / "Images")
    images = [
        dict(filename=n, split="val" if split == "dev" else split, sentences=[{"raw": caption(n, i)} for i in range(5)])
        for split, names in SPLITS.items()
        for n in reversed(names)
    ]
    (root / "dataset_flickr8k.json").write_text(json.dumps(dict(images=images, dataset="flickr8k")))
    return root


def load(path: Path | None = None) -> Data:
    return Flickr8k().load(DataRequest(path))


# --- layouts


@pytest.mark.parametrize("folder", ["Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"])
def test_official_layout(tmp_path, folder):
    data = load(official(tmp_path / "flickr8k", folder))
    assert {split: [e.name for e in examples] for split, examples in data.splits.items()} == {
        split: sorted(names) for split, names in SPLITS.items()
    }
    first = data.splits["dev"][0]
    assert first.captions == tuple(caption("11_photo.jpg", i) for i in range(5))
    assert first.image == tmp_path / "flickr8k" / folder / "11_photo.jpg" and first.image.exists()
    assert any(note.startswith("5 captions of 1 photos without a file") for note in data.notes)
    assert "1 photos are in no split and are not used" in data.notes


def test_same_content_has_the_same_fingerprint_in_every_layout(tmp_path):
    split_files(kaggle(tmp_path / "c"))
    found = [load(official(tmp_path / "a")), load(karpathy(tmp_path / "b")), load(tmp_path / "c")]
    assert len({data.fingerprint for data in found}) == 1
    listed = [[(s, [(e.name, e.captions) for e in examples]) for s, examples in d.splits.items()] for d in found]
    assert listed[0] == listed[1] == listed[2]


def test_kaggle_layout_without_split_files_is_split_by_hash(tmp_path):
    data = load(kaggle(tmp_path / "a"))
    assert data.sizes() == {"test": 2, "dev": 2, "train": 12}
    assert len({e.name for examples in data.splits.values() for e in examples}) == 16
    assert "NOT the official split" in data.notes[0]
    assert data.fingerprint != load(official(tmp_path / "b")).fingerprint
    assert [e.name for e in data.splits["test"]] == [e.name for e in load(tmp_path / "a").splits["test"]]


def test_kaggle_captions_that_are_not_quoted_keep_their_commas(tmp_path):
    (kaggle(tmp_path / "a") / "captions.txt").write_text(
        "image,caption\n" + "".join(f"{n},A man , a dog .\n" for n in NAMES)
    )
    assert load(tmp_path / "a").splits["test"][0].captions == ("A man , a dog .",)


@pytest.mark.parametrize("change", ["caption", "split", "photo"])
def test_fingerprint_sees_every_change(tmp_path, change):
    root = official(tmp_path / "a")
    before = load(root).fingerprint
    assert load(root).fingerprint == before
    if change == "caption":
        file = root / "Flickr8k_text" / "Flickr8k.token.txt"
        file.write_text(file.read_text().replace("no. 3 of 14_", "no. 3 in 14_"))
    elif change == "split":
        file = root / "Flickr8k_text" / "Flickr_8k.trainImages.txt"
        file.write_text("\n".join(SPLITS["train"][1:]))
    else:
        Image.new("RGB", (12, 10), "blue").save(root / "Flicker8k_Dataset" / NAMES[0])
    assert load(root).fingerprint != before


def test_photos_are_hashed_once_and_a_damaged_index_is_replaced(tmp_path, monkeypatch):
    root = official(tmp_path / "a")
    before = load(root).fingerprint
    seen = []
    Flickr8k().load(DataRequest(root, lambda description, done, total: seen.append(description)))
    assert seen == []
    [index] = (tmp_path / "cache" / "index").iterdir()
    index.write_text('{"0_photo.jpg": 3')
    assert load(root).fingerprint == before


# --- where it is looked for


def test_places(tmp_path, monkeypatch):
    with pytest.raises(DataNotFound, match=str(tmp_path / "cache" / "data" / "flickr8k")) as missing:
        load()
    assert all(way in missing.value.hint for way in ("effbench data get flickr8k", "EFFBENCH_DATA", "--data"))

    (tmp_path / "cache" / "data").mkdir(parents=True)
    in_cache = official(tmp_path / "cache" / "data" / "flickr8k")
    assert load().origin == str(in_cache)
    monkeypatch.setenv("EFFBENCH_DATA", str(tmp_path / "nowhere"))
    assert load().origin == str(in_cache)

    for named in (official(tmp_path / "mine" / "flickr8k").parent, tmp_path / "mine" / "flickr8k"):
        monkeypatch.setenv("EFFBENCH_DATA", str(named))
        assert load().origin == str(tmp_path / "mine" / "flickr8k")
        assert load(named).origin == str(tmp_path / "mine" / "flickr8k")

    with pytest.raises(DataNotFound, match="wrong") as missing:
        load(tmp_path / "wrong")
    assert "cache" not in str(missing.value)


def test_half_a_copy_says_what_is_there(tmp_path):
    photos(tmp_path / "a" / "Images")
    with pytest.raises(DataNotFound, match="photos in Images, but no captions"):
        load(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "captions.txt").write_text("image,caption\n")
    with pytest.raises(DataNotFound, match=r"captions in captions\.txt, but no folder of photos"):
        load(tmp_path / "b")


# --- bad copies


TOKENS, DEV = "Flickr8k_text/Flickr8k.token.txt", "Flickr8k_text/Flickr_8k.devImages.txt"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (TOKENS, b"0_photo.jpg#0\tfine\n0_photo.jpg no tab\n", r"token\.txt, line 2"),
        (TOKENS, b"0_photo.jpg#x\tnot a number\n", "line 1"),
        (TOKENS, b"0_photo.jpg#0\t  \n", "line 1.*caption"),
        (TOKENS, b"a.jpg#0\tfine\n../../etc/passwd#0\tevil\n", "line 2.*plain file name"),
        (TOKENS, b"a.jpg#0\tred \x1b[31m\n", "line 1"),
        (TOKENS, b"a.jpg#0\tfine\nb.jpg#0\tcaf\xe9 .\n", "line 2: not UTF-8"),
        (DEV, b"11_photo.jpg\n/etc/passwd\n", r"devImages\.txt, line 2.*plain file name"),
        (DEV, b"11_photo.jpg\n99_photo.jpg\n", "1 photos of the splits have no file.*99_photo"),
        (DEV, b"11_photo.jpg\n0_photo.jpg\n", "0_photo.jpg is in train and again in dev"),
        (DEV, b"\n", "no photos in dev"),
        (DEV, None, r"devImages\.txt is missing"),
    ],
)
def test_bad_official_file(tmp_path, file, content, message):
    root = official(tmp_path / "a")
    (root / file).write_bytes(content) if content is not None else (root / file).unlink()
    with pytest.raises(InvalidError, match=message) as caught:
        load(root)
    assert caught.value.hint and caught.value.exit_code == 2


def test_photo_that_cannot_be_read(tmp_path):
    root = official(tmp_path / "a")
    (root / "Flicker8k_Dataset" / NAMES[3]).unlink()
    (root / "Flicker8k_Dataset" / NAMES[3]).mkdir()
    with pytest.raises(InvalidError, match=f"{NAMES[3]} cannot be read"):
        load(root)


def test_photo_without_captions(tmp_path):
    root = official(tmp_path / "a")
    lines = (root / TOKENS).read_text().splitlines()
    (root / TOKENS).write_text("\n".join(line for line in lines if not line.startswith("12_")))
    with pytest.raises(InvalidError, match=r"1 photos of the splits have no captions: 12_photo\.jpg"):
        load(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("photo;text\n", "line 1.*header"),
        ("image,caption\n0_photo.jpg\n", "line 2"),
        ('image,caption\n0_photo.jpg,"a\n1_photo.jpg,b\n', "line 2.*caption"),
        ("image,caption\n..\\x.jpg,a\n", "line 2.*plain file name"),
    ],
)
def test_bad_kaggle_file(tmp_path, content, message):
    (kaggle(tmp_path / "a") / "captions.txt").write_text(content)
    with pytest.raises(InvalidError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset_flickr8k.json"),
        ('{"images": [{"filename": 3}]}', "images.0"),
        ('{"images": [{"filename": "a.jpg", "split": "x", "sentences": []}]}', "'x' is not train, val or test"),
        ('{"images": [{"filename": "../a.jpg", "split": "val", "sentences": []}]}', "plain file name"),
    ],
)
def test_bad_karpathy_file(tmp_path, content, message):
    (karpathy(tmp_path / "a") / "dataset_flickr8k.json").write_text(content)
    with pytest.raises(InvalidError, match=message):
        load(tmp_path / "a")


def test_check_names_every_bad_image(tmp_path):
    root = official(tmp_path / "a")
    images = root / "Flicker8k_Dataset"
    data = load(root)
    assert check(data, expected=data.sizes()).problems == []
    (images / NAMES[2]).write_bytes((images / NAMES[2]).read_bytes()[:-60])
    (images / NAMES[14]).write_text("<html>")
    data.splits["test"].append(Example(images / NAMES[0], (), NAMES[0]))
    report = check(data, expected=Flickr8k.expected)
    problems = "\n".join(report.problems)
    assert len(report.problems) == 7, problems
    for wanted in (
        "train has 11 images, a complete copy has 6000",
        f"{NAMES[0]}: in the splits 2 times",
        f"{NAMES[0]}: no captions",
        f"{NAMES[2]} cannot be decoded",
        f"{NAMES[14]} cannot be decoded",
    ):
        assert wanted in problems
    assert report.lines()[-1] == "7 problems" and "test: 3 images, 10 captions" in report.lines()


# --- stand-in


class Fake:
    """Tasks by name, as the registry gives them."""

    class Scenes(Flickr8k):
        stand_in = None

        def load(self, request):
            assert request.path is None
            return Data("scenes", {"train": [], "dev": [], "test": []}, "5ce")

    @classmethod
    def get(cls, name):
        return {"flickr8k": Flickr8k, "scenes": cls.Scenes}[name]


@pytest.fixture
def two_tasks(monkeypatch):
    from effbench import registry

    monkeypatch.setattr(registry, "tasks", Fake)


def test_stand_in(two_tasks, tmp_path):
    found = resolve("flickr8k")
    assert (found.data.name, found.stood_in, type(found.task)) == ("scenes", True, Flickr8k)
    assert "flickr8k was not found" in found.looked and "effbench data get flickr8k" in found.looked

    asked = resolve("flickr8k", "scenes")
    assert (asked.data.name, asked.stood_in, asked.looked) == ("scenes", False, "")
    assert resolve("scenes").data.name == resolve("scenes", "scenes").data.name == "scenes"
    for where in ("real", tmp_path / "nowhere", str(tmp_path)):
        with pytest.raises(DataNotFound):
            resolve("flickr8k", where)
    assert resolve("flickr8k", official(tmp_path / "a")).data.name == "flickr8k"


def test_damaged_copy_is_never_replaced_by_the_stand_in(two_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_DATA", str(official(tmp_path / "a")))
    (tmp_path / "a" / TOKENS).write_text("nonsense")
    with pytest.raises(InvalidError, match="line 1"):
        resolve("flickr8k")


# --- the real thing

REAL = os.environ.get("EFFBENCH_DATA")


@pytest.mark.skipif(not REAL, reason="EFFBENCH_DATA names no folder with real flickr8k")
def test_real_flickr8k():
    data = load(Path(REAL))
    captions_file, images = layouts.find(Path(data.origin))
    captions = layouts.read(captions_file, images).captions
    files = set(os.listdir(images))
    assert data.sizes() == Flickr8k.expected
    assert len(files) in (8091, 8092)
    assert sum(len(lines) for name, lines in captions.items() if name in files) == 40_455
    assert all(len(e.captions) == 5 for examples in data.splits.values() for e in examples)
    assert any("2258277193_586949ec62.jpg.1" in note for note in data.notes)


def test_cache_dir_is_the_users_unless_named(monkeypatch, tmp_path):
    assert datasets.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("EFFBENCH_CACHE")
    assert datasets.cache_dir().name == "effbench"
