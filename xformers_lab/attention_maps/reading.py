"""The attention maps of a model on a text or an example of its task."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from xformers_lab import generate
from xformers_lab.attention_maps.maps import PARTS, AttentionMaps, Part
from xformers_lab.config import Config, edit
from xformers_lab.errors import BrokenChoice, Refused, UsageError, contained, in_words, outside
from xformers_lab.measure import maps
from xformers_lab.memory import Remembered
from xformers_lab.model import Model, build_task
from xformers_lab.model._source import EncoderInput
from xformers_lab.tasks import Batch, Split, Task
from xformers_lab.train import evaluation, prefetch
from xformers_lab.train.example_maps import labels

# Weights of all layers and heads, which are computed whole.
MOST = 2**25


def of_text(model: Model, task: Task, text: str, *, name: str = "", part: Part | None = None) -> AttentionMaps:
    """The maps of a text as a user types it: what `xlab generate --prompt` takes. Of an encoder-decoder the text is the
    source, the target is what the model says itself, the likeliest token each time, and `part` says which attention
    (default: cross). Raises UsageError where the text does not fit or there is no map."""
    found = parts_of_text(model, task, text, name=name)
    wanted = part or found[-1].part
    of_part = {one.part: one for one in found}
    if wanted not in of_part:
        raise UsageError(f"part={wanted}: this model has {', '.join(of_part)}")
    return of_part[wanted]


def parts_of_text(model: Model, task: Task, text: str, *, name: str = "") -> list[AttentionMaps]:
    """`of_text` of every part: one, or those of the encoder, the decoder and cross-attention."""
    inputs, valid, notes = _written(model, task, text)
    return of_inputs(model, task, inputs, valid, name=name, notes=notes)


def of_example(model: Model, task: Task, batch: Batch, *, name: str = "") -> list[AttentionMaps]:
    """The maps of the first row of a batch of the host, of every part. Raises UsageError where there is none."""
    first = lambda array: None if array is None else np.asarray(array)[:1]
    inputs = np.asarray(batch.inputs)[:1]
    told = map(first, (batch.valid, batch.documents, batch.marked))
    return of_inputs(model, task, inputs, *told, name=name)


def of_inputs(
    model: Model,
    task: Task,
    inputs: np.ndarray,
    valid: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    marked: np.ndarray | None = None,
    *,
    name: str = "",
    notes: Sequence[str] = (),
) -> list[AttentionMaps]:
    """The maps of inputs (1, T), valid (1, T) bool, documents (1, T) of packed data, marked (1, T) bool of a task that
    marks positions; of every part. Raises UsageError where there is none."""
    try:
        if jax.tree.leaves(nnx.state(model, Remembered)):
            raise Refused("a model that remembers looks at earlier segments too, which are no tokens of a text: no map")
        size = getattr(model, "size", None)
        if size is not None and (count := size.layers * size.heads * inputs.shape[1] ** 2) > MOST:
            raise Refused(f"{count:,} weights are too many, at most {MOST:,}: give a shorter text")
        with contained():
            found = maps.of_model(model, inputs, valid, documents, marked)
        if not all(np.isfinite(each.weights).all() for each in found):
            raise Refused("weights are no finite numbers: no map")
        return _parts(model, task, found, inputs, valid, documents, name, notes)
    except Refused as reason:
        raise UsageError(str(reason)) from None
    except UsageError:
        raise
    except Exception as error:
        if outside(error):
            raise BrokenChoice(in_words(error)) from error
        raise


def example(config: Config, task: Task, split: Split, number: int) -> Batch:
    """One example of a split as a batch of one row, numbered from 0 as `xlab show task=NAME` numbers them. Raises
    UsageError where there is none."""
    size = task.examples(split)
    if number < 0 or (size is not None and number >= size):
        last = "" if size is None else f" to {size - 1:,}"
        raise UsageError(f"example {number}: the {split} split has examples 0{last or ' and on'}")
    if size is None:
        step, row = divmod(number, evaluation.UNIT)
        batch = prefetch.checked(build_task(edit(config, batch=evaluation.UNIT, data_seed=0)), split, step)
    else:
        batch, row = task.take(split, np.array([number])), 0
    return jax.tree.map(lambda array: np.asarray(array)[row : row + 1], batch)


def _written(model: Model, task: Task, text: str) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Inputs (1, T), valid (1, T) and what is to be known of them."""
    length = task.setting.seq_len
    if task.channels or task.image is not None:
        raise UsageError("text: inputs of this task are numbers or pictures; look at an example of a split (--example)")
    try:
        tokens = task.encode(text)
    except ValueError as error:
        raise UsageError(f"text: {error}") from None
    if not tokens:
        raise UsageError("text: it is empty; give at least one token")
    if len(tokens) > length:
        raise UsageError(f"text: it has {len(tokens):,} tokens, and the model takes {length:,}: give a shorter one")
    if not isinstance(model, EncoderInput):
        return np.array([tokens], np.int32), None, []
    (prompt,), (source,) = generate.apart(model, [tokens], begin=task.begin)
    target, notes = list(prompt), []
    room = length - model.source - len(target)
    if len(target) <= max(1, len(task.begin)) and room > 0:
        options = {"sources": [source], "new": room, "length": length, "stop": task.stop}
        (said,) = generate.generate(model, [target], **options)
        target += said[:-1] if said and said[-1] in task.stop else said
        notes = ["the target is what the model says of the source, the likeliest token each time"]
    missing = model.source - len(source)
    inputs = [*source, *[model.blank or 0] * missing, *target]
    valid = [True] * len(source) + [False] * missing + [True] * len(target)
    return np.array([inputs], np.int32), np.array([valid]), notes


