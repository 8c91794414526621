"""Many small feed-forward networks, each run on the tokens that were sent to it: nothing is computed for the others.

Tokens are put in order of their expert, every expert's share filled up to whole blocks, so that a block is one product
with one expert's matrix. The work grows with the tokens sent, plus at most one block per expert.

On a mesh every device sees to its own sequences. Where the networks are shared out over the mesh too, tokens travel to
the device of their expert and back, all to all. A round carries ROOM times an even share from each device to each
other. Where more is to go between any two, further rounds follow, as many as that takes, so that nothing is dropped.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from xformers_lab.errors import Refused
from xformers_lab.ffn import ACTIVATIONS, Bank, Ffn, hidden_size
from xformers_lab.layouts import EXPERTS
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.size import Size

BLOCK = 64
ROOM = 1.25


def run_experts(
    x: jax.Array,
    place: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    up: jax.Array,
    down: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    most: int | None = None,
) -> jax.Array:
    """x (B, T, D); place and expert (B, m) int32, weight (B, m); up (E, D, F), down (E, F, D) -> (B, T, D)

    y[b, t] = the sum over all j with place[b, j] = t of weight[b, j] down_e act(up_e x[b, t]), e = expert[b, j]

    An expert number of E sends nowhere; most: no more than so many of a sequence's m go somewhere (None: all may).
    """
    most = place.shape[1] if most is None else most
    mesh = jax.sharding.get_abstract_mesh()
    if EXPERTS not in mesh.axis_names:
        y = _run(*_flat(x, place, expert, weight), up, down, activation, most * len(x))
        return y.reshape(*x.shape[:2], -1)
    # A depth may work on some of a batch's sequences, which the devices need not divide.
    missing = -len(x) % mesh.size
    fill = lambda leaf, value=0: jnp.pad(
        leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), constant_values=jnp.asarray(value, leaf.dtype)
    )
    run = functools.partial(_run_shared, activation=activation, most=most, axes=mesh.axis_names)
    shared, banks = PartitionSpec(mesh.axis_names), PartitionSpec(EXPERTS)
    # Unchecked, for the checks want every loop's start to say over which axes it varies.
    run = jax.shard_map(run, in_specs=(shared,) * 4 + (banks,) * 2, out_specs=shared, check_vma=False)
    return run(fill(x), fill(place), fill(expert, len(up)), fill(weight), up, down)[: len(x)]


def _flat(x, place, expert, weight):
    """The same with one axis for sequences and places: rows (n, D), and for every assignment its row."""
    B, T, D = x.shape
    row = place + T * jnp.arange(B)[:, None]
    return x.reshape(B * T, D), row.reshape(-1), expert.reshape(-1), weight.reshape(-1)


def _run(x, row, expert, weight, up, down, activation, most: int):
    """x (n, D); row, expert, weight (m,), of which no more than `most` go somewhere -> (n, D)."""
    n, E = len(x), len(up)
    block = min(BLOCK, max(8, most // E))
    M = most // block + E
    order = jnp.argsort(expert, stable=True)
    counts = jnp.zeros(E, jnp.int32).at[expert].add(1, mode="drop")
    blocks = -(-counts // block)
    ends = jnp.cumsum(blocks)
    # Where each assignment stands: its expert's first block, and its rank among the expert's.
    sorted_expert = expert[order]
    rank = jnp.arange(len(order)) - (jnp.cumsum(counts) - counts)[sorted_expert]
    slot = jnp.where(sorted_expert < E, (ends - blocks)[sorted_expert] * block + rank, M * block)
    source = jnp.full(M * block, n, jnp.int32).at[slot].set(row[order].astype(jnp.int32), mode="drop")
    share = jnp.zeros(M * block, weight.dtype).at[slot].set(weight[order], mode="drop")
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(M), side="right"), E - 1)
    rows = jnp.take(x, source, axis=0, mode="fill", fill_value=0).reshape(M, block, -1)
    hidden = activation(grouped(rows, up, owner))
    out = grouped(hidden.astype(x.dtype), down, owner).reshape(M * block, -1) * share[:, None].astype(jnp.float32)
    return jnp.zeros((n, out.shape[1]), jnp.float32).at[source].add(out, mode="drop").astype(x.dtype)


def _run_shared(x, place, expert, weight, up, down, *, activation, most: int, axes):
    """`run_experts` as one device of the mesh does it: x and assignments of its sequences, up and down of its own."""
    shape = x.shape[:2]
    x, row, expert, weight = _flat(x, place, expert, weight)
    shards, per_device, most = lax.axis_size(EXPERTS), len(up), most * shape[0]
    if shards == 1:
        return _run(x, row, expert, weight, up, down, activation, most).reshape(*shape, -1)
    room = math.ceil(ROOM * most / shards)
    # Assignments by the device they go to, and the rank of each among those; `shards` is nowhere.
    order = jnp.argsort(expert, stable=True)
    row, expert, weight = row[order], expert[order], weight[order]
    to = expert // per_device
    counts = jnp.zeros(shards, jnp.int32).at[to].add(1, mode="drop")
    rank = jnp.arange(len(to)) - (jnp.cumsum(counts) - counts)[to]
    # The same number everywhere, for what some devices do not take part in would wait for them.
    rounds = lax.pmax(-(-counts.max() // room), axes)
    over = functools.partial(lax.all_to_all, axis_name=EXPERTS, split_axis=0, concat_axis=0, tiled=True)

    def travel(number):
        at = rank - number * room
        slot = jnp.where((to < shards) & (at >= 0) & (at < room), to * room + at, shards * room)
        sent = lambda nothing, values: jnp.full(shards * room, nothing, values.dtype).at[slot].set(values, mode="drop")
        source, share = sent(len(x), row), sent(0, weight)
        rows = over(jnp.take(x, source, axis=0, mode="fill", fill_value=0))
        ones = jnp.ones(len(rows), jnp.float32)
        local = over(sent(per_device, expert % per_device))
        out = _run(rows, jnp.arange(len(rows)), local, ones, up, down, activation, len(rows))
        back = over(out).astype(jnp.float32) * share[:, None].astype(jnp.float32)
        return jnp.zeros((len(x), back.shape[1]), jnp.float32).at[source].add(back, mode="drop")

    def further(y, number):
        # Computed anew in the backward pass, or every round that might be would keep its hidden layers.
        more = lambda y: y + jax.checkpoint(travel, prevent_cse=False)(number)
        return lax.cond(number < rounds, more, lambda y: y, y), None

    y, _ = lax.scan(further, travel(0), jnp.arange(1, math.ceil(most / room)))
    return y.astype(x.dtype).reshape(*shape, -1)


@jax.custom_vjp
def grouped(rows: jax.Array, weights: jax.Array, owner: jax.Array) -> jax.Array:
    """rows (M, block, D), weights (E, D, F), owner (M,) -> (M, block, F), rows[m] weights[owner[m]] in float32."""
    return _grouped(rows, weights, owner)


def _grouped(rows, weights, owner):
    product = lambda pair: jnp.dot(pair[0], weights[pair[1]], preferred_element_type=jnp.float32)
    return lax.map(product, (rows, owner))


def _forward(rows, weights, owner):
    # Not by `grouped`, so that a second derivative is of plain products.
    return _grouped(rows, weights, owner), (rows, weights, owner)


def _backward(saved, grad):
    rows, weights, owner = saved

    def one(total, block):
        row, g, at = block
        # Only one expert's gradient is touched, in place.
        added = lax.dynamic_index_in_dim(total, at, keepdims=False) + jnp.dot(
            row.T, g.astype(row.dtype), preferred_element_type=jnp.float32
        )
        total = lax.dynamic_update_index_in_dim(total, added, at, 0)
        return total, jnp.dot(g.astype(row.dtype), weights[at].T, preferred_element_type=jnp.float32)

    total, drows = lax.scan(one, jnp.zeros(weights.shape, jnp.float32), (rows, grad, owner))
    return drows.astype(rows.dtype), total.astype(weights.dtype), None


grouped.defvjp(_forward, _backward)


def evenness(p: jax.Array, sent: jax.Array, top: int, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far a router's choice is from even: sum_e (share of tokens)(mean p), the mean over the sequences, which is
    1/E where all is even (Fedus et al., 2021, arXiv 2101.03961); and the largest share over an even one.

    Args:
        p: (B, T, E) by which experts are chosen.
        sent: (B, E) how many of a sequence's tokens went to each.
        top: how many experts each of them went to.
        valid: (B, T) bool.
    """
    count = jnp.maximum(valid.sum(1), 1)[:, None]
    mean = jnp.where(valid[..., None], p, 0).sum(1) / count
    share = sent / count / top
    return (share * mean).sum(-1).mean(), p.shape[-1] * share.max(-1).mean()


