"""What a run is: frozen dataclasses, every knob visible with its default and a one-line help.

Leaf names are unique, so `layers=4` is enough on the command line; `model.layers=4` says the same.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xformers_lab import layouts, named_run, sources, spec
from xformers_lab.errors import BrokenChoice, UsageError, contained, nearest, said

MOST_LAYERS = 2048  # twice the deepest Transformer that was published
MOST_OF_CYCLE = 64  # every choice of a cycle is compiled apart


def knob(
    default: Any,
    help: str,
    *,
    shelf: str | None = None,
    cycle: bool = False,
    least: float | None = None,
    below: float | None = None,
    same_result: bool = False,
    folder: bool = False,
    lengths: bool = False,
    run: bool = False,
    label: bool = False,
    layout: bool = False,
    compiled: bool = True,
    later: bool = False,
    later_options: bool = False,
) -> Any:
    """A field: `shelf` makes it a choice, `cycle` lets `+` cycle choices over layers; `least` and `below` bound it.

    `same_result` marks a field that changes nothing in what a run computes, so it is no part of the run's id; `folder`
    a path, which is one value whatever stands in it; `lengths` numbers of tokens with + between; `run` another run,
    of which the parameters count and not the folder; `label` words for people, that tell no config from another;
    `layout` axes of devices with + between. A field that is not `compiled` is no part of a compiled program, which runs
    that differ in nothing else share. One that came `later` than ids were given is no part of the id at its default, so
    that runs from before keep theirs; with `later_options` that holds for each option of its choices.
    """
    rules = {"help": help, "shelf": shelf, "cycle": cycle, "least": least, "below": below, "lengths": lengths}
    same_result = same_result or label
    rules |= {"run": run, "same_result": same_result, "folder": folder, "compiled": compiled and not same_result}
    rules |= {"label": label, "layout": layout, "later": later, "later_options": later_options}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True)
class Model:
    model: str = knob("auto", "encoder, decoder, another kind, or auto: what the task is made for", shelf="model")
    attention: str = knob(
        "full",
        "how positions mix; a+b cycles mechanisms over the layers, 5*a+b has five layers of a, then one of b",
        shelf="attention",
        cycle=True,
    )
    position: str = knob(
        "learned",
        "where a token is; a+b cycles positions over the layers, as of attention",
        shelf="position",
        cycle=True,
    )
    norm: str = knob("pre", "residual placement and normaliser", shelf="norm")
    ffn: str = knob("mlp", "what one position computes", shelf="ffn")
    depth: str = knob("fixed", "how many layers a token gets", shelf="depth")
    memory: str = knob("none", "what survives a segment", shelf="memory")
    # The greatest sizes: beyond them products of two overflow in the compiler, which ends the process, or shapes alone
    # take minutes.
    dim: int = knob(64, "model width D", least=1, below=2**20)
    layers: int = knob(2, "number of layers L", least=1, below=MOST_LAYERS + 1)
    heads: int = knob(2, "query heads N", least=1, below=2**16)
    kv_heads: int | None = knob(None, "key/value heads K (none: as many as heads)", least=1)
    conv: int | None = knob(
        None,
        "positions that a short convolution of queries, keys and values sees (none: there is no convolution)",
        least=2,
        below=65,
        later=True,
    )
    qk_norm: typing.Literal["none", "rms", "l2"] = knob(
        "none",
        "norm of each head's queries and keys: root mean square with learned weights, or length with a learned scale",
        later=True,
    )
    log_n: int | typing.Literal["learned"] | None = knob(
        None,
        "scores times log n / log LOG_N for a query that sees n keys, or learned: times s log n, with s of every head",
        least=2,
        later=True,
    )
    value_residual: typing.Literal["none", "half", "learned", "only"] = knob(
        "none",
        "values of the first layer in those above: half of each, learned shares of both, or only those of the first",
        later=True,
    )
    embed_norm: typing.Literal["none", "layernorm", "rmsnorm"] = knob(
        "none", "normaliser of what the first layer is given, embeddings with their positions", later=True
    )
    predict: int = knob(
        1,
        "how many tokens each position of a decoder predicts in training: the next, and those behind it by heads of "
        "their own, which share the trunk",
        least=1,
        below=65,
        later=True,
    )
    predict_by: typing.Literal["parallel", "sequential"] = knob(
        "parallel",
        "what the further heads of predict are on: all on the trunk, or each on the one before it and its token",
        later=True,
    )
    predict_weight: float = knob(1.0, "weight of the loss of each further head of predict", least=0, later=True)
    parametrisation: typing.Literal["standard", "mup"] = knob(
        "standard",
        "how first parameters and rates go with the width; mup: so that one lr serves all widths, see base_dim",
        later=True,
    )
    base_dim: int | None = knob(
        None, "with parametrisation=mup, the width that lr was chosen at", least=1, below=2**20, later=True
    )
    dropout: float = knob(0.0, "dropout on the output of each sub-layer", least=0, below=1)
    dtype: typing.Literal["float32", "bfloat16"] = knob("float32", "compute type; parameters stay float32")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = knob(400, "optimizer steps", least=1, compiled=False)
    batch: int = knob(64, "sequences per step B, over all devices", least=1, below=2**24)
    accumulate: int = knob(1, "split each batch into this many equal parts, one after the other", least=1)
    remat: typing.Literal["none", "dots", "full"] = knob(
        "none",
        "what layers compute again in the backward pass: nothing, all but their linear layers, or all (less memory)",
        later=True,
    )
    kernel: typing.Literal["auto", "blocks", "splash", "cudnn", "pallas"] = knob(
        "auto",
        "what runs attention over a pattern of positions: what the device has, or the block engine, or another kernel, "
        "which is refused where it cannot",
        later=True,
    )
    optimizer: str = knob("adamw", "update rule", shelf="optimizer", later_options=True)
    lr: float = knob(3e-3, "peak learning rate", least=0, compiled=False)
    schedule: typing.Literal["cosine", "constant", "linear", "rsqrt", "wsd"] = knob(
        "cosine",
        "learning rate after the warm-up: towards 0 along a half cosine or a line, constant, by the inverse root of "
        "the step, or constant and at last along a line (wsd, with cooldown)",
    )
    warmup: float = knob(0.1, "share of the steps that warms the learning rate up", least=0, below=1, compiled=False)
    cooldown: float = knob(
        0.2,
        "share of the steps, the last ones, in which schedule=wsd falls",
        least=0,
        below=1,
        compiled=False,
        later=True,
    )
    weight_decay: float = knob(0.01, "decoupled weight decay on matrices", least=0, compiled=False)
    label_smoothing: float = knob(
        0.0, "share of each target that all classes get alike, in the training loss", least=0, below=1, later=True
    )
    z_loss: float = knob(
        0.0, "weight of the squared log of the softmax's sum, in the training loss", least=0, later=True
    )
    clip: float = knob(1.0, "largest global gradient norm (0: no clipping)", least=0, compiled=False)
    ema: float | None = knob(
        None,
        "rate of a moving average of the parameters, which is what is scored (none: the last ones are)",
        least=0,
        below=1,
        compiled=False,
        later=True,
    )
    eval_every: int = knob(
        0, "validate every so many steps, on at most 1,024 examples (0: only at the end)", least=0, compiled=False
    )
    eval_batches: int | typing.Literal["all"] = knob(
        "all",
        "examples to score: all of the split (256 of one without end), or so many times 32",
        least=1,
        compiled=False,
    )
    select: typing.Literal["last", "best"] = knob(
        "last", "parameters that count: of the last step, or of the best validation (eval_every)", compiled=False
    )
    score: typing.Literal["test", "validation"] = knob(
        "test",
        "split that the finished run is scored on; with validation the test split cannot be read",
        compiled=False,
    )
    save_every: int = knob(0, "checkpoint every so many steps (0: only at the end)", least=0, same_result=True)
    layout: str = knob(
        "data",
        "axes of the devices, + between: data, fsdp, tensor, sequence, experts, each with a size or not "
        "(data:2+tensor:4); or pmap",
        layout=True,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = knob("mqar:pairs=4", "data, loss and metric", shelf="task")
    seq_len: int = knob(64, "tokens per sequence T", least=1, below=2**22)
    test_len: str | None = knob(
        None, "score the trained model at these lengths too, + between them: 128+256", lengths=True, compiled=False
    )
    seed: int = knob(0, "seed of dropout, of the parameters and of the data", least=0, below=2**32, compiled=False)
    init_seed: int | None = knob(None, "seed of the parameters (none: seed)", least=0, below=2**32, compiled=False)
    data_seed: int | None = knob(
        None, "seed of the training data and their order (none: seed)", least=0, below=2**32, compiled=False
    )
    init: str | None = knob(
        None, "another run's folder, whose parameters are the first ones where they fit", run=True, compiled=False
    )
    runs: str = knob("runs", "folder that holds the runs", same_result=True, folder=True)
    name: str | None = knob(None, "what the run is called, wherever a run is named", label=True)
    tags: str | None = knob(None, "words that runs are found by, + between them: lr+draft", label=True)
    stall: float | None = knob(
        None,
        "seconds without a step that end a run (none: 60, or 50 x the median step if longer; 0: no limit)",
        least=0,
        same_result=True,
    )
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a comparison holds equal, tunes and repeats: words of the whole, no part of any run."""

    match: str = knob(
        "none",
        "params, flops, state or wallclock, within 2 % of the first variant's, or of params:to=linear",
    )
    tune: str = knob("none", "tuned for every variant alike: lr, lr,weight_decay, or lr:points=7:share=0.5:seeds=2")
    seeds: int | None = knob(
        None, "runs of every variant, with seed=0, 1, ... (none: as seed= says)", least=1, below=10_000
    )


