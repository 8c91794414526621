"""What a terminal, a file and a notebook show of a result, all drawn by the one function that prints it."""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich takes a tenth of a second, which `xlab --help` has no use for
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

# Columns that a notebook has room for: longer lines are scrolled.
NOTEBOOK = 160
_PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


class Shown:
    """A result that can be shown: `print`, rich and notebooks show what `draw` prints on a console."""

    def draw(self, console: "Console") -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        page = _console(NOTEBOOK, terminal=False)
        self.draw(page)
        return _text(page)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        from rich.text import Text

        page = _console(options.max_width)
        self.draw(page)
        yield Text.from_ansi(_text(page))

    def _repr_html_(self) -> str:
        page = _console(NOTEBOOK, record=True)
        self.draw(page)
        return page.export_html(inline_styles=True, code_format=_PAGE)


def _console(width: int, *, terminal: bool = True, **how: Any) -> "Console":
    """A console of its own, the same wherever this runs, drawn on as a terminal is or as a file."""
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        force_jupyter=False,
        color_system="truecolor" if terminal else None,
        legacy_windows=False,
        _environ={},
        **how,
    )


def _text(page: "Console") -> str:
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue().rstrip()
