"""What there is to choose from, read from the files themselves: docstrings, signatures, options, class attributes."""

import contextlib
import inspect
import re
from typing import Any

import numpy as np

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.errors import Refused, UsageError, contained
from xformers_lab.tasks import SPLITS, Setting, Split


def shelves() -> list[dict]:
    """One row per shelf, with the names of its choices."""
    return [{"shelf": shelf, "choices": ", ".join(spec.names(shelf))} for shelf in spec.SHELVES]


def shelf(name: str) -> list[dict]:
    """One row per choice: name, options with defaults, what it can do where signatures tell, and its title."""
    return [_row(name, choice) for choice in spec.names(name)]


def _row(shelf: str, name: str) -> dict:
    entry = spec.entry(shelf, name)
    options = spec.options(entry)
    row: dict = {"name": name}
    if shelf == "attention":
        row |= _abilities(entry) | {"error": _checked(name)}
    row["options"] = ":".join(f"{key}={_short(option.default)}" for key, option in options.items())
    return row | {"title": title(entry)}


def _abilities(mechanism) -> dict:
    """What a mechanism is, costs and can do, from its class attributes and signatures."""
    from xformers_lab.attention import why_not_decode

    refuses, complexity = mechanism.refuses, mechanism.complexity
    return {
        "kind": mechanism.kind or "",
        "time": complexity.time if complexity else "",
        "memory": complexity.memory if complexity else "",
        "causal": "causal" not in refuses,
        "cross": "cross" not in refuses and "bidirectional" not in refuses,
        "bias": mechanism.accepts("bias"),
        "decode": why_not_decode(mechanism) is None,
        "packed": mechanism.accepts("documents"),
        "nature": _nature(mechanism).lower(),
    }


def _nature(mechanism) -> str:
    return "" if mechanism.exact is None else "Exact" if mechanism.exact else "Approximate"


def _facts(built) -> list[str]:
    """Lines that say what the class attributes of a mechanism hold, and what it refuses with the options it has."""
    from xformers_lab.attention import REFUSALS

    mechanism, refusals = type(built), built.refusals()
    lines = [f"Kind: {mechanism.kind}."] if mechanism.kind else []
    if costs := mechanism.complexity:
        keeps = f"; decoding keeps {costs.decoding}" if costs.decoding else ""
        time, memory = _with(costs.time, costs.time_note), _with(costs.memory, costs.memory_note)
        lines.append(f"Time {time}; memory {memory}{keeps}.")
    if nature := _nature(mechanism):
        lines.append(f"{_with(nature, mechanism.accuracy)}.")
    return lines + [f"{words}: {refusals[what]}." for what, words in REFUSALS.items() if what in refusals]


def _with(words: str, more: str) -> str:
    """Words and what goes on after them, which may begin with a comma, a colon or a semicolon."""
    return f"{words}{more}" if not more or more[0] in ",:;" else f"{words} {more}"


def _checked(name: str) -> float | None:
    """The largest difference between a mechanism and its reference, relative to the largest output, as last checked."""
    from xformers_lab.check import cache

    verdict = cache.known(name)
    return verdict["error"] if verdict else None


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else spec.show(value)


def title(entry: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(entry) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.)])\s", text)[0] if len(text) > 160 else text


def page(name: str, words: list[str]) -> dict:
    """Everything about one choice, from whichever shelf has it; words give sizes (seq_len=64). Raises UsageError."""
    home, name = spec.home(name)
    choice = spec.resolve(home, name)
    entry = spec.entry(home, choice.name)
    result = {
        "name": choice.name,
        "shelf": home,
        "about": inspect.getdoc(entry) or "",
        "options": [
            {"name": option.name, "value": _short(choice.options[option.name]), "help": option.help}
            for option in spec.options(entry).values()
        ],
    }
    if home == "attention":
        with contained():
            result |= _mechanism(name, result["about"], configs.single(words))
    return result


def _about(text: str, facts: list[str]) -> str:
    """A docstring with a paragraph of facts after its title and its formula, and before its options."""
    paragraphs = text.split("\n\n") if text else []
    first = next((i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("Options:")), len(paragraphs))
    at = min(2, first)
    return "\n\n".join([*paragraphs[:at], *["\n".join(facts)] * bool(facts), *paragraphs[at:]])


def _mechanism(name: str, text: str, config: configs.Config) -> dict:
    """What an attention mechanism with its docstring says of itself, its cost and drawing at the sizes of a config."""
    from flax import nnx

    from xformers_lab.model import size_of

    size = size_of(config)
    built = nnx.eval_shape(lambda: spec.build("attention", name, size))  # nothing compiles
    cost = built.cost(size.length, size.length)
    result = {
        "about": _about(text, _facts(built)),
        "length": size.length,
        "cost": {"flops": cost.flops, "memory": cost.memory, "state": cost.state},
        "can": {word: able for word, able in _abilities(type(built)).items() if isinstance(able, bool)},
    }
    if "causal" in built.refusals():
        result["can"] |= {"causal": False, "decode": False}
    kind = config.model.model
    causal = kind == "auto" or spec.entry("model", spec.parse(kind).name).causal
    try:
        result["kernels"] = _kernels(name, size, causal=causal and result["can"]["causal"])
    except Refused as reason:
        raise UsageError(str(reason)) from None
    if (seen := sampled(built, causal=causal)) is not None:
        from xformers_lab import drawing

        which = f"head 1 of {len(seen)}" if len(seen) > 1 else "every head"
        result |= {"pattern": drawing.lines(seen[0]), "svg": drawing.svg(seen[0]), "drawn": which}
    return result


