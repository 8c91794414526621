"""cuDNN's fused attention, where an NVIDIA GPU has it and the call is one it computes rightly."""

import jax
import jax.numpy as jnp

from xformers_lab.nn.platform import elsewhere

IMPLEMENTATION = "cudnn"
LARGEST_HEAD = 128  # every architecture cuDNN supports takes this; Hopper takes 256


def fits(q, k, valid, documents, bias) -> bool:
    """Whether cuDNN can run q (B, T, N, H) against k (B, S, K, H): half precision, one document, no padding, no bias,
    T = S.

    Its causal mask is aligned at the start, ours at the end, so T must equal S. A mask of padding or of documents would
    have to be materialised as (T, S), and its bias gradients only work for one batch, so those calls stay with the
    block engine.
    """
    plain = valid is None and documents is None and bias is None
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    head = q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD
    return plain and half and head and q.shape[1] == k.shape[1] and _nvidia()


def attend(q, k, v, *, causal: bool, window: int | None = None):
    """Fused softmax attention on (B, T, N, H); a window always comes with causality.

    Without `is_causal`, cuDNN's path of `local_window_size=(w, 0)` silently sees the future (jax issue 39576).
    """
    if window is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=IMPLEMENTATION)
    assert causal
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window, 0), implementation=IMPLEMENTATION
    )


def _nvidia() -> bool:
    if elsewhere():  # whose library is not here to be asked whether it takes a call
        return False
    device = jax.devices()[0]
    return device.platform == "gpu" and "nvidia" in device.device_kind.lower()
