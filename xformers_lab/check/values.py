"""Properties of what a mechanism computes: the signature it declares, its values, its gradients, its number types."""

import dataclasses
import functools
import inspect
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import KINDS, OFFERED, REFUSALS, Call, MultiHead, OneHead
from xformers_lab.attention.full import Full
from xformers_lab.check.subject import (
    GRADIENT,
    KEY_HEADS,
    LENGTH,
    LONG,
    SHORT,
    VALUE,
    Broken,
    Case,
    NotApplicable,
    Ramp,
    Subject,
    compare,
    compare_trees,
)
from xformers_lab.errors import Refused
from xformers_lab.measure import maps
from xformers_lab.nn.aux_results import Aux

# bfloat16 keeps 8 bits: a rounded result is off by up to 0.004, a sum kept in bfloat16 by more the longer it is.
HALF = 0.01
PAPER = re.compile(r"arXiv:? ?[\w./-]*\d{4}|\b(19|20)\d\d\b")


def signature(subject: Subject) -> None:
    """The docstring names a source, what it refuses it refuses, and attend and reference take the same arguments, which
    the lab can give."""
    kind = type(subject.mechanism)
    title = (kind.__doc__ or "").strip().split("\n\n")[0]
    if sys.flags.optimize < 2 and not PAPER.search(title):  # python -OO leaves no docstrings
        raise Broken(
            f'the first lines of {kind.__name__}\'s docstring name no paper: write "Title (Authors, year, arXiv id)"'
        )
    if kind.kind not in KINDS:
        raise Broken(f"the class needs a kind = ... that is one of: {', '.join(KINDS)}; it has {kind.kind!r}")
    for method in ("attend", "reference") if subject.per_head else ():
        if undefined(subject, method):
            raise Broken(f"{kind.__name__} must define {method}(q, k, v, *, valid, ...)")
    _refuses_what_it_says(subject)
    if not subject.per_head:
        return
    mechanism = subject.one_head
    arrays, tokens = mechanism.per_head(), subject.tokens()
    for name, leaf in ((name, leaf) for name, tree in arrays.items() for leaf in jax.tree.leaves(tree)):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != subject.mechanism.size.heads:
            heads = subject.mechanism.size.heads
            raise Broken(f'per_head()["{name}"] has shape {jnp.shape(leaf)}: its first axis must be the {heads} heads')
    for method in ("attend", "reference"):
        function = getattr(kind, method)
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        if names[:3] != ["q", "k", "v"]:
            raise Broken(f"{method} takes ({', '.join(names[:3])}, ...); its first arguments are q, k, v")
        for name in names[3:]:
            if name not in OFFERED and name not in arrays | tokens:
                known = ", ".join([*OFFERED, *arrays, *tokens])
                raise Broken(
                    f'{method} takes "{name}", which nobody gives: the lab gives {known}; '
                    "per_head(), from_keys(x) and from_queries(x) can name more"
                )
        if "valid" not in names:
            raise Broken(f"{method} takes no `valid`, so it cannot keep padding out")
    for name in mechanism.takes("finished") - {"mean", "args", "kwargs"}:
        if name not in arrays | tokens:
            raise Broken(f'finished takes "{name}", which neither per_head() nor from_queries(x) names')
    fast, slow = (mechanism.takes(method) for method in ("attend", "reference"))
    # What it does not take, one of the two may have from its base class all the same.
    apart = (fast ^ slow) - (set() if mechanism.accepts("pair_values") else {"pair_values"})
    if apart:
        raise Broken(f"attend and reference take different arguments: only one takes {', '.join(sorted(apart))}")
    if "carry" in fast:
        mechanism.init_carry(4, 4)


def undefined(subject: Subject, method: str) -> bool:
    """Whether the mechanism leaves out a method that its base class asks for."""
    return getattr(getattr(type(subject.mechanism), method), "required", False)


