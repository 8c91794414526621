"""Series: forecast several measured quantities from their past."""

import functools
import hashlib
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.errors import UsageError, nearest
from xformers_lab.tasks import SPLITS, Batch, Setting, Split
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, files, tables
from xformers_lab.tasks._reading.layout import shown

_TIMES = ("date", "time", "timestamp", "datetime")
# Rows of 12, 4 and 4 months of 30 days, by how the name of the file begins.
_BORDERS = {"etth": (8640, 2880, 2880), "ettm": (34560, 11520, 11520)}
_SHARES = (0.7, 0.1, 0.2)
# Added to the diagonal of the normal equations, for each row of the data: columns may be copies of each other.
_RIDGE = 1e-6


class Series(InPasses):
    """Long-term forecasting of a multivariate series, as on the ETT data (Zhou et al., 2021, arXiv 2012.07436).

    Read is a table with a row for each time, in order: a column of dates, which is not used, and numbers. A model reads
    seq_len rows and, at the last, predicts the next `horizon` of every column at once. Columns have mean 0 and variance
    1 over the training rows, and errors are of these standardised values. Files called ETTh* and ETTm* have the
    published borders, 12, 4 and 4 months; others 70, 10 and 20 % of the rows. What is predicted lies within its split;
    what is read may begin in the split before. Models read numbers here, through a linear projection in place of the
    embedding.

    The linear baseline is one map from the seq_len last values of a column to its next ones, for all columns the same,
    least squares on the training rows after the last value is taken off (NLinear: Zeng et al., 2022, arXiv 2205.13504).

    Options:
        path: a csv, tsv, jsonl or parquet file
        horizon: how many rows are predicted
        column: the one column that is read and predicted (none: all)
        metric: mse or mae, the mean squared or absolute error; trained is always on the former

    Metric: mse, or mae; lower is better. Chance: what the linear baseline scores on the test split.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    higher_is_better = False
    vocab = 0

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        horizon: int = 96,
        column: str | None = None,
        metric: Literal["mse", "mae"] = "mse",
    ):
        super().__init__(setting)
        if path is None:
            raise ValueError("a series is read from disk: give path= a table like ETTh1.csv")
        if horizon < 1:
            raise ValueError(f"horizon={horizon} predicts nothing: use horizon=1 or more")
        self.data = load(path, column, files.stamp("series", path))
        self.horizon, self.metric_name = horizon, metric
        self.channels = self.data.values.shape[1]
        self.outputs = horizon * self.channels
        for split in SPLITS:
            if self.examples(split) < 1:
                begin, end = self.data.borders[split]
                least = horizon + (setting.seq_len if split == "train" else 0)
                raise ValueError(
                    f"the {split} split of {path} has {end - begin} rows, and seq_len={setting.seq_len} with "
                    f"horizon={horizon} needs {least}: use smaller ones"
                )
        if self.data.borders["validation"][0] < setting.seq_len:
            raise ValueError(f"seq_len={setting.seq_len} is longer than the training rows of {path}: use a smaller one")
        self.scores = baselines(path, column, files.stamp("series", path), setting.seq_len, horizon)
        self.chance = self.scores[f"linear_{metric}"]

    def examples(self, split: Split) -> int:
        begin, end = self.data.borders[split]
        return end - begin - self.horizon + 1 - (self.setting.seq_len if split == "train" else 0)

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        first = self.data.borders[split][0] + (self.setting.seq_len if split == "train" else 0)
        at = first + np.asarray(numbers)[:, None]
        inputs = self.data.values[at + np.arange(-self.setting.seq_len, 0)]
        targets = self.data.values[at + np.arange(self.horizon)].reshape(len(at), -1)
        return Batch(inputs, targets, np.ones(len(at), np.float32))

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum over windows of the mean squared error, windows)."""
        return self._error(logits, batch, jnp.square)

    def metric(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self._error(logits, batch, jnp.square if self.metric_name == "mse" else jnp.abs)

    def encode(self, text: str) -> list[int]:
        raise ValueError("task=series reads numbers, so there is no prompt of tokens")

    def show(self, example: Batch) -> dict[str, str]:
        """The last values that are read and the first that are wanted, of each column."""
        inputs = np.asarray(example.inputs)[0]
        targets = np.asarray(example.targets)[0].reshape(self.horizon, self.channels)
        more = " ..." if self.horizon > 8 else ""
        return {
            "input": "\n".join(f"{name}: ... {_few(inputs[-8:, at])}" for at, name in enumerate(self.data.columns)),
            "answer": "\n".join(f"{name}: {_few(targets[:8, at])}{more}" for at, name in enumerate(self.data.columns)),
        }

    def describe(self) -> dict:
        """Source, columns, rows of each split, what the baselines score on the test split, and a sha256 of the rows."""
        return {
            "source": self.data.source,
            "columns": list(self.data.columns),
            "horizon": self.horizon,
            **{f"{split}_rows": end - begin for split, (begin, end) in self.data.borders.items()},
            **{f"{split}_windows": self.examples(split) for split in SPLITS},
            **{name: round(score, 4) for name, score in self.scores.items()},
            "sha256": hashlib.sha256(self.data.values.tobytes()).hexdigest(),
            "reading": self._read(),
        }

    def reading(self) -> list[str]:
        return account.words(self._read())

    def _read(self) -> dict:
        sizes: dict[Split, int] = {split: self.examples(split) for split in SPLITS}
        none: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        return account.record(self.data.account, sizes, none, unit="window", how="by time")

    def _error(self, logits: jax.Array, batch: Batch, size) -> tuple[jax.Array, jax.Array]:
        weights = jnp.asarray(batch.weights)
        errors = size(logits.astype(jnp.float32) - jnp.asarray(batch.targets)).mean(-1)
        return (errors * weights).sum(), weights.sum()


class Data(NamedTuple):
    """A series (rows, columns) float32, standardised by its training rows; borders: first row and end of each split."""

    source: str
    columns: tuple[str, ...]
    values: np.ndarray
    borders: dict[Split, tuple[int, int]]
    account: account.Account


@functools.lru_cache(maxsize=4)
def load(path: str, column: str | None, stamp: str | None) -> Data:
    """Read and standardise a table; once per process, and again where the stamp of the file is another."""
    place = files.existing("series", path)
    if not place.is_file() or not tables.is_table(place):
        raise UsageError(f"series: path={path} is no table: give a file of kind {', '.join(sorted(tables.KINDS))}")
    source = tables.read("series", place, [place])
    (table,) = source.tables[None]
    names = [name for name in table.columns if name.lower() not in _TIMES]
    if column is not None and column not in names:
        raise UsageError(f"series: column={column}: no such column: {nearest(column, map(shown, names), 'columns')}")
    names = names if column is None else [column]
    if not names:
        raise UsageError(f"series: path={path} has no column of numbers")
    values = np.stack([_numbers(table, name) for name in names], 1)
    rows = len(values)
    wanted = next((sizes for start, sizes in _BORDERS.items() if place.name.lower().startswith(start)), None)
    notes = list(source.notes)
    if wanted is None or sum(wanted) > rows:
        ends = [round(sum(_SHARES[: at + 1]) * rows) for at in range(3)]
        notes.append(f"borders: {', '.join(f'{share:.0%}' for share in _SHARES)} of the rows, in time")
    else:
        ends = [sum(wanted[: at + 1]) for at in range(3)]
        notes.append(f"borders: 12, 4 and 4 months; the last {rows - ends[-1]:,} rows are not read")
    borders: dict[Split, tuple[int, int]] = dict(zip(SPLITS, zip([0, *ends[:-1]], ends, strict=True), strict=True))
    train = values[: ends[0]]
    spread = train.std(0)
    if ends[0] < 2 or not spread.all():
        flat = names[int(np.argmin(spread))] if ends[0] > 1 else "the data"
        raise UsageError(f"series: path={path}: {shown(flat)} does not vary over the training rows: leave it out")
    standard = ((values - train.mean(0)) / spread).astype(np.float32)[: ends[-1]]
    return Data(path, tuple(names), standard, borders, account.Account({None: table.part}, tuple(notes)))


@functools.lru_cache(maxsize=8)
def baselines(path: str, column: str | None, stamp: str | None, seq_len: int, horizon: int) -> dict[str, float]:
    """What the linear map and the last value score on the test split."""
    data = load(path, column, stamp)
    (_, end), (begin, last) = data.borders["train"], data.borders["test"]
    solution = linear(data.values[:end], seq_len, horizon)
    sums: dict[str, float] = dict.fromkeys(("linear_mse", "linear_mae", "last_value_mse", "last_value_mae"), 0.0)
    for channel in data.values[begin - seq_len : last].T.astype(np.float64):
        reads, wanted = _windows(channel, seq_len, horizon)
        for name, errors in (("linear", _ahead(reads) @ solution - wanted), ("last_value", wanted)):
            sums[f"{name}_mse"] += float(np.square(errors).mean())
            sums[f"{name}_mae"] += float(np.abs(errors).mean())
    return {name: total / data.values.shape[1] for name, total in sums.items()}


def linear(values: np.ndarray, seq_len: int, horizon: int) -> np.ndarray:
    """(seq_len + 1, horizon), least squares over all columns of (rows, columns): the values before and a constant to
    the values after, both less the last one read."""
    gram, moment = np.zeros((seq_len + 1, seq_len + 1)), np.zeros((seq_len + 1, horizon))
    count = 0
    for channel in values.T.astype(np.float64):
        reads, wanted = _windows(channel, seq_len, horizon)
        x = _ahead(reads)
        gram += x.T @ x
        moment += x.T @ wanted
        count += len(x)
    return np.linalg.solve(gram + _RIDGE * count * np.eye(seq_len + 1), moment)


def _windows(channel: np.ndarray, seq_len: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Of (rows,) what each window reads (n, seq_len) and what follows (n, horizon), both less the last value read."""
    whole = np.lib.stride_tricks.sliding_window_view(channel, seq_len + horizon)
    last = whole[:, seq_len - 1 : seq_len]
    return whole[:, :seq_len] - last, whole[:, seq_len:] - last


def _ahead(reads: np.ndarray) -> np.ndarray:
    """With a constant beside."""
    return np.concatenate([reads, np.ones((len(reads), 1))], 1)


def _numbers(table: tables.Table, name: str) -> np.ndarray:
    """The cells of a column; raises UsageError at one that is no finite number."""
    numbers = np.empty(table.rows)
    for row, value in enumerate(table.values(name)):
        try:
            numbers[row] = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            numbers[row] = math.nan
        if not math.isfinite(numbers[row]):
            what = "is empty" if value is None else f"is {shown(str(value))!r}"
            raise UsageError(
                f'series: {table.where(row)}: column "{shown(name)}", row {row + 1} {what}: every cell but the date '
                "must be a number"
            )
    return numbers


def _few(values: np.ndarray) -> str:
    return " ".join(f"{value:.2f}" for value in values)
