"""What every page keeps to: a template that escapes all text, and a policy under which it fetches nothing."""

import base64
import hashlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xformers_lab.errors import UsageError

if TYPE_CHECKING:
    import jinja2


def template(folder: pathlib.Path) -> "jinja2.Template":
    """The template page.html.jinja of a folder; raises UsageError where jinja2 is missing."""
    try:
        import jinja2
    except ImportError as error:
        raise UsageError(f"an HTML page needs {error.name}: pip install jinja2") from None
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html.jinja")


def policy(style: str, scripts: Sequence[str]) -> str:
    """The Content-Security-Policy of a page that has this style and these scripts, and fetches nothing."""
    hashes = " ".join(f"'{digest(script)}'" for script in scripts)
    return f"default-src 'none'; style-src '{digest(style)}'; script-src {hashes}; base-uri 'none'; form-action 'none'"


def digest(text: str) -> str:
    """What a policy calls a style or a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
