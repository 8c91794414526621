from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.ffn import Activation
from xformers_lab.ffn._experts import Experts, evenness
from xformers_lab.ffn.mlp import Mlp
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Moe(Experts):
    """Mixture of experts: a router sends each token to its best `top` of many networks (Shazeer et al., 2017, arXiv
    1701.06538; top=1: Switch, Fedus et al., 2021, arXiv 2101.03961; choice=expert: Zhou et al., 2022, 2202.09368).

    y = sum over the chosen e of p_e f_e(x), p = softmax(W x); with top above 1 the chosen p are scaled to a sum of 1.
    Nothing is dropped unless a capacity says so: then each expert keeps the tokens with the largest p in their
    sequence, whatever their order; an equal share is one of the valid tokens, so that padding changes nothing. What is
    computed grows with the tokens that experts keep, in blocks of them, and not with the experts or the most that one
    of them got: without a capacity it is dropless in the sense of MegaBlocks (Gale et al., 2022, arXiv 2211.15841).
    Auxiliary losses: balance, E sum_e (share of tokens)(mean p) per sequence; and z, the mean squared log-sum-exp of
    the router (Zoph et al., 2022, arXiv 2202.08906).

    Many narrow experts, `experts=32:top=4:ratio=1`, and `shared` ones that every token passes, together one network f
    that is as wide as all of them, y + f(x), are DeepSeekMoE (Dai et al., 2024, arXiv 2401.06066). With `bias` tokens
    choose by p_e + b_e and weigh by p_e alone; after each training pass b_e grows by `bias` where expert e got fewer
    tokens of the batch than the mean, and falls by it where it got more, so that balance=0 may do (Wang et al., 2024,
    arXiv 2408.15664).
    Deviations from these papers: p is a softmax, where the last has sigmoids; shared experts have biases, as ffn=mlp
        has, and chosen ones have none.

    Options:
        experts: how many networks
        top: networks per token; of choice=token
        choice: token: tokens choose experts; expert: each expert chooses its share of a sequence's tokens
        capacity: tokens an expert takes, as a multiple of an equal share; none: all that come (choice=expert: 1)
        ratio: hidden width of one expert over model width
        activation: between the layers
        balance: weight of the balance loss
        z: weight of the z loss
        shared: experts that every token passes, beside those that it chooses
        bias: by how much a training pass moves the bias of an expert's choice; of choice=token
    """

    later_options: ClassVar = ("shared", "bias")

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
        shared: int = 0,
        bias: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top <= experts:
            raise Refused(f"top={top} must be from 1 to experts={experts}")
        if choice == "expert" and top > 1:
            raise Refused(f"top={top} is of choice=token; experts that choose take capacity={top} equal shares")
        if capacity is not None and capacity <= 0:
            raise Refused(f"capacity must be above 0, got {capacity}")
        if balance < 0 or z < 0:
            raise Refused(f"balance and z are weights of losses, at least 0: got {balance} and {z}")
        if shared < 0 or bias < 0:
            raise Refused(f"shared and bias must be at least 0, got {shared} and {bias:g}")
        if bias and choice == "expert":
            raise Refused(f"bias={bias:g} balances what tokens choose: experts that choose are balanced; leave it out")
        self.router = Linear(size.dim, experts, use_bias=False, rngs=rngs)
        super().__init__(size, experts=experts, ratio=ratio, activation=activation, rngs=rngs)
        self.top, self.choice, self.capacity = top, choice, capacity
        self.balance, self.z, self.rate = balance, z, bias
        self.always = Mlp(size, ratio=shared * ratio, activation=activation, rngs=rngs) if shared else None
        if bias:
            self.bias = nnx.Variable(jnp.zeros(experts))

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        if self.always is not None:
            self.always.scale_init(share)

    def not_causal(self) -> str | None:
        if self.choice == "expert":
            return "experts choose among all tokens of a sequence, later ones too; use choice=token"
        if self.capacity is not None:
            return "with a capacity, later tokens displace earlier ones; use capacity=none"
        return None

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        logits = self.router(x.astype(jnp.float32))
        p = jax.nn.softmax(logits)
        choose = self._by_expert if self.choice == "expert" else self._by_token
        assigned, sent, most = choose(p, valid)
        y = self.run(x, *assigned, most)
        if self.always is not None:
            y = y + self.always(x)[0]
        if self.rate and key is not None:
            load = lax.stop_gradient(sent).sum(0)
            self.bias[...] = self.bias[...] + self.rate * jnp.sign(load.mean() - load)
        squared = jnp.where(valid, jax.nn.logsumexp(logits, -1) ** 2, 0).sum() / jnp.maximum(valid.sum(), 1)
        balance, busiest = evenness(p, sent, self.top, valid)
        losses = {"balance": self.balance * self.experts * balance, "router_z": self.z * squared}
        return y, Aux(losses=losses, scalars={"busiest_expert": busiest})

    # Both ways to choose give place, expert and weight (B, m) as run_experts takes them, how many tokens chose, or were
    # chosen by, each expert (B, E), and how many of the m an expert may have taken.

    def _by_token(self, p, valid):
        (B, T, E), top = p.shape, self.top
        expert = lax.top_k(p + self.bias[...] if self.rate else p, top)[1]
        weight = jnp.take_along_axis(p, expert, -1)
        if top > 1:
            weight = weight / weight.sum(-1, keepdims=True)
        expert = jnp.where(valid[..., None], expert, E)
        of_expert = jax.nn.one_hot(expert, E)
        chosen = of_expert.sum(2)
        if self.capacity is None:
            place = jnp.broadcast_to(jnp.repeat(jnp.arange(T), top), (B, T * top))
            return (place, expert.reshape(B, -1), weight.reshape(B, -1)), chosen.sum(1), T * top
        place, taken = self._best(chosen * p, valid)
        assigned = self._assigned(place, taken, (of_expert * weight[..., None]).sum(2))
        return assigned, chosen.sum(1), min(T * top, assigned[0].shape[1])

    def _by_expert(self, p, valid):
        place, taken = self._best(jnp.where(valid[..., None], p, 0), valid)
        assigned = self._assigned(place, taken, p)
        return assigned, taken.sum(-1), assigned[0].shape[1]

    def _best(self, scores, valid):
        """The places (B, E, C) of the largest of scores (B, T, E) in each sequence, and which of them an expert keeps:
        those above 0, as many as it takes of a sequence of so many valid tokens."""
        T = scores.shape[1]
        length = np.arange(T + 1)
        share = (self.capacity or 1.0) * self.top / self.experts
        takes = np.minimum(np.maximum(np.round(share * length), 1), length).astype(np.int32)
        best, place = lax.top_k(scores.swapaxes(1, 2), int(takes[T]))
        room = jnp.asarray(takes)[valid.sum(1)]
        return place, (best > 0) & (jnp.arange(takes[T]) < room[:, None, None])

    def _assigned(self, place, taken, weight):
        """place, taken (B, E, C), and the weight (B, T, E) of an expert for a token."""
        expert = jnp.where(taken, jnp.arange(self.experts)[:, None], self.experts)
        weight = jnp.take_along_axis(weight.swapaxes(1, 2), place, 2)
        flat = lambda each: each.reshape(len(place), -1)
        return flat(place), flat(expert), flat(weight)
