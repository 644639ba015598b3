"""How an arm writes: from timed steps to time per token, and what the leaderboard and the terminal say of it."""

import pytest
from rich.console import Console
from test_store import make_record
from torch import nn

from effbench import decode_figures, records, speeds
from effbench.examine import eases
from effbench.measure.clock import Clock
from effbench.measure.split import Split
from effbench.records import Decoding, Speedup, TimeSplit
from effbench.report import leaderboard, show

KNOWN = Decoding(batch=4, tokens=21, prefix=50, cache_bytes=2**20, first_token_flops=6, prefill_flops=4, decode_flops=9)


def rows(first=(0.3, 0.2), further=(0.8, 0.2), batch=4, pairs=20):
    """Steps of the baseline and of a method: seconds up to the second token and of all further ones."""
    found = []
    for index in range(speeds.WARMUP + pairs):
        slow = 100 if index < speeds.WARMUP else 1 + index % 3 / 100
        for arm, start, rest in zip(("baseline", "fast"), first, further, strict=True):
            step = dict(
                kind="step", arm=arm, seed=0, phase=f"timing {batch}", index=index, seconds=slow * (start + rest)
            )
            found.append(step | dict(decode_seconds=slow * rest, image_seconds=slow * start / 2))
    return speeds.complete(found)


def test_first_token_and_further_ones_make_up_the_step():
    (base,) = decode_figures.timed((KNOWN,), rows(), "baseline")
    step = speeds.middle(speeds.timed(rows(), "baseline", 4))["seconds"].mean()
    assert base.first_token + (KNOWN.tokens - 1) * base.per_token == pytest.approx(step)
    assert base.per_token == pytest.approx(0.8 / 20 * 1.01, rel=0.01)  # without the warm-up
    assert base.tokens_per_second == pytest.approx(4 / base.per_token)
    assert base.first_token_speedup is None and base.cache_bytes == 2**20


def test_speed_ups_are_paired_and_apart():
    (fast,) = decode_figures.timed((KNOWN,), rows(), "fast")
    assert (fast.first_token_speedup.value, fast.per_token_speedup.value) == (pytest.approx(1.5), pytest.approx(4))
    assert fast.per_token_speedup.verdict == "FASTER" and fast.per_token_speedup.low == pytest.approx(4)


def test_what_was_not_timed_or_has_one_token_has_no_time_of_further_ones():
    (other,) = decode_figures.timed((KNOWN.model_copy(update=dict(batch=2)),), rows(), "fast")
    assert other.first_token is None and other.tokens_per_second is None
    (one,) = decode_figures.timed((KNOWN.model_copy(update=dict(tokens=1)),), rows(further=(0, 0)), "fast")
    assert one.first_token_speedup.value == pytest.approx(1.5) and one.per_token is one.per_token_speedup is None


class Step(nn.Module):
    def __init__(self, now, part, rest):
        super().__init__()
        self.now, self.part, self.rest = now, part, rest

    def forward(self, seconds):
        self.now[0] += seconds


def test_choosing_a_token_counts_to_what_was_before_it():
    now = [0.0]
    language = Step(now, "prefill", "head")
    split = Split({"decoder": language}, language, Clock("cpu", timer=lambda: now[0]))
    with split:
        now[0] += 1  # the prefix is put together
        language(8)
        now[0] += 2  # the first token is chosen
        language.part = language.rest = "decode"
        for _ in range(3):
            language(4)
            now[0] += 16  # a further one is chosen
    found = split.seconds(now[0])
    assert found["prefill"] == 8 and found["head"] == 2
    assert found["decode"] == 3 * 20 + 1  # and what is before the first mark, a dict's copy in a real step
    assert sum(found.values()) == now[0]


def test_a_part_that_does_more_is_no_part_that_a_method_eases():
    cheaper, dearer, other = (9, {"Linear": 2}), (11, {"Linear": 2}), (10, {"Linear": 3})
    assert [eases(now, (10, {"Linear": 2})) for now in (cheaper, dearer, other)] == [True, False, True]
    assert eases(9, 10) and not eases(11, 10)


def written():
    """A record of a task that writes, at two batch sizes."""
    time = TimeSplit(total=4, compute=4, image=1, connector=0.1, prefill=0.4, decode=2, head=0.5, steps=10)
    known = dict(tokens=20, prefix=50, first_token_flops=600_000_000, prefill_flops=55_000_000, decode_flops=22_000_000)
    base = [Decoding(batch=n, first_token=0.02 * n, per_token=0.001, cache_bytes=n * 2**19, **known) for n in (1, 16)]
    ratio = Speedup(value=1.5, low=1.4, high=1.6, n=30, verdict="FASTER")
    faster = dict(first_token_speedup=ratio, per_token_speedup=ratio.model_copy(update=dict(value=1.25)))
    baseline = records.Arm(name="baseline", spec="", kind="baseline", step_time=time, decoding=tuple(base))
    method = baseline.model_copy(
        update=dict(
            name="shorter",
            spec="shorter",
            kind="method",
            test_speedup=ratio,
            decoding=tuple(each.model_copy(update=faster) for each in base),
        )
    )
    record = make_record()
    options = records.Captioning(beams=3)
    protocol = record.envelope.protocol.model_copy(update=dict(captioning=options, timing_batch=16))
    envelope = record.envelope.model_copy(update=dict(protocol=protocol))
    return record.model_copy(update=dict(arms=(baseline, method), envelope=envelope))


def test_the_leaderboard_shows_a_line_per_batch_and_arm():
    page = leaderboard.render([written()], [])
    part = page.partition("<summary>Writing 20 tokens by a search of 3 beams</summary>")[2]
    table = part.split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [line[:2] for line in cells[2:]] == [
        ["**baseline**", "1"],
        ["shorter", "1"],
        ["**baseline**", "16"],
        ["shorter", "16"],
    ]
    last = dict(zip(cells[0], cells[-1], strict=True))
    assert last["first token ms"] == "320" and last["ms per further token"] == "1.00"
    assert last["first token speed-up"].startswith("1.50x") and last["further tokens speed-up"].startswith("1.25x")
    assert last["further tokens/s"] == "16000" and last["KV cache MiB"] == "8.00"
    assert (last["GFLOPs to first token"], last["of it prefill"], last["GFLOPs of further tokens"]) == (
        "0.600",
        "0.0550",
        "0.0220",
    )
    step = page.partition("Where a test step's time goes")[2].split("\n\n")[1].splitlines()[0]
    assert "connector ms | prefill ms | decode ms" in step and "text tower" not in step
    assert "3 beams" in page and "cosine head" not in page


def test_the_terminal_shows_the_main_batch_in_100_columns():
    console = Console(width=100, record=True)
    show.print_record(written(), console)
    text = console.export_text()
    assert "Writing 20 tokens of each of 16 texts" in text and "prefill" in text and "1.25x" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_record_without_writing_loads_and_shows_none():
    record = make_record()
    old = record.model_dump(mode="json")
    for arm in old["arms"]:
        del arm["decoding"]
    assert records.Record.model_validate(old).arms[0].decoding == ()
    assert "<summary>Writing" not in leaderboard.render([record], [])
