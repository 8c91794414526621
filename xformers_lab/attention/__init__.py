"""The shelf of attention mechanisms, and the contract each of them keeps.

A mechanism is one file with one class, a subclass of `Attention`, that says what one head of one sequence does:

    attend(q, k, v, *, valid, causal, bias=None)      (T, H) (S, H) (S, H) -> (T, H), the fast form
    reference(q, k, v, *, valid, causal, bias=None)   the same by definition, O(T S), obviously right
    cost(T, S)                                       declared matmul FLOPs, memory and state, checked against counts

The signature of `attend` is the declaration. One that cannot be causal has no `causal`; one that has no scores to bias
has no `bias`; one that draws random numbers takes `key`; one that needs the block's input takes `x` (S, D); one that
shares something with the same mechanism in the layer below takes `carry` and returns (out, carry), and defines
`init_carry(T, S)`. Whatever else it takes it names itself: `per_head()` gives arrays for each head (parameters, say),
`from_keys(x)` and `from_queries(x)` give arrays for each head of each position, computed from the block's input (gates,
step sizes). The lab adds heads, batch, grouped key/value heads, projections and devices, and refuses what a signature
cannot do.

Causal is aligned at the end: query t stands at position S - T + t. valid (S,) bool marks keys that are no padding (a
mechanism that writes `valid=None` gets None where nothing is padded); a query that may see no key gets zeros. bias,
where given, is called with broadcasting query and key positions, (T', 1) and (1, S').

A mechanism that is not per head, or adds auxiliary scalars, overrides `mix` on (B, T, N, H); one without these
projections overrides `__call__` on (B, T, D).

`narrow` says of one that runs a head as a batch of narrow rows that a CPU may run several heads together.

Decoding works by itself wherever a mechanism only depends on distances: keys and values are kept, and `attend` is
called with one query. `init_state` and `step` say it better for one head, `init_cache` and `mix_step` for a layer. What
is tied to places in the row of keys says in `begin` how it decodes behind places that are empty.

Before it first runs a placement may ask it to make its values smaller, `scale_init(share)`. The default scales the
weights of the layers `value` and `out`; a mechanism whose values pass through other weights overrides it.

Class attributes say what it is: `kind`, one of KINDS; `exact`, with `accuracy` where there is more to say; what it
costs, a `complexity`. What it cannot do stands in `refuses`, with the reason as a clause:

    refuses = {"causal": "its mean is over every position"}

The keys are causal; bidirectional, of what reads one way alone; cross, keys of another sequence than the queries; bias;
decoding. A subclass inherits them all. Where options decide, override `refusals()`, which begins with `refuses`. The
docstring is text to print: the catalogue shows it with these attributes, and nothing else is read from it but the help
of options. `xlab check` runs the mechanism to see whether its `refuses` is true.

How the lab runs it stands in _forward.py for whole sequences, in _decoding.py for one token more; _declared.py has the
class attributes, _refusals.py the sentences made of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from xformers_lab.attention._declared import KINDS, REFUSALS, Complexity
from xformers_lab.attention._decoding import Decoding, one_by_one, why_not_decode
from xformers_lab.attention._forward import GIVEN, ShiftedBias
from xformers_lab.attention._refusals import why_not, why_not_one_way

__all__ = [
    "GIVEN",
    "KINDS",
    "REFUSALS",
    "Attention",
    "Complexity",
    "Cost",
    "ShiftedBias",
    "one_by_one",
    "why_not",
    "why_not_decode",
    "why_not_one_way",
]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one head declares for T queries and S keys: matmul FLOPs of the forward pass, elements of the largest
    intermediate array, and elements of the state that decoding keeps."""

    flops: float
    memory: float
    state: float


class Attention(Decoding):
    """Projections around one mechanism; a subclass adds `attend`, `reference` and `cost`."""

    def cost(self, T: int, S: int) -> Cost:
        raise NotImplementedError(f"{type(self).__name__} must define cost(T, S)")

    def drawn(self, causal: bool, head: int = 0) -> Callable | None:
        """What `xlab show` draws of a head: a function of broadcasting integer arrays of query and key positions that
        gives booleans, made of what runs; None where no fixed pattern says what a query sees."""
        return None

    @staticmethod
    def limit(length: int) -> dict[str, Any] | None:
        """Options with which the mechanism is full softmax attention at this length, within `limit_error`; None where
        there are none. The conformance kit holds it to that."""
        return None

    # How far from full attention `limit` may be, relative to the largest output: 0 where only rounding is left.
    limit_error = 0.0
