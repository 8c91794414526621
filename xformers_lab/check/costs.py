"""Properties of what a mechanism costs: decoding, its state, its declared FLOPs and memory against what is counted."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Attention, Call, MultiHead, why_not_decode
from xformers_lab.check import masks
from xformers_lab.check.subject import EVEN, Broken, Case, NotApplicable, Subject, compare, heads_of
from xformers_lab.errors import Refused
from xformers_lab.measure.exponent import fit
from xformers_lab.measure.flops import count_flops, largest_intermediate

LENGTHS = (512, 1024, 2048, 4096)
# How far an exponent may be off, and by which factor a declared number may miss the counted one.
EXPONENT, FACTOR, STATE_FACTOR = 0.1, 1.5, 1.1
STEP = 5e-5
KEEPS_A_STATE = "The state before token t holds what attend sees of tokens 0 .. t-1; look at what a full window does."
KEEPS_KEYS = (
    "Decoding keeps every key and value, newest last, and calls attend with the newest queries behind places that are "
    "still empty (not `valid`), so that only distances stay what they were. What depends on absolute positions or on "
    "the number of keys needs a recurrence of its own (Recurrent, or Stepwise with init_state and step), or declares "
    'that it cannot decode: refuses = {"decoding": "it depends on absolute positions"}.'
)

AT_ONCE = "The state before the first of them counts, and behind the last nothing is left out: look at both ends."
# Where a text is cut that is read in parts: nowhere, and where no block of an engine ends.
PARTS = ((), (5,))


def decoding(subject: Subject) -> None:
    """`init_cache`, `decode_heads_several` of the first tokens at once, and `decode_heads` of the others, one by one,
    give the rows of the causal pass; tokens read at once leave what they leave one by one; a cache that goes back
    behind some of them is that of the others; and so it is of a whole layer that shifts what it projects."""
    mechanism = _decodes(subject)
    case, inputs, whole, known = _whole_pass(subject)
    tokens, first = {name: inputs[name] for name in ("q", "k", "v", "x") if name in inputs}, subject.length // 3

    def run(tokens, bias):
        begun, rest = (
            {name: rows[:, part] for name, rows in tokens.items()} for part in (slice(first), slice(first, None))
        )

        def one(cache, new):
            out, cache, _ = mechanism.decode_heads(cache, Call(**new, bias=bias))
            return cache, out

        cache = mechanism.init_cache(case.batch, subject.length)
        out, cache = mechanism.decode_heads_several(cache, Call(**begun, bias=bias))
        later = jax.lax.scan(one, cache, {name: jnp.swapaxes(rows, 0, 1) for name, rows in rest.items()})[1]
        return jnp.concatenate([out, jnp.swapaxes(later, 0, 1)], 1)

    with jax.default_matmul_precision("highest"):
        out = np.asarray(jax.jit(run)(tokens, inputs.get("bias")))
    expected, out = whole * known, out * known
    rows = np.abs(out - expected).max((0, 2, 3))
    wrong = int(np.argmax(rows > STEP * np.abs(expected).max()))
    steps = f"{first} tokens at once, then step by step"
    where = f"{steps}, against the causal pass ({case}; first wrong token: {wrong})"
    compare(out, expected, STEP, where, lambda: _likely(subject, mechanism))
    _read_alike(subject)
    _goes_back(subject)
    _reads_before(subject)


def _reads_before(subject: Subject) -> None:
    """Raises Broken unless a layer whose projections read the position before, too, says by `decode_several` of some
    tokens and `decode` of the others what it says of the whole; or where it is told of padding, or of what is later."""
    layer = _decodes(subject)
    if layer.token_shift is None:
        return
    B, T, first, D = 2, 12, 5, layer.size.dim
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)

    def steps(x):
        cache = {"own": layer.init_cache(B, T), "tails": layer.tails(B)}
        begun, cache = layer.decode_several(x[:, :first], cache, at=jnp.int32(0))
        outs = [begun]
        for at in range(first, T):
            y, cache, _ = layer.decode(x[:, at], cache, at=jnp.int32(at))
            outs.append(y[:, None])
        return jnp.concatenate(outs, 1)

    whole = jax.jit(lambda x, valid: layer(x, valid=valid, causal=True)[0])
    valid = jnp.ones((B, T), bool).at[:, 7].set(False)
    garbage, late = x.at[:, 7].set(masks.GARBAGE), x.at[:, first:].set(masks.GARBAGE)
    with jax.default_matmul_precision("highest"):
        expected, out = whole(x, jnp.ones((B, T), bool)), jax.jit(steps)(x)
        padded, other = whole(x, valid)[:, 8:], whole(garbage, valid)[:, 8:]
        early = whole(late, jnp.ones((B, T), bool))[:, :first]
    compare_all = (
        (out, expected, "tokens read one by one, against the whole layer", AT_ONCE),
        (other, padded, "the layer where padding holds other inputs", "A position before that is padding is zeros."),
        (early, expected[:, :first], "the layer where later inputs are others", "Look at the position before alone."),
    )
    for one, two, where, advice in compare_all:
        compare(np.asarray(one), np.asarray(two), STEP, where, advice)


def _read_alike(subject: Subject) -> None:
    """Raises Broken unless `decode_heads_several` of all tokens at once, or of some and then the others, gives what
    `decode_heads` of one after the other gives, and leaves the same cache behind."""
    mechanism = _decodes(subject)
    case, inputs, _, known = _whole_pass(subject)
    tokens, bias = {name: inputs[name] for name in ("q", "k", "v", "x") if name in inputs}, inputs.get("bias")

    def one_by_one(tokens, bias):
        def one(cache, new):
            out, cache, _ = mechanism.decode_heads(cache, Call(**new, bias=bias))
            return cache, out

        in_turn = {name: jnp.swapaxes(rows, 0, 1) for name, rows in tokens.items()}
        cache, out = jax.lax.scan(one, mechanism.init_cache(case.batch, subject.length), in_turn)
        return jnp.swapaxes(out, 0, 1), cache

    def in_parts(ends, tokens, bias):
        cache, outs = mechanism.init_cache(case.batch, subject.length), []
        for start, end in zip((0, *ends), (*ends, None), strict=True):
            part = {name: rows[:, start:end] for name, rows in tokens.items()}
            out, cache = mechanism.decode_heads_several(cache, Call(**part, bias=bias))
            outs.append(out)
        return jnp.concatenate(outs, 1), cache

    run = lambda tokens, bias: (one_by_one(tokens, bias), *(in_parts(ends, tokens, bias) for ends in PARTS))
    with jax.default_matmul_precision("highest"):
        (out, cache), *others = jax.tree.map(np.asarray, jax.jit(run)(tokens, bias))
    for ends, (other, left) in zip(PARTS, others, strict=True):
        parts = f"up to {ends[0]}, then the others" if ends else "all"
        where = f"tokens read at once, {parts}, against one by one ({case})"
        compare(other * known, out * known, STEP, where, AT_ONCE)
        for (path, expected), leaf in zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(left), strict=True):
            name = jax.tree_util.keystr(path)
            leaf, expected = np.asarray(leaf, np.float32), np.asarray(expected, np.float32)
            compare(leaf, expected, STEP, f"{name or 'the state'} of the cache behind {where}", AT_ONCE)


def _goes_back(subject: Subject) -> None:
    """Raises Broken where `rewound`, which may refuse, gives another cache than one that read no more tokens."""
    mechanism = _decodes(subject)
    case, inputs, _, _ = _whole_pass(subject)
    tokens = {name: inputs[name] for name in ("q", "k", "v", "x") if name in inputs}
    first, read, taken = subject.length // 3, 4, 2

    def run(tokens, bias):
        def behind(cache, start: int, count: int):
            part = {name: rows[:, start : start + count] for name, rows in tokens.items()}
            return mechanism.decode_heads_several(cache, Call(**part, bias=bias))[1]

        before = behind(mechanism.init_cache(case.batch, subject.length), 0, first)
        after = behind(before, first, read)
        return behind(before, first, taken), mechanism.rewound(before, after, jnp.int32(taken), read=read)

    try:
        with jax.default_matmul_precision("highest"):
            expected, back = jax.jit(run)(tokens, inputs.get("bias"))
    except Refused:
        return
    for (path, one), other in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(back), strict=True):
        where = f"{jax.tree_util.keystr(path)} of the cache that went back to {taken} of {read} tokens ({case})"
        advice = "Say in `rewound` how what you keep goes back, or refuse it there."
        compare(np.asarray(other, np.float32), np.asarray(one, np.float32), STEP, where, advice)


def _likely(subject: Subject, mechanism: MultiHead) -> str:
    """The usual mistake behind a wrong token, by what decoding keeps."""
    try:
        masks.no_future(subject)
    except Broken:
        return "The whole pass sees the future (no_future), which decoding cannot: mend that first."
    return KEEPS_KEYS if mechanism.keeps_keys else KEEPS_A_STATE


def state_size(subject: Subject) -> None:
    """The elements of one head's cache are those that `cost` declares as state."""
    _decodes(subject)
    counted, declared = [], []
    for length, layer in _layers(subject):
        merged, variables = _merged(layer)
        first = lambda variables, merged=merged, length=length: merged(variables).init_cache(1, length)
        counted.append(sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(first, variables))))
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
    """Declared matmul FLOPs of one head grow as those counted in the program, and are within half of them."""
    advice = "Count 2 M N K for a product of M x K by K x N, with the blocks that are computed in vain."
    counted, declared = [], []
    for T, layer in _layers(subject):
        forward, arrays = _head(subject, layer, T)
        counted.append(count_flops(forward, *arrays))
        declared.append(layer.cost(T, T).flops)
    _agree(subject, "flops", counted, declared, FACTOR, advice)


