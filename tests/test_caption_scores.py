"""Scores of captions against pycocoevalcap's own, METEOR and SPICE where Java fails, and the answers that are shown."""

import json
import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from rich.console import Console
from test_leaderboard import EVIL, make_arm, make_record
from tiny import flickr8k

import effbench
from effbench import caption_scores, java_scores, store
from effbench.caption_scores import METRICS, References
from effbench.caption_tokens import words
from effbench.live import Live
from effbench.quality import Sides, _Prepared, lossiness
from effbench.records import Answer
from effbench.report import figures, leaderboard, show
from effbench.task import Items, Task, shown

METRIC = {metric.name: metric for metric in METRICS}
SCENES = [
    ("a brown dog runs over the grass", ["A brown dog runs across the grass .", "The dog is running ."]),
    ("two people sit", ["Two people sit on a bench in a park .", "A couple on a park bench ."]),
    ("a man a man a man a man", ["A man in a red shirt .", "A man stands ."]),
    ("", ["Children play soccer .", "Kids with a ball ."]),
    ("café naïve 日本", ["A café in Paris .", "People at a naïve café"]),
    (
        "a girl in a t-shirt doesn't look",
        ["A girl in a T-shirt doesn't look at the dog 's ball .", "A girl looks away ."],
    ),
    ("the boy is on the beach with his dog", ["The boy is on the beach with his dog .", "A boy on sand ."]),
]
WRITTEN, REFERENCES = [text for text, _ in SCENES], [refs for _, refs in SCENES]
#: what METEOR 1.5 answered, for three captions of Flickr8k, one of them without a match, and for all three together
STATISTICS = (
    "12 7 5 3 3 3 3 3 0 0 0 0 0 0 0 0 0 0 0 0 3 6 6",
    "12 8 5 3 3 3 2 2 0 0 0 0 0 0 0 0 1 1 1 1 4 7 7",
    "2 7 0 3 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
)
SEGMENTS = (34.426642307915356, 32.35068643911371, 0.0)


def fake_java(folder, monkeypatch, script):
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("EFFBENCH_JAVA", str(java))


def values(found, name, weights=None):
    """A metric of some scores; of images drawn as often as `weights` say."""
    items = found[METRIC[name].items]
    each = np.arange(len(items))
    return _Prepared(METRIC[name], Items(items, each), each).reduce(
        np.ones((1, len(each))) if weights is None else weights
    )


def of_library(written, references):
    """pycocoevalcap's own corpus scores, in per cent."""
    given = {i: [" ".join(words(text)) for text in each] for i, each in enumerate(references)}
    made = {i: [" ".join(words(text))] for i, text in enumerate(written)}
    bleu = Bleu(4).compute_score(given, made, verbose=0)[0][3]
    return dict(
        cider=100 * Cider().compute_score(given, made)[0],
        bleu4=100 * bleu,
        rouge_l=100 * Rouge().compute_score(given, made)[0],
    )


@pytest.mark.parametrize(
    ("caption", "tokens"),  # as Stanford's tokenizer, through pycocoevalcap, splits them
    [
        ("Two dogs' owner isn't here , it's John's !", "two dogs owner is n't here it 's john 's"),
        ("A tri-colored T-shirt ; mid-air- stunt -- wow", "a tri-colored t-shirt mid-air stunt wow"),
        ("Mr. Smith of the U.S. at 5 p.m. in St. Louis .", "mr. smith of the u.s. at 5 p.m. in st. louis"),
        ("5.5 and 1,000 at 10:30 #5 5% $5 1/2 -5 3-4 5'10\"", "5.5 and 1,000 at 10:30 # 5 5 % $ 5 1/2 -5 3-4 5 10"),
        ("(in brackets) and/or AT&T a&b x.com", "-lrb- in brackets -rrb- and/or at&t a & b x.com"),
        ("“curly” don’t — café naïve 日本 a–b…", "curly do n't café naïve 日本 a b"),
        ("rock 'n' roll o'clock 'em cannot gonna", "rock 'n' roll o'clock 'em can not gon na"),
        ("hello...there .. what?! a:b she saw b... x", "hello there what ?! a b she saw b. x"),
        (" . , '' ", ""),
    ],
)
def test_words_are_those_of_the_reference_tokenizer(caption, tokens):
    assert " ".join(words(caption)) == tokens


def test_scores_are_the_librarys():
    found = References(REFERENCES).scores(WRITTEN)
    for name, value in of_library(WRITTEN, REFERENCES).items():
        assert value > 1
        assert values(found, name) == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("written", [["a red dog"] * 7, [""] * 7, [refs[0] for refs in REFERENCES]])
def test_bleu_is_the_librarys_where_nothing_or_all_of_it_matches(written):
    found = References(REFERENCES).scores(written)
    assert values(found, "bleu4") == pytest.approx(of_library(written, REFERENCES)["bleu4"], rel=1e-9, abs=1e-12)


