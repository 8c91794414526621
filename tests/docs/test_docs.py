"""README and docs/ tell the truth: commands and Python run as written, page by page, and links lead somewhere.

A fenced block of bash is run line by line; one that names a file, as in "```python squared.py", is written to it first;
other Python is run as it is. A line that ends in "# exit code 1" must end so, every other one in 0.
"""

import importlib
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import ROOT

from xformers_lab import config as configs
from xformers_lab import engines, spec
from xformers_lab.cli.parser import COMMANDS
from xformers_lab.train import hosts

README = ROOT / "README.md"
MANUAL = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, *sorted((ROOT / "docs" / "guides").glob("*.md"))]
GENERATED = ["survey.md"]  # of the site alone, whose build looks at links to it
PROGRAMS = ("xlab", "make", "sed")
LAUNCHERS = ("srun", "mpirun")  # what starts xlab on a cluster


class Fence(NamedTuple):
    language: str
    file: str
    text: str


def fences(page: pathlib.Path) -> list[Fence]:
    blocks = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Fence(*block) for block in blocks]


def commands(fence: Fence) -> list[str]:
    return [line for line in fence.text.splitlines() if line.strip()] if fence.language == "bash" else []


def runs(fence: Fence) -> bool:
    return fence.language in ("bash", "python", "cluster") or bool(fence.file)


def steps(page: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """What running a page is: (file, command or python; its text; the name of a file)."""
    for fence in fences(page):
        if fence.file:
            yield "file", fence.text, fence.file
        elif fence.language == "python":
            yield "python", fence.text, ""
        for line in commands(fence):
            yield "command", runnable(line), ""
        if fence.language == "cluster":
            for line in fence.text.splitlines():
                if not line.startswith("#"):
                    yield "command", of_cluster(line), ""


def runnable(line: str) -> str:
    """A line of a page, or of those that take minutes what at least knows how."""
    words = shlex.split(line, comments=True)
    assert words[0] in PROGRAMS, f"{line}: a page shows no other programs than {', '.join(PROGRAMS)}"
    if words[0] == "make":  # the demo and the tests themselves
        return shlex.join(["make", "-n", "-C", str(ROOT), *words[1:]])
    return "xlab demo --help" if words[:2] == ["xlab", "demo"] else line


def of_cluster(line: str) -> str:
    """A line for a cluster as it can run anywhere: a comparison lists its cells, a run says what each device would
    hold, and the variables, the launcher, the engine and the place among processes are left out."""
    words = shlex.split(line)
    assert words[0] in ("xlab", *LAUNCHERS) or "=" in words[0], line
    command, *words = words[words.index("xlab") + 1 :]
    if command == "compare":
        engine = {
            index + more for index, word in enumerate(words) if word in ("--engine", "--address") for more in (0, 1)
        }
        left = [word for index, word in enumerate(words) if index not in engine]
        return shlex.join(["xlab", "compare", *left, "--no-baselines", "--dry-run"])
    assert command == "train", line
    return shlex.join(["xlab", "show", *(word for word in words if word.partition("=")[0] not in configs.PLACE)])


LONG = ("maps", "new_mechanism")  # pages whose blocks take minutes, as those of guides do


def with_blocks() -> list:
    """Pages with blocks to run; CI runs those that take no minutes."""
    pages = [page for page in PAGES if any(map(runs, fences(page)))]
    long = lambda page: page.stem in LONG or (page.parent.name == "guides" and page.stem != "quick_start")
    return [pytest.param(page, marks=pytest.mark.slow if long(page) else pytest.mark.full) for page in pages]


@pytest.mark.parametrize("page", with_blocks(), ids=lambda page: page.stem)
def test_blocks_run_as_written(page, tmp_path):
    """All in one process, see page.py."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("page.py"))]
    done = subprocess.run(command, input=json.dumps([*steps(page)]), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_engines_and_places_of_clusters_are_what_there_is():
    """What `of_cluster` leaves out of the lines that it runs."""
    page = ROOT / "docs" / "guides" / "scaling.md"
    lines = [line for fence in fences(page) if fence.language == "cluster" for line in fence.text.splitlines()]
    said = [shlex.split(line) for line in lines if not line.startswith("#")]
    named = [words[words.index("--engine") + 1] for words in said if "--engine" in words]
    assert {spec.parse(engine).name for engine in named} == {"ray", "slurm"}
    for engine in named:
        choice = spec.parse(engine)
        assert (
            choice.options.keys()
            <= spec.options(importlib.import_module(f"{engines.__name__}.{choice.name}").Engine).keys()
        )
    placed = [configs.placed(words)[0] for words in said if any(word.startswith("process=") for word in words)]
    assert [hosts.meant(place) for place in placed] == placed and placed


def test_every_subcommand_is_shown():
    lines = [line for page in PAGES for fence in fences(page) for line in commands(fence)]
    assert {command.name for command in COMMANDS} == {line.split()[1] for line in lines if line.startswith("xlab ")}


def test_every_page_is_on_the_map():
    listed = re.findall(r"\]\((?:docs/)?([^)/]+\.md)\)", README.read_text())
    assert {page.name for page in MANUAL} <= {README.name, *listed}
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(re.search(rf": (guides/)?{re.escape(page.name)}$", nav, re.M) for page in PAGES if "docs" in page.parts)


def test_readme_is_an_entry():
    assert len(README.read_text().splitlines()) <= 200
    assert (ROOT / "docs" / "report.png").stat().st_size < 200_000


def test_catalogue_is_the_shelves_own():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "catalogue.md").read_text() == generate["catalogue_page"](), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists() or path.name in GENERATED, target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], anchor
