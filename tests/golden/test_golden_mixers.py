"""Recurrent mixers against their papers' equations: layers written down in numpy, position after position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention._engine.linear.levels import by_definition as levels_by_definition
from xformers_lab.attention._engine.linear.levels import by_levels, one_more
from xformers_lab.errors import UsageError

pytestmark = pytest.mark.full

B, T, N, H = 2, 11, 2, 4


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def stirred(choice: str, seed: int = 0):
    """A layer with every parameter moved, so that none is a one or a zero, and its parameters as float64."""
    layer = spec.build("attention", choice, length=T, dim=N * H, heads=N)
    random = np.random.default_rng(seed)
    moved = lambda x: x + 0.3 * random.standard_normal(x.shape).astype(np.float32)
    nnx.update(layer, jax.tree.map(moved, nnx.state(layer, nnx.Param)))
    return layer, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))


def draw():
    return np.random.default_rng(1).standard_normal((B, T, N * H)).astype(np.float32)


def agrees(layer, x, expected):
    """The whole pass, and one token after the other, give what is expected (B, T, D)."""
    assert_close(jax.jit(lambda x: layer(x, causal=True)[0])(x), expected)

    def one(cache, token):
        out, cache, _ = layer.decode(token[0], cache, at=token[1])
        return cache, out

    steps = lambda x: jax.lax.scan(one, layer.init_cache(*x.shape[:2]), (x.swapaxes(0, 1), jnp.arange(x.shape[1])))[1]
    assert_close(jax.jit(steps)(x), np.swapaxes(expected, 0, 1))


def linear(w, x):
    return x @ w["kernel"] + w.get("bias", 0)


def heads(y):
    return y.reshape(*y.shape[:-1], N, -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-5)


def at_unit_mean_square(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("chunk", [4, 64])
def test_kda_is_the_layer_of_its_paper_without_the_convolutions(chunk):
    """Equation 1 as matrices: S_t = (I - b k k^T) diag(a) S_(t-1) + b k v^T."""
    layer, w = stirred(f"kda:chunk={chunk}")
    x = draw()
    q, k = (unit(silu(heads(linear(w[name], x)))) for name in ("query", "key"))
    v, beta = silu(heads(linear(w["value"], x))), sigmoid(linear(w["strength"], x))
    fade = heads(softplus(linear(w["up"], linear(w["down"], x))))
    kept, gate = np.exp(-np.exp(w["rate"])[:, None] * fade), heads(linear(w["gate"], linear(w["gate_down"], x)))
    S, rows = np.zeros((B, N, H, H)), []
    for t in range(T):
        b, key = beta[:, t, :, None, None], k[:, t, :, :, None]
        S = (np.eye(H) - b * key * key.swapaxes(2, 3)) @ (kept[:, t, :, :, None] * S) + b * key * v[:, t, :, None]
        y = at_unit_mean_square(np.einsum("bnf,bnfh->bnh", q[:, t], S)) * sigmoid(gate[:, t])
        rows.append(y.reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("shift", ["one", "none"])
def test_rwkv7_is_the_layer_of_its_paper_but_for_what_is_shifted(shift):
    """Transitions as matrices, diag(w) - (a c) c^T."""
    layer, w = stirred(f"rwkv7:shift={shift}:chunk=4:rank=3")
    x = draw()
    q, k, v = (heads(linear(w[name], x)) for name in ("query", "key", "value"))
    forget = heads(linear(w["forget"], np.tanh(linear(w["forget_down"], x))))
    strength = heads(linear(w["strength"], linear(w["strength_down"], x)))
    gate = heads(linear(w["gate"], sigmoid(linear(w["gate_down"], x))))
    if shift == "one":
        before = lambda y: np.pad(y, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        arrays = {"k": k, "v": v, "forget": forget, "strength": strength}
        mixed = [w[f"share_{name}"] * y + (1 - w[f"share_{name}"]) * before(y) for name, y in arrays.items()]
        k, v, forget, strength = mixed
    kept, a, c = np.exp(-np.exp(-0.5) * sigmoid(forget)), sigmoid(strength), unit(k * w["removal"])
    k = k * (1 - w["replacement"] + w["replacement"] * a)
    S, rows = np.zeros((B, N, H, H)), []
    for t in range(T):
        removed, at = c[:, t, :, :, None], lambda y, t=t: y[:, t]
        transition = np.eye(H) * at(kept)[..., None] - at(a)[..., None] * removed * removed.swapaxes(2, 3)
        S = transition @ S + at(k)[..., None] * at(v)[:, :, None]
        y = np.einsum("bnf,bnfh->bnh", at(q), S)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * w["scale"]
        y = y + (at(q) * w["bonus"] * at(k)).sum(-1, keepdims=True) * at(v)
        rows.append((y * at(gate)).reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("chunk", [3, 32])
def test_mamba_is_the_mixer_of_transformers(golden, chunk):
    peer = golden("mamba1_mixer")
    w = {name[2:]: jnp.asarray(x) for name, x in peer.items() if name.startswith("w.")}
    x, D = peer["x"], peer["x"].shape[2]
    layer = spec.build("attention", f"mamba:state=4:rank=2:chunk={chunk}", length=x.shape[1], dim=D, heads=2)
    inner, gate = jnp.split(w["in_proj.weight"].T, 2, -1)
    layer.inner_value.kernel[...], layer.gate.kernel[...] = inner, gate
    layer.conv.weights[...], layer.conv_bias[...] = w["conv1d.weight"][:, 0].T, w["conv1d.bias"]
    layer.select.kernel[...], layer.inner_out.kernel[...] = w["x_proj.weight"].T, w["out_proj.weight"].T
    layer.interval.kernel[...], layer.interval.bias[...] = w["dt_proj.weight"].T, w["dt_proj.bias"]
    layer.rate[...], layer.skip[...] = w["A_log"], w["D"]
    agrees(layer, x, peer["y"])


def test_wider_values_of_mamba2_are_those_of_its_paper():
    """Values, gate and norm twice as wide as the block, keys and queries as they are."""
    layer, w = stirred("mamba2:expand=2:chunk=4")
    x = draw()
    c, b = (silu(linear(w[name], x)) for name in ("query", "key"))  # one group
    v = silu(np.concatenate([heads(linear(w["value"], x)), heads(linear(w["more_value"], x))], -1))
    z, step = heads(silu(linear(w["gate"], x))), softplus(linear(w["interval"], x))
    S, rows = np.zeros((B, N, H, 2 * H)), []
    for t in range(T):
        added = step[:, t, :, None, None] * b[:, t, None, :, None] * v[:, t, :, None]
        S = np.exp(-np.exp(w["rate"]) * step[:, t])[..., None, None] * S + added
        y = (np.einsum("bf,bnfh->bnh", c[:, t], S) + w["skip"][:, None] * v[:, t]) * z[:, t]
        y = at_unit_mean_square(y.reshape(B, -1)) * w["scale"].reshape(-1)
        rows.append(y @ w["inner_out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("chunk", [3, 64])
def test_xlstm_is_the_layer_of_its_paper(chunk):
    """The memory as it is defined, without a stabiliser."""
    layer, w = stirred(f"xlstm:chunk={chunk}")
    x = draw()
    q, k, v, gate = (heads(linear(w[name], x)) for name in ("query", "key", "value", "gate"))
    k, write, kept = k / np.sqrt(H), np.exp(linear(w["write"], x)), sigmoid(linear(w["forget"], x))
    C, n, rows = np.zeros((B, N, H, H)), np.zeros((B, N, H)), []
    for t in range(T):
        C = kept[:, t, :, None, None] * C + write[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = kept[:, t, :, None] * n + write[:, t, :, None] * k[:, t]
        total = np.maximum(np.abs((q[:, t] * n).sum(-1, keepdims=True)), 1)
        y = np.einsum("bnf,bnfh->bnh", q[:, t], C) / total
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * sigmoid(gate[:, t])
        rows.append(y.reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


def test_xlstm_gates_of_any_size_do_not_overflow():
    layer, _ = stirred("xlstm:chunk=3")
    q, k, v = np.random.default_rng(2).standard_normal((3, T, H)).astype(np.float32)
    log, decay = 200 * np.cos(np.arange(T, dtype=np.float32)), np.full(T, -1.0, np.float32)
    run = lambda method: getattr(layer, method)(q, k, v, causal=True, log=log, decay=decay)
    fast, slow = run("attend"), run("reference")
    assert np.isfinite(fast).all()
    assert_close(fast, slow)


@pytest.mark.parametrize("options", ["", ":householders=1:strength=correcting", ":householders=3:forget=scalar"])
def test_delta_product_is_the_layer_of_its_paper_without_the_convolutions(options):
    """Transitions as products of Householder matrices, and what each adds."""
    layer, w = stirred(f"delta_product:chunk=3{options}")
    x, steps = draw(), layer.householders
    several = lambda name: heads(linear(w[name], x)).reshape(B, T, N, steps - 1, H)
    together = lambda one, more: np.concatenate([heads(linear(w[one], x))[..., None, :], more], -2)
    none = np.zeros((B, T, N, 0, H))
    q, k = unit(silu(heads(linear(w["query"], x)))), together("key", several("more_key") if steps > 1 else none)
    k, v = unit(silu(k)), silu(together("value", several("more_value") if steps > 1 else none))
    beta = (1 if "correcting" in options else 2) * sigmoid(heads(linear(w["strength"], x)))
    kept = sigmoid(linear(w["forget"], x)) if "scalar" in options else np.ones((B, T, N))
    gate, S, rows = silu(heads(linear(w["gate"], x))), np.zeros((B, N, H, H)), []
    for t in range(T):
        S = kept[:, t, :, None, None] * S
        for j in range(steps):
            b, key = beta[:, t, :, j, None, None], k[:, t, :, j, :, None]
            S = (np.eye(H) - b * key * key.swapaxes(2, 3)) @ S + b * key * v[:, t, :, j, None]
        y = at_unit_mean_square(np.einsum("bnf,bnfh->bnh", q[:, t], S)) * gate[:, t]
        rows.append(y.reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("options", ["chunk=3", "bound=0.0"])
def test_hgrn2_is_the_layer_of_its_paper(options):
    layer, w = stirred(f"hgrn2:{options}")
    x = draw()
    q, k, v = (heads(linear(w[name], x)) for name in ("query", "key", "value"))
    bound = sigmoid(w["bound"]) if "bound" in w else 0
    kept, S, rows = bound + (1 - bound) * sigmoid(k), np.zeros((B, N, H, H)), []
    for t in range(T):
        f = kept[:, t, :, :, None]
        S = f * S + (1 - f) * v[:, t, :, None]
        rows.append(at_unit_mean_square(np.einsum("bnf,bnfh->bnh", silu(q[:, t]), S)).reshape(B, -1))
    agrees(layer, x, np.stack(rows, 1) @ w["out"]["kernel"])


@pytest.mark.parametrize("chunk", [3, 64])
def test_gsa_is_the_layer_of_its_paper(chunk):
    layer, w = stirred(f"gsa:chunk={chunk}:slots=5")
    x = draw()
    q, k, v = (silu(heads(linear(w[name], x))) for name in ("query", "key", "value"))
    kept = heads(sigmoid(linear(w["forget"], x))) ** (1 / 8)
    K, V, rows = np.zeros((B, N, 5, H)), np.zeros((B, N, 5, H)), []
    for t in range(T):
        a = kept[:, t, :, :, None]
        K, V = a * K + (1 - a) * k[:, t, :, None], a * V + (1 - a) * v[:, t, :, None]
        weights = np.exp(np.einsum("bnmh,bnh->bnm", K, q[:, t]) / np.sqrt(H))
        y = np.einsum("bnm,bnmh->bnh", weights / weights.sum(-1, keepdims=True), V)
        rows.append(at_unit_mean_square(silu(y)).reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_ttt_is_the_layer_of_its_paper_without_the_convolution(batch):
    """Gradients of each batch by hand, through the norm."""
    layer, w = stirred(f"ttt:batch={batch}:rate=2.0")
    x = draw()
    q, k, v = (heads(linear(w[name], x)) for name in ("query", "key", "value"))
    size, eps = 2.0 / H * sigmoid(linear(w["strength"], x)), 1e-5
    gain, shift = w["gain"], w["shift"]

    def inner(x, W, b):
        z = np.einsum("bnh,bnhg->bng", x, W) + b
        spread = np.sqrt(z.var(-1, keepdims=True) + eps)
        return (z - z.mean(-1, keepdims=True)) / spread, spread

    wide = lambda x: np.broadcast_to(x, (B, *x.shape)).copy()
    W, b, rows = wide(w["weights"]), wide(w["bias"]), []
    for t in range(T):
        if t % batch == 0:
            before, sums = (W, b), [np.zeros_like(W), np.zeros_like(b)]
        unit, spread = inner(k[:, t], *before)
        g = (unit * gain + shift - (v[:, t] - k[:, t])) * gain
        g = (g - g.mean(-1, keepdims=True) - unit * (g * unit).mean(-1, keepdims=True)) / spread
        g = g * size[:, t, :, None]
        sums = [sums[0] + k[:, t, :, :, None] * g[:, :, None], sums[1] + g]
        share = w["share"][:, t % batch]
        W, b = before[0] - share[:, None, None] * sums[0], before[1] - share[:, None] * sums[1]
        y = (q[:, t] + inner(q[:, t], W, b)[0] * gain + shift).reshape(B, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)
        rows.append(y @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_ttt_mlp_is_the_layer_of_its_paper_without_the_convolution(batch):
    """Weights of both layers moved by gradients by hand, in the order of the paper: those of a batch at the weights
    before it, each query by what its position has learned."""
    layer, w = stirred(f"ttt:inner=mlp:batch={batch}:rate=2.0")
    x = draw()
    q, k, v = (heads(linear(w[name], x)) for name in ("query", "key", "value"))
    size, eps, c = 2.0 / H * sigmoid(linear(w["strength"], x)), 1e-5, np.sqrt(2 / np.pi)
    gelu = lambda z: 0.5 * z * (1 + np.tanh(c * (z + 0.044715 * z**3)))

    def slope(z):
        tanh = np.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * c * (1 + 3 * 0.044715 * z**2)

    def at_norm(z):
        spread = np.sqrt(z.var(-1, keepdims=True) + eps)
        return (z - z.mean(-1, keepdims=True)) / spread, spread

    names = ("weights", "bias", "second", "second_bias")
    now, rows = [np.broadcast_to(w[name], (B, *w[name].shape)).copy() for name in names], []
    times = lambda x, W: np.einsum("bnh,bnhg->bng", x, W)
    for t in range(T):
        if t % batch == 0:
            before, sums = now, [np.zeros_like(p) for p in now]
        W1, b1, W2, b2 = before
        z1 = times(k[:, t], W1) + b1
        z2 = times(gelu(z1), W2) + b2
        unit, spread = at_norm(z2)
        g2 = (unit * w["gain"] + w["shift"] - (v[:, t] - k[:, t])) * w["gain"]
        g2 = (g2 - g2.mean(-1, keepdims=True) - unit * (g2 * unit).mean(-1, keepdims=True)) / spread
        g2 = g2 * size[:, t, :, None]
        g1 = np.einsum("bng,bnhg->bnh", g2, W2) * slope(z1)
        new = (k[:, t, :, :, None] * g1[:, :, None], g1, gelu(z1)[..., None] * g2[:, :, None], g2)
        sums = [p + more for p, more in zip(sums, new, strict=True)]
        share = w["share"][:, t % batch]
        now = [p - share.reshape(N, *[1] * (p.ndim - 2)) * more for p, more in zip(before, sums, strict=True)]
        z2 = times(gelu(times(q[:, t], now[0]) + now[1]), now[2]) + now[3]
        y = (q[:, t] + at_norm(z2)[0] * w["gain"] + w["shift"]).reshape(B, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)
        rows.append(y @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


def levels_of(t):
    """The positions that t sees, by level: itself, then by the ones in its binary digits, from the last digit on."""
    found, end = {0: [t]}, t
    for bit in range(t.bit_length()):
        if t >> bit & 1:
            found[bit + 1] = list(range(end - 2**bit, end))
            end -= 2**bit
    assert end == 0
    return found


@pytest.mark.parametrize("chunk, levels", [(1, 15), (2, 15), (4, 15), (64, 15), (2, 3), (4, 1)])
@pytest.mark.parametrize("rule", ["mamba2", "gated_delta"])
def test_log_linear_is_the_layer_of_its_paper_without_the_convolution(rule, chunk, levels):
    """Every level's state anew for every position, from the keys of its run; what no scale is left for has the last."""
    layer, w = stirred(f"log_linear:rule={rule}:chunk={chunk}:levels={levels}")
    x, of_rule = draw(), w["rule"]
    v = silu(heads(linear(w["value"], x)))
    scales = softplus(linear(w["scales"], x).reshape(B, T, N, levels) * w["spread"])
    if rule == "mamba2":
        q, k = (np.repeat(silu(linear(w[name], x))[:, :, None], N, 2) for name in ("query", "key"))
        step = softplus(linear(of_rule["interval"], x))
        kept, strength, wrong = np.exp(-np.exp(of_rule["rate"]) * step), step, 0.0
    else:
        q, k = (unit(silu(heads(linear(w[name], x)))) for name in ("query", "key"))
        kept = np.exp(-np.exp(of_rule["rate"]) * softplus(linear(of_rule["forget"], x)))
        strength, wrong = sigmoid(linear(of_rule["strength"], x)), 1.0
    rows = []
    for t in range(T):
        y = np.zeros((B, N, H))
        for level, run in levels_of(t).items():
            state = np.zeros((B, N, H, H))
            for s in range(run[0], t + 1):
                held = np.einsum("bnf,bnfh->bnh", k[:, s], state) * wrong
                state = state - strength[:, s, :, None, None] * k[:, s, :, :, None] * held[:, :, None]
                state = kept[:, s, :, None, None] * state
                if s in run:
                    state = state + strength[:, s, :, None, None] * k[:, s, :, :, None] * v[:, s, :, None]
            y += scales[:, t, :, min(level, levels - 1), None] * np.einsum("bnf,bnfh->bnh", q[:, t], state)
        gate = silu(heads(linear(of_rule["gate"], x)))[:, t]
        if rule == "mamba2":
            y = (y + of_rule["skip"][:, None] * v[:, t]) * gate
            y = at_unit_mean_square(y.reshape(B, -1)).reshape(B, N, H) * of_rule["scale"]
        else:
            y = at_unit_mean_square(y) * gate
        rows.append(y.reshape(B, -1) @ w["out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("T, chunk", [(1, 4), (37, 4), (50, 16), (130, 8)])
def test_levels_in_chunks_are_the_definition(T, chunk, corrects):
    """In value and gradient, with values wider than keys; and one position after the other."""
    random = np.random.default_rng(T)
    q, k, v, fade, beta, scales = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((T, 3), (T, 3), (T, 5), (T,), (T,), (T, 9))
    )
    rest = {"k": k / jnp.linalg.norm(k, axis=1, keepdims=True), "v": v, "decay": -jnp.exp(fade)}
    rest |= {"beta": jax.nn.sigmoid(beta)} if corrects else {}
    fast = lambda q, scales, rest: by_levels(q, scales, **rest, chunk=chunk)
    slow = lambda q, scales, rest: levels_by_definition(q, scales, **rest)

    def steps(q, scales, rest):
        def one(states, now):
            at, q, scales, rest = now
            out, states = one_more(states, q, scales, **rest, at=at)
            return states, out

        return jax.lax.scan(one, jnp.zeros((9, 3, 5)), (jnp.arange(T), q, scales, rest))[1]

    expected = jax.jit(slow)(q, scales, rest)
    weight = jnp.asarray(random.standard_normal(expected.shape), jnp.float32)
    grad = lambda run: jax.jit(jax.grad(lambda *args: (run(*args) * weight).sum(), (0, 1, 2)))(q, scales, rest)
    for run in (fast, steps):
        assert_close(jax.jit(run)(q, scales, rest), expected)
        for actual, wanted in zip(jax.tree.leaves(grad(run)), jax.tree.leaves(grad(slow)), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-4, rtol=1e-3)


def test_log_linear_with_one_scale_of_one_is_its_rule():
    """softplus is one where its argument is log(e - 1)."""
    for rule, plain in (("mamba2", "mamba2:chunk=4"), ("gated_delta", "gated_delta_net:chunk=4")):
        layer, w = stirred(f"log_linear:rule={rule}:levels=1:chunk=4")
        layer.scales.kernel[...], layer.scales.kernel[0] = jnp.zeros((N * H, N)), jnp.full(N, np.log(np.e - 1))
        layer.spread[...] = jnp.ones((N, 1))
        x = jnp.asarray(draw()).at[..., 0].set(1.0)
        alone = spec.build("attention", plain, length=T, dim=N * H, heads=N)
        state = {name: w[name] for name in ("query", "key", "value", "out")} | w["rule"]
        nnx.update(alone, nnx.State(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), state)))
        actual, expected = (jax.jit(lambda x, one=one: one(x, causal=True)[0])(x) for one in (layer, alone))
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "choice, groups", [("gated_delta_net:expand=2:gain=true:chunk=4", 2), ("retnet:expand=3:gain=true:chunk=4", 3)]
)
def test_wider_values_and_gains_are_those_of_their_papers(choice, groups):
    layer, w = stirred(choice)
    x, expand = draw(), groups
    q, k, v = (heads(linear(w[name], x)) for name in ("query", "key", "value"))
    v = np.concatenate([v, heads(linear(w["more_value"], x))], -1)
    if choice.startswith("retnet"):
        k, strength, wrong = k / np.sqrt(H), np.ones((B, T, N)), 0.0
        kept = np.broadcast_to(1 - 1 / np.exp(np.linspace(np.log(32), np.log(512), N)), (B, T, N))
    else:
        q, k, v = unit(silu(q)), unit(silu(k)), silu(v)
        kept = np.exp(-np.exp(w["rate"]) * softplus(linear(w["forget"], x)))
        strength, wrong = sigmoid(linear(w["strength"], x)), 1.0
    gate, state, rows = silu(heads(linear(w["gate"], x))), np.zeros((B, N, H, expand * H)), []
    for t in range(T):
        state = kept[:, t, :, None, None] * state
        new = strength[:, t, :, None] * (v[:, t] - wrong * np.einsum("bnf,bnfh->bnh", k[:, t], state))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        y = at_unit_mean_square(np.einsum("bnf,bnfh->bnh", q[:, t], state)) * w["gain"] * gate[:, t]
        rows.append(y.reshape(B, -1) @ w["inner_out"]["kernel"])
    agrees(layer, x, np.stack(rows, 1))


