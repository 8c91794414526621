from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention import Attention, Complexity, Cost, why_not
from xformers_lab.attention._engine.fourier import of_lines
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux


class Fnet(Attention):
    """FNet, token mixing by Fourier transforms (Lee-Thorp et al., 2021, arXiv 2105.03824).

    y = Re(F_T x F_D): the real part of a discrete Fourier transform over positions of one over channels. Nothing is
    learned.

    Padding is zeros to the transform, so it adds nothing; but the frequencies are those of the padded length, so the
    same sequence padded to another length gives other values, as in the paper.
    Deviations from the paper: none.
    """

    kind = "without attention"
    exact = True
    complexity = Complexity(
        time="O(T D log(T D))",
        memory="O(T D)",
        decoding="nothing, there is none",
        time_note=", with no products of matrices",
    )
    refuses: ClassVar = {
        "causal": "every output is a sum over all positions",
        "cross": "one sequence is transformed; there are no queries to another",
        "bias": "it has no scores",
        "map": "its transform mixes channels as well as positions",
    }

    def __call__(
        self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None, method="attend"
    ):
        if causal:
            raise Refused(why_not(type(self), "causal"))
        if memory is not None:
            raise Refused("fnet transforms one sequence: it has no queries to another; use another attention")
        if position is not None:
            self.check_position(position)
            if position.bias() is not None:
                raise Refused(why_not(self, "bias"))
        wide = x.astype(jnp.float32)
        wide = wide if valid is None else jnp.where(valid[:, :, None], wide, 0)
        return (_transformed(wide) if method == "attend" else _by_definition(wide)).astype(x.dtype), carry, Aux()

    def turns(self) -> bool:
        return False

    def cost(self, T: int, S: int) -> Cost:
        return Cost(flops=0, memory=T * self.size.head, state=0)


@jax.custom_vjp
def _transformed(x):
    """Re(F_T x F_D) of real x (B, T, D). Half of the channels' frequencies are enough: the other half of a real input
    is their conjugate, at the negative frequency of positions."""
    D = x.shape[2]
    channels = of_lines(jnp.fft.rfft, x)
    half = of_lines(jnp.fft.fft, channels.swapaxes(1, 2)).real
    mirrored = half[:, 1 : (D + 1) // 2][:, ::-1]
    mirrored = jnp.roll(mirrored[:, :, ::-1], 1, 2)
    return jnp.concatenate([half, mirrored], 1).swapaxes(1, 2)


# The transform is a symmetric linear map, C_T x C_D - S_T x S_D: its gradient is itself.
_transformed.defvjp(lambda x: (_transformed(x), None), lambda _, grad: (_transformed(grad),))


def _by_definition(x):
    """cos and sin as matrices: Re((C_T - i S_T) x (C_D - i S_D))."""
    cos, sin = zip(*map(_waves, x.shape[1:]), strict=True)
    return jnp.einsum("ts,bsd,de->bte", cos[0], x, cos[1]) - jnp.einsum("ts,bsd,de->bte", sin[0], x, sin[1])


def _waves(n: int):
    angle = 2 * np.pi / n * (np.outer(np.arange(n), np.arange(n)) % n)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
