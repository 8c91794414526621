"""What benchmarks/results holds of one choice."""

import functools
import json
import pathlib

from xformers_lab import spec
from xformers_lab.errors import LabError

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
_HEADS = {
    "ours_ms": "ours, ms",
    "peer_ms": "peer, ms",
    "ms": "ms",
    "ratio": "ours / peer",
    "state_bytes": "state, bytes",
}


@functools.cache
def _results() -> list[dict]:
    """Every result: its machine, and rows with the choice that each is of."""
    results = []
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        results.append({"benchmark": file.stem.split(".")[0], **result})
    return results


def _is_of(row: dict, name: str) -> bool:
    text = row.get("choice") or row.get("case") or ""
    try:
        return spec.parse(text).name == name
    except LabError:  # the case is a sentence
        return False


def section(name: str) -> str:
    """Tables of what was measured of a choice, in Markdown; empty where nothing was."""
    parts = []
    for result in _results():
        rows = [row for row in result["rows"] if _is_of(row, name)]
        if not rows:
            continue
        keys = ["case", "pass", "seq_len", "ours_ms", "peer", "peer_ms", "ms", "ratio", "state_bytes"]
        keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
        machine = result["machine"]
        heads = [_HEADS.get(key, key.replace("_", " ")) for key in keys]
        lines = [f"`benchmarks/{result['benchmark']}.py` on {machine['cpu']}, {machine['cores']} cores:", ""]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        lines += [f"| {' | '.join(_shown(row.get(key)) for key in keys)} |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _shown(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
