"""Text of other people's making as a terminal may show it: nothing in it steers the terminal, and it is not endless."""

import logging
import re

# Longest run of characters without a space that a message shows whole, as a path may be, and longest message.
LONGEST_WORD, LONGEST = 240, 2000
LINES = "\n\t"  # what text of several lines keeps
# Control characters, lone surrogates (which no terminal's encoding has), line separators, and what turns the reading
# order or is never seen. Joiners stay: scripts and emoji are written with them.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


class _Visible(logging.Formatter):
    """What is logged, which names paths, as a terminal may show it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), LINES)


def log_in_lines() -> None:
    """Have what this process logs said as plain lines on stderr. Without a handler of ours, the first library that logs
    something would install its own, which writes names of modules before every line."""
    handler = logging.lastResort
    if handler is not None:
        handler.setFormatter(_Visible())
        if not logging.root.handlers:
            logging.root.addHandler(handler)


def visible(text: object, keep: str = "") -> str:
    r"""The text with every character that steers a terminal escaped, as \x1b is, but for those in `keep`."""
    escaped = lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()
    return _STEERING.sub(escaped, str(text))


def shortened(text: str) -> str:
    """The text with the middle of endless words left out, and its own where it is endless altogether."""
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _ends(word[0], 100, 20), text)
    return text if len(text) <= LONGEST else _ends(text, LONGEST - 500, 400)


def message(text: object) -> str:
    """The text on one line, as messages are."""
    return visible(shortened(str(text)))


def markup(text: object) -> str:
    """The text as rich prints it where it reads markup: none of it is any, and nothing steers the terminal."""
    from rich.markup import escape  # here, since help needs no rich

    return escape(visible(text))


def _ends(text: str, first: int, last: int) -> str:
    return f"{text[:first]}... ({len(text):,} characters) ...{text[-last:]}"
