"""The shelf of feed-forward sub-layers: what one position computes. One file = one class, a subclass of `Ffn`, or a
function that returns None where the block has no such sub-layer.

One that looks at the tokens themselves writes `tokens` into the signature of its `__call__`, and gets them, (B, T)
int32. One that looks at tokens before its own says `looks_back = True`, and how decoding goes on, `init_cache` and
`step`; with `documents` in the signature of its `__call__` it is told where those of packed data begin. It begins anew
wherever a depth or a memory reads a text by segments.

One whose last step is a linear layer `down` on its hidden layer runs it as `self.last(hidden, valid=valid, key=key)`: a
placement may have put a normaliser in front of it. One of many networks keeps their matrices as `Bank`s, so that
layout=experts can share them out over the devices, and lets `_experts.run_experts` run them there.

A placement may also want smaller first weights, `scale_init(share)`. All matrices of a sub-layer become so; one that
holds others, a router or queries and keys, says which of them do.
"""

import functools
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.cache import one_by_one
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.layer_context import LayerContext, apply
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size

Activation = Literal["relu", "relu2", "gelu", "gelu_exact", "silu", "sigmoid", "identity"]
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,  # So et al., 2021, arXiv 2109.08668
    "gelu": jax.nn.gelu,  # by a hyperbolic tangent, as GPT-2 has it
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),  # x Phi(x) (Hendrycks and Gimpel, 2016)
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


class Bank(nnx.Param):
    """One matrix of each of E networks, (E, in, out) in a layer. In a stack of layers E is the third axis from the end
    as well, and that is what layout=experts shares out, of the optimizer's moments too."""


class Ffn(nnx.Module):
    """A feed-forward sub-layer. down: its last linear layer, if it has one. documents_apart: whether what it makes of a
    token depends on no other document of the row; no subclass inherits it, each says so itself. looks_back: whether it
    depends on tokens before, of which decoding then keeps a state."""

    down: Any
    documents_apart: bool = False
    looks_back: bool = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.documents_apart = vars(cls).get("documents_apart", False)

    @required
    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """x (B, T, D), valid (B, T) bool or None where nothing is padded -> (B, T, D) and an `Aux`. key: None in
        evaluation."""
        ...

    def last(self, hidden: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """`down` on the hidden layer (B, T, F), with the `valid` and `key` that the sub-layer was called with."""
        return apply(self.down, hidden, LayerContext(valid, key is not None))

    def scale_init(self, share: float) -> None:
        """Multiplies by `share` the first weights that the output grows with, and none that it is chosen by."""
        scale_init(share, self)

    def takes(self, name: str) -> bool:
        """Whether `__call__` names `tokens`, or `documents` (B, T), which it is given of packed data."""
        return name in inspect.signature(type(self).__call__).parameters

    def not_causal(self) -> str | None:
        """Why a token's output depends on later tokens; None where it does not."""
        return None

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def init_cache(self, B: int, dtype: Any = jnp.float32) -> Any:
        """What one that looks back remembers of the tokens before the first of B sequences, leaves (B, ...)."""
        return {}

    def step(self, x: jax.Array, cache: Any, **tokens: jax.Array) -> tuple[jax.Array, Any]:
        """One token more, x (B, D) -> (B, D) and the new cache, equal to the last row of `__call__` on all so far;
        `tokens` (B,) where it takes them."""
        if self.looks_back:
            name = type(self).__name__.lower()
            raise Refused(f"ffn={name} looks back and says nothing of a token more: it cannot decode token by token")
        return self(x[:, None], **{name: each[:, None] for name, each in tokens.items()})[0][:, 0], cache

    def step_several(self, x: jax.Array, cache: Any, **tokens: jax.Array) -> tuple[jax.Array, Any]:
        """`step` of T tokens, x (B, T, D) -> (B, T, D) and the new cache."""
        if self.looks_back:
            one = lambda cache, inputs, at: self.step(inputs[0], cache, **inputs[1])
            return one_by_one(one, (x, tokens), cache, 0)
        # Each token on its own, as in a step, whatever else it makes of its neighbours.
        one = lambda x, tokens: self.step(x, cache, **tokens)[0]
        return jax.vmap(one, in_axes=1, out_axes=1)(x, tokens), cache

    def rewound(self, before: Any, after: Any, taken: jax.Array, *, read: int) -> Any:
        """The cache behind the first `taken` () of the `read` tokens that made `after` of `before`, 1 <= taken <= read;
        raises Refused where what it keeps cannot go back."""
        if self.looks_back:
            raise Refused(
                f"ffn={type(self).__name__.lower()} keeps of earlier tokens what cannot go back behind tokens that "
                "were not accepted; use ffn=mlp, or generate without a draft"
            )
        return after


def hidden_size(size: Size, ratio: float) -> int:
    """Width of the hidden layer, ratio * D rounded to whole channels; raises Refused on a ratio of nothing."""
    if ratio * size.dim < 1:
        raise Refused(f"ratio={ratio} of dim={size.dim} leaves no hidden channel")
    return round(ratio * size.dim)
