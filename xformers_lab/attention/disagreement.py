from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._engine.heads import over_samples
from xformers_lab.attention._engine.query_blocks import ROWS, by_blocks, largest, seen_from
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

EPSILON = 1e-6


class Disagreement(Full):
    """Multi-head attention with disagreement regularisation (Li et al., 2018, arXiv 1810.10183).

    Full attention; the loss gets weight times how much the heads agree: the mean over all pairs of heads (i, j), i = j
    too, of cos(o_i, o_j) (outputs), of cos(v_i, v_j) (values), or of sum_s p_i(s) p_j(s) (positions).

    The loss is a mean over the positions that are no padding, so its size does not depend on the length.
    Deviations from the paper: agreement of positions is a mean over queries, not a sum.

    Options:
        on: what of the heads is compared: their outputs, their values or the positions they attend to
        weight: the share of the agreement in the loss
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        time_note=", for positions half as much again",
        memory_note="per row of blocks",
    )

    def __init__(
        self,
        size: Size,
        *,
        on: Literal["outputs", "values", "positions"] = "outputs",
        weight: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if weight < 0:
            raise Refused(f"weight must be at least 0, got {weight:g}")
        super().__init__(size, rngs=rngs)
        self.on, self.weight = on, weight

    def attend_heads(self, call: Call):
        out, carry, aux = super().attend_heads(call)
        of_pairs = self._by_pairs if call.method == "reference" else self._by_means
        agreement = of_pairs(call, out)
        return out, carry, aux | Aux(losses={"disagreement": self.weight * agreement}, scalars={"agreement": agreement})

    def _by_means(self, call: Call, out):
        """The mean over pairs of heads of u_i . u_j is the square of the mean u."""
        q, k, v, valid, causal, bias = call.q, call.k, call.v, call.valid, call.causal, call.bias
        if self.on == "positions":
            at_once = max(16, ROWS // q.shape[2])
            heads = lambda y: jnp.swapaxes(jnp.repeat(y, q.shape[2] // y.shape[2], 2), 1, 2)

            def one(q, k, _, valid):
                row = lambda q, at, keys: _shared(q, k, at, seen_from(at, keys, valid, causal), bias)
                return by_blocks(row, jnp.swapaxes(q, 0, 1), k.shape[1], False, at_once=at_once)

            shared = over_samples(one, heads(q), heads(k), None, valid, plan=plan_of(self.size))
            return _mean(shared, _asked(q, k, valid))
        u, counted = (out, _asked(q, k, valid)) if self.on == "outputs" else (v, _of_keys(k, valid))
        return _mean((_directions(u, counted).mean(2) ** 2).sum(-1), counted)

    def _by_pairs(self, call: Call, out):
        """The same by definition."""
        q, k, v, valid = call.q, call.k, call.v, call.valid
        if self.on == "positions":
            u = self._weights(call)
            counted = _asked(q, k, valid)
        else:
            u, counted = (out, _asked(q, k, valid)) if self.on == "outputs" else (v, _of_keys(k, valid))
            u = _directions(u, counted)
        return _mean(jnp.einsum("btnh,btmh->btnm", u, u).mean((2, 3)), counted)

    def _weights(self, call: Call):
        """(B, T, N, S)."""
        q, k, valid, causal, bias = call.q, call.k, call.valid, call.causal, call.bias
        k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        T, S = q.shape[1], k.shape[1]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        s = jnp.einsum("btnh,bsnh->btns", q, k, preferred_element_type=jnp.float32) / q.shape[3] ** 0.5
        if bias is not None:
            s += jnp.swapaxes(jax.vmap(lambda bias: bias(at, keys))(bias), 0, 1)
        seen = ((keys <= at) | (not causal))[None] & _of_keys(k, valid)[:, None]
        return masked_softmax(s, seen[:, :, None])

    @staticmethod
    def limit(length: int):
        return {}

    def cost(self, T: int, S: int) -> Cost:
        one, H = super().cost(T, S), self.size.head
        if self.on != "positions":
            return one
        memory = max(one.memory, largest(T, S, H, max(16, ROWS // self.size.heads)))
        return Cost(flops=one.flops + 2 * T * S * H, memory=memory, state=one.state)


def _shared(q, k, at, seen, bias):
    """(C, N, H), (N, S, H) and positions (C, 1) -> (C,): the sum over keys of the heads' mean weight, squared."""
    q, k = jnp.swapaxes(q, 0, 1) * q.shape[-1] ** -0.5, jnp.swapaxes(k, 1, 2)
    s = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        s = s + jax.vmap(lambda bias: bias(at, jnp.arange(k.shape[2])[None]))(bias)
    return (masked_softmax(s, seen).mean(0) ** 2).sum(-1)


def _directions(u, counted):
    """(B, T, N, H) as unit vectors; zeros stay zeros, and what is not counted leaves no trace in the gradient."""
    u = jnp.where(counted[..., None, None], u.astype(jnp.float32), 0)
    return u * jax.lax.rsqrt((u**2).sum(-1, keepdims=True) + EPSILON)


def _of_keys(k, valid):
    return jnp.ones(k.shape[:2], bool) if valid is None else valid


def _asked(q, k, valid):
    """(B, T): the queries that are no padding, as far as is known; queries of their own source count all."""
    return _of_keys(k if q.shape[1] == k.shape[1] else q, valid if q.shape[1] == k.shape[1] else None)


def _mean(x, counted):
    return jnp.where(counted, x, 0).sum() / jnp.maximum(counted.sum(), 1)
