"""A course report's 13x, taken apart on real Flickr8k, and its fair remake (docs/course-report.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.preset import Preset

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.records import Record

METHOD = "course_pruning"
PAIRS = 300  # of the report's steps, which take some milliseconds
#: half of the tokens leave within the fourth block, before most of the work; the report's left after all of it
STACKS = ("token_prune:keep=0.5,at=3,score=learned", "token_prune:keep=0.5,at=3")


class CourseReport(Preset):
    """A course report's 13x from token pruning, taken apart on real Flickr8k, and its fair remake."""

    options = (*Preset.options, "backbone", "weights", "pretrained", "checkpoint_every")

    def run(self, console: Console, **options: Any) -> list[Record]:
        import effbench
        from effbench_tasks.course.backbone import SIZE
        from effbench_tasks.course_report import SHARE

        options = dict(data="real", out=Path("leaderboard")) | options
        shared = {key: value for key, value in options.items() if key not in ("backbone", "weights", "pretrained")}
        own = effbench.run([METHOD], "course_report", backbone="course:patches", timing_pairs=PAIRS, **shared)
        fair = effbench.run(STACKS, "flickr8k", image_size=SIZE, data_share=SHARE, **options)
        if own is None or fair is None:  # a dry run
            return []
        self._tell(own, fair, options["data"], Path(options["out"]), console)
        return [own, fair]

    def _tell(self, own: Record, fair: Record, data: str, out: Path, console: Console) -> None:
        """Print the report's figures beside those measured, then the remake; keep both tables as Markdown."""
        from effbench.datasets import resolve
        from effbench.report import markdown
        from effbench.report.show import print_record
        from effbench_tasks.course import story
        from effbench_tasks.course.backbone import CoursePatches
        from effbench_tasks.course.evidence import examine, real_patches

        found = resolve("course_report", data)
        protocol = own.envelope.protocol
        backbone = CoursePatches("patches", image_size=protocol.image_size)
        prepared = found.task.prepare(found.data, backbone, protocol, lambda *_: None)
        specs = {arm.control or arm.kind: arm.spec for arm in own.arms if not arm.control or arm.spec}
        evidence = {kind: examine(spec, found.task, prepared, backbone, protocol) for kind, spec in specs.items()}
        rows = story.comparison(own, evidence, real_patches(protocol.image_size))
        remade = story.remake(fair)
        print_record(own, console)
        _print(console, "The course report and what was measured here", story.HEADER, rows)
        print_record(fair, console)
        text = [f"Runs {own.id} and {fair.id}, {own.envelope.device_model}."]
        for header, table in ((story.HEADER, rows), (story.REMAKE, remade)):
            text.append(markdown.table(header, ([markdown.escape(cell) for cell in row] for row in table)))
        file = out / "course-report.md"
        file.write_text("\n\n".join(text) + "\n", encoding="utf-8")
        console.print(f"\ntables: {file}", markup=False, highlight=False, soft_wrap=True)


def _print(console: Console, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in header:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