@pytest.mark.parametrize(
    "choice, message",
    [
        ("kda:chunk=0", "chunk and rank must be at least 1"),
        ("kda:rank=0", "chunk and rank must be at least 1"),
        ("mamba2:expand=0", "expand must be at least 1"),
        ("gated_delta_net:expand=0", "expand must be at least 1"),
        ("retnet:expand=0", "expand must be at least 1"),
        ("log_linear:levels=0", "levels must be at least 1"),
        ("log_linear:chunk=0", "chunk must be at least 1"),
        ("log_linear:rule=gated_delta:groups=2", "groups=2 share q and k under rule=mamba2 alone"),
        ("mamba:expand=0", "must be at least 1"),
        ("mamba:conv=1", "at least 2 positions"),
        ("xlstm:chunk=0", "chunk must be at least 1"),
        ("delta_product:householders=0", "chunk and householders must be at least 1"),
        ("delta_product:strength=double", "strength"),
        ("hgrn2:bound=1.0", "bound must be at least 0 and below 1"),
        ("hgrn2:chunk=0", "chunk must be at least 1"),
        ("gsa:slots=0", "chunk and slots must be at least 1"),
        ("gsa:temperature=0.0", "temperature must be above 0"),
        ("ttt:batch=0", "batch must be at least 1"),
        ("ttt:rate=0.0", "rate must be above 0"),
        ("rwkv7:chunk=0", "chunk and rank must be at least 1"),
        ("rwkv7:shift=two", "shift"),
    ],
)
def test_impossible_options_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        spec.build("attention", choice, length=16, dim=16, heads=2)
