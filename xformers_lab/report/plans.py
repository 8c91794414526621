"""Plans for a terminal: one with its bytes and what its devices exchange, several as a line each. See `plan.rows`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from xformers_lab.report import human, rows
from xformers_lab.report.listing import print_listing

FITS = {True: "yes", False: "NO", None: human.NONE}
# What bytes of a device are, in words; those that are not here are called by their key.
WORDS = {
    "cache": "cache of decoding",
    "other": "batch and what else a step is given",
    "activations": "activations and gradients",
    "results": "results in no argument's place",
    "padding": "padding of what a step is given",
    "program": "the program itself",
}


def print_plans(planned: Sequence[Mapping[str, Any]], varied: Sequence[str], console: Console | None = None) -> None:
    """One plan in full, or several side by side, with what lengths fit where there are several."""
    console = console or Console()
    say = lambda line: console.print(human.plain(line), markup=False, highlight=False, soft_wrap=True)
    if len(planned) == 1 and planned[0]["status"] == "ok":
        (row,) = planned
        print_listing(_in_bytes(row), console)
        if row.get("collectives"):
            console.print()
            print_listing(_exchanged(row), console)
        console.print()
        for line in _about(row):
            say(line)
        return
    lines = [_line(row, named(planned, varied)) for row in planned]
    told = {key for line in lines for key, text in line.items() if text != human.NONE}
    print_listing([{key: text for key, text in line.items() if key in told} for line in lines], console)
    for line in [*_lengths(planned, varied), *_notes(planned)]:
        say(line)


def named(planned: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[str]:
    """The keys that tell rows apart."""
    differing = [key for key in ("target", "program") if len({row[key] for row in planned}) > 1]
    return [*rows.named_by(varied), *(["seq_len"] if any("longest" in row for row in planned) else []), *differing]


def _line(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """One plan among several."""
    line = {key: rows.shown(dict(row), key) for key in keys}
    if row["status"] != "ok":
        return line | {"fits": human.NONE, "reason": human.outcome(dict(row))}
    if "longest" in row:
        line["seq_len"] = human.NONE if row["longest"] is None else f"{row['longest']:,}"
        line["too long"] = human.NONE if row["too_long"] is None else f"{row['too_long']:,}"
    else:
        line["fits"] = FITS[row.get("fits")]
    sizes = row["bytes"]
    line["on each"] = human.size(sizes.get("total"))
    line["of"] = human.size(row["memory"])
    line |= {part: human.size(sizes.get(part)) for part in ("parameters", "optimizer", "activations")}
    line |= {"FLOPs/token": human.count(row["flops_per_token"]), "FLOPs on each": human.count(row["flops_per_device"])}
    found = row.get("collectives")
    line["exchanged"] = human.NONE if found is None else human.size(sum(each["bytes"] for each in found))
    line["kernel"] = row.get("kernel") or human.NONE
    estimate = row.get("estimate") or {}
    line["step at least (estimate)"] = human.duration(estimate.get("seconds"))
    line["compiling"] = human.duration(row.get("compile_seconds", row.get("lower_seconds")))
    return line


def _in_bytes(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The bytes of one device by what they are."""
    memory = row["memory"]
    share = lambda size: human.NONE if not memory else f"{100 * size / memory:.1f} %"
    lines = [
        {"bytes on each device": WORDS.get(part, part), "": human.size(size), "of its memory": share(size)}
        for part, size in row["bytes"].items()
        if size or part == "total"
    ]
    if memory is not None:
        lines.append({"bytes on each device": "memory of the device", "": human.size(memory), "of its memory": ""})
    return lines


def _exchanged(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "exchanged by each device": each["kind"],
            "times": f"{each['count']:,}",
            "bytes": human.size(each["bytes"]),
            "": f"{each['uncounted']} in loops of unknown length count once" if each["uncounted"] else "",
        }
        for each in row["collectives"]
    ]


def _about(row: Mapping[str, Any]) -> list[str]:
    count, estimate = row["devices"], row.get("estimate")
    axes = " x ".join(f"{axis} {size}" for axis, size in row["axes"].items())
    lines = [f"{row['target']}: {count} device{'s' * (count > 1)}{f', {axes}' if axes else ''}"]
    if row.get("fits") is not None:
        lines.append("it fits" if row["fits"] else f"it does NOT fit{f': {why}' if (why := row.get('why')) else ''}")
    if "longest" in row:
        lines.append(_longest(row))
    if row.get("kernel") is not None:
        lines.append(f"attention over a pattern of positions is run by {row['kernel'].replace('+', ' and ')}")
    if row["flops_per_token"] is not None:
        each = human.count(row["flops_per_device"])
        lines.append(f"{human.count(row['flops_per_token'])} FLOPs of each token, {each} on each device in a step")
    if estimate is not None:
        parts = {"products": "compute", "memory": "memory", "exchange": "exchange"}
        said = ", ".join(f"{word} {human.duration(estimate[f'{key}_seconds'])}" for word, key in parts.items())
        rate = human.count(estimate["tokens_per_second"])
        lines.append(
            f"estimate, by published rates: a step takes {human.duration(estimate['seconds'])} or more ({said}), so at "
            f"most {rate} tokens a second"
        )
    if "lower_seconds" in row:
        lines.append(f"it lowers for a GPU in {human.duration(row['lower_seconds'])}; without one, no more is known")
    elif row.get("compile_seconds") is not None:
        lines.append(f"compiled in {human.duration(row['compile_seconds'])}")
    return lines


def _longest(row: Mapping[str, Any]) -> str:
    fits, too_long = row["longest"], row["too_long"]
    more = "" if too_long is None else f"; {too_long:,} do not"
    if fits is None:
        return f"no length that was tried fits{more}"
    return f"{fits:,} tokens fit{more} (tried: {human.listing([f'{length:,}' for length in row['tried']], 24)})"


def _lengths(planned: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[str]:
    """The longest length that fits, of each series of several."""
    keys = [key for key in named(planned, varied) if key != "seq_len"]
    series: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in planned:
        if row.get("fits") is not None and "longest" not in row:
            series.setdefault(tuple(rows.shown(dict(row), key) for key in keys), []).append(row)
    lines = []
    for name, of_series in series.items():
        if len(lengths := {row["seq_len"]: row["fits"] for row in of_series}) > 1:
            fitting = [length for length, fits in lengths.items() if fits]
            said = f"up to {max(fitting):,} tokens fit" if fitting else "none of these lengths fits"
            lines.append(f"{' '.join(name)}: {said}")
    return lines


def _notes(planned: Sequence[Mapping[str, Any]]) -> list[str]:
    """What figures need said of them."""
    lines = []
    if any(row.get("estimate") for row in planned):
        lines.append("note: times of steps are estimates, from published rates; nothing has run")
    uncounted = sum(each["uncounted"] for row in planned for each in row.get("collectives") or ())
    if uncounted:
        lines.append(f"note: {uncounted} collectives in loops of unknown length count once")
    if any("lower_seconds" in row for row in planned):
        lines.append("note: for a GPU programs are lowered and not compiled, so that what a step needs is not known")
    return lines
