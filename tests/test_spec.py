"""Specs parse to checked parameters, and a canonical spec parses back to the very same methods."""

import math

import pytest

from effbench.errors import EffbenchError, UsageError
from effbench.method import Method
from effbench.registry import methods
from effbench.spec import canonical, parse, valid

SHELF = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
from effbench.method import Method, param

@dataclass(frozen=True)
class {title}(Method):
    ratio: float = param(0.5, "r", above=0, high=1)
    at: tuple[int, ...] = param((3, 6), "a", low=0)
    count: int | None = param(None, "c", low=1)
    mode: Literal["fast", "slow"] = param("fast", "m")
    score: str = param("norm", "s", choices=("norm", "grid"))
    flag: bool = param(False, "f")
    note: str = param("", "n")
    rates: tuple[float, ...] | None = param(None, "rr", high=1)
    conflicts = {conflicts}
    phases = {phases}
"""


@pytest.fixture(autouse=True)
def shelf(distribution):
    files = {
        "spec_shelf/__init__.py": "",
        "spec_shelf/sweep.py": SHELF.format(title="Sweep", conflicts=(), phases=("test", "both")),
        "spec_shelf/rival.py": SHELF.format(title="Rival", conflicts=("sweep",), phases=("test",)),
        "spec_shelf/bare.py": "from effbench.method import Method\nclass Bare(Method):\n    size: int = 1\n",
        "spec_shelf/odd.py": "from effbench.method import Method\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Odd(Method):\n    size: 'Unknown' = 1\n",
        "spec_shelf/picky.py": "from effbench.method import Method\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Picky(Method):\n    def __post_init__(self):\n"
        "        super().__post_init__()\n        raise ValueError('not today')\n",
    }
    distribution("spec-dist", files, {"effbench.methods": {"all": "spec_shelf"}})


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("sweep", "sweep"),
        ("sweep:0.25", "sweep:ratio=0.25"),
        ("sweep:ratio=0.50", "sweep"),
        ("sweep: ratio = 1 , at = 1/2", "sweep:ratio=1.0,at=1/2"),
        ("sweep:at=7", "sweep:at=7"),
        ("sweep:at=", "sweep:at="),
        ("sweep:flag=True,at=3/6/9", "sweep:at=3/6/9,flag=true"),
        ("sweep:count=4,mode=slow", "sweep:count=4,mode=slow"),
        ("sweep:count=none", "sweep"),
        ("sweep:ratio=1e-07", "sweep:ratio=1e-07"),
        ("sweep:rates=0.5/-1e30", "sweep:rates=0.5/-1e30"),
        ("sweep:phase=both", "sweep:phase=both"),
        ("sweep:phase=test", "sweep"),
        ("sweep:note=a=b:c", "sweep:note=a=b:c"),
        ("sweep + token_prune:keep=0.5", "sweep+token_prune:keep=0.5"),
    ],
)
def test_parses_and_writes_the_shortest_form(text, same):
    stack = parse(text)
    assert canonical(stack) == same
    assert parse(same) == stack


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sweeep", "unknown method 'sweeep'; did you mean sweep?"),
        ("sweep:ration=1", "sweep has no parameter 'ration'; did you mean ratio"),
        ("sweep:ratio=2", "sweep: ratio=2.0 is not valid; ratio takes a number, > 0, <= 1"),
        ("sweep:ratio=0", "ratio takes a number, > 0"),
        ("sweep:ratio=nan", "ratio=nan is not valid"),
        ("sweep:ratio=inf", "ratio=inf is not valid"),
        ("sweep:rates=0.5/nan", "rates=0.5/nan is not valid"),
        ("sweep:at=3/-1", "at takes values separated by /, each a whole number, >= 0"),
        ("sweep:at=3.5", "at=3.5 is not valid"),
        ("sweep:count=0", "count takes a whole number or none, >= 1"),
        ("sweep:count=two", "count=two is not valid"),
        ("sweep:mode=quick", "mode takes fast or slow"),
        ("sweep:score=gird", "score takes norm or grid"),
        ("sweep:flag=yes", "flag takes true or false"),
        ("sweep:phase=train", "phase takes test or both"),
        ("sweep:ratio=1,ratio=1", "ratio is given twice"),
        ("sweep:ratio=1,0.5", "'0.5' is not parameter=value"),
        ("sweep:ratio", "'ratio' is not parameter=value"),
        ("sweep:", "nothing follows the colon in 'sweep:'"),
        ("", "a method is missing in ''"),
        ("sweep++token_prune", "a method is missing in 'sweep++token_prune'"),
        ("sweep+token_prune+sweep:0.1", "sweep stands twice in the stack sweep+token_prune+sweep"),
        ("sweep+rival", "sweep and rival conflict"),
        ("rival+sweep", "rival and sweep conflict"),
        ("picky", "picky: not today"),
    ],
)
def test_refuses_by_name(text, said):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert caught.value.hint and caught.value.exit_code == 3


@pytest.mark.parametrize(("text", "said"), [("bare", "lacks @dataclass"), ("odd", "annotations of Odd cannot be read")])
def test_a_method_written_wrongly_is_named(text, said):
    with pytest.raises(EffbenchError, match=said):
        parse(text)


def test_values_given_in_python_are_checked_too():
    sweep = methods.get("sweep")
    assert sweep(ratio=1, at=[1, 2]) == parse("sweep:ratio=1,at=1/2")[0]
    wrong = dict(ratio=["0.5", True, math.nan, None], count=["3", True, 1.0], flag=[1, "true"], at=[3, (1, "2")])
    wrong |= dict(note=["a,b", "a+b", " a", 3], mode=["none", None])
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(UsageError, match=f"sweep: {name}="):
                sweep(**{name: value})


def test_every_default_is_valid_and_says_what_it_takes():
    for entry in methods.entries():
        if entry.distribution == "effbench":
            method = methods.get(entry.name)
            assert issubclass(method, Method) and canonical([method()]) == entry.name
            assert all(valid(method, name) for name in method.parameters())