@dataclasses.dataclass(frozen=True)
class Derived:
    """What words may say in place of a key, which follows from it: no part of a config."""

    tokens: int | None = knob(
        None, "tokens per step, in place of batch: batch = tokens / seq_len", least=1, below=2**40
    )
    head: int | None = knob(None, "size of a head H, in place of heads: heads = dim / head", least=1, below=2**20)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several processes this is, that train one run together: no part of a config, for a run is the same
    wherever it runs."""

    coordinator: str | None = knob(
        None, "HOST:PORT of process 0, where all processes meet; auto: as jax finds it in the cluster"
    )
    processes: int | None = knob(
        None, "how many processes train the run (none: as many as SLURM or Open MPI says, or a TPU pod)", least=1
    )
    process: int | None = knob(None, "which of them this one is, from 0 on", least=0)
    wait: float | None = knob(
        None, "seconds that processes wait for one another (none: 300 to meet, 60 for a sign of life)", least=1
    )


def _fields(
    cls: type = Config, path: tuple[str, ...] = ()
) -> dict[str, tuple[tuple[str, ...], dataclasses.Field, object]]:
    """Every leaf by its unique name: its path in the tree, its field, its type."""
    hints, leaves = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            leaves |= _fields(hints[field.name], (*path, field.name))
        else:
            leaves[field.name] = ((*path, field.name), field, hints[field.name])
    return leaves


LEAVES = _fields()
KEYS = tuple(LEAVES)
STUDY = _fields(Study)
DERIVED = _fields(Derived)
PLACE = _fields(Place)
_WORDS = LEAVES | STUDY | DERIVED | PLACE  # whatever may stand in front of =
# What recurrent and convolutional models and a bag of tokens have none of.
AXES = ("attention", "position", "norm", "ffn", "depth", "memory", "kv_heads")
AXES += ("conv", "qk_norm", "log_n", "value_residual", "embed_norm", "predict")
# The leaf that each derived word says.
IN_PLACE_OF = {"tokens": "batch", "head": "heads"}
MOST_CELLS = 100_000
# The value of a choice's key that stands for its whole shelf.
EVERY = "all"
LARGEST_FILE = 2**25  # bytes
LARGEST = 2**31  # counts are 32-bit numbers on every device


def get(config: Config, key: str) -> Any:
    """The value of a leaf by its unique name."""
    value = config
    for name in LEAVES[key][0]:
        value = getattr(value, name)
    return value


def seed_of(config: Config, key: typing.Literal["init_seed", "data_seed"]) -> int:
    """The seed of the parameters or of the data, which are that of the run where they are not told apart."""
    value = get(config, key)
    return config.seed if value is None else value


def refuse_selection(config: Config) -> None:
    """Raises UsageError where the best validation is to be chosen, and there is none while it trains."""
    if config.train.select == "best" and not config.train.eval_every:
        often = max(config.train.steps // 10, 1)
        raise UsageError(f"select=best chooses among validations: say how often, such as eval_every={often}")


def refuse_schedule(config: Config) -> None:
    """Raises UsageError where the parts of a schedule overlap, or a part is asked for that it has not."""
    train, default = config.train, LEAVES["cooldown"][1].default
    if train.schedule != "wsd":
        if train.cooldown != default:
            raise UsageError(
                f"cooldown={train.cooldown:g}: schedule={train.schedule} has none; say schedule=wsd, or leave it out"
            )
    elif train.warmup + train.cooldown > 1:
        raise UsageError(
            f"warmup={train.warmup:g} cooldown={train.cooldown:g}: together more than all steps; give them shares that "
            "add up to at most 1"
        )


def refuse_heads(config: Config) -> None:
    """Raises UsageError where something is said of further heads, and there are none."""
    if config.model.predict > 1:
        return
    for key in ("predict_by", "predict_weight"):
        if (value := get(config, key)) != LEAVES[key][1].default:
            words = f"{key}={spec.show(value)}"
            raise UsageError(f"{words}: with predict=1 there is no further head; say predict=4, or leave it out")


def edit(config: Config, **changes: Any) -> Config:
    """A copy with leaves changed, typed and checked; raises UsageError."""
    for key, value in changes.items():
        config = _replace(config, LEAVES[key][0], typed(key, value))
    return config


def typed(key: str, value: Any, where: str = "") -> Any:
    """`value` as the type of leaf `key`, checked: a choice must exist, with options that it declares."""
    where = where or f"{key}={spec.show(value)}"
    _, field, kind = _WORDS[key]
    if field.metadata["lengths"]:
        return _lengths(value, where)
    if field.metadata["label"]:
        return _label(key, value, where)
    if field.metadata["layout"]:
        return layouts.canonical(str(value), where)
    value = spec.coerce(value, kind, where)
    if field.metadata["run"]:
        return None if value is None else named_run.named(value, where)
    if field.metadata["cycle"]:
        value = "+".join(spec.cycle(str(value), where, most=MOST_OF_CYCLE))
    least, below = field.metadata["least"], field.metadata["below"]
    number = value if isinstance(value, (int, float)) else None
    if number is not None and least is not None and number < least:
        raise UsageError(f"{where}: {key} must be at least {least}")
    below = LARGEST if below is None and isinstance(value, int) else below
    if number is not None and below is not None and number >= below:
        raise UsageError(f"{where}: {key} must be below {below:,}")
    if field.metadata["shelf"]:
        canonical(key, value, where)
    return str(spec.located(str(value), where)) if field.metadata["folder"] else value


def lengths(text: str | None) -> list[int]:
    """The lengths that a value of test_len names."""
    return [] if text is None else [int(part) for part in text.split("+")]


def canonical(key: str, value: Any, where: str = "") -> Any:
    """A leaf's value with every option of a choice spelled out, so that equal choices read equal."""
    _, field, _ = LEAVES[key]
    if not field.metadata["shelf"] or (key == "model" and value == "auto"):
        return value
    parts = spec.cycle(value, where, most=MOST_OF_CYCLE) if field.metadata["cycle"] else [value]
    resolved = {part: str(spec.resolve(field.metadata["shelf"], part, where)) for part in dict.fromkeys(parts)}
    return "+".join(map(resolved.__getitem__, parts))