def _refuses_what_it_says(subject: Subject) -> None:
    """Raises Broken where what a mechanism declares it refuses is not what it refuses."""
    declared = subject.mechanism.refusals()
    for what, reason in declared.items():
        if what not in REFUSALS or not reason:
            raise Broken(f'it refuses "{what}": "{reason}"; give a reason for any of: {", ".join(REFUSALS)}')
    if ("causal" in declared) != (True not in subject.modes):
        raise Broken(
            "its refuses says why it is not causal, but it runs causally"
            if True in subject.modes
            else f'it refuses to be causal ({subject.refusals[True]}): say why, refuses = {{"causal": reason}}'
        )
    if ("bidirectional" in declared) != (False not in subject.modes):
        raise Broken(
            "its refuses says why it is not bidirectional, but it runs on both sides too"
            if False in subject.modes
            else f'it runs causally alone ({subject.refusals[False]}): say why, refuses = {{"bidirectional": reason}}'
        )
    tall = [Case(SHORT, LENGTH, subject.modes[0]), Case(LENGTH, SHORT, subject.modes[-1])]
    refused = next((reason for case in tall if (reason := subject.refusal(case))), None)
    if ("cross" in declared) != bool(refused):
        raise Broken(
            f'it refuses other numbers of queries than of keys ({refused}): say why, refuses = {{"cross": reason}}'
            if refused
            else "its refuses says why it is not cross, but it takes other numbers of queries than of keys"
        )
    if "bias" in declared and subject.takes_bias:
        raise Broken("its refuses says why it takes no bias, but it runs with one")


def _methods(subject: Subject) -> tuple[str, ...]:
    """Which of attend and reference a call can ask for."""
    kind = type(subject.mechanism)
    if subject.per_head:
        has = not undefined(subject, "reference")
    else:
        has = not subject.whole or "method" in inspect.signature(kind.__call__).parameters
    return ("attend", "reference") if has else ("attend",)


def _has_reference(subject: Subject) -> None:
    if "reference" not in _methods(subject):
        raise NotApplicable(
            "it defines no reference"
            if subject.per_head
            else 'it has a layer of its own without `method="attend"`, so there is no reference'
        )
    if not subject.whole and not subject.per_head and _program(subject, "attend") == _program(subject, "reference"):
        raise Broken(
            'its attend_heads does the same whatever call.method is: with "reference" it gives the same by definition'
        )


def _program(subject: Subject, method: str) -> str:
    case = subject.square(subject.modes[0])
    given = subject.own, subject.inputs(case), subject.valid(case), jax.random.key(0), subject.documents(case)
    with jax.default_matmul_precision("highest"):
        return str(subject.traced(case.causal, method).trace(*given).jaxpr)


def equals_reference(subject: Subject) -> None:
    """attend computes what reference defines, in value, on every kind of call."""
    _has_reference(subject)
    for case in subject.cases():
        fast, slow = subject.result(case), subject.result(case, "reference")
        where, advice = f"attend against reference ({case})", functools.partial(_likely, subject, case)
        compare(fast.out, slow.out, VALUE, where, advice, lambda case=case: subject.rounding(case).out)


def attention_map(subject: Subject) -> None:
    """The weights that an attention map shows are those of reference, and give, with `summed` and `finished`, what the
    layer gives."""
    if subject.whole:
        raise NotApplicable("it has a layer of its own, of whose values nothing is seen")
    if reason := subject.mechanism.refusals().get("map"):
        raise NotApplicable(reason)
    case = Case(SHORT, SHORT, subject.modes[0], batch=2, biased=subject.takes_bias)
    if subject.refusal(case):
        case = dataclasses.replace(subject.square(subject.modes[0]), batch=2)
    inputs, valid = subject.inputs(case), subject.valid(case)
    padded: Any = {name: x if name == "bias" else jnp.asarray(x[1:]) for name, x in inputs.items()}
    mechanism = subject.multi_head
    marked = jnp.asarray(subject.marked(mechanism.marks, 2, case.S)[:1]) if mechanism.marks else None
    call = Call(**padded, valid=None if valid is None else valid[1:], causal=case.causal, marked=marked)
    try:
        with jax.default_matmul_precision("highest"):
            fast = maps.of_call(mechanism, call)
    except Refused as reason:
        declares = type(mechanism).summed is not MultiHead.summed
        if declares or (isinstance(mechanism, OneHead) and type(mechanism).finished is not OneHead.finished):
            raise Broken(
                f"{reason}. finished(mean, ...) of the weighted mean of summed(v) has to be what attend_heads gives; "
                "attend itself gives the mean alone"
            ) from None
        raise NotApplicable(f'{reason}; it may say why, refuses = {{"map": reason}}') from None
    _has_reference(subject)
    with jax.default_matmul_precision("highest"):
        slow = maps.of_call(mechanism, call.replace(method="reference"))
    where, advice = f"weights of values ({case})", "Both forms must weigh values alike, whatever the values are."
    of_queries = lambda found: found.weights.transpose(1, 0, 2)[None]
    compare(of_queries(fast), of_queries(slow), VALUE, where, advice)


