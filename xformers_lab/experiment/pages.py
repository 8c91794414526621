"""All results as one page, twice: RESULTS.md for whoever reads the repository, and HTML with the figures in it."""

import dataclasses
import html
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xformers_lab import files
from xformers_lab.api.table import Table
from xformers_lab.errors import RunFailed
from xformers_lab.experiment import library, result, variants, words
from xformers_lab.experiment.library import Experiment
from xformers_lab.experiment.result import Result
from xformers_lab.report import offline

HERE = pathlib.Path(__file__).parent
TITLE = "The literature's claims, run and judged"
RULE = (
    "It is *reproduced* where every part of the rule holds with its whole 95 % interval, *not reproduced at this "
    "scale* where one part fails (5 % over all parts), else *inconclusive*. Intervals are Student's t over seeds, and "
    "cover the sampling of the test split. `xlab experiment run NAME` does it again."
)
BEGINNING = (
    "Each claim is a file of `experiments/` with a rule for its verdict, which was committed before the final run and "
    f"not moved after it. {RULE}"
)
REPORT = f"Each claim has a rule for its verdict, which `xlab experiment show NAME` prints as code. {RULE}"


class Entry(NamedTuple):
    """An experiment with its results, by scale."""

    experiment: Experiment
    results: Mapping[int, Result]


def entries(names: Sequence[str], folder: pathlib.Path) -> list[Entry]:
    """The experiments with what a folder of results has of them."""
    return [Entry(library.load(name), result.read(folder, pathlib.Path(name).stem)) for name in names]


def write(listed: Sequence[Entry], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write both pages beside the folder of results; -> their paths. Raises RunFailed."""
    pages = {"RESULTS.md": markdown(listed, folder.name), "RESULTS.html": page(listed, folder)}
    paths = [folder.parent / name for name in pages]
    for path, text in zip(paths, pages.values(), strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_text(path, text)
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    return paths


def markdown(listed: Sequence[Entry], folder: str) -> str:
    """The page as Markdown. folder: where the pictures are, from the page."""
    lines = [f"# {TITLE}", "", BEGINNING, "", "| claim | verdict | minutes |", "|---|---|---|"]
    for entry in listed:
        took = " / ".join(f"{known.minutes:.1f}" for known in entry.results.values()) or "-"
        name = entry.experiment.name
        says, said = _cell(entry.experiment.claim.says), words.verdicts(entry.results)
        lines.append(f"| [{name}](#{name}): {says} | {said} | {took} |")
    for entry in listed:
        lines += ["", *_section(entry, folder)]
    return "\n".join(lines) + "\n"


def page(listed: Sequence[Entry], folder: pathlib.Path) -> str:
    """The page as one HTML file that needs no network."""
    drawn = lambda entry: {name: _drawing(folder / name) for known in entry.results.values() for name in known.figures}
    return _rendered([(entry, drawn(entry)) for entry in listed], BEGINNING)


def report(ran: Sequence[tuple[Experiment, Result, Mapping[str, Table]]], path: pathlib.Path) -> pathlib.Path:
    """Write what has just run as one HTML file that needs no network, with every picture of its tables; -> its path.
    Raises RunFailed where it cannot be written."""
    from xformers_lab.experiment import pictures  # which draws, and so takes long to import

    sections = []
    for experiment, known, tables in ran:
        every = enumerate(pictures.of_tables(tables, every=True))
        drawn = {f"{at} {name}": _element(text) for at, (name, text) in every}
        shown = dataclasses.replace(known, figures=list(drawn))
        sections.append((Entry(experiment, {known.scale: shown}), drawn))
    try:
        files.replace_text(path, _rendered(sections, REPORT))
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _rendered(sections: Sequence[tuple[Entry, Mapping[str, str]]], beginning: str) -> str:
    """The HTML page of entries, each with its pictures as elements of the page."""
    style = (HERE / "page.css").read_text()
    shown = []
    for entry, drawn in sections:
        listings = {scale: list(variants.listings(known.variants)) for scale, known in entry.results.items()}
        shown.append({"entry": entry, "figures": drawn, "listings": listings})
    marked = re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(beginning)))
    return offline.template(HERE).render(
        title=TITLE, beginning=marked, sections=shown, words=words, style=style, policy=offline.policy(style, [])
    )


def _section(entry: Entry, folder: str) -> list[str]:
    experiment, claim = entry.experiment, entry.experiment.claim
    lines = [f"## {experiment.name}", "", f"**{experiment.question}**", "", f"Claim: {claim.says}", ""]
    lines += [f"Source: {claim.source}. There: {claim.literature}", ""]
    if not entry.results:
        lines += [f"Not run yet: about {claim.minutes:g} minutes on two cores.", ""]
    if claim.data:
        lines += [f"Data: {', '.join(f'{name} ({what})' for name, what in claim.data.items())}", ""]
    for scale, known in entry.results.items():
        lines += [f"### Scale {scale}: {known.verdict}", ""]
        lines += ["| measured | value | rule |", "|---|---|---|"]
        lines += [f"| {_cell(each.what)} | {words.number(each)} | {words.rule(each)} |" for each in known.measurements]
        for listing in variants.listings(known.variants):
            lines += ["", f"{_cell(listing.title)}:", "", _line(listing.heads), "|" + "---|" * len(listing.heads)]
            lines += map(_line, listing.lines)
        lines += ["", "```text", *known.commands.values(), "```", ""]
        lines += [f"![{experiment.name}: {name}]({folder}/{name})" for name in known.figures]
        lines += ["", words.about(known, experiment.digest), ""]
        lines += [f"- did not end: {reason}" for reason in words.missing(known)]
        lines += [f"- {note}" for note in known.notes]
        lines.append("")
    lines.append(f"What would change the verdict: {claim.doubt}")
    return lines


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, texts))} |"


def _cell(text: str) -> str:
    """Text as it stands in a table."""
    return text.replace("|", "\\|")


def _drawing(path: pathlib.Path) -> str:
    """A picture in a file as an element of the page; empty where it is lost."""
    try:
        return _element(path.read_text())
    except OSError:
        return ""


def _element(text: str) -> str:
    return text[text.index("<svg") :] if "<svg" in text else ""
