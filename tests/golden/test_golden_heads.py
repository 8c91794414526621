"""Mechanisms that improve multi-head attention: other implementations' numbers, and what the kit does not ask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention._engine.query_blocks import by_blocks, rows, seen_from
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.errors import UsageError

pytestmark = pytest.mark.full

HEADS, HEAD = 4, 8


def build(choice: str, length: int = 16, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=HEADS * HEAD, heads=HEADS, kv_heads=kv_heads)


def draw(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mixed(layer, *arrays, **options):
    """What `mix` gives, compiled cheaply."""
    return jax.jit(lambda *arrays: layer.mix(*arrays, **options)[0])(*arrays)


def called(layer, *arrays, **options):
    return jax.jit(lambda *arrays: layer(*arrays, **options)[0])(*arrays)


def heads_first(x):
    """(B, T, N, H) -> (B, N, T, H), and back."""
    return np.swapaxes(x, 1, 2)


# ---- softcap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_softcap_is_gemma_2(golden, method):
    """The golden call carries no mask, but Gemma's own causal one."""
    peer = golden("softcap_gemma2")
    q, k, v = (heads_first(peer[name]) for name in "qkv")
    out = build("softcap:cap=5", 9, kv_heads=2).mix(q, k, v, causal=True, method=method)[0]
    assert_close(out, peer["y"])


def test_a_small_cap_evens_out_the_weights():
    """No score above the cap: of a query's keys, none weighs more than exp(2 cap) times another."""
    q, k = 10 * draw(1, 16, HEADS, HEAD), 10 * draw(1, 16, HEADS, HEAD, seed=1)
    values = jnp.broadcast_to(jnp.eye(16, 8)[None, :, None], k.shape)
    capped, plain = (mixed(build(choice), q, k, values) for choice in ("softcap:cap=0.5", "full"))
    assert float(plain.max()) > 0.99
    assert float((capped.max(-1) / capped.min(-1)).max()) <= np.exp(1) * (1 + 1e-5)


# ---- rows of queries against all keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(1100, 1100), (1030, 1100), (1100, 1030)])
def test_long_causal_rows_come_in_eighths(T, S):
    """Value and gradients of a softmax with a learned temperature, against all scores at once."""
    q, k, v, heat = draw(T, 4), draw(S, 4, seed=1), draw(S, 4, seed=2), jnp.float32(0.7)
    valid, grad = jnp.asarray(np.random.default_rng(0).random(S) < 0.8), draw(T, 4, seed=3)
    weigh = lambda s, seen, positions, heat: masked_softmax(s / heat - 0.01 * (positions[0] - positions[1]), seen)

    def dense(q, k, v, heat):
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        return weigh(q @ k.T / 2, (keys <= at) & valid, (at, keys), heat) @ v

    def both(q, k, v, heat):
        fast, pull = jax.vjp(lambda q, k, v, heat: rows(q, k, v, weigh, heat, valid=valid, causal=True), q, k, v, heat)
        slow, pull_slow = jax.vjp(dense, q, k, v, heat)
        return (fast, pull(grad)), (slow, pull_slow(grad))

    with jax.default_matmul_precision("highest"):
        fast, slow = jax.jit(both)(q, k, v, heat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max()), fast, slow)


def test_queries_that_no_block_divides():
    """The largest weight of each query, of the mean over heads."""
    q, k = draw(3, 37, 4), draw(3, 41, 4, seed=1)

    def row(q, at, keys):
        s = jnp.swapaxes(q, 0, 1) @ jnp.swapaxes(k, 1, 2) / 2
        return masked_softmax(s, seen_from(at, keys, causal=True)).mean(0).max(-1)

    largest = by_blocks(row, jnp.swapaxes(q, 0, 1), 41, False, at_once=8)
    at, keys = jnp.arange(37)[:, None] + 4, jnp.arange(41)[None]
    expected = masked_softmax(q @ jnp.swapaxes(k, 1, 2) / 2, keys <= at).mean(0).max(-1)
    np.testing.assert_allclose(largest, expected, rtol=1e-5)


# ---- talking heads -------------------------------------------------------------------------------------------------


