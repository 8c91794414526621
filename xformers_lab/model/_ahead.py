"""Heads that predict tokens further ahead than the next, on the states of one trunk. They run in training alone: a
model decodes and is scored as it is without them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import Model as Axes
from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._stack import build_stack, initial_carries, run_watched
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.later import later
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import RMSNorm
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task


def refuse(choice: Axes, task: Task, *, causal: bool, streams: int) -> None:
    """Raises Refused where a model that is to predict several tokens ahead has none there, or cannot."""
    asked = f"predict={choice.predict}"
    if not causal or task.target == "sequence" or task.channels or "encoder" in task.kinds:
        raise Refused(
            f"{asked}: here the answer of a later position is no token further ahead, as it is where a decoder "
            "predicts the next token (task=lm, copy); leave it out"
        )
    if type(task).loss is not Task.loss:
        raise Refused(f"{asked}: this task has a loss that is no cross-entropy; leave it out")
    if choice.memory != "none":
        raise Refused(f"{asked}: memory={choice.memory} remembers what layers of the trunk see; use memory=none")
    if streams > 1 and choice.predict_by == "sequential":
        raise Refused(
            f"{asked}: norm={choice.norm} has {streams} residual streams, and a head joins the token with one alone; "
            "use predict_by=parallel"
        )


class Further(nnx.Module):
    """A head for each of `count` tokens behind the next one, each a layer like the last of the trunk.

    With z (B, T, D) what the trunk gives, and h_0 = z, of which the next token is predicted:
    by = "parallel": h_k = layer_k(z) (Gloeckle et al., 2024, arXiv 2404.19737)
    by = "sequential": h_k[t] = layer_k(M_k [norm(h_(k-1)[t]); norm(e[t + k])]), e[s] the embedding of token s
    (DeepSeek-V3, 2024, arXiv 2412.19437, section 2.2). Where no token t + k is there, zeros stand for it, and nothing
    is asked of that state or of the later ones, which could look at it.
    The model's final norm and its head, which all share, make logits of each h_k.
    Deviation from the first paper: there the next token has a layer of its own, too, beside those of the others. What a
    mechanism hands to the layer above begins anew here.
    """

    def __init__(self, size: Size, count: int, by: str, *, make_block: MakeBlock, rngs: nnx.Rngs):
        kind = {"parallel": _Beside, "sequential": _Behind}[by]
        make = lambda index, rngs: kind(size, make_block(index, rngs), rngs)
        self.layers = build_stack(make, [size.layers - 1] * count, rngs)
        self.plan = plan_of(size)

    def __call__(self, x: jax.Array, tokens: jax.Array, context: Context, *, key: jax.Array) -> tuple[jax.Array, Aux]:
        """x (B, T, D) of the trunk; tokens (B, T, D), their embeddings -> states (count, B, T, D), aux."""
        B, T = x.shape[:2]
        carries, state = initial_carries([self.layers], B, T, T), lambda x: x["state"]
        first = {"trunk": x, "state": x, "tokens": tokens}
        *_, aux, states = run_watched([self.layers], first, carries, context, key=key, plan=self.plan, watch=state)
        return states, aux


class _Beside(nnx.Module):
    """A layer on what the trunk gave."""

    def __init__(self, size: Size, block: Any, rngs: nnx.Rngs):
        self.block = block

    def initial_carries(self, B: int, T: int, S: int) -> dict:
        return self.block.initial_carries(B, T, S)

    def __call__(self, x, carries, context, *, key=None):
        state, _, aux = self.block(x["trunk"], carries, context, key=key)
        return x | {"state": state}, carries, aux


class _Behind(nnx.Module):
    """A layer on what the one before it gave, joined with the token that this one predicts."""

    def __init__(self, size: Size, block: Any, rngs: nnx.Rngs):
        self.block = block
        self.state_norm, self.token_norm = (RMSNorm(size.dim, rngs=rngs) for _ in range(2))
        self.join = Linear(2 * size.dim, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    def initial_carries(self, B: int, T: int, S: int) -> dict:
        return self.block.initial_carries(B, T, S)

    def __call__(self, x, carries, context, *, key=None):
        state, tokens = x["state"], later(x["tokens"], 1)
        joined = self.join(jnp.concatenate([self.state_norm(state), self.token_norm(tokens)], -1).astype(state.dtype))
        state, _, aux = self.block(joined, carries, context, key=key)
        return x | {"state": state, "tokens": tokens}, carries, aux
