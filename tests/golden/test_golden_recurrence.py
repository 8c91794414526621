"""Recurrences that fade or are corrected: other implementations' numbers, and what makes each algorithm itself."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention._base.recurrent import unit
from xformers_lab.attention._engine.linear.gated import aligned, by_definition, channel_decay, delta_rule, scalar_decay
from xformers_lab.attention._engine.linear.recurrence import linear_recurrence
from xformers_lab.errors import UsageError

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def build(choice: str, length: int, dim: int, heads: int, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=dim, heads=heads, kv_heads=kv_heads)


def draw(seed: int, *shapes: tuple[int, ...], scale: float = 1.0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for shape in shapes]


def by_head(function, *arrays):
    """function of one head of one sample, mapped over the two leading axes."""
    return jax.jit(jax.vmap(jax.vmap(function)))(*arrays)


def time_first(x):
    """(B, N, T, ...) -> (B, T, N, ...), and back."""
    return np.swapaxes(x, 1, 2)


# ---- other implementations, with values wider than keys ----------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 64])
def test_sums_are_linear_attention(golden, chunk):
    peer = golden("linear_attn_naive")
    q, k, v = (time_first(peer[name]) for name in "qkv")
    q = q * q.shape[-1] ** -0.5
    out, total = by_head(lambda q, k, v: linear_recurrence(q, k, v, chunk=chunk), q, k, v)
    assert_close(out, time_first(peer["y"]))
    assert_close(out / total[..., None], time_first(peer["y_norm"]))


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_decay_of_every_channel_is_gla(golden, chunk):
    peer = golden("gla_naive")
    q, k, v, g = (time_first(peer[name]) for name in "qkvg")
    k = k * k.shape[-1] ** -0.5
    out = by_head(lambda q, k, v, g: channel_decay(q, k, v, g, chunk=chunk)[0], q, k, v, g)
    assert_close(out, time_first(peer["y"]))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_delta_rule_is_that_of_flash_linear_attention(golden, chunk):
    """The package divides queries by sqrt(F)."""
    peer = golden("delta_rule_naive")
    q = peer["q"] * peer["q"].shape[-1] ** -0.5
    run = lambda q, k, v, beta: delta_rule(q, k, v, beta, chunk=chunk)
    out, state = by_head(run, q, peer["k"], peer["v"], peer["beta"])
    assert_close(out, peer["y"])
    assert_close(state, peer["state"])


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_gla_is_that_of_flash_linear_attention(golden, method):
    """A head's mean is the package's output; where its gate is constant, the layer gives that at unit root mean
    square."""
    peer = golden("gla_naive")
    q, k, v, g = (time_first(peer[name]) for name in "qkvg")
    v = v[..., :8]
    layer = build("gla:chunk=5", 18, 32, 4)
    one = lambda q, k, v, g: getattr(layer, method)(q, k, v, causal=True, decay=g)
    y = time_first(peer["y"])[..., :8]
    mean = by_head(one, q, k, v, g)
    assert_close(mean, y)
    wanted = jax.nn.silu(2.0) * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    assert_close(layer.finished(mean, gate=jnp.full(v.shape, 2.0)), wanted)


@pytest.mark.parametrize("method", ["attend", "reference"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_rwkv_is_the_operator_of_transformers(golden, method, chunk):
    peer = golden("rwkv4_wkv")
    layer = build(f"rwkv:shift=none:chunk={chunk}", 16, 8, 1)
    layer.decay[...], layer.bonus[...] = peer["time_decay"][None], peer["time_first"][None]
    k, v = peer["k"][:, :, None], peer["v"][:, :, None]
    q = jnp.zeros_like(k)  # a receptance of 0 is a half
    out = jax.jit(lambda q, k, v: layer.mix(q, k, v, causal=True, method=method)[0])(q, k, v)
    assert_close(2 * out[:, :, 0], peer["y"])


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_lightning_is_that_of_minimax(golden, method):
    """MiniMax normalises all heads together, with weights; here every head is normalised alone, so that is undone."""
    peer = golden("minimax_lightning_attention")
    x, N = peer["x"], peer["meta"]["heads"]
    layer = build("lightning:chunk=7", 20, 32, N)
    decay = layer.per_head()["decay"]
    first_layer = peer["slope_rate"][:, 0, 0] / -decay  # MiniMax scales the slopes by the depth of the layer
    assert_close(first_layer, np.full(N, first_layer[0]))
    q, k, v = np.moveaxis((x @ peer["w.qkv_proj.weight"].T).reshape(2, 20, N, 3, 8), 3, 0)
    keys = lambda k, v, decay: {"k": jax.nn.silu(k), "v": jax.nn.silu(v), "decay": jnp.full(20, decay)}
    run = layer.forward if method == "attend" else layer.by_definition
    head = lambda q, k, v, decay: run(jax.nn.silu(q), keys(k, v, decay), None, True)
    decay = jnp.broadcast_to(decay * first_layer[0], (2, N))
    out = time_first(by_head(head, *(time_first(y) for y in (q, k, v)), decay)).reshape(2, 20, 32)
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * peer["w.norm.weight"]
    out = out * jax.nn.sigmoid(x @ peer["w.output_gate.weight"].T)
    assert_close(out @ peer["w.out_proj.weight"].T, peer["y"])


# ---- the engine --------------------------------------------------------------------------------------------------

LENGTHS = [(1, 4), (15, 64), (37, 5), (50, 32), (150, 64)]


def one_step(state, q, k, v, beta=None, decay=0.0):
    decay = jnp.asarray(decay)
    state = jnp.exp(decay[:, None] if decay.ndim else decay) * state
    return q @ state + q @ k * (new := v if beta is None else beta * (v - k @ state)), state + jnp.outer(k, new)


@pytest.mark.full
@pytest.mark.parametrize("kind, T, chunk", kinds.every_third([
    (kind, *length) for kind in ("scalar", "channel", "delta", "gated delta") for length in LENGTHS
]))  # fmt: skip
def test_chunks_are_the_recurrence(kind, T, chunk):
    """In value, last state and gradient; keys are of 6 channels, values of 3."""
    q, k, v, fade, beta = draw(T, (T, 6), (T, 6), (T, 3), (T, 6), (T,))
    rest = {"k": k, "v": v} | {
        "scalar": {"decay": -jnp.exp(fade[:, 0])},
        "channel": {"decay": -jnp.exp(fade)},
        "delta": {"k": unit(k), "beta": jax.nn.sigmoid(beta)},
        "gated delta": {"k": unit(k), "beta": jax.nn.sigmoid(beta), "decay": -jnp.exp(fade[:, 0])},
    }[kind]
    fast = {"scalar": scalar_decay, "channel": channel_decay}.get(kind, delta_rule)
    weight = draw(1, (T, 3))[0]

    def slow(q, rest):
        def one(state, now):
            out, state = one_step(state, now[0], **now[1])
            return state, out

        state, out = jax.lax.scan(one, jnp.zeros((6, 3)), (q, rest))
        return out, state

    loss = lambda run: lambda q, rest: (run(q, rest)[0] * weight).sum() + (run(q, rest)[1] ** 2).sum()
    chunked = lambda q, rest: fast(q, **rest, chunk=chunk)
    for actual, expected in zip(jax.jit(chunked)(q, rest), jax.jit(slow)(q, rest), strict=True):
        assert_close(actual, expected)
    grads = (jax.jit(jax.grad(loss(run), (0, 1)))(q, rest) for run in (chunked, slow))
    for actual, expected in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("strength", [1e-4, 50.0, 1e4])
def test_decays_of_any_strength_neither_overflow_nor_leave_wrong_sums(strength):
    """exp of a chunk's whole fall, undone by its inverse, would be 0 times infinity."""
    T = 40
    q, k, v, fade = draw(3, (T, 6), (T, 6), (T, 4), (T, 6))
    fade = -strength * jnp.exp(fade)

    def dense(q, k, v, fade):
        fall = jnp.cumsum(fade.astype(jnp.float32), 0)
        gap = jnp.where(jnp.tril(jnp.ones((T, T), bool))[..., None], fall[:, None] - fall[None], -jnp.inf)
        return jnp.einsum("if,jf,ijf->ij", q, k, jnp.exp(gap)) @ v

    for fast, own in ((channel_decay, fade), (scalar_decay, fade[:, 0])):
        run = lambda q, k, v, own, fast=fast: fast(q, k, v, own, chunk=32)[0]
        out, pull = jax.jit(lambda *args, run=run: jax.vjp(run, *args))(q, k, v, own)
        assert_close(out, jax.jit(dense)(q, k, v, jnp.broadcast_to(own.reshape(T, -1), (T, 6))))
        assert all(np.isfinite(grad).all() for grad in jax.jit(lambda pull, out: pull(out))(pull, out))


