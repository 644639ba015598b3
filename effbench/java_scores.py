"""METEOR and SPICE of captions: Java programs that pycocoevalcap ships or fetches, run where they can be.

A program is started for one set of captions, gets everything at once, has a time limit, and ends. EFFBENCH_JAVA names
another java than the one on the PATH; empty it asks for none, and METEOR and SPICE are left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
COUNTS = 23  # that METEOR gives for one caption
#: of METEOR 1.5 for English: alpha, beta, gamma, delta; weights of exact, stem, synonym and paraphrase matches
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


class Unavailable(Exception):
    """A score cannot be computed on this machine, or was not; the message says why."""


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts (captions, COUNTS) of METEOR 1.5 (Denkowski and Lavie 2014); `meteor_score` makes scores of them.

    Args:
        texts: words with single spaces; references: the same, of each text one or more.

    Raises:
        Unavailable: no Java, or the program failed or took too long.
    """
    lines = [" ||| ".join(["SCORE", *each, text]) for text, each in zip(texts, references, strict=True)]
    options = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    out = _java(options, _folder("meteor"), 120 + 0.2 * len(texts), "".join(f"{line}\n" for line in lines))
    try:
        counts = np.array([[float(count) for count in line.split()] for line in out.splitlines()])
    except ValueError:
        counts = np.empty(0)
    if counts.shape != (len(texts), COUNTS) or not np.isfinite(counts).all():
        raise Unavailable("METEOR's answer is not understood")
    test, reference, chunks, matched, of_reference = counts[:, [0, 1, 20, 21, 22]].T
    counts[(chunks == 1) & (matched == test) & (of_reference == reference), 20] = 0  # no penalty where all matches
    return counts


def meteor_score(counts: np.ndarray) -> np.ndarray:
    """METEOR in per cent of counts (..., COUNTS), of one caption or the sum or mean of several: (...).

    In order: words, function words and their counterparts in the reference; then for each kind of match its content
    and function words on both sides; then chunks and matched words on both sides.
    """
    kinds = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 4)
    sides = []
    for side in (0, 1):  # precision in the caption, recall in the reference
        found = ((DELTA * kinds[..., side] + (1 - DELTA) * kinds[..., side + 2]) * WEIGHTS).sum(axis=-1)
        function = counts[..., 2 + side]
        there = DELTA * (counts[..., side] - function) + (1 - DELTA) * function
        sides.append(found / np.where(there > 0, there, 1))
    precision, recall = sides
    bottom = ALPHA * precision + (1 - ALPHA) * recall
    mean = precision * recall / np.where(bottom > 0, bottom, 1)
    matched = (counts[..., 21] + counts[..., 22]) / 2
    fragments = counts[..., 20] / np.where(matched > 0, matched, 1)
    return 100 * mean * (1 - GAMMA * fragments**BETA)


def spice(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """SPICE (Anderson and others 2016, arXiv:1607.08822) in per cent, (captions,); 0 of an empty caption.

    Raises:
        Unavailable: no Java, no Stanford CoreNLP, or the program failed or took too long.
    """
    folder = _folder("spice")
    if any(not (folder / "lib" / jar).exists() for jar in CORENLP):
        raise Unavailable("it needs Stanford CoreNLP 3.6.0, which pycocoevalcap's spice/get_stanford_models.py gets")
    given = [
        dict(image_id=i, test=text, refs=list(each))
        for i, (text, each) in enumerate(zip(texts, references, strict=True))
        if text
    ]
    found = np.zeros(len(texts))
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        source.write_text(json.dumps(given))
        options = ["-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-subset", "-silent"]
        _java(options, folder, 600 + 2 * len(texts))
        try:
            for each in json.loads(target.read_text()):
                found[each["image_id"]] = 100 * float(each["scores"]["All"]["f"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Unavailable("SPICE's answer is not understood") from error
    if not np.isfinite(found).all():
        raise Unavailable("SPICE gave a score that is no number")
    return found


def _folder(part: str) -> Path:
    """The folder of a part of pycocoevalcap, which its programs run in."""
    return Path(importlib.util.find_spec(f"pycocoevalcap.{part}.{part}").origin).parent


def _java(options: list[str], folder: Path, seconds: float, text: str = "") -> str:
    java = shutil.which(os.environ.get("EFFBENCH_JAVA", "java"))
    if java is None:
        raise Unavailable("it needs Java, which was not found")
    try:
        done = subprocess.run(
            [java, *options], cwd=folder, input=text.encode(), capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"java did not end within {seconds:.0f} s") from error
    except OSError as error:
        raise Unavailable(f"java did not start: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"java failed: {said[0][:300]}")
    return done.stdout.decode(errors="replace")
