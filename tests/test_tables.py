"""What the leaderboard and the terminal say of a record beyond its ranking."""

import re
from datetime import UTC, datetime

import pytest
from rich.console import Console
from test_store import make_record

from effbench import records
from effbench.records import (
    Calibration,
    Decoding,
    Economics,
    Energy,
    Flops,
    Interval,
    Kernels,
    Memory,
    Speedup,
    Structure,
    TimeSplit,
    Timing,
)
from effbench.report import figures, leaderboard, show, training_costs

PLAIN, FUSED = Kernels(attention={"library fast path": 12}, threads=2), Kernels(attention={"sdpa:flash": 12}, threads=2)


def ratio(value, verdict="FASTER", n=30):
    return Speedup(value=value, low=value - 0.1, high=value + 0.1, n=n, verdict=verdict)


def whole():
    """A record in which every figure is there."""
    time = TimeSplit(total=4.0, compute=3.6, data_wait=0.4, image=3.0, text=0.3, head=0.3, first_step=0.9, steps=10)
    step = dict(weights=2**20, load_peak=2 * 2**20, run_peak=9 * 2**20, tensor_peak=7 * 2**20, activations=3 * 2**20)
    baseline = records.Arm(
        name="baseline",
        spec="",
        kind="baseline",
        step_time=time,
        train_time=time,
        memory=Memory(**step),
        train_memory=Memory(**step, gradients=5 * 2**20, optimiser=11 * 2**20),
        kernels=PLAIN,
        structure=Structure(dtypes={"fp32": 2**20}, trained_layers=("text_encoder",)),
        test_flops=Flops(dense=4_000_000_000, useful=4_000_000_000, analytic=4_000_000_000),
        by_batch=(Timing(batch=1, seconds=0.02), Timing(batch=16, seconds=0.32)),
        tokens=(197, 197),
    )
    identity = baseline.model_copy(
        update=dict(name="identity", kind="control", control="identity", kernels=FUSED, test_speedup=ratio(1.10))
    )
    method = records.Arm(
        name="prune",
        spec="prune",
        kind="method",
        test_speedup=ratio(1.43),
        end_to_end_speedup=ratio(1.31),
        method_speedup=ratio(1.30),
        ceiling=5.0,
        promised=1.60,
        realised=1.43 / 1.60,
        pays_from=16,
        step_time=time.model_copy(update=dict(overhead=0.2)),
        kernels=FUSED,
        structure=Structure(dtypes={"fp32": 2**20, "int8": 2**20}, quantised_share=0.5, masked_tokens=True),
        test_flops=Flops(dense=2_000_000_000, useful=1_000_000_000, low_bit=64_000_000_000, analytic=3_000_000_000),
        energy=Energy(joules_per_step=1.25, source="RAPL"),
        by_batch=(
            Timing(batch=1, seconds=0.03, speedup=ratio(0.7, "SLOWER")),
            Timing(batch=16, seconds=0.22, speedup=ratio(1.43)),
        ),
        agreement={
            "t2i_top1": Interval(value=0.875, low=0.8, high=0.9, n=10),
            "image_cosine": Interval(value=0.99874, low=0.99712, high=0.99931, n=10),
        },
        disk_bytes=3 * 2**20,
        tokens=(197, 197),
    )
    calibration = Calibration(
        created=datetime(2025, 1, 2, tzinfo=UTC),
        device_model="some CPU",
        threads=2,
        backbone="timm:tiny",
        batch=1,
        pairs=30,
        margin=0.03,
        trials=300,
        noise_floor=0.021,
        coverage=0.957,
        half_width=0.02,
        verdicts={"NO DIFFERENCE": 299, "FASTER": 1},
    )
    return make_record(arms=(baseline, identity, method), calibration=calibration, energy="RAPL package")


@pytest.mark.parametrize(
    "said",
    [
        "| 1.43x [1.33, 1.53] | FASTER | 1.60x | 89 % [83, 96] |",  # realised = measured / promised
        "attention library fast path vs sdpa:flash | 1.10x [1.00, 1.20] | 1.30x [1.20, 1.40]",  # kernel x method
        "1.31x [1.21, 1.41]",  # end to end
        "5.00x",  # Amdahl
        "| 20.0 | 50.0 |",  # latency in ms, images a second
        "0.70x [0.60, 0.80]",
        "| 360 | 300 | 30.0 | — | 30.0 | 40.0 |",  # the step: image, text, overhead, head; wait
        "| 360 | 300 | 30.0 | 20.0 |",
        "197, masked, not removed",
        "2.00 ≠",  # the two counts differ
        "fp32 1.00, int8 1.00 | 3.00 | 50.0 % |",  # dtypes, disk, quantised
        "| agrees in t2i_top1 | image cosine |",
        "87.5 % [80.0, 90.0] | 0.9987 [0.9971, 0.9993]",
        "energy from RAPL package",
        "300 A/A trials of 30 pairs (timm:tiny, batch 1): 95 % within 2.1 %, 95.7 % of intervals hold 1; 1 false",
        "timed 30 pairs, intervals within +-9.1 %",
        "| 5.00 | 11.0 | 3.00 | 7.00 | 9.00 |",  # memory of a training step
        "1.25",  # joules
    ],
)
def test_every_figure_is_on_the_page(said):
    assert said in leaderboard.render([whole()], [])


