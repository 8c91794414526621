"""Which kernel runs softmax attention over a pattern of positions: decided here, by the platform and by the call.

A kernel is a module with a name, `why_not` and `attend`, imported where it is asked: Pallas takes a tenth of a second.
What none of a platform's kernels can run, the block engine runs (block_sparse/), on every platform.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import jax

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.asked import Asked, interpreting
from xformers_lab.errors import Refused
from xformers_lab.nn.plan import AUTO, BLOCKS
from xformers_lab.nn.platform import platform


class Kernel(Protocol):
    """Attention of all heads of a batch by one kernel, with its gradients."""

    name: str

    def why_not(self, asked: Asked) -> str | None:
        """Why it cannot run a call, as a clause for the user; None where it can."""
        ...

    def attend(self, q, k, v, *, asked: Asked, valid=None, documents=None) -> jax.Array:
        """softmax(q k^T / sqrt(H)) v of q (B, T, N, H), k (B, S, K, H) and v (B, S, K, V), zeros for a query that sees
        no key; valid (B, S) bool and documents (B, S) int32, or None. -> (B, T, N, V) in v's type."""
        ...


# Names of a platform's, the one that runs a call if it can before those that are asked next; and their modules.
OF_PLATFORM: dict[str, tuple[str, ...]] = {"tpu": ("splash",), "gpu": ("cudnn", "pallas")}
MODULES = {"splash": "splash", "cudnn": "fused", "pallas": "pallas_gpu"}

# What ran since somebody listens, see `noted`.
_NOTED: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("noted", default=None)


def asked(
    q, k, v, patterns: Sequence[Pattern], *, valid=None, documents=None, bias=None, softcap: float | None = None
) -> Asked:
    """What a call with these arrays, or shapes, asks of a kernel."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    given = {"valid": valid is not None, "documents": documents is not None, "bias": bias is not None}
    return Asked(
        platform(), str(q.dtype), B, T, S, N, K, H, v.shape[-1], tuple(patterns), **given, softcap=softcap,
        interpret=interpreting(),
    )  # fmt: skip


def chosen(asked: Asked, wanted: str = AUTO) -> Kernel | None:
    """The kernel that runs a call, None for the block engine; whoever listens is told, see `noted`.

    wanted: the name of the one that is asked for, else `AUTO`: the first of the platform's that can.

    Raises:
        Refused: The one that is asked for cannot run the call.
    """
    if wanted not in (AUTO, BLOCKS):
        kernel = named(wanted)
        if reason := kernel.why_not(asked):
            raise Refused(f"kernel={wanted}: {reason}; leave it out, or use kernel={BLOCKS}")
        note(kernel.name)
        return kernel
    passed = []
    for name in OF_PLATFORM.get(asked.platform, ()) if wanted == AUTO else ():
        kernel = named(name)
        reason = kernel.why_not(asked)
        if reason is None:
            note(kernel.name, "; ".join(passed))
            return kernel
        passed.append(f"{kernel.name}: {reason}")
    note(BLOCKS, "; ".join(passed))
    return None


def named(name: str) -> Kernel:
    """The kernel of a name."""
    return cast(Kernel, importlib.import_module(f"{__package__}.{MODULES[name]}"))


def note(name: str, why: str = "") -> None:
    """Tells whoever listens what runs a call that is being traced, and why others do not."""
    ran = _NOTED.get()
    if ran is not None:
        ran[name] = why


@contextlib.contextmanager
def noted() -> Iterator[dict[str, str]]:
    """What runs the calls that are traced meanwhile: names of kernels, `BLOCKS` or "ring", each with the reasons of the
    platform's kernels that were asked before it and cannot."""
    ran: dict[str, str] = {}
    token = _NOTED.set(ran)
    try:
        yield ran
    finally:
        _NOTED.reset(token)


def joined(ran: Iterable[str]) -> str | None:
    """What ran in one word, splash or blocks+splash; None where no attention over a pattern ran."""
    return "+".join(sorted(ran)) or None
