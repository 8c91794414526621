"""What experiments/results holds of one choice."""

import functools
import pathlib

from xformers_lab import spec
from xformers_lab.errors import LabError
from xformers_lab.experiment import result, variants

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"


@functools.cache
def _variants() -> dict[str, list[variants.Variant]]:
    """Experiment -> its variants at scale 1."""
    kept = {file.stem: result.read(RESULTS, file.stem) for file in sorted(RESULTS.glob("*.json"))}
    return {name: list(results[1].variants) for name, results in kept.items() if 1 in results}


def _is_of(variant: variants.Variant, shelf: str, name: str) -> bool:
    text = variant.choices.get(shelf, "")
    try:
        return any(spec.parse(part).name == name for part in spec.split(text, "+") if part)
    except LabError:
        return False


def section(shelf: str, name: str) -> str:
    """Tables of what experiments measured of a choice, in Markdown; empty where none did."""
    parts = []
    for experiment, known in _variants().items():
        mine = [variant for variant in known if _is_of(variant, shelf, name)]
        for listing in variants.listings(mine):
            link = f"[{experiment}](../../results.md#{experiment})"
            lines = [f"{link}, {listing.title}:", "", _line(listing.heads), "|" + "---|" * len(listing.heads)]
            parts.append("\n".join([*lines, *map(_line, listing.lines)]))
    return "\n\n".join(parts)


def _line(texts: list[str]) -> str:
    cells = (text.replace("|", "\\|") for text in texts)
    return f"| {' | '.join(cells)} |"
