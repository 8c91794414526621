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
from xformers_lab.errors import LabError, UsageError
from xformers_lab.nn.size import Size

LENGTH = 64  # of a pattern
SIZE = Size(LENGTH, dim=32, heads=2)
MEASURED = Size(32, dim=32, heads=2)  # of what is measured
CURVES = ("norm", "normaliser", "ffn")
SEGMENTS = 4  # of a text that is read with a memory
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
    draw = {"attention": _attention, "position": _position, "depth": _depth, "memory": _memory, "model": _kind}
    return draw[shelf](name) if shelf in draw else None


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
    # Some depths are for an encoder alone.
    kinds = {"a causal model": {}, "an encoder": {"model": "encoder", "task": "needle"}}
    for kind, choices in kinds.items():
        with contextlib.suppress(LabError):
            changes = _changes_of_model(depth=name, **choices)
            return Picture(_svg(_shaded(changes)), _caption(f"{kind} of four layers with `depth={name}`"))
    return None  # it keeps no length, so a row has no position


def _memory(name: str) -> Picture:
    """A text is read segment by segment: what is left of one in the next."""
    rows = _shaded(_changes_over_segments(memory=name))
    caption = _caption(
        f"one layer with `memory={name}`, which reads {SEGMENTS} segments of {MEASURED.length // SEGMENTS},"
    )
    return Picture(_svg(rows, every=MEASURED.length // SEGMENTS), caption)


def _kind(name: str) -> Picture | None:
    """What kinds of model see, on a task that has one answer for each token; the source of one comes first."""
    from xformers_lab.config import Config

    baseline = {"position": Config().model.position}  # which has none, and takes no other word for it
    for task, more in itertools.product(("copy", "needle"), ({}, baseline)):
        choices = {"model": name, "task": task, "layers": 1} | more
        with contextlib.suppress(LabError):
            model, _ = _model(**choices)
            source = f" The first {model.source} positions are the source." if model.source else ""
            svg = _svg(_shaded(_changes_of_model(**choices)), every=model.source)
            return Picture(svg, _caption(f"`model={name}` of one layer") + source)
    return None  # it reads images


def layers(text: str) -> str:
    """SVG of how many layers each token of a text went through, of a depth whose tokens differ in it."""
    from flax import nnx

    model, task = _model(depth=text)
    tokens = np.asarray(task.batch("test", 0).inputs[:1])
    passed = nnx.jit(lambda model, tokens: model(tokens)[1].tokens["computation"])(model, tokens)[0]
    height = max(4, int(np.ceil(passed.max())))
    share = np.clip(np.asarray(passed)[None] - np.arange(height)[::-1, None], 0, 1)  # the first layer is at the bottom
    return _svg(_layers(share, [0.125, 0.375, 0.625, 0.875]))


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


def _changes_over_segments(**choices: Any) -> np.ndarray:
    """(T, T) changes of the logits of a decoder that reads a text in SEGMENTS parts, from an empty memory."""
    import jax
    import jax.numpy as jnp

    from xformers_lab.train.state import merge, split

    part = MEASURED.length // SEGMENTS
    model, task = _model(task="lm", layers=1, seq_len=part, **choices)
    graph, params, extra, empty = split(model)

    @jax.jit
    def run(rows):
        memory, said = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(rows), 1), empty), []
        for at in range(0, MEASURED.length, part):
            reader = merge(graph, params, extra, memory)
            said.append(reader(rows[:, at : at + part])[0])
            memory = split(reader)[3]
        return jnp.concatenate(said, 1)

    tokens = jax.random.randint(jax.random.key(1), (MEASURED.length,), 0, task.vocab)
    return _changes(run, tokens, (tokens + 1) % task.vocab)


def _changes(run: Callable, x, other) -> np.ndarray:
    """(T, T): how far each output moves where each input in turn is another; run takes (B, T, ...) rows."""
    import jax.numpy as jnp

    axes = (1,) * (x.ndim - 1)  # of a position's channels
    replaced = jnp.eye(len(x), dtype=bool).reshape(len(x), len(x), *axes)
    rows = jnp.concatenate([x[None], jnp.where(replaced, other[None], x[None])])
    out = np.asarray(run(rows), np.float64)
    if out.ndim < 3:
        raise UsageError("there is one output for all positions")
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


def _svg(layers: list[tuple[float, np.ndarray]], every: int = 0) -> str:
    """A file whose colours do on a light page and on a dark one. every: where a line parts so many positions."""
    high, wide = layers[0][1].shape
    paths = "".join(f'<path d="{drawing.path(seen)}" opacity="{opacity:g}"/>' for opacity, seen in layers if seen.any())
    parts = "".join(f"M{at} 0v{high}M0 {at}h{wide}" for at in range(every, wide, every)) if every else ""
    lines = f'<path d="{parts}" stroke="{BACKGROUND}" stroke-width="0.3" opacity="0.8"/>' if parts else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{8 * wide}" height="{8 * high}">'
        f'<rect width="{wide}" height="{high}" fill="{BACKGROUND}" opacity="0.18"/>'
        f'<g fill="{SEEN}">{paths}</g>{lines}</svg>\n'
    )


of = functools.cache(of)