def to_dict(config: Config) -> dict:
    """The config as nested dicts, as JSON has it."""
    return dataclasses.asdict(config)


def from_dict(tree: Mapping, where: str = "config") -> Config:
    """The one config of a nested or flat mapping; raises UsageError on anything unknown or ill-typed.

    Text is taken as it is: a comma in it is a comma.
    """
    axes = axes_of(tree, where, sweeps=False)
    for key, values in axes.items():
        if len(values) != 1:
            raise UsageError(f"{where}: {key} has {len(values)} values; only compare and bench sweep")
    (config,) = grid([{}], axes)
    return config


def stored(path: pathlib.Path, *, trust: bool = False) -> Config:
    """The config that a run left in a file; raises UsageError where it is none, or names code outside the package that
    is not what the run was trained with, unless `trust`."""
    tree = _tree(path, str(path))
    record = path.with_name("sources.json")
    trusted = _tree(record, str(record)) if not trust and record.is_file() else {}
    if not trust and (outside := sources.differing(tree, trusted)):
        raise UsageError(f"{path}: names {outside}: look at what it is, then --trust runs it")
    return from_dict(tree, str(path))


def identity(config: Config) -> str:
    """The run's id: a hash of everything that decides its result, with the source of choices outside the package."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()[:12]


def decisive(config: Config) -> dict[str, Any]:
    """Everything that decides a run's result: each leaf spelled out, and a hash of the source of a choice outside."""
    keys = [key for key, (_, field, _) in LEAVES.items() if not field.metadata["same_result"]]
    # Told apart or not, equal seeds are the same run.
    same = [key for key in ("init_seed", "data_seed") if seed_of(config, key) == config.seed]
    same += [key for key in keys if LEAVES[key][1].metadata["later"] and get(config, key) == LEAVES[key][1].default]
    return _spelled(config, [key for key in keys if key not in same])