def test_talking_heads_pass_scores_and_weights_on():
    """A permutation before and its inverse after: query and key of one head, values of the same head, as if none
    talked; the permutation before alone gives every head's values another head's weights."""
    q, k, v = (draw(1, 16, HEADS, HEAD, seed=seed) for seed in range(3))
    talking, turn = build("talking_heads:spread=0"), jnp.roll(jnp.eye(HEADS), 1, 1)
    plain = np.asarray(mixed(build("full"), q, k, v, causal=True))
    talking.before.set_value(turn)  # head n speaks to head n + 1
    out = mixed(talking, q, k, v, causal=True)
    assert_close(out, mixed(build("full"), jnp.roll(q, 1, 2), jnp.roll(k, 1, 2), v, causal=True))
    talking.after.set_value(turn.T)
    assert_close(mixed(talking, q, k, v, causal=True), plain)


# ---- collaborative -------------------------------------------------------------------------------------------------


def test_collaborative_heads_that_share_nothing_are_multi_head_attention():
    """R = N H, and a mixing that leaves each head its own channels."""
    collaborative, full = build(f"collaborative:shared={HEADS * HEAD}", kv_heads=2), build("full")
    own = jnp.repeat(jnp.eye(HEADS), HEAD, 1) * HEADS**0.5
    collaborative.mixing.set_value(own)
    for name in ("query", "key", "out"):
        getattr(full, name).kernel.set_value(getattr(collaborative, name).kernel[...])
    values = collaborative.value.kernel[...].reshape(-1, 2, HEAD)
    full.value.kernel.set_value(jnp.repeat(values, 2, 1).reshape(-1, HEADS * HEAD))
    x, memory = draw(2, 7, 32), draw(2, 16, 32, seed=1)
    valid = jnp.asarray(np.random.default_rng(0).random((2, 16)) < 0.7)
    assert_close(called(collaborative, x, memory, valid=valid), called(full, x, memory, valid=valid))


def test_collaborative_needs_a_quarter_of_the_channels():
    collaborative, full = build("collaborative"), build("full")
    assert collaborative.key.kernel.shape == (32, 8) and full.key.kernel.shape == (32, 32)
    cache = collaborative.init_cache(1, 16)
    assert cache["k"].size == 16 * 8 and cache["v"].size == 16 * 32


# ---- multi-head latent attention -----------------------------------------------------------------------------------