def full_in_the_limit(subject: Subject) -> None:
    """With the options that `limit` names, the mechanism is full softmax attention."""
    options = type(subject.mechanism).limit(subject.length)
    if options is None:
        raise NotApplicable("it has no limit in which it is full attention, or declares none: limit(length)")
    build: Any = type(subject.mechanism)
    make = lambda size, small: build(size, **options, rngs=nnx.Rngs(0))
    one = Subject(subject.name, make, length=subject.length, initial=True)
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    for causal in one.modes:
        case = one.square(causal)
        compare(
            one.apply(case, one.inputs(case), gradients=False).out,
            _full_attention(case),
            max(one.mechanism.limit_error, VALUE),
            f"with {words} against full attention ({case})",
            "limit(length) names options in which nothing is left out; limit_error says how near they come.",
        )


@functools.lru_cache(maxsize=8)
def _full_attention(case: Case):
    full = Subject("full", lambda size, small: Full(size, rngs=nnx.Rngs(0)), length=case.S)
    return full.apply(case, full.inputs(case), gradients=False).out


def same_gradients(subject: Subject) -> None:
    """The gradients of attend are those of reference: of q, k, v, the bias, x, and the mechanism's own parameters."""
    _has_reference(subject)
    advice = "The values agree or fail on their own: look at custom gradients, stop_gradient and checkpoint."
    for case in subject.cases():
        fast, slow = subject.result(case), subject.result(case, "reference")
        slack = functools.cache(lambda case=case: subject.rounding(case).grads)
        for part, tree in (("inputs", lambda x: x), ("own", _plain)):
            of_part = lambda part=part, tree=tree, slack=slack: tree(slack()[part])
            compare_trees(tree(fast.grads[part]), tree(slow.grads[part]), GRADIENT, str(case), advice, of_part)


def pair_values(subject: Subject) -> None:
    """What a position adds to the values of pairs is added by the weights of attend as by those of reference, in value
    and gradient, and by those alone: with one vector for all pairs, to every query that sees a key."""
    if subject.whole or not subject.mechanism.accepts("pair_values"):
        raise NotApplicable("it has no place for what a position adds to the values of pairs")
    _has_reference(subject)
    heads, causal = subject.mechanism.size.heads, subject.modes[0]
    vectors = np.random.default_rng(11).standard_normal((heads, 2, subject.mechanism.size.head)).astype(np.float32)
    for case in (subject.square(causal), Case(SHORT, LENGTH, subject.modes[-1])):
        if subject.refusal(case):
            continue
        inputs = subject.inputs(case) | {"pair_values": Ramp(jnp.asarray(vectors))}
        fast, slow = (subject.apply(case, inputs, method=method) for method in ("attend", "reference"))
        advice = "`pair_values` is called with the weights that add up values, and with the positions of their pairs."
        slack = functools.cache(lambda case=case, inputs=inputs: subject.rounding(case, inputs))
        of_inputs = lambda slack=slack: slack().grads["inputs"]
        where = f"with pair_values, attend against reference ({case})"
        compare(fast.out, slow.out, VALUE, where, advice, lambda slack=slack: slack().out)
        compare_trees(fast.grads["inputs"], slow.grads["inputs"], GRADIENT, where, advice, of_inputs)
        still = inputs | {"pair_values": Ramp(jnp.asarray(vectors * np.array([1, 0], np.float32)[:, None]))}
        with_all, plain = subject.apply(case, still).out, subject.result(case).out
        behind = subject.per_head and type(subject.one_head).finished is not OneHead.finished
        if not behind:
            added = np.abs(plain).max(-1, keepdims=True) > 0  # of a query that sees no key nothing is added
            where = f"one vector for all pairs ({case})"
            compare(with_all, plain + added * vectors[None, None, :, 0], VALUE, where, advice)


