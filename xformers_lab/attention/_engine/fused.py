"""cuDNN's fused attention, where an NVIDIA GPU has it and the call is one it computes rightly."""

import jax

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.asked import Asked
from xformers_lab.attention._engine.pattern import by_distance
from xformers_lab.nn.platform import nvidia

IMPLEMENTATION = "cudnn"
name: str = IMPLEMENTATION
LARGEST_HEAD = 128  # every architecture cuDNN supports takes this; Hopper takes 256


def why_not(asked: Asked) -> str | None:
    """Why cuDNN cannot run a call: it takes half precision, one document, no padding, no bias, T = S.

    Its causal mask is aligned at the start, ours at the end, so T must equal S. A mask of padding or of documents would
    have to be materialised as (T, S), and its bias gradients only work for one batch, so those calls go elsewhere.
    """
    reasons = (
        (f"it is for NVIDIA GPUs, and this is a {asked.platform}", asked.platform != "gpu"),
        ("it takes the full pattern, or a causal one with or without a window", not _known(asked.pattern)),
        ("it takes half precision, dtype=bfloat16", asked.dtype not in ("bfloat16", "float16")),
        ("it takes no padding here", asked.valid),
        ("it takes no documents here", asked.documents),
        ("it takes no bias here", asked.bias),
        ("it caps no scores", asked.softcap is not None),
        (f"it takes heads of a multiple of 8, up to {LARGEST_HEAD}", not _head(asked.H) or asked.V != asked.H),
        ("it takes as many queries as keys", asked.T != asked.S),
        ("this process has no NVIDIA GPU whose library could be asked", not nvidia()),
    )
    return next((reason for reason, holds in reasons if holds), None)


def attend(q, k, v, *, asked: Asked, valid=None, documents=None):
    """Fused softmax attention on (B, T, N, H); a window always comes with causality.

    Without `is_causal`, cuDNN's path of `local_window_size=(w, 0)` silently sees the future (jax issue 39576).
    """
    assert asked.pattern is not None and valid is None and documents is None
    causal, window = by_distance(asked.pattern) or (False, None)
    reach = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, local_window_size=reach, implementation=IMPLEMENTATION
    )


def _known(pattern: Pattern | None) -> bool:
    reach = None if pattern is None else by_distance(pattern)
    return reach is not None and (reach[0] or reach[1] is None)


def _head(size: int) -> bool:
    return size % 8 == 0 and size <= LARGEST_HEAD
