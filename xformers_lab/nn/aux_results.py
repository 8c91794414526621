"""What a pass through a model, or through a part of it, gives beside its output."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Named = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """The auxiliary results of a part of a model, by name. `a + b` is those of two parts together, `a | b` those of `a`
    where `b` has none of that name.

    Args:
        losses: scalars that training adds to its loss, each already weighted; metrics call them "loss/<name>".
        predictions: (weight, logits), further predictions of the task's targets, whose loss training adds with
            that weight; metrics call these losses "loss/<name>", too.
        ahead: (weight, states (heads, B, T, D)), states of which the model predicts the targets of later positions:
            those of the first head the target 1 place behind, and so on; training adds their losses with that weight,
            and metrics call them "loss/<name>2", "loss/<name>3", by the token they are of.
        tokens: figures of each token, (B, T) float32, NaN where one is padding. Evaluation gives their means by
            position; training leaves them out.
        scalars: scalars to look at, which train nothing. "computation" is what a token cost, see depth/.
    """

    losses: Named = dataclasses.field(default_factory=dict)
    predictions: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    ahead: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    tokens: Named = dataclasses.field(default_factory=dict)
    scalars: Named = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Aux") -> "Aux":
        """Values of one name are summed. A part without a figure of each token gave all tokens its scalar of that name.

        Raises:
            ValueError: both parts have a prediction of one name.
        """
        if not isinstance(other, Aux):
            return NotImplemented
        if twice := (self.predictions.keys() & other.predictions.keys()) | (self.ahead.keys() & other.ahead.keys()):
            raise ValueError(f"two parts of a model have predictions of one name: {', '.join(sorted(twice))}")
        of_token = lambda part, name: part.tokens.get(name, part.scalars.get(name, 0.0))
        return Aux(
            _summed(self.losses, other.losses),
            self.predictions | other.predictions,
            self.ahead | other.ahead,
            {name: of_token(self, name) + of_token(other, name) for name in self.tokens | other.tokens},
            _summed(self.scalars, other.scalars),
        )

    def __or__(self, other: "Aux") -> "Aux":
        if not isinstance(other, Aux):
            return NotImplemented
        return self._with(other, lambda a, b: a | b)

    def __bool__(self) -> bool:
        return any((self.losses, self.predictions, self.ahead, self.tokens, self.scalars))

    def among(self, other: "Aux") -> "Aux":
        """The values whose names `other` has."""
        return self._with(other, lambda mine, names: {name: mine[name] for name in names})

    def metrics(self) -> Named:
        """Losses and scalars as a line of metrics.jsonl names them."""
        return {f"loss/{name}": value for name, value in self.losses.items()} | self.scalars

    def _with(self, other: "Aux", of_one: Callable[[dict, dict], dict]) -> "Aux":
        names = [field.name for field in dataclasses.fields(self)]
        return Aux(**{name: of_one(getattr(self, name), getattr(other, name)) for name in names})


def computation(layers: Any) -> Aux:
    """What a token cost, as a number of layers."""
    return Aux(scalars={"computation": jnp.asarray(layers, jnp.float32)})


def by_token(name: str, values: jax.Array, valid: jax.Array | None) -> Aux:
    """A figure of each token, and its mean over the valid ones.

    Args:
        values: (B, T).
        valid: (B, T) bool, or None where nothing is padding.
    """
    values = values.astype(jnp.float32)
    marked = values if valid is None else jnp.where(valid, values, jnp.nan)
    return Aux(tokens={name: marked}, scalars={name: mean_of(values, valid)})


def mean_of(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    """() of values (B, T) over valid tokens (B, T); all where `valid` is None."""
    if valid is None:
        return values.mean()
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def _summed(a: Named, b: Named) -> Named:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in a | b}
