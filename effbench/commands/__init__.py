"""The commands that take more than a few lines."""

from __future__ import annotations

from typing import Any

import typer


def given(context: typer.Context) -> dict[str, Any]:
    """What was set on the command line, and is no default, by name of its parameter."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
