"""The attention weights of one text or example, by layer and head, with what each head does in numbers."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.measure.heads import Heads, figures_of, seeing

Part = Literal["self", "encoder", "decoder", "cross"]
# How a part is called beside the name of its run; a model that is one stack has one part, which needs no word.
PARTS: dict[Part, str] = {"self": "", "encoder": "encoder", "decoder": "decoder", "cross": "cross-attention"}


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What each head of each layer takes of each position.

    Args:
        weights: (L, N, T, S) float32, L layers in the order in which they run, N heads, T queries, S keys.
        queries, keys: The text of each token, (T,) and (S,). `tokens` are the keys.
        real_queries, real_keys: Which are no padding, (T,) and (S,) bool.
        causal: Whether no query sees a key behind it.
        implied: Of each layer, whether the weights are effective ones: the mechanism has no softmax over scores of
            single positions, and these are the weights that give what it gives.
        norms: (L, N, T) float32, the length of what each head adds at each query; None where layers do not add up what
            heads give.
        part: Of an encoder-decoder which of its three attentions, else "self".
        name: What tells it from others beside it.
        layers, heads: The numbers that the layers and heads have in the model, from 1.
        notes: What else is to be known of the text.
        documents: Of packed data the document of each token, (T,) int, for a query sees its own alone; else None.
    """

    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str]
    real_queries: np.ndarray
    real_keys: np.ndarray
    causal: bool
    implied: Sequence[bool]
    norms: np.ndarray | None
    part: Part
    name: str
    layers: Sequence[int]
    heads: Sequence[int]
    notes: Sequence[str] = ()
    documents: np.ndarray | None = None

    @property
    def tokens(self) -> Sequence[str]:
        """The text of each key, (S,)."""
        return self.keys

    @property
    def title(self) -> str:
        """Its name, and the part where it is one of several."""
        return " · ".join(filter(None, [self.name, PARTS[self.part]]))

    @property
    def kind(self) -> str:
        """What its weights are, in words."""
        if not any(self.implied):
            return "the weights of its scores"
        if all(self.implied):
            return "effective weights, since it has no scores"
        among = [str(layer) for layer, implied in zip(self.layers, self.implied, strict=True) if implied]
        return f"effective weights in layer{'s' * (len(among) > 1)} {', '.join(among)}, since there are no scores"

    @functools.cached_property
    def figures(self) -> Heads:
        """What each head does, in numbers."""
        return figures_of(
            self.weights,
            causal=self.causal,
            real_queries=self.real_queries,
            real_keys=self.real_keys,
            norms=self.norms,
            crosses=self.part == "cross",
            documents=self.documents,
        )

    @property
    def entropy(self) -> np.ndarray:
        """(L, N), bits; see `measure.heads.Heads`, where all figures are."""
        return self.figures.entropy

    @property
    def distance(self) -> np.ndarray:
        """(L, N), tokens."""
        return self.figures.distance

    @property
    def dead(self) -> np.ndarray:
        """(L, N) bool."""
        return self.figures.dead

    @property
    def seen(self) -> np.ndarray:
        """(T, S) bool: which keys causality and padding leave to each query."""
        T, S = self.weights.shape[2:]
        return seeing(T, S, self.causal, self.real_keys, self.documents) & self.real_queries[:, None]

    @property
    def drawn(self) -> np.ndarray:
        """The weights as pictures have them: 0 at queries that are padding, whose weights mean nothing."""
        return self.weights * self.real_queries[:, None]

    def only(self, layers: Sequence[int] | None = None, of_heads: Sequence[int] | None = None) -> "AttentionMaps":
        """The same with these layers and heads alone, by their numbers from 1. How much a head adds is still over the
        mean of all heads of its layer. Raises UsageError where there is none of a number."""
        rows = _places(self.layers if layers is None else layers, self.layers, "layer", self.title)
        columns = _places(self.heads if of_heads is None else of_heads, self.heads, "head", self.title)
        chosen = dataclasses.replace(
            self,
            weights=self.weights[np.ix_(rows, columns)],
            norms=None if self.norms is None else self.norms[np.ix_(rows, columns)],
            implied=[self.implied[row] for row in rows],
            layers=[self.layers[row] for row in rows],
            heads=[self.heads[column] for column in columns],
        )
        fields = {name: value[np.ix_(rows, columns)] for name, value in vars(self.figures).items()}
        vars(chosen)["figures"] = Heads(**fields)
        return chosen

    def svg(self) -> str:
        """Every head as a heat map in one SVG file, a row of them for each layer."""
        from xformers_lab.attention_maps import picture

        return picture.svg(self)

    def page(self, path: pathlib.Path | str) -> pathlib.Path:
        """Write the interactive page, one HTML file that needs no network; -> its path. Raises OSError where it cannot
        be written, and UsageError where it would hold too many weights."""
        from xformers_lab.attention_maps import page

        return page.write([self], path)

    def _repr_html_(self) -> str:
        from xformers_lab.attention_maps import picture

        return picture.inline(self)

    def __repr__(self) -> str:
        L, N, T, S = self.weights.shape
        return f"<AttentionMaps {self.title}: {L} layers of {N} heads, {T} queries of {S} keys>"


def _places(wanted: Sequence[int], there: Sequence[int], what: str, title: str) -> list[int]:
    if missing := [number for number in wanted if number not in there]:
        raise UsageError(f"{title}: no {what} {missing[0]}: it has {what}s {there[0]} to {there[-1]}")
    return [list(there).index(number) for number in wanted]
