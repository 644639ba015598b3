"""`effbench recommend`: what is asked on the command line, handed to `effbench.recommend`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effbench.terminal import console, plain, say, say_error

if TYPE_CHECKING:
    from effbench.recommend import Answer, Candidate, Evidence
    from effbench.report.ratings import Ratings

#: whether a method beat a blind control at the same budget
SAID = {"BETTER": "yes", "WORSE": "no, it is worse", None: "not compared"}
SHOWN = 5  # stacks of a list that are printed


def recommend(
    max_lossiness: Annotated[str, typer.Option(metavar="SHARE", help="Loss of quality that you accept: 1% or 0.01.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: that of the runs.")] = None,
    task: Annotated[str, typer.Option(help="Only runs of this task.", show_default="any")] = "",
    backbone: Annotated[str, typer.Option(help="Only runs of this backbone.", show_default="any")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    ratings: Annotated[
        bool, typer.Option("--ratings", help="Print the ratings across tasks and backbones too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Name the stack of methods to use, with its evidence: the fastest that is shown to lose no more than you accept.

    Exits with 0 if one is shown to, 1 if none is (the nearest is named), 2 if there is no valid run, 3 if the question
    makes no sense.
    """
    from effbench import store
    from effbench.recommend import bound
    from effbench.recommend import recommend as answer_of

    limit = bound(max_lossiness)
    records, problems = store.read_all(out)
    for problem in problems:
        say_error(f"left out: {problem}")
    answer = answer_of(records, limit, device, task, backbone)
    rated = []
    if ratings:
        from effbench.report.ratings import Collected
        from effbench.report.standings import sections

        collected = Collected()
        for section in sections(records):
            collected.add(section)
        rated = collected.ratings()
    if as_json:
        print(json.dumps(_json(answer, rated if ratings else None), indent=1))
    else:
        _print(answer)
        for each in rated:
            _print_ratings(each)
    return 0 if answer.best else 1


def _print(answer: Answer) -> None:
    from effbench.report.markdown import clean, command

    best = answer.best
    if best is None:
        _print_none(answer)
    else:
        say(f"use {clean(best.spec, None)}")
        data = "drawn data, not real ones" if answer.synthetic else "real data"
        say(f"shown on {clean(answer.device)}, on {data}: {_figures(best)}; you accept {_percent(answer.bound)}")
        _listed("evidence", _evidence(best))
        _listed("what beats it", answer.better or ("nothing else that is shown to be within the bound",))
        _listed("what this cannot say", answer.cannot)
        _listed("next best within the bound", _lines(answer.shown[1:]))
    _listed("likely within it, but not shown to be", _lines(answer.likely))
    _listed("within it, but not shown to be faster", _lines(answer.slow))
    _listed("left out", _left_out(answer))
    if best is not None:
        again = command(best.slowest.record.provenance.command)
        say(f"again: {again}" if again else "again: its record holds no command of effbench")


def _print_none(answer: Answer) -> None:
    from effbench.report.markdown import clean

    envelopes = f"{answer.envelopes} envelope{'' if answer.envelopes == 1 else 's'} of "
    data = "drawn data" if answer.synthetic else "real data"
    device, bound = clean(answer.device), _percent(answer.bound)
    say(f"nothing to recommend: no method is shown to be faster on {device} and to lose at most {bound}")
    say(f"looked at: {envelopes}{data}")
    nearest = answer.nearest
    if nearest is not None:
        needs = _percent(nearest.needs, up=True)
        say(f"nearest: {clean(nearest.spec, None)}: {_figures(nearest)}; it needs a bound of {needs}")
        _listed("evidence", _evidence(nearest))


def _lines(candidates: tuple[Candidate, ...]) -> list[str]:
    from effbench.report.markdown import clean

    return [f"{clean(each.spec, None)}: {_figures(each)}" for each in candidates]


def _left_out(answer: Answer) -> list[str]:
    found = [
        f"{count} arm{'' if count == 1 else 's'}: {reason}"
        for reason, count in sorted(answer.left_out.items(), key=lambda item: -item[1])
    ]
    if answer.aside:
        found.append(
            f"{answer.aside} envelope{'' if answer.aside == 1 else 's'} of drawn data, since there are real ones"
        )
    return found


