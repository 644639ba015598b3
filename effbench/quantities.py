"""Quantities as people write them: `2%`, `0.02`, `60s`, `1.5m`."""

from __future__ import annotations

import math
import re

from effbench.errors import UsageError

SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def share(text: str | float) -> float:
    """A share between 0 and 1, both excluded: "2%", "2 %" or "0.02" are 0.02.

    Raises:
        UsageError: it is neither; a bare 2 could mean both 2 % and twice, and is refused.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", str(text))
    value = _number(found.group(1)) / (100 if found.group(2) else 1) if found else math.nan
    if not 0 < value < 1:
        raise UsageError(f"{text} is not a share between 0 and 1", "write 2% or 0.02")
    return value


def duration(text: str | float) -> float:
    """Seconds, above 0: "60", "60s", "500ms", "1.5m", "1h".

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(text))
    value = _number(found.group(1)) * SECONDS.get(found.group(2), math.nan) if found else math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{text} is not a length of time", "write 60s, 1.5m or 60")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # 1.2.3
        return math.nan