def test_a_resample_of_images_has_the_bleu_of_a_corpus_of_them():
    found = References(REFERENCES).scores(WRITTEN)
    drawn = [0, 0, 1, 2, 5, 6, 6]
    again = of_library([WRITTEN[i] for i in drawn], [REFERENCES[i] for i in drawn])
    weights = np.bincount(drawn, minlength=7)[None].astype(float)
    assert values(found, "bleu4", weights) == pytest.approx(again["bleu4"], abs=1e-9)


def test_an_empty_caption_scores_nothing_even_against_an_empty_reference():
    found = References([[".", "A dog ."], ["A cat ."]]).scores(["", " ... "])
    assert found["rouge_l"].tolist() == found["cider"].tolist() == [0, 0]
    assert values(found, "bleu4") == 0


def test_one_reference_and_one_image():
    found = References([["A dog runs ."]]).scores(["a dog runs"])
    assert found["rouge_l"] == pytest.approx(100)
    assert found["cider"] == [0]  # a word that stands in every image's references tells nothing
    several = References([[refs[0]] for refs in REFERENCES]).scores(WRITTEN)
    alone = of_library(WRITTEN, [[refs[0]] for refs in REFERENCES])
    assert values(several, "cider") == pytest.approx(alone["cider"], abs=1e-9)
    with pytest.raises(ValueError, match="1 captions for 7 images"):
        References(REFERENCES).scores(["one"])


def test_arms_that_write_the_same_are_equal_and_scored_once(monkeypatch):
    calls = []
    monkeypatch.setattr(caption_scores, "OPTIONAL", {"spice": lambda *given: calls.append(given) or np.ones(7)})
    references = References(REFERENCES)
    same = [Items(references.scores(list(WRITTEN))["bleu"], np.arange(7)) for _ in range(2)]
    assert len(calls) == 1
    assert lossiness(METRIC["bleu4"], same[:1], same[1:]).lossiness.value == 0
    assert Sides(METRIC["bleu4"], [same[:1], same[1:]]).draws.std() > 0
    assert References(REFERENCES, optional=False).scores(WRITTEN).keys() == {"cider", "bleu", "rouge_l"}
    assert len(calls) == 1


def test_meteor_of_counts_is_meteors_own():
    counts = np.array([[float(n) for n in line.split()] for line in STATISTICS])
    assert java_scores.meteor_score(counts) == pytest.approx(SEGMENTS, abs=1e-9)
    perfect = np.array([6, 6, 3, 3, 3, 3, 3, 3, *[0] * 12, 0, 6, 6], float)  # chunks are dropped as `meteor` does
    assert java_scores.meteor_score(perfect) == pytest.approx(100)


@pytest.mark.skipif(not shutil.which("java"), reason="no Java")
def test_meteor_runs(monkeypatch):
    monkeypatch.delenv("EFFBENCH_JAVA")
    written = ["a little girl in a pink dress going into a wooden cabin", "", "a dog | runs"]
    references = [["a child in a pink dress is climbing up a set of stairs in an entry way"]] * 2 + [["a dog | runs"]]
    references[0] += [
        "a girl going into a wooden building",
        "a little girl climbing into a wooden playhouse",
        "a little girl climbing the stairs to her playhouse",
    ]
    counts = java_scores.meteor(written, references)
    assert java_scores.meteor_score(counts) == pytest.approx([SEGMENTS[0], 0, 100], abs=1e-6)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no memory >&2; exit 3", "java failed: no memory"),
        ("exit 3", "java failed: exit status 3"),
        ("cat >/dev/null; echo 1 2 3", "METEOR's answer is not understood"),
        ("cat >/dev/null; echo one", "METEOR's answer is not understood"),
        ("exit 0", "METEOR's answer is not understood"),
    ],
)
def test_a_java_that_fails_leaves_meteor_out(script, why, tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, script)
    references = References(REFERENCES)
    assert "meteor" not in references.scores(WRITTEN)
    assert references.left_out["meteor"] == f"meteor is left out: {why}"


