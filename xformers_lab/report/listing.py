"""Rows with the same keys, as the commands that look around print them: whole in a pipe, fitted to a terminal."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xformers_lab.terminal import visible

# Spaces between columns, the least width of a column of text, and of what stands below a row.
GAP, LEAST, INDENT = 2, 30, 4
# A wide column is as wide as so many of its texts ask for; a longer text has several lines.
USUAL = 0.85


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading and a text for each row."""

    title: str
    texts: list[str]

    @property
    def width(self) -> int:
        """What the texts need; where they are long, what most of them do."""
        widths = sorted(map(cell_len, [self.title, *self.texts]))
        return min(widths[-1], max(LEAST, widths[math.ceil(USUAL * len(widths)) - 1]))


def print_listing(rows: Sequence[dict], console: Console | None = None) -> None:
    """The rows as a table. Where a terminal is too narrow for it, the widest columns stand below each row."""
    console = console or Console()
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [Column(key, [visible(_word(row.get(key, ""))) for row in rows]) for key in keys]
    if not console.is_terminal:
        console.file.write(_plain(columns) + "\n")  # rich would take seconds to print thousands of lines
        return
    widest = max(columns, key=lambda column: column.width, default=None)
    left = console.width - sum(column.width + GAP for column in columns if column is not widest)
    if widest is None or left >= min(LEAST, widest.width):
        console.print(_table([(column, left if column is widest else column.width) for column in columns]))
        return
    _print_stacked(columns, console)


def _print_stacked(columns: list[Column], console: Console) -> None:
    beside = list(columns)
    while len(beside) > 1 and sum(column.width + GAP for column in beside) - GAP > console.width:
        beside.remove(max(beside[1:], key=lambda column: column.width))
    below = [column for column in columns if column not in beside]
    widths = [min(column.width, console.width) for column in beside]
    lay = lambda texts: Text((" " * GAP).join(text + " " * (w - cell_len(text)) for text, w in texts).rstrip())
    heading = lay([(column.title, w) for column, w in zip(beside, widths, strict=True)])
    heading.stylize("bold")
    console.print(heading)
    for row in range(len(columns[0].texts)):
        cells = [_wrapped(column.texts[row], w).split("\n") for column, w in zip(beside, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            console.print(lay(list(zip(line, widths, strict=True))))
        # The last column is a sentence; what stands before it is named.
        named = [f"{column.title}: {column.texts[row]}" for column in below if column is not columns[-1]]
        sentence = columns[-1].texts[row] if columns[-1] in below else ""
        for text in filter(None, [" \N{MIDDLE DOT} ".join(named), sentence]):
            for line in _wrapped(text, max(console.width - INDENT, 1)).split("\n"):
                console.print(Text(" " * INDENT + line))


def _plain(columns: list[Column]) -> str:
    """The table as text, no line of it cut: thousands of rows are written at once."""
    padded = []
    for column in columns:
        texts = [column.title, *column.texts]
        widths = list(map(cell_len, texts))
        full = max(widths) + GAP
        padded.append([text + " " * (full - width) for text, width in zip(texts, widths, strict=True)])
    return "\n".join("".join(cells).rstrip() for cells in zip(*padded, strict=True))


def _table(columns: list[tuple[Column, int]]) -> Table:
    """Columns, each with the width that its texts have."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column, _ in columns:
        table.add_column(Text(column.title), no_wrap=True)
    of_column = [[Text(_wrapped(text, width)) for text in column.texts] for column, width in columns]
    for cells in zip(*of_column, strict=True):
        table.add_row(*cells)
    return table


def _wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width`, broken behind spaces and behind the colons and signs of choices."""
    lines = [""]
    for piece in re.findall(r"[^\s:+,]*(?:[:+,]|\s+|$)", text):
        while cell_len(lines[-1] + piece.rstrip()) > width and (lines[-1] or cell_len(piece.rstrip()) > width):
            if lines[-1]:
                lines.append("")
            else:  # a word wider than the line
                lines[-1], piece = piece[:width], piece[width:]
                lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
