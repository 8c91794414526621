"""remat: what layers compute again in the backward pass changes no gradient, and memory falls by what was kept."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from test_train import TASK, tiny

from xformers_lab.check.tiny import PLAN, Tokens
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn import backward
from xformers_lab.tasks import Batch, Setting, Task
from xformers_lab.train import checkpoint, jobs, loop, selection, sizes
from xformers_lab.train.state import merge, split
from xformers_lab.train.step import make_objective

SMALL = {"seq_len": 12, "dim": 8, "heads": 2, "layers": 3, "batch": 3, "dropout": 0.1, "model": "decoder"}
HOWS = ("dots", "full")
# Each with something that a layer hands on, keeps, or is given beside its input.
CASES = {
    "packed documents": {"attention": "local:window=4", "position": "rope", "task": "packed"},
    "memory": {"memory": "xl:length=6", "position": "xl"},
    "losses of its own": {"ffn": "moe:top=2"},
    "statistics of gradients": {"norm": "pre:normaliser=powernorm"},
    "mechanisms in turn, a last period that is not whole": {"attention": "realformer+local:window=4"},
    "a layer again and again": {"depth": "universal:act=true"},
    "layers written out": {"layers": 1, "attention": "full", "plan": None},
    "two stacks": {"model": "encoder_decoder", "task": "copy", "seq_len": 16},
    "streams that are kept": {"depth": "reversible:backward=store"},
    "half precision": {"dtype": "bfloat16"},
}


class Packed(Tokens):
    """Rows of two documents."""

    packed = True

    def batch(self, split, step: int) -> Batch:
        batch = super().batch(split, step)
        documents = (np.arange(self.setting.seq_len) >= 1 + np.arange(4)[:, None] % 3).astype(np.int32)
        return dataclasses.replace(batch, documents=documents, valid=None)


def gradients(task: str = "tokens", plan: Any = PLAN, **changes) -> dict[str, np.ndarray]:
    """By path: the gradients of the parameters and of what the backward pass moves, the variables after, the sums."""
    config = edit(Config(), **(SMALL | changes))
    made: dict[str, type[Task]] = {"tokens": Tokens, "packed": Packed}
    if task in made:
        built: Task = made[task](Setting(config.seq_len, 4))
    else:
        built = build_task(edit(config, task=task))
    graph, params, extra, memory = split(build_model(config, built, plan))
    batch = built.batch("train", 0)
    memory = jax.tree.map(lambda leaf: np.repeat(leaf, len(batch.inputs), 1), memory)

    def run(params, extra, memory, batch, key):
        statistics = backward.values(merge(graph, params, extra, memory))
        differentiate = jax.grad(make_objective(built, graph), argnums=(0, 1), has_aux=True)
        return differentiate(params, statistics, extra, memory, batch, key)

    with jax.default_matmul_precision("highest"):
        everything = jax.jit(run)(params, extra, memory, batch, jax.random.key(1))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, everything)
    return {name: np.asarray(leaf, float) for name, leaf in checkpoint.named_leaves(numbers).items()}


def assert_equal(again: dict, plain: dict, relative: float) -> None:
    assert again.keys() == plain.keys()
    for name, leaf in plain.items():
        np.testing.assert_allclose(
            again[name], leaf, atol=relative * max(np.abs(leaf).max(initial=0), 1e-3), err_msg=name
        )


@pytest.mark.parametrize("case", kinds.every_third(list(CASES), None, pytest.mark.full))
def test_gradients_are_those_without(case):
    plain = gradients(**CASES[case])
    assert max(np.abs(leaf).max(initial=0) for leaf in plain.values()) > 0.01
    for remat in HOWS:
        assert_equal(gradients(**CASES[case], remat=remat), plain, 0.02 if case == "half precision" else 2e-5)


@pytest.mark.full
@pytest.mark.parametrize("attention", kinds.one_of_each_kind())
def test_gradients_of_every_mechanism_are_those_without(attention):
    changes = {"attention": attention, "layers": 2}
    try:
        check_config(edit(Config(), **(SMALL | changes)))
    except UsageError:
        changes["model"] = "encoder"
    assert_equal(gradients(**changes, remat="full"), gradients(**changes), 1e-4)


@pytest.fixture(scope="module")
def by_remat(tmp_path_factory) -> dict[str, dict]:
    """The sizes of a model whose layers run in a loop."""
    base = tiny("copy", tmp_path_factory.mktemp("runs"), seq_len=128, dim=32, heads=4, layers=9, batch=4)
    return {remat: sizes.of(edit(base, remat=remat)) for remat in ("none", *HOWS)}


def test_memory_falls_and_products_are_computed_again(by_remat):
    of = lambda read: [read(by_remat[remat]) for remat in ("none", *HOWS)]
    none, dots, full = of(lambda sizes: sizes["training_bytes"]["activations"])
    assert full < dots < none / 2
    none, dots, full = of(lambda sizes: sizes["flops_per_token"]["training"]["total"])
    assert none < dots < full < 4 / 3 * none, "a forward pass more, at most"
    forward = of(lambda sizes: sizes["flops_per_token"]["forward"])
    assert forward[0] == forward[1] == forward[2]
    parts = of(lambda sizes: sizes["flops_per_token"]["training"]["parts"])
    assert parts[1]["ffn"] == parts[0]["ffn"] < parts[2]["ffn"], "its products alone, which dots keeps"
    assert parts[0]["attention"] < parts[1]["attention"] < parts[2]["attention"]


def test_what_is_kept_is_what_is_said(by_remat):
    """full: the input of each layer; dots: what the projections and the first feed-forward layer gave besides."""
    none, dots, full = (by_remat[remat]["kept_bytes"]["parts"] for remat in ("none", *HOWS))
    one = 9 * 4 * 128 * 32 * 4  # (L, B, T, D) float32
    assert full == {"attention": 0, "ffn": 0, "rest": none["rest"] + one}
    assert dots == {"attention": 4 * one, "ffn": 4 * one, "rest": none["rest"] + one}
    assert none["attention"] > dots["attention"] and none["ffn"] > dots["ffn"]


def test_few_layers_are_a_loop_too(tmp_path):
    """Written out they would be in memory together."""

    def temp_bytes(layers: int) -> int:
        config = tiny("copy", tmp_path, seq_len=128, dim=32, heads=4, layers=layers, batch=4, remat="full")
        job = jobs.prepare(config, tmp_path)
        return job.compiled(selection.parted(job.target())[0]).temp_bytes

    stream = 4 * 128 * 32 * 4
    assert temp_bytes(6) - temp_bytes(3) < 10 * 3 * stream, "little more than the stream of three layers"


def test_where_it_is_done_already_it_is_refused(capsys):
    words = ["show", "task=copy", "depth=reversible", "layers=2", "remat=full"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "remat=full: depth=reversible computes" in err and "use remat=none" in err
    check_config(edit(Config(), task="copy", depth="reversible:backward=store", remat="full"))


def test_a_run_has_its_maps_all_the_same(tmp_path, whole_ends):
    """Whoever looks at layers sees them."""
    path = tmp_path / "uneven.py"
    path.write_text(TASK)
    record = loop.run(tiny(str(path), tmp_path, layers=2, remat="full", steps=2))
    assert "reason" not in record["maps"]