def memory(subject: Subject) -> None:
    """The largest array of the program, forward and backward, grows with length as declared, to within half of it."""
    counted, declared = [], []
    for T, layer in _layers(subject):
        forward, arrays = _head(subject, layer, T)

        def both(variables, *arrays, forward=forward):
            out, pull = jax.vjp(functools.partial(forward, variables), *arrays)
            return out, pull(out)

        counted.append(largest_intermediate(both, *arrays))
        declared.append(layer.cost(T, T).memory)
    advice = (
        "An array of T x S, a mask say, makes it quadratic even where it is never read twice; loop over blocks instead."
    )
    _agree(subject, "memory", counted, declared, FACTOR, advice)


def _decodes(subject: Subject) -> MultiHead:
    if subject.whole:
        raise NotApplicable("it has a layer of its own and decodes, if at all, through the model")
    if reason := why_not_decode(subject.mechanism):
        raise NotApplicable(reason)
    subject.causal_only()
    return subject.multi_head


def _whole_pass(subject: Subject) -> tuple[Case, dict, np.ndarray, np.ndarray]:
    """A causal case without padding, its inputs, the output of its whole pass, and (B, T, 1, 1) where to compare it.

    What draws no random numbers is the same in training, so that the square case, compiled already, will do: its first
    sample has no padding, and its second has it at the end alone, in front of which nothing is padded.
    """
    if subject.per_head and not subject.mechanism.accepts("key"):
        case = subject.square(True)
        inputs = {name: x if name == "bias" else x[:2] for name, x in subject.inputs(case).items()}
        known = np.asarray(subject.valid(case))[:2, :, None, None]
        return dataclasses.replace(case, padded=False, batch=2), inputs, subject.result(case).out[:2], known
    case = Case(EVEN, EVEN, True, padded=False, batch=2, biased=subject.takes_bias)
    inputs = subject.inputs(case)
    whole = subject.apply(case, inputs, training=False, gradients=False).out
    return case, inputs, whole, np.ones((2, EVEN, 1, 1), bool)


