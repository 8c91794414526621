"""What there is to choose from, read from the files themselves: their docstrings, signatures and options."""

import inspect
import re

from xformers_lab import config as configs
from xformers_lab import spec


def shelves() -> list[dict]:
    return [{"shelf": shelf, "choices": ", ".join(spec.names(shelf))} for shelf in spec.SHELVES]


def shelf(name: str) -> list[dict]:
    """One row per choice: name, options with defaults, what it can do where signatures tell, and its title."""
    return [_row(name, choice) for choice in spec.names(name)]


def _row(shelf: str, name: str) -> dict:
    found = spec.entry(shelf, name)
    options = spec.options(found)
    row: dict = {"name": name}
    if shelf == "attention":
        row |= _abilities(found) | {"error": _checked(name)}
    row["options"] = ":".join(f"{key}={_short(option.default)}" for key, option in options.items())
    return row | {"title": title(found)}


def _abilities(mechanism) -> dict:
    """What a mechanism is, costs and can do, from its docstring and signatures."""
    from xformers_lab.attention import Attention, stated, why_not_decode

    about = " ".join((inspect.getdoc(mechanism) or "").split())
    takes = mechanism.takes("mix" if mechanism.attend is Attention.attend else "attend")
    nature = re.search(r"\b(Exact|Approximate)\b", about)
    return {
        "kind": stated(mechanism, "Kind"),
        "time": _cost("Time", about),
        "memory": _cost("memory", about),
        "causal": not stated(mechanism, "Not causal"),
        "cross": not stated(mechanism, "Not cross") and not stated(mechanism, "One way"),
        "bias": "bias" in takes and not stated(mechanism, "No bias"),
        "decode": why_not_decode(mechanism) is None,
        "nature": nature.group().lower() if nature else "",
    }


def _cost(word: str, about: str) -> str:
    """The first O(...) after a word, with its brackets closed; "" where there is none."""
    found = re.search(rf"\b{word} (O\((?:[^()]|\([^()]*\))*\))", about)
    return found.group(1) if found else ""


def _checked(name: str) -> float | None:
    """The largest difference between a mechanism and its reference, relative to the largest output, as last checked."""
    from xformers_lab.check import remembered

    verdict = remembered.known(name)
    return verdict["error"] if verdict else None


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else spec.show(value)


def title(found) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.)])\s", text)[0] if len(text) > 160 else text


def page(name: str, words: list[str]) -> dict:
    """Everything about one choice, from whichever shelf has it; words give sizes (seq_len=64). Raises UsageError."""
    home, name = spec.home(name)
    choice = spec.resolve(home, name)
    found = spec.entry(home, choice.name)
    result = {
        "name": choice.name,
        "shelf": home,
        "about": inspect.getdoc(found) or "",
        "options": [
            {"name": option.name, "value": _short(choice.options[option.name]), "help": option.help}
            for option in spec.options(found).values()
        ],
    }
    if home == "attention":
        result |= _mechanism(name, configs.single(words))
    return result


def _mechanism(name: str, config: configs.Config) -> dict:
    """Cost and drawing of an attention mechanism at the sizes of a config."""
    from xformers_lab.model import size_of

    size = size_of(config)
    built = spec.build("attention", name, size)
    cost = built.cost(size.length, size.length)
    result = {
        "length": size.length,
        "cost": {"flops": cost.flops, "memory": cost.memory, "state": cost.state},
        "can": {word: able for word, able in _abilities(type(built)).items() if isinstance(able, bool)},
    }
    if built.not_causal():
        result["can"] |= {"causal": False, "decode": False}
    kind = config.model.model
    causal = kind == "auto" or spec.entry("model", spec.parse(kind).name).causal
    if (seen := sampled(built, causal=causal)) is not None:
        from xformers_lab.attention._engine import drawing

        which = f"head 1 of {len(seen)}" if len(seen) > 1 else "every head"
        result |= {"pattern": drawing.lines(seen[0]), "svg": drawing.svg(seen[0]), "drawn": which}
    return result


def sampled(mechanism, causal: bool):
    """(n, n) booleans: which keys a mechanism's queries see. One such array where all heads see the same, else one for
    each; None where no fixed pattern says it."""
    from xformers_lab.attention._engine import drawing

    causal = causal and not mechanism.not_causal()
    drawn = [mechanism.drawn(causal, head) for head in range(mechanism.size.heads)]
    if None in drawn:
        return None
    found = [drawing.sampled(one, mechanism.size.length) for one in drawn]
    return found if any((one != found[0]).any() for one in found) else found[:1]


def resolved(config: configs.Config) -> list[dict]:
    """Every key of a config with its value, in full spelling."""
    return [
        {
            "key": key,
            "value": spec.show(configs.canonical(key, configs.get(config, key))),
            "help": field.metadata["help"],
        }
        for key, (_, field, _) in configs.LEAVES.items()
    ]


def markdown() -> str:
    """Every shelf as a Markdown table: the catalogue of README."""
    head = ("attention", "kind", "time", "nature", "causal", "cross", "decode", "options", "what it is")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in shelf("attention"):
        can = " | ".join("yes" if row[word] else "" for word in ("causal", "cross", "decode"))
        options, what = f"`{row['options']}`" if row["options"] else "", row["title"].replace("|", "/")
        is_a = f"`{row['name']}` | {row['kind']} | {row['time']} | {row['nature']}"
        lines.append(f"| {is_a} | {can} | {options} | {what} |")
    lines += ["", "| shelf | choice | options | what it is |", "|---|---|---|---|"]
    for home in (home for home in spec.SHELVES if home != "attention"):
        for row in shelf(home):
            options = f"`{row['options']}`" if row["options"] else ""
            lines.append(f"| {home} | `{row['name']}` | {options} | {row['title'].replace('|', '/')} |")
    return "\n".join(lines)
