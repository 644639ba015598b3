"""Errors that a user can act on: one message, one next step, one exit code."""


class EffbenchError(Exception):
    """A failure that is reported as one line and a hint, without a traceback.

    Args:
        message: what is wrong, naming the offending value.
        hint: the next step, usually a command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"next: {hint}")  # where Python shows a traceback; the command line shows the hint itself


class InvalidError(EffbenchError):
    """The run is invalid or its data are missing: nothing that was measured may be used."""

    exit_code = 2


class DataNotFound(InvalidError):
    """No copy of a data set was found; the message lists the places that were looked at."""


class Stopped(EffbenchError):
    """The user or a scheduler stopped a command that keeps nothing of what it did."""

    exit_code = 130  # 128 + SIGINT


class UsageError(EffbenchError):
    """What was asked for cannot be: an unknown name, a value out of range, a combination that conflicts."""

    exit_code = 3
