"""`effbench run --preset NAME`: a whole comparison by its name."""

from __future__ import annotations

import typer

from effbench.commands import given
from effbench.errors import UsageError
from effbench.registry import presets
from effbench.terminal import console


def run_preset(name: str, context: typer.Context) -> int:
    """Run a preset with the options that were set on the command line; the worst exit code of its records.

    Raises:
        UsageError: there is no such preset, or an option was set that it fixes itself.
    """
    from effbench.commands.run import exit_code

    preset = presets.get(name.replace("-", "_"))()
    asked = {key: value for key, value in given(context).items() if key != "preset"}
    for key in asked:
        if key not in preset.options:
            flags, own = (f"--{each.replace('_', '-')}" for each in (key, "preset"))
            others = ", ".join(f"--{each.replace('_', '-')}" for each in preset.options)
            raise UsageError(f"{own} {name} and {flags} exclude each other", f"beside the preset: {others}")
    return max(map(exit_code, preset.run(console(), **asked)), default=0)
