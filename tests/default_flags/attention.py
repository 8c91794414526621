"""A mechanism as users run it against its reference: values, and the gradients of all inputs and parameters.

The reference is compiled cheaply, so that one fault of the compiler cannot be in both.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from xformers_lab import spec
from xformers_lab.attention import Attention
from xformers_lab.check import values
from xformers_lab.check.subject import Case, NotApplicable, Result, Subject, compare, compare_trees
from xformers_lab.nn.size import Size

from .cheap import quick_jit
from .results import repeats, sound

# Two whole chunks, of most mechanisms; a prime; scores from where heads are looped over (loop_from of
# nn/plan.py), so many heads at once that their narrow rows are one kernel (FUSED there).
LENGTHS = (128, 37, 512)
# Above where causal keys come in parts (LONG) and queries in several blocks (ROWS); and so long that the rows of one
# head are one kernel, in several rounds (CPU_SCORES of _engine/block_sparse/chunks.py, ROWS of routing.py).
DEEP = (1088, 4160)
ADVICE = "If the kit's tests pass, which compile cheaply, look for what XLA makes of attend at default flags."


def cases(choice: str, lengths: tuple[int, ...]) -> Iterator[tuple[Subject, Case]]:
    """One for each length, causal and not in turn where the mechanism can be both."""
    first = _subject(choice, lengths[0])
    for number, length in enumerate(lengths):
        subject = first if number == 0 else _subject(choice, length)
        causal = first.modes[number % len(first.modes)]
        if length in DEEP:  # no bias: float32 holds the angles of the kit's only at shorter lengths
            yield subject, Case(length, length, causal, padded=False, batch=1)
        else:
            yield subject, Case(length, length, causal, biased=first.takes_bias)


def _subject(choice: str, length: int) -> Subject:
    def make(size: Size, small: bool) -> Attention:
        return spec.build("attention", choice, size)

    return Subject(choice, make, length=length, small=False, jit=_sound_jit)


def _sound_jit(function):
    """`quick_jit` of a reference: whatever the flags, calls of LAPACK may wait for each other."""

    def run(*arrays):
        program = quick_jit(function).lower(*arrays).compile()
        sound(program, "the reference")
        return program(*arrays)

    return run


def largest_difference(subject: Subject, case: Case, report: Callable[[str], None]) -> float:
    """The largest difference of attend from reference, relative to the largest value; raises Broken.

    Gradients must agree too, and a second run of the same program must repeat the first bit by bit.
    """
    run, arrays = _forward_backward(subject, case)
    report(f"compiling forward and backward ({case})")
    compiled = jax.jit(run).lower(*arrays).compile()
    sound(compiled, f"forward and backward ({case})")
    report(f"running forward and backward ({case})")
    first, second = compiled(*arrays), compiled(*arrays)
    repeats(first, second, f"forward and backward ({case})")
    fast, method = Result(*first), _compared_with(subject)
    report(f"running {method}, compiled cheaply ({case})")
    slow = subject.result(case, method)
    where, rounding = f"attend against {method} ({case})", lambda: subject.rounding(case, method=method)
    compare(fast.out, slow.out, values.VALUE, where, ADVICE, lambda: rounding().out)
    compare_trees(fast.grads, slow.grads, values.GRADIENT, where, ADVICE, lambda: rounding().grads)
    return float(np.abs(fast.out - slow.out).max() / max(np.abs(slow.out).max(), 0.1))


def _forward_backward(subject: Subject, case: Case):
    """-> (function, its arrays): output and gradients."""

    def run(params, inputs, valid, key, cotangent):
        attend = lambda params, inputs: subject.forward(params, inputs, valid, key, causal=case.causal, method="attend")
        out, pull = jax.vjp(attend, params, inputs)
        return out, dict(zip(("own", "inputs"), pull(cotangent.astype(out.dtype)), strict=True))

    inputs = subject.inputs(case)
    return run, (subject.own, inputs, subject.valid(case), jax.random.key(1), subject.cotangent(case, inputs))


def _compared_with(subject: Subject) -> str:
    """The method that defines what attend gives: attend itself, compiled otherwise, where there is no other."""
    try:
        values._has_reference(subject)
    except NotApplicable:
        return "attend"
    return "reference"