def _parts(
    model: Model,
    task: Task,
    found: list[maps.Map],
    inputs: np.ndarray,
    valid: np.ndarray | None,
    documents: np.ndarray | None,
    name: str,
    notes: Sequence[str],
) -> list[AttentionMaps]:
    """Layers of a kind together. Raises Refused where their rows are not the tokens."""
    T, S = inputs.shape[1], model.source
    real = np.ones(T, bool) if valid is None else valid[0]
    texts = labels(task, inputs[0])
    if isinstance(model, EncoderInput):
        filled = np.asarray(model.real_source(inputs[:, :S], None if valid is None else valid[:, :S]))
        real = real.copy()
        real[:S] &= filled[0] if filled.ndim == 2 else True
    whole, source, target = slice(None), slice(None, S), slice(S, None)
    sides: dict[Part, tuple[slice, slice]] = {
        "self": (whole, whole),
        "encoder": (source, source),
        "decoder": (target, target),
        "cross": (target, source),
    }
    gathered: dict[Part, list[maps.Map]] = {}
    for each in found:
        of: Part = "self" if not S else "decoder" if each.causal else "cross" if each.crosses else "encoder"
        gathered.setdefault(of, []).append(each)
    made = []
    for part in PARTS:
        layers, (queries, keys) = gathered.get(part), sides[part]
        if layers is None:
            continue
        shape = (len(texts[queries]), len(texts[keys]))
        if odd := [each.weights.shape for each in layers if each.weights.shape[1:] != shape]:
            raise Refused(
                f"a layer has {odd[0][1]} queries and {odd[0][2]} keys, and the text {shape[0]} tokens: its rows are "
                "no tokens, so there is no map"
            )
        if len({each.weights.shape for each in layers}) > 1:
            raise Refused("layers have different numbers of heads: no map")
        norms = [each.norms for each in layers if each.norms is not None]
        made.append(
            AttentionMaps(
                weights=np.stack([each.weights for each in layers]),
                queries=texts[queries],
                keys=texts[keys],
                real_queries=real[queries],
                real_keys=real[keys],
                causal=layers[0].causal,
                implied=[each.implied for each in layers],
                norms=np.stack(norms) if len(norms) == len(layers) else None,
                part=part,
                name=name or type(model).__name__.lower(),
                layers=list(range(1, len(layers) + 1)),
                heads=list(range(1, layers[0].weights.shape[0] + 1)),
                notes=notes,
                documents=None if documents is None or part != "self" else documents[0],
            )
        )
    return made
