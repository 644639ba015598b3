"""`effbench new method NAME`: a package of a third party with one method that works, its test and its README."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from string import Template

from effbench.errors import UsageError
from effbench.registry import methods


def write_method(name: str, to: Path) -> Path:
    """Write the package `effbench-NAME` into a folder of that name under `to` and return it.

    Raises:
        UsageError: the name is not one, is taken, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot name a method", "use lower-case letters, digits and _, e.g. half_depth")
    if name in methods.names():
        raise UsageError(f"there is a method {name} already", "choose another name; effbench list methods")
    if find_spec(f"effbench_{name}") is not None:
        raise UsageError(f"there is a package effbench_{name} already", "choose another name")
    folder = Path(to).expanduser() / f"effbench-{name.replace('_', '-')}"
    if folder.exists():
        raise UsageError(f"{folder} exists and is not overwritten", "choose another name or another folder with --to")
    words = {"name": name, "title": name.title().replace("_", ""), "distribution": folder.name}
    for path, text in FILES.items():
        file = folder / Template(path).substitute(words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder


FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "$name, a method for effbench"
requires-python = ">=3.11"
dependencies = ["effbench"]

[project.optional-dependencies]
test = ["pytest"]

# Every file of the package whose name does not start with "_" is a method, named as the file.
[project.entry-points."effbench.methods"]
$name = "effbench_$name"

[tool.setuptools]
packages = ["effbench_$name"]
""",
    "README.md": """\
# $distribution

The method `$name` for effbench.

    pip install -e '.[test]'
    pytest
    effbench list methods $name
    effbench run --method $name --task scenes

The method is `effbench_$name/$name.py`. What a method may do is told by effbench's `effbench/method.py`, and what it
sees of a model by `effbench/models/tower.py` and `effbench/models/token_state.py`.
""",
    "effbench_$name/__init__.py": '"""Methods for effbench: each file is one, named as the file."""\n',
    "effbench_$name/$name.py": '''\
"""Keep every n-th patch token after one block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.token_state import Reduce, TokenEdit, TokenState
from effbench.models.tower import ModelView


@dataclass(frozen=True)
class $title(Method):
    """Keep every n-th patch token after the attention of one block. Put your own method here."""

    source = "where the algorithm is published"
    claims = ("tokens",)

    every: int = param(2, "one patch token in so many stays", low=1)
    after: int = param(1, "block (0-based) after whose attention tokens are dropped", low=0)

    def edit_model(self, model: ModelView) -> None:
        if model.image is None:
            raise UsageError("$name needs an image tower of transformer blocks", "use a ViT backbone")
        model.image.after_attention(self.after, KeepEvery(self.every))

    # a method that chooses tokens by a score also says what a blind choice of as many is, so that runs compare them:
    # def controls(self) -> dict[str, Method]: return {"random": replace(self, score="random")}


class KeepEvery(TokenEdit):
    """Stands between attention and MLP; class and register tokens (the first `prefix`) stay."""

    name = "$name"

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(self, state: TokenState, projections: object) -> Reduce | None:
        device, prefix = state.tokens.device, state.prefix
        patches = torch.arange(prefix, state.tokens.shape[1], self.every, device=device)
        kept = torch.cat([torch.arange(prefix, device=device), patches])
        return lambda field, kind: field[:, kept]
''',
    "tests/test_$name.py": """\
import effbench
import pytest
import timm
import torch
from effbench.errors import UsageError
from effbench.spec import parse

IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def tower():
    return timm.create_model("test_vit", num_classes=0).eval()


def test_saves_flops_and_keeps_the_shape():
    before = effbench.flops(tower(), IMAGES).dense_flops
    model = effbench.apply(tower(), "$name")
    out = model(IMAGES)
    assert out.shape == (2, model.num_features) and out.isfinite().all()
    assert effbench.flops(model, IMAGES).dense_flops < before


def test_keeping_every_token_changes_nothing():
    plain = tower()
    expected = plain(IMAGES)
    torch.testing.assert_close(effbench.apply(plain, "$name:every=1")(IMAGES), expected, atol=1e-5, rtol=0)


def test_refuses_a_value_out_of_range():
    with pytest.raises(UsageError):
        parse("$name:every=0")
""",
}