def rotated(x, at):
    """(T, N, H) turned by positions, in numpy (the half-split layout)."""
    H = x.shape[-1]
    angle = at[:, None, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


@pytest.mark.parametrize("options", ["", ":latent=12:rotary=6:query_latent=10"])
def test_mla_is_its_paper_s_equations(options):
    """Equations 9 to 11, 37 to 47 of the paper, position by position, for one sequence with rotary positions."""
    mla, T = build("mla" + options), 9
    x = draw(1, T, 32)
    weight = lambda layer: np.asarray(layer.kernel[...], np.float64)
    normed = lambda y: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    h, at, C, R = np.asarray(x[0], np.float64), np.arange(T), mla.latent, mla.rotary
    down = h @ weight(mla.down)
    latent, rotary = normed(down[:, :C]), rotated(down[:, None, C:], at)[:, 0]
    query = h if mla.query_down is None else normed(h @ weight(mla.query_down))
    q = (query @ weight(mla.query)).reshape(T, HEADS, HEAD + R)
    q_rotary = rotated(q[..., HEAD:], at)
    expanded = (latent @ weight(mla.up)).reshape(T, HEADS, 2 * HEAD)
    out = np.zeros((T, HEADS, HEAD))
    for n in range(HEADS):
        for t in range(T):
            s = np.array([
                (q[t, n, :HEAD] @ expanded[j, n, :HEAD] + q_rotary[t, n] @ rotary[j]) / np.sqrt(HEAD + R)
                for j in range(t + 1)
            ])  # fmt: skip
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            out[t, n] = p @ expanded[: t + 1, n, HEAD:]
    position = spec.build("position", "rope", length=16, dim=32, heads=HEADS)
    assert_close(called(mla, x, causal=True, position=position)[0], out.reshape(T, -1) @ weight(mla.out))


def test_mla_expands_no_key_where_queries_are_few():
    """Both orders of the same sums; one query of many is cheaper in the latent's space, many queries are not."""
    mla = build("mla", 64)
    q, k, v = draw(2, 64, HEADS, 12), draw(2, 64, 1, 4, seed=1), draw(2, 64, 1, 32, seed=2)
    assert mla._absorbs(1, 64) and not mla._absorbs(64, 64)
    all_rows = mixed(mla, q, k, v, causal=True)
    assert_close(mixed(mla, q[:, -1:], k, v, causal=True)[:, 0], all_rows[:, -1])


def test_mla_keeps_one_latent_and_one_rotary_key_per_token():
    cache = build("mla:latent=12:rotary=6").init_cache(1, 16)
    assert cache["k"].shape == (1, 16, 1, 6) and cache["v"].shape == (1, 16, 1, 12)


# ---- layers with rotary positions ----------------------------------------------------------------------------------

LAYERS = ["mla", "mla:query_latent=10", "collaborative", "differential", "talking_heads", "adaptive_span:span=5"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_decode_with_rotary_positions(name):
    """Token by token, from position 0 on, the layer gives what one causal call gives."""
    layer, x = build(name, kv_heads=2), draw(2, 12, 32)
    position = spec.build("position", "rope", length=16, dim=32, heads=HEADS)
    expected = called(layer, x, causal=True, position=position)

    def one(cache, token):
        at, x = token
        out, cache, _ = layer.decode(x, cache, at=at, position=position)
        return cache, out

    _, out = jax.jit(lambda x: jax.lax.scan(one, layer.init_cache(2, 16), (jnp.arange(12), jnp.swapaxes(x, 0, 1))))(x)
    assert_close(jnp.swapaxes(out, 0, 1), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_rotary_positions_are_relative(name):
    """Five tokens of padding in front move every position, and change nothing."""
    layer, x = build(name, 32), draw(1, 12, 32)
    position = spec.build("position", "rope", length=32, dim=32, heads=HEADS)
    expected = called(layer, x, causal=True, position=position)
    shifted, valid = jnp.pad(x, ((0, 0), (5, 0), (0, 0))), jnp.arange(17)[None] >= 5
    assert_close(called(layer, shifted, valid=valid, causal=True, position=position)[:, 5:], expected)


# ---- adaptive span -------------------------------------------------------------------------------------------------


def test_a_span_grows_towards_what_helps_and_shrinks_by_its_penalty():
    """The key 6 back holds the wanted value, z = 4 reaches it by the ramp alone: the loss falls with z."""
    layer = build("adaptive_span:span=8:ramp=4:penalty=0.1")
    q = k = jnp.zeros((1, 16, HEADS, HEAD))
    v = k.at[:, 9].set(1.0)

    graph, part, rest = nnx.split(layer, nnx.PathContains("part"), ...)

    def loss(part, what):
        out, _, aux = nnx.merge(graph, part, rest).mix(q, k, v, causal=True)
        return aux.losses["span"] if what == "penalty" else ((out[0, 15] - 1) ** 2).sum()

    run = jax.jit(lambda part: [jax.value_and_grad(loss)(part, what) for what in ("task", "penalty")])
    (_, helps), (penalty, costs) = run(part)
    assert all((leaf < 0).all() for leaf in jax.tree.leaves(helps))
    # mean z = 4, its derivative to each head's parameter is 8 s (1 - s) / 4 heads with s = 1/2
    assert_close(penalty, 0.4)
    assert_close(jax.tree.leaves(costs)[0], jnp.full(HEADS, 0.05))


def test_spans_are_each_heads_own():
    layer = build("adaptive_span:span=10:ramp=1")
    layer.part.set_value(jnp.asarray([-20.0, 20.0, -20.0, 20.0]))  # z = 0 or 10
    q = k = jnp.zeros((1, 16, HEADS, HEAD))
    v = k.at[:, 10].set(1.0)
    out = np.asarray(mixed(layer, q, k, v, causal=True))
    assert_close(out[0, 15, :, 0], [0, 1 / 11, 0, 1 / 11])


# ---- multi-scale ---------------------------------------------------------------------------------------------------


def test_heads_see_their_own_scales():
    """The derivative of query 8 to the values: as wide as the head's window."""
    layer = build("multiscale:scales=1x3x5", kv_heads=2)
    assert layer.windows == (1, 3, 5, 5)
    q, k = draw(1, 16, HEADS, HEAD), draw(1, 16, HEADS, HEAD, seed=1)
    of_head = lambda head, v: layer.mix(q, k, v)[0][0, 8, head].sum()
    grads = jax.jit(lambda v: [jax.grad(of_head, 1)(head, v) for head in range(HEADS)])(k)
    for head, window in enumerate(layer.windows):
        grad = grads[head][0, :, head]
        assert np.nonzero(np.abs(grad).max(-1))[0].tolist() == list(range(8 - window, 8 + window + 1))


# ---- differential --------------------------------------------------------------------------------------------------


def test_what_both_halves_look_at_is_taken_away():
    """Equal halves: the second softmax takes its share of the first, which the normaliser then hides."""
    layer = build("differential:lambda_init=0.25")
    layer.vectors.set_value(jnp.zeros_like(layer.vectors[...]))
    a, c = draw(1, 16, HEADS, 2), draw(1, 16, HEADS, 2, seed=1)
    both, half, v = jnp.concatenate([a, a, c, c], -1), jnp.concatenate([a, c], -1), draw(1, 16, HEADS, HEAD, seed=2)
    plain = 0.75 * mixed(build("full"), half, half, v)
    expected = 0.75 * plain / np.sqrt((plain**2).mean(-1, keepdims=True) + 1e-5)
    assert_close(mixed(layer, both, both, v), expected)


# ---- disagreement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["outputs", "values", "positions"])
def test_agreement_is_one_for_equal_heads_and_falls_for_others(on):
    layer = build(f"disagreement:on={on}:weight=0.5")
    x = draw(1, 16, 1, HEAD)
    equal = jnp.broadcast_to(x, (1, 16, HEADS, HEAD))
    other = [draw(1, 16, HEADS, HEAD, seed=seed) for seed in range(3)]
    aux, apart = layer.mix(equal, equal, equal)[2], layer.mix(*other)[2]
    assert_close(aux.losses["disagreement"], 0.5 * aux.scalars["agreement"])
    if on == "positions":
        # of one softmax with itself: sum_s p(s)^2
        p = jax.nn.softmax(x[0, :, 0] @ x[0, :, 0].T / HEAD**0.5, -1)
        assert_close(aux.scalars["agreement"], (p**2).sum(-1).mean())
    else:
        np.testing.assert_allclose(aux.scalars["agreement"], 1, atol=1e-4)
        assert 1 / HEADS / 2 < apart.scalars["agreement"] < 0.75


# ---- guided ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_guidance_is_the_distance_from_patterns(causal):
    """The authors' mean square over pairs, one for each kind of head, of those queries that can see their pattern."""
    T, (q, k, v) = 16, [draw(2, 16, HEADS, HEAD, seed=seed) for seed in range(3)]
    layer = build("guided:next=1:previous=1:first=2:weight=0.5")
    aux = jax.jit(lambda q, k, v: layer.mix(q, k, v, causal=causal)[2])(q, k, v)
    s = np.einsum("btnh,bsnh->bnts", q, k) / HEAD**0.5
    s = np.where(np.tri(T, dtype=bool) | (not causal), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    eye, total = np.eye(T), 0.0
    for heads, pattern, queries in (
        ([0], eye[np.minimum(np.arange(T) + 1, T - 1)], [] if causal else range(T - 1)),
        ([1], eye[np.maximum(np.arange(T) - 1, 0)], range(1, T)),
        ([2, 3], np.broadcast_to(eye[0], (T, T)), range(T)),
    ):
        queries = list(queries)
        total += np.square(p[:, heads] - pattern)[:, :, queries].mean() if queries else 0
    assert_close(aux.scalars["guided"], total)
    assert_close(aux.losses["guidance"], 0.5 * total)


def test_guided_heads_come_to_their_patterns():
    """Weights that are the patterns have no loss, and heads that are led nowhere have no part in it."""
    layer, apart = build("guided:next=0:previous=1:first=1"), [draw(1, 16, HEADS, HEAD, seed=seed) for seed in range(3)]
    still = jnp.zeros_like(apart[0])
    there = layer.mix(still, still, apart[2], bias=_Pattern(jnp.arange(HEADS, dtype=jnp.float32)))[2].scalars["guided"]
    assert float(there) < 1e-6 < float(layer.mix(*apart)[2].scalars["guided"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Pattern:
    """A bias with which head 0 sees the position before, all others the first."""

    head: jax.Array

    def __call__(self, q_at, k_at):
        return 1e3 * jnp.where(self.head == 0, k_at == q_at - 1, k_at == 0 * q_at).astype(jnp.float32)


def test_wrong_options_are_refused_with_the_reason():
    for choice, words in {
        "softcap:cap=0": "cap must be above 0, got 0",
        "talking_heads:spread=-1": "spread is a standard deviation, got -1",
        "collaborative:shared=7": "shared must be even and at least 2, got 7; the nearest is 8",
        "adaptive_span:span=0": "at least 1, got span=0",
        "adaptive_span:start=1": "between 0 and 1",
        "multiscale:scales=0x4": "windows of at least 1, such as 1x8x64, got 0x4",
        "mla:rotary=3": "rotary must be even and at least 2, for positions turn pairs, got 3",
        "differential:lambda_init=1": "lambda_init must be at least 0 and below 1, got 1",
        "disagreement:on=heads": "outputs",
        "disagreement:weight=-1": "weight must be at least 0, got -1",
        "guided:weight=-1": "weight must be at least 0, got -1",
        "guided:next=2:first=2:previous=1": "next, previous and first lead 5 heads, and there are 4",
    }.items():
        with pytest.raises(UsageError, match=words.replace(":", ".")):
            build(choice)
    with pytest.raises(UsageError, match="a head is split into quarters, and one of 6"):
        spec.build("attention", "differential", length=8, dim=12, heads=2)


# ---- capsules ------------------------------------------------------------------------------------------------------


def routed_by_definition(layer, o, rounds: int) -> np.ndarray:
    """What heads gave of one position, o (N, H), as capsules (M, C): head by head, capsule by capsule."""
    W = np.asarray(layer.votes[...], np.float64)
    (N, _, M, _), v = W.shape, np.einsum("nh,nhmc->nmc", o, W)
    c, logits = np.full((N, M), 1 / M), np.zeros((N, M))
    for _ in range(rounds):
        u = np.stack([sum(c[n, m] * v[n, m] for n in range(N)) / sum(c[:, m]) for m in range(M)])
        out = u.copy()
        if layer.routing == "simple":
            for n in range(N):
                logits[n] += [u[m] @ v[n, m] / len(u[m]) ** 0.5 for m in range(M)]
                c[n] = np.exp(logits[n]) / np.exp(logits[n]).sum()
            continue
        var = np.stack([sum(c[n, m] * (v[n, m] - u[m]) ** 2 for n in range(N)) / sum(c[:, m]) for m in range(M)]) + 1e-4
        cost = (np.log(var**0.5).mean(1) + np.asarray(layer.price[...])) * c.sum(0)
        a = 1 / (1 + np.exp(cost - np.asarray(layer.active[...])))
        out = a[:, None] * u
        for n in range(N):
            of_channels = [np.exp(-((v[n, m] - u[m]) ** 2) / (2 * var[m])) / np.sqrt(var[m]) for m in range(M)]
            density = [np.prod(each) ** (1 / len(each)) for each in of_channels]
            c[n] = a * density / (a @ density)
    return out.reshape(-1)


@pytest.mark.parametrize("routing", ["simple", "em"])
@pytest.mark.parametrize("words, rounds", [("", 3), (":rounds=1:capsules=8", 1), (":rounds=2:capsules=1", 2)])
def test_capsules_are_routed_as_defined(routing, words, rounds):
    layer, x = build(f"capsules:routing={routing}{words}"), draw(2, 16, HEADS * HEAD)
    layer.votes[...] = 3 * layer.votes[...]
    if routing == "em":
        layer.price[...], layer.active[...] = draw(*layer.price.shape, seed=2), draw(*layer.price.shape, seed=3)
    plain = build("full")
    for name in ("query", "key", "value"):
        getattr(plain, name).kernel[...] = getattr(layer, name).kernel[...]
    plain.out = lambda x: x
    with jax.default_matmul_precision("highest"):
        out, heads = layer(x, causal=True)[0], np.asarray(plain(x, causal=True)[0], np.float64)
    for b, t in np.ndindex(2, 16):
        expected = routed_by_definition(layer, heads[b, t].reshape(HEADS, HEAD), rounds)
        np.testing.assert_allclose(out[b, t], expected, atol=1e-4)


def test_capsules_have_the_parameters_of_the_projection():
    count = lambda choice: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(build(choice), nnx.Param)))
    assert count("capsules:routing=simple") == count("full") == count("capsules") - 2 * HEADS


@pytest.mark.parametrize("choice, message", [
    ("capsules:rounds=0", "rounds must be at least 1"),
    ("capsules:capsules=5", "capsules=5 do not divide dim=32"),
])  # fmt: skip
def test_capsules_refuse(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice)