def test_no_java_and_one_that_hangs(tmp_path, monkeypatch):
    with pytest.raises(java_scores.Unavailable, match="needs Java, which was not found"):
        java_scores.meteor(WRITTEN, REFERENCES)
    fake_java(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(java_scores.Unavailable, match="did not end within 0 s"):
        java_scores._java([], tmp_path, 0.3, "text")


def test_spice_reads_what_its_program_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(java_scores, "_folder", lambda part: tmp_path)
    with pytest.raises(java_scores.Unavailable, match="get_stanford_models"):
        java_scores.spice(["a dog"], [["a dog"]])
    (tmp_path / "lib").mkdir()
    for jar in java_scores.CORENLP:
        (tmp_path / "lib" / jar).touch()
    answer = [dict(image_id=i, scores=dict(All=dict(f=0.25 * (i + 1)))) for i in (2, 0)]
    (tmp_path / "answer").write_text(json.dumps(answer))
    fake_java(tmp_path, monkeypatch, f'cp "$4" {tmp_path}/given; cp {tmp_path}/answer "$6"')
    found = java_scores.spice(["a dog", "", "a café"], [["x"], ["y"], ["z", "w"]])
    assert found.tolist() == [25, 0, 75]
    given = json.loads((tmp_path / "given").read_text())
    assert given == [
        dict(image_id=0, test="a dog", refs=["x"]),
        dict(image_id=2, test="a café", refs=["z", "w"]),
    ]
    for wrong in ("[", "[1]", '[{"image_id": 9, "scores": {"All": {"f": 1}}}]'):
        (tmp_path / "answer").write_text(wrong)
        with pytest.raises(java_scores.Unavailable, match="not understood"):
            java_scores.spice(["a dog"], [["x"]])


@pytest.mark.parametrize(("images", "picked"), [(1000, [0, 200, 400, 600, 800]), (3, [0, 1, 2]), (1, [0]), (0, [])])
def test_images_that_are_shown_are_spread_evenly(images, picked):
    assert shown(images) == picked


def test_a_task_shows_nothing_unless_it_writes():
    assert Task.examples(None, None, "test", {}) == [] and Task.notes(None, None) == []


def run(data, out):
    writing = dict(layers=2, width=32, image_tokens=4, max_tokens=6, new_tokens=2, stages=())
    options = dict(weights="random", image_size=32, batch_size=4, epochs=1, timing_pairs=0, threads=1, memory_runs=0)
    live = Live(Console(quiet=True))
    options |= dict(task="flickr8k_caption", backbone="timm:test_vit", captioning=writing, data=data, out=out)
    return effbench.run((), live=live, **options)


def test_a_run_records_answers_and_is_ranked_with_machines_without_java(tmp_path, monkeypatch):
    data = flickr8k(tmp_path / "data")
    without = run(data, tmp_path / "one")
    counts = np.array([[float(n) for n in STATISTICS[0].split()]] * 8)
    monkeypatch.setattr(caption_scores, "OPTIONAL", {"meteor": lambda *given: counts})
    record = run(data, tmp_path / "one")
    assert record.baseline().metrics["meteor"].value == pytest.approx(SEGMENTS[0])
    assert "meteor" not in without.baseline().metrics
    assert record.envelope.digest == without.envelope.digest
    assert any("meteor is left out: it needs Java" in note for note in without.notes) and not record.notes
    for arm in record.arms:
        assert [answer.image for answer in arm.answers] == [f"00{i}.jpg" for i in (30, 31, 33, 34, 36)]
        assert arm.answers[0].references[0].startswith("blue beside yellow") and len(arm.answers[0].references) == 2
    assert store.read(tmp_path / "one" / "records" / record.id) == record
    assert figures.metric_names(record, record.arms)[:4] == ["cider", "bleu4", "rouge_l", "meteor"]
    page = (tmp_path / "one" / "README.md").read_text()
    assert "What the arms write" in page and "| meteor" not in page  # scores of random weights say nothing


def writes(arm, text, question=""):
    return arm.model_copy(update=dict(answers=(Answer(image=EVIL, question=question, text=text, references=(EVIL,)),)))


def test_answers_are_shown_for_baseline_and_methods_as_plain_text():
    record = make_record(arms=(writes(make_arm(), "a dog"), writes(make_arm("other"), EVIL, EVIL)))
    arms = [writes(arm, "a dog" if arm.kind == "baseline" else "of a control") for arm in record.arms[:3]]
    record = record.model_copy(update=dict(arms=(*arms, *record.arms[3:])))
    page = leaderboard.render([record], [])
    part = page.partition("What the arms write")[2].partition("</details>")[0]
    assert (
        "**baseline**, **token\\_prune:keep=0.5**: a dog" in part
        or "**baseline**, **token_prune:keep=0.5**: a dog" in part
    )
    assert "of a control" not in part
    for bad in ("<script", "![i]", "a|b", "\u202e", "\x1b", "\n# big", "`rm`"):
        assert bad not in part
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    show.print_record(record, console)
    text = console.export_text()
    assert "What the baseline writes" in text and "a dog" in text
    assert "\u202e" not in text and "\x1b" not in text


def test_an_arm_that_wrote_nothing_is_said_to():
    record = make_record()
    record = record.model_copy(update=dict(arms=(writes(record.arms[0], ""), *record.arms[1:])))
    assert "**baseline**: (nothing)" in leaderboard.render([record], [])
    assert "What the arms write" not in leaderboard.render([make_record()], [])


def test_decimals_of_scores():
    value = make_arm().metrics["t2i_r1"].model_copy(update=dict(value=4.2345, unit="", ceiling=1000.0))
    assert figures.metric(value) == "4.2"
    loss = value.model_copy(update=dict(value=2.3456, unit="nats", ceiling=0.0, higher_is_better=False))
    assert figures.metric(loss) == "2.346"
