"""Live progress of a run on stderr: a bar and a table of the arms in a terminal, plain lines elsewhere.

Nothing is drawn behind the caller's back (there is no refresh thread), so nothing is drawn while a step is timed:
the screen changes only inside `advance` and the other calls, at most four times a second.
"""

from __future__ import annotations

import textwrap
import time
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from effbench.report.markdown import clean

REFRESH_S = 0.25
PLAIN_S = 10.0
MOST = 12  # arms that are told of; the others only where they failed
PLAIN_WIDTH = 96  # of a banner outside a terminal
#: share of the time that drawing may take; a slow terminal is refreshed less often
MAX_SHARE = 0.01
Arms = dict[str, dict[str, float | str]]


class Live:
    """Progress of one run, as a context manager. The last state of a stage stays visible when the next one begins.

    Args:
        console: where to write; stderr where None, so that stdout holds results alone. `Console(quiet=True)` is silent.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.interactive = self.console.is_interactive and not self.console.quiet
        self._screen: Screen | None = None
        self._description = ""
        self._unit = "steps"
        self._done = self._total = self._start = 0
        self._arms: Arms = {}
        self._began = self._next = 0.0
        self._running = False

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def banner(self, title: str, lines: list[str]) -> None:
        """Something that cannot be missed: a panel in a terminal, a framed block elsewhere."""
        title, lines = clean(title, None), [clean(line, None) for line in lines]
        if self.interactive:
            body = Text("\n".join(lines))
            self.console.print(
                Panel(body, title=Text(title, "bold"), border_style="yellow", box=box.HEAVY, padding=(1, 2))
            )
            return
        lines = [part for line in lines for part in textwrap.wrap(line, PLAIN_WIDTH, break_long_words=False)]
        width = max(len(_ascii(line)) for line in (title, *lines))
        framed = [f"# {_ascii(line):{width}} #" for line in (title, "", *lines)]
        edge = "#" * (width + 4)
        self._plain("\n".join([edge, *framed, edge]))

    def note(self, text: str) -> None:
        """One line of information, above whatever is shown."""
        self._line(clean(text, None))

    def warn(self, text: str) -> None:
        """One line that is marked as a warning."""
        self._line(f"warning: {clean(text, None)}", "yellow")

    def stage(self, description: str, total: int, unit: str = "steps", start: int = 0) -> None:
        """Begin a stage of `total` units, `start` of them done before; it ends with the next stage or the context."""
        self.finish()
        self._description, self._unit = clean(description), unit
        self._done, self._total, self._arms = start, total, {}
        self._start = start
        self._began = time.monotonic()
        self._running = True
        if self.interactive:
            self._screen = Screen(
                self._drawn(), console=self.console, auto_refresh=False, redirect_stdout=False, transient=True
            )
            self._screen.start(refresh=True)
            self._next = self._began + REFRESH_S
        else:
            self._next = self._began + PLAIN_S

    def advance(self, done: int, arms: Arms | None = None) -> None:
        """Report that `done` units of the stage are complete. Costs under a microsecond when nothing is due.

        Args:
            arms: what to show of each arm, e.g. `{"noop": {"step s": 0.21, "loss": 3.4}}`; None leaves it as it is.
        """
        self._done = done
        if arms is not None:
            self._arms = arms
        now = time.monotonic()
        if now < self._next or not self._running or done >= self._total:  # `finish` shows the end
            return
        self._show()
        drawn = time.monotonic()
        self._next = drawn + max(REFRESH_S if self.interactive else PLAIN_S, (drawn - now) / MAX_SHARE)

    def progress(self, description: str, done: int, total: int) -> None:
        """A stage per description, for work that reports by callback (`effbench.task.DataRequest.progress`)."""
        if not self._running or (self._description, self._total) != (clean(description), total):
            if done >= total:
                return
            self.stage(description, total, unit="")
        self.advance(done)
        if done >= total:
            self.finish()

    def finish(self) -> None:
        """End the stage, if one is running: its last state stays, with the time it took."""
        if not self._running:
            return
        self._running = False
        if self._screen is None:
            self._plain(self._sentence())
            return
        self._screen.stop()
        self._screen = None
        self.console.print(self._drawn())

    def _show(self) -> None:
        if self._screen is None:
            self._plain(self._sentence())
        else:
            self._screen.update(self._drawn(), refresh=True)

    def _line(self, text: str, style: str = "") -> None:
        if self.interactive:
            self.console.print(Text(text, style=style))
        else:
            self._plain(text)

    def _plain(self, text: str) -> None:
        self.console.print(Text(_ascii(text)), soft_wrap=True)

    def _counts(self) -> str:
        """`120/564 steps, 21 %, 0:32 elapsed, 1:58 left`."""
        elapsed = time.monotonic() - self._began
        share = self._done / self._total if self._total else 1.0
        parts = [
            f"{self._done}/{self._total} {self._unit}".rstrip(),
            f"{100 * share:.0f} %",
            f"{_clock(elapsed)} elapsed",
        ]
        if self._running and self._start < self._done < self._total:
            parts.append(f"{_clock(elapsed * (self._total - self._done) / (self._done - self._start))} left")
        return ", ".join(parts)

    def _sentence(self) -> str:
        shown, more = self._shown()
        width = max((len(clean(name)) for name in shown), default=0)
        arms = [
            f"    {clean(name):{width}}  "
            + "  ".join(f"{clean(key)} {_value(value)}" for key, value in columns.items())
            for name, columns in shown.items()
        ]
        return "\n".join([f"{self._description}: {self._counts()}", *arms, *([f"    {more}"] if more else [])])

    def _shown(self) -> tuple[Arms, str]:
        """The arms that are told of, those that failed among them, and how many are not."""
        failed = [name for name, columns in self._arms.items() if "status" in columns]
        names = list(dict.fromkeys([*list(self._arms)[:MOST], *failed]))
        hidden = len(self._arms) - len(names)
        return {name: self._arms[name] for name in names}, f"and {hidden} more arms" if hidden else ""

    def _drawn(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self._total, 1), completed=self._done if self._total else 1, width=24)
        head.add_row(Text(self._description, "bold"), bar, Text(self._counts()))
        if not self._arms:
            return head
        shown, more = self._shown()
        columns = list(dict.fromkeys(key for values in shown.values() for key in values))
        table = Table("arm", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(Text(clean(column)), justify="right")
        for name, values in shown.items():
            table.add_row(Text(clean(name)), *(Text(_value(values.get(key, ""))) for key in columns))
        return Group(head, table, *([Text(more)] if more else []))


def _value(value: float | str) -> str:
    return clean(value) if isinstance(value, str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
