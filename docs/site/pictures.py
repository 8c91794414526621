"""Pictures of choices, drawn by what runs: here of what moves something between positions, in `curves` of other things.

Where a fixed pattern says what a query sees, that is drawn. Else it is measured: one token after the other is replaced,
and each row shows by how much the output there changes. Of a position the weights are drawn that it alone makes.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import curves
import numpy as np

from xformers_lab import drawing, shelves, spec
from xformers_lab.errors import LabError
from xformers_lab.nn.size import Size

LENGTH = 64  # of a pattern
SIZE = Size(LENGTH, dim=32, heads=2)
MEASURED = Size(32, dim=32, heads=2)  # of what is measured
CURVES = ("norm", "normaliser", "ffn")
SMALL = 4  # what large options are made
SHADES = (0.04, 0.12, 0.25, 0.5, 0.75)  # shares of the largest change from which on a square is darker
SEEN, BACKGROUND = "#0072b2", "#7f7f7f"


class Picture(NamedTuple):
    svg: str
    caption: str


def of(shelf: str, name: str) -> Picture | None:
    """The picture of a choice, None where nothing of it can be drawn alone."""
    if shelf in CURVES:
        heights, caption = curves.of(shelf, name)
        return None if heights is None else Picture(curves.svg(heights, SEEN, BACKGROUND), f"{caption}; untrained.")
    draw = {"attention": _attention, "position": _position, "depth": _depth}.get(shelf)
    return draw(name) if draw else None


def pattern(text: str, causal: bool = False) -> str:
    """SVG of what a choice of attention with a fixed pattern shows its queries; raises ValueError."""
    seen = shelves.sampled(_built(text), causal)
    if seen is None:
        raise ValueError(f"{text} has no fixed pattern")
    return _svg([(1.0, seen[0])])


def _built(text: str, size: Size = SIZE, rngs=None):
    return spec.build("attention", text, size, rngs=rngs)


def _small(name: str) -> str:
    """A choice of attention whose windows, blocks and ranks are so small that a picture shows several of them."""
    from flax import nnx

    options = spec.options(spec.entry("attention", name)).values()
    large: dict[str, object] = {
        option.name: SMALL for option in options if type(option.default) is int and option.default > 2 * SMALL
    }
    for kept in (large, *({key: large[key]} for key in large)):
        text = str(spec.Choice(name, kept))
        with contextlib.suppress(LabError, ValueError):
            nnx.eval_shape(lambda text=text: _built(text, MEASURED, nnx.Rngs(0)))
            return text
    return name


def _attention(name: str) -> Picture | None:
    from flax import nnx

    text = _small(name)
    seen = shelves.sampled(nnx.eval_shape(lambda: _built(text)), causal=False)
    if seen is not None:
        head = f", head 1 of {len(seen)}" if len(seen) > 1 else ""
        caption = f"`{text}`{head}, {LENGTH} positions: a row is a query, a column a key that it sees."
        return Picture(_svg([(1.0, seen[0])]), caption)
    changes, causal = _changes_of_layer(text)
    return Picture(_svg(_shaded(changes)), _caption(f"a layer of `{text}`" + (", causal" if causal else "")))


def _position(name: str) -> Picture:
    """The weights of full attention on a sequence of one token alone: all that differs is the position."""
    from xformers_lab.measure import maps

    model, task = _model(position=name, layers=1)
    (one,) = maps.of_model(model, np.full((1, MEASURED.length), task.vocab // 2, np.int32))
    weights = one.weights[0] / one.weights[0].max(-1, keepdims=True)  # of each query, the largest is 1
    caption = (
        f"Weights of full attention, head 1, with `position={name}` where every token is the same: a row is a query, a "
        f"column a key. {MEASURED.length} positions, causal, untrained; the darkest square is the largest of its row."
    )
    return Picture(_svg(_layers(weights, np.linspace(0.1, 0.9, 9).tolist())), caption)


def _depth(name: str) -> Picture | None:
    try:
        changes = _changes_of_model(depth=name)
    except LabError:  # it keeps no length, so a row has no position
        return None
    return Picture(_svg(_shaded(changes)), _caption(f"a causal model of four layers with `depth={name}`"))


def _caption(what: str) -> str:
    return (
        f"How much the output at each position (row) of {what} changes where the input at another (column) is "
        f"replaced: {MEASURED.length} positions, untrained, logarithmic shades."
    )


def _changes_of_layer(name: str) -> tuple[np.ndarray, bool]:
    """(T, T) changes of a layer's outputs, and whether it was run causally: where it only can be."""
    import jax
    from flax import nnx

    layer = _built(name, MEASURED, nnx.Rngs(0))
    causal = "bidirectional" in layer.refusals()
    x = jax.random.normal(jax.random.key(1), (MEASURED.length, MEASURED.dim))
    other = jax.random.normal(jax.random.key(2), x.shape)
    run = nnx.jit(lambda layer, x: layer(x, causal=causal)[0])
    return _changes(lambda rows: run(layer, rows), x, other), causal


