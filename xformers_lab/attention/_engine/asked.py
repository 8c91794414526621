"""What a kernel is asked: softmax attention of all heads over patterns of positions, told by shapes alone."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from xformers_lab.attention._engine.algebra import Pattern

# Of JAX's own, so that whatever it remembers of a traced function is of one way to run it.
_INTERPRETED = jax.make_user_context(False)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One call, by all that decides which kernels can run it.

    Args:
        platform: "cpu", "gpu" or "tpu", that the program is traced for.
        dtype: of queries, keys and values.
        B: Sequences.
        T, S: Queries, the last of so many positions, and keys.
        N, K: Query heads, and key heads, each shared by N / K of them.
        H, V: Sizes of a query's or key's head, and of a value's.
        patterns: One for all heads, or one for each of the N; causality is in them. A query t stands at S - T + t.
        valid: Whether some keys are padding, told when the program runs.
        documents: Whether a query sees keys of its own document alone, told when the program runs.
        bias: Whether something is added to scores.
        softcap: The size c of scores c tanh(s / c); None: they are as they are.
        interpret: Whether a Pallas kernel runs in Pallas' interpreter, wherever this is; see `interpreted`.
    """

    platform: str
    dtype: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int
    patterns: tuple[Pattern, ...]
    valid: bool = False
    documents: bool = False
    bias: bool = False
    softcap: float | None = None
    interpret: bool = False

    @property
    def pattern(self) -> Pattern | None:
        """That of all heads; None where they differ."""
        return self.patterns[0] if len(set(self.patterns)) == 1 else None


def interpreting() -> bool:
    """Whether kernels run in Pallas' interpreter."""
    return _INTERPRETED.value


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Meanwhile Pallas kernels that are asked for run in Pallas' interpreter, on whatever platform this is: it tells
    whether they are right, and takes long."""
    with _INTERPRETED(True):
        yield
