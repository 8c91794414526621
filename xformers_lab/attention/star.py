import functools
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.size import Size


class Star(MultiHead):
    """Star-Transformer (Guo et al., 2019, arXiv 1902.09113, section 3 and algorithm 1).

    A ring of satellites and one relay r: out_t = sum_c softmax_c(q_t . k_c / sqrt(H)) v_c over five nodes c: positions
    t - 1, t, t + 1 (the last and the first are neighbours), the embedding e_t that position t had in the first layer,
    and r. Between two layers the relay looks at itself and at every satellite: r <- norm(relu(attention(r, [r; x]))),
    at first mean(x).

    A drawing shows the ring alone.
    Deviations from the paper: x and e are what the residual block hands to attention; its residual, normaliser and
    feed-forward stand in place of the satellites' norm(relu()). The relay is updated as the next layer begins. Rotary
    positions turn the keys of the ring alone.
    """

    kind = "sparse by position"
    exact = True
    accuracy = "for its graph; two steps lead from any position to any other"
    complexity = Complexity(time="O(T (H + D))", memory="O(T H)", decoding="nothing")
    refuses: ClassVar = {
        "causal": "the relay gathers every position",
        "map": "two of the five nodes that a query sees, the relay and the first layer's embedding, are no values",
    }

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.relay_query, self.relay_key, self.relay_value, self.relay_out = (
            Linear(size.dim, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs) for _ in range(4)
        )
        self.relay_norm = LayerNorm(size.dim, dtype=size.dtype, rngs=rngs)

    def attend_heads(self, call: Call):
        if call.causal:
            raise Refused(why_not(type(self), "causal"))
        q, k, v, x, valid, carry = call.q, call.k, call.v, call.x, call.valid, call.carry
        assert x is not None
        carry = self.initial_carry(q.shape[0], q.shape[1], k.shape[1]) if carry is None else carry
        valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
        first = (carry["layers"] == 0)[:, None]
        relay = jnp.where(first, _mean(x, valid), self._relay(carry["relay"].astype(x.dtype), x, valid))
        embedding = jnp.where(first[..., None], x, carry["embedding"].astype(x.dtype))
        # As many heads as the keys that came: a caller may have repeated them.
        heads = lambda y: jnp.repeat(y := y.reshape(*y.shape[:-1], -1, self.size.head), k.shape[2] // y.shape[-2], -2)
        satellites = jax.checkpoint(_ring) if call.method == "attend" else _graph
        of_embedding, of_relay = ([heads(self.key(node)), heads(self.value(node))] for node in (embedding, relay))
        out = satellites(q, k, v, of_embedding, of_relay, valid, call.bias)
        new = {"relay": relay, "embedding": embedding, "layers": carry["layers"] + 1}
        return out, jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry), Aux()

    def drawn(self, causal: bool, head: int = 0):
        """The ring alone: the relay and the embeddings of the first layer are no positions of the sequence."""
        return lambda q, k: _neighbours(q, k, self.size.length)

    def _relay(self, relay, x, valid):
        """(B, D): the relay after one look at itself and at x (B, S, D)."""
        B, N, H = x.shape[0], self.size.heads, self.size.head
        nodes = jnp.concatenate([relay[:, None], x], 1)
        q = self.relay_query(relay).reshape(B, N, H) * H**-0.5
        k, v = (linear(nodes).reshape(B, -1, N, H) for linear in (self.relay_key, self.relay_value))
        s = jnp.einsum("bnh,bsnh->bns", q, k, preferred_element_type=jnp.float32)
        seen = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)[:, None]
        p = jax.nn.softmax(jnp.where(seen, s, MASKED), -1)
        out = jnp.einsum("bns,bsnh->bnh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return self.relay_norm(jax.nn.relu(self.relay_out(out.reshape(B, -1).astype(x.dtype))))

    @classmethod
    def carries(cls) -> bool:
        return True

    def init_carry(self, T: int, S: int):
        """Of one sequence: the relay and the embeddings, set by the first layer, and how many layers have run."""
        kept = {"relay": (self.size.dim,), "embedding": (S, self.size.dim)}
        return {name: jnp.zeros(shape, self.size.dtype) for name, shape in kept.items()} | {"layers": jnp.int32(0)}

    def initial_carry(self, B: int, T: int, S: int):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), self.init_carry(T, S))

    def cost(self, T: int, S: int) -> Cost:
        D, H = self.size.dim, self.size.head
        return Cost(flops=8 * S * D * H + 4 * S * H, memory=max(T, S) * H, state=0)


