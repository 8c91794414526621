"""Properties of what a mechanism may not see: the future where it is causal, padding, and other documents."""

import dataclasses
import functools

import numpy as np

from xformers_lab.check.subject import (
    GRADIENT,
    LENGTH,
    SHORT,
    VALUE,
    Broken,
    Case,
    NotApplicable,
    Subject,
    compare,
    compare_trees,
)

GARBAGE = 1e4
# Other positions may be summed in another order when a masked value changes; what leaks through a mask is far larger.
UNCHANGED = 1e-5


def no_future(subject: Subject) -> None:
    """Under causality the derivative of a query's output to every later key, value and query is exactly zero, and its
    value does not change when they do; with as many queries as keys, and with fewer."""
    subject.causal_only()
    for T in (LENGTH, SHORT):
        case = Case(T, LENGTH, True, biased=subject.takes_bias)
        if subject.refusal(case):
            continue
        inputs, before = subject.inputs(case), subject.result(case)
        for row in sorted({0, 1, T // 2, T - 2}):
            at = LENGTH - T + row
            if subject.gradients:
                _no_derivative_of_later(subject, case, inputs, row)
            changed = dict(inputs)
            for name in [name for name in ("k", "v", "x") if name in inputs]:
                changed[name] = np.concatenate([inputs[name][:, : at + 1], -3 * inputs[name][:, at + 1 :]], 1)
            _unchanged(subject.apply(case, changed).out, before.out, np.arange(T) <= row, f"later keys change ({case})")


def _no_derivative_of_later(subject: Subject, case: Case, inputs: dict, row: int) -> None:
    """Raises Broken where the output of a query has a derivative by what comes later."""
    at = LENGTH - case.T + row
    grads = subject.apply(case, inputs, cotangent=subject.cotangent(case, inputs, row)).grads["inputs"]
    for name in [name for name in ("k", "v", "x", "q") if name in grads]:
        after = row if name == "q" else at
        seen = np.abs(grads[name][:, after + 1 :]).max((0, *range(2, grads[name].ndim)))
        if seen.any():
            where = after + 1 + int(np.nonzero(seen)[0][0])
            short = case.T < LENGTH and name != "q"
            late = "the bias or the mask is not aligned at the end" if short else "an off-by-one?"
            raise Broken(
                f"query {row} (position {at}, {case}) depends on {name}[{where}], which comes later: "
                f"derivative {seen.max():.1e} instead of 0. Query t may see keys up to S - T + t ({late})"
            )


def no_padding(subject: Subject) -> None:
    """The derivative to padded keys and values is exactly zero, and what they hold, however large, changes nothing."""
    for causal in subject.modes:
        case = subject.square(causal)
        valid = np.asarray(subject.valid(case))
        # A padded position's own output may depend on itself.
        rows = valid if subject.own_input else np.ones(valid.shape, bool)
        inputs = subject.inputs(case)
        if subject.gradients:
            _no_derivative_of_padding(subject, case, inputs)
        noise = np.random.default_rng(2)
        filled = dict(inputs)
        for name in [name for name in ("k", "v", "x") if name in inputs]:
            shape = inputs[name].shape
            padded = ~valid.reshape(valid.shape + (1,) * (len(shape) - 2))
            garbage = GARBAGE * noise.standard_normal(shape).astype(np.float32)
            filled[name] = np.where(padded, garbage, inputs[name])
        before, after = subject.result(case).out, subject.apply(case, filled).out
        _unchanged(after, before, rows, f"padding holds values near {GARBAGE:g} ({case})")


def _no_derivative_of_padding(subject: Subject, case: Case, inputs: dict) -> None:
    """Raises Broken where the output has a derivative by what is padding."""
    valid, cotangent = np.asarray(subject.valid(case)), None
    if subject.own_input:
        kept = valid.reshape(valid.shape + (1,) * (1 if subject.whole else 2))
        cotangent = np.asarray(subject.cotangent(case, inputs)) * kept
    grads = subject.apply(case, inputs, cotangent=cotangent).grads["inputs"]
    for name in [name for name in ("k", "v", "x") if name in grads]:
        leak = np.abs(grads[name]).max(tuple(range(2, grads[name].ndim))) * ~valid
        if leak.any():
            sample, at = (int(index[0]) for index in np.nonzero(leak))
            raise Broken(
                f"the output depends on {name}[{at}] of sample {sample}, which is padding ({case}): derivative "
                f"{leak.max():.1e} instead of exactly 0. Mask scores by `valid` before the softmax"
            )


def nothing_to_see(subject: Subject) -> None:
    """Where a query may see no key the output is zero, and values and gradients are finite."""
    for causal in subject.modes:
        case = subject.square(causal)
        result, valid = subject.result(case), np.asarray(subject.valid(case))
        gradients = {f"the gradient of {name}": grad for name, grad in result.grads["inputs"].items() if name != "bias"}
        for name, leaf in ({"the output": result.out} | gradients).items():
            if not np.isfinite(leaf[-1]).all():
                raise Broken(
                    f"a sample that is all padding: {name} is not finite ({case}). A softmax over nothing is 0 / 0: "
                    "keep the masked score finite (-1e30) and the row's sum above 0, or select with jnp.where twice"
                )
        if subject.whole:
            continue
        sees_none = ~valid.any(1, keepdims=True)
        blind = ~np.logical_or.accumulate(valid, 1) if causal else np.broadcast_to(sees_none, valid.shape)
        size = np.abs(result.out).max((2, 3)) * blind
        if size.max() > 1e-6:
            sample, at = np.unravel_index(size.argmax(), size.shape)
            raise Broken(
                f"query {at} of sample {sample} may see no key ({case}), but its output is {size.max():.3g}, not 0. "
                "A softmax whose scores are all masked is uniform over the padding: give weights that are masked too"
            )


def documents_apart(subject: Subject) -> None:
    """Of packed data nothing of one document changes an output of another one in its row, or has a derivative there;
    attend gives what reference gives. What does not keep documents apart refuses them."""
    first = dataclasses.replace(subject.square(subject.modes[0]), packed=True)
    if reason := subject.refusal(first):
        if "documents" not in subject.mechanism.refusals():
            raise Broken(f"it refuses packed data ({reason}), which its refusals() do not have")
        raise NotApplicable(reason)
    for causal in subject.modes:
        case = dataclasses.replace(subject.square(causal), packed=True)
        inputs, documents = subject.inputs(case), subject.documents(case)
        assert documents is not None
        before = subject.result(case)
        for document in (0, 1):
            own = documents == document
            of_rows = lambda x, own=own: own.reshape(own.shape + (1,) * (x.ndim - 2))
            cotangent = np.asarray(subject.cotangent(case, inputs))
            grads = subject.apply(case, inputs, cotangent=cotangent * of_rows(cotangent)).grads["inputs"]
            others = dict(inputs)
            for name in [name for name in ("q", "k", "v", "x") if name in inputs]:
                leak = np.abs(grads[name]).max(tuple(range(2, grads[name].ndim))) * ~own
                if leak.any():
                    sample, at = (int(index[0]) for index in np.nonzero(leak))
                    raise Broken(
                        f"document {document} depends on {name}[{at}] of sample {sample}, which is of document "
                        f"{documents[sample, at]} ({case}): derivative {leak.max():.1e} instead of exactly 0. Mask "
                        "scores between different `documents` before the softmax"
                    )
                others[name] = np.where(of_rows(inputs[name]), inputs[name], -3 * inputs[name])
            after = subject.apply(case, others).out
            _unchanged(after, before.out, own, f"the other documents of its row change ({case})")
        if not subject.whole:
            slow, advice = subject.result(case, "reference"), "Look at what keeps documents apart in either form."
            slack = functools.cache(lambda case=case: subject.rounding(case))
            where = f"attend against reference ({case})"
            compare(before.out, slow.out, VALUE, where, advice, lambda slack=slack: slack().out)
            of_inputs = lambda slack=slack: slack().grads["inputs"]
            compare_trees(before.grads["inputs"], slow.grads["inputs"], GRADIENT, str(case), advice, of_inputs)


def marks_in_time(subject: Subject) -> None:
    """What looks at the positions that a task marks gives something else where others are marked, and causally nothing
    else in front of the first place where marks differ."""
    marks = subject.mechanism.marks
    if not marks:
        raise NotApplicable("it looks at no marks")
    other = Subject(subject.name, subject.make, length=subject.length, marks_seed=1, gradients=False)
    for causal in subject.modes:
        case = dataclasses.replace(subject.square(causal), padded=False)
        inputs = subject.inputs(case)
        before, after = (one.apply(case, inputs, gradients=False).out for one in (subject, other))
        marked = [subject.marked(marks, case.batch, case.S, seed) for seed in (0, 1)]
        if not np.abs(before - after).max() > UNCHANGED:
            raise Broken(f"it gives the same whatever is marked ({case}): look at `marked`, or say marks = 0")
        if causal:
            same = ~np.logical_or.accumulate(marked[0] != marked[1], 1)
            _unchanged(after, before, same, f"later positions are marked, not others ({case})")


def _unchanged(after, before, rows, when: str) -> None:
    """Raises Broken where the output of `rows` (positions, or (sample, position)) differs."""
    gap = np.abs(after - before).max(tuple(range(2, before.ndim)))
    gap = np.where(np.broadcast_to(rows, gap.shape), gap, 0.0)
    scale = max(1.0, float(np.abs(before).max()))
    bad = ~(gap <= UNCHANGED * scale)
    if bad.any():
        sample, at = (int(index[0]) for index in np.nonzero(bad))
        raise Broken(
            f"the output of query {at}, sample {sample} changes by {gap[sample, at]:.2g} when {when}, though its "
            "gradient is zero there: something is computed over all keys (a maximum, a mean, a sort) before the mask"
        )


PROPERTIES = [no_future, no_padding, nothing_to_see, documents_apart, marks_in_time]
