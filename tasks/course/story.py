"""What the course report said beside what was measured: rows of text, for the terminal and for Markdown."""

from __future__ import annotations

from statistics import mean

from effbench.records import Arm, Record
from effbench.report import figures
from effbench_tasks.course.evidence import Evidence

#: the report's own figures, baseline and pruned: quoted, nothing here was measured
REPORTED = dict(
    train_seconds=(714.00, 54.70),
    test_seconds=(112.41, 2.97),
    flops=(83_494_912, 78_807_104),
    losses=((0.1666, 0.0013, 0.0011), (0.5258, 0.5167, 0.5275)),
    test_loss=(0.0007, 0.5050),
    lossiness=-704.2842,
    warm_epochs=((18.24, 17.83), (18.00, 18.18, 18.53)),  # without the baseline's first, on a cold cache
)
HEADER = ("", "report: baseline", "report: pruned", "here: baseline", "here: pruned")
REMAKE = ("arm", "tokens", "GFLOPs", "test speed-up", "verdict", "train speed-up", "text to image R@10", "lossy-ness")


def comparison(record: Record, found: dict[str, Evidence], patches: tuple[int, int]) -> list[tuple[str, ...]]:
    """Rows under HEADER.

    Args:
        record: of the report's own experiment.
        found: evidence by kind of arm: "baseline", "method", and the control that drops no token, "all_tokens".
        patches: tokens that are a real patch, and all tokens.
    """
    arms = (record.baseline(), next(arm for arm in record.arms if arm.kind == "method"))
    undropped = record.control("all_tokens")
    evidence = (found["baseline"], found["method"])
    train, test = REPORTED["train_seconds"], REPORTED["test_seconds"]
    none = ("", "")
    dropped = _flops(found["all_tokens"]) - _flops(found["method"])
    warm = [mean(epochs) for epochs in REPORTED["warm_epochs"]]
    loss = record.primary_metric
    return [
        ("train time", *(f"{s:.2f} s" for s in train), *(_seconds(arm.train_time) for arm in arms)),
        ("speed-up, training", "", f"{train[0] / train[1]:.2f}x", "", _speed(arms[1].train_speedup)),
        ("the same, if no token is dropped", *none, "", _speed(undropped.train_speedup)),
        ("the same, from the report's warm epochs", "", f"{warm[0] / warm[1]:.2f}x", *none),
        ("test time", *(f"{s:.2f} s" for s in test), *(_seconds(arm.test_time) for arm in arms)),
        ("speed-up, testing", "", f"{test[0] / test[1]:.2f}x", "", _speed(arms[1].test_speedup)),
        ("the same, if no token is dropped", *none, "", _speed(undropped.test_speedup)),
        ("FLOPs, the report's counting", *(f"{n:,}" for n in REPORTED["flops"]), *(f"{e.own:,}" for e in evidence)),
        ("FLOPs, counted right", *none, *(f"{_flops(e):,}" for e in evidence)),
        ("of these saved by dropping tokens", *none, "", f"{dropped:,}"),
        ("train loss per epoch", *(_losses(each) for each in REPORTED["losses"]), *(_losses(_own(a)) for a in arms)),
        ("test loss", *(f"{each:.4f}" for each in REPORTED["test_loss"]), *(_metric(arm, loss) for arm in arms)),
        ("test loss of the best constant", *none, *(f"{arm.metrics[loss].chance:.4f}" for arm in arms)),
        ("lossy-ness", "", f"{REPORTED['lossiness']}", "", _lossiness(arms[1], loss)),
        ("largest gradient of the output", *none, *(f"{e.gradient:.3g}" for e in evidence)),
        ("largest gradient of the loss", *none, *(f"{e.of_loss:.1e}" for e in evidence)),
        ("the same in double precision", *none, *(f"{e.of_loss_double:.1e}" for e in evidence)),
        ("outputs that change with the weights", *none, *(f"{100 * e.changed:.1f} %" for e in evidence)),
        ("tokens that are a patch of the image", *none, *(f"{patches[0]} of {patches[1]}" for _ in arms)),
    ]


def remake(record: Record) -> list[tuple[str, ...]]:
    """Rows under REMAKE, the controls last."""
    arms = sorted(record.arms, key=lambda arm: figures.KINDS.index(arm.kind))
    primary = record.primary_metric
    return [
        (
            figures.label(arm) if arm.status == "ok" else f"{figures.label(arm)} {arm.status}",
            figures.tokens(arm),
            figures.gflops(arm.test_flops),
            figures.ratio(arm.test_speedup),
            arm.test_speedup.verdict if arm.test_speedup else figures.NONE,
            figures.ratio(arm.train_speedup),
            figures.metric(arm.metrics.get(primary), interval=True),
            _lossiness(arm, primary),
        )
        for arm in arms
    ]


def _own(arm: Arm) -> tuple[float, ...]:
    return next(iter(arm.losses.values()), ())


def _losses(losses: tuple[float, ...]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


def _seconds(time) -> str:
    return f"{time.total:.2f} s" if time else figures.NONE


def _speed(figure) -> str:
    return f"{figures.ratio(figure)} {figure.verdict}" if figure else figures.NONE


def _flops(evidence: Evidence) -> int:
    return evidence.right.dense_flops + evidence.right.overhead_flops


def _lossiness(arm: Arm, name: str) -> str:
    value = arm.metrics.get(name)
    refused = value is not None and value.lossiness is None and arm.kind != "baseline"
    return value.note.split(";")[0] if refused else figures.lossiness(value)


def _metric(arm: Arm, name: str) -> str:
    value = arm.metrics[name]
    return f"{value.value:.4f}{figures.bounds(value, digits=4)}"
