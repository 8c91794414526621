"""Attention with a prior, and without attention: other implementations' numbers, and what the kit does not ask."""

import itertools
import math

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from agreement import assert_close
from flax import nnx

from xformers_lab import spec
from xformers_lab.check.subject import Case, Subject
from xformers_lab.errors import Refused, UsageError
from xformers_lab.measure.flops import count_flops, largest_intermediate

pytestmark = pytest.mark.full


def build(choice: str, length: int, dim: int, heads: int, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=dim, heads=heads, kv_heads=kv_heads)


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(B: int, T: int, N: int, H: int, seed: int = 0):
    return tuple(draw(seed + i, B, T, N, H) for i in range(3))


def weights_of(layer, q, k, T: int, **options):
    """(B, N, T, T): what each key weighs, read off by giving one-hot values."""
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (len(q), T, layer.size.heads, T))
    return np.swapaxes(layer.mix(q, k, v, **options)[0], 1, 2)


def softmax(s, causal: bool):
    s = np.where(np.tri(*s.shape[-2:], dtype=bool) | (not causal), np.asarray(s, np.float64), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def dots(q, k):
    return np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])


# ---- every choice that is another algorithm, fast against defined, with gradients -----------------------


OTHER_ALGORITHMS = [
    "gaussian:kind=layer",
    "gaussian:kind=fixed:width=3",
    "gaussian:kind=distance",
    "hard_coded:offsets=-2x0x3:std=2.5",
    *(f"synthesizer:kind={kind}" for kind in ("random", "fixed", "factorised_dense", "factorised_random")),
    "synthesizer:beside=random:dot=true",
    "synthesizer:kind=factorised_dense:beside=factorised_random",
]


@pytest.mark.parametrize("choice, causal", kinds.every_third([*itertools.product(OTHER_ALGORITHMS, (True, False))]))
def test_choices_that_are_other_algorithms(choice, causal):
    one = Subject(choice, lambda size, small: spec.build("attention", choice, size, rngs=nnx.Rngs(0)), length=19)
    case = Case(19, 19, causal, biased=one.takes_bias)
    fast, slow = one.result(case), one.result(case, "reference")
    assert_close(fast.out, slow.out)
    assert jax.tree.structure(fast.grads) == jax.tree.structure(slow.grads)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(fast.grads), jax.tree.leaves(slow.grads), strict=True
    ):
        scale = max(np.abs(expected).max(), 0.1)
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_masks_are_their_equation(causal):
    """M exp(s) / sum M exp(s), M = sigmoid(x w + P + U), pair by pair; the farthest P stands for those beyond."""
    T, N, H, reach = 12, 2, 4, 3
    layer, (q, k, _), x = build(f"dynamic_mask:reach={reach}", T, N * H, N), qkv(2, T, N, H), draw(9, 2, T, N * H)
    layer.apart[...], layer.of_head[...] = draw(5, 2 * reach + 1), draw(6, N)
    gate, apart, of_head = (
        np.asarray(layer.gate(x))[..., 0],
        np.asarray(layer.apart[...]),
        np.asarray(layer.of_head[...]),
    )
    distance = np.clip(np.arange(T)[:, None] - np.arange(T), -reach, reach)
    M = 1 / (1 + np.exp(-(gate[:, None, :, None] + apart[distance + reach] + of_head[:, None, None])))
    weights = M * np.exp(dots(q, k)) * (np.tri(T) if causal else 1)
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (2, T, N, T))
    out = np.swapaxes(layer.mix(q, k, v, x=x, causal=causal)[0], 1, 2)
    assert_close(out, weights / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("choice", ["realformer", "lazyformer", "predictive", "synthesizer:kind=random"])
def test_long_causal_queries_come_in_quarters(choice):
    """No block is given the keys after its quarter, and what comes out is the same."""
    layer, (q, k, v) = build(choice, 1030, 4, 1), qkv(1, 1030, 1, 4)
    assert_close(layer.mix(q, k, v, causal=True)[0], layer.mix(q, k, v, causal=True, method="reference")[0])
    assert flops_of(layer, q, k, v, causal=True) < 0.9 * flops_of(layer, q, k, v, causal=False)


def flops_of(layer, q, k, v, causal: bool):
    return count_flops(lambda q, k, v: layer.mix(q, k, v, causal=causal)[0], q, k, v)


# ---- FNet -----------------------------------------------------------------------------------------------


def fnet(x, **options):
    return build("fnet", x.shape[1], x.shape[2], 1)(jnp.asarray(x), **options)[0]


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_fnet_is_that_of_transformers(golden, method):
    peer = golden("fnet_fourier")
    np.testing.assert_allclose(fnet(peer["x"], method=method), peer["y"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 2), (7, 5), (6, 5), (5, 6), (8, 16)])
