"""`effbench check`: built-in plugins pass, and each check catches the plugin that breaks its promise."""

import json
import subprocess
import sys

import pytest

from effbench import conformance, conformance_task
from effbench.cli import main
from effbench.conformance_model import alignment
from effbench.outcomes import judge
from effbench.plugin_check import check_task
from effbench.process_settings import process_settings
from effbench.registry import methods, tasks

METHOD = '''
from dataclasses import dataclass
import random, torch
from torch import nn
from torch.nn import functional as F
from effbench.method import Method, param
from effbench.models.token_state import TokenEdit
from effbench.models.tower import image_tower

@dataclass(frozen=True)
class Broken(Method):
    """A method."""
    source = "nowhere"
    {fields}
    def edit_model(self, model):
        tower = image_tower(model, "broken")
        {edit}

class Edit(TokenEdit):
    def __init__(self):
        super().__init__()
        {init}
    def forward(self, state, projections):
        x, prefix = state.tokens, state.prefix
        {forward}
'''
PLACED = "tower.after_attention(1, Edit())"


def source(fields="size: int = param(1, 'a size', low=1)", edit=PLACED, init="pass", forward="return None"):
    return METHOD.format(fields=fields, edit=edit, init=init, forward=forward)


BROKEN = [
    ("applied", source(edit="1 / 0"), "ZeroDivisionError: division by zero (broken.py, line 17)"),
    ("documentation", source("size: int = param(1, ' ')"), "help of the parameter size"),
    ("names_that_it_gives", source("conflicts = ('no_such',)"), "conflicts names 'no_such'"),
    ("names_that_it_gives", source("claims = ('magic',)"), "claims names 'magic'"),
    (
        "parameter_ranges",
        source(
            "size: int = param(1, 'a size', low=1)\n"
            "    def __post_init__(self): object.__setattr__(self, 'phase', 'test')"
        ),
        "size=0 is taken",
    ),
    ("does_not_fit", source().replace('image_tower(model, "broken")', "model.image"), "AttributeError"),
    (
        "nothing_at_neutral_parameters",
        source("neutral = {'size': 1}\n    size: int = param(2, 'a size')", forward="state.tokens = 1.1 * x"),
        "changes the result by",
    ),
    (
        "tokens_are_removed",
        source("claims = ('tokens',)", forward="state.tokens = torch.cat([x[:, :9], 0 * x[:, 9:]], dim=1)"),
        "masked, not removed",
    ),
    (
        "determinism",
        source(init="self.by = random.SystemRandom().random()", forward="state.tokens = x * self.by"),
        "made",
    ),
    (
        "determinism",
        source(init="self.seen = 0", forward="self.seen += 1; state.tokens = x * self.seen"),
        "two passes of one model",
    ),
    ("train_and_eval_mode", source(forward="state.tokens = F.dropout(x, 0.5)"), "depend on the random state"),
    (
        "train_and_eval_mode",
        source(
            init="self.train(False)", forward="return None\n    def train(self, mode=True): return super().train(True)"
        ),
        "still in training mode",
    ),
    ("batch_independence", source(forward="state.tokens = x - x.mean(dim=0)"), "with the images beside it"),
    (
        "deepcopy",
        source(
            edit="w = tower.blocks[0].mlp.fc1.weight; "
            "tower.blocks[1].mlp.register_forward_hook(lambda m, i, o: o * (1 + w.sum()))"
        ),
        "when the model is changed",
    ),
    ("dtype", source(forward="state.tokens = x * torch.ones(x.shape[-1])"), "bfloat16"),
    ("dtype", source(forward="state.tokens = x / 0"), "is not finite"),
    (
        "keys_of_the_state_dict",
        source(edit="tower.blocks[0].mlp = nn.Sequential(tower.blocks[0].mlp)"),
        "is now called image_encoder.trunk.blocks.0.mlp.0",
    ),
    (
        "gradients_flow",
        source(
            "default_phase = 'both'",
            init="self.scorer = nn.Linear(48, 1)",
            forward="best = (self.scorer(x[:, prefix:]) * 0).topk(9, dim=1).indices; return None",
        ),
        "no gradient reaches the 2 parameters",
    ),
    ("global_state", source(edit="torch.set_num_threads(torch.get_num_threads() + 1)"), "number of threads"),
    ("global_state", source(edit="torch.set_default_device('cpu')"), "default device from None to cpu"),
    ("global_state", source(edit="torch.backends.mha.set_fastpath_enabled(False)"), "fast path of attention"),
    ("global_state", source(edit="torch.manual_seed(0)"), "it sets the seed of torch:"),
    ("global_state", source(edit="__import__('numpy').random.seed(0)"), "it sets the seed of numpy:"),
    ("global_state", source(edit="__import__('random').seed(0)"), "it sets the seed of python:"),
]


