"""Attention of any kind: what a mechanism says of itself, and what the laboratory asks of every one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.cache import one_by_one
from xformers_lab.attention._base.prepared import FirstValues, HeadNorms, LogLength, ValueMix
from xformers_lab.attention._base.refusals import NO_MASK, why_not, why_not_decode
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.plan import AUTO, BLOCKS, plan_of
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size

# The families of the survey (Lin et al., 2021, section 4) and what came since.
Kind = Literal[
    "full",
    "sparse by position",
    "sparse by content",
    "linearised",
    "memory compression",
    "low rank",
    "prior",
    "multi-head",
    "without attention",
]
KINDS: tuple[str, ...] = get_args(Kind)

# What a mechanism may refuse, and how its page says so.
REFUSALS = {
    "causal": "Not causal",
    "bidirectional": "One way",
    "cross": "Not cross",
    "bias": "No bias",
    "decoding": "No decoding",
    "documents": "Not packed",
    "map": "No attention map",
}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What one head costs as length grows, in words that its page prints; `cost(T, S)` has the numbers.

    time and memory are O(...), and the notes say more of them (", half of it where ..."); decoding is what it keeps.
    """

    time: str
    memory: str
    decoding: str = ""
    time_note: str = ""
    memory_note: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one head declares for T queries and S keys.

    Args:
        flops: Matmul FLOPs of the forward pass.
        memory: Elements of the largest intermediate array.
        state: Elements of the state that decoding keeps.
    """

    flops: float
    memory: float
    state: float


class Attention(nnx.Module):
    """A layer that mixes positions, (B, T, D) -> (B, T, D). What it is and can do stands in attributes of the class,
    which a subclass inherits like any other."""

    kind: ClassVar[Kind | None] = None

    # Whether it computes what its formula says; None: it does not say. `accuracy` goes on where the page says "Exact"
    # or "Approximate": "on its pattern", or "; with a landmark for every position it is full attention".
    exact: ClassVar[bool | None] = None
    accuracy: ClassVar[str] = ""

    complexity: ClassVar[Complexity | None] = None

    # What it cannot do, a key of REFUSALS, and why, as a clause: {"causal": "its mean is over every position"}.
    refuses: ClassVar[Mapping[str, str]] = {}

    # Whether queries, keys and values come from its layers `query`, `key` and `value`, so that keys and values may be
    # projected apart from queries, once, or be handed in.
    projects: ClassVar[bool] = False

    # Whether there is a form for one token more, with a cache.
    decodes: ClassVar[bool] = False

    # Whether a layer looks from no document of packed data into another one: what a class that defines `__call__` or
    # `attend_heads` says of these, and no class inherits that replaces them. Of OneHead the signature says the rest.
    documents_apart: ClassVar[bool] = False

    # Whether heads add what a position says to the values of pairs: said as `documents_apart` is. Of OneHead the
    # signature says the rest.
    adds_pair_values: ClassVar[bool] = False

    # How many positions of a row, at most, it treats unlike the others where a task marks them; 0: it looks at none.
    # One that looks at some is given `marked`, and refuses to run without it. Options may decide.
    marks: int = 0

    # The first layer's values, mixed into its own, where `prepare` was asked for it.
    first_values: FirstValues | None = None

    # How far from full attention `limit` may be, relative to the largest output: 0 where only rounding is left.
    limit_error: ClassVar[float] = 0.0

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if {"__call__", "attend_heads"} & vars(cls).keys():
            cls.documents_apart = vars(cls).get("documents_apart", False)
            cls.adds_pair_values = vars(cls).get("adds_pair_values", False)
        if hasattr(cls, "attend") and not hasattr(cls, "attend_heads"):
            raise TypeError(f"{cls.__name__} defines attend, for one head: its base class is OneHead, not Attention")

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size = size

    @required
    def __call__(
        self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None, documents=None
    ):
        """(B, T, D) and optional keys' source (B, S, D) -> (B, T, D), the carry for the layer above, an `Aux`.

        Args:
            valid: (B, S) bool, or None where nothing is padded.
            causal: Whether a position sees none after itself.
            position: It gives `rotate(x, at)` and `share`, and `bias()` or what makes a bias of every sample.
            carry: What the layer below handed on, where the mechanism hands something on.
            key: A random key, in training alone.
            documents: (B, S) int32, of packed data the document that each position is of; None where nothing is
                packed. Only a layer whose documents are apart is given it.

        A layer with `marks` takes `marked` besides, (B, S) bool: which positions the task marks.

        Raises:
            Refused: The mechanism cannot do what is asked.
        """

    def prepare(
        self,
        *,
        conv: int | None = None,
        qk_norm: HeadNorms = "none",
        log_n: LogLength = None,
        value_residual: ValueMix = "none",
        causal: bool = False,
    ) -> None:
        """Has a layer that was just built treat queries, keys and values between its projections and its mechanism.

        Args:
            conv: Convolve each along `conv` positions, causally or on both sides.
            qk_norm: Normalise the queries and keys of every head.
            log_n: Multiply scores by the logarithm of the number of keys, over that of this number, or as learned.
            value_residual: Mix the first layer's values into this one's, which its carry has then beside its own.

        Raises:
            Refused: It has nothing of the kind.
        """
        name = type(self).__name__.lower()
        if log_n is not None and not self.accepts("bias"):
            reason = self.refuses.get("bias", "it has no score for each pair of a query and a key")
            raise Refused(f"log_n={log_n} has no scores to scale: attention={name}, {reason}; leave out log_n")
        asked = {"conv": conv, "qk_norm": qk_norm, "log_n": log_n, "value_residual": value_residual}
        asked = {key: None if value == "none" else value for key, value in asked.items()}
        wanted = next((f"{key}={value}" for key, value in asked.items() if value is not None), None)
        if wanted is None:
            return
        what = "values" if wanted.startswith("value") else "queries or keys of heads"
        what = "queries, keys or values" if conv is not None else what
        reason = f"projects {what} in a way of its own" if self.turns() else f"makes no {what}"
        raise Refused(f"attention={name} {reason}: leave out {wanted}, or use another attention")

    def tails(self, B: int, dtype=jnp.float32) -> Any:
        """What decoding keeps of B sequences beside `init_cache`, for what `prepare` was asked for; None without
        that."""
        return None

    def init_cache(self, B: int, length: int, dtype=jnp.float32) -> Any:
        """What decoding remembers of up to `length` tokens of B sequences; raises Refused where it cannot decode."""
        raise Refused(why_not_decode(self) or "")

    def decode(self, x, cache, *, at, position=None, carry=None) -> Any:
        """One more token, x (B, D) at position `at` () -> (B, D), the new cache, the carry; raises Refused where it
        cannot decode."""
        raise Refused(why_not_decode(self) or "")

    def decode_several(self, x, cache, *, at, position=None) -> Any:
        """`decode` of T tokens, x (B, T, D) at positions from `at` () on -> (B, T, D) and the new cache; of mechanisms
        that carry nothing."""
        one = lambda cache, x, at: self.decode(x, cache, at=at, position=position)[:2]
        return one_by_one(one, x, cache, at)

    def rewound(self, before, after, taken, *, read: int) -> Any:
        """The cache behind the first `taken` () of the `read` tokens that made `after` of `before`, 1 <= taken <= read;
        raises Refused where what it keeps cannot go back."""
        raise Refused(
            f"attention={type(self).__name__.lower()} keeps what cannot go back behind tokens that were not accepted; "
            "use attention that keeps every key, such as full or local"
        )

    @required
    def cost(self, T: int, S: int) -> Cost:
        """What one head costs, forward and not causal."""
        ...

    def of_length(self) -> Mapping[str, int | float]:
        """What of the length it is built for decides what it computes, by name, where no attribute of its own has it:
        so the lab can say that it is another function at another length. Nothing, by default."""
        return {}

    def refusals(self) -> Mapping[str, str]:
        """What a mechanism with these options refuses, and why: `refuses`, unless a subclass adds what options decide.

        Returns:
            Reasons by key of REFUSALS; what is not there it can do.
        """
        apart = {} if type(self).accepts("documents") else {"documents": NO_MASK}
        return apart | dict(type(self).refuses)

    def check_documents(self, documents) -> None:
        """Raises Refused where there are documents, and the mechanism does not keep them apart."""
        if documents is not None and "documents" in self.refusals():
            raise Refused(why_not(self, "documents"))

    @classmethod
    def accepts(cls, what: str) -> bool:
        """Whether it has a place for "causal", "bias", "carry", "key", "documents" or "pair_values" and does not refuse
        it."""
        says = {"documents": cls.documents_apart, "pair_values": cls.adds_pair_values}
        return what not in cls.refuses and says.get(what, True)

    @classmethod
    def carries(cls) -> bool:
        """Whether layers hand something on to the layer above."""
        return False

    def turns(self) -> bool:
        """Whether there are queries or keys for a position to turn or compare."""
        return False

    def check_position(self, position) -> None:
        """Raises Refused where a position would tell this mechanism nothing, or adds what it has no place for."""
        if not self.turns() and (position.turns or position.key_terms is not None):
            raise Refused(
                f"{type(self).__name__.lower()} makes neither queries nor keys, which this position would turn or "
                "compare; use position=learned, sinusoidal or none"
            )
        if position.adds_to_values and not self.accepts("pair_values"):
            raise Refused(why_not(self, "pair_values"))

    def scale_init(self, share: float) -> None:
        """Multiplies by `share` the first weights that values pass, `value` and `out`, and none of scores. A placement
        may ask for it before the mechanism first runs; one whose values pass other weights overrides it."""
        scale_init(share, *(getattr(self, name) for name in ("value", "out") if hasattr(self, name)))

    def why_no_kernel(self) -> str | None:
        """Why no kernel of an accelerator runs it, as a clause; None where one may, see `_engine/kernels.py`."""
        return "it is no softmax attention over a pattern of positions"

    def check_kernel(self) -> None:
        """Raises Refused where its plan wants a kernel that cannot run it, whatever it is called with."""
        wanted, reason = plan_of(self.size).kernel, self.why_no_kernel()
        if reason is not None and wanted not in (AUTO, BLOCKS):
            name = type(self).__name__.lower()
            raise Refused(f"kernel={wanted} cannot run attention={name}: {reason}; leave out kernel={wanted}")

    def drawn(self, causal: bool, head: int = 0) -> Callable | None:
        """What `xlab show` draws of a head: a function of broadcasting integer arrays of query and key positions that
        gives booleans, made of what runs; None where no fixed pattern says what a query sees."""
        return None

    @staticmethod
    def limit(length: int) -> dict[str, Any] | None:
        """Options with which the mechanism is full softmax attention at this length, within `limit_error`; None where
        there are none. The conformance kit holds it to that."""
        return None
