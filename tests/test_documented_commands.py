"""Every command that README.md and docs/ tell is run: experiments as dry runs, what needs a network or minutes by half.

The commands run in the order of the page, in one folder per page, with the leaderboard of one short run in it.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from effbench.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: what a reader replaces by something of their own
PLACES = {
    "DIR": "data",
    "FILE": "out.safetensors",
    "RECORD": str(ROOT / "tests/reference/scenes"),
    "RUN": "latest",
    "RUN1": "latest",
    "RUN2": "latest",
}


def commands(page: Path) -> list[str]:
    """The lines of a page's ```sh blocks, continued lines joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


#: each once, where it is told first; experiments are dry runs, told so or not
TOLD = {line.replace(" --dry-run", ""): (page, line) for page in reversed(PAGES) for line in reversed(commands(page))}
CASES = [pytest.param(line, id=f"{page.name}: {line}"[:110]) for page, line in reversed(TOLD.values())]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages take for granted: the repository's sweeps, and a leaderboard with a run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("sweeps", "tests"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EFFBENCH_CACHE", str(folder / "cache"))
        patch.delenv("EFFBENCH_WEIGHTS", raising=False)  # the small tower that ships with effbench
        short = "--epochs 2 --data-share 0.3 --timing-pairs 6 --memory-runs 0 --controls none".split()
        assert main(["run", "--method", "token_prune", "--task", "scenes", *short]) in (0, 2)
    return folder


def test_pages_have_commands():
    assert len(CASES) > 40 and {page.name for page in PAGES} >= {"README.md", "writing-a-method.md"}


@pytest.mark.parametrize("line", CASES)
def test_a_told_command_works(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("EFFBENCH_CACHE", str(place / "cache"))
    for plugin in ("effbench-half-tokens", "effbench-shapes"):
        if (place / plugin).exists():
            monkeypatch.syspath_prepend(place / plugin)
    program, *words = [PLACES.get(word, word) for word in shlex.split(line)]
    RUNNERS[program](words, monkeypatch)


def _make(words, monkeypatch):
    assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0


def _python(words, monkeypatch):
    """A benchmark at its smallest; the tower's training by its arguments alone, since it takes minutes."""
    if words[:2] == ["-m", "pip"]:
        return _pip(words[2:], monkeypatch)
    if words[:2] == ["-m", "effbench_tasks.drawing.train_tower"]:
        words.append("--help")
    elif words[0] in SMALLEST:
        if words[0] in NEED_CAPTIONS and not os.environ.get("EFFBENCH_DATA"):
            pytest.skip("it packs the captions of Flickr8k; set EFFBENCH_DATA")
        words = [str(ROOT / words[0]), *words[1:], *SMALLEST[words[0]].split()]
    elif words[0] in BY_HELP:
        words = [str(ROOT / words[0]), "--help"]
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


NEED_CAPTIONS = {"benchmarks/sample_pack.py", "benchmarks/text_pack.py"}
SMALLEST = {
    "benchmarks/decoder_prune.py": "--layers 4 --width 64 --batch 2 --pairs 6 --vocabulary 50",
    "benchmarks/decoding.py": "--layers 1 --width 64 --batch 2 --image-tokens 4 --words 4 --pairs 2",
    "benchmarks/sample_pack.py": "--image-tokens 4 --batch 4 --steps 6 --layers 1 --width 64",
    "benchmarks/text_pack.py": "--batches 4 --pairs 6",
    "benchmarks/window_attention.py": "--pairs 6",
}
BY_HELP = {"benchmarks/gate_rates.py"}  # it simulates nights from samples that take an hour


def _effbench(words, monkeypatch):
    from effbench import dry_run

    monkeypatch.setattr(dry_run, "_seconds", lambda step: 1.0)  # arms are built and checked, their steps are not timed
    if words[0] == "sweep":  # every method is tried on its backbone; what the arms would take is not estimated
        monkeypatch.setattr(dry_run, "show", lambda experiment, console: None)
    expected = (0,)
    if words[0] in ("run", "sweep"):
        words = [*words, "--dry-run"] if "--dry-run" not in words else words
        if "real" in words and not os.environ.get("EFFBENCH_DATA"):
            expected = (2,)  # no copy of Flickr8k here: it says so
        if "hf:FOLDER" in words and not Path("FOLDER").exists():
            import tiny_hf

            tiny_hf.llama(Path("FOLDER"))
        if "hf:FOLDER" in words:
            expected = (0, 2)  # 2: a tokenizer of twenty words knows too few of the captions', and it says so
        if "deit_tiny_patch16_224.safetensors" in words:
            words[words.index("deit_tiny_patch16_224.safetensors")] = str(_weights("deit_tiny_patch16_224.safetensors"))
        if "--pretrained" in words:  # a download
            at = words.index("--pretrained")
            words[at : at + 2] = ["--weights", "random"]
    elif words[:2] == ["data", "get"] or "--times" in words:
        words.append("--help")  # test_download has a server on loopback, test_nightly two versions of the code
    elif words[0] == "calibrate":
        words += "--trials 20 --slower-trials 0 --loaded-trials 0 --pairs 6 --backbone timm:test_vit".split()
    elif words[:2] == ["data", "check"]:
        expected = (0,) if os.environ.get("EFFBENCH_DATA") else (2,)
    elif words[0] == "gate":
        expected = (0, 1, 2)  # the run at hand is another than the reference's
    elif words[0] == "recommend":
        expected = (0, 1)  # the run at hand is too short to show anything
    elif words[0] == "new":
        shutil.rmtree(folder := Path(f"effbench-{words[2].replace('_', '-')}"), ignore_errors=True)
        assert main([*words, "--no-install"]) == 0
        return _listed(folder)
    assert main(words) in expected, words


def _listed(folder: Path) -> None:
    """What pip adds to a package for its entry points to be seen."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    readme = (folder / project["readme"]).read_text()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n\n{readme}")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


def _weights(name: str) -> Path:
    if not os.environ.get("EFFBENCH_WEIGHTS"):
        pytest.skip("it takes real weights; set EFFBENCH_WEIGHTS")
    return Path(os.environ["EFFBENCH_WEIGHTS"]) / name


def _pip(words, monkeypatch):
    """The tests of `effbench new` install and remove a package for real."""
    assert words[0] in ("install", "uninstall")


def _export(words, monkeypatch):
    assert re.fullmatch(r"[A-Z_]+=\S+", words[0])


RUNNERS = {"make": _make, "python": _python, "effbench": _effbench, "pip": _pip, "export": _export}


def test_the_pages_python_is_python():
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            ast.parse(block)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
