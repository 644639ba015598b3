"""What a preset is: a comparison of several runs that tells a story, started by name. A preset's author reads this.

Save it as a file of a package that an entry point of the group `effbench.presets` names; the file's name is the
preset's name. `effbench run --preset course-report` runs `course_report`: in a preset's name - and _ are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.records import Record


class Preset(ABC):
    """A comparison that is run by name. Its docstring's first line is what `effbench list presets` shows."""

    #: the options of `effbench run` that a user may set beside it; all others it fixes itself
    options: ClassVar[tuple[str, ...]] = ("data", "out", "threads", "dry_run", "fresh")

    @abstractmethod
    def run(self, console: Console, **options: Any) -> list[Record]:
        """Run everything, print what came out, and leave records in the folder `out`.

        Args:
            console: where to print.
            options: those of `options` that the user set, as `effbench.run` takes them.

        Returns:
            the records, none after a dry run.
        """
