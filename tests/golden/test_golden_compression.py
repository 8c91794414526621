"""Prototypes and memory compression: other implementations' numbers, and what the kit does not ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention._engine.block_sparse.layout import layout
from xformers_lab.attention._engine.windows import Windows, count, windows
from xformers_lab.attention.clustered import _block, _clusters, _layout
from xformers_lab.errors import UsageError

pytestmark = pytest.mark.full

HEADS, HEAD = 4, 8


def build(choice: str, length: int = 16, *, heads: int = HEADS, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=heads * HEAD, heads=heads, kv_heads=kv_heads)


def draw(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(T: int, *, B: int = 1, heads: int = HEADS):
    return [draw(B, T, heads, HEAD, seed=seed) for seed in range(3)]


def mixed(layer, *arrays, **options):
    """What `mix` gives, compiled cheaply."""
    return jax.jit(lambda *arrays: layer.mix(*arrays, **options)[0])(*arrays)


def softmax(s):
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def attention(q, k, v):
    """(T, N, H), (S, N, H) -> (T, N, H), all keys for all queries."""
    return np.einsum("nts,snh->tnh", softmax(np.einsum("tnh,snh->nts", q, k) / HEAD**0.5), v)


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def times(linear, x):
    out = x @ np.asarray(linear.kernel[...])
    return out if linear.bias is None else out + np.asarray(linear.bias[...])


def by_head(x):
    return x.reshape(len(x), -1, HEAD)


# ---- linformer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attend", "reference"])
@pytest.mark.parametrize("name, share", [("linformer_basic", "headwise"), ("linformer_sharedkv", "keyvalue")])
def test_linformer_is_the_package(golden, method, name, share):
    """linformer 0.2.3; its projections are (length, rank), ours (rank, length), and its shared values are the keys."""
    peer = golden(name)
    x, one = peer["x"], share == "keyvalue"
    layer = build(f"linformer:rank=6:share={share}", 24, kv_heads=1 if one else None)
    layer.project[...] = jnp.stack([peer[key].T for key in ("w.proj_k", "w.proj_v") if key in peer])
    project = lambda name: (x @ peer[f"w.to_{name}.weight"].T).reshape(2, 24, -1, HEAD)
    q, k = project("q"), project("k")
    y = mixed(layer, q, k, k if one else project("v"), method=method).reshape(2, 24, 32)
    assert_close(y @ peer["w.to_out.weight"].T + peer["w.to_out.bias"], peer["y"])


def test_linformer_takes_a_shorter_sequence_as_if_the_rest_were_padding():
    layer, (q, k, v) = build("linformer:rank=5"), qkv(16)
    padded = mixed(layer, q, k, v, valid=jnp.arange(16)[None] < 10)
    assert_close(mixed(layer, q[:, :10], k[:, :10], v[:, :10]), padded[:, :10])
    with pytest.raises(ValueError, match="linformer is built for 16 positions, got 17"):
        layer.mix(q, *(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v)))


def test_linformer_with_identity_projections_is_full_attention():
    layer, (q, k, v) = build("linformer:rank=16:share=keyvalue"), qkv(16)
    layer.project[...] = jnp.eye(16)[None]
    assert_close(mixed(layer, q, k, v), mixed(build("full"), q, k, v))


# ---- clustered ---------------------------------------------------------------------------------------------------


def test_equal_queries_in_clusters_of_their_own_get_full_attention():
    _, k, v = qkv(48)
    q = draw(1, 6, HEADS, HEAD, seed=3)[:, np.arange(48) // 8]
    layer = build("clustered:clusters=12:improved=0:bits=64", 48)
    assert_close(mixed(layer, q, k, v), mixed(build("full", 48), q, k, v))


def test_recomputing_more_keys_comes_nearer_to_full_attention():
    q, k, v = qkv(64)
    exact = mixed(build("full", 64), q, k, v)
    layers = [build(f"clustered:clusters=8:improved={top}", 64) for top in (0, 8, 32, 64)]
    off = [float(jnp.abs(mixed(layer, q, k, v) - exact).mean()) for layer in layers]
    assert off[0] > off[1] > off[2] > 1e-3 and off[3] < 1e-6


def test_k_means_finds_groups_in_hamming_space():
    """Three groups of signs, each flipped here and there, around centres that differ in half their bits."""
    random = np.random.default_rng(0)
    centres = np.where(random.random((3, 64)) < 0.5, -1.0, 1.0)
    group = random.permutation(np.arange(60) % 3)
    signs = centres[group] * np.where(random.random((60, 64)) < 0.05, -1.0, 1.0)
    # Every 20th query is a first centre: start from one of each group.
    signs[[0, 20, 40]], group[[0, 20, 40]] = centres, np.arange(3)
    member = np.asarray(_clusters(jnp.asarray(signs, jnp.float32), None, 3, 5))
    assert (member == (group == np.arange(3)[:, None])).all()


def test_padding_moves_no_centre():
    signs = jnp.sign(draw(40, 16))
    valid = jnp.arange(40) < 25
    padded = _clusters(signs, valid, 4, 5)
    np.testing.assert_array_equal(padded[:, :25], _clusters(signs[:25], None, 4, 5))


@pytest.mark.parametrize("sizes", [[16], [1, 0, 39, 3], [5, 5, 5], [0, 0, 7], [1] * 9])
def test_blocks_hold_every_query_once_with_those_of_its_cluster(sizes):
    cluster = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    T, block = len(cluster), _block(len(cluster), len(sizes))
    owner, index, place = map(np.asarray, _layout(jnp.asarray(cluster == np.arange(len(sizes))[:, None]), block))
    assert sorted(index[index < T]) == list(range(T))
    assert (index[place] == np.arange(T)).all()
    assert (owner[place // block] == cluster).all()


# ---- informer ----------------------------------------------------------------------------------------------------


def test_informer_answers_few_queries_in_full_and_the_rest_by_the_mean():
    T, factor = 64, 2
    q, k, v = qkv(T, heads=1)
    out = mixed(build(f"informer:factor={factor}", T, heads=1), q, k, v)
    exact = np.abs(out - mixed(build("full", T, heads=1), q, k, v)).max((0, 2, 3)) < 1e-5
    uniform = np.abs(out - v.mean(1, keepdims=True)).max((0, 2, 3)) < 1e-5
    assert exact.sum() == factor * np.ceil(np.log(T)) and (exact != uniform).all()


def test_informer_finds_the_query_that_is_far_from_uniform():
    q, k, v = qkv(64, heads=1)
    q = (0.1 * q).at[:, 37].multiply(50)
    layers = [build("informer:factor=1", 64, heads=1), build("full", 64, heads=1)]
    assert_close(*(mixed(layer, q, k, v)[:, 37] for layer in layers))


def test_informer_draws_its_sample_by_seed_and_anew_in_training():
    q, k, v = qkv(64)
    one, other = (build(f"informer:factor=1:seed={seed}", 64) for seed in (0, 1))
    same = lambda a, b: bool((a == b).all())
    assert same(mixed(one, q, k, v), mixed(one, q, k, v))
    assert not same(mixed(one, q, k, v), mixed(other, q, k, v))
    first, second = (mixed(one, q, k, v, key=jax.random.key(seed)) for seed in (0, 1))
    assert not same(first, second)


@pytest.mark.parametrize("name", ["informer", "clustered"])
def test_a_part_of_the_queries_is_refused(name):
    q, k, v = qkv(16)
    with pytest.raises(ValueError, match="takes as many queries as keys, got 4 and 16"):
        build(name).mix(q[:, -4:], k, v)


# ---- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, width, step", [(1, 3, 3), (7, 3, 3), (8, 5, 2), (9, 4, 4), (10, 1, 1), (5, 7, 2)])
def test_windows_cover_every_position(length, width, step):
    rows = np.asarray(windows(jnp.arange(1, length + 1), width, step))
    assert rows.shape == (count(length, width, step), width)
    expected = np.arange(len(rows))[:, None] * step + np.arange(width)
    np.testing.assert_array_equal(rows, np.where(expected < length, expected + 1, 0))
    assert set(rows.flat) - {0} == set(range(1, length + 1))


@pytest.mark.parametrize("behind, ahead, lead", [(None, 0, 1), (None, 0, 0), (6, 6, 0), (9, 0, 0), (2, 2, 0)])
def test_no_block_is_left_out_that_a_query_sees(behind, ahead, lead):
    T, width, step = 37, 5, 4
    slots = lead + count(T, width, step)
    pattern = Windows(width, step, slots, T, behind, ahead, lead)
    q, k = np.arange(slots - T, slots)[:, None], np.arange(slots)[None]
    seen = pattern(q, k)
    member = (np.arange(slots) - lead)[:, None] * step + np.arange(width)
    for t, s in np.ndindex(seen.shape):
        inside = np.array([0]) if s < lead else member[s] if not ahead else member[s][member[s] < T]
        expected = (inside <= t + ahead).all() and (behind is None or (inside >= t - behind).all())
        assert seen[t, s] == expected, (t, s)
    (part,) = layout(pattern, T, slots, 8, 2)
    live = set()
    for group in part.groups:
        columns = zip(group.rows, group.columns, strict=True)
        live |= {(row, column - part.lead) for row, of_row in columns for column in of_row}
    assert {(t // 8, s // 2) for t, s in np.argwhere(seen)} <= live


# ---- memory-compressed attention -----------------------------------------------------------------------------------


def test_mca_with_equal_diagonal_taps_is_mean_pooling():
    q, k, v = qkv(18)
    conv, mean = build("mca", 18), build("mca:pool=mean", 18)
    conv.taps[...] = jnp.broadcast_to(jnp.eye(HEAD) / 3, conv.taps.shape)
    for causal in (False, True):
        assert_close(mixed(conv, q, k, v, causal=causal), mixed(mean, q, k, v, causal=causal))


def test_mca_before_the_first_window_is_full_sees_the_first_position():
    q, k, v = qkv(12)
    out = mixed(build("mca:pool=mean", 12), q, k, v, causal=True)
    assert_close(out[:, :2], jnp.broadcast_to(v[:, :1], (1, 2, HEADS, HEAD)))
    mean = lambda x: np.stack([x[0, 0], x[0, :3].mean(0)])
    assert_close(out[0, 2:5], attention(q[0, 2:5], mean(k), mean(v)))


# ---- poolingformer -------------------------------------------------------------------------------------------------


def test_poolingformer_without_a_second_level_is_local():
    q, k, v = qkv(24)
    for causal in (False, True):
        layers = [build(choice, 24) for choice in ("poolingformer:window=3:reach=0", "local:window=3")]
        assert_close(*(mixed(layer, q, k, v, causal=causal) for layer in layers))


def test_poolingformer_reaches_as_far_as_both_windows_together():
    """A value is felt by queries that pool what it changed: window + reach away, and no further."""
    q, k, v = qkv(60, heads=1)
    layer = build("poolingformer:window=3:reach=10:kernel=4:stride=2:pool=mean", 60, heads=1)
    felt = np.abs(mixed(layer, q, k, v) - mixed(layer, q, k, v.at[:, 30].add(1))).max((0, 2, 3)) > 1e-7
    far = np.abs(np.arange(60) - 30)
    assert felt[far <= 10].all() and not felt[far > 13].any()


def test_dynamic_weights_that_are_equal_are_a_mean():
    q, k, v = qkv(24)
    layers = [build(f"poolingformer:window=2:reach=9:kernel=3:stride=2:pool={pool}", 24) for pool in ("ldconv", "mean")]
    layers[0].weigh[...] *= 0
    assert_close(*(mixed(layer, q, k, v, valid=jnp.arange(24)[None] < 21) for layer in layers))


def test_a_maximum_over_one_position_is_the_position():
    q, k, v = qkv(24)
    layers = [build(f"poolingformer:reach=9:kernel=1:stride=1:pool={pool}", 24) for pool in ("max", "mean")]
    assert_close(*(mixed(layer, q, k, v, causal=True) for layer in layers))


# ---- learned slots -------------------------------------------------------------------------------------------------


def test_set_is_an_induced_set_attention_block():
    q, k, v = (np.asarray(x) for x in qkv(16))
    layer = build("set:points=5")
    points = np.asarray(layer.points[...])
    y = norm(points + attention(by_head(points), k[0], v[0]).reshape(5, -1))
    h = norm(y + np.maximum(times(layer.inner, y), 0))
    expected = attention(q[0], by_head(times(layer.point_key, h)), by_head(times(layer.point_value, h)))
    assert_close(mixed(layer, q, k, v)[0], expected)


def test_luna_packs_and_unpacks_and_hands_on_what_it_packed():
    q, k, v = (np.asarray(x) for x in qkv(16))
    layers = [build("luna:packed=5"), build("luna:packed=5")]
    P, carry = np.asarray(layers[0].points[...]), None
    for layer in layers:
        Y = attention(by_head(times(layer.pack_query, norm(P))), k[0], v[0]).reshape(5, -1)
        expected = attention(q[0], by_head(times(layer.unpack_key, Y)), by_head(times(layer.unpack_value, Y)))
        P = P + Y
        out, carry, _ = layer.mix(q, k, v, carry=carry)
        assert_close(out[0], expected)
        assert_close(carry["packed"][0], P)


def test_causal_luna_is_the_paper_s_running_mean_and_hands_on_nothing_it_read():
    """f(X, Y, Z)_t = X_t sum_(j <= t) Y_j^T Z_j / t, used twice."""
    q, k, v = (np.asarray(x) for x in qkv(9))
    layer = build("luna:packed=5:chunk=4", 9)
    P = np.asarray(layer.points[...])
    asked, flat = by_head(times(layer.pack_query, norm(P))), v[0].reshape(9, -1)
    keys, values = by_head(times(layer.unpack_key, flat)), by_head(times(layer.unpack_value, flat))
    s = np.einsum("snh,pnh->nsp", k[0], asked) / HEAD**0.5
    a = np.where(s > 0, s + 1, np.exp(np.minimum(s, 0)))
    out, carry, _ = layer.mix(q, k, v, causal=True)
    for t in range(9):
        for n in range(HEADS):
            f = lambda x, y, z, t=t: x @ sum(np.outer(y[j], z[j]) for j in range(t + 1)) / (t + 1)
            c = softmax(f(q[0, t, n], keys[:, n], a[n]) / HEAD**0.5)
            assert_close(out[0, t, n], f(c, a[n], values[:, n]))
    np.testing.assert_array_equal(carry["packed"][0], P)


@pytest.mark.parametrize("steps", [0, 2])
def test_perceiver_looks_talks_and_is_read(steps):
    q, k, v = (np.asarray(x) for x in qkv(16))
    layer = build(f"perceiver:latents=5:steps={steps}")

    def part(L, part, keys=None, values=None):
        y = norm(L)
        if keys is None:
            keys, values = (by_head(times(linear, y)) for linear in (part.key, part.value))
        L = L + times(part.out, attention(by_head(times(part.query, y)), keys, values).reshape(5, -1))
        return L + times(part.shrink, np.asarray(jax.nn.gelu(times(part.grow, norm(L)))))

    L = part(np.asarray(layer.latents[...]), layer.look, k[0], v[0])
    for _ in range(steps):
        L = part(L, layer.talk)
    expected = attention(q[0], *(by_head(times(linear, norm(L))) for linear in (layer.latent_key, layer.latent_value)))
    assert_close(mixed(layer, q, k, v)[0], expected)


@pytest.mark.parametrize("name", ["set", "luna", "perceiver"])
def test_slots_see_a_set(name):
    """The order of keys does not matter, nor the other half of a batch."""
    q, k, v = qkv(16, B=2)
    layer, order = build(name), np.random.default_rng(0).permutation(16)
    out = mixed(layer, q, k, v)
    assert_close(mixed(layer, q, k[:, order], v[:, order]), out)
    assert_close(mixed(layer, q[1:], k[1:], v[1:]), out[1:])
    assert np.abs(out - mixed(layer, q, k, -v)).max() > 0.1


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice, message", [
    ("clustered:clusters=0", "clusters must be at least 1, got 0"),
    ("clustered:bits=0", "bits must be at least 1, got 0"),
    ("clustered:improved=-1", "improved must be at least 0, got -1"),
    ("informer:factor=0", "factor must be at least 1, got 0"),
    ("mca:kernel=2", "kernel must be at least stride, or positions are lost: got 2 and 3"),
    ("mca:stride=0", "stride must be at least 1, got 0"),
    ("set:points=0", "points must be at least 1, got 0"),
    ("luna:packed=0", "packed must be at least 1, got 0"),
    ("luna:chunk=0", "chunk must be at least 1, got 0"),
    ("linformer:rank=0", "rank must be at least 1, got 0"),
    ("linformer:share=layerwise", "share"),
    ("poolingformer:reach=-1", "reach must be at least 0, got -1"),
    ("poolingformer:kernel=3", "kernel must be at least stride, or positions are lost: got 3 and 4"),
    ("poolingformer:window=0", "window must be at least 1, got 0"),
    ("poolingformer:reach=3", "reach must be 0 or at least kernel - 1 = 4"),
    ("poolingformer:reach=0:pool=max", "reach=0 leaves it out"),
    ("perceiver:latents=0", "latents must be at least 1, got 0"),
    ("perceiver:steps=-1", "steps must be at least 0, got -1"),
])  # fmt: skip
def test_options_are_checked(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice)


@pytest.mark.parametrize("name", ["clustered", "informer", "linformer", "set", "perceiver"])
def test_what_cannot_be_causal_says_why(name):
    q, k, v = qkv(16)
    with pytest.raises(ValueError, match=rf"{name} cannot be causal: \w"):
        build(name).mix(q, k, v, causal=True)


@pytest.mark.parametrize(
    "name", ["clustered", "informer", "linformer", "set", "perceiver", "luna", "mca", "poolingformer"]
)
def test_defaults_fit_any_length(name):
    for T in (1, 2, 5):
        q, k, v = qkv(T)
        layer = build(name, T)
        out = jax.eval_shape(lambda *x, layer=layer: layer.mix(*x)[0], q, k, v)
        assert out.shape == q.shape
        assert nnx.state(layer, nnx.Param)