def test_the_terminal_takes_a_speed_up_apart():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    show.print_record(whole(), console)
    text = console.export_text()
    for said in (
        "1.43x [1.33, 1.53] = kernel effect 1.10x x method effect 1.30x",
        "1.60x",
        "89 %",
        "300 A/A trials",
        "energy from RAPL",
    ):
        assert said in text


def test_a_prefix_that_is_not_known_is_a_dash():
    """As in records that were written before it was measured."""
    record = whole()
    found = tuple(arm.model_copy(update=dict(decoding=(Decoding(batch=2, tokens=20),))) for arm in record.arms)
    assert "None" not in printed(record.model_copy(update=dict(arms=found)), 160)


def test_a_record_without_the_new_figures_is_shown_as_before():
    text = leaderboard.render([make_record()], [])
    folded = ["Cost: every figure", "Quality: every metric", "Where the speed-up comes from", "How to read it"]
    assert re.findall("<summary>(.*)</summary>", text) == folded
    assert "1.50x [1.40, 1.60]" in text and "not calibrated" in text


def test_too_few_samples_say_how_many():
    assert figures.verdict(Speedup(value=1.2, n=4, verdict="TOO FEW SAMPLES")) == "TOO FEW SAMPLES (n = 4)"


@pytest.mark.parametrize("tokens, text", [((197, 197, 100), "197 x2, 100 x1"), ((), figures.NONE)])
def test_tokens_by_layer(tokens, text):
    assert figures.by_layer(tokens) == text


@pytest.mark.parametrize("equivalent, text", [(True, "within 1 %"), (False, "not shown"), (None, figures.NONE)])
def test_no_loss_is_claimed_only_where_it_was_shown(equivalent, text):
    value = records.MetricValue(value=1.0, higher_is_better=True, margin=0.01, equivalent=equivalent)
    assert figures.no_loss(value) == text


def paying(*verdicts, pays_from=None):
    timings = tuple(Timing(batch=2**i, seconds=1, speedup=ratio(1.2, verdict)) for i, verdict in enumerate(verdicts))
    return records.Arm(name="a", spec="a", kind="method", by_batch=timings, pays_from=pays_from)


@pytest.mark.parametrize(
    "arm, text",
    [
        (paying("FASTER", "AMBIGUOUS", "FASTER", pays_from=4), "4 (undecided: 2)"),
        (paying("SLOWER", "FASTER", pays_from=2), "2"),
        (paying("SLOWER", "NO DIFFERENCE"), "none of these"),
        (paying("SLOWER", "TOO FEW SAMPLES"), "undecided (2)"),
        (paying(), figures.NONE),
    ],
)
def test_from_which_batch_a_method_pays(arm, text):
    assert figures.pays(arm) == text


def test_an_unsteady_latency_says_so():
    assert figures.milliseconds(Timing(batch=1, seconds=0.0100, low=0.0099, high=0.0101)) == "10.0"
    assert (
        figures.milliseconds(Timing(batch=1, seconds=0.0100, low=0.009, high=0.08)) == "10.0 (unsteady: 9.00 to 80.0)"
    )


def test_nothing_is_realised_of_no_promise():
    arm = records.Arm(name="a", spec="a", kind="method", promised=1.0, realised=1.03, test_speedup=ratio(1.03))
    assert figures.realised(arm) == figures.NONE


def test_near_one_the_third_digit_counts():
    assert figures.ratio(Speedup(value=0.987, low=0.969, high=1.004, verdict="AMBIGUOUS")) == "0.987x [0.969, 1.004]"


def test_cosines_only_of_the_baselines_own_weights():
    arm = whole().arms[2]
    trained = (dict(phase="both"), dict(train_time=TimeSplit(total=1.0)))
    assert figures.agreement(arm, "image_cosine") == "0.9987 [0.9971, 0.9993]"
    for changes in trained:
        assert figures.agreement(arm.model_copy(update=changes), "image_cosine") == figures.NONE
        assert figures.agreement(arm.model_copy(update=changes), "t2i_top1") == "87.5 % [80.0, 90.0]"


