"""Curves of choices that move nothing between positions: what becomes of the size of a vector. Sizes are root mean
squares over channels; nothing is trained."""

from typing import Any

import numpy as np

from xformers_lab import spec
from xformers_lab.nn.size import Size

DIM, LAYERS = 32, 16
MOST = 4.0  # the greatest size of an input
SIDE = 64  # points of a curve, and units of a picture


def of(shelf: str, name: str) -> tuple[np.ndarray | None, str]:
    """Heights of a curve (P,), None where there is no layer, and what it shows."""
    if shelf == "norm":
        heights = _over_depth(name)
        return heights, f"Size of the residual stream over {2 * LAYERS} feed-forward sub-layers with `norm={name}`"
    heights = _over_size(shelf, name)
    return heights, f"Size of the output of `{shelf}={name}` over that of the input, from 0 to {MOST:g}"


def svg(heights: np.ndarray, colour: str, background: str) -> str:
    """A curve as a file, from 0 to its greatest height, or to 1 where that is less."""
    across = np.linspace(0, SIDE, len(heights))
    up = SIDE - (SIDE - 2) * heights / max(1.0, float(heights.max()))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" width="{8 * SIDE}" height="{8 * SIDE}">'
        f'<rect width="{SIDE}" height="{SIDE}" fill="{background}" opacity="0.18"/>'
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/></svg>\n'
    )


def _over_size(shelf: str, name: str) -> np.ndarray | None:
    """Sizes of the outputs of a normaliser or feed-forward layer, of one direction at sizes from 0 to MOST; None where
    there is no such layer."""
    import jax
    import jax.numpy as jnp

    from xformers_lab.nn.layer_context import LayerContext, apply

    if (layer := _built(shelf, name)) is None:
        return None
    x = jax.random.normal(jax.random.key(1), (DIM,))
    x = jnp.linspace(0, MOST, SIDE)[None, :, None] * x / jnp.sqrt(jnp.mean(x**2))
    if shelf == "normaliser":
        return _size(apply(layer, x, LayerContext()))
    more = {"tokens": jnp.zeros(x.shape[:2], jnp.int32)} if layer.takes("tokens") else {}
    return _size(layer(x, **more)[0])


def _over_depth(name: str) -> np.ndarray:
    """Sizes of the residual stream before and behind each of the sub-layers of a stack."""
    import jax

    from xformers_lab.nn.layer_context import LayerContext

    x, context = jax.random.normal(jax.random.key(1), (1, SIDE, DIM)), LayerContext()
    sizes = [_size(x).mean()]
    for number in range(2 * LAYERS):
        placed, layer = _built("norm", name, number), _built("ffn", "mlp", number)
        placed.start(layer)
        x = placed.after(x, layer(placed.before(x, context))[0], context)
        sizes.append(_size(x).mean())
    return np.array(sizes)


def _built(shelf: str, name: str, seed: int = 0) -> Any:
    from flax import nnx

    return spec.build(shelf, name, Size(SIDE, dim=DIM, heads=2, layers=LAYERS), rngs=nnx.Rngs(seed))


def _size(x: Any) -> np.ndarray:
    """The size of each of the vectors of the first sample of x (1, P, D): (P,)."""
    return np.sqrt(np.mean(np.asarray(x[0], np.float64) ** 2, -1))