def several_blocks(subject: Subject) -> None:
    """The same with the options as they were asked for, at a length of several blocks."""
    _has_reference(subject)
    long = subject.as_given
    case = Case(LONG, LONG, long.modes[0], batch=2)
    fast, slow = long.result(case), long.result(case, "reference")
    where, slack = f"attend against reference ({case})", functools.cache(lambda: long.rounding(case))
    compare(fast.out, slow.out, VALUE, where, functools.partial(_likely, long, case), lambda: slack().out)
    advice, of_inputs = "Look at where two blocks meet.", lambda: slack().grads["inputs"]
    compare_trees(fast.grads["inputs"], slow.grads["inputs"], GRADIENT, str(case), advice, of_inputs)


def shortest(subject: Subject) -> None:
    """A sequence of one position, in a model built for one: attend gives what reference gives, all of it finite."""
    _has_reference(subject)
    one = Subject(subject.name, subject.make, length=1)
    case = Case(1, 1, one.modes[0], biased=one.takes_bias)
    fast, slow = one.result(case), one.result(case, "reference")
    advice = "Look at divisions by T - 1, at blocks larger than the sequence, at sizes that are made of the length."
    slack = functools.cache(lambda: one.rounding(case))
    compare(fast.out, slow.out, VALUE, f"attend against reference ({case})", advice, lambda: slack().out)
    of_inputs = lambda: slack().grads["inputs"]
    compare_trees(fast.grads["inputs"], slow.grads["inputs"], GRADIENT, str(case), advice, of_inputs)


def end_aligned(subject: Subject) -> None:
    """The last t queries alone, against all keys, give the last t rows of the pass, for query t stands at S - T + t;
    queries in front of the first key change nothing behind them, and causally see nothing."""
    for causal in subject.modes:
        case = subject.square(causal)
        tail = Case(SHORT, case.S, causal, biased=case.biased)
        if reason := subject.refusal(tail):
            raise NotApplicable(reason)
        inputs = subject.inputs(case)
        inputs["q"] = inputs["x" if subject.whole else "q"][:, -SHORT:]
        expected = subject.result(case).out[:, -SHORT:]
        advice = (
            "With fewer queries than keys, query t stands at position S - T + t, for causality, windows and bias alike."
        )
        out = subject.apply(tail, inputs, gradients=False).out
        compare(out, expected, VALUE, f"the last {SHORT} queries alone ({tail})", advice)
    case = subject.square(subject.modes[0])
    tall = dataclasses.replace(case, T=case.S + SHORT)
    if subject.refusal(tall):
        return
    inputs, more = subject.inputs(case), subject.inputs(tall)
    queries = {"q": inputs["x" if subject.whole else "q"]} | ({"x_q": inputs["x"]} if "x_q" in more else {})
    inputs |= {name: np.concatenate([more[name][:, :SHORT], last], 1) for name, last in queries.items()}
    out = subject.apply(tall, inputs, gradients=False).out
    advice = "With more queries than keys, the first T - S queries stand before the first key."
    compare(out[:, SHORT:], subject.result(case).out, VALUE, f"{SHORT} queries more, in front ({tall})", advice)
    if case.causal and not subject.whole and np.abs(out[:, :SHORT]).max() > 1e-6:
        raise Broken(f"queries that stand before the first key see something ({tall}), but must give 0. {advice}")


def grouped_query(subject: Subject) -> None:
    """K key/value heads shared by N query heads give what N repeated key/value heads give."""
    if subject.whole:
        raise NotApplicable("it overrides __call__ and makes its own heads")
    case = subject.square(subject.modes[0])
    inputs = subject.inputs(case)
    times = subject.mechanism.size.heads // KEY_HEADS
    inputs |= {name: np.repeat(inputs[name], times, 2) for name in ("k", "v")}
    advice = "Query head n uses key/value head n // (N / K)."
    expected = subject.apply(case, inputs, gradients=False).out
    compare(
        subject.result(case).out, expected, VALUE, f"{KEY_HEADS} key/value heads against repeated ones ({case})", advice
    )


