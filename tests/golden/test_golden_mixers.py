"""Recurrent mixers against their papers' equations: layers written down in numpy, position after position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
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


@pytest.mark.parametrize(
    "choice, message",
    [
        ("kda:chunk=0", "chunk and rank must be at least 1"),
        ("kda:rank=0", "chunk and rank must be at least 1"),
        ("mamba2:expand=0", "expand must be at least 1"),
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
