"""What MkDocs calls while it builds the site: pages that are generated exist there alone, never in the repository."""

import functools
import os
import pathlib
import re
from typing import Any

# Programs of this build run once on a few numbers: the cheapest machine code, and kept for the next build.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xformers_lab" / "site"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import choices  # noqa: E402
import claims  # noqa: E402
import notebooks  # noqa: E402
import pictures  # noqa: E402
import survey  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402

from xformers_lab import spec  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Pages whose text stands elsewhere in the repository: where they stand in the site, and where they are written.
INCLUDED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "results.md": "experiments/RESULTS.md",
}


def on_config(config: Any) -> Any:
    """Every choice has its place in the navigation."""
    sections = [
        {shelf: [f"choices/{shelf}/index.md", *(f"choices/{shelf}/{name}.md" for name in spec.names(shelf))]}
        for shelf in spec.SHELVES
    ]
    for section in config["nav"]:
        if section.get("Choices") == []:
            section["Choices"] = sections
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds what is generated to what is written."""
    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


@functools.cache  # `mkdocs serve` builds again and again; shelves do not change meanwhile
def generated() -> dict[str, str]:
    """Every page and picture that no file of docs/ holds, by its path in the site."""
    pages = {path: (ROOT / source).read_text() for path, source in INCLUDED.items()}
    pages |= {f"choices/{shelf}/index.md": choices.shelf_page(shelf) for shelf in spec.SHELVES}
    pages |= {f"choices/{shelf}/{name}.md": choices.page(shelf, name) for shelf, name in choices.pages()}
    pages |= {"survey.md": survey.page()}
    pages |= {path: draw() for path, draw in survey.drawings().items()}
    pages |= {
        f"pictures/{shelf}/{name}.svg": picture.svg
        for shelf, name in choices.pages()
        if (picture := pictures.of(shelf, name))
    }
    pages |= {f"results/{picture.name}": picture.read_text() for picture in claims.RESULTS.glob("*.svg")}
    return pages | notebooks.pages(ROOT / "docs" / "notebooks")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links, and blocks that name a file, as they are written in the repository become what they are in the site."""
    markdown = re.sub(r"^```(\w+) (\S+\.\w+)$", r'```\1 title="\2"', markdown, flags=re.M)
    here = page.file.src_uri
    home = (ROOT / INCLUDED[here] if here in INCLUDED else ROOT / "docs" / here).parent
    return re.sub(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)]*)?\)", lambda match: _link(match, home, here), markdown)


def _link(match: re.Match, home: pathlib.Path, here: str) -> str:
    """One link, or the place of a picture: where it is in the site; of a file that is not there, its words or path."""
    words, target, anchor = match[1], match[2], match[3] or ""
    if re.match(r"\w+:", target):
        return match[0]
    path = pathlib.Path(os.path.normpath(home / target))
    if here not in INCLUDED and path.is_relative_to(ROOT / "docs"):
        return match[0] if here.startswith("notebooks/") else match[0].replace(".ipynb", ".md")
    inside = path.relative_to(ROOT).as_posix()
    written = {source: page for page, source in INCLUDED.items()}
    shelf, name = path.parent.relative_to(ROOT).as_posix().removeprefix("xformers_lab/"), path.stem
    shelf = {folder: shelf for shelf, folder in spec.SHELVES.items()}.get(shelf, "")
    if inside in written:
        to = written[inside]
    elif inside.startswith(("docs/", "experiments/results/")):
        to = inside.partition("/")[2]
    elif shelf and path.suffix == ".py" and name in spec.names(shelf):
        to = f"choices/{shelf}/{name}.md"
    else:
        return words if "`" in words or "*" in words else f"`{inside}`"
    return f"[{words}]({os.path.relpath(to, os.path.dirname(here) or '.')}{anchor})"
