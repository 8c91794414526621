"""Every mechanism of the shelf inside a model: it trains, every parameter of it learns, nothing else changes."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

NAMES = spec.names("attention")


def causal(name: str) -> bool:
    return "causal" not in spec.entry("attention", name).refuses


def small(name: str) -> str:
    """The mechanism with windows, blocks and the like that are small beside the sequence."""
    options = spec.options(spec.entry("attention", name)).values()
    fitting = [f"{option.name}=5" for option in options if type(option.default) is int and option.default >= 8]
    shrunk = ":".join([name, *fitting])
    try:
        spec.build("attention", shrunk, length=24, dim=32, heads=4, kv_heads=2)
    except UsageError:
        return name
    return shrunk


def config(attention: str, **changes) -> Config:
    first = attention.partition("+")[0].partition(":")[0]
    base = edit(Config(), task="copy" if causal(first) else "listops", attention=attention)
    small = {"seq_len": 24, "dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "batch": 4, "steps": 4, "warmup": 0}
    return edit(base, **(small | changes))


def _valid(batch):
    return None if batch.valid is None else jnp.asarray(batch.valid)


@pytest.mark.parametrize("name", kinds.one_of_each_kind())
def test_trains(name):
    """Two steps through scanned layers with grouped heads: finite, and every parameter of the mechanism learns."""
    still = without_gradient(config(small(name)))
    if still and causal(name):  # a first position that sees itself alone, say, learns nothing from its scores
        still &= without_gradient(config(small(name), task="listops"))
    assert not still, f"no gradient ever reaches {still}"


def without_gradient(chosen) -> set[str]:
    """Parameters of the mechanism that two steps give no gradient."""
    task = build_task(chosen)
    tx = optimizer.of(chosen, task)
    state = init(chosen, task, tx)
    step = jax.jit(make_train_step(chosen, task, structure(chosen, task), tx))
    after = state
    for at in range(2):
        after, metrics = step(after, prefetch.checked(task, "train", at))
        assert bool(metrics["ok"]) and np.isfinite(metrics["loss"])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    moments = [
        leaf for leaf in jax.tree_util.tree_leaves_with_path(after.opt) if ".nu" in jax.tree_util.keystr(leaf[0])
    ]
    assert moments
    names = {jax.tree_util.keystr(path): leaf for path, leaf in moments}
    return {name for name, leaf in names.items() if "attention" in name and not leaf.any()}


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    """In bfloat16 the block's output is bfloat16 and the loss float32, as for every other choice."""
    chosen = config(name, dtype="bfloat16")
    task = build_task(chosen)
    batch = prefetch.checked(task, "train", 0)
    logits, aux = jax.eval_shape(
        lambda: build_model(chosen, task)(jnp.asarray(batch.inputs), valid=_valid(batch), key=jax.random.key(0))
    )
    assert logits.dtype == jnp.float32
    assert all(value.shape == () for value in aux.metrics().values())


@pytest.mark.parametrize("name", [name for name in NAMES if causal(name)])
def test_alternates_with_another(name):
    """In a hybrid, whatever it carries from layer to layer passes by the layers between."""
    chosen = config(f"{name}+full", layers=4)
    task = build_task(chosen)
    model = nnx.eval_shape(lambda: build_model(chosen, task))
    batch = prefetch.checked(task, "train", 0)
    graph, variables = nnx.split(model)
    logits, _ = jax.eval_shape(lambda v: nnx.merge(graph, v)(jnp.asarray(batch.inputs), valid=_valid(batch)), variables)
    assert logits.shape[:2] == (4, 24)


def test_what_a_head_owns_may_be_empty():
    """One bucket needs no rotation: arrays of size 0 go to heads and their groups as others do."""
    check_config(edit(Config(), task="copy", attention="reformer:buckets=1", seq_len=13, dim=8, heads=2, layers=1))
