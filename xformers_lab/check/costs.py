"""Properties of what a mechanism costs: decoding, its state, its declared FLOPs and memory against what is counted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Attention, why_not_decode
from xformers_lab.check.subject import EVEN, Broken, Case, NotApplicable, Subject, compare, heads_of, quick_jit
from xformers_lab.measure.exponent import fit
from xformers_lab.measure.flops import count_flops, largest_intermediate

LENGTHS = (512, 1024, 2048, 4096)
# How far an exponent may be off, and by which factor a declared number may miss the counted one.
EXPONENT, FACTOR, STATE_FACTOR = 0.1, 3.0, 1.1
STEP = 5e-5


def decoding(subject: Subject) -> None:
    """`init_cache` and `mix_step`, token by token, give the rows of the causal pass."""
    mechanism = _decodes(subject)
    case = Case(EVEN, EVEN, True, padded=False, batch=2, biased=subject.takes_bias)
    inputs = subject.inputs(case)
    tokens = {name: jnp.swapaxes(inputs[name], 0, 1) for name in ("q", "k", "v", "x") if name in inputs}

    def run(tokens, bias):
        def one(cache, new):
            q, k, v = (new[name] for name in "qkv")
            out, cache, _ = mechanism.mix_step(cache, q, k, v, x=new.get("x"), bias=bias)
            return cache, out

        return jnp.swapaxes(jax.lax.scan(one, mechanism.init_cache(2, subject.length), tokens)[1], 0, 1)

    with jax.default_matmul_precision("highest"):
        out = np.asarray(quick_jit(run)(tokens, inputs.get("bias")))
    advice = "The state before token t holds what attend sees of tokens 0 .. t-1; look at what a full window does."
    expected = subject.apply(case, inputs, training=False).out
    rows = np.abs(out - expected).max((0, 2, 3))
    first = int(np.argmax(rows > STEP * np.abs(expected).max()))
    compare(out, expected, STEP, f"step by step against the causal pass ({case}; first wrong token: {first})", advice)


def state_size(subject: Subject) -> None:
    """The elements of one head's cache are those that `cost` declares as state."""
    _decodes(subject)
    counted, declared = [], []
    for length, layer in _layers(subject):
        leaves = jax.tree.leaves(jax.eval_shape(lambda layer=layer, length=length: layer.init_cache(1, length)))
        counted.append(sum(leaf.size for leaf in leaves))
        declared.append(layer.cost(length, length).state)
    _agree(
        subject,
        "state",
        counted,
        declared,
        STATE_FACTOR,
        "cost(T, S).state is the number of elements that init_cache makes for one head",
    )


def flops(subject: Subject) -> None:
    """Declared matmul FLOPs of one head grow as those counted in the program, and are within a factor of three."""
    advice = "Count 2 M N K for a product of M x K by K x N, with the blocks that are computed in vain."
    counted, declared = [], []
    for T, layer in _layers(subject):
        forward, arrays = _head(subject, layer, T)
        counted.append(count_flops(forward, *arrays))
        declared.append(layer.cost(T, T).flops)
    _agree(subject, "flops", counted, declared, FACTOR, advice)


def memory(subject: Subject) -> None:
    """The largest array of the program, forward and backward, grows with length as declared."""
    counted, declared = [], []
    for T, layer in _layers(subject):
        forward, arrays = _head(subject, layer, T)

        def both(*arrays, forward=forward):
            out, pull = jax.vjp(forward, *arrays)
            return out, pull(out)

        counted.append(largest_intermediate(both, *arrays))
        declared.append(layer.cost(T, T).memory)
    advice = (
        "An array of T x S, a mask say, makes it quadratic even where it is never read twice; loop over blocks instead."
    )
    _agree(subject, "memory", counted, declared, None, advice)


def _decodes(subject: Subject) -> Attention:
    if subject.whole:
        raise NotApplicable("it overrides __call__ and decodes, if at all, through the model")
    if reason := why_not_decode(type(subject.mechanism)):
        raise NotApplicable(reason)
    subject.causal_only()
    return subject.mechanism


def _layers(subject: Subject) -> list[tuple[int, Attention]]:
    """One head of the mechanism, with its options as given, built for each length."""
    return [(T, subject.as_given.built(T, dim=16, heads=1, kv_heads=1)) for T in LENGTHS]


def _head(subject: Subject, layer: Attention, T: int) -> tuple[Callable, tuple]:
    """The forward pass of one head and shapes of its arrays; not causal where it can, as cost declares."""
    causal = subject.modes[-1]
    graph, variables = nnx.split(layer)
    merged = lambda: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))  # copies, which it may write to
    shape = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
    if subject.whole:
        return lambda x: merged()(x, causal=causal)[0], (shape,)
    heads = [jax.ShapeDtypeStruct((1, T, *heads_of(layer)[name]), jnp.float32) for name in "qkv"]
    x = (shape,) if subject.takes_x else ()

    def forward(q, k, v, *x):
        given = {"x": x[0]} if x else {}
        return merged().mix(q, k, v, causal=causal, key=jax.random.key(0), **given)[0]

    return forward, (*heads, *x)


def _agree(subject: Subject, what: str, counted, declared, factor: float | None, advice: str) -> None:
    if not any(counted) and not any(declared):
        raise NotApplicable(f"it has no {what}, and declares none")
    found, said = fit(LENGTHS, counted), fit(LENGTHS, declared)
    table = ", ".join(
        f"T={T}: {c:.3g} counted, {d:.3g} declared" for T, c, d in zip(LENGTHS, counted, declared, strict=True)
    )
    if abs(found - said) > EXPONENT:
        raise Broken(f"{what} grows as T^{found:.2f}, declared is T^{said:.2f} ({table}). {advice}")
    ratio = max(max(c / d, d / c) for c, d in zip(counted, declared, strict=True))
    if factor is not None and ratio > factor:
        raise Broken(f"{what} is off by a factor of {ratio:.2f}, at most {factor:g} is allowed ({table}). {advice}")


PROPERTIES = [decoding, state_size, flops, memory]