@functools.lru_cache(maxsize=1)
def _layers(subject: Subject) -> list[tuple[int, Attention]]:
    """One head of the mechanism, with its options as given, for each length; abstract, for shapes are all it tells."""
    subject = subject.as_given
    return [(T, nnx.eval_shape(lambda T=T: subject.built(T, dim=16, heads=1, kv_heads=1))) for T in LENGTHS]


def _merged(layer: Attention) -> tuple[Callable, nnx.State]:
    """A function of a layer's variables that gives the layer, with copies of them, which it may write to; and them."""
    graph, variables = nnx.split(layer)
    return lambda variables: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables)), variables


def _head(subject: Subject, layer: Attention, T: int) -> tuple[Callable, tuple]:
    """The forward pass of one head, a function of its variables and arrays, and shapes of them; not causal where it
    can, as cost declares."""
    causal = subject.modes[-1]
    merged, variables = _merged(layer)
    shape = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
    if subject.whole:
        return lambda variables, x: merged(variables)(x, causal=causal)[0], (variables, shape)
    zeros = lambda layer: [jnp.zeros((1, T, *heads_of(layer)[name])) for name in "qkv"]
    heads = jax.eval_shape(lambda variables: zeros(merged(variables)), variables)
    x = (shape,) if subject.takes_x else ()

    def forward(variables, q, k, v, *x):
        inputs = {"x": x[0]} if x else {}
        layer = merged(variables)
        inputs |= {"marked": jnp.asarray(subject.marked(layer.marks, 1, T))} if layer.marks else {}
        return layer.mix(q, k, v, causal=causal, **inputs)[0]

    return forward, (variables, *heads, *x)


def _agree(subject: Subject, what: str, counted, declared, factor: float, advice: str) -> None:
    if not any(counted) and not any(declared):
        raise NotApplicable(f"it has no {what}, and declares none")
    measured, declares = fit(LENGTHS, counted), fit(LENGTHS, declared)
    table = ", ".join(
        f"T={T}: {c:.3g} counted, {d:.3g} declared" for T, c, d in zip(LENGTHS, counted, declared, strict=True)
    )
    if abs(measured - declares) > EXPONENT:
        raise Broken(f"{what} grows as T^{measured:.2f}, declared is T^{declares:.2f} ({table}). {advice}")
    ratio = max(max(c / d, d / c) for c, d in zip(counted, declared, strict=True))
    if ratio > factor:
        raise Broken(f"{what} is off by a factor of {ratio:.2f}, at most {factor:g} is allowed ({table}). {advice}")


PROPERTIES = [decoding, state_size, flops, memory]
