"""Feed-forward sub-layers: whether they look back as they say, and how one that does goes on in decoding; see inside.py
for the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab import spec
from xformers_lab.check import inside
from xformers_lab.check.subject import Broken, NotApplicable, compare, moved
from xformers_lab.check.tiny import Inside, exact
from xformers_lab.errors import Refused
from xformers_lab.ffn import Ffn
from xformers_lab.model import size_of

SAYS = "say `looks_back = True`, with `init_cache` and `step`, where a token's output depends on tokens before"
# A text of twelve tokens, and how many of it are read first, together; then how many more, of which some are kept.
LENGTH, FIRST, READ, TAKEN = 12, 5, 4, 2


def subject(choice: str) -> Inside:
    return Inside("ffn", choice, {"ffn": choice})


def looks_back(subject: Inside) -> None:
    """What a token becomes depends on tokens before it where `looks_back` says so, and nowhere else."""
    layer, x, tokens = _alone(subject)
    if reason := layer.not_causal():
        raise NotApplicable(reason)
    run = jax.jit(lambda x, tokens: layer(x, **tokens)[0])
    with exact():
        before, after = (np.asarray(run(rows, tokens)) for rows in (x, x.at[:, FIRST].add(1.0)))
    gap = np.abs(after - before)[:, FIRST + 1 :].max()
    told = gap > inside.SAME * max(1.0, float(np.abs(before).max()))
    if told and not layer.looks_back:
        raise Broken(f"what later tokens become changes by {gap:.2g} with an earlier one: {SAYS}")
    if layer.looks_back and not told:
        raise Broken("it says `looks_back = True`, and no later token changes with an earlier one: leave that out")


def goes_on(subject: Inside) -> None:
    """`step_several` of the first tokens and `step` of the others give the rows of the whole; read together, tokens
    leave what they leave one by one; and a cache that goes back behind some of them is that of the others."""
    layer, x, tokens = _alone(subject)
    if not layer.looks_back:
        raise NotApplicable("it looks at no token before, so that decoding keeps nothing of it")
    if reason := layer.not_causal():
        raise NotApplicable(reason)
    part = lambda start, end: (x[:, start:end], {name: rows[:, start:end] for name, rows in tokens.items()})

    def several(cache, start, end):
        rows, of_rows = part(start, end)
        return layer.step_several(rows, cache, **of_rows)

    def in_turn(cache, start, end):
        outs = []
        for at in range(start, end):
            y, cache = layer.step(x[:, at], cache, **{name: rows[:, at] for name, rows in tokens.items()})
            outs.append(y)
        return jnp.stack(outs, 1), cache

    def run():
        begun, before = several(layer.init_cache(len(x)), 0, FIRST)
        rest, last = in_turn(before, FIRST, LENGTH)
        others, left = several(before, FIRST, LENGTH)
        texts = {"token by token": rest, "the others at once": others}
        return (
            layer(x, **tokens)[0],
            before,
            {how: jnp.concatenate([begun, y], 1) for how, y in texts.items()},
            last,
            left,
        )

    with exact():
        whole, before, texts, last, left = jax.jit(run)()
    advice = "Look at what `step` is given of the tokens before, and at what it leaves."
    for how, y in texts.items():
        where = f"{FIRST} tokens at once, then {how}, against the whole"
        compare(np.asarray(y), np.asarray(whole), inside.ANOTHER_WAY, where, advice)
    _alike(left, last, "of tokens read at once, against one by one", advice)
    after = several(before, FIRST, FIRST + READ)[1]
    try:
        back = layer.rewound(before, after, jnp.int32(TAKEN), read=READ)
    except Refused:
        return
    expected = several(before, FIRST, FIRST + TAKEN)[1]
    advice = "Say in `rewound` how what you keep goes back, or refuse it there."
    _alike(back, expected, f"that went back to {TAKEN} of {READ} tokens", advice)


def _alone(subject: Inside) -> tuple[Ffn, jax.Array, dict[str, jax.Array]]:
    """The layer outside of a model, its parameters moved a little; inputs (B, T, D); tokens if it takes them."""
    size = size_of(subject.model.config)
    layer: Any = spec.build("ffn", subject.name, size, rngs=nnx.Rngs(0))
    if layer is None:
        raise NotApplicable("there is no such layer in a block")
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, LENGTH, size.dim)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, 9, x.shape[:2]), jnp.int32)
    return nnx.merge(graph, moved(params), rest), x, {"tokens": tokens} if layer.takes("tokens") else {}


def _alike(cache: Any, expected: Any, where: str, advice: str) -> None:
    """Raises Broken where two caches differ."""
    for (path, one), other in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(cache), strict=True):
        name = jax.tree_util.keystr(path) or "the state"
        here = np.asarray(other, np.float32), np.asarray(one, np.float32)
        compare(*here, inside.ANOTHER_WAY, f"{name} of the cache {where}", advice)


PROPERTIES = [*inside.PROPERTIES, looks_back, goes_on]
