"""What all heads of a layer are run on, in one object."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Method = Literal["attend", "reference"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of all heads of a batch.

    Of one token in decoding, q, k, v and x have no axis of positions: (B, N, H), (B, K, H), (B, K, H) and (B, D).

    Args:
        q: Queries, the last T of S positions.
        k: Keys, each shared by N / K query heads.
        v: Values.
        x: The block's input that keys and values came from.
        x_q: The block's input that queries came from; None: the last T of x.
        valid: Keys that are no padding; None where nothing is padded.
        causal: Whether a query sees no key after itself.
        bias: Its leaves have a leading axis N; a head's slice is called with positions of queries and keys.
        carry: What the same mechanism in the layer below handed on; None: this is the first layer.
        key: A random key, in training alone.
        method: What is run of one head: the fast form, or the definition.
        documents: Of packed data the number of the document that each position is of, for queries see their own alone;
            None where nothing is packed.
        values: What heads shall add up in the place of what they make of v, by which attention maps read weights off;
            v is the same array then, where nothing else is made of it. Means are wanted as they are, without what
            stands behind them.
        decoding: Whether its queries are new tokens behind what a cache holds.
        pair_values: What is added to the value of each pair of positions, in all samples: its leaves have a leading
            axis N, and a head's slice is what `Position.pair_values` says; None where nothing is.
        marked: Which positions the task marks for mechanisms that treat some unlike the others, as global tokens are;
            None where nothing is marked, or nobody looks at it.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    x: Float[Array, "B S D"] | None = None
    x_q: Float[Array, "B T D"] | None = None
    valid: Bool[Array, "B S"] | None = None
    causal: bool = False
    bias: PyTree | None = None
    carry: PyTree | None = None
    key: Key[Array, ""] | None = None
    method: Method = "attend"
    documents: Int[Array, "B S"] | None = None
    values: Float[Array, "B S M H"] | None = None
    decoding: bool = False
    marked: Bool[Array, "B S"] | None = None
    pair_values: PyTree | None = None

    def replace(self, **changes: Any) -> "Call":
        return dataclasses.replace(self, **changes)

    @property
    def queries_input(self) -> Float[Array, "B T D"] | None:
        """The block's input that queries came from, where there is one."""
        if self.x_q is not None or self.x is None:
            return self.x_q
        return self.x[:, -self.q.shape[1] :]

    def as_row(self) -> "Call":
        """The call of one token with an axis of positions, T = 1."""
        x = None if self.x is None else self.x[:, None]
        return self.replace(q=self.q[:, None], k=self.k[:, None], v=self.v[:, None], x=x)


# Who is shown the calls of layers, see `watched`.
_WATCHING: contextvars.ContextVar[Callable[[Any, Call], None] | None] = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watched(watch: Callable[[Any, Call], None]) -> Iterator[None]:
    """Meanwhile watch(layer, call) is shown what each layer's heads are run on, in the order of the layers."""
    token = _WATCHING.set(watch)
    try:
        yield
    finally:
        _WATCHING.reset(token)


def watching() -> bool:
    """Whether somebody is shown the calls of layers. A loop over layers is then written out, for what is within a loop
    of a program cannot be taken out of it."""
    return _WATCHING.get() is not None


def shown(layer: Any, call: Call) -> Call:
    """The call, which whoever watches is shown."""
    if (watch := _WATCHING.get()) is not None:
        watch(layer, call)
    return call
