"""What a row holds: the one schema of a cell of a comparison or a bench, of a run's result.json and of --json.

A field is a key of a row. One made by `figure` is a number with a heading: the tables in the terminal and in the HTML,
the summary of a run, CSV and, where it has a `chart`, the charts take it from here, in the order of this file. One made
by `fact` is what else a row says. A row has besides the keys that place it (`PLACES`) and those that its sweep varied.

Rows travel as dicts, as JSON has them: `Record(...).to_dict()` writes one, and readers take what is there, since rows
of older versions may lack keys or have others. Needs no jax.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# How a row ended -> the words for it. "refused" was not begun: its config cannot be, or its mechanism fails its kit.
STATUSES = {
    "ok": "ok",
    "failed": "failed",
    "nan": "not a number",
    "oom": "out of memory",
    "stalled": "stalled",
    "refused": "refused",
    "interrupted": "interrupted",
}
# A diverged run would diverge again; anything else that failed may have been the machine's doing.
SETTLED = ("ok", "nan")
# What a check says of a config that cannot be: no row ends so, since the command ends, or the row is "refused".
IMPOSSIBLE = "impossible"
# What a worker says of a cell that another process trains: no row ends so, since a comparison waits for it.
HELD = "held"

# Keys that say where a row stands on a page; every other varied key is part of the name of its series.
PLACES = ("task", "pass", "seq_len", "seed", "init_seed", "data_seed", "kind")
# The figure that says how fast a row of each kind is: of a bench the time of one pass.
SPEED = {"compare": "tokens_per_second", "bench": "seconds_median"}
# Median over least time of equal work: above it something else was busy on the machine.
BUSY = 1.3

Kind = Literal["compare", "bench"]
Form = Literal["count", "duration", "power", "score", "significant", "size"]
KINDS: tuple[Kind, ...] = ("compare", "bench")
TRAINED: tuple[Kind, ...] = ("compare",)
BENCHED: tuple[Kind, ...] = ("bench",)
ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a row, and how it is shown.

    key: its field; name: what measures and charts call it, the key itself where it has no other. heading: over its
    column, empty for one that has none; short: in the terminal, where there is less room. form: the function of
    `report.human` that writes it; unit: what stands behind it outside of a column. better: +1 where more is better, -1
    where less is, 0 where neither is. narrow: the greater, the sooner a narrow terminal loses the column, 0 for never;
    None for one that only the page has. instead: the key that stands in where a row has none of `key`. chart: the title
    of its chart over the lengths. exact: a run's summary writes the number itself. help: how it is taken, for the page,
    where {step} is a training step or a pass, {whole} what was measured whole, {decoded} what a bench of decoding adds.
    """

    key: str
    name: str
    heading: str
    short: str
    form: Form
    unit: str
    better: int
    narrow: int | None
    instead: str | None
    chart: str | None
    exact: bool
    help: str

    def value(self, row: Mapping) -> Any:
        """What a row has of it, None for nothing."""
        value = row.get(self.key)
        return row.get(self.instead) if value is None and self.instead else value


def fact(help: str, *, always: tuple[Kind, ...] = (), summary: bool = False) -> Any:
    """A field that is no figure. always: the kinds of rows that have the key even without a value; summary: whether the
    summary of a run tells it."""
    return dataclasses.field(default=ABSENT, metadata={"help": help, "always": always, "summary": summary})


def figure(
    heading: str,
    form: Form,
    help: str,
    *,
    short: str = "",
    unit: str = "",
    better: int = 0,
    narrow: int | None = 4,
    name: str = "",
    instead: str | None = None,
    chart: str | None = None,
    exact: bool = False,
    always: tuple[Kind, ...] = KINDS,
    summary: bool = True,
) -> Any:
    """A field that is a figure: see `Figure` and `fact`."""
    shown = {"name": name, "heading": heading, "short": short or heading, "form": form, "unit": unit, "better": better}
    shown |= {"narrow": narrow, "instead": instead, "chart": chart, "exact": exact, "help": help}
    about = {"figure": shown, "help": help, "always": always, "summary": summary}
    return dataclasses.field(default=ABSENT, metadata=about)


