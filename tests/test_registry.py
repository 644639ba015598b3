"""The lazy registry: listing imports nothing, a broken plugin stops nothing, names are never ambiguous."""

import subprocess
import sys

import pytest

from effbench.errors import EffbenchError, UsageError
from effbench.registry import Registry, backbones, methods, tasks

METHOD = '''"""{summary}"""
from dataclasses import dataclass
from effbench.method import Method, param

@dataclass(frozen=True)
class {name}(Method):
    """{summary}"""
    size: int = param(1, "a size", low=1)
'''
GROUP = "effbench.methods"


def method(name, summary="A method."):
    return METHOD.format(name=name, summary=summary)


def entry(name):
    return next(entry for entry in methods.entries() if entry.name == name)


def test_a_package_is_its_files_named_and_summarised_without_import(distribution):
    bomb = "raise RuntimeError('imported')\n"
    files = {
        "shelf/__init__.py": bomb,
        "shelf/alpha.py": method("Alpha", "Says alpha.") + bomb,
        "shelf/_support.py": bomb,
        "shelf/inner/__init__.py": bomb,
        "shelf/inner/hidden.py": bomb,
    }
    site = distribution("shelf-dist", files, {GROUP: {"all": "shelf"}})
    assert entry("alpha").summary == "Says alpha."
    assert entry("alpha").distribution == "shelf-dist"
    assert not {"_support", "inner", "hidden", "__init__"} & set(methods.names())
    (site / "shelf" / "beta.py").write_text(method("Beta"))
    assert "beta" in methods.names()  # one more file, no other step


def test_get_imports_one_module_and_finds_its_class(distribution):
    files = {
        "shelf/__init__.py": "",
        "shelf/alpha.py": method("Alpha") + "\nfrom shelf.beta import Beta\n",
        "shelf/beta.py": method("Beta"),
        "shelf/gamma.py": "raise RuntimeError('imported')\n",
        "solo.py": method("Solo"),
        "lone.py": method("Lone") + "\n@dataclass(frozen=True)\nclass Other(Method):\n    pass\n",
    }
    distribution("shelf-dist", files, {GROUP: {"all": "shelf", "single": "lone:Lone", "third": "solo"}})
    assert methods.get("alpha").__name__ == "Alpha"  # not the Beta that it imports
    assert methods.get("single").__name__ == "Lone"
    assert "shelf.gamma" not in sys.modules
    for name in ("alpha", "single", "third"):
        assert methods.name_of(methods.get(name)) == name


def test_broken_plugins_are_named_and_stop_nothing(distribution):
    files = {
        "bad/__init__.py": "",
        "bad/explodes.py": "raise RuntimeError('no such chip')\n",
        "bad/exits.py": "import sys\nsys.exit('bye')\n",
        "bad/empty.py": "x = 1\n",
        "bad/several.py": method("One") + method("Two"),
        "bad/syntax.py": "def (:\n",
        "bad/good.py": method("Good"),
    }
    points = {"all": "bad", "gone": "nowhere.at_all", "wrong": "bad.good:param", "absent": "bad.good:Absent"}
    distribution("bad-dist", files, {GROUP: points})
    assert {*points, "explodes", "exits", "empty", "several", "syntax", "good"} - {"all"} <= set(methods.names())
    assert entry("syntax").problem.startswith("SyntaxError")
    assert "nowhere.at_all not found" in entry("gone").problem
    for name, said in {
        "explodes": "RuntimeError: no such chip",
        "exits": "SystemExit",
        "empty": "found none",
        "several": "found One, Two",
        "syntax": "SyntaxError",
        "gone": "ModuleNotFoundError",
        "wrong": "param is not a subclass of effbench.method.Method",
        "absent": "Absent is not a subclass",
    }.items():
        with pytest.raises(EffbenchError) as caught:
            methods.get(name)
        assert said in str(caught.value) and f"method {name} (from bad-dist)" in str(caught.value), name
    assert methods.get("good").__name__ == "Good"


def test_two_plugins_of_one_name_are_refused_by_naming_both(distribution):
    distribution("one-dist", {"one.py": method("One")}, {GROUP: {"same": "one"}})
    distribution("two-dist", {"two.py": method("Two")}, {GROUP: {"same": "two"}})
    with pytest.raises(UsageError, match="one-dist and two-dist"):
        methods.get("same")
    assert methods.get("token_prune")


def test_unknown_name_says_what_was_meant():
    with pytest.raises(UsageError) as caught:
        methods.get("token_prun")
    assert "did you mean token_prune" in str(caught.value) and caught.value.hint == "effbench list methods"
    assert caught.value.exit_code == 3


def test_a_name_that_no_spec_can_say_is_refused(distribution):
    distribution("odd-dist", {"odd.py": method("Odd")}, {GROUP: {"o+dd:x": "odd"}})
    with pytest.raises(EffbenchError, match="is not a name"):
        methods.get("o+dd:x")


def test_an_empty_group_lists_nothing():
    assert Registry("effbench.nothing", "nothing", "effbench.method:Method").names() == []


@pytest.mark.parametrize("registry", [methods, tasks, backbones], ids=lambda registry: registry.kind)
def test_every_built_in_plugin_can_be_had_and_tells_what_it_is(registry):
    builtin = [entry for entry in registry.entries() if entry.distribution == "effbench"]
    assert builtin
    for entry in builtin:
        assert registry.name_of(registry.get(entry.name)) == entry.name
        assert entry.summary and not entry.problem


def test_listing_imports_neither_torch_nor_a_plugin():
    code = (
        "import sys; from effbench.cli import main; assert main(['list']) == 0; "
        "assert not {'torch', 'pandas', 'effbench_methods', 'effbench_tasks'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "token_prune" in done.stdout and "flickr8k" in done.stdout and "timm" in done.stdout
