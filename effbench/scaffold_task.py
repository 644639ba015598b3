"""The files of a new task's package, and the pictures and captions in it; $name, $title and $distribution are names."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

FILES = {
    "pyproject.toml": """
[tool.setuptools.package-data]
effbench_$name = ["data/captions.csv", "data/images/*"]
""",
    "README.md": """\
# $distribution

The task `$name` for effbench: find the image of a caption, and the caption of an image.

    pip install -e '.[test]'
    pytest
    effbench check $name
    effbench run --task $name --method token_prune

The task is `effbench_$name/$name.py`; its data are `effbench_$name/data/images/` and `captions.csv` beside it, whose
columns are split (train, dev or test), file and caption. Put yours there, or name another folder with `--data`. What a
task may do is told by effbench's `effbench/task.py` and `effbench/alignment.py`.
""",
    "effbench_$name/__init__.py": '"""Tasks for effbench: each file is one, named as the file."""\n',
    "effbench_$name/$name.py": '''\
"""Find the image of a caption and the caption of an image, in a folder of images."""

from __future__ import annotations

import csv
from hashlib import sha256
from pathlib import Path

from effbench.alignment import Alignment
from effbench.errors import DataNotFound, InvalidError
from effbench.task import SPLITS, Data, DataRequest, Example


class $title(Alignment):
    """Match drawn shapes with captions that name them. Put your own images and captions into data/."""

    primary = "t2i_r1"  # what arms are judged by; of two dozen test images nearly all are among the best ten
    recommended = {**Alignment.recommended, "epochs": 20, "batch_size": 16}

    def load(self, request: DataRequest) -> Data:
        """Read captions.csv (columns split, file, caption; a line for each caption) and images/ beside it."""
        folder = request.path or Path(__file__).parent / "data"
        table = folder / "captions.csv"
        if not table.is_file():
            raise DataNotFound(f"$name: there is no {table}", "name the folder that holds it with --data")
        captions: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        with table.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row.get("split") not in captions or not row.get("file") or not row.get("caption"):
                    raise InvalidError(f"{table}: {row} is no line of split, file, caption", "mend the line")
                captions[row["split"]].setdefault(row["file"], []).append(row["caption"])
        content = sha256(table.read_bytes())
        splits = {}
        for split, files in captions.items():
            splits[split] = [Example(folder / "images" / file, tuple(files[file]), file) for file in sorted(files)]
            for example in splits[split]:
                content.update(example.image.read_bytes())
        return Data("$name", splits, content.hexdigest(), str(folder), synthetic=True)  # real photos: synthetic=False
''',
    "tests/test_$name.py": """\
import pytest
from effbench.errors import DataNotFound, InvalidError
from effbench.plugin_check import check_task
from effbench.registry import tasks
from effbench.task import DataRequest


def load(path=None):
    return tasks.get("$name")().load(DataRequest(path))


def test_reads_every_split():
    data = load()
    assert all(data.splits[split] for split in ("train", "dev", "test"))
    assert all(example.image.is_file() and example.captions for each in data.splits.values() for example in each)


def test_says_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(DataNotFound):
        load(tmp_path)
    (tmp_path / "captions.csv").write_text("split,file,caption\\nlater,a.png,a shape\\n")
    with pytest.raises(InvalidError):
        load(tmp_path)


def test_conforms():
    assert not check_task("$name").failed
""",
}

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "bar")
SIZES = {"train": 64, "dev": 24, "test": 24}


def draw_data(folder: Path) -> None:
    """Pictures of two shapes beside each other, and captions.csv with two captions of each; no two are alike."""
    from PIL import Image, ImageDraw

    kinds = list(product(COLOURS, SHAPES))
    pairs = [(left, right) for left, right in product(kinds, kinds) if left[0] != right[0]]
    pairs = [pairs[37 * i % len(pairs)] for i in range(sum(SIZES.values()))]  # 37 and 270 have no common divisor
    splits = [split for split, count in SIZES.items() for _ in range(count)]
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("split", "file", "caption"))
        for number, (split, (left, right)) in enumerate(zip(splits, pairs, strict=True)):
            name = f"{number:03d}.png"
            picture = Image.new("RGB", (112, 112), "grey")
            for x, (colour, shape) in ((8, left), (60, right)):
                pen, top = ImageDraw.Draw(picture), 46 if shape == "bar" else 34
                form = pen.ellipse if shape == "circle" else pen.rectangle
                form((x, top, x + 43, 111 - top), fill=colour)
            picture.save(folder / "images" / name)
            first, second = " ".join(left), " ".join(right)
            table.writerow((split, name, f"a {first} left of a {second}"))
            table.writerow((split, name, f"a {second} is to the right of a {first}"))
