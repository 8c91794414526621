"""What each head does, in numbers, as rows: of the terminal, of JSON and of the page."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from xformers_lab.attention_maps.maps import AttentionMaps
from xformers_lab.measure.heads import FIXED, SMALL
from xformers_lab.report import human


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of heads: its field of `measure.heads.Heads`, its heading, how it is written and taken. wanted: whether
    a table of these values (all heads of all maps, NaN where there is none) has a column of it."""

    key: str
    heading: str
    form: Callable[[float], str]
    help: str
    wanted: Callable[[np.ndarray], bool] = lambda values: bool(np.isfinite(values).any())


def share(value: float) -> str:
    """0.123 as 12 %; what is there and rounds to nothing as < 1 %."""
    if not math.isfinite(value):
        return human.NONE
    return "< 1 %" if 0 < value < 0.005 else f"{100 * value:.0f} %"


def decimals(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}" if math.isfinite(value) else human.NONE


COLUMNS = (
    Column("entropy", "bits", decimals(2), "Entropy of the weights of a query, -sum p log2 p (Clark et al., 2019)."),
    Column(
        "relative",
        "of uniform",
        decimals(2),
        "That entropy over the one of equal weights on all keys that the query may look at: 0 is one key, 1 all alike.",
    ),
    Column(
        "distance",
        "distance",
        decimals(1),
        "Tokens between a query and what it looks at, weighted (Vig and Belinkov, 2019).",
    ),
    Column("first", "first token", share, "Share of the weights that the first token gets."),
    Column("itself", "itself", share, "Share that the query's own token gets."),
    Column(
        "padding",
        "padding",
        share,
        "Share that padding gets: 0 where a mechanism keeps to its mask.",
    ),
    Column(
        "total",
        "sum",
        decimals(2),
        "What the weights of a query add up to, their signs kept; of weights below 0 all other figures take the size.",
        lambda values: bool((np.abs(values[np.isfinite(values)] - 1) > 0.01).any()),
    ),
    Column(
        "output",
        "adds",
        decimals(2),
        "The length of what the head adds to the output of its layer, through its part of the output projection, over "
        "the mean of the layer's heads (after Kobayashi et al., 2020).",
    ),
)
MEANS = "Every figure is a mean over the queries that are no padding and may look at two keys or more."
DEAD = (
    f"A head is called dead where it adds less than {SMALL:g} of what the heads of its layer add on average, or where "
    f"one and the same token gets {100 * FIXED:.0f} % or more of its weights, among the tokens that at least half of "
    "the queries may look at: it then adds the same to every query. Sandoval-Segura et al. (2025, arXiv 2504.03889) "
    "call heads inactive by such scores; the thresholds are this lab's."
)
BRIEFLY = f"dead: adds less than {SMALL:g} of its layer's mean, or one token gets {100 * FIXED:.0f} % of its weights"
IMPLIED = (
    "Effective weights: the mechanism has no softmax over scores of single positions; these are the weights with which "
    "its values add up to what it gives, read off by values that are 1 at one position."
)


def columns(shown: Sequence[AttentionMaps]) -> list[Column]:
    """The figures that some head has; of padding only where there is any."""
    padded = any(not (one.real_keys.all() and one.real_queries.all()) for one in shown)
    values = lambda column: np.concatenate([getattr(one.figures, column.key).ravel() for one in shown])
    return [column for column in COLUMNS if (padded if column.key == "padding" else column.wanted(values(column)))]


def heads(maps: AttentionMaps) -> list[dict]:
    """A row for each head, as JSON has it: None where there is no figure, "" in `dead` where it is not."""
    return [
        {
            "layer": layer,
            "head": head,
            **{column.key: _number(getattr(maps.figures, column.key)[row, place]) for column in COLUMNS},
            "dead": str(maps.figures.reason[row, place]),
            "implied": bool(maps.implied[row]),
        }
        for row, layer in enumerate(maps.layers)
        for place, head in enumerate(maps.heads)
    ]


def texts(maps: AttentionMaps, chosen: Sequence[Column]) -> list[dict[str, str]]:
    """The rows of `heads` in words, by heading."""
    return [
        {
            "layer": str(row["layer"]),
            "head": str(row["head"]),
            **{
                column.heading: column.form(math.nan if row[column.key] is None else row[column.key])
                for column in chosen
            },
            "dead": row["dead"] or human.NONE,
        }
        for row in heads(maps)
    ]


def summary(maps: AttentionMaps) -> str:
    """What the heads of maps do altogether, in a sentence."""
    figures, count = maps.figures, maps.weights.shape[0] * maps.weights.shape[1]
    dead = int(figures.dead.sum())
    words = [f"{count} head{'s' * (count != 1)}, {dead or 'none'} dead"]
    if np.isfinite(figures.relative).any():
        words.append(f"entropy {np.nanmean(figures.entropy):.2f} bits, {np.nanmean(figures.relative):.2f} of uniform")
    if np.isfinite(figures.distance).any():
        words.append(f"{np.nanmean(figures.distance):.1f} tokens away on average")
    if np.isfinite(figures.first).any():
        words.append(f"{share(float(np.nanmean(figures.first)))} on the first token")
    return "; ".join(words)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