def _mean(x, valid):
    """(B, S, D) -> (B, D), over what is no padding."""
    total = jnp.where(valid[..., None], x, 0).sum(1, dtype=jnp.float32)
    return (total / jnp.maximum(valid.sum(1), 1)[:, None]).astype(x.dtype)


def _ring(q, k, v, of_embedding, of_relay, valid, bias):
    """Satellites by shifted views of the keys, which are all products of single rows.

    q (B, T, N, H); keys and values of the ring and of the embeddings (B, S, K, H), of the relay (B, K, H);
    valid (B, S).
    """
    (B, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
    before = max(T - S, 0) + 1
    # Fewer than three positions are each other's neighbours on both sides, but one node each.
    offsets = (-1, 0, 1) if S > 2 else (0, 1)[:S]

    def near(x, offset):
        """(B, T, ...): what stands `offset` positions on from each query, around the ring."""
        x = jnp.pad(x, [(0, 0), (before, 1)] + [(0, 0)] * (x.ndim - 2), mode="wrap")
        return x[:, (start := before + S - T + offset) : start + T]

    everywhere = lambda relay: jnp.broadcast_to(relay[:, None], (B, T, K, H))
    nodes = lambda x, own, relay: [*(near(x, offset) for offset in offsets), near(own, 0), everywhere(relay)]
    keys, values = (nodes(x, own, relay) for x, own, relay in zip((k, v), of_embedding, of_relay, strict=True))
    seen = [near(valid, offset) for offset in (*offsets, 0)]
    seen = jnp.stack([*seen, jnp.broadcast_to(valid.any(1, keepdims=True), (B, T))], -1)
    q = (q.astype(jnp.float32) * H**-0.5).reshape(B, T, K, N // K, H)
    s = jnp.stack([(q * key[:, :, :, None].astype(jnp.float32)).sum(-1) for key in keys], -1).reshape(B, T, N, -1)
    if bias is not None:
        at = jnp.arange(S - T, S)[:, None]
        added = jax.vmap(lambda bias: bias(at, (at + np.array(offsets)) % S))(bias)
        s = s.at[..., : len(offsets)].add(added.swapaxes(0, 1))
    p = masked_softmax(jnp.where(seen[:, :, None], s, MASKED)).reshape(B, T, K, N // K, -1)
    weighted = [p[..., node, None] * value[:, :, :, None].astype(jnp.float32) for node, value in enumerate(values)]
    return functools.reduce(operator.add, weighted).reshape(B, T, N, H).astype(v.dtype)


def _neighbours(at, keys, S: int):
    """Whether keys are the position itself or beside it on a ring of S."""
    return (keys == at) | (keys == (at + 1) % S) | (keys == (at - 1) % S)


def _graph(q, k, v, of_embedding, of_relay, valid, bias):
    """The same by definition: one softmax over all positions, all embeddings and the relay, with the star's edges."""
    T, S, times = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    at, keys = jnp.arange(S - T, S)[:, None] % S, jnp.arange(S)[None]
    edges = jnp.concatenate([_neighbours(at, keys, S), keys == at, jnp.ones((T, 1), bool)], 1)
    nodes = zip((k, v), of_embedding, of_relay, strict=True)
    k, v = (jnp.repeat(jnp.concatenate([x, own, relay[:, None]], 1), times, 2) for x, own, relay in nodes)
    valid = jnp.concatenate([valid, valid, valid.any(1, keepdims=True)], 1)

    def head(q, k, v, valid, bias):
        s = jnp.dot(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
        if bias is not None:
            s = s.at[:, :S].add(bias(jnp.arange(S - T, S)[:, None], keys))
        return softmax_average(s, edges & valid[None], v)

    of_sample = jax.vmap(head, in_axes=(1, 1, 1, None, 0), out_axes=1)
    return jax.vmap(of_sample, in_axes=(0, 0, 0, 0, None))(q, k, v, valid, bias)
