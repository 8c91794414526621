"""Notebooks as pages: their words and their code. Whoever runs one sees what it gives."""

import json
import pathlib


def pages(folder: pathlib.Path) -> dict[str, str]:
    """A page for each notebook of a folder, by its path in the site."""
    return {f"notebooks/{file.stem}.md": _page(file) for file in sorted(folder.glob("*.ipynb"))}


def _page(file: pathlib.Path) -> str:
    cells = json.loads(file.read_text())["cells"]
    parts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else _code(cell) for cell in cells]
    title, *rest = parts
    hint = f"[The notebook]({file.name}){{ download }} stands here without what its cells give; run it to see that."
    return "\n\n".join([title, hint, *rest]) + "\n"


def _code(cell: dict) -> str:
    return f"```python\n{''.join(cell['source'])}\n```"