def heads_apart(subject: Subject) -> None:
    """Heads mapped by a loop and in a batch give the same."""
    if not subject.per_head:
        raise NotApplicable("it maps its heads itself")
    case = subject.square(subject.modes[0])
    together, apart = subject.result(case), subject.result(case, loop=True)
    advice = "attend must be a pure function of one head: no global state, no look at other heads or samples."
    compare(apart.out, together.out, VALUE, f"heads in a loop against heads in a batch ({case})", advice)
    compare_trees(apart.grads["inputs"], together.grads["inputs"], GRADIENT, str(case), advice)


def samples_apart(subject: Subject) -> None:
    """Outside training, the other sequences of a batch change nothing."""
    if subject.per_head:
        raise NotApplicable("the lab maps it over samples, so it sees one at a time")
    case = Case(SHORT, SHORT, subject.modes[0])
    case = subject.square(subject.modes[0]) if subject.refusal(case) else case
    inputs = subject.inputs(case)
    others = {name: x if name == "bias" else np.concatenate([x[:1], -3 * x[1:]]) for name, x in inputs.items()}
    first, second = (subject.apply(case, each, training=False, gradients=False).out[:1] for each in (inputs, others))
    advice = "Statistics of a batch belong into an nnx.Variable, updated in training alone."
    compare(second, first, VALUE, f"sample 0 when the other samples change ({case})", advice)


def auxiliary(subject: Subject) -> None:
    """Auxiliary scalars: attend gives those that reference gives, finite with their gradients, and padding has none."""
    case = subject.square(subject.modes[0])
    inputs, valid, key = subject.inputs(case), subject.valid(case), jax.random.key(1)

    def scalars(own, inputs, valid, method):
        layer = subject.layer(own, subject.rest)
        aux = subject.call(layer, inputs, valid, key, causal=case.causal, method=method)[1]
        if not isinstance(aux, Aux):
            raise Broken(f"beside its output it returns a {type(aux).__name__}, not an Aux (see aux_results.py)")
        return aux.metrics()

    def run(own, inputs, valid, method):
        values, pull = jax.vjp(lambda own, inputs: scalars(own, inputs, valid, method), own, inputs)
        return values, dict(zip(("own", "inputs"), pull(jax.tree.map(jnp.ones_like, values)), strict=True))

    shapes = jax.eval_shape(lambda own, inputs: scalars(own, inputs, valid, "attend"), subject.own, inputs)
    if not shapes:
        raise NotApplicable("it gives no auxiliary scalars")
    if wrong := {name: leaf.shape for name, leaf in shapes.items() if leaf.shape}:
        raise Broken(f"auxiliary values are scalars; these have shapes: {wrong}")
    compiled = jax.jit(run, static_argnames="method")
    with jax.default_matmul_precision("highest"):
        fast, grads = jax.tree.map(np.asarray, compiled(subject.own, inputs, valid, method="attend"))
    for path, leaf in jax.tree_util.tree_leaves_with_path({"value": fast, "gradient": grads}):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=" ")
            raise Broken(f"an auxiliary scalar is not finite where a sample is all padding ({case}): {name}")
    for name in [name for name in ("q", "k", "v", "x") if name in inputs]:
        leak = np.abs(grads["inputs"][name]).max(tuple(range(2, inputs[name].ndim))) * ~np.asarray(valid)
        if leak.any():
            raise Broken(
                f"auxiliary scalars depend on {name} at positions that are padding ({case}): derivative "
                f"{leak.max():.1e} instead of exactly 0. Take means over what `valid` marks"
            )
    if "reference" not in _methods(subject):
        return
    with jax.default_matmul_precision("highest"):
        slow, expected = jax.tree.map(np.asarray, compiled(subject.own, inputs, valid, method="reference"))
    if fast.keys() != slow.keys():
        raise Broken(f"attend gives the scalars {sorted(fast)}, reference {sorted(slow)}: they must be the same")
    advice = "An auxiliary loss trains the model like any other: both forms must give the same."
    for name in fast:
        compare(fast[name][None], slow[name][None], VALUE, f'the scalar "{name}" ({case})', advice)
    for part in ("inputs", "own"):
        compare_trees(_plain(grads[part]), _plain(expected[part]), GRADIENT, f"auxiliary scalars ({case})", advice)