def test_fnet_is_a_transform_over_both_axes(T, D):
    x = draw(0, 2, T, D)
    np.testing.assert_allclose(fnet(x), np.real(np.fft.fft2(x)), atol=1e-4)
    pulled = jax.vjp(fnet, x)[1](x)[0]  # symmetric: the gradient is the transform again
    np.testing.assert_allclose(pulled, np.real(np.fft.fft2(x)), atol=1e-4)


def test_fnet_padding_is_zeros_and_the_length_counts():
    x = draw(0, 1, 12, 4)
    valid = jnp.arange(12)[None] < 9
    zeroed = np.where(valid[..., None], x, 0)
    np.testing.assert_allclose(fnet(x, valid=valid), np.real(np.fft.fft2(zeroed)), atol=1e-4)
    assert np.abs(fnet(x, valid=valid)[:, :9] - fnet(x[:, :9])).max() > 0.1


def test_fnet_refuses_what_it_cannot_do():
    x = draw(0, 1, 6, 4)
    with pytest.raises(ValueError, match="sum over all positions"):
        fnet(x, causal=True)
    with pytest.raises(ValueError, match="no queries to another"):
        fnet(x, memory=x)


# ---- Gaussians ------------------------------------------------------------------------------------------


def density(distance, std):
    return np.exp(-(distance**2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def test_hard_coded_weights_are_densities_around_the_neighbours():
    T, layer = 40, build("hard_coded", 40, 160, 4)
    at, nothing = np.arange(T), jnp.zeros((1, T, 4, T))
    distance = at[None] - at[:, None]
    both = weights_of(layer, nothing, nothing, T)[0]
    for head, offset in enumerate([-1, 1, -1, 1]):
        np.testing.assert_allclose(both[head], density(distance - offset, 1.0), atol=1e-7)
    causal = weights_of(layer, nothing, nothing, T, causal=True)[0]
    for head, offset in enumerate([-1, 0, -1, 0]):  # the neighbour ahead is not there yet: the query itself
        np.testing.assert_allclose(causal[head], density(distance - offset, 1.0) * (distance <= 0), atol=1e-7)
    assert both[0][0].sum() < 0.4  # at the ends the weights do not sum to one


def test_hard_coded_learns_values_and_output_alone():
    layer = build("hard_coded", 8, 16, 2)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == {"value", "out"}


def test_gaussian_without_scores_is_its_prior():
    """Zero queries predict the middle: P = I / 2, and D = I / 2 too, so sigma = I / 4; causally of the keys so far."""
    T, layer = 24, build("gaussian", 24, 48, 2)
    zero = jnp.zeros((1, T, 2, 24))
    number = np.arange(1, T + 1)
    prior = -((number - T / 2) ** 2) / (2 * (T / 4) ** 2)
    expected = np.broadcast_to(softmax(prior[None], False), (1, 2, T, T))
    assert_close(weights_of(layer, zero, zero, T), expected)
    I = number[:, None]
    prior = -((number - I / 2) ** 2) / (2 * np.maximum(I / 2, 1) ** 2 / 4)
    assert_close(weights_of(layer, zero, zero, T, causal=True)[0, 0], softmax(prior, True))


@pytest.mark.parametrize("kind, causal", kinds.every_third([
    *itertools.product(["query", "layer", "fixed", "distance"], [True, False])
]))  # fmt: skip
def test_gaussian_counts_real_keys(kind, causal):
    """Padding before or after a sentence changes nothing of it."""
    width = ":width=4" if kind in ("fixed", "distance") else ""
    layer, (q, k, v) = build(f"gaussian:kind={kind}{width}", 16, 16, 2), qkv(1, 9, 2, 8)
    alone = layer.mix(q, k, v, causal=causal)[0]
    for before in (0, 3, 5):
        wide = lambda x, before=before: jnp.pad(x, ((0, 0), (before, 5 - before), (0, 0), (0, 0)), constant_values=7.0)
        valid = ((jnp.arange(14) >= before) & (jnp.arange(14) < before + 9))[None]
        padded = layer.mix(wide(q), wide(k), wide(v), valid=valid, causal=causal)[0]
        assert_close(padded[:, before : before + 9], alone)


def test_gaussian_transformer_weakens_the_middle():
    """-|w d^2 + b| with b < 0: at zero distance it takes something away, and it falls with the square."""
    layer = build("gaussian:kind=distance:width=2", 9, 18, 1)
    zero = jnp.zeros((1, 9, 1, 9))
    logits = np.log(weights_of(layer, zero, zero, 9)[0, 0, 4])
    expected = -np.abs(0.5 * (np.arange(9) - 4.0) ** 2 - 0.1)
    assert_close(logits - logits[4], expected - expected[4])


@pytest.mark.parametrize("causal", [True, False])
def test_gaussian_never_holds_all_scores(causal):
    layer, T = build("gaussian", 4096, 16, 1), 4096
    head = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

    def both(q, k, v):
        out, pull = jax.vjp(lambda *heads: layer.mix(*heads, causal=causal)[0], q, k, v)
        return out, pull(out)

    assert largest_intermediate(both, head, head, head) < T * T / 4


# ---- scores and weights handed on -----------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_realformer_adds_the_scores_of_all_layers_below(causal):
    layer, carry, total = build("realformer", 10, 16, 2), None, 0.0
    for seed in range(3):
        q, k, v = qkv(2, 10, 2, 8, seed=10 * seed)
        out, carry, _ = layer.mix(q, k, v, causal=causal, carry=carry)
        total = total + dots(q, k)
        assert_close(out, np.einsum("bnts,bsnh->btnh", softmax(total, causal), v))


def test_lazyformer_takes_over_what_the_first_layer_computed():
    layer, carry, first = build("lazyformer:share=3", 10, 16, 2), None, np.zeros(())
    for number in range(4):
        q, k, v = qkv(2, 10, 2, 8, seed=10 * number)
        first = softmax(dots(q, k), True) if number % 3 == 0 else first
        out, carry, _ = layer.mix(q, k, v, causal=True, carry=carry)
        assert_close(out, np.einsum("bnts,bsnh->btnh", first, v))


def test_lazyformer_learns_from_every_layer_that_takes_over():
    """The gradient of the second layer reaches the first layer's queries, and not its own."""
    layer, (q, k, v) = build("lazyformer", 10, 16, 2), qkv(2, 10, 2, 8)

    def second(q, own):
        carry = layer.mix(q, k, v, causal=True)[1]
        return jnp.sin(layer.mix(own, k, v, causal=True, carry=carry)[0]).sum()

    def defined(q, own):
        p = jax.nn.softmax(
            jnp.where(jnp.tri(10, dtype=bool), jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(8), -1e30)
        )
        return jnp.sin(jnp.einsum("bnts,bsnh->btnh", p, v)).sum()

    of_first, of_own = jax.grad(second, (0, 1))(q, q + 1)
    assert not of_own.any()
    assert_close(of_first, jax.grad(defined)(q, q))


def second_layer(layer, causal: bool, method: str, valid):
    """Its kernel; and the output of a second layer as a function of the kernel and of both layers' queries and keys."""
    graph, kernel, rest = nnx.split(layer, lambda path, value: path == ("kernel",), ...)

    def run(kernel, q, k, v, q2, k2):
        layer = nnx.merge(graph, kernel, rest)
        options = {"causal": causal, "valid": valid, "method": method}
        carry = layer.mix(q, k, v, **options)[1]
        return layer.mix(q2, k2, v, carry=carry, **options)[0]

    return kernel, run


@pytest.mark.full
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_predictive_convolves_the_map_of_the_layer_below(causal, kernel):
    """The first layer convolves nothing, so the kit sees no convolution: here is one, in value and gradient."""
    layer = build(f"predictive:kernel={kernel}:convolved=0.7:residual=0.4", 12, 16, 4, 2)
    q, k, v = qkv(3, 12, 4, 4)
    q2, k2, _ = qkv(3, 12, 4, 4, seed=5)
    k, k2, v = k[:, :, :2], k2[:, :, :2], v[:, :, :2]
    valid = jnp.asarray(np.stack([np.ones(12, bool), np.arange(12) < 7, np.random.default_rng(0).random(12) < 0.6]))
    results = []
    for method in ("attend", "reference"):
        own, run = second_layer(layer, causal, method, valid)
        out, pull = jax.vjp(run, own, q, k, v, q2, k2)
        results.append(jax.tree.leaves((out, pull(draw(9, *out.shape)))))
    for fast, slow in zip(*results, strict=True):
        np.testing.assert_allclose(fast, slow, atol=5e-5 * max(1, float(jnp.abs(slow).max())))
    used = results[0][1][: kernel // 2 + 1] if causal else results[0][1]
    assert all(jnp.abs(row).max() > 1e-3 for row in used)  # every row of the kernel matters


def test_predictive_by_hand():
    """One head, a kernel that looks one query back: A = b relu(w I[t - 1]) + (1 - b) I."""
    layer = build("predictive:residual=0.25:convolved=0.5", 6, 4, 1)
    layer.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[0, 1].set(2.0)
    (q, k, v), (q2, k2, _) = qkv(1, 6, 1, 4), qkv(1, 6, 1, 4, seed=5)
    carry = layer.mix(q, k, v, causal=True)[1]
    blend = np.tril(0.25 * dots(q, k) + 0.75 * dots(q2, k2))
    above = np.pad(blend, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    scores = 0.5 * np.maximum(2 * above, 0) + 0.5 * blend
    out = layer.mix(q2, k2, v, causal=True, carry=carry)[0]
    assert_close(out, np.einsum("bnts,bsnh->btnh", softmax(scores, True), v))


def test_predictive_second_layer_sees_no_future_and_no_padding():
    layer = build("predictive:convolved=0.9:kernel=5", 12, 16, 4)
    layer.level[...] = jnp.full(4, 0.3)
    inputs = (*qkv(1, 12, 4, 4), *qkv(1, 12, 4, 4, seed=5)[:2])
    everyone = jnp.ones((1, 12), bool)
    kernel, run = second_layer(layer, True, "attend", everyone)
    for leaf in jax.vjp(lambda *inputs: run(kernel, *inputs)[:, 6], *inputs)[1](jnp.ones((1, 4, 4))):
        assert not leaf[:, 7:].any() and leaf[:, :6].any()
    valid = everyone.at[:, 8:].set(False)
    kernel, run = second_layer(layer, False, "attend", valid)
    for leaf in jax.vjp(lambda *inputs: run(kernel, *inputs)[:, :8], *inputs)[1](jnp.ones((1, 8, 4, 4))):
        assert not leaf[:, 8:].any() and leaf[:, :8].any()  # queries too: their rows are neighbours of valid ones


# ---- Synthesizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "fixed", "factorised_random"])
def test_synthesizer_tables_ignore_the_input(kind):
    layer = build(f"synthesizer:kind={kind}" + ":rank=3" * (kind == "factorised_random"), 12, 16, 2)
    q, k, v = qkv(2, 12, 2, 8)
    assert_close(layer.mix(q, k, v)[0], layer.mix(3 * q, -k, v)[0])
    own = layer.per_head()["own"]
    table = own["left"] @ own["right"].swapaxes(1, 2) if kind == "factorised_random" else own["table"]
    assert_close(weights_of(layer, q, k, 12), np.broadcast_to(softmax(table, False), (2, 2, 12, 12)))
    learned = {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert ("table" in learned) == (kind == "random")


@pytest.mark.parametrize("kind", ["dense", "random", "factorised_dense", "factorised_random"])
def test_synthesizer_shorter_inputs_use_the_first_rows(kind):
    layer, (q, k, v) = build(f"synthesizer:kind={kind}", 12, 16, 2), qkv(2, 12, 2, 8)
    whole = layer.mix(q, k, v, causal=True)[0]
    assert_close(layer.mix(q[:, :7], k[:, :7], v[:, :7], causal=True)[0], whole[:, :7])


def test_synthesizer_factorised_dense_scores_are_an_outer_product():
    layer, (q, k, _) = build("synthesizer:kind=factorised_dense", 12, 16, 2), qkv(1, 12, 2, 8)
    own = layer.per_head()["own"]
    assert own["near"].shape == (2, 4, 8) and own["far"].shape == (2, 3, 8)
    near, far = (np.einsum("btnh,nah->bnta", np.maximum(q, 0), own[name]) for name in ("near", "far"))
    scores = np.einsum("bnta,bntc->bntac", far, near).reshape(1, 2, 12, 12)
    assert_close(weights_of(layer, q, k, 12), softmax(scores, False))


@pytest.mark.parametrize(
    "options", ["beside=random", "dot=true", "kind=random:dot=true", "beside=fixed:dot=true",
                "kind=factorised_dense:beside=factorised_random:rank=3:dot=true"],
)  # fmt: skip
def test_synthesizer_mixes_scores_by_shares(options):
    """softmax(sum_i a_i B^i) of D + R, D + V, R + V and D + R + V, written out; W1 is not the queries' projection."""
    layer, (q, k, _), x = build(f"synthesizer:{options}", 12, 16, 2), qkv(2, 12, 2, 8), draw(7, 2, 12, 16)
    layer.shares[...] = draw(8, *layer.shares.shape)
    own = {name: np.asarray(leaf, np.float64) for name, leaf in layer.per_head()["own"].items()}
    hidden = q if layer.first is None else (x @ layer.first.kernel[...]).reshape(2, 12, 2, 8)
    hidden, parts = np.maximum(hidden, 0), []
    if "kind=factorised_dense" in options:
        near, far = (np.einsum("btnh,nah->bnta", hidden, own[name]) for name in ("near", "far"))
        parts.append(np.einsum("bnta,bntc->bntac", far, near).reshape(2, 2, 12, 12))
    elif "kind=random" not in options:
        parts.append(np.einsum("btnh,nsh->bnts", hidden, own["rows"]))
    if "factorised_random" in options:
        parts.append(np.broadcast_to(own["left"] @ own["right"].swapaxes(1, 2), (2, 2, 12, 12)))
    elif "random" in options or "fixed" in options:
        parts.append(np.broadcast_to(own["table"], (2, 2, 12, 12)))
    if "dot" in options:
        parts.append(dots(q, k))
    shares = np.exp(np.asarray(layer.shares[...]))
    assert len(parts) == len(shares) == own["shares"].shape[1] >= 2
    mixed = sum(share * part for share, part in zip(shares / shares.sum(), parts, strict=True))
    for causal in (False, True):
        with jax.default_matmul_precision("highest"):
            assert_close(weights_of(layer, q, k, 12, x=x, causal=causal), softmax(mixed, causal))


def test_synthesizer_mixes_alike_at_the_start():
    layer = build("synthesizer:beside=random:dot=true", 12, 16, 2)
    assert_close(layer.per_head()["own"]["shares"], np.full((2, 3), 1 / 3))
    with pytest.raises(Refused, match="log_n=8 would scale one of the scores"):
        layer.prepare(log_n=8)


def test_synthesizer_refuses_more_than_it_is_built_for():
    layer, (q, k, v) = build("synthesizer", 8, 16, 2), qkv(1, 9, 2, 8)
    with pytest.raises(ValueError, match="built for 8 positions, got 9"):
        layer.mix(q, k, v)
    with pytest.raises(ValueError, match="built for 8 positions, got 9"):
        layer.init_cache(1, 9)


# ---- average --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_average_is_the_network_of_the_paper(T):
    """Mean so far, feed-forward, gates: written out in numpy, at lengths within a chunk and beyond."""
    layer, x = build("average:widen=2", T, 8, 2), draw(0, 2, T, 8)
    mean = np.cumsum(x, 1) / np.arange(1, T + 1)[:, None]
    apply = lambda linear, y: y @ linear.kernel[...] + linear.bias[...]
    g = apply(layer.shrink, np.maximum(apply(layer.grow, mean), 0))
    gates = 1 / (1 + np.exp(-apply(layer.gates, np.concatenate([x, g], -1))))
    with jax.default_matmul_precision("highest"):
        assert_close(layer(x, causal=True)[0], gates[..., :8] * x + gates[..., 8:] * g)


def test_average_remembers_as_much_of_any_length():
    layer = build("average", 512, 16, 2)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(layer.init_cache(1, length))) for length in (4, 512)]
    assert sizes == [17, 17]


# ---- all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("synthesizer:beside=fixed:rank=8", "rank is an option of kind=factorised_random"),
        ("synthesizer:kind=random:beside=fixed", "beside=fixed is a table to mix with what is predicted"),
        ("synthesizer:beside=dense", 'unknown value "dense"'),
        ("gaussian:width=0", "width must be above 0, got 0"),
        ("gaussian:kind=global", 'unknown value "global"'),
        ("hard_coded:std=0", "std must be above 0, got 0"),
        ("dynamic_mask:reach=0", "reach must be at least 1, got 0"),
        ("lazyformer:share=0", "share must be at least 1, got 0"),
        ("predictive:kernel=4", "kernel must be odd and at least 1, got 4: try 5"),
        ("predictive:residual=1.5", "residual is a share between 0 and 1, got 1.5"),
        ("synthesizer:rank=0", "rank must be at least 1, got 0"),
        ("synthesizer:kind=dense:rank=8", "rank is an option of kind=factorised_random, got kind=dense"),
        ("gaussian:kind=query:width=10", "width is an option of kind=fixed and kind=distance, got kind=query"),
        ("average:widen=0", "widen must be at least 1, got 0"),
    ],
)
def test_options_are_checked(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice, 8, 16, 2)


@pytest.mark.parametrize("name", ["hard_coded", "average"])
def test_no_scores_no_bias(name):
    layer, (q, k, v) = build(name, 8, 16, 2), qkv(1, 8, 2, 8)
    with pytest.raises(ValueError, match=layer.refusals()["bias"]):
        layer.mix(q, k, v, x=draw(0, 1, 8, 16), bias=lambda q_at, k_at: 0.0 * q_at)


@pytest.mark.parametrize("choice", ["realformer", "lazyformer", "predictive", "synthesizer:kind=factorised_random"])
def test_half_precision_runs_backward(choice):
    """XLA:CPU has no kernel for some bfloat16 products that are transposed: none of them may be left."""
    layer = build(choice, 20, 16, 2)
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(2, 20, 2, 8))

    def both(q, k, v):
        def run(q, k, v):
            carry = layer.mix(q, k, v, causal=True)[1]
            return layer.mix(q, k, v, causal=True, carry=carry)[0]

        out, pull = jax.vjp(run, q, k, v)
        return out, pull(out)

    out, grads = jax.jit(both)(q, k, v)
    assert out.dtype == jnp.bfloat16 and all(jnp.isfinite(leaf).all() for leaf in (out, *grads))