def _listed(title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    say(f"{title}:")
    for line in lines[:SHOWN]:
        say(f"  - {line}")
    if len(lines) > SHOWN:
        say(f"  - and {len(lines) - SHOWN} more (--json lists them)")


def _figures(candidate: Candidate) -> str:
    """The slowest speed-up and the largest lossy-ness of a stack's envelopes."""
    from effbench.report import figures

    slowest, lossiest = candidate.slowest, candidate.lossiest
    seeds = "" if candidate.sure else ", trained with too few seeds"
    count = len(candidate.evidence)
    worst = "" if count == 1 else f" (worst of {count} envelopes)"
    return f"{figures.ratio(slowest.arm.test_speedup)}, lossy-ness {_loss(lossiest)}{seeds}{worst}"


def _loss(evidence: Evidence) -> str:
    from effbench.report import figures

    return f"{100 * evidence.loss.value:+.1f} %{figures.bounds(evidence.loss, 100, 1, '+')}"


def _percent(share: float, up: bool = False) -> str:
    """`1 %`; with `up` rounded up to a tenth, so that it is enough."""
    import math

    value = math.ceil(1000 * share - 1e-9) / 10 if up else 100 * share
    return f"{value:.4g} %"


def _evidence(candidate: Candidate) -> list[str]:
    """A line per envelope."""
    from effbench.report import figures
    from effbench.report.markdown import clean
    from effbench.store import created

    lines = []
    for each in candidate.evidence:
        envelope = each.record.envelope
        where = f"{clean(envelope.task, 80)} ({clean(envelope.data, 80)}) on {clean(envelope.backbone, 80)}"
        beats = ", ".join(f"{control} {SAID.get(verdict, 'not shown')}" for control, verdict in each.against().items())
        lines.append(
            f"{each.record.id[:15]} of {created(each.record):%Y-%m-%d}, {where}: "
            f"{figures.ratio(each.arm.test_speedup)}, "
            f"lossy-ness of {clean(each.record.primary_metric, 80)} {_loss(each)}; beats at its budget: {beats}"
        )
    return lines


def _print_ratings(ratings: Ratings) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.report.markdown import clean
    from effbench.report.ratings import points, record

    data = "drawn data" if ratings.synthetic else "real data"
    count = len(ratings.clusters)
    say(f"ratings on {data}, {clean(ratings.device)}, over {count} combinations of task, data and backbone:")
    if not ratings.rated:
        say("  none: no method was compared in two of them")
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("arm", overflow="fold")
    for column in ("at equal latency", "won-tied-lost", "quality", "won-tied-lost"):
        table.add_column(column, justify="right", overflow="fold")
    for each in ratings.rated:
        name = clean(each.spec) or "dense baseline"
        cells = [cell for rating in (each.latency, each.quality) for cell in (points(rating), record(rating))]
        table.add_row(Text(plain(f"control · {name}" if each.control else name)), *map(Text, cells))
    console().print(table)


def _json(answer: Answer, rated: list[Ratings] | None) -> dict[str, Any]:
    from dataclasses import asdict

    from effbench.report.markdown import command

    found = dict(
        verdict="USE" if answer.best else "NONE",
        bound=answer.bound,
        device=answer.device,
        synthetic=answer.synthetic,
        use=answer.best and answer.best.spec,
        command=command(answer.best.slowest.record.provenance.command) if answer.best else None,
        shown=[_row(each) for each in answer.shown],
        likely=[_row(each) for each in answer.likely],
        not_faster=[_row(each) for each in answer.slow],
        nearest=_row(answer.nearest) if answer.nearest else None,
        better=list(answer.better),
        not_said=list(answer.cannot),
        left_out=answer.left_out | ({"drawn data": answer.aside} if answer.aside else {}),
    )
    if rated is not None:
        found["ratings"] = [_finite(asdict(each)) for each in rated]
    return found


def _row(candidate: Candidate) -> dict[str, Any]:
    from effbench.store import created

    def three(figure: Any) -> list[float]:
        return [figure.low, figure.value, figure.high]

    return dict(
        spec=candidate.spec,
        needs=candidate.needs,
        evidence=[
            dict(
                run=each.record.id,
                created=created(each.record).isoformat(),
                envelope=each.digest,
                task=each.record.envelope.task,
                data=each.record.envelope.data,
                backbone=each.record.envelope.backbone,
                metric=each.record.primary_metric,
                speedup=three(each.arm.test_speedup),
                verdict=each.arm.test_speedup.verdict,
                lossiness=three(each.loss),
                against=each.against(),
            )
            for each in candidate.evidence
        ],
    )


def _finite(value: Any) -> Any:
    """The same with None for infinite ends, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value
