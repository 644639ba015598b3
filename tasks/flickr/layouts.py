"""The three layouts in which Flickr8k is passed around, read into one listing. Nothing in the files is trusted."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError

from effbench.errors import InvalidError
from effbench.task import SPLITS

TEXTS = ("Flickr8k_text", ".")
IMAGES = (
    "Flicker8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "Flickr8k_Dataset/Flickr8k_Dataset",
    "Flickr8k_Dataset",
    "Images",
    "images",
)
OFFICIAL, KARPATHY, KAGGLE = "Flickr8k.token.txt", "dataset_flickr8k.json", "captions.txt"
SPLIT_FILES = {split: f"Flickr_8k.{split}Images.txt" for split in SPLITS}
KARPATHY_SPLITS = {"train": "train", "val": "dev", "test": "test"}
DAMAGED = "repair the file or get a fresh copy with `effbench data get flickr8k --to FOLDER`"


@dataclass
class Listing:
    """A copy of Flickr8k as its files describe it.

    Args:
        images: the folder of photos.
        captions: the captions of each photo by file name, in the file's order.
        splits: file names by split name.
        notes: what was decided while reading, one sentence each.
    """

    images: Path
    captions: dict[str, list[str]]
    splits: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)


class Sentence(BaseModel):
    raw: str


class Photo(BaseModel):
    filename: str
    split: str
    sentences: list[Sentence]


class Karpathy(BaseModel):
    images: list[Photo]


def find(folder: Path) -> tuple[Path, Path] | str:
    """The captions file and the folder of photos of a copy at `folder`, or the reason why there is none."""
    if not folder.is_dir():
        return "not a folder" if folder.exists() else "does not exist"
    texts = [folder / text / OFFICIAL for text in TEXTS] + [folder / KARPATHY, folder / KAGGLE]
    captions = next((file for file in texts if file.is_file()), None)
    images = next((folder / name for name in IMAGES if (folder / name).is_dir()), None)
    if captions and images:
        return captions, images
    if captions:
        return f"captions in {captions.name}, but no folder of photos ({', '.join(IMAGES[:1] + IMAGES[3:5])})"
    if images:
        return f"photos in {images.name}, but no captions ({OFFICIAL}, {KARPATHY} or {KAGGLE})"
    return "no copy of flickr8k"


def read(captions_file: Path, images: Path) -> Listing:
    """Captions and splits of a copy that `find` found.

    Raises:
        InvalidError: a malformed line, a name that is not a plain file name, wrong encoding, missing or overlapping
            splits; file and line are named.
    """
    if captions_file.name == KARPATHY:
        captions, splits, notes = _karpathy(captions_file)
    else:
        captions = (_official if captions_file.name == OFFICIAL else _kaggle)(captions_file)
        splits, notes = _splits(captions_file.parent, captions, required=captions_file.name == OFFICIAL)
    seen: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if name in seen:
                raise InvalidError(f"{captions_file.parent}: {name} is in {seen[name]} and again in {split}", DAMAGED)
            seen[name] = split
    return Listing(images, captions, splits, notes)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InvalidError(f"{file}, line {line}: not UTF-8 ({error.reason})", DAMAGED) from None
    return enumerate(text.split("\n"), start=1)


def _malformed(file: Path, line: int, text: str, wanted: str) -> InvalidError:
    return InvalidError(f"{file}, line {line}: {text[:80]!r} is not {wanted}", DAMAGED)


def _plain(name: str, file: Path, line: int) -> str:
    """A file name without any folder in it."""
    if not name or name.startswith(".") or len(name) > 255 or set(name) & set("/\\:") or not name.isprintable():
        raise _malformed(file, line, name, "a plain file name")
    return name


def _caption(text: str, file: Path, line: int) -> str:
    text = text.strip()
    if not text or any(ord(letter) < 32 and letter != "\t" for letter in text):
        raise _malformed(file, line, text, "a caption (one line of text)")
    return text


def _official(file: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in _lines(file):
        if not line.strip():
            continue
        identity, tab, caption = line.partition("\t")
        name, hash_sign, index = identity.rpartition("#")
        if not (tab and hash_sign and index.isdecimal()):
            raise _malformed(file, number, line, "`photo.jpg#0<TAB>caption`")
        captions.setdefault(_plain(name, file, number), []).append(_caption(caption, file, number))
    return captions


def _kaggle(file: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    rows = csv.reader(line.rstrip("\r") + "\n" for _, line in _lines(file))
    number = 1
    try:
        if next(rows, None) != ["image", "caption"]:
            raise InvalidError(f"{file}, line 1: not the header `image,caption`", DAMAGED)
        number += 1
        for row in rows:
            if len(row) == 1:
                raise _malformed(file, number, row[0], "`photo.jpg,caption`")
            if row:
                # some copies do not quote captions that hold commas
                caption = _caption(",".join(row[1:]), file, number)
                captions.setdefault(_plain(row[0], file, number), []).append(caption)
            number = rows.line_num + 1
    except csv.Error as error:
        raise InvalidError(f"{file}, line {number}: {error}", DAMAGED) from None
    return captions


def _karpathy(file: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    text = "\n".join(line for _, line in _lines(file))
    try:
        photos = Karpathy.model_validate_json(text).images
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidError(f"{file}: {'.'.join(map(str, first['loc']))} {first['msg']}", DAMAGED) from None
    captions: dict[str, list[str]] = {}
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry, photo in enumerate(photos):
        if photo.split not in KARPATHY_SPLITS:
            raise InvalidError(f"{file}, images[{entry}]: {photo.split[:80]!r} is not train, val or test", DAMAGED)
        name = _plain(photo.filename, file, entry)
        captions[name] = [_caption(sentence.raw, file, entry) for sentence in photo.sentences]
        splits[KARPATHY_SPLITS[photo.split]].append(name)
    return captions, splits, []


def _splits(folder: Path, captions: dict[str, list[str]], required: bool) -> tuple[dict[str, list[str]], list[str]]:
    """The official splits where their files lie in `folder`; for a copy that never had them, a fixed one by hash."""
    places = [folder, folder / "Flickr8k_text"]
    place = next((p for p in places if any((p / file).is_file() for file in SPLIT_FILES.values())), None)
    if place is None and not required:
        return _hashed(list(captions)), [
            "this copy has no split files: photos were split by the hash of their file name, which is NOT the "
            f"official split (put {', '.join(SPLIT_FILES.values())} beside captions.txt to use that)"
        ]
    splits = {}
    for split, name in SPLIT_FILES.items():
        file = (place or folder) / name
        if not file.is_file():
            raise InvalidError(f"{file} is missing: the splits are incomplete", DAMAGED)
        splits[split] = [_plain(line.strip(), file, number) for number, line in _lines(file) if line.strip()]
    return splits, []


def _hashed(names: list[str]) -> dict[str, list[str]]:
    """6000/1000/1000 photos, or the same shares of fewer."""
    order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    held_out = min(1000, len(order) // 8)
    train = min(6000, len(order) - 2 * held_out)
    return {
        "test": order[:held_out],
        "dev": order[held_out : 2 * held_out],
        "train": order[2 * held_out :][:train],
    }
