"""The shelf of attention mechanisms, and the contract each of them keeps.

A mechanism is one file with one class. Its base class says what it computes:

    OneHead      one head of one sequence: `attend` and `reference`; the laboratory maps heads and samples
    Stepwise     the same, and `step`, one token more, where decoding keeps no keys and values
    Recurrent    a recurrence with a state of constant size
    Patterned    softmax attention over a pattern of positions, and a pattern is all it adds
    Projected    full attention whose queries, keys and values are projected in a way of their own
    MultiHead    all heads of a layer at once: `attend_heads`
    Attention    a layer of any kind: `__call__`

Of one head:

    attend(q, k, v, *, valid, causal, bias=None)      (T, H) (S, H) (S, H) -> (T, H), the fast form
    reference(q, k, v, *, valid, causal, bias=None)   the same by definition, O(T S), obviously right
    cost(T, S)                                       declared matmul FLOPs, memory and state, checked against counts

The signature of `attend` is the declaration. One that cannot be causal has no `causal`; one that has no scores to bias
has no `bias`; one that keeps the documents of packed data apart takes `documents` (S,); one that treats positions that
a task marks unlike the others takes `marked` (S,) bool, and its `marks` says how many at most (it does not run without
them, and in its refusals it says that it does not decode); one that can add to its means what a position says of pairs
takes `pair_values` (called with weights (T', S') and their positions; None where there is nothing to add); one that
draws random numbers takes `key`; one that needs the block's input takes `x` (S, D); one that hands something to the
same mechanism in the layer above takes `carry` and returns (out, carry), and defines `init_carry(T, S)`. Whatever else
it takes it names itself: `per_head()` gives arrays for each head (parameters, say), `from_keys(x)` and
`from_queries(x)` give arrays for each head of each position, computed from the block's input (gates, step sizes).
Projections, heads, grouped keys and values, batches, positions and devices are the laboratory's; what a signature has
no place for it refuses.

What stands around the mean of values stands apart from `attend`, so that attention maps can show its weights:
`finished(mean, ...)` is what a norm or a gate makes of the means of all heads (B, T, N, H), and takes by name what
`per_head` and `from_queries` name; `summed(v)` is what is made of each value first.

Causal is aligned at the end: query t stands at position S - T + t. valid (S,) bool marks keys that are no padding (a
mechanism that writes `valid=None` gets None where nothing is padded); a query that may see no key gets zeros. bias is
called with broadcasting positions of queries and keys, (T', 1) and (1, S'). documents (S,) int32, or None where nothing
is packed, numbers the documents of a row: a query sees keys of its own alone, and nothing else of it may depend on the
others. A class with an `attend_heads` or a `__call__` of its own says `documents_apart = True` where it sees to that.

Decoding works by itself wherever a mechanism only depends on distances: keys and values are kept, and `attend` is
called with one query. What is tied to places in the row of keys says in `begin` how it decodes behind places that are
empty.

Class attributes say what a mechanism is: `kind`, one of KINDS; `exact`, with `accuracy` where there is more to say; its
cost in words, a `complexity`. What it cannot do stands in `refuses`, with the reason as a clause:

    refuses = {"causal": "its mean is over every position"}

The keys are causal; bidirectional, of what reads one way alone; cross, keys of another sequence than the queries; bias;
decoding; documents, of what could be packed; map, of what gives no mean of values by weights that all channels share.
Where options decide, override `refusals()`, which begins with `refuses`.
The docstring is text to print: the catalogue shows it with these attributes, and nothing else is read from it but the
help of options. `xlab check` runs the mechanism to see whether its `refuses` is true.
"""

from xformers_lab.attention._base.attention import KINDS, REFUSALS, Attention, Complexity, Cost
from xformers_lab.attention._base.cache import ShiftedBias, one_by_one
from xformers_lab.attention._base.call import Call
from xformers_lab.attention._base.multi_head import MultiHead
from xformers_lab.attention._base.one_head import OFFERED, KeepsKeys, OneHead, Stepwise
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._base.projected import Projected
from xformers_lab.attention._base.recurrent import Recurrent
from xformers_lab.attention._base.refusals import why_not, why_not_decode, why_not_one_way

__all__ = [
    "KINDS",
    "OFFERED",
    "REFUSALS",
    "Attention",
    "Call",
    "Complexity",
    "Cost",
    "KeepsKeys",
    "MultiHead",
    "OneHead",
    "Patterned",
    "Projected",
    "Recurrent",
    "ShiftedBias",
    "Stepwise",
    "one_by_one",
    "why_not",
    "why_not_decode",
    "why_not_one_way",
]
