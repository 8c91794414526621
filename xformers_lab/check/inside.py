"""What the kits of all shelves but attention ask of a choice inside tiny models."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab import spec
from xformers_lab.check.subject import Broken, NotApplicable, compare
from xformers_lab.check.tiny import BATCH, GARBAGE, Inside, exact
from xformers_lab.config import edit
from xformers_lab.depth import Context
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import build_model
from xformers_lab.train import checkpoint

# Relative to the largest logit: sums in another order, and another way to compute the same.
SAME, ANOTHER_WAY = 1e-5, 2e-4
# Of gradients in bfloat16, relative to the largest of an array.
HALF = 0.02
# How far from 1 the root mean square of what reaches the first layer may be at the start, and what to do.
UNIT = 0.1
QUIETER = "at the start: add to them what is ADDED as large, by `marked` of nn/embedding.py"


def documented(subject: Any) -> None:
    """The docstring begins with what it is, and has a line for every option."""
    choice = spec.entry(subject.shelf, spec.parse(subject.name).name)
    if not (choice.__doc__ or "").strip():
        raise Broken(f'{choice.__name__} has no docstring: write "Title (Authors, year, arXiv id)"')
    if silent := [option.name for option in spec.options(choice).values() if not option.help]:
        raise Broken(f'the docstring\'s "Options:" list has no line for {", ".join(silent)}')


def no_future(subject: Inside) -> None:
    """In a decoder, what comes later changes nothing."""
    model = subject.model
    if not model.causal:
        raise NotApplicable(str(subject.refusals["decoder"]))
    before, T = model.forward(model.tokens), model.tokens.shape[1]
    for cut in (np.arange(BATCH), T - 2 - np.arange(BATCH)):
        late = np.arange(T) > cut[:, None]
        after = model.forward(np.where(late, GARBAGE, model.tokens))
        _unchanged(after, before, ~late, "later tokens change in a decoder: `causal` says where not to look ahead")


def no_padding(subject: Inside) -> None:
    """What padding holds, however large, changes no answer about what is valid; and everything stays finite."""
    for model in subject.models:
        before = model.forward(model.tokens, model.valid)
        after = model.forward(np.where(model.valid, model.tokens, GARBAGE), model.valid)
        rows = model.valid if model.task.target == "token" else model.valid.any(1)
        if not np.isfinite(after).all():
            raise Broken(f"with padding, here a sample of nothing else, answers are not finite ({model.words})")
        _unchanged(after, before, rows, f"padding holds other tokens ({model.words}): leave out what is not `valid`")


def documents_apart(subject: Inside) -> None:
    """Of packed data, no document is told of the others of its row, or the choice refuses packed data."""
    model = next((model for model in subject.models if model.task.target == "token"), None)
    if model is None:
        raise NotApplicable("it gives one answer of a whole row")
    T = model.tokens.shape[1]
    ends = 1 + np.arange(BATCH)[:, None] + np.array([[0, T // 2]])
    documents = (np.arange(T)[None, :, None] >= ends[:, None]).sum(-1).astype(np.int32)
    try:
        before = model.packed(model.tokens, documents)
    except Refused as reason:
        raise NotApplicable(str(reason)) from None
    for document in range(3):
        own = documents == document
        after = model.packed(np.where(own, model.tokens, np.roll(model.tokens, 1, 0)), documents)
        when = "other documents of its row change: what may see them must refuse them (see nn/documents.py)"
        _unchanged(after, before, own, when)


def samples_apart(subject: Inside) -> None:
    """In evaluation, what one sample is told changes nothing in another."""
    model = subject.model
    before = model.forward(model.tokens)
    after = model.forward(np.concatenate([model.tokens[:1], np.roll(model.tokens[1:], 1, 1)]))
    _unchanged(after[:1], before[:1], np.ones(before.shape[:-1], bool)[:1], "other samples of the batch change")


def decoding(subject: Inside) -> None:
    """Five tokens at once, then one by one, a decoder says what it says of the whole."""
    model = subject.model
    if not model.causal:
        raise NotApplicable(str(subject.refusals["decoder"]))
    try:
        out = model.decoded(5)
    except Refused as reason:
        raise NotApplicable(str(reason)) from None
    expected = model.forward(model.tokens)[:, 4:]
    first = 4 + int(np.argmax(np.abs(out - expected).max((0, 2)) > ANOTHER_WAY * np.abs(expected).max()))
    advice = f"The first wrong token is {first}: look at what the cache holds before it, and at positions."
    compare(out, expected, ANOTHER_WAY, "token by token against the whole pass", advice)


def jit_equals_eager(subject: Inside) -> None:
    """Run as it is and compiled, with nothing padded and with a mask that says so, the values are the same."""
    model = subject.model
    with exact():
        out = np.asarray(model.plain(model.variables, jnp.asarray(model.tokens), None)[0])
    advice = "Look at what is computed by Python or numpy, and at what valid=None leaves out."
    compare(out, model.forward(model.tokens), ANOTHER_WAY, "as it is against compiled", advice)


def trains(subject: Inside) -> None:
    """Three steps in bfloat16 are finite, leave shapes and types of all state as they are, and give every parameter a
    gradient; what padding holds changes none of them."""
    model = subject.model
    grads, metrics_of_steps, state = model.trained(3)
    for number, metrics in enumerate(metrics_of_steps):
        if not bool(metrics["ok"]) or not np.isfinite(metrics["loss"]):
            raise Broken(f"the loss or its gradient is not finite in step {number} ({model.words}, bfloat16)")
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if shapes((state.extra, state.memory)) != shapes(model.variables[1:]):
        raise Broken("a training step changes the shape or type of variables that are no parameters")
    largest = jax.tree.map(lambda *steps: max(np.abs(np.asarray(step)).max() for step in steps), *grads)
    if still := [name for name, size in checkpoint.named_leaves(largest).items() if size == 0]:
        raise Broken(f"no gradient ever reaches {', '.join(still)} ({model.words})")
    others = checkpoint.named_leaves(model.trained(1, GARBAGE)[0][0])
    for name, leaf in checkpoint.named_leaves(grads[0]).items():
        where, advice = f"the gradient of {name} when padding holds other tokens", "Losses are of what is `valid`."
        compare(np.asarray(others[name]), np.asarray(leaf), HALF, where, advice)


def computed_again(subject: Inside) -> None:
    """With remat=full, and dropout, a training step has the gradients that it has without, and leaves the same."""
    model, plain = subject.model, {"dtype": "float32", "dropout": 0.1}
    try:
        again = model.trained(1, remat="full", **plain)
    except (Refused, UsageError) as reason:
        raise NotApplicable(str(reason)) from None
    before = model.trained(1, **plain)
    advice = "Look at what is drawn without a key, or kept outside of variables: a layer may run twice in a step."
    parts = lambda grads, _, state: {"the gradient": grads[0], "the step's": (state.extra, state.memory)}
    for what, leaves in parts(*before).items():
        others = checkpoint.named_leaves(parts(*again)[what])
        for name, leaf in checkpoint.named_leaves(leaves).items():
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                where = f"{what} {name} with remat=full"
                compare(np.asarray(others[name], float), np.asarray(leaf, float), ANOTHER_WAY, where, advice)


def half_precision(subject: Inside) -> None:
    """In bfloat16 what a layer is given and gives is bfloat16, and the logits are float32."""
    model = subject.model
    config = edit(model.config, dtype="bfloat16")

    def run(tokens):
        built: Any = build_model(config, model.task)
        valid = tokens > 0
        x = built.position.embed(built.embedding(tokens), jnp.arange(tokens.shape[1]), valid=valid)
        y = built.stack(built.entering(x), Context(built.position, valid, built.predict, tokens=tokens))[0]
        return x, y, built(tokens, valid=valid)[0]

    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct(model.tokens.shape, jnp.int32))
    wanted = {"embeddings": jnp.bfloat16, "layers": jnp.bfloat16, "logits": jnp.float32}
    for (what, dtype), one in zip(wanted.items(), shapes, strict=True):
        if one.dtype != dtype:
            raise Broken(f"{what} are {one.dtype} in bfloat16, not {jnp.dtype(dtype)}: cast to x.dtype what is given")


def evaluation_keeps_state(subject: Inside) -> None:
    """Evaluation leaves variables that are no parameters as they are."""
    model = subject.model
    before, after = checkpoint.named_leaves(model.extra), checkpoint.named_leaves(model.after(model.tokens)[0])
    for name, leaf in before.items():
        if not np.array_equal(leaf, after[name]):
            raise Broken(f"evaluation changes {name}: running statistics move in training alone (a key is given)")


def saved(subject: Inside) -> None:
    """What is no parameter comes back from a checkpoint, to the bit."""
    model = subject.model
    state = {"extra": model.extra, "memory": model.trained(1)[2].memory}
    if not jax.tree.leaves(state):
        raise NotApplicable("it has no variables but parameters")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, state, {})
        back, _ = checkpoint.restore(Path(folder), jax.tree.map(jnp.asarray, state), {})
    for name, leaf in checkpoint.named_leaves(state).items():
        if np.asarray(leaf).tobytes() != np.asarray(checkpoint.named_leaves(back)[name]).tobytes():
            raise Broken(f"{name} comes back changed from a checkpoint")


def _unchanged(after, before, rows, when: str) -> None:
    """Raises Broken where the logits of `rows` ((B, T), or (B,) of whole sequences) differ."""
    gap = np.where(rows, np.abs(after - before).max(-1), 0)
    if not gap.max() <= SAME * max(1.0, float(np.abs(before[rows]).max(initial=0))):
        sample, *at = np.unravel_index(gap.argmax(), gap.shape)
        where = f"sample {sample}" + "".join(f", position {one}" for one in at)
        raise Broken(f"the answer of {where} changes by {gap.max():.2g} when {when}")


PROPERTIES = [
    documented,
    no_future,
    no_padding,
    documents_apart,
    samples_apart,
    decoding,
    jit_equals_eager,
    trains,
    computed_again,
    half_precision,
    evaluation_keeps_state,
    saved,
]