class Experts(Ffn):
    """Networks of two layers without biases, of which each token is sent through a few. A subclass says which."""

    def __init__(self, size: Size, *, experts: int, ratio: float, activation: str, rngs: nnx.Rngs):
        if experts < 1:
            raise Refused(f"experts must be at least 1, got {experts}")
        hidden = hidden_size(size, ratio)
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = Bank(draw(rngs.params(), (experts, size.dim, hidden)), decays=True)
        self.down = Bank(draw(rngs.params(), (experts, hidden, size.dim)), decays=True)
        self.experts, self.activation = experts, activation

    def scale_init(self, share: float) -> None:
        scale_init(share, self.up, self.down)

    def run(
        self, x: jax.Array, place: jax.Array, expert: jax.Array, weight: jax.Array, most: int | None = None
    ) -> jax.Array:
        """`run_experts` of these networks."""
        up, down = self.up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        return run_experts(x, place, expert, weight, up, down, ACTIVATIONS[self.activation], most)

    def run_chosen(self, x: jax.Array, expert: jax.Array, weight: jax.Array) -> jax.Array:
        """The same where each token chose for itself: x (B, T, D), expert and weight (B, T, k)."""
        B, T, k = expert.shape
        place = jnp.broadcast_to(jnp.repeat(jnp.arange(T), k), (B, T * k))
        return self.run(x, place, expert.reshape(B, -1), weight.reshape(B, -1))
