"""How every command prints, whatever the encoding of the terminal or the pipe behind it."""

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Characters that move a terminal's cursor, end a row, or turn the text around.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_GAP = 2  # blanks between two columns
# The first column is folded only above this width.
_UNBROKEN = 40


def prepare() -> None:
    """Let stdin and stdout escape characters that their encoding lacks, instead of raising."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if sys.stderr is None:  # closed; `print(file=None)` would write to stdout
        sys.stderr = open(os.devnull, "w")


def typed(text: str) -> str:
    """Return what came from the command line or stdin, with U+FFFD for bytes that are no text.

    What an ASCII terminal gives is taken for UTF-8.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_terminal() -> bool:
    """Whether stdout is a terminal; colours and a width are for those alone."""
    return sys.stdout is not None and sys.stdout.isatty()


def visible(text: str, keep: str = "") -> str:
    """Return a text with control characters as escapes, but for those in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else ascii(character)[1:-1]

    return _UNSEEN.sub(escaped, text)


def json_line(value: Any) -> str:
    """Return a value as a line of JSON, in ASCII where stdout is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    return json.dumps(value, ensure_ascii=encoding.lower().replace("-", "") != "utf8")


def print_text(line: str) -> None:
    """Print a line, wrapped at words to the terminal's width."""
    if is_terminal():
        Console().print(visible(line), markup=False, highlight=False, overflow="fold")
    else:
        print(visible(line))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], optional: Sequence[str] = ()
) -> None:
    """Print a table: folded at a terminal's width; in a pipe a line for each row, never folded.

    Columns in `optional` are left out at a terminal that is too narrow for all.
    """
    if not is_terminal():
        print("\n".join(plain_rows(columns, rows)))
        return
    console = Console()
    widths = _widths(columns, [list(map(_cell, row)) for row in rows])
    if sum(widths) + _GAP * (len(columns) - 1) > console.width:
        shown = [place for place, column in enumerate(columns) if column not in optional]
        columns = [columns[place] for place in shown]
        rows = [[row[place] for place in shown] for row in rows]
    console.print(rich_table(columns, rows))


def plain_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return one line per row, after a header line if `columns` is not empty."""
    cells = [list(map(_cell, row)) for row in rows]
    widths = _widths(columns, cells)
    return [
        (" " * _GAP)
        .join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        .rstrip()
        for row in ([list(columns)] if columns else []) + cells
    ]


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table for a terminal; it never truncates a path."""
    cells = [list(map(_cell, row)) for row in rows]
    first, *_ = _widths(columns, cells)
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    for place in range(len(columns) or len(cells[0])):
        table.add_column(
            columns[place] if columns else "",
            overflow="fold",
            width=None if place else min(first, _UNBROKEN, Console().width // 2),
        )
    for row in cells:
        table.add_row(*map(escape, row))
    return table


def _cell(value: object) -> str:
    return visible(str(value)) or "-"


def _widths(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    table = [columns, *cells] if columns else cells
    return [max(map(cell_len, column)) for column in zip(*table, strict=True)]