def compiled(config: Config) -> dict[str, Any]:
    """What decides the programs that a run compiles, as `decisive` has it."""
    return _spelled(config, [key for key, (_, field, _) in LEAVES.items() if field.metadata["compiled"]])


def _spelled(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """Leaves spelled out, and a hash of the source of each choice outside the package."""
    leaves = {}
    for key in keys:
        _, field, _ = LEAVES[key]
        leaves[key] = value = canonical(key, get(config, key))
        if field.metadata["later_options"]:
            leaves[key] = value = _brief(field.metadata["shelf"], value)
        elif field.metadata["shelf"] and value != "auto":
            value = "+".join(_former(field.metadata["shelf"], part) for part in spec.split(str(value), "+"))
            leaves[key] = value
        if field.metadata["run"] and value is not None:
            leaves[key] = named_run.parts(value)[1]
        if field.metadata["layout"]:
            leaves[key] = layouts.former(str(value))
        if field.metadata["shelf"] and value != "auto":
            parts = spec.split(str(value), "+")
            digests = [spec.digest(field.metadata["shelf"], part) for part in parts]
            if any(digests):
                leaves[f"{key} source"] = digests
            outermost = {spec.parse(part).name for part in parts}
            # Such as a normaliser of one's own, the option of a placement.
            if inner := [digest for name, digest in sources.of(value).items() if name not in outermost]:
                leaves[f"{key} option source"] = inner
    return leaves


def _brief(shelf: str, value: str) -> str:
    """A canonical choice without the options that are at their defaults."""
    return _without_defaults(shelf, value, spec.options(spec.entry(shelf, spec.parse(value).name)))


def _former(shelf: str, value: str) -> str:
    """A canonical choice as runs from before have it: without options at their defaults that came later than ids were
    given, which its class names in `later_options`."""
    later = getattr(spec.entry(shelf, spec.parse(value).name), "later_options", ())
    return _without_defaults(shelf, value, later) if later else value


def _without_defaults(shelf: str, value: str, names: Iterable[str]) -> str:
    """A choice without those of these options that are at their defaults."""
    choice = spec.resolve(shelf, value)
    declared = spec.options(spec.entry(shelf, choice.name))
    dropped = {name for name in names if choice.options[name] == declared[name].default}
    return str(spec.Choice(choice.name, {key: choice.options[key] for key in choice.options if key not in dropped}))


def folder(config: Config) -> pathlib.Path:
    """Where the run lives: runs/<task>/<id>."""
    return pathlib.Path(config.runs) / pathlib.Path(spec.parse(config.task).name).stem / identity(config)


# ---- sweeps: every axis is a list of values ---------------------------------------------------------------------


Item = str | Mapping[str, Any] | Config | Sequence[Mapping[str, Any] | Config]
"""What `study` reads: a word as on the command line; or, from Python, keys with their values, a config, or a list of
these, as a recipe has it."""


@dataclasses.dataclass(frozen=True)
class Words:
    """What words say. bases: the configs of recipes that have several; given: axes of the other files and words, in
    their order; study: what holds for all of them."""

    bases: list[dict[str, list]]
    given: list[dict[str, list]]
    study: Study


def sweep(words: Iterable[Item], *, trust: bool = False) -> tuple[list[Config], list[str]]:
    """The grid of configs that words describe, and the keys that vary.

    Words of the command line are `key=value`, `key=a,b,c`, `key=1..8`, `key=1..8:x2`, `key=1..8:+2`,
    `@file.toml|yaml|json`, or a Python recipe `@file.py` that defines `configs`. From Python, mappings, configs and
    lists of them are as good; see `Item`. Later words win over earlier ones. A value with a comma in it stands in
    brackets. A file of keys and values that names code outside the package is refused, unless `trust`. So are the keys
    of a study, which `study` reads.
    """
    configs, asked = _gridded(words, trust=trust)
    if named := [key for key in STUDY if getattr(asked, key) != getattr(Study(), key)]:
        raise UsageError(f"{named[0]}= is a word of a study: only compare, ablate and scale take it")
    return configs, varied(configs)


def study(words: Iterable[Item], *, trust: bool = False) -> tuple[list[Config], list[str], Study]:
    """What `sweep` gives, and the keys of the study among the words and at the top of files. A name is of one run: it
    is refused among the words, and left out of files, which a run may have left."""
    words = list(words)
    refuse_name(words)
    configs, asked = _gridded(words, trust=trust)
    configs = list(dict.fromkeys(edit(config, name=None) for config in configs))
    return configs, varied(configs), asked


def refuse_name(words: Iterable[Item]) -> None:
    """Raises UsageError where words, or what stands for them, make many runs and name one."""
    for word in words:
        name = word.get("name") if isinstance(word, Mapping) else None
        if (isinstance(word, str) and word.startswith("name=")) or name is not None:
            raise UsageError(
                f"{word if isinstance(word, str) else f'name={name}'}: a name is of one run, and this command makes "
                "many; tags= marks them all"
            )


def _gridded(words: Iterable[Item], *, trust: bool) -> tuple[list[Config], Study]:
    """The grid that words describe, and the keys of the study among them."""
    words = list(words)
    read = gathered(words, trust=trust)
    axes: dict[str, list] = {}
    for given in read.given:
        axes = over(axes, given)
    if read.study.seeds is not None:
        # A file that a run left says seed=0, as it says all defaults.
        typed_out = any(
            word.startswith("seed=") if isinstance(word, str) else isinstance(word, Mapping) and "seed" in word
            for word in words
        )
        if typed_out or any(given.get("seed", [0]) != [0] for given in (*read.bases, axes)):
            raise UsageError(f"seeds={read.study.seeds} and seed= both say which seeds: leave one out")
        axes["seed"] = list(range(read.study.seeds))
    return grid(read.bases, axes), read.study


def gathered(words: Iterable[Item], *, trust: bool = False) -> Words:
    """The words as they stand, every value typed; raises UsageError."""
    bases, given, asked = [{}], [], {}
    for word in words:
        if not isinstance(word, str) or word.startswith("@"):
            listed, of_study = load(word[1:], trust=trust) if isinstance(word, str) else _structured(word)
            asked |= of_study
            if len(listed) == 1:
                given.append(listed[0])
            else:
                bases = [over(base, more) for base in bases for more in listed]
            continue
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f'"{word}" is not key=value or @file')
        if text == "":
            raise UsageError(f'"{word}" has no value')
        if key in STUDY:
            asked[key] = typed(key, text, word)
            continue
        key = _leaf(key, word)
        given.append({key: _typed_all(key, _spread(key, text, word), text)})
    _refuse_both({word.partition("=")[0].rpartition(".")[2] for word in words if isinstance(word, str)}, "the words")
    return Words(bases, given, Study(**asked))


