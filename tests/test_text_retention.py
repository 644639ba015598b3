"""What tuning makes a language model forget: measured against the very weights that all arms start from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from effbench import captioner_base, records
from effbench.errors import UsageError
from effbench.models.patch_tokens import TimmTokens
from effbench.quality import lossiness
from effbench.report import figures
from effbench.retention import Retention
from effbench.task import Data, DataRequest, Example
from effbench.training import reduce
from effbench_tasks.scenes_text_retention import ScenesTextRetention
from effbench_tasks.text_retention import TextRetention

LIVE = SimpleNamespace(stage=lambda *_, **__: None, advance=lambda *_: None)
OPTIONS = records.Captioning(layers=2, width=32, image_tokens=4, max_tokens=3, new_tokens=2, language_epochs=30)
COLOURS = ("red", "green", "blue")


class Keeping(Retention):
    """A task of this kind over the examples that a test makes."""

    recommended = {**Retention.recommended, "lr": 1e-2, "batch_size": 4}  # how the base is made

    def load(self, request):
        raise NotImplementedError


def example(index):
    ground, thing = COLOURS[index % 3], COLOURS[(index + 1) % 3]
    lines = (f"a {thing} thing on {ground}", f"{ground} behind a {thing} thing")
    return Example(lambda: Image.new("RGB", (32, 32), ground), lines, f"{index}")


def setting(train="locked", **options):
    # the language stage learns other texts than tuning does: so tuning has something to make it forget
    splits = dict(train=[example(i) for i in range(12)], dev=[example(0)], test=[example(i) for i in range(8)])
    data = Data("mine", splits, "f")
    protocol = records.Protocol(
        train=train, image_size=32, epochs=2, batch_size=4, eval_batch=3, lr=1e-2,
        captioning=OPTIONS.model_copy(update=options),
    )  # fmt: skip
    backbone = SimpleNamespace(
        mean=(0.5,) * 3, std=(0.5,) * 3, weights_id="w", patch_tokens=lambda: TimmTokens(tiny.vit())
    )
    task = Keeping()
    task.set_apart(data, protocol)
    return task, task.prepare(data, backbone, protocol, lambda *_: None), backbone, protocol


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Task, prepared data with the base made, backbone, protocol."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = setting()
        found[0].groundwork(found[1], *found[2:], LIVE)
        yield found


def outputs(task, prepared, model, size):
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, 8, size):
            batch = task.batch(prepared, "test", np.arange(start, min(start + size, 8)), None)
            parts.append(task.predict(model, batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def values(task, prepared, model, size=3):
    items = task.score(prepared, "test", outputs(task, prepared, model, size))
    return {metric.name: reduce(metric, items[metric.items].values) for metric in task.metrics(prepared, "test")}, items


def test_untouched_weights_have_forgotten_nothing(made):
    task, prepared, backbone, protocol = made
    model = task.build(task.recipe(prepared), backbone, protocol)
    found, items = values(task, prepared, model)
    assert (items["change"].values[:, 0] == 0).all() and found["text_change"] == 0
    assert found["text_ppl"] == found["text_ppl_before"] and found["next_word"] == found["next_word_before"]
    assert found["text_ppl"] < 0.5 * len(prepared.words)  # it did learn language
    assert values(task, prepared, model, size=8)[0]["text_change"] == pytest.approx(0, abs=1e-6)


def test_the_change_is_that_of_log_perplexity_and_a_spoilt_model_shows_it(made):
    task, prepared, backbone, protocol = made
    model = task.build(task.recipe(prepared), backbone, protocol)
    with torch.no_grad():
        model.language.head.weight.zero_()
    found, items = values(task, prepared, model)
    assert found["text_ppl"] == pytest.approx(len(prepared.words), rel=1e-4)  # chance, as it is declared
    assert task.primary_metric(prepared, "test").chance == len(prepared.words)
    assert found["text_change"] == pytest.approx(np.log(found["text_ppl"] / found["text_ppl_before"]))
    metric = next(each for each in task.metrics(prepared, "test") if each.name == "text_change")
    shown = lossiness(metric, [items["change"]], [items["change"]])
    assert shown.low is not None and shown.low <= shown.value <= shown.high and not shown.higher_is_better
    assert "[" in figures.metric(shown, interval=figures.sure("text_change", "text_ppl"))


def test_the_image_is_no_part_of_it_and_nothing_is_written(made):
    task, prepared, backbone, protocol = made
    model = task.build(task.recipe(prepared), backbone, protocol)
    with torch.no_grad():
        model.connector.proj.weight.normal_(0, 5)
    found = outputs(task, prepared, model, 3)
    assert set(found) == {"seen", "text"}
    assert torch.equal(found["text"], torch.from_numpy(prepared.before))
    batch = task.batch(prepared, "test", np.arange(2), np.random.default_rng(0))
    assert task.serve(model, batch)[0].shape == (2, protocol.captioning.new_tokens)  # a timed step writes all the same


def test_where_nothing_is_trained_before_is_still_before_tuning(made):
    """Then tuning is a part of the base: what it made forget is not hidden."""
    task, prepared, backbone, protocol = setting(train="none")
    task.groundwork(prepared, backbone, protocol, LIVE)
    assert prepared.base.name.startswith("language-align-tune")
    assert np.array_equal(prepared.before, made[1].before)
    found, _ = values(task, prepared, task.build(task.recipe(prepared), backbone, protocol))
    assert found["text_change"] != 0


def test_tasks_of_the_same_training_share_their_base(made):
    _, prepared, backbone, protocol = made
    files = [captioner_base._file(t, prepared, backbone, protocol, ("language",)) for t in (TextRetention(), Keeping())]
    caption = type("Flickr8kCaption", (Retention,), {"load": Keeping.load})()
    assert files[0] == captioner_base._file(caption, prepared, backbone, protocol, ("language",)) != files[1]


@pytest.mark.parametrize("stages", [(), ("align",)])
def test_a_decoder_that_never_learned_text_is_refused(stages):
    with pytest.raises(UsageError, match="learns no text before it is tuned") as caught:
        setting(stages=stages)
    assert "--stages language/align" in caught.value.hint


def test_scenes_stand_in_for_flickr8k():
    assert TextRetention.stand_in == "scenes_text_retention" and ScenesTextRetention.embedded == "scenes"
    assert ScenesTextRetention().load(DataRequest()).synthetic