def test_a_correction_holds_however_alike_keys_are():
    """One key again and again: the triangular system is as far from the identity as it can be."""
    T = 64
    k = jnp.tile(unit(draw(4, (1, 8))[0]), (T, 1))
    v = draw(5, (T, 3))[0]
    out, state = delta_rule(k, k, v, jnp.ones(T), chunk=32)
    assert_close(out, v)  # what is held under a key is the last value written
    assert_close(k[0] @ state, v[-1])


@pytest.mark.parametrize("T", [4, 11, 15])
def test_padding_and_earlier_keys(T):
    """Queries stand at the end; padding in between neither writes nor fades."""
    S = 11
    q, k, v, fade = draw(6, (T, 5), (S, 5), (S, 3), (S,))
    keys = {"k": k, "v": v, "decay": -jnp.exp(fade)}
    valid = jnp.arange(S) % 3 != 1
    run = lambda q, k, v, decay: scalar_decay(q, k, v, decay, chunk=4)[0]
    fast = jax.jit(lambda q, keys: aligned(run, q, keys, valid))(q, keys)
    slow = by_definition(one_step, jnp.zeros((5, 3)), q, keys, valid)
    assert fast.shape == (T, 3)
    assert_close(fast, slow)
    np.testing.assert_array_equal(fast[: max(0, T - S)], 0)
    assert_close(fast[-1:], aligned(run, q[-1:], {name: x[valid] for name, x in keys.items()}, None))


