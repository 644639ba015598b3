"""The files of a new method's package; $name, $title and $distribution stand for its names."""

from __future__ import annotations

FILES = {
    "README.md": """\
# $distribution

The method `$name` for effbench: keep every n-th patch token after one block.

    pip install -e '.[test]'
    pytest
    effbench check $name
    effbench run --method $name --task scenes --quick    # a first look in about a minute; without --quick in three

The method is `effbench_$name/$name.py`. What a method may do is told by effbench's `effbench/method.py`, and what it
sees of a model by `effbench/models/tower.py` and `effbench/models/token_state.py`.
""",
    "effbench_$name/__init__.py": '"""Methods for effbench: each file is one, named as the file."""\n',
    "effbench_$name/$name.py": '''\
"""Keep every n-th patch token after one block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effbench.method import Method, param
from effbench.models.token_state import Reduce, TokenEdit, TokenState
from effbench.models.tower import ModelView, image_tower


@dataclass(frozen=True)
class $title(Method):
    """Keep every n-th patch token after the attention of one block. Put your own method here."""

    source = "where the algorithm is published"
    neutral = {"every": 1}  # with these parameters it changes nothing

    every: int = param(2, "one patch token in so many stays", low=1)
    after: int = param(1, "block (0-based) after whose attention tokens are dropped", low=0)

    @property
    def claims(self) -> tuple[str, ...]:
        return ("tokens",) if self.every > 1 else ()

    def edit_model(self, model: ModelView) -> None:
        image_tower(model, "$name").after_attention(self.after, KeepEvery(self.every))

    # a method that chooses tokens by a score also says what a blind choice of as many is, so that runs compare them:
    # def controls(self) -> dict[str, Method]: return {"random": replace(self, score="random")}


class KeepEvery(TokenEdit):
    """Stands between attention and MLP; class and register tokens (the first `prefix`) stay."""

    name = "$name"

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(self, state: TokenState, projections: object) -> Reduce | None:
        if self.every == 1:
            return None
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
from effbench.plugin_check import check_method
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


def test_conforms():
    assert not check_method("$name").failed
""",
}
