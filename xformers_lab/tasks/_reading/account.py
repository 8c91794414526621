"""What was read: for each split its files, rows, lines, bytes and classes, what was dropped and why."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xformers_lab.tasks import SPLITS, Split
from xformers_lab.tasks._reading.layout import listed

_NAMES = 8  # of files, in a record


@dataclasses.dataclass(frozen=True)
class Part:
    """What was read of a part of a source: the names of its files, rows against lines, bytes once expanded, and how
    many rows were dropped for which reason. None: not known, or no such thing (images have no lines)."""

    files: tuple[str, ...] = ()
    rows: int = 0
    lines: int | None = None
    bytes: int | None = None
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Part") -> "Part":
        if not self.files:
            return other
        dropped = {
            why: self.dropped.get(why, 0) + other.dropped.get(why, 0) for why in {**self.dropped, **other.dropped}
        }
        return Part(
            self.files + other.files,
            self.rows + other.rows,
            _sum(self.lines, other.lines),
            _sum(self.bytes, other.bytes),
            dropped,
        )


@dataclasses.dataclass(frozen=True)
class Account:
    """What was read of a whole source: its parts by split (None: of no split, or all in one), and what is to be said
    besides."""

    parts: Mapping[Split | None, Part]
    notes: tuple[str, ...] = ()

    def saying(self, notes: list[str]) -> "Account":
        """The same with more to say."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))


def record(
    account: Account,
    examples: Mapping[Split, int],
    copies: Mapping[Split, int],
    *,
    unit: str,
    classes: Mapping[Split, int] | None = None,
    how: str = "by a hash",
    overlap: str = "drop",
) -> dict[str, Any]:
    """The account as JSON has it: {"splits": one entry for each split, "notes": [...], "overlap": ...}.

    examples: how many the task has of each split, in `unit`s; copies: how many of a split's stand in one held out;
    how: by what a split that the source lacks is taken from its train data.
    """
    entries = []
    for split in SPLITS:
        origin = _origin(account, split)
        part = account.parts[origin]
        own = origin == split and (len(account.parts) > 1 or split == "train")
        entry = {
            "split": split,
            "of": origin or "all",
            "by": None if own else how,
            "files": len(part.files),
            "names": list(part.files[:_NAMES]),
            "rows": part.rows,
            "lines": part.lines,
            "bytes": part.bytes,
            "examples": examples[split],
            "unit": unit,
            "copies": copies[split],
            "rows_dropped": dict(part.dropped),
        }
        entries.append(entry | ({} if classes is None else {"classes": classes[split]}))
    return {"splits": entries, "notes": list(account.notes), "overlap": overlap}


def words(read: Mapping[str, Any]) -> list[str]:
    """A record of what was read, one line for each split and one for each note."""
    said: set[str] = set()
    lines = []
    for entry in read["splits"]:
        lines.append(_line(entry, read["overlap"], again=entry["of"] in said))
        said.add(entry["of"])
    return lines + list(read["notes"])


def _line(entry: Mapping[str, Any], overlap: str, again: bool) -> str:
    """again: the source of these examples was described before."""
    names = listed(entry["names"], entry["files"])
    together = f"{entry['files']} files together: " if entry["files"] > 1 else ""
    words = [f"{entry['examples']:,} {_many(entry['unit'], entry['examples'])}"]
    if "classes" in entry:
        words.append(f"{entry['classes']} {_many('class', entry['classes'])}")
    taken = f", taken {entry['by']} from {entry['of']}" if entry["by"] else ""
    source = [f"{entry['rows']:,} {_many('row', entry['rows'])}"]
    if entry["lines"] is not None:
        source[0] += f" in {entry['lines']:,} {_many('line', entry['lines'])}"
    if entry["bytes"] is not None:
        source.append(f"{entry['bytes']:,} bytes")
    source += [f"{many:,} dropped: {why}" for why, many in entry["rows_dropped"].items()]
    where = "" if again else f" ({together}{names}: {', '.join(source)})"
    if entry["copies"]:
        verb = "kept" if overlap == "keep" else "dropped"
        words.append(f"{entry['copies']:,} {'copy' if entry['copies'] == 1 else 'copies'} of held-out data {verb}")
    return f"{entry['split']}: {', '.join(words)}{taken}{where}"


def _origin(account: Account, split: Split) -> Split | None:
    """The part of the source that a split is taken from."""
    if split in account.parts and len(account.parts) > 1:
        return split
    return "train" if "train" in account.parts else next(iter(account.parts))


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _many(word: str, count: int) -> str:
    if count == 1:
        return word
    return word + ("es" if word.endswith("s") else "s")
