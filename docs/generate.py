"""Writes docs/catalogue.md: every choice of every shelf, as its docstring and signature say it."""

import pathlib

from xformers_lab import shelves

HEAD = """\
# Catalogue

Every choice on every shelf. `make docs` writes this page from docstrings and signatures; a test holds it to them.
`xlab show NAME` prints the whole page of one choice, with its equation, its options, its cost and a drawing of its
pattern.

A choice is written `name:option=value:option=value`, with these defaults. T is the number of queries, S of keys, H the
size of a head, D the width of the model.

"""


def catalogue_page() -> str:
    return f"{HEAD}{shelves.markdown().strip()}\n"


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("catalogue.md").write_text(catalogue_page())