def over(axes: Mapping[str, list], later: Mapping[str, list]) -> dict[str, list]:
    """Axes with later ones over them; of two that say the same, as tokens and batch, the later one counts."""
    unsaid = IN_PLACE_OF | {key: derived for derived, key in IN_PLACE_OF.items()}
    dropped = {unsaid[key] for key, values in later.items() if key in unsaid and values != [None]}
    return {key: values for key, values in axes.items() if key not in dropped} | dict(later)


def batch_of(tokens: int, seq_len: int) -> int:
    """The batch that has so many tokens; raises UsageError where no batch has."""
    batch, left = divmod(tokens, seq_len)
    if batch and not left:
        return batch
    near = f"{batch * seq_len} or " if batch else ""
    raise UsageError(
        f"tokens={tokens}: no whole number of sequences of seq_len={seq_len} has so many; "
        f"say tokens={near}{(batch + 1) * seq_len}"
    )


def heads_of(head: int, dim: int) -> int:
    """The heads that have so many numbers each; raises UsageError where a width is no whole number of them."""
    if dim % head:
        raise UsageError(f"head={head}: dim={dim} is no whole number of heads of that size; say one that divides it")
    return dim // head


def derive(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Values of leaves, with those that derived words stand for in their place."""
    found = {key: value for key, value in leaves.items() if key not in DERIVED}
    says = lambda key: leaves.get(key, get(Config(), key))
    if (tokens := leaves.get("tokens")) is not None:
        found["batch"] = batch_of(tokens, says("seq_len"))
    if (head := leaves.get("head")) is not None:
        found["heads"] = heads_of(head, says("dim"))
    return found


def _refuse_both(keys: Iterable[str], where: str) -> None:
    """Raises UsageError where one place says the same twice."""
    keys = set(keys)
    for derived, key in IN_PLACE_OF.items():
        if {derived, key} <= keys:
            what = "how large a step is" if derived == "tokens" else "how many heads there are"
            raise UsageError(f"{where}: {derived}= and {key}= both say {what}: leave one out")


def grid(bases: list[dict[str, list]], axes: dict[str, list]) -> list[Config]:
    """Every combination of the values of axes on every base, each once."""
    cells = sum(math.prod(map(len, over(base, axes).values())) for base in bases)
    if cells > MOST_CELLS:
        raise UsageError(f"these words make {cells:,} cells; at most {MOST_CELLS:,} at once")
    configs: dict[Config, None] = {}
    for base in bases:
        merged = over(base, axes)
        for values in itertools.product(*merged.values()):
            configs[edit(Config(), **derive(dict(zip(merged, values, strict=True))))] = None
    return list(configs)


def varied(configs: list[Config]) -> list[str]:
    """The keys that tell configs apart: task, length and seed, and whatever differs at equal task and length."""
    return differing([{key: get(config, key) for key in KEYS} for config in configs])


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """`varied` of configs that are mappings of every leaf's unique name to its value."""
    frame = ("task", "seq_len", "seed")
    groups: dict[tuple, list[Mapping]] = {}
    for config in configs:
        groups.setdefault((config["task"], config["seq_len"]), []).append(config)
    differs = lambda key, among: len({config[key] for config in among}) > 1
    return [
        key
        for key in KEYS
        if not LEAVES[key][1].metadata["label"]
        and ((key in frame and differs(key, configs)) or any(differs(key, g) for g in groups.values()))
    ]


def placed(items: Iterable[Item]) -> tuple[Place, list[Item]]:
    """The keys of a place among words, or among keys with their values, and all the rest; raises UsageError."""
    found, rest = {}, []
    for item in items:
        if isinstance(item, str):
            key, _, text = item.partition("=")
            if key in PLACE and not text:
                raise UsageError(f'"{item}" has no value')
            if key in PLACE:
                found[key] = typed(key, spec.bare(text), item)
                continue
        elif isinstance(item, Mapping):
            found |= {key: typed(key, value) for key, value in item.items() if key in PLACE}
            item = {key: value for key, value in item.items() if key not in PLACE}
        rest.append(item)
    return Place(**found), rest


def single(words: Iterable[Item], *, trust: bool = False) -> Config:
    """The one config of words; a sweep is refused."""
    configs, differing = sweep(words, trust=trust)
    if len(configs) != 1:
        raise UsageError(
            f"this command takes one config, but {', '.join(differing)} has several values; use compare or bench"
        )
    return configs[0]


def spelled(words: Iterable[Item]) -> list[str]:
    """The words of the command line that say the same; of several configs at once, which these have no words for, how
    many they are."""
    said = []
    for item in words:
        if isinstance(item, str):
            said.append(item)
            continue
        listed, of_study = _structured(item)
        if len(listed) > 1:
            said.append(f"({len(listed)} configs)")
            continue
        # A config names every key. What is as by default need not be said, where nothing before it said otherwise.
        every = not isinstance(item, Config) or bool(said)
        axes = listed[0].items()
        said += [word(key, values) for key, values in axes if every or values != [LEAVES[key][1].default]]
        said += [f"{key}={spec.show(value)}" for key, value in of_study.items()]
    return said


def word(key: str, values: Sequence[Any]) -> str:
    """The word that a command reads as these values of a key."""
    one = LEAVES[key][1].metadata["folder"]  # a path, in which a comma is a comma
    # A comma outside of brackets would be a sweep.
    quoted = lambda text: text if one or len(spec.split(text, ",")) == 1 else f"({text})"
    return f"{key}={','.join(quoted(spec.show(value)) for value in values)}"


def help_lines(leaves: Mapping[str, tuple], width: int = 24) -> list[str]:
    """A line for each of LEAVES or STUDY: the key with its default in so many columns, and what it is."""
    return [
        f"  {f'{name}={spec.show(field.default)}':{width}s} {field.metadata['help']}"
        for name, (_, field, _) in leaves.items()
    ]


def axes_of(tree: Mapping, where: str, *, sweeps: bool = True) -> dict[str, list]:
    """Leaf name -> its values, from a nested or flat mapping; a list on a scalar field is a sweep, and so is text that
    reads like one, if it may: what a run stored is no sweep."""
    axes: dict[str, list] = {}

    def walk(branch: Mapping, path: tuple[str, ...]):
        for key, value in branch.items():
            if not isinstance(key, str):
                raise UsageError(f"{where}: keys must be text, got {key!r}")
            if isinstance(value, Mapping):
                if path:
                    raise UsageError(f'{where}: "{".".join((*path, key))}" is a section within a section')
                if key not in ("model", "train"):
                    raise UsageError(f'{where}: no section "{key}": {nearest(key, ["model", "train"], "sections")}')
                walk(value, (*path, key))
                continue
            leaf = _leaf(".".join((*path, key)), where)
            if leaf in axes:
                raise UsageError(f'{where}: "{leaf}" is given twice')
            if _WORDS[leaf][1].metadata["label"] and isinstance(value, list):
                value = "+".join(map(str, value))
            text = value if sweeps and isinstance(value, str) else ""
            listed = _spread(leaf, text, where) if text else value if isinstance(value, list) else [value]
            if not listed:
                raise UsageError(f'{where}: "{leaf}" is an empty list')
            axes[leaf] = _typed_all(leaf, listed, text, f"{where}: ")

    walk(tree, ())
    _refuse_both(axes, where)
    return axes


def load(name: str, *, trust: bool = False) -> tuple[list[dict[str, list]], dict[str, Any]]:
    """The axes that a file holds, and its keys of a study; a Python recipe holds several configs. Raises UsageError
    with the place, and where a file that is no Python names Python outside the package, unless `trust`."""
    path = spec.located(name, f"@{name}")
    if not path.is_file():
        raise UsageError(f'@{name}: no file "{name}"')
    if path.suffix == ".py":
        return _recipe(path)
    tree = _tree(path, name)
    if not trust and (outside := ", ".join(sources.of(tree))):
        raise UsageError(
            f"@{name}: names code outside the package ({outside}): look at what it is, then --trust runs it, "
            "or name it on the command line itself"
        )
    return [axes_of({key: value for key, value in tree.items() if key not in STUDY}, name)], _of_study(tree, name)


def _values(module: Any) -> dict[str, Any]:
    """The names of a module that stand for a value, and not for what it imported or defined."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (str, int, float, list))}


def _of_study(tree: Mapping, where: str) -> dict[str, Any]:
    """The keys of a study that a mapping has at its top, typed; a list of knobs is as good as their names."""
    joined = lambda value: ",".join(map(spec.show, value)) if isinstance(value, list) else value
    return {key: typed(key, joined(tree[key]), f"{where}: {key}") for key in STUDY if key in tree}


def _tree(path: pathlib.Path, name: str) -> Mapping:
    """What a file of keys and values holds; raises UsageError with the place."""
    readers = {".toml": _toml, ".json": _json, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise UsageError(f'@{name}: unknown kind "{path.suffix}": {nearest(path.suffix, [*readers, ".py"], "kinds")}')
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise UsageError(f"{name}: {size:,} bytes are no config; at most {LARGEST_FILE:,}")
        tree = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise UsageError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())}") from None
    except Exception as error:  # a reader's own surprise: PyYAML's KeyError at !!bool x, say
        raise UsageError(f"{name}: cannot be read as {path.suffix} ({type(error).__name__}: {said(error)})") from None
    if not isinstance(tree, Mapping):
        raise UsageError(f"{name}: must hold keys and values, got {type(tree).__name__}")
    return tree


def save(config: Config, path: pathlib.Path) -> None:
    """Write a config so that `@path` reads it back; the suffix chooses TOML, YAML or JSON."""
    tree = to_dict(config)
    if path.suffix == ".toml":
        import tomli_w

        path.write_text(tomli_w.dumps(_no_none(tree)))
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        path.write_text(yaml.safe_dump(tree, sort_keys=False))
    else:
        path.write_text(json.dumps(tree, indent=2) + "\n")


def _no_none(tree: Mapping) -> dict:
    """TOML has no null; a missing key means the same."""
    return {k: _no_none(v) if isinstance(v, Mapping) else v for k, v in tree.items() if v is not None}


def _replace(node, path: tuple[str, ...], value):
    head, *rest = path
    return dataclasses.replace(node, **{head: _replace(getattr(node, head), tuple(rest), value) if rest else value})


def _lengths(value: Any, where: str) -> str | None:
    """`128+256`, each once, in order of size; raises UsageError."""
    if spec.coerce(str(value), str | None, where) is None:
        return None
    known = {typed("seq_len", part.strip(), f"{where}: the length {part.strip()}") for part in str(value).split("+")}
    return "+".join(map(str, sorted(known)))


def _label(key: str, value: Any, where: str) -> str | None:
    """A name, or tags with + between them, each once; raises UsageError where it could be read as something else."""
    if spec.coerce(str(value), str | None, where) is None:
        return None
    words = str(value).split("+") if key == "tags" else [str(value)]
    for word in words:
        if not re.fullmatch(r"[\w.-]{1,64}", word):
            many = ", + between several" if key == "tags" else ""
            raise UsageError(f"{where}: letters, digits and _ . - alone, at most 64 of them{many}")
    if key == "name" and (value == "last" or re.fullmatch("[0-9a-f]{12}|[.-].*", words[0])):
        raise UsageError(f"{where}: reads as a folder, a flag, the id of a run or the newest one; choose another name")
    return "+".join(dict.fromkeys(words))


def _leaf(key: str, where: str) -> str:
    name = key.rpartition(".")[2]
    if (name in LEAVES and key in (name, ".".join(LEAVES[name][0]))) or key in DERIVED:
        return name
    if key in PLACE:
        raise UsageError(f"{where}: only train and resume take {key}=, each process its own, for one run of several")
    known = ".".join(LEAVES[name][0]) if name in LEAVES else None
    raise UsageError(
        f'{where}: unknown key "{key}": '
        + (f'did you mean "{known}"?' if known else nearest(name, [*KEYS, *STUDY, *DERIVED, *PLACE], "keys"))
    )


def _typed_all(key: str, values: list, text: str, where: str = "") -> list:
    """Every value of an axis, typed; `text` is what the values were spread from, if they were.

    Where one of those is nothing, a comma in a path may have made it.
    """
    try:
        return [typed(key, value, f"{where}{key}={spec.show(value)}") for value in values]
    except UsageError as error:
        if len(values) > 1 and _WORDS[key][1].metadata["shelf"] and re.search(r"[./]", text):
            hint = f"{text} reads as {len(values)} values: a path with a comma in it, put it in brackets"
            raise UsageError(f"{error} ({hint})") from None
        raise


def _spread(key: str, text: str, where: str) -> list[str]:
    """The values that text names of a key, `all` of a choice being every file of its shelf, with its defaults; a path
    and words for people are one value, whatever stands in them."""
    if _WORDS[key][1].metadata["folder"] or _WORDS[key][1].metadata["label"]:
        return [text]
    shelf = _WORDS[key][1].metadata["shelf"]
    each = lambda value: spec.names(shelf) if shelf and value == EVERY else [value]
    return [name for value in spread(text, _WORDS[key][2], where) for name in each(value)]


def spread(text: str, kind: Any, where: str) -> list[str]:
    """The values of `a,b` and `first..last[:xF|:+S]`; a range needs whole numbers as its `kind`. Raises UsageError."""
    values = []
    parts = spec.split(text, ",")
    if len(parts) > MOST_CELLS:
        raise UsageError(f"{where}: {len(parts):,} values; at most {MOST_CELLS:,} at once")
    whole = int in (kind, *typing.get_args(kind))
    for part in parts:
        match = re.fullmatch(r"([^.:]+)\.\.([^.:]+)(?::([x+])(\w+))?", part)
        if match is None or not whole:
            values.append(part)
            continue
        first, last, way, by = match.groups()
        first, last, by = (spec.coerce(n or "1", int, f"{where}: the range {part}") for n in (first, last, by))
        if last < first or by < 1 or (way == "x" and (by < 2 or first < 1)):
            raise UsageError(f"{where}: the range {part} is empty or endless (write 512..4096:x2, 0..4, or 8..64:+8)")
        while first <= last:
            values.append(str(first))
            first = first * by if way == "x" else first + by
            if len(values) > 10_000:
                raise UsageError(f"{where}: the range {part} has more than 10,000 values")
    return values


def _toml(text: str):
    return tomllib.loads(text)


def _json(text: str):
    def no_duplicates(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=no_duplicates)


def _yaml(text: str):
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain YAML: no duplicate keys, no aliases (a bomb of aliases is no config)."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"aliases are not allowed (line {self.peek_event().start_mark.line + 1})")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if len(set(map(str, keys))) < len(keys):
                raise yaml.YAMLError(f"a key is given twice (line {node.start_mark.line + 1})")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _recipe(path: pathlib.Path) -> tuple[list[dict[str, list]], dict[str, Any]]:
    module = spec.run_file(path, f"@{path}")
    try:
        with contained():  # its lists and mappings may be classes of its own
            return _listed(getattr(module, "configs", None), f"@{path}"), _of_study(_values(module), f"@{path}")
    except BrokenChoice as error:
        raise UsageError(f"@{path}: {error}") from error
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"@{path}: configs cannot be read ({type(error).__name__}: {said(error)})") from error


def _structured(item: Any) -> tuple[list[dict[str, list]], dict[str, Any]]:
    """What `load` gives of a file, of what Python gives in its place."""
    if isinstance(item, Mapping):
        where = "the keys given"
        return [axes_of({key: item[key] for key in item if key not in STUDY}, where)], _of_study(item, where)
    if isinstance(item, (list, tuple)):
        return _listed(item, "the configs given"), {}
    return [_axes(item, "what is given")], {}


def _listed(listed: Any, where: str) -> list[dict[str, list]]:
    if not isinstance(listed, (list, tuple)):
        raise UsageError(f"{where}: a recipe defines configs = [Config(...) or {{key: value}}, ...]")
    if len(listed) > MOST_CELLS:
        raise UsageError(f"{where}: {len(listed):,} configs; at most {MOST_CELLS:,} at once")
    if not listed:
        raise UsageError(f"{where}: configs is empty")
    return [_axes(item, f"{where}: configs[{number}]") for number, item in enumerate(listed)]


def _axes(item: Any, where: str) -> dict[str, list]:
    if isinstance(item, Config):
        return axes_of(to_dict(item), where, sweeps=False)
    if isinstance(item, Mapping):
        return axes_of(item, where)
    raise UsageError(f"{where} is a {type(item).__name__}, not a Config or a mapping")
