"""Positions: scores of every pair come from indices, block by block; see inside.py for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab import spec
from xformers_lab.check import inside
from xformers_lab.check.inside import HALF, SAME
from xformers_lab.check.subject import Broken, NotApplicable, compare, moved
from xformers_lab.check.tiny import Inside
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

SIZE = Size(12, dim=8, heads=2)
# Wide enough for root mean squares that hardly vary from draw to draw.
WIDE = Size(64, dim=128, heads=2)


def subject(choice: str) -> Inside:
    return Inside("position", choice, {"position": choice}, both=True)


def declared(subject: Inside) -> None:
    """A class that defines `embed` or `rotate` says so, for memories and mechanisms go by what it says."""
    kind = type(_built(subject))
    for method, says in (("embed", "embeds"), ("rotate", "turns")):
        defines = getattr(kind, method) is not getattr(Position, method)
        if defines and not getattr(kind, says):
            raise Broken(f"it defines `{method}`: write `{says} = True` in its class")
        if getattr(kind, says) and not defines:
            raise Broken(f"it says `{says} = True`, but defines no `{method}`")


def unit_size(subject: Inside) -> None:
    """Tokens of unit size are of unit size after `embed`, at the start, wherever they stand; so positions differ in
    what they say, and not in how loudly."""
    position = spec.build("position", subject.name, WIDE, causal=True)
    if not position.embeds:
        raise NotApplicable("it adds nothing to tokens")
    x = np.random.default_rng(0).standard_normal((32, WIDE.length, WIDE.dim)).astype(np.float32)
    out = np.asarray(position.embed(jnp.asarray(x), jnp.arange(WIDE.length)), np.float32)
    # By quarters of the length, for at its start a convolution, say, sees fewer tokens.
    sizes = np.sqrt(np.square(out).reshape(len(x), 4, -1).mean((0, 2)))
    if (worst := np.abs(sizes - 1)).max() > inside.UNIT:
        at = worst.argmax()
        raise Broken(f"tokens of unit size are of size {sizes[at]:.3g} in quarter {at + 1} of 4 {inside.QUIETER}")


def drawn(subject: Inside) -> None:
    """What it draws in training is a function of the key alone, and it stays as it is itself."""
    position = _built(subject)
    if type(position).drawn is Position.drawn:
        raise NotApplicable("it draws nothing in training")
    before = _said(position)
    one, again, other = (_said(position.drawn(jax.random.key(seed))) for seed in (0, 0, 1))
    if one != again:
        raise Broken("two passes with one key differ: draw from `key` and from nothing else")
    if one == other:
        raise Broken("passes with two keys are the same: define `drawn` where something is drawn, and else leave it")
    if _said(position) != before:
        raise Broken("`drawn` changes the position that evaluation sees: change a copy, as nnx.clone(self) gives one")


def turned(subject: Inside) -> None:
    """Queries and keys keep shape and type, and in bfloat16 are turned as in float32, nearly."""
    position = _built(subject)
    if not position.turns:
        raise NotApplicable("it turns no queries and keys")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 2, 4)), jnp.float32)
    out, half = (position.rotate(x.astype(dtype), jnp.arange(12)) for dtype in ("float32", "bfloat16"))
    if (out.shape, out.dtype, half.dtype) != (x.shape, jnp.float32, jnp.bfloat16):
        raise Broken(
            f"rotate gives {half.dtype} {half.shape} of bfloat16 {x.shape}: cast to x.dtype what it multiplies"
        )
    advice = "Find angles in float32."
    compare(np.asarray(half, np.float32), np.asarray(out), HALF, "rotate in bfloat16 against float32", advice)


def from_indices(subject: Inside) -> None:
    """A score is a function of two positions: one pair, a block and all of them at once give the same, all finite."""
    position, at = _built(subject), jnp.arange(12)
    bias = position.bias() if position.key_terms is None else _compared(position)
    if bias is None:
        raise NotApplicable("it adds nothing to scores")
    for number in range(SIZE.heads):
        head = jax.tree.map(lambda leaf, number=number: leaf[number], bias)
        whole = np.asarray(jnp.broadcast_to(head(at[:, None], at[None]), (12, 12)), np.float32)
        rows = at.reshape(3, 4)
        blocks = np.asarray(jnp.broadcast_to(head(rows[:, :, None], rows[:, None]), (3, 4, 4)), np.float32)
        pair = np.asarray(head(at[7:8, None], at[None, 5:6]), np.float32)
        advice = "Broadcast the two positions, whatever axes they have, and look at nothing else."
        compare(pair, whole[7:8, 5:6], SAME, "the score of one pair against that of all", advice)
        compare(blocks, np.stack([whole[n : n + 4, n : n + 4] for n in (0, 4, 8)]), SAME, "blocks against all", advice)


def pair_values(subject: Inside) -> None:
    """What it adds to the values of pairs is linear in their weights, the same in blocks, and of the distance alone."""
    position, at = _built(subject), jnp.arange(12)
    pairs = position.pair_values()
    if (pairs is not None) != position.adds_to_values:
        raise Broken("`adds_to_values` says whether `pair_values` gives anything, and does not")
    if pairs is None:
        raise NotApplicable("it adds nothing to values")
    p = jnp.asarray(np.random.default_rng(0).random((12, 12)), jnp.float32)
    for number in range(SIZE.heads):
        head = jax.tree.map(lambda leaf, number=number: leaf[number], pairs)
        whole, advice = np.asarray(head(p, at[:, None], at[None])), "Add up the vectors of all pairs by their weights."
        parts = [head(p[:, keys], at[:, None], at[None, keys]) for keys in (slice(0, 5), slice(5, 12))]
        single = jnp.stack([head(jnp.eye(12)[None, s], at[t : t + 1, None], at[None])[0] for t in at for s in at])
        vectors = np.asarray(single).reshape(12, 12, -1)
        compare(np.asarray(sum(parts)), whole, SAME, "keys in two parts against all", advice)
        compare(whole, np.einsum("ts,tsh->th", p, vectors), SAME, "all pairs against each alone", advice)
        far = np.asarray(head(p, at[:, None] + 7, at[None] + 7))
        compare(far, whole, SAME, "the same pairs further on", "Look at distances alone.")


def distances(subject: Inside) -> None:
    """Scores from positions depend on distances alone, unless it says `by_place = True`."""
    position, at = _built(subject), jnp.arange(4)
    bias = position.bias() if position.key_terms is None else None
    if bias is None:
        raise NotApplicable("it adds nothing to scores from positions alone")
    head = jax.tree.map(lambda leaf: leaf[0], bias)
    one, other = (np.asarray(head(at[:, None] + start, at[None] + start), np.float32) for start in (0, 5))
    same = np.abs(one - other).max() <= SAME * max(1.0, float(np.abs(one).max()))
    if not same and not position.by_place:
        raise Broken("its scores change when both positions move by 5: write `by_place = True` in its class")


def _built(subject: Inside) -> Position:
    position = spec.build("position", subject.name, SIZE, causal=True)
    graph, params, rest = nnx.split(position, nnx.Param, ...)
    return nnx.merge(graph, moved(params), rest)


def _said(position: Position) -> bytes:
    """All that a position does to equal tokens, and to queries and keys, and all that it adds to their scores."""
    at, ones = jnp.arange(SIZE.length), jnp.ones((1, SIZE.length, SIZE.heads, SIZE.head))
    bias = position.bias() if position.key_terms is None else _compared(position)
    heads = range(SIZE.heads if bias is not None else 0)
    scores = [jax.tree.map(lambda leaf, head=head: leaf[head], bias)(at[:, None], at[None]) for head in heads]
    said = position.embed(ones.reshape(1, SIZE.length, SIZE.dim), at), position.rotate(ones, at), *scores
    return b"".join(np.asarray(each).tobytes() for each in said)


def _compared(position: Position):
    """The scores of one sample."""
    q, k = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 12, 2, 4)), jnp.float32)
    at, heads = jnp.arange(12), lambda y: jnp.swapaxes(y, 1, 2)
    bias = position.compare(heads(position.of_queries(q, at)), heads(position.of_keys(k, at)), jnp.zeros((1, 2)))
    return jax.tree.map(lambda leaf: leaf[0], bias)


PROPERTIES = [*inside.PROPERTIES, declared, unit_size, drawn, turned, from_indices, distances, pair_values]