def jit_equals_eager(subject: Subject) -> None:
    """Compiled and op by op, the output is the same."""
    case = Case(SHORT, SHORT, subject.modes[0])
    if reason := subject.refusal(case):
        raise NotApplicable(reason)
    inputs, valid, key = jax.tree.map(jnp.asarray, subject.inputs(case)), subject.valid(case), jax.random.key(1)
    with jax.default_matmul_precision("highest"):
        eager = subject.forward(subject.own, inputs, valid, key, causal=case.causal, method="attend")
    advice = "Something depends on being traced: numpy on values, Python state, an `if` on an array."
    compiled = subject.apply(case, inputs, gradients=False).out
    compare(compiled, np.asarray(eager), VALUE, f"jit against eager ({case})", advice)


def no_retrace(subject: Subject) -> None:
    """A second step with other values compiles nothing: a call leaves attributes and the types of variables alone."""
    case, traces = subject.square(subject.modes[0]), []

    @jax.jit
    def step(own, rest, inputs, valid, key):
        traces.append(None)
        layer = subject.layer(own, rest)
        out = subject.call(layer, inputs, valid, key, causal=case.causal)
        after, own, rest = nnx.split(layer, nnx.Param, ...)
        if after != subject.graph:
            raise Broken(
                "a call changes the mechanism's attributes: what changes belongs into an nnx.Variable made in __init__"
            )
        return out, own, rest

    own, rest = subject.own, subject.rest
    for seed in range(3):
        inputs, key = subject.inputs(case, seed), jax.random.key(seed)
        _, own, rest = jax.eval_shape(step, own, rest, inputs, subject.valid(case), key)
    if len(traces) > 1:
        advice = "a call changes the type or shape of its variables (an int that becomes a float, say)"
        raise Broken(f"{len(traces)} compilations in 3 steps with other values: {advice}")


def bfloat16(subject: Subject) -> None:
    """In bfloat16 the output is bfloat16, near the float32 one, and finite with its gradients for large scores too."""
    case = Case(subject.length, subject.length, subject.modes[0])
    inputs = subject.inputs(case)
    inputs |= {name: inputs[name] + 2 for name in inputs if name == "v"}  # off zero, so that sums grow
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    result = subject.apply(case, half)
    if result.dtype != jnp.bfloat16:
        raise Broken(
            f"bfloat16 inputs give {result.dtype}: end with .astype(v.dtype), or a model in bfloat16 is not one"
        )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    advice = "Keep scores, sums and normalisers in float32 (preferred_element_type=jnp.float32)."
    late = slice(case.T // 2, None)
    expected = subject.apply(case, wide, gradients=False).out[:, late]
    where, slack = (
        f"bfloat16 against float32, later half ({case})",
        lambda: subject.rounding(case, wide, 1 / 4096, "attend"),
    )
    compare(result.out[:, late], expected, HALF, where, advice, lambda: slack().out[:, late])
    large = {name: x * 30 if name in ("q", "k", "x") else x for name, x in half.items()}
    result = subject.apply(case, large)
    for path, leaf in jax.tree_util.tree_leaves_with_path({"the output": result.out, "gradients": result.grads}):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=" ")
            raise Broken(
                f"q and k times 30 in bfloat16 ({case}): {name} is not finite. Subtract the row's maximum before exp."
            )