@pytest.fixture(scope="module")
def bed():
    return alignment()


@pytest.mark.parametrize(("check", "text", "said"), BROKEN, ids=[f"{i}-{each[0]}" for i, each in enumerate(BROKEN)])
def test_each_check_catches_its_own_fault(distribution, bed, check, text, said):
    distribution("broken-dist", {"broken.py": text}, {"effbench.methods": {"broken": "broken"}})
    (entry,) = [entry for entry in methods.entries() if entry.name == "broken"]
    case = conformance.Case(entry, methods.get("broken")(), bed)
    before = process_settings()
    (outcome,) = judge([getattr(conformance, check)], case, entry.file)
    assert process_settings() == before
    assert outcome.result == "FAIL" and said in outcome.said and outcome.todo, outcome


def test_every_check_of_a_method_has_a_fault_here():
    assert {check.__name__ for check in conformance.CHECKS} | {"applied"} == {check for check, _, _ in BROKEN}


@pytest.mark.parametrize("spec", ["token_merge", "random_token_drop", "decoder_prune:by=divprune"])
def test_built_in_methods_conform(spec):
    # in a process of its own: tests before this one may have left compiled code and patched classes behind
    name = spec.partition(":")[0]
    words = [sys.executable, "-m", "effbench", "check", name, "--json", *(["--spec", spec] if spec != name else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    passed = {each["check"] for each in found[0]["checks"] if each["result"] == "PASS"}
    assert {"applied", "nothing at neutral parameters", "determinism", "batch independence", "deepcopy"} <= passed


def test_a_method_that_draws_passes_since_it_says_so(bed):
    (entry,) = [entry for entry in methods.entries() if entry.name == "token_prune"]
    case = conformance.Case(entry, methods.get("token_prune")(score="random"), bed)
    mode, batch = judge([conformance.train_and_eval_mode, conformance.batch_independence], case, entry.file)
    assert mode.result == "PASS" and "as it claims" in mode.said
    assert batch.result == "SKIPPED" and "draws at random" in batch.said


TASK = '''
from functools import partial
from PIL import Image
from effbench.alignment import Alignment
from effbench.task import Data, Example, Metric

def draw(shade):
    return Image.new("RGB", (32, 32), (shade, 0, 0))

def example(shade):
    return Example(partial(draw, shade), (f"shade {{shade}}", f"red as {{shade}}"), f"{{shade}}.png")

class Broken(Alignment):
    """A task."""
    def load(self, request):
        sizes = dict(train=(0, 16), dev=(16, 32), test=(32, 48))
        splits = {{split: [example(shade) for shade in range(*ends)] for split, ends in sizes.items()}}
        fingerprint = "shades 1"
        {edit}
        return Data("shades", splits, fingerprint, synthetic=True)
    {more}
'''
BROKEN_TASKS = [
    ("data_are_read", "splits['dev'] = []", "", "no examples in dev"),
    ("captions_are_there", "splits['test'][3] = Example(partial(draw, 35), ('...',))", "", "without words"),
    ("images_decode", "splits['dev'][0] = Example(partial(draw, 'x'), ('a',), 'odd.png')", "", "odd.png"),
    (
        "splits_are_disjoint",
        "splits['test'][0] = Example(partial(draw, 5), ('a',), 'copy')",
        "",
        "copy of test is 5.png",
    ),
    ("fingerprint_is_stable", "fingerprint = str(hash('shades'))", "", "in another process"),
    ("examples_travel", "splits['dev'][0] = Example(lambda: draw(16), ('a',), 'odd')", "", "cannot be pickled"),
    (
        "metrics_are_declared",
        "",
        "def metrics(self, *_): return [Metric('t2i_r10', 't2i_rank', float, False, 10.0, 100.0)]",
        "lower is better, yet chance is 10",
    ),
    ("metrics_are_declared", "", "primary = 'cider'", "primary = 'cider' is no metric of test"),
    ("metrics_are_declared", "splits['test'] = splits['test'][:8]", "", "t2i_r10 of test: chance is its ceiling"),
    (
        "a_step_and_its_scores",
        "",
        "def loss(self, model, batch): return 0 * super().loss(model, batch)",
        "no gradient",
    ),
    ("a_step_and_its_scores", "", "def score(self, *_): return {{}}", "which score does not give"),
]


@pytest.mark.parametrize(
    ("check", "edit", "more", "said"), BROKEN_TASKS, ids=[f"{i}-{each[0]}" for i, each in enumerate(BROKEN_TASKS)]
)
def test_each_check_of_a_task_catches_its_own_fault(distribution, check, edit, more, said):
    text = TASK.format(edit=edit or "pass", more=more.replace("{{}}", "{}"))
    distribution("broken-dist", {"broken_task.py": text}, {"effbench.tasks": {"broken_task": "broken_task"}})
    (entry,) = [entry for entry in tasks.entries() if entry.name == "broken_task"]
    case = conformance_task.Case(entry, tasks.get("broken_task")())
    before = [conformance_task.images_decode] if check == "splits_are_disjoint" else []
    *_, outcome = judge([*before, getattr(conformance_task, check)], case, entry.file)
    assert outcome.result == "FAIL" and said in outcome.said and outcome.todo, outcome


def test_every_check_of_a_task_has_a_fault_here():
    assert {check.__name__ for check in conformance_task.CHECKS} - {"documentation"} == {e[0] for e in BROKEN_TASKS}


def test_a_task_without_a_word_about_itself_fails_and_the_rest_passes(distribution):
    text = TASK.format(edit="pass", more="").replace('"""A task."""', "")
    distribution("broken-dist", {"broken_task.py": text}, {"effbench.tasks": {"broken_task": "broken_task"}})
    (entry,) = [entry for entry in tasks.entries() if entry.name == "broken_task"]
    case = conformance_task.Case(entry, tasks.get("broken_task")())
    checks = [check for check in conformance_task.CHECKS if check is not conformance_task.fingerprint_is_stable]
    results = {outcome.check: outcome.result for outcome in judge(checks, case, entry.file)}
    assert [check for check, result in results.items() if result != "PASS"] == ["documentation"]


def test_data_that_are_not_here_are_no_fault(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("EFFBENCH_DATA", raising=False)
    report = check_task("flickr8k")
    results = {outcome.check: outcome for outcome in report.outcomes}
    assert not report.failed and results["data are read"].result == "SKIPPED"
    assert results["images decode"].said == "its data are not here"
    assert str(tmp_path) in results["data are read"].said


def test_the_command_says_what_failed_and_what_to_do(distribution, capsys):
    text = source(edit="raise ValueError('\\x1b[2J no')")
    distribution("broken-dist", {"broken.py": text}, {"effbench.methods": {"broken": "broken"}})
    assert main(["check", "broken"]) == 1
    shown = capsys.readouterr().out
    assert "ValueError" in shown and "next:" in shown and "broken does not conform" in shown
    assert "\x1b" not in shown and "Traceback" not in shown
    assert main(["check", "broken", "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "FAIL" and report["distribution"] == "broken-dist"
    results = {each["check"]: each["result"] for each in report["checks"]}
    assert results["applied"] == "FAIL" and results["deepcopy"] == "SKIPPED" and results["parameter ranges"] == "PASS"


def test_wrong_use_of_the_command(distribution, capsys):
    distribution("broken-dist", {"broken.py": "raise RuntimeError('no')"}, {"effbench.methods": {"broken": "broken"}})
    for arguments, code, said in (
        (["token_prun"], 3, "did you mean token_prune"),
        (["scenes", "--spec", "scenes:x=1"], 3, "--spec"),
        (["token_prune", "--spec", "token_merge:r=3"], 3, "--spec"),
        (["token_prune:keep=2"], 3, "keep=2"),
        (["token_prune", "--backbone", "nowhere"], 3, "nowhere"),
        (["course_pruning"], 3, "fits none of the tiny models"),
        (["broken"], 1, "fails to import"),
    ):
        assert main(["check", *arguments]) == code, arguments
        assert said in capsys.readouterr().err, arguments