# ---- mechanisms --------------------------------------------------------------------------------------------------


def numbers(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(tree, nnx.Param)))


def stirred(layer, seed: int):
    """The same layer with every parameter moved, so that none is a one or a zero."""
    random = np.random.default_rng(seed)
    moved = lambda x: x + 0.3 * random.standard_normal(x.shape).astype(np.float32)
    nnx.update(layer, jax.tree.map(moved, nnx.state(layer, nnx.Param)))
    return layer


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def at_unit_mean_square(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("groups, kv_heads", [(1, None), (2, None), (1, 2)])
def test_mamba2_is_the_layer_of_its_paper_without_the_convolution(groups, kv_heads):
    """In numpy, position after position: silu on x, B and C, softplus steps, the skip, the gate, and one norm for the
    heads of a group. Decoding gives the same."""
    B, T, N, H = 2, 11, 6, 4
    layer = stirred(build(f"mamba2:groups={groups}:chunk=4", T, N * H, N, kv_heads), 0)
    (x,), w = draw(1, (B, T, N * H)), numbers(layer)
    project = lambda name, heads: (np.asarray(x, np.float64) @ w[name]["kernel"]).reshape(B, T, heads, -1)
    C, Bm = (np.repeat(silu(project(name, groups)), N // groups, 2) for name in ("query", "key"))
    v = np.repeat(silu(project("value", kv_heads or N)), N // (kv_heads or N), 2)
    z, step = project("gate", N), softplus(project("interval", N)[..., 0] + w["interval"]["bias"])
    state, rows = np.zeros((B, N, H, H)), []
    for t in range(T):
        kept = np.exp(-np.exp(w["rate"]) * step[:, t])[..., None, None]
        state = kept * state + step[:, t, :, None, None] * Bm[:, t, :, :, None] * v[:, t, :, None]
        y = np.einsum("bnf,bnfh->bnh", C[:, t], state) + w["skip"][:, None] * v[:, t]
        y = at_unit_mean_square((y * silu(z[:, t])).reshape(B, groups, -1)).reshape(B, N, H) * w["scale"]
        rows.append(y.reshape(B, -1) @ w["out"]["kernel"])
    assert_close(jax.jit(lambda x: layer(x, causal=True)[0])(x), np.stack(rows, 1))

    def one(cache, token):
        out, cache, _ = layer.decode(token[0], cache, at=token[1])
        return cache, out

    steps = lambda x: jax.lax.scan(one, layer.init_cache(B, T), (x.swapaxes(0, 1), jnp.arange(T)))[1]
    assert_close(jax.jit(steps)(x), np.stack(rows))


@pytest.mark.parametrize("choice", ["delta_net", "delta_net:gate=silu", "gated_delta_net"])
def test_delta_nets_are_the_layers_of_their_papers_without_the_convolutions(choice):
    B, T, N, H = 2, 9, 2, 4
    layer = stirred(build(choice, T, N * H, N), 2)
    (x,), w = draw(3, (B, T, N * H)), numbers(layer)
    project = lambda name: np.asarray(x, np.float64) @ w[name]["kernel"] + w[name].get("bias", 0)
    heads = lambda name: project(name).reshape(B, T, N, H)
    q, k = (silu(heads(name)) for name in ("query", "key"))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-5) for y in (q, k))
    v, beta = silu(heads("value")), 1 / (1 + np.exp(-project("strength")))
    kept = np.exp(-np.exp(w["rate"]) * softplus(project("forget"))) if "forget" in w else np.ones((B, T, N))
    state, rows = np.zeros((B, N, H, H)), []
    for t in range(T):
        state = kept[:, t, :, None, None] * state
        wrong = v[:, t] - np.einsum("bnf,bnfh->bnh", k[:, t], state)
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * wrong[:, :, None]
        rows.append(at_unit_mean_square(np.einsum("bnf,bnfh->bnh", q[:, t], state)))
    out = np.stack(rows, 1) * (silu(heads("gate")) if choice != "delta_net" else 1)
    assert ("gate" in w) == (choice != "delta_net")
    actual = jax.jit(lambda x: layer(x, causal=True)[0])(x)
    assert_close(actual, out.reshape(B, T, -1) @ w["out"]["kernel"])


@pytest.mark.parametrize("choice, interval, least", [("mamba2", "interval", 1.0), ("gated_delta_net", "forget", 0.0)])
def test_decays_start_as_their_papers_do(choice, interval, least):
    """Intervals are spread from 0.001 to 0.1, evenly in logarithms, rates evenly up to 16."""
    layer = build(choice, 8, 256, 256)
    steps, rates = softplus(numbers(layer)[interval]["bias"]), np.exp(numbers(layer)["rate"])
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1 * 1.001
    assert np.median(np.log(steps)) == pytest.approx(np.log(0.01), abs=0.5)
    assert least <= rates.min() < least + 1 and 15 < rates.max() <= 16


ONE_WAY = ["retnet", "gla", "delta_net", "gated_delta_net", "mamba2", "rwkv", "lightning", "rfa:gate=learned"]


@pytest.mark.parametrize("choice", ONE_WAY)
def test_a_recurrence_refuses_to_see_both_sides(choice):
    layer = build(choice, 8, 16, 2)
    x = jnp.ones((1, 8, 16))
    with pytest.raises(ValueError, match="left to right"):
        layer(x, causal=False)


@pytest.mark.parametrize(
    "choice", kinds.every_third([*ONE_WAY, "rwkv:shift=none", "rwkv:shift=input", "rfa", "rfa:kernel=arccos"])
)
def test_padding_in_front_is_as_if_it_were_not_there(choice):
    layer = build(choice, 13, 16, 4, kv_heads=2)
    x = draw(7, (1, 13, 16))[0]
    run = jax.jit(lambda x, valid: layer(x, valid=valid, causal=True)[0])
    out = run(x, jnp.arange(13)[None] >= 5)
    assert_close(out[:, 5:], run(x[:, 5:], jnp.ones((1, 8), bool)))


def test_rwkv_sees_the_position_before_through_its_shift():
    layer = build("rwkv", 6, 8, 1)
    layer.share_k[...] = layer.share_v[...] = jnp.zeros((1, 8))
    q, k, v = draw(8, (1, 6, 1, 8), (1, 6, 1, 8), (1, 6, 1, 8))
    plain = build("rwkv:shift=none", 6, 8, 1)
    before = lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    assert_close(layer.mix(q, k, v, causal=True)[0], plain.mix(q, before(k), before(v), causal=True)[0])


def test_rwkv_keys_of_any_size_do_not_overflow():
    layer = build("rwkv:shift=none:chunk=3", 12, 8, 1)
    q, k, v = draw(9, (1, 12, 1, 8), (1, 12, 1, 8), (1, 12, 1, 8))
    k = k.at[:, 5].set(500.0)  # far beyond exp's range: from here on its value is all there is
    means = jax.jit(lambda k: layer.mix(q, k, v, causal=True)[0] / jax.nn.sigmoid(q))
    out = means(k)
    assert_close(out[:, 5], v[:, 5])
    assert np.isfinite(out).all()
    longer = means(k.at[:, 5:].set(0.0))
    np.testing.assert_array_equal(longer[:, :5], out[:, :5])  # and those before feel nothing of it


def test_rfa_comes_near_its_kernel_with_many_features():
    q, k, v = draw(10, (24, 8), (24, 8), (24, 8))
    weights = jnp.exp(-jnp.square(unit(q)[:, None] - unit(k)[None]).sum(-1) / 2)
    expected = weights @ v / weights.sum(1, keepdims=True)

    def error(features):
        layer = build(f"rfa:features={features}", 24, 64, 8)
        of_head = layer.per_head()
        one = lambda W, s: layer.attend(q, k, v, causal=False, projection=W, spread=s)
        out = jax.jit(jax.vmap(one))(of_head["projection"], of_head["spread"])
        return float(jnp.sqrt(jnp.square(out - expected).mean()))

    few, many = error(64), error(4096)
    assert many < 0.05 and 4 < few / many < 16  # 8 = sqrt(4096 / 64)


def test_rfa_forgets_through_its_gate():
    layer = build("rfa:gate=learned:features=2048", 10, 8, 1)
    q, k, v = draw(11, (10, 8), (10, 8), (10, 8))
    of_head = {name: x[0] for name, x in layer.per_head().items()}
    attend = lambda decay: layer.attend(q, k, v, causal=True, decay=decay, **of_head)
    assert_close(attend(jnp.full(10, -50.0)), v)  # a gate of 0 keeps the newest alone
    plain = build("rfa:features=2048", 10, 8, 1)
    even = plain.attend(q, k, v, causal=True, **of_head)
    np.testing.assert_allclose(attend(jnp.full(10, -1e-4)), even, atol=5e-3)  # a gate near 1 keeps all alike


def test_rfa_draws_in_training_alone():
    q, k, v = draw(12, (1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    once, step = (build(f"rfa:redraw={when}", 6, 16, 2) for when in ("once", "step"))
    out = lambda layer, seed: layer.mix(q, k, v, key=None if seed is None else jax.random.key(seed))[0]
    np.testing.assert_array_equal(out(once, 0), out(once, None))
    assert np.abs(out(step, 0) - out(step, 1)).max() > 1e-3
    np.testing.assert_array_equal(out(step, None), out(once, None))


@pytest.mark.parametrize(
    "choice, message",
    [
        ("retnet:chunk=0", "chunk must be at least 1"),
        ("retnet:fastest=1.0", "fastest must be above 1 and at most slowest"),
        ("gla:rank=0", "chunk and rank must be at least 1"),
        ("gla:temperature=0.0", "temperature must be above 0"),
        ("delta_net:chunk=0", "chunk must be at least 1"),
        ("mamba2:chunk=0", "chunk must be at least 1"),
        ("mamba2:groups=3", "groups must divide the 2 heads of values, got 3"),
        ("rwkv:chunk=0", "chunk must be at least 1"),
        ("rwkv:shift=two", "shift"),
        ("lightning:chunk=0", "chunk must be at least 1"),
        ("rfa:features=0", "features must be at least 1"),
        ("rfa:chunk=0", "chunk must be at least 1"),
        ("rfa:kernel=gausian", "gaussian"),
    ],
)
def test_impossible_options_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice, 16, 16, 2)


# ---- whole mixers, written down around the recurrences of the engine ----------------------------------------------


def test_a_mamba_mixer_is_a_decay_of_every_channel(golden):
    """Each inner channel is a head of its own: C is its query, dt B its key, the channel its value, dt A its decay."""
    peer = golden("mamba1_mixer")
    w = {name[2:]: jnp.asarray(x) for name, x in peer.items() if name.startswith("w.")}
    inner, gate = jnp.split(jnp.asarray(peer["x"]) @ w["in_proj.weight"].T, 2, -1)
    T, taps = inner.shape[1], w["conv1d.weight"].shape[-1]
    padded = jnp.pad(inner, ((0, 0), (taps - 1, 0), (0, 0)))
    inner = sum(padded[:, tap : tap + T] * w["conv1d.weight"][:, 0, tap] for tap in range(taps))
    inner = jax.nn.silu(inner + w["conv1d.bias"])
    rank, states = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    dt, B, C = jnp.split(inner @ w["x_proj.weight"].T, [rank, rank + states], -1)
    dt = jax.nn.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])

    def channel(C, B, dt, x, A):
        return channel_decay(C, dt[:, None] * B, x[:, None], dt[:, None] * A, chunk=5)[0][:, 0]

    channels = jax.vmap(channel, (None, None, 1, 1, 0), 1)
    out = jax.jit(jax.vmap(channels, (0, 0, 0, 0, None)))(C, B, dt, inner, -jnp.exp(w["A_log"]))
    out = (out + w["D"] * inner) * jax.nn.silu(gate) @ w["out_proj.weight"].T
    assert_close(out, peer["y"])


def test_a_real_gated_linear_recurrence_is_a_scalar_decay(golden):
    """RG-LRU (De et al., 2024, arXiv 2402.19427, equations 1 to 4): key and query are 1, each channel a head."""
    peer = golden("rglru")
    x, w = jnp.asarray(peer["x"]), {name[2:]: jnp.asarray(x) for name, x in peer.items() if name.startswith("w.")}
    heads, width = w["input_gate_bias"].shape

    def gate(name):
        blocks = jnp.einsum("bthw,hwo->btho", x.reshape(*x.shape[:2], heads, width), w[f"{name}_weight"])
        return jax.nn.sigmoid(blocks + w[f"{name}_bias"]).reshape(x.shape)

    decay = -8 * gate("recurrent_gate") * jax.nn.softplus(w["recurrent_param"])
    # The other implementation does not scale what starts a text, and forgets what stands before it.
    first = jnp.asarray(peer["position_ids"] == 0)[..., None]
    added = x * gate("input_gate") * jnp.where(first, 1, jnp.sqrt(1 - jnp.exp(2 * decay)))
    one = jnp.ones((x.shape[1], 1))
    channel = lambda v, decay: scalar_decay(one, one, v[:, None], decay, chunk=5)[0][:, 0]
    out = jax.jit(jax.vmap(jax.vmap(channel, 1, 1)))(
        added, jnp.where(first, -50, decay)
    )  # e^-50: a larger one would round what is summed with it
    assert_close(out, peer["y"])