@dataclasses.dataclass(kw_only=True)
class Record:
    """One row. A field that was never set is no key of it."""

    id: str = fact("the config's identity")
    kind: Literal["compare", "bench"] = fact('"compare", also of a single run, or "bench"')
    status: str = fact("how it ended: one of STATUSES", always=TRAINED, summary=True)
    reason: str = fact("why it did not end ok", summary=True)
    timed: str = fact("the method of the mechanism that a bench timed", always=BENCHED)
    kernel: str | None = fact(
        'what ran attention over a pattern of positions: "blocks", the block engine, or a kernel, by its name; None: '
        "nothing of the kind ran",
        always=KINDS,
    )
    causal: bool = fact("whether a bench ran it causally", always=BENCHED)
    # The metric has columns of its own, since its name, its direction and its level of chance are the task's.
    metric: float | None = fact("the task's metric on the test split", always=KINDS, summary=True)
    metric_name: str | None = fact("its name", always=KINDS, summary=True)
    higher_is_better: bool = fact("its direction")
    chance: float | None = fact("what guessing scores", summary=True)
    split: str = fact("what an evaluation scored: train, validation or test", summary=True)
    examples: int = fact("how many examples of the split were scored")
    examples_of: int | None = fact("how many it has, None where they are drawn without end")
    consecutive: bool = fact(
        "true where the examples are a part of the split in runs that follow one another, as a model that remembers "
        "reads them; else a part is drawn from everywhere"
    )
    metric_interval: Sequence[float] | None = fact(
        "where the metric of all its examples lies with 95 %, None where all were scored"
    )
    majority: float | None = fact("the share of the most frequent answer, where the metric is accuracy")
    changed: Mapping = fact(
        "what an evaluation has otherwise than training had, an option or what a choice makes of the length: {name: "
        "[as trained, as scored]}"
    )
    step: int = fact("the step that the metric is of, or after which a run was ended")
    name: str = fact("what the row is called where its keys do not say it: a baseline, say")
    role: Literal["variant", "baseline", "range"] = fact(
        "what the row is for: one of the variants compared (as is a row without the key), a baseline beside them, or a "
        "window that shows whether the task needs long range"
    )
    command: str = fact("the command that makes this row again")
    matched: Mapping = fact("what was held equal: budget, target, reached, ok (within 2 %), changed: {key: [from, to]}")
    shared: Mapping = fact(
        "the same variant and seed under the recipe that all share, where the row is of tuned knobs: status, metric, "
        "metric_interval, loss, knobs: {key: value}, run_dir"
    )
    tuning: Mapping = fact(
        "how the knobs were tuned: knobs, share (of the steps), steps, split, metric_name, higher_is_better, best: "
        "{key: value}, edge (the best is at the end of the grid), widened, points: [{key: value, metric, loss, status}]"
    )
    by_length: Sequence[Mapping] = fact(
        "the scored split at other lengths: seq_len, metric, metric_interval, loss, examples, examples_of; where "
        "a choice makes something else of the length changed: {name: [at the trained one, here]}; reason where there "
        "is no score"
    )
    generated: Mapping = fact(
        "scores of texts that the model generated for examples of the split: beams, examples, examples_of, bleu, "
        "bleu_signature, chrf, chrf_signature"
    )
    averaged: float = fact(
        "the rate of the moving average of the parameters that was scored; without the key the parameters themselves "
        "were",
        summary=True,
    )
    wrong: Sequence[Mapping] = fact(
        "examples of the split scored that were answered wrong, the first 8: input, answer, said, all text"
    )
    maps: Mapping = fact(
        "attention weights of the first example scored, where seq_len is at most 64 and there are at most 65,536 of "
        "them: tokens, queries (T), layers: [layer][head][query][key] in 0..255, implied (no scores: effective "
        "weights); else reason, why there are none"
    )

    tokens_per_second: float | None = figure(
        "tokens/s",
        "count",
        "Tokens of one batch{decoded} over the median time of a {step}; compiling is left out.",
        short="tok/s",
        unit=" tok/s",
        better=1,
        narrow=3,
        chart="Training speed",
    )
    eval_tokens_per_second: float | None = figure(
        "eval tokens/s",
        "count",
        "Tokens of one batch over the median time of scoring it; compiling is left out.",
        short="eval tok/s",
        unit=" tok/s",
        better=1,
        narrow=6,
        always=(),
    )
    prefill_seconds: float | None = figure(
        "prefill",
        "duration",
        "Least time to read seq_len tokens of one sequence into a cache.",
        better=-1,
        narrow=6,
        always=(),
    )
    token_seconds: float | None = figure(
        "time/token",
        "duration",
        "Least time to decode one token behind them.",
        better=-1,
        narrow=6,
        always=(),
    )
    seconds_median: float | None = figure(
        "time",
        "duration",
        "Median over the timed runs of one {step}, after compiling.",
        better=-1,
        narrow=3,
        chart="Time of a pass",
    )
    seconds_min: float | None = figure(
        "least time", "duration", "The shortest of those runs.", better=-1, narrow=None, summary=False
    )
    seconds_ratio: float | None = figure(
        "time/least",
        "significant",
        f"Median over least time: above {BUSY} something else was busy, or the work is uneven, and a warning says so.",
        better=-1,
        narrow=None,
        summary=False,
    )
    load: float | None = figure(
        "load",
        "significant",
        "Processes that wanted a core of the machine, on average over the last minute of the timing, its own among "
        "them.",
        narrow=None,
        summary=False,
    )
    temp_bytes: int | None = figure("", "size", "temporary buffers that XLA plans", better=-1)
    peak_bytes: int | None = figure(
        "memory",
        "size",
        "",  # what it counts depends on the device: the page says so of what is there
        name="memory",
        instead="temp_bytes",
        better=-1,
        narrow=2,
        chart="Memory",
        always=(),
    )
    state_bytes: int | None = figure(
        "state",
        "size",
        "What decoding keeps of a context of seq_len tokens, for the whole batch.",
        better=-1,
        narrow=2,
        chart="What decoding keeps",
        always=BENCHED,
    )
    computation: float | None = figure(
        "layers/token",
        "significant",
        "Layers that a token passed through, on average.",
        unit=" layers per token",
        better=-1,
        exact=True,
        always=(),
    )
    flops_per_token: float | None = figure(
        "FLOPs/token",
        "count",
        "FLOPs of one {step} over the tokens in it.",
        better=-1,
        narrow=None,
        always=(),
        summary=False,
    )
    flops: int | None = figure(
        "FLOPs",
        "count",
        "Of the matrix products of one {step}, a multiply and an add as two; counted in the program, not read from "
        "the hardware.",
        better=-1,
    )
    parameters: int | None = figure("parameters", "count", "Of the whole {whole}.", better=-1, narrow=5, exact=True)
    embedding_parameters: int = fact("how many of them are those of embeddings, positions and the head")
    compile_seconds: float | None = figure(
        "compile",
        "duration",
        "Time to trace, lower and compile; a program that JAX's cache held counts as long as it took to compile. Cells "
        "that differ in seeds and rates alone share a program, and have the time of its one compilation.",
        better=-1,
        narrow=6,
    )
    loss: float | None = figure(
        "loss",
        "score",
        "Cross-entropy in nats, on the examples of the metric.",
        better=-1,
        narrow=None,
        exact=True,
        always=TRAINED,
    )
    steps: int = figure("steps", "count", "Steps that the run took.", narrow=None, exact=True, always=())
    exponent: float | None = figure(
        "time ~",
        "power",
        "How the least time grows with the length N: slope of a line through its logarithm, over three lengths or "
        "more.",
        better=-1,
        narrow=2,
        always=BENCHED,
    )
    exponent_flops: float | None = figure(
        "FLOPs ~", "power", "How the FLOPs grow with the length N.", better=-1, narrow=2, always=BENCHED
    )
    exponent_bytes: float | None = figure(
        "memory ~", "power", "How the memory grows with the length N.", better=-1, narrow=2, always=BENCHED
    )

    seconds_rounds: Sequence[float] = fact("seconds of each timed round, which cells of a length take turns in")
    skipped: int = fact("steps that were skipped since their loss or gradient was not finite")
    aux: Mapping[str, float] = fact("what else the model reports: a mean by its name")
    by_position: Mapping[str, Sequence] = fact("what it reports of each token: a mean for every position")
    curve: Sequence = fact("[step, mean training loss since the last point, seconds of all steps so far]")
    validation: Sequence = fact("[step, loss, metric] of each validation")
    validation_examples: int | None = fact("how many examples each of them scored")
    plane: Sequence[int] | None = fact("rows and columns where the positions are an image")
    initialised: Mapping = fact(
        "whose parameters it began with: run, checkpoint, step, taken (arrays), cut: {table: [rows taken, rows]}, fresh"
    )
    extended: Mapping = fact("the shorter run that it went on from: run, id, step, steps (what that one was to take)")
    data: Mapping = fact("what identifies the task's data")
    checked: bool = fact("whether a bench checks the conformance of mechanisms of one's own", always=BENCHED)
    devices: int = fact("how many devices trained it")
    host: str = fact("the host that trained it")
    device: str = fact("what its devices are called")
    untimed: str = fact("why it has no times: it trained beside other cells, which would disturb them")
    processes: int = fact("of how many processes, on")
    hosts: int = fact("so many machines")
    started: str | None = fact("when the run began, in UTC")
    ended: str = fact("when it came to its end, in UTC")
    git: Mapping | None = fact(
        "the user's repository where the run began: commit, and dirty, whether files of it were changed since"
    )
    run_name: str = fact("what its user calls the run: name=")
    tags: str = fact("words that runs are found by, + between them")
    machine: Mapping[str, str] | None = fact("what measured it", always=BENCHED)
    config: Mapping = fact("the config")
    run_dir: str = fact("the run's folder", summary=True)
    seal: str = fact("the sha256 of the rest, in result.json alone")

    def to_dict(self) -> dict[str, Any]:
        """The row: the fields that were set, in their order."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not ABSENT}


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the sha256 of the rest of it, for a file: what is changed there later is told from what was
    measured."""
    rest = {key: value for key, value in row.items() if key != "seal"}
    return {**rest, "seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def broken(row: Mapping[str, Any], identity: str) -> str | None:
    """Why a stored row cannot stand for the run of that id, in words; None where it can."""
    if row.get("id") != identity:
        return f"it is of run {row.get('id')}, not of {identity}"
    if "seal" not in row:
        return "it has no seal: an older version or something else wrote it"
    return None if row == sealed(row) else "it was changed since it was written (its seal does not match)"


def keys(schema: type[Record] = Record) -> tuple[str, ...]:
    """Every key of a row that its place and its sweep do not give."""
    return tuple(field.name for field in dataclasses.fields(schema))


def figures(schema: type[Record] = Record) -> tuple[Figure, ...]:
    """Every figure, in order."""
    shown = ((field.name, field.metadata.get("figure")) for field in dataclasses.fields(schema))
    return tuple(Figure(**{**about, "key": key, "name": about["name"] or key}) for key, about in shown if about)


def columns(schema: type[Record] = Record) -> tuple[Figure, ...]:
    """The figures that tables have a column for, in order."""
    return tuple(figure for figure in figures(schema) if figure.heading)


def blank(kind: Kind, schema: type[Record] = Record) -> dict[str, Any]:
    """A row without a figure yet: None under every key that each row of a kind has."""
    return {field.name: None for field in dataclasses.fields(schema) if kind in field.metadata["always"]}


def summary(schema: type[Record] = Record) -> tuple[str, ...]:
    """The keys that the summary of one run tells, in order; the rest of a record is for programs."""
    return tuple(field.name for field in dataclasses.fields(schema) if field.metadata["summary"])


FIGURES = {figure.name: figure for figure in figures()}
