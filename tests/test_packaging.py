"""What gets installed: the wheel holds the tree, an editable install sees new files, third parties plug in."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"effbench": "effbench", "methods": "effbench_methods", "tasks": "effbench_tasks"}
SKIP = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def pip(*arguments):
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    return run(sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:])


def alone(site, code):
    """Run code where effbench can come from `site` only: libraries are on the path, their .pth files are not read."""
    libraries = sysconfig.get_path("purelib")
    code = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({libraries!r})\n{code}"
    return run(sys.executable, "-I", "-S", "-c", code)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=SKIP)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    return copy


def test_the_wheel_holds_the_tree(tree, tmp_path):
    expected = {
        "/".join((package, *file.relative_to(tree / folder).parts))
        for folder, package in FOLDERS.items()
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    pip("wheel", "--wheel-dir", tmp_path, tree)
    (wheel,) = tmp_path.glob("effbench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    code = "from effbench.cli import main; import effbench_methods; print(effbench_methods.__file__); main(['list'])"
    out = alone(tmp_path / "site", code)
    assert str(tmp_path) in out and "token_prune" in out and "flickr8k" in out


def test_an_editable_install_sees_a_new_file(tree, tmp_path):
    pip("install", "--target", tmp_path, "--editable", tree)
    method = tree / "methods" / "brand_new.py"
    method.write_text('"""Just added."""\nfrom effbench.method import Method\nclass BrandNew(Method):\n    pass\n')
    try:
        code = "from effbench.registry import methods; print(methods.names(), methods.get('brand_new').__module__)"
        out = alone(tmp_path, code)
    finally:
        method.unlink()
    assert "'brand_new', " in out and "'token_prune'" in out and "effbench_methods.brand_new" in out


def test_a_third_partys_method_and_task_run_end_to_end(tmp_path):
    shutil.copytree(ROOT / "tests" / "plugin", tmp_path / "plugin", ignore=SKIP)
    pip("install", "--target", tmp_path / "site", tmp_path / "plugin")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}

    def effbench(*arguments):
        code = "import sys; from effbench.cli import main; sys.exit(main())"
        return run(sys.executable, "-c", code, *arguments, env=environment, cwd=tmp_path)

    assert "effbench-example" in effbench("list", "methods") and "Images of one" not in effbench("list", "methods")
    tiny = "--image-size 32 --batch-size 8 --epochs 1 --timing-batch 2 --timing-pairs 3 --threads 1"
    backbone = "--backbone timm:test_vit --weights random"
    effbench("run", "--method", "stride_prune:every=2", "--task", "colours", *tiny.split(), *backbone.split())
    shown = effbench("show", "latest", "--out", "leaderboard")
    assert "stride_prune" in shown and "baseline" in shown and "noop" in shown
    assert "stride_prune" in (tmp_path / "leaderboard" / "README.md").read_text()


@pytest.mark.parametrize(("kind", "tests"), [("method", "4 passed"), ("task", "3 passed")])
def test_a_new_plugin_is_installed_and_passes_its_own_tests_and_the_check(kind, tests, tmp_path):
    """`effbench new KIND NAME` is one command: what it writes is installed, listed, conforms, and is tidy."""
    name, target = f"half_{kind}", tmp_path / "site"
    target.mkdir()
    (target / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(target)!r})\n")  # as a venv has it
    own = {"PIP_TARGET": str(target), "PYTHONPATH": str(target)}  # not the environment that the tests run in
    environment = os.environ | own | {"COLUMNS": "160"}

    def python(code, *arguments):
        return run(sys.executable, "-c", f"import sys; {code}", *arguments, env=environment, cwd=tmp_path)

    command = "from effbench.cli import main; sys.exit(main())"
    said = python(command, "new", kind, name)
    assert f"wrote effbench-half-{kind}" in said and "pip uninstall" in said
    folder = tmp_path / f"effbench-half-{kind}"
    listed = python(command, "list", f"{kind}s")
    assert name in listed and folder.name in listed
    code = f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(folder / 'tests')!r}]))"
    assert tests in python(code)  # one of them is effbench check
    run(sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,I,UP,B", ".", cwd=folder)
    for part in ("README.md", "pyproject.toml", f"effbench_{name}/{name}.py", f"tests/test_{name}.py"):
        assert "$" not in (folder / part).read_text(), part


def test_a_new_plugin_needs_a_name_of_its_own(tmp_path, monkeypatch):
    from effbench import scaffold
    from effbench.errors import EffbenchError, UsageError

    for name in (
        "Half",
        "half-width",
        "1st",
        "",
        "a/b",
        "../up",
        "class",
        "a" * 41,
        "half\n",
        "ünder",
        "scenes",
        "compile",
    ):
        for write in (scaffold.write_method, scaffold.write_task):
            with pytest.raises(UsageError):
                write(name, tmp_path)
    assert not list(tmp_path.iterdir())
    folder = scaffold.write_method("half_width", tmp_path)
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        scaffold.write_method("half_width", tmp_path)
    (folder / "pyproject.toml").write_text("[project]\nname = 3\n")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    with pytest.raises(EffbenchError, match="pip could not install it"):
        scaffold.install(folder)
    assert (folder / "README.md").exists()


def test_a_tasks_drawn_data_are_all_different(tmp_path):
    from effbench.scaffold import write_task

    data = write_task("drawn", tmp_path) / "effbench_drawn" / "data"
    files = list((data / "images").iterdir())
    assert len({file.read_bytes() for file in files}) == len(files) == 112
    lines = (data / "captions.csv").read_text().splitlines()[1:]
    assert len(set(lines)) == len({line.split(",")[2] for line in lines}) == 224