def _model(**choices: Any) -> tuple[Any, Any]:
    """An untrained decoder without positions but for some choices, and its task."""
    from xformers_lab.config import Config, edit
    from xformers_lab.model import build_model, build_task

    sizes = {"seq_len": MEASURED.length, "dim": MEASURED.dim, "heads": MEASURED.heads, "layers": 4, "batch": 2}
    config = edit(Config(), **({"task": "copy", "model": "decoder", "position": "none"} | sizes | choices))
    task = build_task(config)
    return build_model(config, task), task


def _changes_of_model(**choices: Any) -> np.ndarray:
    """(T, T) changes of the logits of a decoder with some choices."""
    import jax
    from flax import nnx

    model, task = _model(**choices)
    tokens = jax.random.randint(jax.random.key(1), (MEASURED.length,), 0, task.vocab)
    run = nnx.jit(lambda model, rows: model(rows)[0])
    return _changes(lambda rows: run(model, rows), tokens, (tokens + 1) % task.vocab)


def _changes(run: Callable, x, other) -> np.ndarray:
    """(T, T): how far each output moves where each input in turn is another; run takes (B, T, ...) rows."""
    import jax.numpy as jnp

    axes = (1,) * (x.ndim - 1)
    replaced = jnp.eye(len(x), dtype=bool).reshape(len(x), len(x), *axes)
    rows = jnp.concatenate([x[None], jnp.where(replaced, other[None], x[None])])
    out = np.asarray(run(rows), np.float64)
    return np.linalg.norm(out[1:] - out[:1], axis=-1).T


def _shaded(changes: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """The shades of changes. Logarithmic: an output depends most on its own token."""
    top = changes.max()
    size = np.log1p(1e3 * changes / top) / np.log1p(1e3) if top else changes
    return _layers(size, SHADES)


def _layers(size: np.ndarray, shades: Sequence[float]) -> list[tuple[float, np.ndarray]]:
    """Opacity and squares of each shade, which begins where the size of a square is so much."""
    bounds = itertools.pairwise([*shades, np.inf])
    return [((step + 1) / len(shades), (low <= size) & (size < high)) for step, (low, high) in enumerate(bounds)]


def _svg(layers: list[tuple[float, np.ndarray]]) -> str:
    """A file whose colours do on a light page and on a dark one."""
    n = len(layers[0][1])
    paths = "".join(f'<path d="{drawing.path(seen)}" opacity="{opacity:g}"/>' for opacity, seen in layers if seen.any())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {n} {n}" width="{8 * n}" height="{8 * n}">'
        f'<rect width="{n}" height="{n}" fill="{BACKGROUND}" opacity="0.18"/><g fill="{SEEN}">{paths}</g></svg>\n'
    )


of = functools.cache(of)
