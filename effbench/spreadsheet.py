"""Cells of CSV files as spreadsheets read them: none is taken for a formula, which could run a command."""

#: what a formula begins with, in full width too; some programs show a cell with | or % by the letter of a command
FORMULA = tuple("=+-@|%\t\r\uff1d\uff0b\uff0d\uff20")


def plain_cell(text: str) -> str:
    """The text with an apostrophe before what would be a formula; the unit % is none."""
    return f"'{text}" if text.startswith(FORMULA) and text != "%" else text