# ---- contextual positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attend", "reference"])
@pytest.mark.parametrize("positions", [3, 64])
def test_cope_counts_gates_back_from_the_query(method, positions):
    """Pair after pair, as the paper has it: with packed documents and padding, whose keys count nothing."""
    B, T, N, H = 2, 13, 2, 4
    layer = build(f"cope:positions={positions}", T, N * H, N)
    table = np.random.default_rng(5).standard_normal((positions, H))
    layer.table[...] = jnp.asarray(table, jnp.float32)
    q, k, v = qkv(B, T, N, H)
    documents = np.array([[0] * 5 + [1] * 8, [0] * 13])
    valid = np.random.default_rng(6).random((B, T)) < 0.8
    out = np.zeros((B, T, N, H))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        asked, count, logits, values = np.asarray(q[b, t, n], np.float64) / math.sqrt(H), 0.0, [], []
        for s in range(t, -1, -1):
            if not valid[b, s] or documents[b, s] != documents[b, t]:
                continue
            score = asked @ np.asarray(k[b, s, n], np.float64)
            count += 1 / (1 + math.exp(-score))
            place = min(count, positions - 1)
            below, above = math.floor(place), math.ceil(place)
            vector = (above - place) * table[below] + (place - below) * table[above] if above > below else table[below]
            logits.append(score + asked @ vector)
            values.append(np.asarray(v[b, s, n], np.float64))
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[b, t, n] = weights @ np.array(values) / weights.sum()
    options = {"valid": jnp.asarray(valid), "documents": jnp.asarray(documents), "causal": True, "method": method}
    assert_close(jax.jit(lambda q, k, v: layer.mix(q, k, v, **options)[0])(q, k, v), out)


def test_cope_without_a_table_is_full_attention():
    q, k, v = qkv(1, 9, 2, 4)
    cope, full = build("cope", 9, 8, 2), build("full", 9, 8, 2)
    assert_close(cope.mix(q, k, v, causal=True)[0], full.mix(q, k, v, causal=True)[0])


@pytest.mark.parametrize(
    "choice, options, message",
    [("cope:positions=1", {}, "positions must be at least 2"), ("cope", {"causal": False}, "left to right")],
)
def test_cope_refuses_what_it_cannot_do(choice, options, message):
    with pytest.raises((UsageError, Refused), match=message):
        build(choice, 8, 8, 2).mix(*qkv(1, 8, 2, 4), **options)
