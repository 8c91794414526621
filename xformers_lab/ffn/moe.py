from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.damping import damp
from xformers_lab.ffn import ACTIVATIONS, Activation, Ffn, hidden_size
from xformers_lab.ffn._experts import run_experts
from xformers_lab.linear import Linear
from xformers_lab.size import Size


class Moe(Ffn):
    """Mixture of experts: a router sends each token to its best `top` of many networks (Shazeer et al., 2017, arXiv
    1701.06538; top=1: Switch, Fedus et al., 2021, arXiv 2101.03961; choice=expert: Zhou et al., 2022, 2202.09368).

    y = sum over the chosen e of p_e f_e(x), p = softmax(W x); with top above 1 the chosen p are scaled to a sum of 1.
    Nothing is dropped unless a capacity says so: then each expert keeps the tokens with the largest p in their
    sequence, whatever their order. Auxiliary losses: balance, E sum_e (share of tokens)(mean p) per sequence; and z,
    the mean squared log-sum-exp of the router (Zoph et al., 2022, arXiv 2202.08906).

    Options:
        experts: how many networks
        top: networks per token
        choice: token: tokens choose experts; expert: each expert chooses its share of a sequence's tokens
        capacity: tokens an expert takes, as a multiple of an equal share; none: all that come (choice=expert: 1)
        ratio: hidden width of one expert over model width
        activation: between the layers
        balance: weight of the balance loss
        z: weight of the z loss
    """

    def __init__(
        self,
        size: Size,
        *,
        experts: int = 8,
        top: int = 1,
        choice: Literal["token", "expert"] = "token",
        capacity: float | None = None,
        ratio: float = 4.0,
        activation: Activation = "gelu",
        balance: float = 0.01,
        z: float = 0.001,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top <= experts:
            raise ValueError(f"top={top} must be from 1 to experts={experts}")
        if capacity is not None and capacity <= 0:
            raise ValueError(f"capacity must be above 0, got {capacity}")
        if balance < 0 or z < 0:
            raise ValueError(f"balance and z are weights of losses, at least 0: got {balance} and {z}")
        hidden = hidden_size(size, ratio)
        self.router = Linear(size.dim, experts, use_bias=False, rngs=rngs)
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = nnx.Param(draw(rngs.params(), (experts, size.dim, hidden)))
        self.down = nnx.Param(draw(rngs.params(), (experts, hidden, size.dim)))
        self.experts, self.top, self.choice, self.capacity = experts, top, choice, capacity
        self.activation, self.balance, self.z = activation, balance, z

    def damp(self, share: float) -> None:
        damp(share, self.up, self.down)

    def not_causal(self) -> str | None:
        if self.choice == "expert":
            return "experts choose among all tokens of a sequence, later ones too; use choice=token"
        if self.capacity is not None:
            return "with a capacity, later tokens displace earlier ones; use capacity=none"
        return None

    def __call__(self, x, *, real=None, key=None):
        B, T, D = x.shape
        real = jnp.ones((B, T), bool) if real is None else real
        logits = self.router(x.astype(jnp.float32))
        p = jax.nn.softmax(logits)
        choose = self._by_expert if self.choice == "expert" else self._by_token
        expert, weight, sent = choose(p, real)
        k = expert.shape[-1]
        up, down = self.up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        flat = x.reshape(B * T, D), expert.reshape(B * T, k), weight.reshape(B * T, k)
        y = run_experts(*flat, up, down, ACTIVATIONS[self.activation])
        count = jnp.maximum(real.sum(1), 1)[:, None]
        mean = jnp.where(real[..., None], p, 0).sum(1) / count
        squared = jnp.where(real, jax.nn.logsumexp(logits, -1) ** 2, 0).sum() / jnp.maximum(real.sum(), 1)
        share = sent / count / self.top
        aux = {
            "loss/balance": self.balance * self.experts * (share * mean).sum(-1).mean(),
            "loss/router_z": self.z * squared,
            "busiest_expert": self.experts * share.max(-1).mean(),
        }
        return y.reshape(B, T, D), aux

    def _by_token(self, p, real):
        """Expert and weight (B, T, top) of each token, and how many tokens chose each expert (B, E)."""
        weight, expert = lax.top_k(p, self.top)
        if self.top > 1:
            weight = weight / weight.sum(-1, keepdims=True)
        expert = jnp.where(real[..., None], expert, self.experts)
        chosen = jax.nn.one_hot(expert, self.experts).sum(2)
        if self.capacity is not None:
            kept = self._room(chosen * p, p.shape[1])
            expert = jnp.where(
                jnp.take_along_axis(kept, jnp.minimum(expert, self.experts - 1), 2), expert, self.experts
            )
        return expert, weight, chosen.sum(1)

    def _by_expert(self, p, real):
        kept = self._room(jnp.where(real[..., None], p, 0), p.shape[1])
        expert = jnp.where(kept, jnp.arange(self.experts), self.experts)
        return expert, p, kept.sum(1)

    def _room(self, scores, T: int):
        """(B, T, E) bool: the tokens with the largest scores above 0 of each sequence, as many as an expert takes."""
        many = self.top if self.choice == "token" else 1
        most = min(T, max(1, round((self.capacity or 1.0) * many * T / self.experts)))
        columns = scores.swapaxes(1, 2)
        at = lax.top_k(columns, most)[1]
        kept = jnp.zeros(columns.shape, bool)
        kept = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(True)))(kept, at)
        return (kept & (columns > 0)).swapaxes(1, 2)
