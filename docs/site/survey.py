"""The survey's map: every branch of its taxonomy with pictures, an equation, costs, and the choices that we have."""

import pathlib
import tomllib
from collections.abc import Callable

import pictures
import typeset

from xformers_lab import shelves, spec
from xformers_lab.attention import KINDS

BRANCHES = tomllib.loads(pathlib.Path(__file__).with_name("taxonomy.toml").read_text())["branch"]
# Shelves that are no part of a Transformer.
APART = {"task", "optimizer"}

HEAD = """\
---
hide: [navigation]
---

# The map of the survey

Lin et al., *A Survey of Transformers*, 2021 ([arXiv 2106.04554](https://arxiv.org/abs/2106.04554)), order the variants
of the Transformer in a taxonomy. These are its branches, with what stands on our shelves for each. Tables and pictures
are made from the shelves themselves: a choice that is added has its row here with the next build.

In pictures a row is a query, or the position of an output, and a column is a key, or the position of an input; of what
moves nothing between positions a curve shows what becomes of the size of a vector. The page of each choice says what
its picture shows. Costs are for one head: T queries, S keys, H channels of a head, D channels of the model.
"""


def page() -> str:
    """The page, in Markdown. Raises ValueError where the taxonomy leaves out a shelf or a kind of attention."""
    check()
    return "\n\n".join([HEAD.strip(), *map(_branch, BRANCHES)]) + "\n"


def check() -> None:
    """Raises ValueError where a shelf or a kind of attention has no branch."""
    kinds = {branch["kind"] for branch in BRANCHES if branch["shelf"] == "attention"}
    named = {branch["shelf"] for branch in BRANCHES}
    if missing := sorted({*KINDS} - kinds | {*spec.SHELVES} - named - APART):
        raise ValueError(f"docs/site/taxonomy.toml has no branch for {', '.join(missing)}")


def drawings() -> dict[str, Callable[[], str]]:
    """What makes each picture that belongs to a branch, by its path."""
    drawn = {"draw": pictures.pattern, "passes": pictures.layers}
    return {
        _file(name): lambda text=text, draw=draw: draw(text)
        for branch in BRANCHES
        for key, draw in drawn.items()
        for name, text in branch.get(key, ())
    }


def _file(name: str) -> str:
    return f"pictures/atoms/{name.replace(' ', '_')}.svg"


def _branch(branch: dict) -> str:
    section = f" *Section {branch['section']}.*" if branch["section"] else ""
    parts = [f"## {branch['title']}", branch["text"] + section, _equation(branch), _atoms(branch), _table(branch)]
    return "\n\n".join(filter(None, parts))


def _equation(branch: dict) -> str:
    return f'<p class="equation">{typeset.inline(branch["equation"])}</p>'


def _atoms(branch: dict) -> str:
    figures = [f"![The pattern {name}]({_file(name)}){{ .small }} {name}" for name, _ in branch.get("draw", ())]
    passes = branch.get("passes", ())
    figures += [f"![Layers of tokens: {name}]({_file(name)}){{ .passes }} {name}, `{text}`" for name, text in passes]
    return "\n".join(['<div class="atoms" markdown>', *figures, "</div>"]).replace("\n!", "\n\n!") if figures else ""


def _table(branch: dict) -> str:
    shelf = branch["shelf"]
    rows = [row for row in shelves.shelf(shelf) if branch.get("kind") in (None, row.get("kind"))]
    drawn = any(pictures.of(shelf, row["name"]) for row in rows)
    costs = ["time", "memory"] if shelf == "attention" else []
    head = [*(["picture"] if drawn else []), shelf, "what it is", *costs]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        name = row["name"]
        cells = [f"[`{name}`](choices/{shelf}/{name}.md)", typeset.cell(row["title"])]
        cells += [typeset.cell(row[cost]) for cost in costs]
        if drawn:
            image = f"![Picture of {name}](pictures/{shelf}/{name}.svg){{ .small loading=lazy }}"
            cells.insert(0, image if pictures.of(shelf, name) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
