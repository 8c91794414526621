"""One page for every choice on every shelf, and one for every shelf, from the files themselves."""

import importlib
import inspect
from collections.abc import Callable

import claims
import pictures
import timings
import typeset

from xformers_lab import shelves, spec
from xformers_lab.check import cache, run

LENGTH = 64  # at which costs are told
ABILITIES = {
    "causal": "runs causally, in a decoder",
    "cross": "looks at another sequence (cross-attention)",
    "bias": "takes positions that add to the scores",
    "decode": "decodes token by token",
}


def pages() -> list[tuple[str, str]]:
    """Every shelf and name on it."""
    return [(shelf, name) for shelf in spec.SHELVES for name in spec.names(shelf)]


def page(shelf: str, name: str) -> str:
    """The page of one choice, in Markdown."""
    about = shelves.page(f"{shelf}/{name}", [f"seq_len={LENGTH}"] if shelf == "attention" else [])
    parts = [
        f"# {name}",
        _where(shelf, name),
        _picture(shelf, name),
        typeset.docstring(about["about"]),
        _used(shelf, name),
        _options(about["options"]),
        _costs(about) if "cost" in about else "",
        _kit(shelf, name),
        _experiments(shelf, name),
        _timed(name),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def shelf_page(shelf: str) -> str:
    """The page of a shelf: its choices in a table."""
    lines = [f"# {shelf}", "", *_doc_of_shelf(shelf), "| choice | what it is |", "|---|---|"]
    lines += [f"| [`{row['name']}`]({row['name']}.md) | {typeset.cell(row['title'])} |" for row in shelves.shelf(shelf)]
    return "\n".join(lines) + "\n"


def _doc_of_shelf(shelf: str) -> list[str]:
    package = importlib.import_module(f"xformers_lab.{spec.SHELVES[shelf].replace('/', '.')}")
    return [typeset.docstring(inspect.getdoc(package) or ""), ""]


def _where(shelf: str, name: str) -> str:
    file = f"xformers_lab/{spec.SHELVES[shelf]}/{name}.py"
    return f'<p class="where"><a href="index.html">{shelf}</a> · <code>{file}</code></p>'


def _picture(shelf: str, name: str) -> str:
    if (picture := pictures.of(shelf, name)) is None:
        return ""
    image = f"![Picture of {name}](../../pictures/{shelf}/{name}.svg)"
    caption = f"<figcaption>{typeset.inline(picture.caption)}</figcaption>"
    return f'<figure class="pattern" markdown>\n{image}\n{caption}\n</figure>'


def _used(shelf: str, name: str) -> str:
    """How a command names it, and which commands look at it alone."""
    lone = sum(name in spec.names(other) for other in spec.SHELVES) == 1
    key = f"norm=pre:normaliser={name}" if shelf == "normaliser" else f"{shelf}={name}"
    lines = [f"xlab show {name if lone else f'{shelf}/{name}'}"]
    if shelf in run.kits():
        lines.append(f"xlab check {shelf}/{name}")
    if shelf == "attention":
        lines.append(f"xlab bench attention={'' if name == 'full' else 'full,'}{name}")
    return "\n".join([f"A command takes it as `{key}`.", "", "```bash", *lines, "```"])


def _options(options: list[dict]) -> str:
    if not options:
        return ""
    rows = [f"| `{each['name']}` | `{each['value']}` | {typeset.cell(each['help'])} |" for each in options]
    return "\n".join(["## Options", "", "| option | default | what it is |", "|---|---|---|", *rows])


def _costs(about: dict) -> str:
    cost, can = about["cost"], about["can"]
    lines = [
        "## Costs and abilities",
        "",
        f"One head of {about['length']} positions: {cost['flops']:,.0f} FLOPs of matrix products forward, the largest "
        f"array has {cost['memory']:,.0f} numbers, decoding keeps {cost['state']:,.0f}.",
        "",
        "| ability | |",
        "|---|---|",
    ]
    return "\n".join(lines + [f"| {words} | {'yes' if can[key] else 'no'} |" for key, words in ABILITIES.items()])


def _kit(shelf: str, name: str) -> str:
    """What the conformance kit holds a choice to, and how it ended where these very sources were checked here."""
    if shelf not in run.kits():
        return ""
    rows = _properties(shelf)
    if shelf != "attention":
        said = f"The kit of this shelf holds `{name}` to this, built into something small:"
        table = [f"| `{each}` | {typeset.cell(words)} |" for each, words in rows]
        return "\n".join(["## Conformance", "", said, "", "| property | what must hold |", "|---|---|", *table])
    verdict = cache.known(name)
    if verdict is None:
        said = f"The kit holds every mechanism to this; `xlab check {name}` runs it. This build knows no verdict."
        ends = {}
    else:
        error = (
            f", largest difference from the reference {verdict['error']:.1e}" if verdict["error"] is not None else ""
        )
        said = f"The kit's verdict on these sources: **{'passes' if verdict['passed'] else 'fails'}**{error}."
        ends = {skip["property"]: f"does not apply: {skip['reason']}" for skip in verdict["skipped"]}
        ends |= {failure["property"]: "fails" for failure in verdict["failed"]}
    heads = ["property", "what must hold", *(["verdict"] if verdict else [])]
    lines = ["## Conformance", "", said, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for each, words in rows:
        cells = [f"`{each}`", typeset.cell(words), *([typeset.cell(ends.get(each, "holds"))] if verdict else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _properties(shelf: str) -> list[tuple[str, str]]:
    """Name and first sentence of every property of a shelf's kit."""
    held: list[Callable] = run.PROPERTIES
    if shelf != "attention":
        held = importlib.import_module(f"xformers_lab.check.kits.{shelf}").PROPERTIES
    return [(holds.__name__, " ".join((inspect.getdoc(holds) or "").split()).rstrip(".")) for holds in held]


def _experiments(shelf: str, name: str) -> str:
    tables = claims.section(shelf, name)
    said = "What the laboratory's experiments measured of it, a line for each variant."
    return f"## In experiments\n\n{said}\n\n{tables}" if tables else ""


def _timed(name: str) -> str:
    tables = timings.section(name)
    return f"## Timings\n\nMeasured side by side with other libraries; less is better.\n\n{tables}" if tables else ""