def _kernels(name: str, size: Any, *, causal: bool) -> dict[str, str]:
    """What runs the layer on which platform, and why no kernel does; of mechanisms that a kernel may run. Raises
    Refused where the plan wants one that cannot."""
    import jax
    from flax import nnx

    from xformers_lab.attention._engine import kernels
    from xformers_lab.nn.plan import BLOCKS
    from xformers_lab.nn.platform import planned_for, platform

    def run(x):
        layer = spec.build("attention", name, size)
        layer.check_kernel()
        return layer(x, **({"causal": True} if causal else {}))[0]

    said, x = {}, jax.ShapeDtypeStruct((1, size.length, size.dim), size.dtype)
    for where in (platform(), *(each for each in kernels.OF_PLATFORM if each != platform())):
        wanted = contextlib.nullcontext() if where == platform() else planned_for(where)
        with wanted, kernels.noted() as ran:
            nnx.eval_shape(run, x)
        if ran:
            ran = {"the block engine" if each == BLOCKS else each: why for each, why in ran.items()}
            said[where] = ", ".join(f"{each} ({why})" if why else each for each, why in ran.items())
    return said


def sampled(mechanism: Any, causal: bool) -> list[np.ndarray] | None:
    """(n, n) booleans: which keys a mechanism's queries see. One such array where all heads see the same, else one for
    each; None where no fixed pattern says it."""
    from xformers_lab import drawing

    causal = causal and "causal" not in mechanism.refusals()
    drawn = [mechanism.drawn(causal, head) for head in range(mechanism.size.heads)]
    if None in drawn:
        return None
    samples = [drawing.sampled(one, mechanism.size.length) for one in drawn]
    return samples if any((one != samples[0]).any() for one in samples) else samples[:1]


def task(config: configs.Config, split: Split, number: int) -> dict:
    """Everything about the task of a config at its length, with one example of a split; raises UsageError.

    Examples are numbered from 0 as an evaluation numbers them, whatever `batch` and `seed` are.
    """
    import jax

    from xformers_lab.train import evaluation, prefetch

    where = f"task={config.task} seq_len={config.seq_len}"
    setting = Setting(config.seq_len, evaluation.UNIT)
    built = spec.build("task", config.task, setting, where=where)
    with contained():
        sizes = {name: built.examples(name) for name in SPLITS}
        size = sizes[split]
        if number < 0 or (size is not None and number >= size):
            last = "" if size is None else f" to {size - 1}"
            raise UsageError(f"--number {number}: the {split} split of {where} has examples 0{last or ' and on'}")
        if size is None:
            step, row = divmod(number, evaluation.UNIT)
            batch = prefetch.checked(built, split, step)
        else:
            batch, row = built.take(split, np.array([number])), 0
        example = jax.tree.map(lambda array: np.asarray(array)[row : row + 1], batch)
        shown, data = built.show(example), built.describe()
        answers = {name: np.asarray(getattr(example, name))[0].tolist() for name in ("inputs", "targets", "weights")}
        return {
            "task": configs.canonical("task", config.task),
            "title": title(type(built)),
            "seq_len": config.seq_len,
            "vocab": built.vocab,
            "outputs": built.outputs,
            "target": built.target,
            "models": list(built.kinds),
            "metric": built.metric_name,
            "higher_is_better": built.higher_is_better,
            "chance": built.chance,
            "splits": sizes,
            "data": {key: value for key, value in data.items() if key != "reading"},
            "reading": built.reading(),
            "example": {"split": split, "number": number, "shown": shown, **answers},
        }


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
    """Every shelf as a Markdown table: what docs/catalogue.md holds."""
    head = ("attention", "kind", "time", "nature", "causal", "cross", "decode", "packed", "options", "what it is")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in shelf("attention"):
        can = " | ".join("yes" if row[word] else "" for word in ("causal", "cross", "decode", "packed"))
        options, what = f"`{row['options']}`" if row["options"] else "", row["title"].replace("|", "/")
        is_a = f"`{row['name']}` | {row['kind']} | {row['time']} | {row['nature']}"
        lines.append(f"| {is_a} | {can} | {options} | {what} |")
    lines += ["", "| shelf | choice | options | what it is |", "|---|---|---|---|"]
    for home in (home for home in spec.SHELVES if home != "attention"):
        for row in shelf(home):
            options = f"`{row['options']}`" if row["options"] else ""
            lines.append(f"| {home} | `{row['name']}` | {options} | {row['title'].replace('|', '/')} |")
    return "\n".join(lines)
