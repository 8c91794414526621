"""The sentences that refuse what a mechanism declares it cannot do, or has no place for in its signature."""

from typing import Any

from xformers_lab.nn import documents

# Of documents, where a mechanism gives no reason of its own.
NO_MASK = "it mixes positions, and has no mask between documents"
# Of marked positions, to be told the mechanism's name.
UNMARKED = "{} looks at the positions that a task marks, and nobody says which these are: give `marked`, (B, S) bool"


def why_not(mechanism: Any, what: str) -> str:
    """Why a mechanism, or a class of them, cannot be causal, takes no bias, or cannot keep documents apart, with the
    reason that its `refuses` has.

    Args:
        mechanism: An `Attention`, or a subclass of it.
        what: "causal", "bias", "documents" or "pair_values".
    """
    kind = mechanism if isinstance(mechanism, type) else type(mechanism)
    name = kind.__name__.lower()
    if what == "bias":
        reason = kind.refuses.get("bias", "it has no scores to bias")
        rope = "" if kind is not mechanism and not mechanism.turns() else "rope, "
        return f"{name} takes no bias: {reason}; use position={rope}learned, sinusoidal or none"
    if what == "pair_values":
        return (
            f"{name} cannot add vectors of distances to values: it has no place for them where its weights are "
            "(its attend takes no `pair_values`); use this position without them, or attention=full or local"
        )
    if what == "documents":
        reason = (kind.refuses if kind is mechanism else mechanism.refusals()).get(what, NO_MASK)
        return documents.why_not(name, reason, "another attention")
    reason = kind.refuses.get("causal", "its attend takes no `causal`")
    return f"{name} cannot be causal: {reason}; use model=encoder or another attention"


def why_not_one_way(mechanism: type) -> str:
    """Why a recurrence is refused where both sides are seen."""
    name = mechanism.__name__.lower()
    return f"{name} reads from left to right alone, so it serves no encoder: use model=decoder or another attention"


def why_not_decode(mechanism: Any) -> str | None:
    """Why a mechanism, or a class of them, cannot decode token by token; None where it can. Of a mechanism its options
    count, too."""
    kind = mechanism if isinstance(mechanism, type) else type(mechanism)
    refuses, name = mechanism.refuses if mechanism is kind else mechanism.refusals(), kind.__name__.lower()
    if reason := refuses.get("decoding"):
        return f"{name} cannot decode: {reason}"
    if not kind.decodes:
        return f"{name} cannot decode: it has a layer of its own, and no decode(x, cache) for it"
    if kind.keeps_keys and (reason := kind.refuses.get("cross")):
        return f"{name} cannot decode: one query against many keys is refused, for {reason}"
    return None if kind.accepts("causal") else why_not(kind, "causal")