def carried(subject: Subject) -> None:
    """Through three scanned layers that pass their carry on, attend gives what reference gives in value and gradient,
    and the last layer depends on no later position and no padding by way of the carry."""
    if subject.whole or not subject.mechanism.carries():
        raise NotApplicable("it carries nothing from layer to layer")
    case = Case(subject.length, subject.length, subject.modes[0])
    fast, carry, fast_grads = _through_layers(subject, case, "attend")
    slow, expected, slow_grads = _through_layers(subject, case, "reference")
    advice = (
        "init_carry must be what the first layer may take, and attend must return the carry that reference returns."
    )
    for layer in range(3):
        compare(fast[layer], slow[layer], 10 * VALUE, f"layer {layer + 1} of 3 ({case})", advice)
    for one, other in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        compare(one, other, 10 * VALUE, f"the carry after 3 layers ({case})", advice)
    valid = np.asarray(subject.valid(case))
    wanted = np.cos(np.arange(fast[-1].size)).reshape(fast[-1].shape) * valid[..., None, None]
    grads = fast_grads(wanted)
    compare_trees(grads, slow_grads(wanted), 10 * GRADIENT, f"through the carry ({case})", advice)
    _carries_nothing_of("padding", grads, ~valid, case)
    for row in (1, case.T // 2) if case.causal else ():
        only = np.zeros_like(wanted)
        only[:, row] = 1
        _carries_nothing_of(f"what comes after query {row}", fast_grads(only), np.arange(case.S) > row, case)


def _through_layers(subject: Subject, case: Case, method: str):
    """Every output of three layers, (3, B, T, N, H), the carry behind them, and a function that gives the gradients of
    the inputs from that of the last output."""
    mechanism, valid = subject.multi_head, subject.valid(case)
    inputs = jax.tree.map(jnp.asarray, subject.inputs(case))

    def layers(inputs):
        options = {"valid": valid, "causal": case.causal, "x": inputs.get("x"), "method": method}
        options["key"] = jax.random.key(0)

        def layer(state, turn):
            q, carry = state
            out, carry, _ = mechanism.mix(q, inputs["k"] * turn, inputs["v"], carry=carry, **options)
            return (q + out, carry), out

        first = mechanism.initial_carry(case.batch, case.T, case.S)
        (_, carry), out = jax.lax.scan(layer, (inputs["q"], first), jnp.asarray([1.0, -0.7, 1.3]))
        return out, carry

    backward = jax.jit(jax.grad(lambda inputs, wanted: (layers(inputs)[0][-1] * wanted).sum()))
    grads = lambda wanted: jax.tree.map(np.asarray, backward(inputs, jnp.asarray(wanted, jnp.float32)))
    return *jax.tree.map(np.asarray, jax.jit(layers)(inputs)), grads


def _carries_nothing_of(what: str, grads: dict, positions, case: Case) -> None:
    """Raises Broken where gradients of keys, values or inputs are not 0 at positions, (S,) or (B, S) bool."""
    for name in [name for name in ("k", "v", "x") if name in grads]:
        leak = np.abs(grads[name] * positions.reshape(*positions.shape, *[1] * (grads[name].ndim - 2))).max()
        if leak:
            raise Broken(
                f"after three layers the output depends on {name} of {what} ({case}), by way of the carry: "
                f"derivative {leak:.1e} instead of exactly 0"
            )


def many_shapes(subject: Subject) -> None:
    """Values and gradients over many more lengths, models built for each of them; part of `--deep` alone."""
    _has_reference(subject)
    for length in (1, 2, 3, 5, 8, 16, 17, 31, 36, 65, 128, 129):
        one = Subject(subject.name, subject.make, length=length)
        for T in sorted({1, -(-length // 3), length, length + 3}):
            for causal in one.modes:
                case = Case(T, length, causal, biased=one.takes_bias)
                if one.refusal(case):
                    continue
                fast, slow = one.result(case), one.result(case, "reference")
                rounding = functools.cache(functools.partial(one.rounding, case))
                likely = functools.partial(_likely, one, case)
                where = f"attend against reference ({case})"
                compare(fast.out, slow.out, VALUE, where, likely, lambda rounding=rounding: rounding().out)
                slack = lambda rounding=rounding: rounding().grads["inputs"]
                compare_trees(fast.grads["inputs"], slow.grads["inputs"], GRADIENT, str(case), "", slack)


def _likely(subject: Subject, case: Case) -> str:
    """The usual mistake behind a difference on this kind of call, found by trying easier ones."""
    easier = Case(case.T, case.S, case.causal, padded=False, batch=1)
    try:
        compare(subject.result(easier).out, subject.result(easier, "reference").out, VALUE, "", "")
    except Broken:
        return "It differs without padding and bias too: look at the mask, the scale, and what no block divides."
    return "It agrees without padding and bias: look at `valid` and `bias`."


def _plain(own) -> dict:
    return nnx.to_pure_dict(own) if isinstance(own, nnx.State) else own


PROPERTIES = [
    signature,
    equals_reference,
    same_gradients,
    pair_values,
    attention_map,
    full_in_the_limit,
    several_blocks,
    shortest,
    end_aligned,
    grouped_query,
    heads_apart,
    samples_apart,
    auxiliary,
    jit_equals_eager,
    no_retrace,
    bfloat16,
    carried,
]
DEEP = [many_shapes]
