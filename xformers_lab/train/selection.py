"""Which parameters of a run count: those of its last step, or those of its best validation (select=best); with `ema`
the average after that step in their place.

The best so far stand in each checkpoint beside the state of training, so that a run which goes on from it ends as one
that nothing disturbed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from xformers_lab.train.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """Parameters, as they were scored, and other variables after the step whose validation has been the best so far;
    before the first validation those that training began with, at step 0."""

    params: Any
    extra: Any
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a checkpoint holds of a run with select=best."""

    state: TrainState
    best: Best


def scored(state: TrainState) -> TrainState:
    """The state with the parameters that are scored after its step, and no other average."""
    return state if state.average is None else dataclasses.replace(state, params=state.average, average=None)


def best_of(state: TrainState) -> Best:
    """Copies, for the next step uses up its state."""
    return jax.tree.map(jnp.copy, Best(scored(state).params, state.extra, state.step))


def kept(state: TrainState, best: Best | None) -> TrainState | Kept:
    """What a checkpoint holds; best: None with select=last."""
    return state if best is None else Kept(state, best)


def parted(kept: TrainState | Kept) -> tuple[TrainState, Best | None]:
    """The inverse of `kept`."""
    return (kept.state, kept.best) if isinstance(kept, Kept) else (kept, None)


def chosen(state: TrainState, best: Best | None) -> TrainState:
    """The state whose parameters count, of `best` where there was a validation, with their step."""
    if best is None or int(best.step) == 0:
        return scored(state)
    return dataclasses.replace(state, params=best.params, extra=best.extra, step=best.step, average=None)


def improves(metric: float, on: float | None, *, higher_is_better: bool) -> bool:
    """Whether a validation is better than the best so far, None for none; of equals the earlier stays."""
    return on is None or (metric > on if higher_is_better else metric < on)