@pytest.mark.parametrize("share, text", [(1.0, "100 %"), (0.9996, "99.9 %"), (0.4966, "49.7 %")])
def test_all_is_quantised_only_where_all_is(share, text):
    assert figures.quantised(share) == text


def trained(**changes):
    """A record whose method trains of its own, beside a control that does."""
    base = Economics(
        share=0.95,
        target=45.6,
        best_dev=48.0,
        seeds=2,
        reached=2,
        seconds_to_target=30.0,
        flops_to_target=3e12,
        tuning_seconds=60.0,
        tuning_flops=6e12,
    )
    fields = dict(seconds_to_target=20.0, flops_to_target=1.5e12, tuning_seconds=41.0, tuning_flops=3e12)
    own = base.model_copy(update=fields | dict(best_dev=47.0, saved_per_query=0.0085, break_even=4823.5) | changes)
    baseline, identity, method = whole().arms
    time = TimeSplit(total=60.0, compute=60.0, settle=2.5, head=10.0, first_step=1.0, steps=10)
    arms = [baseline.model_copy(update=dict(economics=base)), identity.model_copy(update=dict(economics=base))]
    arms.append(method.model_copy(update=dict(economics=own, phase="both", train_time=time)))
    return make_record(arms=tuple(arms))


def test_what_training_costs_stands_in_a_table_of_its_own():
    text = leaderboard.render([trained()], [])
    head = "| arm | best dev t2i_r10 | target (95 % of the baseline's best) | s to target | speed-up to target |"
    assert f"{head} TFLOPs to target | tuning s | tuning TFLOPs | saved per query ms | break-even queries |" in text
    assert "| prune | 47.0 | 45.6 | 20.0 | 1.50x | 1.50 | 41.0 | 3.00 | +8.50 | 4,820 |" in text
    assert "| **baseline** | 48.0 | 45.6 | 30.0 | — | 3.00 | 60.0 | 6.00 | — | — |" in text
    part = text[text.index("Where training time goes") :]
    assert "| of it choosing layers |" in part and "| 2.50 |" in part


def test_costs_that_are_not_there_say_why():
    missing = dict(seconds_to_target=None, flops_to_target=None, break_even=None, saved_per_query=-0.001)
    text = leaderboard.render([trained(**missing, reached=1, note="the test speed-up is SLOWER <b>|")], [])
    row = "| prune | 47.0 | 45.6 | 1 of 2 seeds | — | — | 41.0 | 3.00 | -1.00 | the test speed-up is SLOWER"
    assert f"{row} &lt;b&gt;\\| |" in text
    assert "not reached" in leaderboard.render([trained(**missing, reached=0)], [])


def test_where_only_the_baseline_trains_there_is_no_such_table():
    record = trained()
    record = record.model_copy(update=dict(arms=(*record.arms[:2], whole().arms[2])))
    assert "What training costs, and when" not in leaderboard.render([record], [])
    assert "break-even" not in printed(record)


def printed(record, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    show.print_record(record, console)
    return console.export_text()


def test_the_terminal_shows_what_training_costs():
    text = printed(trained())
    assert "Training (target: dev t2i_r10 45.6, 95 % of the baseline's best)" in text
    line = next(line for line in text.splitlines() if "4,820" in line)
    assert line.split() == ["prune", "47.0", "20.0", "1.50x", "1.50", "41.0", "3.00", "+8.50", "4,820"]
    assert max(map(len, text.splitlines())) <= 100
    text = printed(trained(break_even=None, note="no break-even: \x1b[31mSLOWER [red]x[/red]"))
    assert "prune: no break-even: [31mSLOWER [red]x[/red]" in text and "\x1b" not in text


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (4823.5, "4,820"), (999_999.0, "1 million"), (1.2345e9, "1.23 billion"), (1e300, "1e+300")],
)
def test_queries_are_readable(value, text):
    assert training_costs.queries(trained(break_even=value).arms[-1].economics) == text


def test_an_old_record_has_no_economics_and_is_shown():
    old = trained().model_dump(mode="json")
    for arm in old["arms"]:
        for field in ("economics", "dev", "disk_bytes"):
            del arm[field]
        arm["train_flops"] = dict(dense=7, useful=7)
    record = records.Record.model_validate(old)
    assert record.arms[-1].economics is None and record.arms[-1].dev == {} and record.arms[-1].train_flops.once == 0
    text = leaderboard.render([record], [])
    assert "What training costs, and when" not in text and "disk MiB |" not in text and "| prune |" in text
    assert "prune" in printed(record)
