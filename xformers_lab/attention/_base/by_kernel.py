"""Heads whose mechanism is softmax attention over patterns of positions: what runs a call of theirs."""

from collections.abc import Sequence

import jax

from xformers_lab.attention._base.call import Call
from xformers_lab.attention._base.one_head import OneHead
from xformers_lab.attention._engine import kernels, ring
from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.nn.plan import AUTO, plan_of


def by_kernel(
    mechanism: OneHead, call: Call, patterns: Sequence[Pattern], *, softcap: float | None = None
) -> jax.Array | None:
    """The means of a call's heads, (B, T, N, V), by the ring or by a kernel; None where the mechanism's own form is to
    run, by the block engine: by definition, in decoding, and where nothing else can.

    patterns: one for all heads, or one for each. softcap: see `Asked`.

    Raises:
        Refused: The plan wants a kernel that cannot run this call.
    """
    if call.method != "attend" or call.decoding:
        return None
    v, wanted = mechanism.summands(call), plan_of(mechanism.size).kernel
    masks = {"valid": call.valid, "documents": call.documents}
    # To a kernel what is added to values is no less foreign than what is added to scores.
    added = call.bias if call.pair_values is None else call.pair_values
    asked = kernels.asked(call.q, call.k, v, patterns, **masks, bias=added, softcap=softcap)
    rule = None if asked.pattern is None or softcap is not None else ring.rule_of(asked.pattern)
    if wanted == AUTO and rule is not None and call.pair_values is None and ring.fits(call.q, call.k):
        kernels.note("ring")
        return ring.attend(call.q, call.k, v, rule=rule, **masks, bias=call.bias)
    kernel = kernels.chosen(asked, wanted)
    return None if kernel is None else kernel.attend(call.q, call.k, v, asked=asked, **masks)
